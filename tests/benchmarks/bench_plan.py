"""The plan beside measured steps on this machine's processors: bytes and seconds of small models under DeepSpeed.

Tensors: most bytes of tensors alive in a step beside what lasts, counted operation by operation; process: the same as
the kernel counts it. The machine of the plan is calibrated at the start by one matrix product, one copy and one
all-reduce, and its two rates of computation, products and all other operations, by two cases of different width, marked
with a *, whose ratios of seconds are 1 thereby. All other seconds are predicted. Beside them stands what one
utilisation, calibrated by the first case, would predict. Seconds are the fastest of some: other work on the machine
can only slow a step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dispersion_pretrain  # noqa: F401  (before streaming, which imports torchvision)

# isort: split
import torch
import torch.distributed as dist

from dispersion_pretrain.config import Settings
from dispersion_pretrain.engine import start_distributed
from dispersion_pretrain.plan import Planner
from dispersion_pretrain.plan_machine import Machine
from dispersion_pretrain.settings_file import parse_settings
from measured_step import measure

LENGTH, VOCABULARY, BUCKET = 256, 4096, 1_000_000
POOL = {"pool_sequences": 8, "tokens_per_sequence": 64}
CASES: dict[str, dict[str, Any]] = {  # the first two tell the rates
    "4 x 256, ZeRO-1 *": {},
    "4 x 512, ZeRO-2 *": {"width": 512, "stage": 2},
    "8 x 256, ZeRO-2, 2 micro-steps": {"layers": 8, "stage": 2, "micro_batch": 4},
    "4 x 256, ZeRO-1, recomputed": {"recompute": True},
    "6 x 256, ZeRO-2, dispersion term": {"layers": 6, "stage": 2, "term": POOL},
    "4 x 384, ZeRO-1": {"width": 384},
    "6 x 384, ZeRO-2": {"layers": 6, "width": 384, "stage": 2},
    "6 x 384, ZeRO-3": {"layers": 6, "width": 384, "stage": 3},
    "2 x 768, ZeRO-1": {"layers": 2, "width": 768},
}


def settings_of(
    ranks: int,
    *,
    layers: int = 4,
    width: int = 256,
    stage: int = 1,
    sequences: int = 8,
    micro_batch: int = 8,
    recompute: bool = False,
    term: dict[str, Any] | None = None,
) -> Settings:
    """So many sequences a rank and step; buckets as small as the models are."""
    fields = {
        "model_type": "gpt2", "n_layer": layers, "n_embd": width, "n_head": width // 64, "n_positions": LENGTH,
        "vocab_size": VOCABULARY, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    }  # fmt: skip
    tokens = sequences * ranks * LENGTH
    tree = {
        "model": {"config": fields, "activation_checkpointing": recompute},
        "data": {"corpus": "none", "sequence_length": LENGTH},
        "training": {"global_batch_tokens": tokens, "max_tokens": 100 * tokens, "micro_batch": micro_batch},
        "dispersion": term,
        "zero": {"stage": stage, "overrides": {"zero_optimization": {"reduce_bucket_size": BUCKET}}},
    }
    return parse_settings(tree, "benchmark")


def seconds(function: Callable[[], Any], rounds: int = 15) -> float:
    """Median of calls that follow each other without a pause, so that ranks that share a core share it."""
    times = []
    dist.barrier()
    for _ in range(rounds):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def this_machine() -> Machine:
    """What a rank has while all of them work."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    flops = 2 * 1024**3 / seconds(lambda: left @ right)
    source, target = torch.randn(2**24), torch.empty(2**24)
    memory = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    ranks, link, hop = dist.get_world_size(), 1e12, 0.0
    if ranks > 1:
        small = torch.zeros(1)
        hop = seconds(lambda: dist.all_reduce(small)) / (ranks - 1)
        bucket = source[:BUCKET]
        link = 2 * (ranks - 1) / ranks * bucket.nbytes / seconds(lambda: dist.all_reduce(bucket))
    return Machine(
        name="CPU", bf16_tflops=flops / 1e12, float32_tflops=flops / 1e12, memory_gib=64, memory_gb_s=memory / 1e9,
        nvlink_gb_s=link / 1e9, internode_gb_s=link / 1e9, host_memory_gib=64, host_memory_gb_s=memory / 1e9,
        host_link_gb_s=memory / 1e9, product_efficiency=1.0, traffic_efficiency=1.0, launch_us=0.0,
        link_efficiency=1.0, hop_us=hop * 1e6, overlaps=False,
    )  # fmt: skip


