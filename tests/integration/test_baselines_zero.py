"""Active forgetting and distillation through DeepSpeed: every copy that ZeRO keeps, and one process without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM

from dispersion_pretrain import distributed
from dispersion_pretrain.baselines import Distillation, NoisyEmbeddings, embedding_noise, fresh_embeddings, load_teacher
from dispersion_pretrain.config import Settings
from dispersion_pretrain.data import Batch
from dispersion_pretrain.engine import DeepSpeedEngine, sharded_for_inference, start_distributed
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.metrics import StepTotals
from dispersion_pretrain.model import build_model, model_config
from dispersion_pretrain.objective import StepContext, TrainingModule
from dispersion_pretrain.optim import parameter_groups
from dispersion_pretrain.settings_file import parse_settings
from dispersion_pretrain.train import train_step
from small_engine import deal, into, odd_llama
from spawn import run_ranks

SEQUENCES, LENGTH, VOCABULARY = 8, 16, 61
TEACHER_PADDING = 3  # the teacher's matrices are so many rows longer

# stage, precision, tied embeddings
RESETS = [
    (0, "float32", True), (1, "float32", False), (2, "float32", True), (3, "float32", True),
    (0, "bf16", True), (1, "bf16", True), (2, "bf16", False), (3, "bf16", True),
    (3, "float32", False),
]  # fmt: skip
# stage, accumulation, sharded teacher
DISTILLATIONS = [(0, 1, False), (2, 2, False), (3, 1, False), (1, 2, True), (3, 2, True)]


def settings_for(stage: int = 0, precision: str = "float32", tied: bool = True,
                 micro_batch: int = SEQUENCES, **sections: Any) -> Settings:  # fmt: skip
    # Of a model as small as this, ZeRO-3 would keep every parameter whole on all ranks; one case leaves it at that.
    gathering = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 and tied else {}
    tree = {
        "model": {"config": odd_llama(LENGTH, tied=tied), "precision": precision},
        "data": {"corpus": "none", "sequence_length": LENGTH},
        "training": {
            "global_batch_tokens": SEQUENCES * LENGTH, "max_tokens": 10 * SEQUENCES * LENGTH, "micro_batch": micro_batch
        },
        "optimizer": {"learning_rate": 1e-2, "gradient_clipping": 0.5},
        "zero": {"stage": stage, "overrides": gathering},
        **sections,
    }  # fmt: skip
    return parse_settings(tree, "test")


def build(settings: Settings) -> Any:
    distributed.seed_everything(0)
    return build_model(settings.model, model_config(settings.model, vocabulary=VOCABULARY, sequence_length=LENGTH))


def micro_batches(step: int, layout: BatchLayout, rank: int) -> list[Batch]:
    return deal(step, layout, rank, sequences=SEQUENCES, length=LENGTH, vocabulary=VOCABULARY)


def context_for(step: int, layout: BatchLayout) -> StepContext:
    return StepContext(step, SEQUENCES * (LENGTH - 1), layout.world_size * layout.accumulation, 0.0)


# ---- active forgetting


def copies(engine: Any) -> dict[str, Tensor]:
    """Every copy of every parameter that the engine keeps: working weights, masters and moments, in full."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    inner = engine._engine.optimizer
    if hasattr(inner, "_hp_optimizer_states_linked"):
        # DeepSpeed links moments for its getter after the first group's first update: the second group has none then.
        inner._hp_optimizer_states_linked = False
        inner._lazy_init_hp_params_optimizer_state()
    found = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found[f"working/{name}"] = parameter.detach().clone()
        partitioned = hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
        if partitioned:
            found[f"master/{name}"] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{key}/{name}"] = safe_get_full_optimizer_state(parameter, key).clone()
    return found


