"""The main job, with a witness and an executioner, both controlled by the environment and both outside of it.

CHAOS_FOLDER (required) gets, by rank: `samples_N.jsonl`, a line a step with the samples of its batches, written when
the update is done; `points_N.jsonl`, a line a save with the writes that it made. A write is opening a file for writing,
a new folder, a rename, a removal or a flush to disk, below a folder of checkpoints.

CHAOS_KILL="STEP RANK POINT WHO" kills just before write POINT (counted from 0) of that rank's save of STEP: WHO is
`rank`, that process alone, or `job`, its whole process group, launcher included.
CHAOS_CLOCK="SECONDS" lets time.time jump by so much, to and fro, from one step to the next.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dispersion_pretrain import saving, train
from dispersion_pretrain.data import Batch

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}


class Witness:
    """Writes down which samples each update was made of."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._started_s = float(os.environ["CHAOS_STARTED"])  # of the monotonic clock, which processes share

    def watch(self) -> None:
        """Put itself around the train step."""
        inner = train.train_step

        def train_step(engine: Any, batches: Iterator[Batch], context: Any, *rest: Any) -> Any:
            seen: list[int] = []

            def passing() -> Iterator[Batch]:
                for batch in batches:
                    seen.extend(batch.sample_index.tolist())
                    yield batch

            health = inner(engine, passing(), context, *rest)
            after_s = time.monotonic() - self._started_s
            append(self._file, step=context.step + 1, samples=seen, start=self._started_s, after_s=after_s)
            return health

        train.train_step = train_step  # type: ignore[assignment]


class Executioner:
    """Counts the writes of each save, and kills before one of them."""

    def __init__(self, file: Path, rank: int) -> None:
        self._file, self._rank = file, rank
        step, victim, point, self._who = os.environ.get("CHAOS_KILL", "-1 -1 -1 nobody").split()
        self._sentence = (int(step), int(victim), int(point))
        self._save: tuple[int, str] | None = None
        self._writes: list[str] = []

    def watch(self) -> None:
        """Listen to what Python asks the system for; the kernel's own writing of a file counts as its opening."""
        begin, end, fsync = saving.Saves.begin, saving.Saves._end, os.fsync

        def watched_begin(saves: Any, tier: Any, step: int) -> None:
            begin(saves, tier, step)
            self._save, self._writes = (step, "shared" if tier.node is None else "local"), []

        def watched_end(saves: Any, save: Any, error: str | None) -> None:
            end(saves, save, error)
            if self._save is not None:
                append(self._file, step=self._save[0], tier=self._save[1], writes=self._writes)
            self._save = None

        def watched_fsync(descriptor: int) -> None:
            self._at("flush", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        saving.Saves.begin = watched_begin  # type: ignore[assignment, method-assign]
        saving.Saves._end = watched_end  # type: ignore[assignment, method-assign]
        os.fsync = watched_fsync  # type: ignore[assignment]
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._save is None:
            return
        if event in CHANGES:
            relative = isinstance(arguments[-1], int) and arguments[-1] >= 0  # to a folder's descriptor
            folder = os.readlink(f"/proc/self/fd/{arguments[-1]}") if relative else ""
            self._at(event.removeprefix("os."), os.path.join(folder, os.fsdecode(arguments[0])))
        elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._at("open", str(arguments[0]))

    def _at(self, what: str, path: str) -> None:
        is_folder = what == "flush" and os.path.isdir(path)  # the run folder's own entry is flushed as well
        if self._save is None or not (is_folder or "/checkpoints/" in path + "/"):
            return
        if self._sentence == (self._save[0], self._rank, len(self._writes)):
            victim = os.getpgrp() if self._who == "job" else 0
            (os.killpg if victim else os.kill)(victim or os.getpid(), signal.SIGKILL)
            signal.pause()  # the signal to a group may come a moment later
        self._writes.append(f"{what} {path.rpartition('/checkpoints/')[2]}")


def append(file: Path, **record: Any) -> None:
    """Add a line in one system call, so that a kill leaves all of it or nothing."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, json.dumps(record).encode() + b"\n")
    os.close(descriptor)


def shake_the_clock(seconds: float) -> None:
    """Let the wall clock jump ahead and back, a step at a time."""
    inner, real = train.train_step, time.time
    steps = 0

    def train_step(*arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        return inner(*arguments)

    train.train_step = train_step  # type: ignore[assignment]
    time.time = lambda: real() + seconds * ((steps % 3) - 1)


if __name__ == "__main__":
    folder, rank = Path(os.environ["CHAOS_FOLDER"]), int(os.environ.get("RANK", "0"))
    Witness(folder / f"samples_{rank}.jsonl").watch()
    Executioner(folder / f"points_{rank}.jsonl", rank).watch()
    if "CHAOS_CLOCK" in os.environ:
        shake_the_clock(float(os.environ["CHAOS_CLOCK"]))
    runpy.run_path(str(PRETRAIN), run_name="__main__")
