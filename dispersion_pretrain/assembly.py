"""Puts the parts of a run together, or only describes them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from dispersion_pretrain import distributed, metrics, optim, provenance
from dispersion_pretrain.baselines import (
    Distillation,
    NoisyEmbeddings,
    TeacherPlan,
    count_resets,
    forgets_at,
    fresh_embeddings,
    initial_deviation,
    load_teacher,
    plan_teacher,
)
from dispersion_pretrain.config import DispersionSettings, Settings
from dispersion_pretrain.corpora import Corpora, CorporaPlan
from dispersion_pretrain.data import Batch, BatchStream
from dispersion_pretrain.dispersion import check_own_pair_sum
from dispersion_pretrain.engine import DeepSpeedEngine, sharded_for_inference
from dispersion_pretrain.faults import FaultWatch
from dispersion_pretrain.layout import BatchLayout, legal_micro_batches
from dispersion_pretrain.model import ModelSize, build_model, has_bare_head, model_config, model_size
from dispersion_pretrain.objective import DispersionTerm, GradientRatioCap, StepContext, TrainingModule, options_of


@dataclass
class RunParts:
    """Everything that a run is made of; the loop in train.py drives it."""

    settings: Settings
    device: torch.device
    layout: BatchLayout
    layers: list[int]  # hidden states of the dispersion term
    size: ModelSize
    hub_config: PretrainedConfig
    corpora: Corpora
    engine: DeepSpeedEngine
    gradient_cap: GradientRatioCap | None  # of the dispersion term
    teacher: TeacherPlan | None  # of distillation
    faults: FaultWatch
    totals: metrics.StepTotals = field(default_factory=metrics.StepTotals)

    def watched_modules(self) -> list[tuple[str, nn.Module]]:
        """What of a forward pass a profile shows by itself."""
        module: Any = self.engine.module
        parts = [("loss head", module.model.get_output_embeddings()), ("dispersion", module.dispersion)]
        return [(name, part) for name, part in parts if part is not None]

    def tokens(self, step: int) -> int:
        """Tokens seen after `step` steps."""
        return step * self.settings.training.global_batch_tokens

    def learning_rate(self, step: int) -> float:
        """Of the 0-based step."""
        training = self.settings.training
        return optim.learning_rate(
            self.tokens(step),
            peak=self.settings.optimizer.learning_rate,
            schedule=self.settings.schedule,
            max_tokens=training.max_tokens,
            step_tokens=training.global_batch_tokens,
        )

    def context(self, step: int) -> StepContext:
        """What the objective must know of the 0-based step. Samples are whole blocks, so each has length - 1
        targets.
        """
        settings = self.settings
        return StepContext(
            step=step,
            targets=settings.global_batch_sequences * (settings.data.sequence_length - 1),
            shares=self.layout.world_size * self.layout.accumulation,
            coefficient=self.coefficient(step),
            layers=tuple(self.layers),
        )

    def coefficient(self, step: int) -> float:
        """Of the dispersion term at the 0-based step: the schedule's, within the bound that gradients set; 0: off."""
        term, training = self.settings.dispersion, self.settings.training
        if term is None:
            return 0.0
        scheduled = optim.dispersion_coefficient(
            self.tokens(step), settings=term, max_tokens=training.max_tokens, step_tokens=training.global_batch_tokens
        )
        return min(scheduled, self.gradient_cap.bound) if self.gradient_cap else scheduled

    def forget_embeddings(self, step: int) -> None:
        """Re-initialise the input embeddings and clear their moments, where that is due before the 0-based step.

        With tied embeddings that matrix is the head as well, so the predictions are forgotten too.

        Collective: world, at ZeRO stage 3.
        """
        settings = self.settings
        if not forgets_at(settings.active_forgetting, step, settings.num_steps):
            return
        model: Any = self.engine.module.get_submodule("model")
        embedding = model.get_input_embeddings()
        deviation = initial_deviation(self.hub_config)
        value = fresh_embeddings(embedding, standard_deviation=deviation, seed=settings.run.seed, step=step)
        self.engine.reset_parameter(embedding.weight, value)
        self.faults.expect_jump()

    def batches(self, first_step: int) -> BatchStream:
        """This rank's micro-batches from a step on, behind what was passed over; read ahead in the background."""
        return self.corpora.batches(self.layout, distributed.rank(), first_step + self.faults.data_offset_steps)

    def validation_batches(self, num_sequences: int) -> Iterator[Batch]:
        """This rank's share of the first validation sequences; the same number of batches on every rank."""
        return self.corpora.validation_batches(self.layout, distributed.rank(), num_sequences)

    @property
    def device_name(self) -> str:
        """What this rank computes on: its GPU, and the CPU where that does the update."""
        return provenance.device_name(self.device, with_processor=self.settings.zero.offload_optimizer)

    @property
    def flops_per_token(self) -> int:
        return metrics.model_flops_per_token(
            self.size.matmul_parameters, self.size.layers, self.size.attention_width, self.settings.data.sequence_length
        )

    @property
    def peak_flops(self) -> float | None:
        """Of one device; None where it is not known."""
        if self.device.type != "cuda":
            return None
        return metrics.peak_flops(torch.cuda.get_device_name(self.device), self.settings.model.precision)


