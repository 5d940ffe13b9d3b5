"""Where a corpus goes: a folder of this machine, which appears when it is whole, or an object store."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from corpus_manifest import with_checksum
from job_arguments import differences
from packing import flush_to_disk
from places import is_remote
from prep_errors import InputError

if TYPE_CHECKING:
    from uploads import ObjectStore

Corpora = dict[str, dict[str, Any]]  # folder below the output ("" for itself) -> corpus.json, or what is wanted of it

MANIFEST = "corpus.json"
_UNFINISHED_MANIFEST = "corpus.tmp"
_WORK_NAMES = {"files", "hub", "state.sqlite", "state.sqlite-journal"}


class Destination(Protocol):
    """`files` is the local folder in which corpora are built, `state` the file with their progress."""

    files: Path
    state: Path
    lock: Path
    keeps_shards: bool  # whether a shard stays in `files` after it is whole

    def find(self, wanted: Corpora, overwrite: bool) -> Corpora | None:
        """Return what is whole there and made by the same recipes; None if it must be made.

        Raises:
            InputError: something else is there, and replacing it is not allowed.
        """
        ...

    def shard_is_whole(self, path: Path) -> None:
        """Take note of a shard that the state knows and that changes no more."""
        ...

    def publish(self, corpora: Corpora) -> None:
        """Bring everything to its place, the manifests last."""
        ...

    def discard(self) -> None:
        """Forget the unfinished job."""
        ...

    def close(self) -> None:
        """Begin nothing more."""
        ...


def destination(out: str, work: Path | None) -> Destination:
    """Return the place that --out names."""
    return StoredCorpus(out.rstrip("/"), work) if is_remote(out) else LocalCorpus(Path(out).absolute())


class LocalCorpus:
    """A folder; built in `.NAME.partial` beside it and renamed, so that it does not exist or is whole."""

    keeps_shards = True

    def __init__(self, out: Path) -> None:
        self._out = out
        self._old = out.parent / f".{out.name}.old"
        self.files = out.parent / f".{out.name}.partial"
        self.state = out.parent / f".{out.name}.partial.sqlite"
        self.lock = out.parent / f".{out.name}.lock"

    def find(self, wanted: Corpora, overwrite: bool) -> Corpora | None:
        """See Destination; a whole corpus is one whose files have the sizes that its indexes say."""
        out = self._out
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
        if not (out / MANIFEST).is_file() and not any(out.glob(f"seq*/{MANIFEST}")):
            raise InputError(f"--out {out}: exists and is no corpus (no corpus.json). Give another folder or move it.")
        if overwrite:
            return None
        found: Corpora = {}
        different: list[str] = []
        fault = None
        for name, recipe in wanted.items():
            manifest = out / name / MANIFEST
            if not manifest.is_file():
                different.append(f"{manifest.relative_to(out)} is missing")
                continue
            try:
                found[name] = json.loads(manifest.read_text(encoding="utf-8"))
                here = differences(recipe, found[name])
                fault = fault or (None if here else _fault(out / name, found[name]))
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{manifest}: damaged ({error}). --overwrite makes the corpus anew.") from error
            different += [difference for difference in here if difference not in different]
        if different:
            raise InputError(
                f"--out {out}: holds a corpus that was made otherwise ({'; '.join(different)}). "
                "Give another folder, or --overwrite to replace it."
            )
        if fault:
            raise InputError(f"--out {out}: the corpus there is damaged ({fault}). --overwrite makes it anew.")
        self.discard()  # what a kill just after the renaming left
        return found

    def shard_is_whole(self, path: Path) -> None:
        """Nothing is to be done: it lies where it belongs."""

    def publish(self, corpora: Corpora) -> None:
        """Write the manifests, then rename the folder: a kill leaves no half corpus."""
        for path in [*self.files.rglob("*"), self.files]:  # a manifest must not survive a power cut without the shards
            flush_to_disk(path)
        for name, corpus in corpora.items():
            write_manifest(self.files / name, corpus)
        shutil.rmtree(self._old, ignore_errors=True)
        if self._out.exists():
            self._out.rename(self._old)
        self.files.rename(self._out)
        flush_to_disk(self._out.parent)
        self.discard()

    def discard(self) -> None:
        """Remove state and folder of the unfinished job, and a corpus that was replaced."""
        _remove_state(self.state)
        for folder in (self.files, self._old):
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Nothing is open."""


