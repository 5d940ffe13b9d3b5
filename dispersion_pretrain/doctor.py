"""Proof at start: gradients through the run's own engine against those of one process, in length and direction.

A factor such as 1/ranks or 1/accumulation in the gradient of one term changes what a run optimizes and shows in no loss
curve; gradient clipping hides it as well. So each start takes a tiny model of the run's family through the real train
step, engine, ranks, pools and accumulation, and compares with plain torch on the joined batch.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

from dispersion_pretrain import distributed
from dispersion_pretrain.assembly import Plan, dispersion_term
from dispersion_pretrain.config import Settings
from dispersion_pretrain.data import Batch
from dispersion_pretrain.engine import DeepSpeedEngine, start_distributed
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.metrics import StepTotals
from dispersion_pretrain.model import TINY_LAYERS, TINY_VOCABULARY, build_model, model_config, tiny_fields
from dispersion_pretrain.objective import StepContext, TrainingModule
from dispersion_pretrain.settings_file import parse_settings
from dispersion_pretrain.train import train_step

Gradients = dict[str, Tensor]  # full gradients by parameter name, float32


@dataclass(frozen=True)
class Comparison:
    """The gradient of one term through the engine beside the reference."""

    term: str
    length: float  # of the reference
    direction: float  # cosine between the two
    deviation: float  # distance between the two scaled to length 1: what the cosine only shows squared
    worst: str  # the parameter with the largest share of that distance

    def fault(self, bound: float, layout: BatchLayout) -> str | None:
        """What is wrong, with the factor where it is one; None if length and direction are within `bound`."""
        # written so that a number that is not finite is a fault
        if abs(self.length - 1) <= bound and self.deviation <= bound:
            return None
        term = "the dispersion term" if self.term == "dispersion" else self.term
        text = f"gradient of {term}: {self.length:.4f} of the reference"
        factor = factor_name(self.length, layout)
        if factor and abs(self.length - 1) > bound:
            text += f" = {factor}"
        if self.deviation <= bound:
            return f"{text}, direction {self.direction:.7f}"
        return f"{text}, direction differs: cosine {self.direction:.4f}, most of it in {self.worst}"


def compare(term: str, found: Gradients, reference: Gradients) -> Comparison:
    """All parameters together, in float64; the same names in both."""
    names = sorted(reference)
    found_parts = [found[name].flatten().cpu().double() for name in names]
    reference_parts = [reference[name].flatten().cpu().double() for name in names]
    found_norm = math.hypot(*(float(part.norm()) for part in found_parts))
    reference_norm = math.hypot(*(float(part.norm()) for part in reference_parts))
    if not reference_norm > 0:
        raise RuntimeError(
            f"doctor: the reference gradient of {term} has length {reference_norm}, which proves nothing. A term with "
            "a gradient at random weights is needed. Start with run.doctor=false."
        )
    scale = 1 / found_norm if found_norm else 0.0
    product = sum(float(a @ b) for a, b in zip(found_parts, reference_parts, strict=True))
    distances = [
        float((a * scale - b / reference_norm).norm()) for a, b in zip(found_parts, reference_parts, strict=True)
    ]
    return Comparison(
        term=term,
        length=found_norm / reference_norm,
        direction=product * scale / reference_norm,
        deviation=math.hypot(*distances),
        worst=names[max(range(len(names)), key=distances.__getitem__)],
    )


def factor_name(length: float, layout: BatchLayout) -> str | None:
    """The counts of the layout that explain a length within 1 %, such as "1/W (W = 4 ranks)"; None if none does.

    Where several counts are equal, all are named.
    """
    ranks, steps = layout.world_size, layout.accumulation
    pools = ranks // layout.pool_ranks * layout.pools_per_rank
    counts = [
        ("W", ranks, f"W = {ranks} ranks"),
        ("accumulation", steps, f"accumulation = {steps} micro-steps"),
        ("(pools)", pools, f"{pools} pools a micro-step"),
    ]
    if ranks > 1 and steps > 1:
        counts.append(("(W accumulation)", ranks * steps, f"W = {ranks} ranks, accumulation = {steps}"))
    if 1 < layout.pool_ranks < ranks:
        counts.append(("(ranks of a pool)", layout.pool_ranks, f"{layout.pool_ranks} ranks share a pool"))
    if 1 < layout.pools_per_rank < pools:
        counts.append(("(pools of a rank)", layout.pools_per_rank, f"{layout.pools_per_rank} pools a rank"))
    found = []
    for name, count, meaning in [*counts, ("2", 2, "")]:
        for text, factor in ((f"1/{name}", 1 / count), (f"x {name.strip('()')}", float(count))):
            if count > 1 and abs(length / factor - 1) < 0.01:
                found.append(f"{text} ({meaning})" if meaning else text)
    return " or ".join(found[:-1] if len(found) > 1 and found[-1] in ("1/2", "x 2") else found) or None


@dataclass(frozen=True)
class Proof:
    """The verdict, the same on every rank."""

    comparisons: list[Comparison]  # of each term, that of the rank which is furthest off
    bound: float
    layout: BatchLayout  # of the proof; its counts but accumulation are the run's
    accumulation: int  # the run's
    seconds: float

    @property
    def faults(self) -> list[str]:
        """What is wrong, a text a term."""
        found = [comparison.fault(self.bound, self.layout) for comparison in self.comparisons]
        return [fault for fault in found if fault is not None]

    def __str__(self) -> str:
        figures = "; ".join(f"{c.term} length {c.length:.7f} direction {c.direction:.7f}" for c in self.comparisons)
        capped = f", accumulation {self.layout.accumulation} for {self.accumulation}"
        note = capped if self.layout.accumulation != self.accumulation else ""
        return f"gradients {'WRONG' if self.faults else 'OK'}: {figures}{note}, {self.seconds:.1f} s"


_TINY_MODEL_FAILED = "doctor: a tiny model of this family fails in one process; run.doctor=false starts without it"


def prove_gradients(
    settings: Settings, layout: BatchLayout, hub_config: PretrainedConfig, device: torch.device
) -> Proof:
    """Take the gradient of each term of the objective through the engine and in one process, and compare.

    Left out are noise, forgetting, distillation and the bound of the coefficient. Random generators, the default type
    and memory are as before at the end; nothing is written.

    Collective: world.

    Raises:
        RuntimeError: the tiny model does not run, or a term has no gradient; on every rank.
    """
    started = time.monotonic()
    with undisturbed():
        tiny = tiny_settings(settings, layout, hub_config)
        tiny_layout = BatchLayout.derive(tiny, layout.world_size)
        reference = distributed.from_main(_TINY_MODEL_FAILED, lambda: one_process(tiny, device))
        found = through_engine(tiny, tiny_layout, device)
        with distributed.failing_together("doctor: comparison of gradients"):
            own = [compare(term, found[term], gradients) for term, gradients in reference.items()]
    by_rank = distributed.gather_objects(own)
    return Proof(
        comparisons=[max(of_term, key=_distance) for of_term in zip(*by_rank, strict=True)],
        bound=_BOUNDS[settings.model.precision],
        layout=tiny_layout,
        accumulation=layout.accumulation,
        seconds=time.monotonic() - started,
    )


# Measured through stages 0 to 3: float32 at most 3e-7 off on CPUs, where only the order of sums differs (GPUs are given
# some room); bf16 with its 8 bits at most 0.009. A factor is far beyond either.
_BOUNDS = {"float32": 1e-4, "bf16": 0.03}


def _distance(comparison: Comparison) -> float:
    distance = abs(comparison.length - 1) + comparison.deviation
    return distance if math.isfinite(distance) else math.inf


def refuse_wrong_gradients(settings: Settings) -> None:
    """Join the ranks, prove the gradients and print the verdict on rank 0; before everything else of a run.

    Collective: world.

    Raises:
        ValueError: as `Plan.make`.
        RuntimeError: the gradient of a term is not the reference's; the same on every rank.
    """
    device = start_distributed(settings.faults.hang_s)
    plan = Plan.make(settings, distributed.world_size())
    proof = prove_gradients(settings, plan.layout, plan.hub_config, device)
    if proof.faults:
        raise RuntimeError(
            f"doctor: {'; '.join(proof.faults)}. Length and direction of the gradient of one process are needed, "
            f"within {proof.bound:g}. The factor lies in objective.py, dispersion.py, engine.py, zero.overrides or the "
            "installed DeepSpeed: correct it, or start all the same with run.doctor=false. Nothing was written."
        )
    if distributed.is_main():
        print(f"doctor: {proof}", flush=True)


# ---- The two gradients

SEQUENCE_LENGTH = 16
_MAXIMUM_ACCUMULATION = 4
_MAXIMUM_SEQUENCES = 2  # of a micro-batch whose pool spans ranks, or of a pool on one rank; and pools a rank
_MAXIMUM_TOKENS = 8  # drawn from a sequence
_MAXIMUM_EMBEDDINGS = 4096  # of a pool, whatever the number of ranks: the reference computes all its pairs
_SOFT_TEMPERATURES = {"l2_repel": 64.0, "infonce_l2": 64.0}  # squared distances of the tiny model's states
# DeepSpeed's own monitors write files.
_MONITORS = {"tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler"}


def one_process(tiny: Settings, device: torch.device) -> dict[str, Gradients]:
    """Gradients of each term on the joined global batch: plain torch, float32, eager attention, no process group."""
    with distributed.without_process_group():
        input_ids, sample_index = (tensor.to(device) for tensor in joined_batch(tiny))
        alone = BatchLayout(1, len(input_ids), 1, 1, len(input_ids) // _pool_sequences(tiny))
        plain = {"attention": "eager", "activation_checkpointing": False, "precision": "float32"}
        settings = tiny.model_copy(update={"model": tiny.model.model_copy(update=plain)})
        module = build_module(settings, alone).to(device).train()
        found = {}
        for term, context in contexts(tiny, alone).items():
            module.zero_grad()
            if term == "cross-entropy":  # written out, so that the objective's own is compared too
                logits = module.model(input_ids=input_ids, use_cache=False).logits
                functional.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:]).backward()
            else:
                module(input_ids, sample_index, context).total.backward()
            found[term] = {
                name: torch.zeros_like(p, device="cpu") if p.grad is None else p.grad.cpu()
                for name, p in module.named_parameters()
            }
        return found


def through_engine(tiny: Settings, layout: BatchLayout, device: torch.device) -> dict[str, Gradients]:
    """Gradients of each term by the real train step, as the engine holds them before the update. Collective: world."""
    engine = DeepSpeedEngine(build_module(tiny, layout), tiny, layout)
    engine.train()
    engine.set_learning_rate(0.0)  # the update clears the gradients and leaves the weights for the next term
    watched = GradientWatch(engine)
    found = {}
    for term, context in contexts(tiny, layout).items():
        health = train_step(watched, own_batches(tiny, layout), context, StepTotals(), device)
        if health.broken:
            raise RuntimeError(
                f"doctor: {term}: {health.broken}. Finite numbers at random weights are needed. Correct the term, or "
                "start all the same with run.doctor=false."
            )
        found[term] = watched.gradients
    engine.close()
    return found


class GradientWatch:
    """The engine, as the train step drives it, keeping the full gradients of the last step."""

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine
        self.gradients: Gradients = {}

    def __call__(self, *arguments: Any) -> Any:
        """Forward pass."""
        return self.engine(*arguments)

    def backward(self, loss: Tensor) -> None:
        """Backward pass."""
        self.engine.backward(loss)

    def step(self) -> None:
        """End a micro-step; at the last one gradients are copied before the update. Collective: the engine's."""
        if self.engine.ends_step():
            self.gradients = self.engine.full_gradients()
        self.engine.step()

    def skip_step(self) -> None:
        """End a step without an update."""
        self.engine.skip_step()

    def gradient_accumulation_steps(self) -> int:
        """Micro-steps of a step."""
        return self.engine.gradient_accumulation_steps()

    def gradient_square(self) -> Tensor:
        """This rank's part of the square of the gradient norm."""
        return self.engine.gradient_square()

    def non_finite_gradients(self) -> list[str]:
        """Names of parameters. Collective: the engine's."""
        return self.engine.non_finite_gradients()