@dataclass(frozen=True)
class Plan:
    """What the settings come to on a number of ranks, without a weight in memory."""

    corpora: CorporaPlan | None  # None: they were not read
    layout: BatchLayout
    hub_config: PretrainedConfig
    size: ModelSize
    layers: list[int]
    teacher: TeacherPlan | None = None

    @classmethod
    def make(cls, settings: Settings, world_size: int, *, read_corpora: bool = True) -> Plan:
        """Check that settings, corpora, model and number of ranks fit together; reads the corpora's manifests.

        Without `read_corpora` nothing is known of them: the model must say its vocabulary, and no tokenizers are
        compared. So a run can be planned where its corpora are not.

        Raises:
            ValueError: they do not; names the place, the value and what is legal.
        """
        layout = BatchLayout.derive(settings, world_size)
        corpora = CorporaPlan.make(settings.data) if read_corpora else None
        hub_config = model_config(
            settings.model,
            vocabulary=corpora.vocab_size if corpora is not None else None,
            sequence_length=settings.data.sequence_length,
        )
        size = model_size(settings.model, hub_config)
        layers = _check_term(settings.dispersion, size.layers) if settings.dispersion else []
        if settings.active_forgetting is not None:
            initial_deviation(hub_config)
            _check_resets(settings)
        teacher = None
        if settings.distillation is not None:
            teacher = plan_teacher(
                settings.distillation,
                vocabulary=corpora.vocab_size if corpora is not None else hub_config.vocab_size,
                sequence_length=settings.data.sequence_length,
                tokenizer=corpora.tokenizer() if corpora is not None else None,
            )
        return cls(corpora, layout, hub_config, size, layers, teacher)

    def describe(self, settings: Settings) -> str:
        """The figures as lines of text."""
        size, layout, training = self.size, self.layout, settings.training
        sequences, tokens = settings.global_batch_sequences, settings.num_steps * training.global_batch_tokens
        paths = ", ".join(source.path for source in settings.data.sources)
        lines = [
            f"model        {self.hub_config.model_type}, {size.parameters:,} parameters, {size.layers} layers of "
            f"width {size.width}, vocabulary {size.vocabulary:,}, {settings.model.precision}",
            *(self.corpora.describe(tokens) if self.corpora is not None else [f"corpus       {paths}: not read"]),
            f"step         {training.global_batch_tokens:,} tokens = {sequences:,} sequences = {layout.world_size} "
            f"ranks x {layout.micro_batch} micro-batch x {layout.accumulation} accumulation",
            *self._describe_finder(settings),
            f"run          {settings.num_steps:,} steps, {tokens:,} tokens, into {settings.run_folder}",
            f"ZeRO         stage {settings.zero.stage}",
            *self._describe_head(settings),
            *self._describe_baselines(settings),
        ]
        term = settings.dispersion
        if term is None or term.coefficient == 0:
            return "\n".join([*lines, "dispersion   off"])
        embeddings = term.pool_sequences * term.tokens_per_sequence
        kind = term.variant if term.angle == "arccos" else f"{term.variant} ({term.angle})"
        where = (
            f"gathered over {layout.pool_ranks} ranks"
            if layout.pool_ranks > 1
            else f"{layout.pools_per_rank} on each rank"
        )
        lines.append(
            f"dispersion   {term.coefficient:g} x {kind}, mean over {len(self.layers)} layers; pools of "
            f"{term.pool_sequences} sequences x {term.tokens_per_sequence} tokens "
            f"= {embeddings:,} embeddings, {where}"
        )
        changes = []
        if term.warmup_tokens:
            changes.append(f"rises over {term.warmup_tokens:,} tokens")
        if term.decay_tokens:
            changes.append(f"falls over the last {term.decay_tokens:,} tokens to {term.final_ratio:g} of its peak")
        if term.gradient_ratio_cap:
            others = "gradient of cross-entropy" + (" and distillation" if settings.distillation is not None else "")
            changes.append(f"is bound to {term.gradient_ratio_cap:g} x the {others}")
        if changes:
            lines.append(f"             the coefficient {', '.join(changes)}")
        return "\n".join(lines)

    def _describe_finder(self, settings: Settings) -> list[str]:
        """What the micro-batch will be, where that is not known yet."""
        if settings.training.micro_batch != "auto":
            return []
        legal = ", ".join(map(str, legal_micro_batches(settings, self.layout.world_size)))
        return [f"             micro-batch auto: the largest that fits of {legal} is found before training"]

    def _describe_head(self, settings: Settings) -> list[str]:
        """Why logits are held whole although the settings want pieces; nothing where they are not."""
        if settings.model.loss_head == "whole":
            return []
        if settings.distillation is not None:
            return ["loss head    whole logits in training: the divergence from the teacher reads them"]
        if not has_bare_head(self.hub_config):
            return [
                f"loss head    whole logits: {self.hub_config.model_type} does more with them than a matrix product"
            ]
        return []

    def _describe_baselines(self, settings: Settings) -> list[str]:
        lines = []
        if settings.noisy_embeddings is not None:
            bound = settings.noisy_embeddings.alpha / (settings.data.sequence_length * self.size.width) ** 0.5
            lines.append(f"noise        uniform in +-{bound:.2g} on the input embeddings")
        forgetting, num_steps = settings.active_forgetting, settings.num_steps
        if forgetting is not None:
            resets = count_resets(forgetting, num_steps, num_steps)
            lines.append(
                f"forgetting   of the input embeddings every {forgetting.every_steps:,} steps, {resets:,} times"
            )
        distillation = settings.distillation
        if distillation is not None and self.teacher is not None:
            lines.append(
                f"teacher      {distillation.teacher}: {self.teacher.config.model_type}, {self.teacher.parameters:,} "
                f"parameters{', sharded' if distillation.sharded else ''}; {distillation.weight:g} x the divergence at "
                f"temperature {distillation.temperature:g}; {self.teacher.compared}"
            )
        return lines


