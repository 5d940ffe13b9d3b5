"""The proof at start: silent where gradients are right, and the factor by its name where they are not."""

from __future__ import annotations

import shutil
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoConfig

from dispersion_pretrain import distributed, doctor
from dispersion_pretrain.config import Settings
from dispersion_pretrain.dispersion import VARIANTS
from dispersion_pretrain.doctor import Proof, factor_name, prove_gradients
from dispersion_pretrain.engine import DeepSpeedEngine, start_distributed
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.objective import LossTerms, StepContext, TrainingModule, sample_positions
from dispersion_pretrain.provenance import device_name
from dispersion_pretrain.settings_file import parse_settings
from integration.jobs import command, finish, trajectory, write_config
from small_run import launch_script
from spawn import run_ranks

WITHOUT_SDPA = ("bloom", "gptj", "gpt_neo")
FAMILIES = ["gpt2", "qwen3", "llama", "bloom", "olmo2", "gptj", "gpt_neo", "qwen3_moe"]


def settings_for(ranks: int, **changes: Any) -> Settings:
    """Of a run whose pools of 4 sequences lie on all of up to two ranks."""
    options = {
        "family": "gpt2",
        "stage": 2,
        "accumulation": 1,
        "pool": 4,
        "precision": "float32",
        "term": {},
        **changes,
    }
    micro_batch = 4 // ranks
    tokens = 64 * ranks * micro_batch * options["accumulation"]
    attention = "eager" if options["family"] in WITHOUT_SDPA else "sdpa"
    tree = {
        "model": {
            "config": {"model_type": options["family"]}, "precision": options["precision"], "attention": attention,
        },
        "data": {"corpus": "unused", "sequence_length": 64},
        "training": {"global_batch_tokens": tokens, "max_tokens": tokens, "micro_batch": micro_batch},
        "dispersion": {"pool_sequences": options["pool"], "tokens_per_sequence": 16, **options["term"]},
        "zero": {"stage": options["stage"]},
    }  # fmt: skip
    return parse_settings(tree, "test")


def proof_of(settings: Settings) -> Proof:
    assert settings.model.config is not None
    device = start_distributed()
    layout = BatchLayout.derive(settings, distributed.world_size())
    return prove_gradients(settings, layout, AutoConfig.for_model(settings.model.config["model_type"]), device)


# ---- Right gradients

RIGHT: list[dict[str, Any]] = [
    *({"stage": stage, "accumulation": accumulation} for stage in range(4) for accumulation in (1, 2)),
    {"precision": "bf16"},
    *({"term": {"variant": variant}, "accumulation": 2, "stage": 1} for variant in VARIANTS),
    *({"term": {"variant": variant}, "precision": "bf16"} for variant in VARIANTS),
    *({"term": {"variant": variant, "angle": "atan2"}, "stage": 3} for variant in ("angular", "orthogonalization")),
    {"pool": 1, "accumulation": 16},
]


def right_on_rank(cases: list[dict[str, Any]]) -> list[Proof]:
    return [proof_of(settings_for(distributed.world_size(), **case)) for case in cases]


class Found(NamedTuple):
    """What one of two ranks saw."""

    right: list[Proof]
    wrong: dict[str, Proof]
    main_job: int  # its exit code with a wrong gradient
    doctor: int  # exit code of the command
    changed: list[str]  # by it


def all_on_rank(config: str) -> Found:
    """Everything on one pair of processes: starting them takes longer than most proofs."""
    return Found(right_on_rank(RIGHT), wrong_on_rank(), main_job_on_rank(config), *doctor_on_rank(config))


