"""Where runs stand: read from their folders' last lines and heartbeats, and from Slurm's queue.

Little is read of a run, whatever its size: the end of metrics.jsonl, one heartbeat of a run that is alive, all of them
of one that is not, and the queue once for all runs.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from dispersion_pretrain import crash_loop, exit_codes, heartbeat, slurm, submission
from dispersion_pretrain.metrics import METRICS_FILE, STARTS_FILE, format_duration, last_training_record

_FRESH_S, _FRESH_S_PER_RANK = 60.0, 0.2  # beats come every few seconds, of many ranks more seldom
_OF_EXIT_CODE = {exit_codes.DONE: "ended", exit_codes.REQUEUE: "stopped", exit_codes.HANG: "hung"}


@dataclass(frozen=True)
class RunState:
    """One line of the list. None: not known, or not yet."""

    folder: str
    name: str
    # queued, requeued, starting, running; ended (last step), stopped (saved), hung, crashed; new (never started)
    state: str
    step: int | None
    num_steps: int | None
    tokens: int | None
    max_tokens: int | None
    loss: float | None
    tokens_per_s: float | None
    eta_s: float | None  # of a run that is running
    job: str | None  # of Slurm's, the last
    note: str  # why it waits, or how it ended


def list_runs(folders: Sequence[Path]) -> list[RunState]:
    """The state of every run that is one of `folders` or lies in one.

    Raises:
        ValueError: one of them is not there.
    """
    runs: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: no such folder. A run folder, or a folder of run folders, is needed. Correct the path."
            )
        runs.update(dict.fromkeys(_find(folder, depth=2)))
    records = {run: submission.read_records(run) for run in runs}
    queue = slurm.queue([record["job"] for found in records.values() for record in found])
    return [_state(run, records[run], queue or {}) for run in runs]


def _find(folder: Path, depth: int) -> list[Path]:
    if any((folder / name).exists() for name in (STARTS_FILE, METRICS_FILE, "slurm")):
        return [folder]
    if depth == 0:
        return []
    with os.scandir(folder) as entries:
        below = sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return [run for each in below for run in _find(each, depth - 1)]


def _state(run: Path, records: list[dict[str, Any]], queue: Mapping[str, slurm.QueueEntry]) -> RunState:
    settings = _settings(run)
    last = last_training_record(run)
    jobs = [record["job"] for record in records]
    job = next((job for job in reversed(jobs) if job in queue), jobs[-1] if jobs else None)
    state, note = _state_and_note(run, queue.get(job or ""), was_submitted=bool(jobs))
    training = settings.get("training") or {}
    batch, max_tokens = training.get("global_batch_tokens"), training.get("max_tokens")
    num_steps = -(-max_tokens // batch) if batch and max_tokens else None
    speed, tokens = last.get("tokens_per_s"), last.get("tokens")
    eta_s = None
    if state == "running" and speed and max_tokens is not None and tokens is not None:
        eta_s = max(max_tokens - tokens, 0) / speed
    name = (settings.get("run") or {}).get("name") or run.name
    return RunState(
        str(run), name, state, last.get("step"), num_steps, tokens, max_tokens, last.get("loss/total"), speed, eta_s,
        job, note,
    )  # fmt: skip


def _state_and_note(run: Path, entry: slurm.QueueEntry | None, *, was_submitted: bool) -> tuple[str, str]:
    folder = run / heartbeat.FOLDER
    if entry is not None and entry.state == "PENDING":
        return ("requeued" if entry.restarts else "queued"), entry.reason
    first = heartbeat.read_beat(folder, 0)
    ranks = len(list(folder.glob("rank_*.json"))) if first is not None else 0
    if first is not None and _is_alive(first, ranks):
        return "running", first.phase
    if entry is not None and entry.state != "COMPLETING":  # which ends, to be requeued or not: its ranks tell
        return "starting", entry.state.lower()
    beats = heartbeat.read_beats(folder)
    if beats:
        end = crash_loop.conclude(beats, 0, "")
    else:  # an earlier start's, which the next one wrote down before it came to train
        ends = crash_loop.read_ends(run / crash_loop.ENDS_FILE)
        if not ends:
            return ("crashed", "ended before it trained: see its log") if was_submitted else ("new", "")
        end = ends[-1]
    if end.exit_code is not None and end.exit_code > exit_codes.KILLED:
        return "stopped", end.reason
    state = "crashed" if end.exit_code is None else _OF_EXIT_CODE.get(end.exit_code, "crashed")
    return state, end.reason


def _is_alive(beat: heartbeat.Beat, ranks: int) -> bool:
    if beat.exit_code is not None or heartbeat.is_gone(beat, heartbeat.own_machine()):
        return False
    return time.time() - beat.time < _FRESH_S + _FRESH_S_PER_RANK * ranks


def _settings(run: Path) -> dict[str, Any]:
    """Resolved settings of the last start, or else of the last submission."""
    for path in [run / "config.yaml", *sorted((run / "slurm").glob("*/config.yaml"), reverse=True)]:
        try:
            tree = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except (OSError, ValueError, yaml.YAMLError):
            continue
        if isinstance(tree, dict):
            return tree
    return {}


def as_json(runs: Sequence[RunState]) -> str:
    """All fields, a list of objects."""
    return json.dumps([asdict(run) for run in runs], indent=1)


def as_table(runs: Sequence[RunState]) -> str:
    """One line a run under one line of headings."""
    rows = [("run", "state", "step", "tokens", "loss", "tokens/s", "ETA", "job", "note")]
    for run in runs:
        step = "-" if run.step is None else f"{run.step:,}"
        rows.append(
            (
                run.name,
                run.state,
                step if run.num_steps is None else f"{step}/{run.num_steps:,}",
                "-" if run.tokens is None else f"{run.tokens:.3g}" if run.tokens >= 10**9 else f"{run.tokens:,}",
                "-" if run.loss is None else f"{run.loss:.4f}",
                "-" if run.tokens_per_s is None else f"{run.tokens_per_s:,.0f}",
                format_duration(math.nan if run.eta_s is None else run.eta_s),
                run.job or "-",
                run.note.splitlines()[0][:80] if run.note else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
