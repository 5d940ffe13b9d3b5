"""How far a job is: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import datetime
import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_INTERVAL_S = 5.0


class JobProgress:
    """Shows how much of a total is done, the state of the work in words, and the time left; on standard error.

    `total` is None where it is not known. `completed` is what an earlier process did: the time left is by the speed of
    this one. Subclasses say the state.
    """

    def __init__(self, label: str, total: int | None, completed: int = 0) -> None:
        self._label = label
        self._total = total
        self._completed = self._first_completed = completed
        self._start_s = self._last_line_s = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn(label), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(label, total=total, completed=completed, state="")

    def __enter__(self) -> Self:
        """Start the bar."""
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last state on the screen."""
        if self._bar:
            self._bar.stop()
        elif error is None:
            self._print_line()

    def _work(self) -> str:
        """Say in words what is done."""
        raise NotImplementedError

    def _per_second(self, amount: float) -> float:
        return amount / max(time.monotonic() - self._start_s, 1e-9)

    def _update(self, completed: int) -> None:
        self._completed = completed
        if self._bar:
            self._bar.update(self._task, completed=completed, state=self._state())
        elif time.monotonic() - self._last_line_s > LINE_INTERVAL_S:
            self._last_line_s = time.monotonic()
            self._print_line()

    def _state(self) -> str:
        parts = [self._work()]
        if self._total:
            parts.insert(0, f"{percent(self._completed, self._total)} %")
            completed_per_s = self._per_second(self._completed - self._first_completed)
            if completed_per_s > 0 and self._completed < self._total:
                left_s = round((self._total - self._completed) / completed_per_s)
                parts.append(f"{datetime.timedelta(seconds=left_s)} left")
        return ", ".join(parts)

    def _print_line(self) -> None:
        print(f"{self._label}: {self._state()}", file=sys.stderr, flush=True)


class TokenProgress(JobProgress):
    """Documents, tokens and tokens per second of a data job.

    `total_units` is the size of the source in what it counts, None where that is not known. The other numbers are what
    an earlier process did: speed is that of this one.
    """

    def __init__(self, total_units: int | None, units: int = 0, documents: int = 0, tokens: int = 0) -> None:
        super().__init__("tokenizing", total_units, units)
        self._documents = documents
        self._tokens = self._first_tokens = tokens

    def show(self, units: int, documents: int, tokens: int) -> None:
        """Show how much is done, all processes together."""
        self._documents, self._tokens = documents, tokens
        self._update(units)

    def _work(self) -> str:
        tokens_per_s = self._per_second(self._tokens - self._first_tokens)
        return f"{self._documents:,} documents, {self._tokens:,} tokens, {tokens_per_s:,.0f} tokens/s"


class ShardProgress(JobProgress):
    """Shards and bytes that were checked."""

    def __init__(self, total_shards: int) -> None:
        super().__init__("checking", total_shards)
        self._shards = 0
        self._bytes = 0

    def add(self, size_bytes: int) -> None:
        """Count one more shard."""
        self._shards += 1
        self._bytes += size_bytes
        self._update(self._shards)

    def _work(self) -> str:
        speed = self._per_second(self._bytes) / 2**20
        return f"{self._shards:,} of {self._total:,} shards, {self._bytes / 2**20:,.0f} MiB, {speed:,.0f} MiB/s"


def percent(units: int, total: int) -> int:
    """Return how much of the total is done; 100 only at the end."""
    return min(100, 100 * units // total)
