"""How far the preparation is: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_INTERVAL_S = 5.0


class TokenProgress:
    """Shows documents, tokens and tokens per second; writes to standard error.

    `total_documents` is None where the number is not known beforehand.
    """

    def __init__(self, total_documents: int | None) -> None:
        self._documents = 0
        self._tokens = 0
        self._total = total_documents
        self._start_s = self._last_line_s = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("tokenizing"),
                BarColumn(),
                TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("tokenizing", total=total_documents, state="")

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

    def add(self, documents: int, tokens: int) -> None:
        """Count documents and tokens that are done."""
        self._documents += documents
        self._tokens += tokens
        if self._bar:
            self._bar.update(self._task, completed=self._documents, state=self._state())
        elif time.monotonic() - self._last_line_s > LINE_INTERVAL_S:
            self._last_line_s = time.monotonic()
            self._print_line()

    def _state(self) -> str:
        of_total = f" of {self._total:,}" if self._total is not None else ""
        tokens_per_s = self._tokens / max(time.monotonic() - self._start_s, 1e-9)
        return f"{self._documents:,}{of_total} documents, {self._tokens:,} tokens, {tokens_per_s:,.0f} tokens/s"

    def _print_line(self) -> None:
        print(f"tokenizing: {self._state()}", file=sys.stderr, flush=True)
