"""Training on a GPU: whole runs in each way that computes a block, and steps that do not wait for the device."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bench_gpu import CASES, TERM, WAYS, settings, write_corpus
from benchmarks.pretrain_run import run_pretrain
from dispersion_pretrain.objective import TrainingModule
from unit.test_objective import batch, build, context, term

STEPS = 6


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """From its ninth shape on a compiled function would run eagerly, in silence."""
    torch.compiler.reset()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("way", WAYS)
def test_a_run_in_bf16_learns_and_each_way_has_its_losses(way: str, tmp_path: Path) -> None:
    qwen3 = next(case for case in CASES if case.model.startswith("qwen3"))._replace(length=256, sequences=4)
    write_corpus(qwen3, tmp_path, STEPS)
    losses = {}
    for name in dict.fromkeys(("eager", way)):
        tree: dict[str, Any] = settings(qwen3, tmp_path, STEPS, tiny=True, way=name) | {"dispersion": TERM}
        records = run_pretrain(tmp_path, name, tree)
        losses[name] = [record["loss/total"] for record in records]
        assert len(records) == STEPS and all(record["mfu"] > 0 and record["memory_gib"] > 0 for record in records)
    assert losses[way][-1] < losses[way][0]
    assert all(math.isclose(one, other, rel_tol=1e-2) for one, other in zip(losses["eager"], losses[way], strict=True))


@pytest.mark.parametrize("model_type", ["gpt2", "qwen3"])
def test_forward_and_backward_of_the_whole_objective_do_not_wait(model_type: str) -> None:
    module = TrainingModule(build(model_type), term([1, 2, 3, 4])).bfloat16().cuda()
    input_ids, sample_index = batch().cuda(), torch.arange(4).cuda()
    module(input_ids, sample_index, context(0.1)).total.backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        module(input_ids, sample_index, context(0.1, step=1)).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