def unpartitioned_copies(engine: Any) -> dict[str, Tensor]:
    """Masters and moments at stage 0, where parameters know nothing of their optimizer."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    inner = engine._engine.optimizer
    masters = {id(p): p for p in engine.module.parameters()}
    for working, full in zip(getattr(inner, "fp16_groups", []), getattr(inner, "fp32_groups", []), strict=True):
        masters |= {id(low): master for low, master in zip(working, full, strict=True)}
    found = {}
    for number, name in names.items():
        found[f"master/{name}"] = masters[number].detach().clone()
        state = engine._engine.basic_optimizer.state[masters[number]]
        found |= {f"{key}/{name}": state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    return found


def resets_on_rank(cases: list[tuple[int, str, bool]], folder: str, device: torch.device) -> dict[Any, Any]:
    """Train two steps, reset, look at every copy, train two more; then resume from before the reset and repeat it."""
    found = {}
    for case in cases:
        settings = settings_for(*case, micro_batch=SEQUENCES // distributed.world_size())
        layout = BatchLayout.derive(settings, distributed.world_size())

        def engine_of(settings: Settings = settings, layout: BatchLayout = layout) -> DeepSpeedEngine:
            return DeepSpeedEngine(TrainingModule(build(settings), None), settings, layout)

        def train(engine: DeepSpeedEngine, step: int, layout: BatchLayout = layout) -> float:
            totals = StepTotals()
            batches = iter(micro_batches(step, layout, distributed.rank()))
            train_step(engine, batches, context_for(step, layout), totals, device)
            return totals.reduce()["cross_entropy"]

        def look(engine: DeepSpeedEngine, stage: int = case[0]) -> dict[str, Tensor]:
            return copies(engine) | (unpartitioned_copies(engine) if stage == 0 else {})

        def reset(engine: DeepSpeedEngine) -> Tensor:
            model: Any = engine.module.get_submodule("model")
            embedding = model.get_input_embeddings()
            value = fresh_embeddings(embedding, standard_deviation=0.02, seed=5, step=2)
            engine.reset_parameter(embedding.weight, value)
            return value

        engine = engine_of()
        for step in range(2):
            train(engine, step)
        place = Path(folder, "-".join(map(str, case)))
        engine.save(into(place))
        before = look(engine)
        value = reset(engine)
        after = look(engine)
        (batch,) = micro_batches(2, layout, distributed.rank())
        engine.train(False)
        with torch.no_grad():
            logits = engine(batch.input_ids, with_logits=True).logits.float().clone()
        engine.train(True)
        losses = [train(engine, step) for step in (2, 3)]
        resumed = engine_of()
        resumed.load(place)
        reset(resumed)
        again = look(resumed)
        losses_again = [train(resumed, step) for step in (2, 3)]
        found[case] = {
            "before": before, "after": after, "value": value, "logits": logits, "losses": losses,
            "again": again, "losses_again": losses_again, "last": look(engine), "last_again": look(resumed),
            "ids": batch.input_ids,
        }  # fmt: skip
    return found


def check_reset(case: tuple[int, str, bool], results: list[dict[Any, dict[str, Any]]]) -> None:
    _, precision, tied = case
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    name = "model.model.embed_tokens.weight"
    reference = build(settings_for(*case)).to(dtype)
    for found in [result[case] for result in results]:
        value, before, after = found["value"], found["before"], found["after"]
        assert torch.equal(value, results[0][case]["value"]), "all ranks draw the same"
        assert value[2].abs().max() == 0 and value[3].abs().max() > 0, "the padding row is 0"
        assert torch.equal(after[f"working/{name}"], value.to(dtype))
        assert torch.equal(after[f"master/{name}"], value)
        for key in ("exp_avg", "exp_avg_sq"):
            assert before[f"{key}/{name}"].abs().max() > 0
            assert after[f"{key}/{name}"].abs().max() == 0
        assert before.keys() == after.keys() and len(after) == 4 * len(list(reference.parameters()))
        for key, tensor in before.items():
            assert key.endswith(name) or torch.equal(after[key], tensor), f"{key} must stay as it was"
        weights = {key.removeprefix("working/model."): t for key, t in after.items() if key.startswith("working/")}
        reference.load_state_dict(weights, strict=not tied)
        with torch.no_grad():
            logits = reference(input_ids=found["ids"]).logits.float()
        torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=2e-2 if precision == "bf16" else 1e-5)
        for key, tensor in after.items():
            assert torch.equal(found["again"][key], tensor), f"{key} differs when the reset follows a resume"
        assert found["losses"] == found["losses_again"]
        for key, tensor in found["last"].items():
            assert torch.equal(found["last_again"][key], tensor), f"{key} differs two steps after a resume"
        assert not torch.equal(found["last"][f"working/{name}"], after[f"working/{name}"])


# ---- distillation, with noisy embeddings


def section(folder: str, *, sharded: bool = False) -> dict[str, Any]:
    return {"teacher": folder, "weight": 2.0, "temperature": 1.5, "precision": "float32", "sharded": sharded}


def write_teacher(folder: Path) -> str:
    """A wider model of another family, with predictions far from uniform; more rows than the corpus has tokens."""
    config = AutoConfig.for_model(
        "gpt2",
        n_layer=2,
        n_embd=24,
        n_head=2,
        n_positions=LENGTH + 5,
        vocab_size=VOCABULARY + TEACHER_PADDING,
        n_inner=5000,
        resid_pdrop=0.3,
    )  # so wide that ZeRO-3 does not keep all of it whole on each rank
    torch.manual_seed(9)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return str(folder)


class WatchingEngine(DeepSpeedEngine):
    """Keeps the full gradients of the first step, as ZeRO holds them before the update."""

    gradients: dict[str, Tensor]

    def step(self) -> None:
        from deepspeed.utils import safe_get_full_grad

        if not hasattr(self, "gradients") and self._engine.is_gradient_accumulation_boundary():
            named = list(self.module.named_parameters())
            self.gradients = {name: safe_get_full_grad(parameter).clone() for name, parameter in named}
        super().step()


def distillations_on_rank(cases: list[tuple[int, int, bool]], folder: str, device: torch.device) -> dict[Any, Any]:
    found = {}
    teachers: dict[bool, Any] = {}
    for stage, accumulation, sharded in cases:
        settings = settings_for(
            stage,
            micro_batch=SEQUENCES // accumulation // distributed.world_size(),
            distillation=section(folder, sharded=sharded),
            noisy_embeddings={"alpha": 3.0},
        )
        layout = BatchLayout.derive(settings, distributed.world_size())
        assert settings.distillation is not None and settings.noisy_embeddings is not None
        if sharded not in teachers:
            teachers[sharded] = load_teacher(settings, AutoConfig.from_pretrained(folder))
            if sharded:
                teachers[sharded] = sharded_for_inference(teachers[sharded])
        distillation = Distillation(settings.distillation, teachers[sharded], vocabulary=VOCABULARY)
        noise = NoisyEmbeddings(settings.noisy_embeddings, seed=4)
        module = TrainingModule(build(settings), None, noise=noise, distillation=distillation)
        engine = WatchingEngine(module, settings, layout)
        engine.train()
        losses, totals = [], StepTotals()
        for step in range(2):
            batches = iter(micro_batches(step, layout, distributed.rank()))
            train_step(engine, batches, context_for(step, layout), totals, device)
            means = totals.reduce()
            losses.append((means["cross_entropy"], means["distillation"]))
        kept = [tensor.numel() for tensor in teachers[sharded].parameters()]
        found[stage, accumulation, sharded] = {
            "losses": losses, "gradients": engine.gradients, "names": sorted(engine.module.state_dict()),
            "teacher_numbers": sum(kept), "teacher_gradients": any(p.requires_grad or p.grad is not None
                                                                  for p in teachers[sharded].parameters()),
        }  # fmt: skip
    return found


def expected_distillation(folder: str) -> dict[str, Any]:
    """One process, plain torch, transformers' own cross-entropy and torch's own divergence."""
    settings = settings_for()
    model, teacher = build(settings), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.optimizer), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    losses, gradients = [], {}
    for step in range(2):
        (batch,) = micro_batches(step, BatchLayout(1, SEQUENCES, 1, 1, 1), 0)
        noise = embedding_noise(4, step, batch.sample_index, length=LENGTH, width=15, alpha=3.0)
        embeddings = model.get_input_embeddings()(batch.input_ids) + noise
        outputs = model(inputs_embeds=embeddings, labels=batch.input_ids)
        with torch.no_grad():
            wanted = teacher(input_ids=batch.input_ids).logits[:, :-1, :VOCABULARY].flatten(0, 1) / 1.5
        student = outputs.logits[:, :-1].flatten(0, 1) / 1.5
        divergence = functional.kl_div(student.log_softmax(-1), wanted.softmax(-1), reduction="batchmean") * 1.5**2
        (outputs.loss + 2.0 * divergence).backward()
        if step == 0:
            gradients = {f"model.{name}": p.grad.clone() for name, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        losses.append((float(outputs.loss.detach()), float(divergence.detach())))
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients, "names": sorted(f"model.{name}" for name in model.state_dict())}


# ---- the tests


def on_rank(resets: Any, distillations: Any, folder: str, teacher: str) -> dict[Any, Any]:
    """All in one pair of processes: starting them takes longer than the steps."""
    device = start_distributed()
    return resets_on_rank(resets, folder, device) | distillations_on_rank(distillations, teacher, device)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def expected(teacher: str) -> dict[str, Any]:
    return expected_distillation(teacher)


@pytest.fixture(scope="module")
def found_by_rank(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Any]]]:
    return run_ranks(on_rank, 2, RESETS, DISTILLATIONS, str(tmp_path_factory.mktemp("resets")), teacher, timeout_s=280)


@pytest.mark.parametrize("case", RESETS, ids=lambda case: f"zero{case[0]}-{case[1]}-{'tied' if case[2] else 'untied'}")
def test_a_reset_reaches_every_copy_and_nothing_else(
    case: tuple[int, str, bool], found_by_rank: list[dict[Any, dict[str, Any]]]
) -> None:
    check_reset(case, found_by_rank)


@pytest.mark.parametrize(
    "case", DISTILLATIONS, ids=lambda case: f"zero{case[0]}-{case[1]}-{'sharded' if case[2] else 'replicated'}"
)
def test_distillation_equals_one_process(
    case: tuple[int, int, bool], expected: dict[str, Any], found_by_rank: list[dict[Any, dict[str, Any]]], teacher: str
) -> None:
    wanted = torch.cat([gradient.flatten() for gradient in expected["gradients"].values()])
    numbers = AutoModelForCausalLM.from_pretrained(teacher).num_parameters()
    for rank, results in enumerate(found_by_rank):
        found = results[case]
        assert found["names"] == expected["names"], "the teacher is no part of the student"
        together = torch.cat([found["gradients"][name].flatten() for name in expected["gradients"]])
        assert (together - wanted).norm() / wanted.norm() < 1e-5, f"rank {rank}: {together.norm() / wanted.norm():.4f}"
        torch.testing.assert_close(
            torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=1e-5, atol=1e-6
        )
        assert not found["teacher_gradients"]
        assert (found["teacher_numbers"] < 0.6 * numbers) if case[2] else (found["teacher_numbers"] == numbers)
