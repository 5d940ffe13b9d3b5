"""What a source hands out: portions of documents, always cut alike, small enough for memory.

The main process walks over portions without reading their text; a worker process calls `read`. So a source that is
asked again, by any number of workers, or from the middle after a kill, gives the same documents in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Position = dict[str, Any]  # JSON: where a source goes on

PORTION_BYTES = 2**20  # of text, about: enough work to send to another process, little memory


@dataclass(frozen=True)
class Portion:
    """Consecutive documents of a source.

    `read` is called in a worker process, so it must be picklable (a partial of a function of a module); it yields every
    document that is not blank and raises InputError naming file and line. `after` is the position behind the last
    document. `units` is how much of `Source.units` the portion is. `split` is None where the document's hash decides.
    """

    read: Callable[[], Iterator[str]]
    after: Position
    units: int
    split: Literal["train", "validation"] | None = None


class Source(Protocol):
    """Documents in a fixed order."""

    def identity(self) -> dict[str, Any]:
        """Return what tells this source from another, as JSON: `name`, and what would change its documents."""
        ...

    @property
    def units(self) -> int | None:
        """Size of the whole in whatever the source counts (bytes, rows), for progress only; None: not known."""
        ...

    def portions(self, after: Position | None = None) -> Iterator[Portion]:
        """Yield all portions, or those behind a position; the same ones at each call."""
        ...
