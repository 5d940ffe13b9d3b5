"""What a plan says of memory, checkpoints and communication, against DeepSpeed on two ranks."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from dispersion_pretrain.config import Settings
from dispersion_pretrain.engine import start_distributed
from dispersion_pretrain.plan import Estimate, Planner
from dispersion_pretrain.plan_machine import load_machine
from dispersion_pretrain.settings_file import parse_settings
from measured_step import Measured, measure
from spawn import run_ranks

RANKS, LENGTH, VOCABULARY = 2, 128, 1000


def settings_of(stage: int, precision: str) -> Settings:
    """Two micro-steps at stages 0 and 2; a pool over both ranks at stage 3. Odd sizes, so that ZeRO has to pad."""
    fields = {
        "model_type": "qwen3", "vocab_size": VOCABULARY, "hidden_size": 60, "intermediate_size": 99,
        "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 20,
        "max_position_embeddings": LENGTH,
    }  # fmt: skip
    pool = {"pool_sequences": 16, "tokens_per_sequence": 16, "variant": "decorrelation"}
    tree: dict[str, Any] = {
        "model": {"config": fields, "precision": precision},
        "data": {"corpus": "nowhere", "sequence_length": LENGTH},
        "training": {
            "global_batch_tokens": 16 * LENGTH, "max_tokens": 160 * LENGTH, "micro_batch": 4 if stage in (0, 2) else 8,
        },
        "dispersion": pool if stage == 3 else None,
        "zero": {"stage": stage, "overrides": {"zero_optimization": {"reduce_bucket_size": 20_000}}},
    }  # fmt: skip
    return parse_settings(tree, "test")


CASES = [(stage, precision) for precision in ("float32", "bf16") for stage in (0, 1, 2, 3)]


def measure_all() -> list[Measured]:
    start_distributed()
    return [measure(settings_of(stage, precision)) for stage, precision in CASES]


@functools.cache
def measured() -> list[list[Measured]]:
    return run_ranks(measure_all, RANKS, timeout_s=280.0)


@pytest.fixture(params=range(len(CASES)), ids=lambda place: "-".join(map(str, CASES[place])))
def pair(request: pytest.FixtureRequest) -> tuple[Estimate, list[Measured]]:
    """The plan of a case, and what each rank measured."""
    settings = settings_of(*CASES[request.param])
    machine = load_machine("h100", {"overlaps": False})
    plan = Planner(settings, machine, nodes=1, gpus_per_node=RANKS).chosen
    return plan, [rank[request.param] for rank in measured()]


def test_a_plan_is_what_two_ranks_measure(pair: tuple[Estimate, list[Measured]]) -> None:
    plan, ranks = pair
    for rank in ranks:
        # Exact: every tensor that lasts.
        assert plan.memory.parameters == rank.parameters
        assert plan.memory.masters == rank.masters
        assert plan.memory.moments == rank.moments
        # Exact but for what is smaller than a kilobyte.
        assert plan.traffic.reduction == pytest.approx(rank.reduced, rel=0.02)
        assert plan.traffic.parameters == pytest.approx(rank.gathered, rel=0.02)
        assert plan.traffic.pool == pytest.approx(rank.pooled, rel=0.02)
        peak = plan.memory.peak.total + plan.memory.gathered
        assert peak == pytest.approx(rank.tensors, rel=0.15)
    # Weights that all ranks share are written by the first.
    assert plan.memory.host == ranks[0].checkpoint
    written = sum(rank.checkpoint for rank in ranks)
    if plan.traffic.parameters:  # ZeRO: every rank writes its part
        assert plan.checkpoint.num_bytes == written
    else:
        assert plan.checkpoint.num_bytes == ranks[0].checkpoint
