"""What an unfinished job remembers on disk, so that a kill at any moment loses seconds of work, not the job."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prep_errors import InputError

_ROWS_AT_ONCE = 500  # SQLite before 3.32 takes at most 999 variables in a statement
_CACHE_KIB = 64 * 2**10  # of the hashes seen; the rest stays on disk, so memory does not grow with the corpus

_TABLES = """
CREATE TABLE IF NOT EXISTS job (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (
    stream TEXT NOT NULL, number INTEGER NOT NULL, entry TEXT NOT NULL, PRIMARY KEY (stream, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (hash BLOB PRIMARY KEY) WITHOUT ROWID;
"""


class JobState:
    """One SQLite file; what is put there counts from the next `commit` on, all of it or nothing.

    Raises:
        InputError: the file is no state of a job, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Full synchronisation and a rollback journal, SQLite's defaults: a commit survives a power cut, on any disk.
        self._database = sqlite3.connect(path, isolation_level=None)
        try:
            self._database.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
            self._database.executescript(_TABLES)
            self._database.execute("BEGIN")
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise InputError(
                f"{path}: the state of an unfinished job there is damaged ({error}). --overwrite starts it anew."
            ) from error

    def close(self) -> None:
        """Forget what was not committed."""
        self._database.close()

    def commit(self) -> None:
        """Make everything since the last commit last, even through a power cut.

        Raises:
            OSError: the disk is full, or fails; as do all methods below.
        """
        self._run("COMMIT")
        self._run("BEGIN")

    def _run(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        try:
            return self._database.execute(statement, values)
        except sqlite3.Error as error:
            raise OSError(f"{self._path}: {error}. When the disk does again, the same command goes on.") from error

    def get(self, key: str) -> Any:
        """Return a JSON value; None if there is none."""
        row = self._run("SELECT value FROM job WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value."""
        self._run("INSERT OR REPLACE INTO job VALUES (?, ?)", (key, json.dumps(value)))

    def add_shard(self, stream: str, number: int, entry: dict[str, Any]) -> None:
        """Keep what the index will say of a shard that is whole."""
        self._run("INSERT INTO shards VALUES (?, ?, ?)", (stream, number, json.dumps(entry)))

    def shards(self, stream: str) -> list[dict[str, Any]]:
        """Return the index entries of a stream's shards in their order."""
        rows = self._run("SELECT entry FROM shards WHERE stream = ? ORDER BY number", (stream,))
        return [json.loads(entry) for (entry,) in rows]

    def are_new(self, hashes: Sequence[bytes]) -> list[bool]:
        """Tell of each hash whether it comes for the first time, and remember it."""
        known: set[bytes] = set()
        for start in range(0, len(hashes), _ROWS_AT_ONCE):
            some = hashes[start : start + _ROWS_AT_ONCE]
            known.update(row[0] for row in self._run(f"SELECT hash FROM seen WHERE hash IN ({_places(some)})", some))
        news, added = [], []
        for digest in hashes:
            news.append(digest not in known)
            if news[-1]:
                known.add(digest)
                added.append(digest)
        added.sort()  # neighbours on disk are written together
        for start in range(0, len(added), _ROWS_AT_ONCE):
            some = added[start : start + _ROWS_AT_ONCE]
            self._run(f"INSERT INTO seen VALUES {_places(some, '(?)')}", some)
        return news


def _places(values: Sequence[bytes], place: str = "?") -> str:
    return ",".join([place] * len(values))
