"""What the ranks run on, and how fast they talk to each other."""

from __future__ import annotations

import socket
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from dispersion_pretrain import distributed, provenance
from dispersion_pretrain.assembly import Plan
from dispersion_pretrain.config import Settings
from dispersion_pretrain.engine import start_distributed

_WARM_UP, _REPEATS = 3, 20


def print_machine(settings: Settings) -> None:
    """Join the ranks and print `describe_machine` on rank 0. Collective: world.

    Raises:
        ValueError: as `Plan.make`.
    """
    device = start_distributed()
    description = describe_machine(settings, Plan.make(settings, distributed.world_size()), device)
    if distributed.is_main():
        print(description, flush=True)


def describe_machine(settings: Settings, plan: Plan, device: torch.device) -> str:
    """Versions, ranks, and the speed of the pool's collectives at the run's real size, as lines. Collective: world.

    Bandwidth is the bytes that each rank of a pool receives over the time (nccl-tests call it bus bandwidth).
    """
    places = Counter(distributed.gather_objects((socket.gethostname(), provenance.device_name(device))))
    ranks = ", ".join(f"{count} x {kind} on {host}" for (host, kind), count in places.items())
    lines = [
        "versions     " + ", ".join(f"{package} {version}" for package, version in provenance.versions().items()),
        f"ranks        {distributed.world_size()}: {ranks}",
        f"backend      {dist.get_backend()}",
    ]
    layout, term = plan.layout, settings.dispersion
    if layout.world_size == 1:
        return "\n".join(lines)
    group, members = distributed.pool_groups(layout.pool_ranks), layout.pool_ranks  # None, the world, for a pool of one
    number = torch.zeros(1, device=device)
    seconds = _median_s(lambda: dist.all_reduce(number, group=group), device)
    lines.append(
        f"latency      {seconds * 1e6:,.0f} us for an all-reduce of one number over "
        f"{members if members > 1 else layout.world_size} ranks"
    )
    if term is not None and members > 1:
        kind = torch.bfloat16 if settings.model.precision == "bf16" else torch.float32
        tokens = layout.micro_batch * term.tokens_per_sequence
        own = torch.zeros(len(plan.layers) * tokens * plan.size.width, dtype=kind, device=device)
        pool = own.new_empty(members * own.numel())
        seconds = _median_s(lambda: dist.all_gather_into_tensor(pool, own, group=group), device)
        received = own.nbytes * (members - 1)
        lines += [
            f"bandwidth    {received / seconds / 1e9:,.2f} GB/s for the all-gather of a pool of {members} ranks, "
            f"{seconds * 1e3:,.2f} ms",
            f"             each receives {received:,} bytes = {len(plan.layers)} layers x {tokens:,} tokens x width "
            f"{plan.size.width:,} x {kind.itemsize} bytes x {members - 1} other ranks; "
            f"{received * layout.accumulation:,} bytes a step",
        ]
    return "\n".join(lines)


def _median_s(collective: Callable[[], Any], device: torch.device) -> float:
    """Median time of one call on this rank, all ranks starting together, once warm."""
    times = []
    for _ in range(_WARM_UP + _REPEATS):
        distributed.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        collective()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[_WARM_UP:])