def _check_resets(settings: Settings) -> None:
    """Refuse a section of which a run would see nothing."""
    section, num_steps = settings.active_forgetting, settings.num_steps
    assert section is not None
    if not count_resets(section, num_steps, num_steps):
        raise ValueError(
            f"active_forgetting.every_steps: {section.every_steps}, but the run has {num_steps} steps, with no reset "
            f"in its last {section.last_phase:.0%}, so none would take place. Fewer than "
            f"{(1 - section.last_phase) * num_steps:g} are allowed. Lower it or remove the section."
        )


def _check_term(settings: DispersionSettings, num_layers: int) -> list[int]:
    """The chosen layers. Raises ValueError where the term does not fit the model or is not known."""
    layers = settings.layer_indices(num_layers)
    if settings.gradient_ratio_cap is not None and layers[-1] != num_layers:
        raise ValueError(
            f"dispersion.gradient_ratio_cap: it is measured at the last hidden state, layer {num_layers}, but "
            f"dispersion.layers are {layers}. The last layer must be among them. Add it or remove the cap."
        )
    try:
        check_own_pair_sum(options_of(settings))
    except ValueError as error:
        raise ValueError(f"dispersion.{error}") from None
    return layers


def dispersion_term(settings: Settings, layout: BatchLayout, layers: list[int]) -> DispersionTerm | None:
    """The term of this rank in this layout; None where its section is off. Collective: world, to make pool groups."""
    if settings.dispersion is None:
        return None
    return DispersionTerm(
        settings.dispersion,
        layers=layers,
        seed=settings.run.seed,
        pools_per_rank=layout.pools_per_rank,
        pool_group=distributed.pool_groups(layout.pool_ranks),
    )


def assemble(settings: Settings, device: torch.device) -> RunParts:
    """Build model, engine and data of a run on this rank.

    Collective: world.

    Raises:
        ValueError: as `Plan.make`; the same on every rank.
        RuntimeError: a damaged corpus.
    """
    plan = Plan.make(settings, distributed.world_size())
    assert plan.corpora is not None
    corpora = Corpora(plan.corpora, settings.run.seed)
    engine, term = build_engine(settings, plan, device)
    return RunParts(
        settings=settings,
        device=device,
        layout=plan.layout,
        layers=plan.layers,
        size=plan.size,
        hub_config=plan.hub_config,
        corpora=corpora,
        engine=engine,
        gradient_cap=term.cap if term is not None else None,
        teacher=plan.teacher,
        faults=FaultWatch(settings.faults, settings.global_batch_sequences),
    )


def build_engine(settings: Settings, plan: Plan, device: torch.device) -> tuple[DeepSpeedEngine, DispersionTerm | None]:
    """Build the model of a plan with its objective in an engine, in training mode, and seed dropout.

    Collective: world.
    """
    distillation = None
    if plan.teacher is not None:  # before anything is seeded: reading it leaves no trace in the random numbers
        distillation = _distillation(settings, plan, device)
    distributed.seed_everything(settings.run.seed)  # every rank builds the same weights
    model = build_model(settings.model, plan.hub_config)
    term = dispersion_term(settings, plan.layout, plan.layers)
    noise = None
    if settings.noisy_embeddings is not None:
        noise = NoisyEmbeddings(settings.noisy_embeddings, seed=settings.run.seed)
    module = TrainingModule(model, term, noise=noise, distillation=distillation)
    engine = DeepSpeedEngine(module, settings, plan.layout)
    engine.train()
    distributed.seed_dropout(settings.run.seed)
    return engine, term


def _distillation(settings: Settings, plan: Plan, device: torch.device) -> Distillation:
    section = settings.distillation
    assert section is not None and plan.teacher is not None and plan.corpora is not None
    teacher = load_teacher(settings, plan.teacher.config)
    teacher = sharded_for_inference(teacher) if section.sharded else teacher.to(device)
    return Distillation(section, teacher, vocabulary=plan.corpora.vocab_size)