def rates(machine: Machine, measured: list[tuple[Settings, float]]) -> Machine:
    """The machine whose two rates give two measured steps their seconds: products / a + bytes / b + the rest."""
    for _ in range(4):  # a small part of the rest depends on b
        rows, targets = [], []
        for settings, seconds_of_step in measured:
            plan = Planner(settings, machine, nodes=1, gpus_per_node=dist.get_world_size())
            micro_steps, work = plan.plan.layout.accumulation, plan.trace.work(plan.plan.layout.micro_batch)
            rest = plan.chosen.time.total - plan.chosen.time.compute
            compute = max(seconds_of_step - rest, 0.1 * seconds_of_step)
            rows.append([micro_steps * work.product_flops / compute, micro_steps * work.moved_bytes / compute])
            targets.append(1.0)
        per_flop, per_byte = torch.linalg.solve(torch.tensor(rows).double(), torch.tensor(targets).double()).tolist()
        if min(per_flop, per_byte) <= 0:
            raise SystemExit(f"the two cases contradict each other: {measured}. The machine was too busy; run it again")
        machine = machine.model_copy(
            update={
                "product_efficiency": 1 / per_flop / machine.peak("float32"),
                "traffic_efficiency": 1 / per_byte / (machine.memory_gb_s * 1e9),
            }
        )
    return machine


def one_utilisation(machine: Machine, settings: Settings, seconds_of_step: float) -> Machine:
    """The machine whose single utilisation gives a measured step its seconds."""
    flat = machine.model_copy(update={"mfu": 1.0})
    time_at_peak = Planner(settings, flat, nodes=1, gpus_per_node=dist.get_world_size()).chosen.time
    rest = time_at_peak.total - time_at_peak.compute
    return flat.model_copy(update={"mfu": time_at_peak.compute / max(seconds_of_step - rest, 1e-9)})


def rank_job(rounds: int) -> None:
    """Measure every case on the ranks that a launcher started; the first prints."""
    start_distributed()
    ranks, mib = dist.get_world_size(), 2**20
    raw = this_machine()
    cases = {name: settings_of(ranks, **change) for name, change in CASES.items()}
    measured = {name: measure(settings, timed_steps=rounds) for name, settings in cases.items()}
    if dist.get_rank() != 0:
        return
    first, second = list(CASES)[:2]
    machine = rates(raw, [(cases[name], measured[name].seconds) for name in (first, second)])
    flat = one_utilisation(raw, cases[first], measured[first].seconds)
    print(
        f"{ranks} ranks, {torch.get_num_threads()} thread each: {raw.float32_tflops * 1e3:.0f} GFLOP/s, "
        f"{raw.memory_gb_s:.1f} GB/s copied, {raw.nvlink_gb_s if ranks > 1 else 0:.2f} GB/s between ranks; "
        f"products at {machine.product_efficiency:.2f}, other operations at {machine.traffic_efficiency:.2f} of it"
    )
    print(
        f"{'':<36}{'states MiB':>22}{'peak MiB':>11}{'tensors':>10}{'ratio':>7}{'process':>10}{'ratio':>7}"
        f"{'measured s':>12}{'ratio':>7}{'one rate':>10}"
    )
    for name, settings in cases.items():
        found = measured[name]
        plans = [Planner(settings, one, nodes=1, gpus_per_node=ranks).chosen for one in (machine, flat)]
        needed = plans[0].memory
        # Stage 3 has a buffer for its gradients from the start, which a measured step finds there.
        peak = needed.peak.total + needed.gathered - (needed.peak.gradients if settings.zero.stage == 3 else 0)
        states = needed.parameters + needed.masters + needed.moments
        of_states = (found.parameters + found.masters + found.moments) / mib
        ratio, flat_ratio = (plan.time.total / found.seconds for plan in plans)
        print(
            f"{name:<36}{f'{states / mib:.2f} = {of_states:.2f}':>22}{peak / mib:>11.1f}"
            f"{found.tensors / mib:>10.1f}{peak / found.tensors:>7.2f}{found.resident / mib:>10.1f}"
            f"{peak / max(1, found.resident):>7.2f}{found.seconds:>12.3f}{ratio:>7.2f}{flat_ratio:>10.2f}",
            flush=True,
        )


def start_ranks(script: str, ranks: int, *options: str) -> None:
    """Run a script under torchrun, a thread a rank."""
    # Memory that is freed goes back to the kernel at once, so that its count of the process is one of the step.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "DS_ACCELERATOR": "cpu"}
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    command = [torchrun, "--standalone", "--nproc_per_node", str(ranks), script, *options]
    subprocess.run(command, env=environment, check=True, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of a case")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank_job(arguments.rounds)
        sys.stdout.flush()
        os._exit(0)
    for ranks in arguments.ranks:
        start_ranks(__file__, ranks, "--rounds", str(arguments.rounds))


if __name__ == "__main__":
    main()
