"""How long a save holds up training: a model of 124M parameters on two ranks of this machine, ZeRO-2, float32.

Plain saves and saves in the background take turns. The stall is the longest of the ranks: until `write` has returned,
and what the steps that follow spend in `poll`. The first save of each kind, which also takes its memory from the
system, has a line of its own.

Run: python tests/benchmarks/bench_checkpoint.py [--rounds N] [--folder FOLDER] [--layers N]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dispersion_pretrain import distributed  # noqa: E402
from dispersion_pretrain.data import Batch  # noqa: E402
from dispersion_pretrain.engine import DeepSpeedEngine, start_distributed  # noqa: E402
from dispersion_pretrain.layout import BatchLayout  # noqa: E402
from dispersion_pretrain.metrics import StepTotals, memory_gib  # noqa: E402
from dispersion_pretrain.model import build_model, model_config  # noqa: E402
from dispersion_pretrain.objective import StepContext, TrainingModule  # noqa: E402
from dispersion_pretrain.saving import Description, Saves  # noqa: E402
from dispersion_pretrain.settings_file import parse_settings  # noqa: E402
from dispersion_pretrain.train import train_step  # noqa: E402
from spawn import run_ranks  # noqa: E402

RANKS, LENGTH, VOCABULARY = 2, 64, 50257
GPT2 = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


class Measured(NamedTuple):
    """Of one save on one rank."""

    stall_s: float
    write_s: float  # of the slowest rank
    steps_while_writing_s: list[float]
    steps_after_s: list[float]


class Figures(NamedTuple):
    """Of one rank."""

    parameters: int
    plain: list[Measured]
    background: list[Measured]
    copy_gib: float
    memory_without_copy_gib: float
    memory_gib: float


class Training:
    """A model in training."""

    def __init__(self, layers: int) -> None:
        tree = {
            "model": {"config": {**GPT2, "n_layer": layers}},
            "data": {"corpus": "none", "sequence_length": LENGTH},
            "training": {"global_batch_tokens": RANKS * LENGTH, "max_tokens": RANKS * LENGTH, "micro_batch": 1},
            "zero": {"stage": 2},
        }
        settings = parse_settings(tree, "bench")
        config = model_config(settings.model, vocabulary=VOCABULARY, sequence_length=LENGTH)
        module = TrainingModule(build_model(settings.model, config), None)
        self.parameters = sum(parameter.numel() for parameter in module.parameters())
        self.engine = DeepSpeedEngine(module, settings, BatchLayout.derive(settings, RANKS))
        self.device = torch.device("cpu")
        self.step_number = 0

    def step(self) -> float:
        """One optimizer step; its time in s."""
        started = time.perf_counter()
        ids = torch.randint(0, VOCABULARY, (1, LENGTH))
        batch = Batch(ids, torch.tensor([distributed.rank()]), torch.ones(1, dtype=torch.bool))
        context = StepContext(self.step_number, RANKS * (LENGTH - 1), RANKS, 0.0)
        train_step(self.engine, iter([batch]), context, StepTotals(), self.device)
        self.step_number += 1
        return time.perf_counter() - started


def measure(training: Training, saves: Saves, steps_after: int) -> Measured:
    distributed.barrier()
    started = time.perf_counter()
    saves.begin(saves.shared, training.step_number)
    training.engine.save(saves.take)
    saves.write(Description(training.step_number, 0, 0, RANKS))
    stall_s, while_writing = time.perf_counter() - started, []
    while True:
        distributed.barrier()  # the ranks' steps are not of the same length: to wait for each other is no stall
        started = time.perf_counter()
        ended = saves.poll()
        stall_s += time.perf_counter() - started
        if ended:
            break
        while_writing.append(training.step())
    assert ended[0].error is None, ended[0].error
    return Measured(stall_s, ended[0].write_s, while_writing, [training.step() for _ in range(steps_after)])


def bench_rank(folder: Path, rounds: int, layers: int) -> Figures:
    warnings.simplefilter("ignore", FutureWarning)  # collectives by names that newer torch versions deprecate
    start_distributed()
    training = Training(layers)
    for _ in range(2):
        training.step()
    kinds = {background: Saves(folder / str(background), background=background) for background in (False, True)}
    found: dict[bool, list[Measured]] = {False: [], True: []}
    found[False].append(measure(training, kinds[False], 2))
    without_copy_gib = memory_gib()
    found[True].append(measure(training, kinds[True], 2))
    for number in range(rounds):
        for background in (False, True) if number % 2 else (True, False):
            found[background].append(measure(training, kinds[background], 2))
    buffers: Any = kinds[True]._copy._buffers.values()
    copy_gib = sum(buffer.nbytes for buffer in buffers) / 2**30
    return Figures(training.parameters, found[False], found[True], copy_gib, without_copy_gib, memory_gib())


def report(figures: list[Figures], rounds: int) -> None:
    def stalls(kind: str) -> list[float]:
        return [max(one.stall_s for one in ranks) for ranks in zip(*(getattr(f, kind) for f in figures), strict=True)]

    plain, background = stalls("plain"), stalls("background")
    ratio = statistics.median(b / p for b, p in zip(background[1:], plain[1:], strict=True))
    saves = figures[0].background[1:]
    writing = [step for save in saves for step in save.steps_while_writing_s]
    after = [step for save in saves for step in save.steps_after_s]
    copies = " + ".join(f"{f.copy_gib:.2f}" for f in figures)
    memory = " + ".join(f"{f.memory_gib - f.memory_without_copy_gib:.2f}" for f in figures)
    print(
        f"{figures[0].parameters / 1e6:.0f}M parameters, {RANKS} ranks, ZeRO-2; medians of {rounds} interleaved rounds"
    )
    print(f"{'':<44}{'plain':>12}{'background':>12}")
    print(f"{'first save: stall, s':<44}{plain[0]:>12.2f}{background[0]:>12.2f}")
    print(f"{'stall, s':<44}{statistics.median(plain[1:]):>12.2f}{statistics.median(background[1:]):>12.2f}")
    print(f"{'ratio of stalls':<44}{'':>12}{ratio:>12.3f}")
    plain_write = statistics.median(save.write_s for save in figures[0].plain[1:])
    print(f"{'writing, s':<44}{plain_write:>12.2f}{statistics.median(save.write_s for save in saves):>12.2f}")
    print(f"{'step while writing / not, s':<44}{'':>12}", end="")
    print(f"{statistics.median(writing):>6.2f}/{statistics.median(after):.2f}")
    print(f"host memory of the copy, GiB by rank: {copies}; growth of the process meanwhile: {memory}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", help="on the disk to be measured (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = run_ranks(bench_rank, RANKS, Path(folder), arguments.rounds, arguments.layers, timeout_s=3600)
    report(figures, arguments.rounds)


if __name__ == "__main__":
    main()