class StoredCorpus:
    """A prefix of an object store; shards lie in a work folder only until they are uploaded."""

    keeps_shards = False

    def __init__(self, url: str, work: Path | None) -> None:
        self._url = url
        default = Path(".tokenize_to_mds", hashlib.sha256(url.encode()).hexdigest()[:12])
        self._work = (work or default).absolute()
        self.files = self._work / "files"
        self.state = self._work / "state.sqlite"
        self.lock = self._work.parent / f".{self._work.name}.lock"
        if self._work.exists() and (others := {path.name for path in self._work.iterdir()} - _WORK_NAMES):
            raise InputError(
                f"--work {self._work}: holds something else ({min(others)}). A new or empty folder is needed. Give one."
            )
        self._opened: ObjectStore | None = None

    @property
    def _store(self) -> ObjectStore:
        if self._opened is None:
            from uploads import ObjectStore  # here, as it imports torch

            self.files.mkdir(parents=True, exist_ok=True)
            self._opened = ObjectStore(self._url, self.files)
        return self._opened

    def find(self, wanted: Corpora, overwrite: bool) -> Corpora | None:
        """See Destination; nothing in a store is ever replaced, but for equal bytes."""
        found: Corpora = {}
        for name, recipe in wanted.items():
            place = f"{name}/{MANIFEST}" if name else MANIFEST
            content = self._store.read(place)
            if content is None:
                continue
            try:
                found[name] = json.loads(content)
                different = differences(recipe, found[name])
            except (ValueError, TypeError, AttributeError) as error:
                raise InputError(
                    f"{self._url}/{place}: damaged ({error}). Nothing in a store is replaced. "
                    "Give another prefix, or remove what is there."
                ) from error
            if different:
                raise InputError(
                    f"--out {self._url}: holds a corpus that was made otherwise ({'; '.join(different)}). Nothing in "
                    "a store is replaced. Give another prefix, or remove the corpus there."
                )
        if len(found) < len(wanted):
            return None
        if overwrite:
            raise InputError(
                f"--overwrite: a whole corpus is at {self._url}. Nothing in a store is replaced. "
                "Give another prefix, or remove the corpus there."
            )
        self.discard()
        return found

    def shard_is_whole(self, path: Path) -> None:
        """Begin to upload it."""
        self._store.upload(path, then_remove=True)

    def publish(self, corpora: Corpora) -> None:
        """Upload what is here yet, the manifests after everything else."""
        self._store.wait()  # what is on its way is not uploaded twice
        for path in sorted(path for path in self.files.rglob("*") if path.is_file()):
            if path.name not in (MANIFEST, _UNFINISHED_MANIFEST):
                self._store.upload(path, then_remove=path.suffix == ".mds")
        self._store.wait()
        for name, corpus in corpora.items():
            write_manifest(self.files / name, corpus)
            self._store.upload(self.files / name / MANIFEST, then_remove=False)
        self._store.wait()
        self.discard()

    def discard(self) -> None:
        """Remove the work folder."""
        self.close()
        _remove_state(self.state)
        shutil.rmtree(self._work, ignore_errors=True)

    def close(self) -> None:
        """Drop the uploads that have not begun: the process would make them before it ends."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def _remove_state(path: Path) -> None:
    # The journal second: SQLite plays it back into what database it finds, but not into a new one.
    for file in (path, path.with_name(f"{path.name}-journal")):
        file.unlink(missing_ok=True)


def _fault(folder: Path, corpus: dict[str, Any]) -> str | None:
    """Name the first file that is missing or has another size than its index says."""
    for split, entry in corpus["splits"].items():
        index = folder / split / "index.json"
        if not index.is_file() or hashlib.sha256(index.read_bytes()).hexdigest() != entry["index_sha256"]:
            return f"{split}/index.json is missing or was changed"
        for shard in json.loads(index.read_text(encoding="utf-8"))["shards"]:
            name, size = shard["raw_data"]["basename"], shard["raw_data"]["bytes"]
            path = folder / split / name
            if not path.is_file() or path.stat().st_size != size:
                return f"{split}/{name} is missing or has another size"
    for name in corpus["tokenizer"]["files"]:
        if not (folder / corpus["tokenizer"]["folder"] / name).is_file():
            return f"{corpus['tokenizer']['folder']}/{name} is missing"
    return None


def write_manifest(folder: Path, corpus: dict[str, Any]) -> None:
    """Write corpus.json so that it is there whole or not at all."""
    temporary = folder / _UNFINISHED_MANIFEST
    temporary.write_text(json.dumps(with_checksum(corpus), indent=1) + "\n", encoding="utf-8")
    flush_to_disk(temporary)
    os.replace(temporary, folder / MANIFEST)
    flush_to_disk(folder)
