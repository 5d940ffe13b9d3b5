"""A plan as text: tables that a terminal shows."""

from __future__ import annotations

from collections.abc import Callable

from dispersion_pretrain.plan import Estimate, Planner, steps_between_saves
from dispersion_pretrain.plan_memory import Memory

_MEMORY_ROWS: list[tuple[str, Callable[[Memory], float]]] = [
    ("parameters", lambda memory: memory.parameters),
    ("float32 masters", lambda memory: memory.masters),
    ("Adam's moments", lambda memory: memory.moments),
    ("gathered parameters", lambda memory: memory.gathered),
    ("gradients", lambda memory: memory.peak.gradients),
    ("ZeRO's buckets", lambda memory: memory.peak.buckets),
    ("activations", lambda memory: memory.peak.activations),
    ("logits", lambda memory: memory.peak.logits),
    ("pool of other ranks", lambda memory: memory.peak.pool),
    ("update", lambda memory: memory.peak.update),
    ("teacher", lambda memory: memory.teacher),
]


def describe(planner: Planner) -> str:
    """The whole plan."""
    parts = [_head(planner), _memory(planner), _grids(planner), _step(planner), _scaling(planner)]
    return "\n\n".join("\n".join(part) for part in parts)


def cost(planner: Planner) -> str:
    """What the run costs, in one line: time, GPU-hours, memory of a GPU."""
    chosen = planner.chosen
    hours = chosen.days * 24
    duration = f"{chosen.days:.1f} days" if hours >= 48 else f"{hours:.1f} hours"
    needed = planner.device_bytes(chosen.memory) / 2**30
    return f"{duration}, {chosen.gpu_hours:,.0f} GPU-hours, {needed:.0f} GiB a GPU"


def _head(planner: Planner) -> list[str]:
    machine = planner.machine
    assumed = ", ".join(f"{name} {value:g}" for name, value in machine.assumptions().items())
    return [
        *planner.plan.describe(planner.settings).splitlines(),
        f"cluster      {planner.nodes} x {planner.gpus_per_node} = {planner.world_size:,} {machine.name}, "
        f"{machine.memory_gib:g} GiB, {machine.peak(planner.settings.model.precision) / 1e12:g} TFLOP/s in "
        f"{planner.settings.model.precision}",
        f"assumed      {assumed}",
    ]


def _memory(planner: Planner) -> list[str]:
    stages = planner.by_stage()
    used = planner.settings.zero.stage
    gib = 2**30
    lines = [
        f"Memory of a GPU in GiB, micro-batch {planner.plan.layout.micro_batch}; * the run's ZeRO stage",
        f"{'':<24}" + "".join(f"{f'stage {stage}' + ('*' if stage == used else ' '):>12}" for stage in stages),
    ]
    for name, value in _MEMORY_ROWS:
        values = [value(estimate.memory) / gib for estimate in stages.values()]
        if any(values):
            lines.append(f"{name:<24}" + "".join(f"{number:>11.2f} " for number in values))
    totals = [planner.device_bytes(estimate.memory) / gib for estimate in stages.values()]
    usable = planner.machine.usable_bytes / gib
    hosts = [planner.host_gib(estimate) for estimate in stages.values()]
    peaks = [estimate.memory.peak.at.replace("reduction of gradients", "reduction") for estimate in stages.values()]
    verdicts = ["fits" if estimate.fits else "too large" for estimate in stages.values()]
    lines += [
        f"{f'all, + {planner.machine.reserved_gib:g} reserved':<24}" + "".join(f"{total:>11.2f} " for total in totals),
        f"{f'of {usable:.1f} usable':<24}" + "".join(f"{verdict:>11} " for verdict in verdicts),
        f"{'host memory of a node':<24}" + "".join(f"{host:>11.1f} " for host in hosts),
        f"{'the peak is in the':<24}" + "".join(f"{peak.split()[0]:>11} " for peak in peaks),
    ]
    return lines


