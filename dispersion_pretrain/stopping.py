"""Stopping early with the state saved: by a signal, because run.max_time is nearly over, or without a launcher."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from dispersion_pretrain import exit_codes

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is Slurm's warning
_STEPS_IN_MARGIN = 3  # until all ranks have agreed, the last step is logged and the save begins
_LARGEST_MARGIN = 0.25  # of run.max_time: one slow save must not keep all later starts from training
# Until a save was measured: bytes that a parameter takes in a checkpoint (float32 master and moments, working weights)
# over a rate that a slow shared disk has.
_BYTES_PER_PARAMETER = 16
_SLOW_DISK_BYTES_PER_S = 200e6


class Stopping:
    """Whether this rank wishes to stop; the loop asks between steps and lets all ranks agree.

    SIGTERM, SIGINT and SIGUSR1 are noted. The same signal a second time ends the process at once, without a save.
    Another kind does not: a cancelled Slurm job gets two.
    """

    def __init__(
        self,
        max_time: str | None = None,
        *,
        leave_at_once: Callable[[int, str], None] | None = None,
        age_s: Callable[[], float] | None = None,
        is_orphan: Callable[[], bool] = lambda: False,
    ) -> None:
        """Take over the signals; to be called on the main thread.

        Args:
            max_time: as run.max_time; counted from the start of the process.
            leave_at_once: called from another thread with an exit code and a reason, when a signal came twice.
            age_s: seconds since the process began; by default those that pass while it is suspended count too.
            is_orphan: whether the launcher has ended, so that nobody could stop this process.
        """
        self.reason = "a signal to another rank, its time limit, or the end of its launcher"
        self._signal_noted = False
        self._limit_s = None if max_time is None else seconds_of(max_time)
        self._age_s, self._is_orphan = age_s or process_age_s, is_orphan
        self._leave_at_once = leave_at_once or _leave
        self._save_s, self._has_saved = 0.0, False
        self._step_s = 0.0
        self._asked_s: float | None = None
        # The interpreter would call a handler only after the collective in which the main thread may wait for ever. It
        # writes the number into a pipe at once.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=self._listen, args=(reader,), name="signals", daemon=True).start()

    def _listen(self, reader: int) -> None:
        seen = set()
        while content := os.read(reader, 1):
            number = content[0]
            if number not in SIGNALS:
                continue
            name = signal.Signals(number).name
            if number in seen:
                self._leave_at_once(exit_codes.KILLED + number, f"{name} came twice")
            seen.add(number)
            self.reason, self._signal_noted = name, True

    def expect_save(self, parameters: int, ranks: int) -> None:
        """Guess from the number of parameters how long a save takes, until `saved` knows better."""
        per_rank_bytes = _BYTES_PER_PARAMETER * parameters / ranks
        self._save_s = 5.0 + per_rank_bytes / _SLOW_DISK_BYTES_PER_S

    def saved(self, seconds: float) -> None:
        """Take note of how long a save took, from its begin until it was committed; its time is no step's."""
        self._save_s = max(self._save_s, seconds) if self._has_saved else seconds
        self._has_saved, self._asked_s = True, None

    def requested(self) -> bool:
        """Whether this rank wants to stop after this step. To be asked once a step; no collective."""
        age_s = self._age_s()
        if self._asked_s is not None:
            self._step_s = max(self._step_s, age_s - self._asked_s)
        self._asked_s = age_s
        if not self._signal_noted and self._limit_s is not None and age_s >= self._limit_s - self._margin_s():
            self.reason = (
                f"run.max_time: {age_s:.0f} s of {self._limit_s} are over, and a save takes up to {self._save_s:.0f}"
            )
            return True
        if not self._signal_noted and self._is_orphan():
            self.reason = "the end of its launcher"
            return True
        return self._signal_noted

    def _margin_s(self) -> float:
        assert self._limit_s is not None
        return min(self._save_s + _STEPS_IN_MARGIN * self._step_s, _LARGEST_MARGIN * self._limit_s)


def seconds_of(max_time: str) -> int:
    """[days-]hours:minutes:seconds as seconds."""
    days, _, clock = max_time.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def process_age_s() -> float:
    """Seconds since this process began, by a clock that no setting of the time changes."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):  # no Linux
        return time.monotonic() - _IMPORTED_S


_IMPORTED_S = time.monotonic()


def _leave(exit_code: int, _: str) -> None:
    os._exit(exit_code)
