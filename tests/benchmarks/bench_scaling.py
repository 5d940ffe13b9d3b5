"""Steps on 1, 2 and 4 processes of this machine, strong and weak, with what they send, beside the plan.

Strong: 8 sequences a step in all, a pool of all of them. Weak: 4 sequences a rank, a pool of all of them, which grows
with the ranks and the term with it. ZeRO-2, a thread a rank. The plan's two rates of computation are calibrated once,
by two cases on the first number of ranks; what a matrix product, a copy and an all-reduce take is measured on each
number of ranks while all of them work, so that ranks that share a core have half of it. Efficiency: tokens a second of
all ranks against that of the first row, by the cores that they can have. Bytes are what rank 0 sends in a step, counted
at the collectives; in brackets the plan's.

Run: python tests/benchmarks/bench_scaling.py [--rounds N] [--ranks N ...]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import dispersion_pretrain  # noqa: F401  (before streaming, which imports torchvision)

# isort: split
import torch.distributed as dist

from dispersion_pretrain.config import Settings
from dispersion_pretrain.engine import start_distributed
from dispersion_pretrain.plan import Planner

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.bench_plan import CASES, LENGTH, rates, settings_of, start_ranks, this_machine  # noqa: E402
from measured_step import measure  # noqa: E402

KINDS = {"strong": lambda ranks: 8 // ranks, "weak": lambda ranks: 4}  # sequences a rank
TOKENS_OF_SEQUENCE = 64


def case(kind: str, ranks: int) -> Settings:
    """6 layers of width 256 with a pool over all ranks."""
    own = KINDS[kind](ranks)
    term = {"pool_sequences": own * ranks, "tokens_per_sequence": TOKENS_OF_SEQUENCE}
    return settings_of(ranks, layers=6, stage=2, sequences=own, micro_batch=own, term=term)


def rank_job(rounds: int, notes: Path) -> None:
    """Measure on the ranks that a launcher started; the first prints, and notes what later calls compare with."""
    start_distributed()
    ranks = dist.get_world_size()
    machine = this_machine()
    known = json.loads(notes.read_text()) if notes.exists() else {}
    if not known:
        calibrating = [settings_of(ranks, **change) for change in list(CASES.values())[:2]]
        found = rates(machine, [(settings, measure(settings, timed_steps=rounds).seconds) for settings in calibrating])
        known["rates"] = {name: getattr(found, name) for name in ("product_efficiency", "traffic_efficiency")}
    machine = machine.model_copy(update=known["rates"])
    measured = {kind: measure(case(kind, ranks), timed_steps=rounds) for kind in KINDS}
    if dist.get_rank() != 0:
        return
    cores = min(ranks, len(os.sched_getaffinity(0)))
    for kind, found_step in measured.items():
        plan = Planner(case(kind, ranks), machine, nodes=1, gpus_per_node=ranks).chosen
        tokens_per_second = KINDS[kind](ranks) * ranks * LENGTH / found_step.seconds
        single = known.setdefault(kind, tokens_per_second / cores)
        sent = [
            f"{count / 2**20:.2f} ({planned / 2**20:.2f})"
            for count, planned in (
                (found_step.reduced, plan.traffic.reduction),
                (found_step.gathered, plan.traffic.parameters),
                (found_step.pooled, plan.traffic.pool),
            )
        ]
        print(
            f"{kind:<8}{ranks:>6}{found_step.seconds:>10.3f}{plan.time.total:>8.3f}"
            f"{plan.time.total / found_step.seconds:>7.2f}{tokens_per_second:>11.0f}"
            f"{tokens_per_second / single / cores:>12.2f}" + "".join(f"{text:>18}" for text in sent),
            flush=True,
        )
    notes.write_text(json.dumps(known))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of a case")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="the first one calibrates")
    parser.add_argument("--notes", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank_job(arguments.rounds, arguments.notes)
        sys.stdout.flush()
        os._exit(0)
    print(
        f"{'':<8}{'ranks':>6}{'s a step':>10}{'plan':>8}{'ratio':>7}{'tokens/s':>11}{'efficiency':>12}"
        + "".join(f"{name:>18}" for name in ("gradients MiB", "weights MiB", "pool MiB")),
        flush=True,
    )
    with tempfile.TemporaryDirectory() as folder:
        for ranks in arguments.ranks:
            start_ranks(__file__, ranks, "--rounds", str(arguments.rounds), "--notes", str(Path(folder) / "notes"))


if __name__ == "__main__":
    main()