def contexts(tiny: Settings, layout: BatchLayout) -> dict[str, StepContext]:
    """A context of each term in which the objective is that term alone."""
    shares = layout.world_size * layout.accumulation
    targets = tiny.global_batch_sequences * (SEQUENCE_LENGTH - 1)
    found = {"cross-entropy": StepContext(step=0, targets=targets, shares=shares, coefficient=0.0)}
    if tiny.dispersion is not None:
        # divided by infinitely many targets, cross-entropy and its gradient are exactly 0
        layers = tuple(tiny.dispersion.layer_indices(TINY_LAYERS))
        found["dispersion"] = StepContext(step=0, targets=math.inf, shares=shares, coefficient=1.0, layers=layers)
    return found


def tiny_settings(settings: Settings, layout: BatchLayout, hub_config: PretrainedConfig) -> Settings:
    """The run's settings with a tiny model and batch: the same ranks, ZeRO, precision and way of dealing out pools.

    Accumulation is at most 4, and torch.compile is left out: a minute that says nothing about factors.
    """
    term = settings.dispersion
    if term is not None and term.coefficient == 0:
        term = None
    if layout.pool_ranks > 1:
        micro_batch = min(layout.micro_batch, _MAXIMUM_SEQUENCES)
        pool = layout.pool_ranks * micro_batch
    else:
        pool = min(term.pool_sequences if term else 1, _MAXIMUM_SEQUENCES)
        micro_batch = pool * min(layout.pools_per_rank, _MAXIMUM_SEQUENCES)
    batch_tokens = layout.world_size * micro_batch * min(layout.accumulation, _MAXIMUM_ACCUMULATION) * SEQUENCE_LENGTH
    model = settings.model.model_dump() | {"config": tiny_fields(hub_config), "pretrained": None, "compile": False}
    dispersion = None
    if term is not None:
        dispersion = term.model_dump() | {
            "coefficient": 1.0,
            "pool_sequences": pool,
            "tokens_per_sequence": max(1, min(term.tokens_per_sequence, _MAXIMUM_TOKENS, _MAXIMUM_EMBEDDINGS // pool)),
            "layers": term.layers if isinstance(term.layers, str) else "all",
            "margin": max(term.margin, 0.5),  # pairs of random vectors must count
            # A sharp exponential magnifies the rounding of bf16 beyond any bound; a factor does not depend on it.
            "temperature": max(term.temperature, _SOFT_TEMPERATURES.get(term.variant, 1.0)),
            "warmup_tokens": 0,
            "decay_tokens": 0,
            "gradient_ratio_cap": None,
        }
    overrides = {key: value for key, value in settings.zero.overrides.items() if key not in _MONITORS}
    if settings.zero.stage == 3:
        # DeepSpeed leaves small parameters whole, which here are all; the proof is about those in shards.
        zero = {"stage3_param_persistence_threshold": 0, **overrides.get("zero_optimization", {})}
        overrides["zero_optimization"] = zero
    return parse_settings(
        {
            "run": {"seed": settings.run.seed},
            "model": model,
            "data": {"corpus": "none", "sequence_length": SEQUENCE_LENGTH},
            "training": {"global_batch_tokens": batch_tokens, "max_tokens": batch_tokens, "micro_batch": micro_batch},
            "optimizer": settings.optimizer.model_dump(),
            "dispersion": dispersion,
            "zero": settings.zero.model_dump() | {"overrides": overrides},
        },
        "the doctor's settings",
    )


def _pool_sequences(tiny: Settings) -> int:
    return tiny.dispersion.pool_sequences if tiny.dispersion else 1


def build_module(tiny: Settings, layout: BatchLayout) -> TrainingModule:
    """The tiny model with its objective, from the run's seed: the same weights on every rank and in the reference.

    Collective: world, to make pool groups.
    """
    distributed.seed_everything(tiny.run.seed)
    config = model_config(tiny.model, vocabulary=TINY_VOCABULARY, sequence_length=SEQUENCE_LENGTH)
    layers = tiny.dispersion.layer_indices(TINY_LAYERS) if tiny.dispersion else []
    return TrainingModule(build_model(tiny.model, config), dispersion_term(tiny, layout, layers))


def joined_batch(tiny: Settings) -> tuple[Tensor, Tensor]:
    """The global batch (sequences, 16) and its sample indices, by counter: the same in every process."""
    sample_index = torch.arange(tiny.global_batch_sequences)
    drawn = distributed.counter_hash(tiny.run.seed, sample_index[:, None], torch.arange(SEQUENCE_LENGTH))
    return drawn % TINY_VOCABULARY, sample_index


def own_batches(tiny: Settings, layout: BatchLayout) -> Iterator[Batch]:
    """This rank's micro-batches, dealt as data.BatchStream deals them."""
    input_ids, sample_index = joined_batch(tiny)
    size = layout.micro_batch
    for micro_step in range(layout.accumulation):
        first = (micro_step * layout.world_size + distributed.rank()) * size
        own = slice(first, first + size)
        yield Batch(input_ids[own], sample_index[own], torch.ones(size, dtype=torch.bool))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put random generators and the default type back, and free the memory that the block used."""
    random_state, default_type = distributed.random_state(), torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(default_type)
        distributed.restore_random_state(random_state)
        gc.collect()  # an engine and its module refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
