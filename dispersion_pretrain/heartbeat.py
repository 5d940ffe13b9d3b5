"""Where a rank is: marks that the loop sets in memory, and the file in which the watchdog makes them public.

Anything may mark, wherever it stands in the order of imports: a mark takes no lock and makes no system call. All ranks
pass the same marks in the same order within a step, so their number tells who is behind.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = "heartbeats"  # of a run folder
LONG = 4.0  # patience with a phase that may rightly take long: starting, loading, saving


class Now:
    """This process's marks. The watchdog's thread reads them while they change, which does no harm."""

    __slots__ = ("marks", "marks_before_step", "micro_step", "observer", "patience", "phase", "step")

    def __init__(self) -> None:
        self.phase = "starting"
        self.patience = LONG  # the phase may take so many times faults.hang_s
        self.step = -1  # 0-based; -1 before the first
        self.micro_step = 0
        self.marks = 0
        self.marks_before_step = 0
        self.observer: Callable[[str], None] | None = None  # is told of each mark (profiling.py)


now = Now()


def mark(phase: str, patience: float = 1.0) -> None:
    """Say what begins now; `patience` times faults.hang_s without a further mark is a hang."""
    now.phase, now.patience = phase, patience
    now.marks += 1
    if now.observer is not None:
        now.observer(phase)


def begin_step(step: int) -> None:
    """Say that the 0-based optimizer step begins."""
    now.step, now.micro_step, now.marks_before_step = step, 0, now.marks


@contextmanager
def inside(phase: str) -> Iterator[None]:
    """Mark a part of the current phase, to which it returns."""
    outer, patience = now.phase, now.patience
    mark(phase, patience)
    yield
    mark(outer, patience)


@dataclass(frozen=True)
class Beat:
    """One rank's file: what it was doing when its watchdog last looked."""

    rank: int
    host: str
    machine: str  # equal where a process id means the same process
    pid: int
    process_start: int  # tells a process from a later one with its id; 0 where it cannot be known
    number: int  # beats so far: it grows while the process runs, whatever the clocks do
    step: int
    micro_step: int
    marks: int  # within the step
    phase: str
    standing_s: float  # since the last mark
    place: str  # of the main thread in the source
    in_collective: bool  # its stack is in torch.distributed
    pace_steps: int  # steps since the beat before
    time: float  # wall clock, for readers; nothing is decided by it
    exit_code: int | None = None  # None while it runs, and for ever if it was killed
    reason: str = ""  # why it ended

    @property
    def position(self) -> tuple[int, int, int]:
        """Grows on the way through a step; equal on ranks that stand at the same mark."""
        return self.step, self.micro_step, self.marks


def beat_file(folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat lies in the folder of heartbeats."""
    return folder / f"rank_{rank:05d}.json"


def write_beat(folder: Path, beat: Beat) -> None:
    """Replace the rank's file, whole or not at all. Raises OSError."""
    target = beat_file(folder, beat.rank)
    passing = target.with_suffix(".tmp")
    passing.write_text(json.dumps(dataclasses.asdict(beat)) + "\n", encoding="utf-8")
    passing.replace(target)


def read_beat(folder: Path, rank: int) -> Beat | None:
    """A rank's last heartbeat; None where there is none that can be read."""
    try:
        fields: dict[str, Any] = json.loads(beat_file(folder, rank).read_text(encoding="utf-8"))
        return Beat(**fields)
    except (OSError, ValueError, TypeError):
        return None


def read_beats(folder: Path) -> dict[int, Beat]:
    """The last heartbeats of all ranks that left one, by rank."""
    ranks = sorted(int(path.stem.removeprefix("rank_")) for path in folder.glob("rank_*.json"))
    return {beat.rank: beat for beat in (read_beat(folder, rank) for rank in ranks) if beat is not None}


def is_gone(beat: Beat, machine: str) -> bool:
    """Whether the process that wrote it has ended, as far as this machine can know; False for one elsewhere."""
    return beat.machine == machine and beat.process_start > 0 and process_start(beat.pid) != beat.process_start


def process_start(pid: int) -> int:
    """When a process began, in clock ticks since the machine's start; 0 if it is gone or a zombie, or on no Linux."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def own_machine() -> str:
    """A name of the set of processes among which a process id is unique: the kernel's boot and its namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{os.uname().nodename}, whose processes cannot be looked at"
