"""A loss or gradient that is not finite, through DeepSpeed: no update, every bit as it was, and a clean next step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from dispersion_pretrain import distributed
from dispersion_pretrain.config import Settings
from dispersion_pretrain.data import Batch
from dispersion_pretrain.engine import DeepSpeedEngine, start_distributed
from dispersion_pretrain.faults import StepHealth
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.metrics import StepTotals
from dispersion_pretrain.model import build_model, model_config
from dispersion_pretrain.objective import LossTerms, StepContext, TrainingModule
from dispersion_pretrain.replicas import refuse_odd_ranks
from dispersion_pretrain.settings_file import parse_settings
from dispersion_pretrain.train import train_step
from spawn import run_ranks

SEQUENCES, LENGTH, VOCABULARY = 8, 16, 61
STRUCK = "model.transformer.h.1.mlp.c_fc.weight"  # whose gradient is struck


class Case(NamedTuple):
    stage: int
    precision: str = "float32"
    accumulation: int = 2
    offload: bool = False
    overrides: dict[str, Any] = {}

    @property
    def name(self) -> str:
        words = [f"stage{self.stage}", self.precision, f"accumulation{self.accumulation}"]
        return "-".join([*words, *["offload"] * self.offload, *self.overrides])


WHOLE = {"zero_optimization": {"stage3_param_persistence_threshold": 10**6}}
SHARDS = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
CASES = [
    Case(0), Case(1), Case(2), Case(3, overrides=SHARDS), Case(3, accumulation=1, overrides=WHOLE),
    Case(0, "bf16"), Case(1, "bf16"), Case(2, "bf16", accumulation=1), Case(3, "bf16", overrides=SHARDS),
    Case(1, "bf16", overrides={"data_types": {"grad_accum_dtype": "fp32"}}),
]  # fmt: skip
OFFLOADED = [Case(1, offload=True), Case(2, "bf16", offload=True), Case(3, offload=True, overrides=SHARDS)]


def settings_for(case: Case) -> Settings:
    model = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": LENGTH,
             "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    tree = {
        "model": {"config": model, "precision": case.precision},
        "data": {"corpus": "none", "sequence_length": LENGTH},
        "training": {
            "global_batch_tokens": SEQUENCES * LENGTH,
            "max_tokens": 10 * SEQUENCES * LENGTH,
            "micro_batch": SEQUENCES // 2 // case.accumulation,
        },
        "optimizer": {"learning_rate": 1e-2, "gradient_clipping": 0.5},
        "zero": {"stage": case.stage, "offload_optimizer": case.offload, "overrides": case.overrides},
    }
    return parse_settings(tree, "test")


class Struck(TrainingModule):
    """A module of which one rank's first micro-step goes wrong on demand, with a parameter that is used in such steps
    alone: nobody writes over its gradient later.
    """

    wrong, uses_extra = "", False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, None)
        self.extra = nn.Parameter(torch.ones(4))

    def forward(self, *arguments: Any, **options: Any) -> Any:
        terms = super().forward(*arguments, **options)
        if not isinstance(terms, LossTerms) or not self.uses_extra:
            return terms
        terms = terms._replace(total=terms.total + 0.1 * self.extra.sum())
        wrong, self.wrong = self.wrong, ""
        if wrong == "loss":
            terms = terms._replace(total=terms.total * math.nan, cross_entropy=terms.cross_entropy * math.nan)
        return terms


class Run:
    """A tiny run through the engine; `step` may strike one rank."""

    def __init__(self, case: Case) -> None:
        self.settings = settings_for(case)
        self.layout = BatchLayout.derive(self.settings, distributed.world_size())
        assert self.layout.accumulation == case.accumulation
        distributed.seed_everything(0)
        config = model_config(self.settings.model, vocabulary=VOCABULARY, sequence_length=LENGTH)
        self.module = Struck(build_model(self.settings.model, config))
        self.engine = DeepSpeedEngine(self.module, self.settings, self.layout)
        self.engine.train()
        self.device, self.totals = torch.device("cpu"), StepTotals()
        self.infinite = False
        self.module.get_parameter(STRUCK).register_hook(self._strike)

    def _strike(self, gradient: Tensor) -> Tensor:
        if not self.infinite:
            return gradient
        self.infinite = False
        struck = gradient.clone()
        struck.view(-1)[3] = math.inf
        return struck

    def step(self, number: int, *, wrong: str = "", rank: int = 0) -> StepHealth:
        samples = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(number))
        size, batches = self.layout.micro_batch, []
        for micro_step in range(self.layout.accumulation):
            first = (micro_step * self.layout.world_size + distributed.rank()) * size
            index = torch.arange(first, first + size)
            batches.append(Batch(samples[index], index, torch.ones(size, dtype=torch.bool)))
        self.module.uses_extra = bool(wrong)
        if rank == distributed.rank():
            self.module.wrong, self.infinite = wrong, wrong == "gradient"
        torch.manual_seed(number)  # dropout
        shares = self.layout.world_size * self.layout.accumulation
        context = StepContext(number, SEQUENCES * (LENGTH - 1), shares, 0.0)
        return train_step(self.engine, iter(batches), context, self.totals, self.device)

    def bits(self) -> list[Tensor]:
        """Everything that this rank keeps of the weights and of the optimizer, its counts of steps included."""
        inner: Any = self.engine._engine
        kept = [getattr(p, "ds_tensor", p) for p in self.module.parameters()]
        for master, state in inner.basic_optimizer.state.items():
            kept += [master, *(value for value in state.values() if isinstance(value, Tensor))]
            kept += [torch.tensor(value) for value in state.values() if isinstance(value, int)]
        return [tensor.detach().clone() for tensor in kept]


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def one_case(case: Case) -> dict[str, Any]:
    undisturbed = Run(case)
    undisturbed.step(0)
    undisturbed.step(3)
    struck = Run(case)
    first = struck.step(0)
    norm = struck.engine.gradient_norm()
    before = struck.bits()
    found: dict[str, Any] = {"first": first, "norm": norm, "loss": struck.totals.reduce()["total"]}
    found["loss of rank 1"] = struck.step(1, wrong="loss", rank=1)
    found["kept after a loss"] = same(before, struck.bits())
    found["gradient of rank 0"] = struck.step(2, wrong="gradient", rank=0)
    found["kept after a gradient"] = same(before, struck.bits())
    found["last"] = struck.step(3)
    found["moved"] = not same(before, struck.bits())
    found["clean"] = same(undisturbed.bits(), struck.bits())
    found["replicas"] = replicas_with_a_flipped_bit(struck)
    undisturbed.engine.close()
    struck.engine.close()
    return found


def replicas_with_a_flipped_bit(run: Run) -> dict[str, Any]:
    """What the check says before and after one bit of one weight flips on rank 1."""
    errors, names = [], [name for name, _ in run.engine.replicated_tensors()]
    for flip in (False, True):
        if flip and distributed.rank() == 1 and names:
            weight = dict(run.engine.replicated_tensors())[names[0]].detach().view(-1)
            weight.view(torch.int16 if weight.element_size() == 2 else torch.int32)[1] ^= 1
        try:
            refuse_odd_ranks(run.engine.replicated_tensors(), {"the learning rate": 0.1}, 4, run.device)
            errors.append("")
        except RuntimeError as error:
            errors.append(str(error))
    return {"errors": errors, "names": names}


def cases_on_rank(cases: list[Case]) -> dict[str, dict[str, Any]]:
    start_distributed()
    return {case.name: one_case(case) for case in cases}


@pytest.fixture(scope="module")
def found_by_rank() -> list[dict[str, dict[str, Any]]]:
    return run_ranks(cases_on_rank, 2, CASES, timeout_s=280)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_step_is_left_out_on_all_ranks_and_the_next_starts_clean(
    case: Case, found_by_rank: list[dict[str, dict[str, Any]]]
) -> None:
    for of_rank in found_by_rank:
        check(of_rank[case.name], case)


def check(found: dict[str, Any], case: Case) -> None:
    assert found["first"].broken == found["last"].broken == ""
    assert found["first"].loss == pytest.approx(found["loss"], rel=1e-6)
    assert 0 < found["norm"] < 100
    assert found["loss of rank 1"].broken == "cross-entropy is not finite on 1 of 2 ranks"
    assert found["gradient of rank 0"].broken == f"the losses are finite, but not the gradient of {STRUCK}"
    assert math.isfinite(found["gradient of rank 0"].loss)
    assert found["kept after a loss"] and found["kept after a gradient"]
    assert found["moved"] and found["clean"]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_flipped_bit_is_found_where_weights_are_whole_on_every_rank(
    case: Case, found_by_rank: list[dict[str, dict[str, Any]]]
) -> None:
    for of_rank in found_by_rank:
        found = of_rank[case.name]["replicas"]
        healthy, flipped = found["errors"]
        assert healthy == ""
        assert f"ranks 0 and 1 differ in {found['names'][0]}. All ranks" in flipped
        weights = [name for name in found["names"] if not name.endswith("bias")]  # GPT2's masks are attn.bias
        assert (weights == []) == (case.overrides == SHARDS), "what is in shards has no replica"
        assert ("a moment of" in str(weights)) == (case.stage == 0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_offloaded_optimizers() -> None:
    by_rank = run_ranks(cases_on_rank, 2, OFFLOADED, timeout_s=500)  # compiles an operator the first time
    for of_rank in by_rank:
        for case in OFFLOADED:
            check(of_rank[case.name], case)
