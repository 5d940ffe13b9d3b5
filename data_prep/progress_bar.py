"""How far the preparation is: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import datetime
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_INTERVAL_S = 5.0


class TokenProgress:
    """Shows documents, tokens, tokens per second and the time left; writes to standard error.

    `total_units` is the size of the source in what it counts, None where that is not known. The other numbers are what
    an earlier process did: speed is that of this one.
    """

    def __init__(self, total_units: int | None, units: int = 0, documents: int = 0, tokens: int = 0) -> None:
        self._total = total_units
        self._units = self._first_units = units
        self._documents = documents
        self._tokens = self._first_tokens = tokens
        self._start_s = self._last_line_s = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("tokenizing"), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("tokenizing", total=total_units, completed=units, state="")

    def __enter__(self) -> TokenProgress:
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

    def show(self, units: int, documents: int, tokens: int) -> None:
        """Show how much is done, all processes together."""
        self._units, self._documents, self._tokens = units, documents, tokens
        if self._bar:
            self._bar.update(self._task, completed=units, state=self._state())
        elif time.monotonic() - self._last_line_s > LINE_INTERVAL_S:
            self._last_line_s = time.monotonic()
            self._print_line()

    def _state(self) -> str:
        elapsed_s = max(time.monotonic() - self._start_s, 1e-9)
        tokens_per_s = (self._tokens - self._first_tokens) / elapsed_s
        parts = [f"{self._documents:,} documents, {self._tokens:,} tokens, {tokens_per_s:,.0f} tokens/s"]
        if self._total:
            parts.insert(0, f"{percent(self._units, self._total)} %")
            units_per_s = (self._units - self._first_units) / elapsed_s
            if units_per_s > 0 and self._units < self._total:
                left_s = round((self._total - self._units) / units_per_s)
                parts.append(f"{datetime.timedelta(seconds=left_s)} left")
        return ", ".join(parts)

    def _print_line(self) -> None:
        print(f"tokenizing: {self._state()}", file=sys.stderr, flush=True)


def percent(units: int, total: int) -> int:
    """Return how much of the total is done; 100 only at the end."""
    return 100 * units // total
