"""What the look before each update, and the check of replicas, cost a training step: 2 gloo ranks, ZeRO stages in turn.

Run: PYTHONPATH=.:tests python tests/benchmarks/bench_checks.py [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from dispersion_pretrain import distributed
from dispersion_pretrain.config import Settings
from dispersion_pretrain.engine import DeepSpeedEngine, start_distributed
from dispersion_pretrain.faults import NUM_SUMS, examine
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.model import build_model, model_config
from dispersion_pretrain.objective import StepContext, TrainingModule
from dispersion_pretrain.replicas import refuse_odd_ranks
from dispersion_pretrain.settings_file import parse_settings
from spawn import run_ranks

TINY = Path(__file__).resolve().parents[2] / "configs" / "models" / "gpt2_tiny.yaml"
SEQUENCES, LENGTH, VOCABULARY = 4, 256, 8192


def settings_for(stage: int, precision: str) -> Settings:
    tree = {
        "model": {"config": yaml.safe_load(TINY.read_text()), "precision": precision},
        "data": {"corpus": "none", "sequence_length": LENGTH},
        "training": {"global_batch_tokens": SEQUENCES * LENGTH, "max_tokens": 100 * SEQUENCES * LENGTH},
        "zero": {"stage": stage},
    }
    return parse_settings(tree, "benchmark")


def measure(stage: int, precision: str, rounds: int) -> dict[str, float]:
    """Medians in ms: a whole step, the look within it, its pass over the gradients, and a check of replicas."""
    settings = settings_for(stage, precision)
    layout = BatchLayout.derive(settings, distributed.world_size())
    distributed.seed_everything(0)
    config = model_config(settings.model, vocabulary=VOCABULARY, sequence_length=LENGTH)
    engine = DeepSpeedEngine(TrainingModule(build_model(settings.model, config), None), settings, layout)
    engine.train()
    context = StepContext(0, SEQUENCES * (LENGTH - 1), layout.world_size * layout.accumulation, 0.0)
    ids, samples = torch.randint(0, VOCABULARY, (layout.micro_batch, LENGTH)), torch.arange(layout.micro_batch)
    times: dict[str, list[float]] = {"step": [], "gradients": [], "look": [], "replicas": []}

    def timed(name: str, started: float) -> None:
        times[name].append(1e3 * (time.perf_counter() - started))

    for _ in range(rounds + 2):
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(layout.accumulation - 1):
            engine.backward(engine(ids, samples, context).total)
            engine.step()
        engine.backward(engine(ids, samples, context).total)
        dist.barrier()  # waiting for the other rank is no part of the look
        look = time.perf_counter()
        square = engine.gradient_square()
        timed("gradients", look)
        examine(torch.zeros(NUM_SUMS, dtype=torch.float64), square, context, engine.non_finite_gradients)
        timed("look", look)
        engine.step()
        timed("step", begin)
        dist.barrier()
        begin = time.perf_counter()
        refuse_odd_ranks(engine.replicated_tensors(), {}, 0, torch.device("cpu"))
        timed("replicas", begin)
    engine.close()
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def all_cases(rounds: int) -> list[tuple[int, str, dict[str, float]]]:
    start_distributed()
    cases = [(stage, "float32") for stage in range(4)] + [(2, "bf16"), (3, "bf16")]
    return [(stage, precision, measure(stage, precision, rounds)) for stage, precision in cases]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    print(f"gpt2_tiny with a vocabulary of {VOCABULARY}, {SEQUENCES} x {LENGTH} tokens a step, 2 ranks, medians in ms")
    print(f"{'ZeRO':>5}{'precision':>11}{'step':>10}{'look':>9}{'gradients':>11}{'share':>9}{'replicas':>10}")
    found: list[tuple[int, str, dict[str, Any]]] = run_ranks(all_cases, 2, rounds, timeout_s=500)[0]
    for stage, precision, ms in found:
        share = ms["look"] / ms["step"]
        print(f"{stage:5}{precision:>11}{ms['step']:10.1f}{ms['look']:9.2f}{ms['gradients']:11.2f}{share:9.2%}"
              f"{ms['replicas']:10.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
