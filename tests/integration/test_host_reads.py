"""Between log steps the loop waits for the device as often as is said here, and for the reason given."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dispersion_pretrain import distributed, heartbeat
from dispersion_pretrain.settings_file import load_settings
from dispersion_pretrain.train import run
from dispersion_pretrain.watchdog import Watchdog
from integration.jobs import write_config
from spawn import run_ranks

STEPS, LOG_EVERY = 5, 3
# On a GPU each of these waits until everything before it has been computed.
READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Read(NamedTuple):
    step: int  # 0-based; -1: before the first
    phase: str
    file: str  # of the frame outside of torch

    @classmethod
    def now(cls) -> Read:
        files = [frame.filename for frame in traceback.extract_stack()[:-2] if frame.filename != __file__]
        named = next(file for file in reversed(files) if "/torch/" not in file)
        return cls(heartbeat.now.step, heartbeat.now.phase, "/".join(Path(named).parts[-2:]))


class CountedOperations(TorchDispatchMode):
    """Every operation whose result the host needs."""

    def __init__(self, reads: list[Read]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Adam's counts of steps lie on the host, but for the fused kind of GPUs.
        if func in READS and not any("/torch/optim/" in frame.filename for frame in traceback.extract_stack()):
            self.reads.append(Read.now())
        return func(*args, **(kwargs or {}))


class CountedLists(TorchFunctionMode):
    """`tolist`, which on a CPU is no operation of PyTorch's, and copies to the host."""

    def __init__(self, reads: list[Read]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.tolist, torch.Tensor.numpy):
            self.reads.append(Read.now())
        return func(*args, **(kwargs or {}))


def counted_waits(reads: list[Read]) -> Any:
    """In place of the accelerator's `synchronize`, which DeepSpeed calls by its own way."""
    return lambda *_: reads.append(Read.now())


def reads_of_runs(config: str, folder: str, stages: list[int]) -> list[list[Read]]:
    """What a run at each stage reads, on this rank."""
    found = []
    for stage in stages:
        settings = load_settings(config, [f"zero.stage={stage}", f"run.folder={folder}/{stage}"])
        reads: list[Read] = []
        watchdog = Watchdog(None, rank=distributed.rank(), world_size=distributed.world_size())
        with pytest.MonkeyPatch.context() as patch, CountedOperations(reads), CountedLists(reads):
            patch.setattr(get_accelerator(), "synchronize", counted_waits(reads))
            assert run(settings, watchdog) == 0
        found.append(reads)
    return found


# What DeepSpeed reads in its update, in float32: the norm of each of the two groups of parameters at stages 1 and 2,
# and whether the norm is finite (which `examine` saw before).
DEEPSPEED = {
    0: [],
    1: ["runtime/utils.py"] * 3,
    2: ["runtime/utils.py"] * 3,
    3: ["runtime/utils.py"],
}


@pytest.fixture(scope="module")
def reads(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[list[Read]]]:
    """By stage and rank."""
    folder = tmp_path_factory.mktemp("reads")
    config = write_config(
        folder, corpus, validation=None,
        training={"max_tokens": STEPS * 512},
        dispersion={"gradient_ratio_cap": None},
        checkpoint={"every_steps": 1000},
        logging={"every_steps": LOG_EVERY},
    )  # fmt: skip
    by_rank = run_ranks(reads_of_runs, 2, str(config), str(folder), list(DEEPSPEED), timeout_s=400.0)
    return {stage: [of_rank[place] for of_rank in by_rank] for place, stage in enumerate(DEEPSPEED)}


@pytest.mark.parametrize("stage", DEEPSPEED)
def test_a_step_that_is_not_logged_reads_once_and_what_deepspeed_reads(
    reads: dict[int, list[list[Read]]], stage: int
) -> None:
    for of_rank in reads[stage]:
        for step in range(1, STEPS - 1):  # the first makes DeepSpeed's plan of stage 3, the last is logged
            if (step + 1) % LOG_EVERY == 0:
                continue
            found = [read for read in of_rank if read.step == step]
            assert found == [
                Read(step, "check for numbers that are not finite", "dispersion_pretrain/faults.py"),
                *(Read(step, "update", file) for file in DEEPSPEED[stage]),
            ]


def test_a_step_that_is_logged_reads_more(reads: dict[int, list[list[Read]]]) -> None:
    """So the counter counts."""
    for of_rank in reads[2]:
        assert sum(read.phase == "logging" for read in of_rank if read.step == LOG_EVERY - 1) > 0
