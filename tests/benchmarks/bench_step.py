"""What the dispersion term adds to a training step: time with it over time without it, in one process, taking turns.

Run: python tests/benchmarks/bench_step.py [--rounds N] [--threads N] [--profile]
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dispersion_pretrain.config import DispersionSettings, ModelSettings, OptimizerSettings
from dispersion_pretrain.model import build_model, model_config
from dispersion_pretrain.objective import DispersionTerm, StepContext, TrainingModule
from dispersion_pretrain.optim import parameter_groups

GPT2 = {"model_type": "gpt2", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
TINY = Path(__file__).resolve().parents[2] / "configs" / "models" / "gpt2_tiny.yaml"


@dataclass(frozen=True)
class Case:
    """A model and how its step is dealt."""

    name: str
    fields: dict[str, Any]
    vocabulary: int
    length: int
    sequences: int
    pool_sequences: int
    tokens_per_sequence: int


CASES = [
    Case("gpt2_tiny, L=256, 8 seq, P=8, m=64", yaml.safe_load(TINY.read_text()), 8192, 256, 8, 8, 64),
    Case("gpt2_small x 4 layers, L=512, 4 seq, P=1, m=256", {**GPT2, "n_layer": 4}, 50257, 512, 4, 1, 256),
    Case("gpt2_small, L=512, 4 seq, P=1, m=256", GPT2, 50257, 512, 4, 1, 256),
]  # fmt: skip


class Training:
    """A model in training whose dispersion term can be left out of a step."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        settings = ModelSettings(config=case.fields)
        config = model_config(settings, vocabulary=case.vocabulary, sequence_length=case.length)
        term = DispersionTerm(
            DispersionSettings(pool_sequences=case.pool_sequences, tokens_per_sequence=case.tokens_per_sequence),
            layers=list(range(1, config.num_hidden_layers + 1)),
            seed=0,
            pools_per_rank=case.sequences // case.pool_sequences,
            pool_group=None,
        )
        self.module = TrainingModule(build_model(settings, config), term).train()
        self.optimizer = torch.optim.AdamW(parameter_groups(self.module, OptimizerSettings()), lr=1e-4)
        self.ids = torch.randint(0, case.vocabulary, (case.sequences, case.length))
        self.samples = torch.arange(case.sequences)
        self.targets = case.sequences * (case.length - 1)

    def step(self, number: int, coefficient: float) -> tuple[float, float]:
        """One optimizer step; its time in ms, and that of all processors, which a busy neighbour stretches less."""
        start, start_processor = time.perf_counter(), time.process_time()
        context = StepContext(step=number, targets=self.targets, shares=1, coefficient=coefficient)
        self.module(self.ids, self.samples, context).total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        return 1e3 * (time.perf_counter() - start), 1e3 * (time.process_time() - start_processor)


def report(case: Case, rounds: int, profile: bool) -> None:
    training = Training(case)
    pairs = []
    for number in range(rounds + 2):
        pair = {coefficient: training.step(number, coefficient) for coefficient in ((0.1, 0.0), (0.0, 0.1))[number % 2]}
        if number >= 2:
            pairs.append((pair[0.1], pair[0.0]))
    with_term, without = (statistics.median(times[0] for times in column) for column in zip(*pairs, strict=True))
    ratios = [statistics.median(one[kind] / other[kind] for one, other in pairs) for kind in (0, 1)]
    print(f"{case.name:<50}{without:12.1f}{with_term:12.1f}{ratios[0]:10.3f}{ratios[1]:18.3f}", flush=True)
    if profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            training.step(0, 0.1)
        print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", action="store_true", help="also print where a step with the term spends its time")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, float32, medians of {arguments.rounds} interleaved "
        "rounds"
    )
    print(f"{'model and step':<50}{'without ms':>12}{'with ms':>12}{'ratio':>10}{'processor ratio':>18}")
    for case in CASES:
        report(case, arguments.rounds, arguments.profile)


if __name__ == "__main__":
    main()