@pytest.fixture(scope="module")
def pair(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    folder = tmp_path_factory.mktemp("doctor")
    config = write_config(folder, corpus, run={"doctor": True}, zero={"stage": 3}, model={"precision": "bf16"})
    found = run_ranks(all_on_rank, 2, str(config))
    assert list(folder.iterdir()) == [config], "something was written"
    return found


@pytest.fixture(scope="module")
def single() -> list[Proof]:
    (found,) = run_ranks(right_on_rank, 1, [*RIGHT, *({"family": family} for family in FAMILIES)])
    return found


@pytest.mark.parametrize("case", range(len(RIGHT)), ids=[str(case) for case in RIGHT])
def test_right_gradients_pass(case: int, pair: list[Found], single: list[Proof]) -> None:
    for proof in (single[case], pair[0].right[case]):
        assert proof.faults == []
        assert [comparison.term for comparison in proof.comparisons] == ["cross-entropy", "dispersion"]
        for comparison in proof.comparisons if proof.bound < 1e-3 else []:
            assert abs(comparison.length - 1) < 1e-5 and comparison.deviation < 1e-5, "far within the bound"
    assert pair[0].right[case].comparisons == pair[1].right[case].comparisons, "ranks differ in their verdict"


@pytest.mark.parametrize("family", FAMILIES)
def test_families_pass(family: str, single: list[Proof]) -> None:
    assert single[len(RIGHT) + FAMILIES.index(family)].faults == []


def test_long_accumulation_is_cut_and_said(pair: list[Found]) -> None:
    proof = pair[0].right[-1]
    assert proof.layout.accumulation == 4 and "accumulation 4 for 16" in str(proof)


# ---- Wrong gradients


class OnRanks(TrainingModule):
    """An objective that is wrong where there are ranks or accumulation; in the reference it finds neither."""

    sample_index: Tensor | None = None  # of the micro-step at hand

    def forward(
        self,
        input_ids: Tensor,
        sample_index: Tensor | None = None,
        context: StepContext | None = None,
        with_logits: bool = False,
    ) -> Any:
        """`total` of the right objective, changed."""
        self.sample_index = sample_index
        terms = super().forward(input_ids, sample_index, context, with_logits)
        if context is None or not isinstance(terms, LossTerms) or not distributed.is_initialized():
            return terms
        ranks = distributed.world_size()
        return terms._replace(total=self.change(terms.total, ranks, context.shares // ranks, context, input_ids))

    def change(self, total: Tensor, ranks: int, steps: int, context: StepContext, input_ids: Tensor) -> Tensor:
        """The wrong total."""
        raise NotImplementedError


class ShortDispersion(OnRanks):
    def change(self, total: Tensor, ranks: int, steps: int, context: StepContext, input_ids: Tensor) -> Tensor:
        return total / ranks if context.coefficient else total


class LongDispersion(OnRanks):
    def change(self, total: Tensor, ranks: int, steps: int, context: StepContext, input_ids: Tensor) -> Tensor:
        return total * ranks if context.coefficient else total


class DispersionDividedTwice(OnRanks):
    def change(self, total: Tensor, ranks: int, steps: int, context: StepContext, input_ids: Tensor) -> Tensor:
        return total / steps if context.coefficient else total


class CrossEntropyDividedTwice(OnRanks):
    def change(self, total: Tensor, ranks: int, steps: int, context: StepContext, input_ids: Tensor) -> Tensor:
        return total if context.coefficient else total / steps


class OthersDetached(OnRanks):
    """Own rows against gathered columns without gradient, each rank's mean over its own rows: what is usually built."""

    def change(self, total: Tensor, ranks: int, steps: int, context: StepContext, input_ids: Tensor) -> Tensor:
        if not context.coefficient:
            return total
        term = self.dispersion
        assert term is not None and self.sample_index is not None
        settings, layers = term.settings, torch.tensor(term.layers)
        positions = sample_positions(
            term.seed, context.step, self.sample_index, layers,
            num_tokens=settings.tokens_per_sequence, sequence_length=input_ids.shape[1],
        )  # fmt: skip
        hidden_states = self.model(input_ids=input_ids, output_hidden_states=True).hidden_states
        losses = []
        for place, layer in enumerate(term.layers):
            states = hidden_states[layer]
            drawn = states.gather(1, positions[place].unsqueeze(-1).expand(-1, -1, states.shape[-1])).flatten(0, 1)
            own = torch.nn.functional.normalize(drawn, dim=-1)
            columns = own.new_empty(ranks * len(own), own.shape[1])
            dist.all_gather_into_tensor(columns, own.detach().contiguous())
            cosine = own @ columns.T
            clamped = cosine + (cosine.clamp(-0.9, 0.9) - cosine).detach()
            similarity = torch.exp(-torch.arccos(clamped * 0.999) / torch.pi)
            itself = torch.eye(len(columns))[distributed.rank() * len(own) :][: len(own)]
            losses.append(torch.log((similarity * (1 - itself)).sum() / len(own) / (len(columns) - 1)))
        return total * 0 + torch.stack(losses).mean()


def objective(kind: type[TrainingModule]) -> AbstractContextManager[Any]:
    return patch.object(doctor, "TrainingModule", kind)


def own_pools() -> AbstractContextManager[Any]:
    """Each rank's part of a pool is taken for a pool."""
    right = doctor.dispersion_term
    return patch.object(
        doctor, "dispersion_term", lambda tiny, layout, layers: right(tiny, replace(layout, pool_ranks=1), layers)
    )


def accumulation_forgotten() -> AbstractContextManager[Any]:
    def backward(self: DeepSpeedEngine, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    return patch.object(DeepSpeedEngine, "backward", backward)


def ranks_not_averaged() -> AbstractContextManager[Any]:
    """A rank's own gradient in the place of the average: ranks then have different models."""
    right = DeepSpeedEngine.backward

    def backward(self: DeepSpeedEngine, loss: Tensor) -> None:
        right(self, loss * (2.0 if distributed.is_main() else 0.0))

    return patch.object(DeepSpeedEngine, "backward", backward)


# What is wrong, and what must be said of cross-entropy and of dispersion; None: nothing. 2 ranks, 3 micro-steps.
WRONG: dict[str, tuple[Callable[[], AbstractContextManager[Any]], str | None, str | None]] = {
    "nothing": (nullcontext, None, None),
    "dispersion 1/W": (lambda: objective(ShortDispersion), None, "0.5000 of the reference = 1/W (W = 2 ranks)"),
    "dispersion x W": (lambda: objective(LongDispersion), None, "2.0000 of the reference = x W (W = 2 ranks)"),
    "dispersion / accumulation": (
        lambda: objective(DispersionDividedTwice), None, "0.3333 of the reference = 1/accumulation (accumulation = 3",
    ),
    "cross-entropy / accumulation": (
        lambda: objective(CrossEntropyDividedTwice), "0.3333 of the reference = 1/accumulation (accumulation = 3", None,
    ),
    "engine forgets accumulation": (
        accumulation_forgotten,
        "3.0000 of the reference = x accumulation (accumulation = 3",
        "3.0000 of the reference = x accumulation (accumulation = 3",
    ),
    "others detached": (lambda: objective(OthersDetached), None, "= 1/W (W = 2 ranks)"),
    "pools not gathered": (own_pools, None, "direction differs: cosine 0."),
    "ranks not averaged": (ranks_not_averaged, "direction differs: cosine 0.", "direction differs: cosine 0."),
}  # fmt: skip


def wrong_on_rank() -> dict[str, Proof]:
    found = {}
    for name, (fault, _, _) in WRONG.items():
        with fault():
            found[name] = proof_of(settings_for(2, accumulation=3))
    return found


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_gradient_is_named(name: str, pair: list[Found]) -> None:
    for found in pair:
        proof = found.wrong[name]
        print(proof, proof.faults)
        faults = [comparison.fault(proof.bound, proof.layout) for comparison in proof.comparisons]
        for fault, expected in zip(faults, WRONG[name][1:], strict=True):
            assert (fault is None) == (expected is None), fault
            assert expected is None or (fault is not None and expected in fault), fault
        assert str(proof).startswith("gradients OK" if name == "nothing" else "gradients WRONG")


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0.125, "1/W (W = 8 ranks)"),
        (4.0, "x accumulation (accumulation = 4 micro-steps) or x pools (4 pools a micro-step)"),
        (0.25, "1/accumulation (accumulation = 4 micro-steps) or 1/(pools) (4 pools a micro-step)"),
        (1 / 32, "1/(W accumulation) (W = 8 ranks, accumulation = 4)"),
        (0.5004, "1/(ranks of a pool) (2 ranks share a pool)"),
        (0.7, None),
        (float("nan"), None),
    ],
)
def test_factors_have_names(length: float, expected: str | None) -> None:
    layout = BatchLayout(world_size=8, micro_batch=2, accumulation=4, pool_ranks=2, pools_per_rank=1)
    assert factor_name(length, layout) == expected


def test_a_factor_has_one_name_where_it_can() -> None:
    layout = BatchLayout(world_size=2, micro_batch=2, accumulation=1, pool_ranks=2, pools_per_rank=1)
    assert factor_name(0.5, layout) == "1/W (W = 2 ranks)"
    assert factor_name(0.5, replace(layout, world_size=1, pool_ranks=1)) == "1/2"


# ---- A run with the proof


def main_job_on_rank(config: str) -> int:
    with patch.object(sys, "argv", ["pretrain.py", "--config", config]), objective(ShortDispersion):
        code: int = launch_script("pretrain").main()
    return code


def doctor_on_rank(config: str) -> tuple[int, list[str]]:
    """Exit code of the doctor, and what was not as before."""
    modules: list[weakref.ref[TrainingModule]] = []
    right = doctor.build_module

    def build(*arguments: Any) -> TrainingModule:
        module = right(*arguments)
        modules.append(weakref.ref(module))
        return module

    torch.manual_seed(distributed.rank())
    before, threads = distributed.random_state(), torch.get_num_threads()
    with patch.object(sys, "argv", ["doctor.py", "--config", config]), patch.object(doctor, "build_module", build):
        code: int = launch_script("doctor").main()
    after = distributed.random_state()
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    changed += ["default type"] * (torch.get_default_dtype() != torch.float32)
    changed += ["threads"] * (threads != torch.get_num_threads())
    changed += ["memory"] * (not modules or any(module() is not None for module in modules))
    return code, changed


def test_a_wrong_gradient_stops_the_main_job(pair: list[Found]) -> None:
    assert [found.main_job for found in pair] == [1, 1]


def test_everything_is_as_before(pair: list[Found]) -> None:
    assert [(found.doctor, found.changed) for found in pair] == [(0, []), (0, [])]


def test_doctor_is_a_command(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    output = finish(command("doctor", config), tmp_path / "log")
    ranks = f"2 x {device_name(torch.device('cpu'))} on"
    for text in ("deepspeed 0.", ranks, "gloo", " us for an all-reduce", " GB/s for the all-gather of a pool"):
        assert text in output
    # 2 layers x 32 tokens x width 32 x 4 bytes, in 2 micro-steps
    assert "receives 8,192 bytes" in output and "16,384 bytes a step" in output
    assert "doctor: gradients OK: cross-entropy length 1.0000" in output
    assert not (tmp_path / "run").exists()


def test_losses_are_bit_equal_with_and_without(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus, training={"max_tokens": 4 * 512})
    curves = {}
    for doctor_runs in ("true", "false"):
        output = finish(
            command("pretrain", config, f"run.doctor={doctor_runs}", launcher="warm"),
            tmp_path / "log" / doctor_runs,
        )
        assert ("doctor: gradients OK" in output) == (doctor_runs == "true")
        curves[doctor_runs] = trajectory(tmp_path / "run")
        shutil.move(tmp_path / "run", tmp_path / f"run-{doctor_runs}")
    assert len(curves["true"]) == 5 and curves["true"] == curves["false"]