def _grids(planner: Planner) -> list[str]:
    largest = planner.largest_that_fits()
    if largest is None:
        first = "No legal micro-batch fits: more GPUs, a higher ZeRO stage, activation checkpointing or offloading help"
    else:
        first = f"Largest micro-batch that fits: {largest}"
    lines = [
        f"{first}. Legal grids on {planner.world_size:,} GPUs:",
        f"{'micro-batch x accumulation':>28}{'pool over':>12}{'GiB':>10}{'':>12}{'tokens/s':>14}{'MFU':>8}",
    ]
    for grid in planner.grids():
        layout = grid.layout
        pool = f"{layout.pool_ranks} ranks" if planner.settings.dispersion is not None else "-"
        lines.append(
            f"{f'{layout.micro_batch} x {layout.accumulation}':>28}{pool:>12}"
            f"{planner.device_bytes(grid.memory) / 2**30:>10.1f}{'' if grid.fits else 'too large':>12}"
            f"{grid.tokens_per_s:>14,.0f}{grid.mfu:>8.1%}"
        )
    return lines


def _step(planner: Planner) -> list[str]:
    chosen = planner.chosen
    time, sent, saved = chosen.time, chosen.traffic, chosen.checkpoint
    rows = [
        ("computation", time.compute, ""),
        ("dispersion term", time.term, ""),
        (
            "ZeRO's communication",
            time.zero,
            f"a rank sends {sent.zero / 1e9:.3g} GB: {sent.reduction / 1e9:.3g} of gradients, "
            f"{sent.parameters / 1e9:.3g} of parameters; {time.hidden:.3f} s are hidden",
        ),
        ("pool's communication", time.pool, f"a rank sends {sent.pool / 1e9:.3g} GB" if sent.pool else ""),
        ("update", time.update, ""),
        ("checkpoints", time.checkpoint, f"{saved.stall_s:.1f} s {steps_between_saves(chosen)}"),
    ]
    lines = ["One step, seconds:"]
    for name, seconds, note in rows:
        lines.append(f"  {name:<22}{seconds:>9.4f}{seconds / time.total:>8.1%}  {note}".rstrip())
    lines += [
        f"  {'all':<22}{time.total:>9.4f}  {chosen.tokens_per_s:,.0f} tokens/s, "
        f"{chosen.tokens_per_s / planner.world_size:,.0f} a GPU, MFU {chosen.mfu:.1%}",
        f"Run: {planner.settings.num_steps:,} steps, {cost(planner)} (without validation, evaluation, failures and "
        "waiting)",
        f"Checkpoint: {saved.num_bytes / 1e9:,.4g} GB, training waits {saved.stall_s:.1f} s, written in "
        f"{saved.write_s:.0f} s {'beside it' if planner.settings.checkpoint.background else 'of these'}",
    ]
    return lines


def _scaling(planner: Planner) -> list[str]:
    lines = [
        "Scaling, the same global batch:",
        f"{'GPUs':>7}{'grid':>9}{'GiB':>8}{'step s':>10}{'tokens/s':>14}{'MFU':>8}{'ZeRO':>8}{'pool':>8}{'days':>9}"
        f"{'GPU-hours':>12}",
    ]
    for gpus, row in planner.scaling():
        mark = "*" if gpus == planner.world_size else " "
        lines.append(f"{gpus:>6,}{mark}" + (f"  {row}" if isinstance(row, str) else _scaling_row(planner, row)))
    return lines


def _scaling_row(planner: Planner, row: Estimate) -> str:
    layout, time = row.layout, row.time
    return (
        f"{f'{layout.micro_batch}x{layout.accumulation}':>9}{planner.device_bytes(row.memory) / 2**30:>8.1f}"
        f"{time.total:>10.3f}{row.tokens_per_s:>14,.0f}{row.mfu:>8.1%}{time.zero / time.total:>8.1%}"
        f"{time.pool / time.total:>8.1%}{row.days:>9.3g}{row.gpu_hours:>12,.0f}{'' if row.fits else '  too large'}"
    )
