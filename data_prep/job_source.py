"""The documents of one job: a source that hashes divide, or one for each split."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from portions import Portion, Position, Source


class SourcePair:
    """A source for each split as one.

    The validation documents come first: with duplicates removed, it is the training split that loses what is in both.
    """

    def __init__(self, train: Source, validation: Source) -> None:
        self._parts: list[tuple[Literal["train", "validation"], Source]] = [
            ("validation", validation),
            ("train", train),
        ]

    def identity(self) -> dict[str, Any]:
        """Return that of the train source, with the other's under `validation`."""
        train, validation = (source.identity() for _, source in reversed(self._parts))
        return train | {"validation": validation}

    @property
    def units(self) -> int | None:
        """Size of both, where both know it."""
        sizes = [source.units for _, source in self._parts]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def portions(self, after: Position | None = None) -> Iterator[Portion]:
        """Yield the portions of one source after those of the other, marked with their split."""
        parts = self._parts
        if after and after["split"] == "train":
            parts = parts[1:]
        for split, source in parts:
            inner = after["position"] if after and after["split"] == split else None
            for portion in source.portions(inner):
                position = {"split": split, "position": portion.after}
                yield dataclasses.replace(portion, split=split, after=position)
