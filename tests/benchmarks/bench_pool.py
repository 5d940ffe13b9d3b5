"""Cost of the gathered loss for one rank while the pool stays the same and ranks are added.

N = 2,048 embeddings of width 768 in 12 layers lie on 1, 2, 4 gloo ranks of this machine. Processor time is a rank's
own, so that more ranks than cores do not blur it; collectives are counted, their bytes follow from the shapes. One rank
alone saves a quarter of the products by symmetry, and passes over the whole pool (its norms, its mean) stay on every
rank: so two ranks need more than half of one's time. The last lines extrapolate.

Run: python tests/benchmarks/bench_pool.py [--rounds N] [--bandwidth GB/s] [--latency us]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dispersion_pretrain.dispersion import pooled_dispersion_loss  # noqa: E402
from dispersion_pretrain.distributed import pool_groups  # noqa: E402
from numerics.communication import Communication  # noqa: E402
from spawn import run_ranks  # noqa: E402

LAYERS, EMBEDDINGS, DIM = 12, 2048, 768


class Cost(NamedTuple):
    """Of one micro-step on one rank."""

    processor_ms: float  # of the rank's own thread of mathematics
    wall_ms: float
    forward: list[str]  # collectives
    backward: list[str]


def processor_ms() -> float:
    usage = resource.getrusage(resource.RUSAGE_THREAD)
    return 1e3 * (usage.ru_utime + usage.ru_stime)


def cost_on_rank(rounds: int) -> Cost:
    warnings.simplefilter("ignore", FutureWarning)  # collectives by names that newer torch versions deprecate
    ranks = dist.get_world_size()
    group = pool_groups(ranks)
    generator = torch.Generator().manual_seed(dist.get_rank())
    own = torch.randn(LAYERS, EMBEDDINGS // ranks, DIM, generator=generator).add_(0.3).requires_grad_()
    processor, wall = [], []
    for _ in range(rounds + 1):
        dist.barrier()
        start, start_processor = time.perf_counter(), processor_ms()
        pooled_dispersion_loss(own, group=group).mean().backward()
        wall.append(1e3 * (time.perf_counter() - start))
        processor.append(processor_ms() - start_processor)
        own.grad = None
    with Communication() as forward:
        loss = pooled_dispersion_loss(own, group=group).mean()
    with Communication() as backward:
        loss.backward()
    names = [name for name, _ in forward.calls], [name for name, _ in backward.calls]
    return Cost(statistics.median(processor[1:]), statistics.median(wall[1:]), *names)


def bytes_sent(ranks: int, element_size: int) -> tuple[float, float]:
    """By one rank: (all-gather of a ring, all-reduce of a ring), for all layers of one micro-step."""
    own = LAYERS * EMBEDDINGS / ranks * DIM * element_size
    sums = ranks * 3 * LAYERS * 8  # a place for each rank, three float64 a layer
    return own * (ranks - 1), 2 * sums * (ranks - 1) / ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bandwidth", type=float, default=40.0, help="GB/s of a rank, for the extrapolation")
    parser.add_argument("--latency", type=float, default=20.0, help="microseconds of a hop, for the extrapolation")
    arguments = parser.parse_args()
    print(f"pool of {EMBEDDINGS} x {DIM}, {LAYERS} layers, float32, gloo, one thread a rank; medians of "
          f"{arguments.rounds} rounds, the slowest rank")  # fmt: skip
    print(f"{'ranks':>6}{'processor ms':>14}{'of 1 rank':>11}{'wall ms':>10}{'MiB sent':>10}"
          f"   collectives: forward; backward")  # fmt: skip
    first = 0.0
    for ranks in (1, 2, 4):
        costs = run_ranks(cost_on_rank, ranks, arguments.rounds, timeout_s=600)
        slowest = max(costs, key=lambda cost: cost.processor_ms)
        first = first or slowest.processor_ms
        sent = sum(bytes_sent(ranks, 4)) / 2**20
        print(
            f"{ranks:6d}{slowest.processor_ms:14.0f}{slowest.processor_ms / first:11.2f}{slowest.wall_ms:10.0f}"
            f"{sent:10.1f}   {', '.join(slowest.forward) or 'none'}; {', '.join(slowest.backward) or 'none'}",
            flush=True,
        )
    print(f"\nextrapolated to bf16 over {arguments.bandwidth:g} GB/s and {arguments.latency:g} us a hop "
          "(log2 of the ranks hops for each, as trees have), products at a GPU's 50 TFLOP/s float32:")  # fmt: skip
    print(
        f"{'ranks':>6}{'own rows':>10}{'GFLOP':>9}{'products ms':>13}{'MB gathered':>13}{'gather ms':>11}{'sums ms':>9}"
    )
    for ranks in (8, 64, 640):
        rows = max(1.0, EMBEDDINGS / ranks)
        operations = 2 * 2 * LAYERS * rows * EMBEDDINGS * DIM
        gathered, summed = bytes_sent(ranks, 2)
        hops = max(1, (ranks - 1).bit_length())
        sums_ms = 1e3 * summed / (arguments.bandwidth * 1e9) + 2e-3 * arguments.latency * hops
        print(
            f"{ranks:6d}{rows:10.1f}{operations / 1e9:9.2f}{operations / 50e12 * 1e3:13.3f}{gathered / 1e6:13.1f}"
            f"{1e3 * gathered / (arguments.bandwidth * 1e9) + 1e-3 * arguments.latency * hops:11.2f}{sums_ms:9.2f}"
        )


if __name__ == "__main__":
    main()
