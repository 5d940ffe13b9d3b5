"""Who is where, in plain words, from the heartbeats of all ranks."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType

from dispersion_pretrain.heartbeat import Beat

_PACKAGE = Path(__file__).resolve().parent


def describe(beats: dict[int, Beat], world_size: int, *, unseen_s: dict[int, float], gone: set[int]) -> list[str]:
    """Lines that name the ranks that keep the others waiting, then those that wait.

    Args:
        beats: by rank.
        unseen_s: seconds since the last sign of ranks that give none any more.
        gone: ranks whose process has ended without a word.
    """
    silent = {rank for rank in range(world_size) if rank not in beats}
    lines = []
    if silent:
        lines.append(f"{_ranks(silent)}: no heartbeat at all; not started, or its machine cannot write the run folder")
    suspects = set(gone) | set(unseen_s)
    for rank in sorted(suspects & set(beats)):
        beat = beats[rank]
        if rank in gone:
            what = "is gone: its process was killed or died without a word"
        else:
            what = (
                f"has not been seen for {unseen_s[rank]:.0f} s: it is stopped, stuck in code that holds the "
                "interpreter, or its machine is gone"
            )
        lines.append(f"rank {rank} {what}; its last heartbeat was {_where(beat)} ({_process(beat)})")
    living = {}
    for rank, beat in beats.items():
        if beat.exit_code not in (None, 86):  # 86: it has reported already and stands where it stood
            lines.append(f"rank {rank} has ended with code {beat.exit_code}: {beat.reason}")
        elif rank not in suspects:
            living[rank] = beat
    if living:
        lines += _living(living, others_are_missing=bool(suspects or silent))
    return lines


def _living(beats: dict[int, Beat], *, others_are_missing: bool) -> list[str]:
    """Lines about ranks whose process runs: those behind, each; those at the furthest mark, together."""
    furthest = max(beats.values(), key=lambda beat: beat.position)
    behind = [beat for beat in beats.values() if beat.position < furthest.position]
    lines = [
        f"rank {beat.rank} never entered {_goal(beat, furthest)}: it is {_where(beat)} for {beat.standing_s:.0f} s, "
        f"at {beat.place} ({_process(beat)})"
        for beat in behind
    ]
    together = [beat for beat in beats.values() if beat.position == furthest.position]
    waiting = [beat for beat in together if beat.in_collective]
    busy = [beat for beat in together if not beat.in_collective]
    if behind or others_are_missing or not waiting or not busy:  # nobody else to blame among those at one mark
        verb = "waits" if len(together) == 1 else "wait"
        lines.append(f"{_ranks(beat.rank for beat in together)} {verb}, {_where(furthest)}, at {furthest.place}")
        return lines
    lines += [
        f"rank {beat.rank} is in no collective: it is {_where(beat)} for {beat.standing_s:.0f} s, at {beat.place} "
        f"({_process(beat)})"
        for beat in busy
    ]
    verb = "waits" if len(waiting) == 1 else "wait"
    lines.append(
        f"{_ranks(beat.rank for beat in waiting)} {verb} in a collective, {_where(furthest)}, at {waiting[0].place}"
    )
    return lines


def _goal(beat: Beat, furthest: Beat) -> str:
    of_step = f" of step {furthest.step}" if beat.step != furthest.step else f" at step {furthest.step}"
    return f"{furthest.phase}{of_step}"


def _where(beat: Beat) -> str:
    if beat.step < 0:
        return f"in: {beat.phase}"
    return f"in: {beat.phase}, step {beat.step}, micro-step {beat.micro_step}"


def _process(beat: Beat) -> str:
    return f"host {beat.host}, process {beat.pid}"


def _ranks(ranks: Iterable[int]) -> str:
    """E.g. "ranks 0, 2-5"."""
    ordered = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"rank{'s' * (len(ordered) > 1)} {text}"


def main_thread_place() -> tuple[str, bool]:
    """Where the main thread is, as "file.py:line in function", and whether it is within a collective.

    The innermost frame outside libraries is named, with the collective that it calls.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    own = next((frame for frame in frames if _is_own(frame)), frames[0] if frames else None)
    if own is None:
        return "an unknown place", False
    collective = _collective(frames)
    place = f"{Path(own.f_code.co_filename).name}:{own.f_lineno} in {own.f_code.co_name}"
    return (f"{place} ({collective})" if collective else place), bool(collective)


def _is_own(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    return "site-packages" not in path.parts and (_PACKAGE in path.parents or not path.is_relative_to(sys.base_prefix))


def _collective(frames: Sequence[FrameType]) -> str:
    """Name of the collective that the innermost frames are in, as its caller calls it; empty if they are elsewhere."""
    name = ""
    for frame in frames:
        path = frame.f_code.co_filename
        if path.endswith("torch/distributed/distributed_c10d.py"):
            name = frame.f_code.co_name
        elif not name and "/deepspeed/" in path and frame.f_code.co_name == "wait":
            name = "waiting for an asynchronous collective"
        elif _is_own(frame):
            break
    return name
