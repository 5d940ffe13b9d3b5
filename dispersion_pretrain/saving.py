"""Saves of a run: written by a thread from a copy in host memory, and committed whole or not at all.

A save has three stages, each done in a thread of every rank: write this rank's files, commit the folder, remove what
is not to be kept. No collective runs in a thread. Between stages the ranks agree in `poll`, which the training loop
calls after every step, or in `finish`, which waits.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, cast

import torch

from dispersion_pretrain import checkpoint, distributed, retention
from dispersion_pretrain.checkpoint import Tier
from dispersion_pretrain.host_copy import HostCopy

_IN_TRANSIT = re.compile(r"\.(?:saving|removing)-step-\d{8,}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Description:
    """What the manifest of a checkpoint says besides its files.

    `samples` is the position in the data stream; `extra` holds git commit, fingerprint of the data and the like.
    """

    step: int
    tokens: int
    samples: int
    world_size: int
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


class Saved(NamedTuple):
    """What became of a save; the same on every rank.

    `write_s` is the time of writing and committing, on the slowest rank. `error` is None where the checkpoint is
    committed.
    """

    step: int
    tier: Tier
    write_s: float
    error: str | None


@dataclass
class _Save:
    """The save under way."""

    step: int
    tier: Tier
    staging: Path
    stage: Literal["collecting", "writing", "committing", "removing"] = "collecting"
    files: dict[str, Any] = field(default_factory=dict)
    error: str | None = None  # of this rank, while it collects
    manifest: dict[str, Any] = field(default_factory=dict)
    write_s: float = 0.0
    job: Future[_Outcome] | None = None


class _Outcome(NamedTuple):
    """Of a thread's work on one stage."""

    value: Any
    error: str | None
    seconds: float


class Saves:
    """The saves of a run, one after the other.

    A save is `begin`, `take` for each file, `write`; then `poll` until it has ended, or `finish`. All collective but
    `take`, which every rank calls for its own files. Nothing of it raises where a disk fails: a failed save is a
    warning, its files are removed, and older checkpoints are as they were.
    """

    def __init__(
        self,
        run_folder: Path | str,
        *,
        local: Tier | None = None,
        background: bool = True,
        keep_last: int = 1,
        keep_every_tokens: int | None = None,
        protected_steps: Callable[[], set[int]] = set,
    ) -> None:
        """Write nothing yet.

        Args:
            run_folder: of the shared tier.
            local: the second tier, of which the newest checkpoint is kept.
            background: False: `write` returns when the checkpoint is committed or has failed, and nothing is copied.
            keep_last: as in `retention.retain`, which gets `keep_every_tokens` and `protected_steps()` as well.
        """
        self.shared, self.local = checkpoint.shared_tier(run_folder), local
        self.last: Saved | None = None
        self._background = background
        self._keep_last, self._keep_every_tokens = keep_last, keep_every_tokens
        self._protected_steps = protected_steps
        self._copy = HostCopy()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._save: _Save | None = None
        self._ended: list[Saved] = []

    def begin(self, tier: Tier, step: int) -> None:
        """Wait for the save before, whose copy is then free to be overwritten. Collective: world."""
        self.finish()
        self._save = _Save(step, tier, checkpoint.checkpoints_folder(tier.run_folder) / f".saving-step-{step:08d}")

    def take(self, name: str, content: Any) -> None:
        """Take a file of this rank: bytes, or what torch.save is to write, which may change from now on.

        Without `background` it may not change before `write` returns.
        """
        assert self._save is not None
        try:
            self._save.files[name] = self._copy(name, content) if self._background else content
        except (RuntimeError, MemoryError) as error:  # no host memory is left: told to all ranks later
            self._save.error = f"{name}: cannot be copied into host memory: {error}"

    def take_rank_state(self, state: dict[str, Any]) -> None:
        """Take what only this rank knows (its random state, ...), for `checkpoint.load_rank_state`.

        Raises:
            RuntimeError: it holds something else than tensors, numbers, strings, lists and dictionaries.
        """
        name, buffer = checkpoint.rank_file(distributed.rank()), io.BytesIO()
        torch.save(state, buffer)
        try:  # better to fail at the save than at the resume
            torch.load(io.BytesIO(buffer.getbuffer()), weights_only=True)
        except Exception as error:
            raise RuntimeError(f"{name}: a resume could not read the state of this rank: {error}") from error
        self.take(name, buffer.getvalue())

    def write(self, description: Description) -> None:
        """Let the writing begin; what earlier, killed saves left in the folder is removed first. Collective: world."""
        save = self._save
        assert save is not None
        if save.tier.leads and save.error is None:
            save.error = _attempt(lambda: _make_anew(save.staging)).error
        errors = _in_one(distributed.gather_objects(save.error))
        if errors is not None:
            self._end(save, errors)
            return
        save.manifest = {"format_version": checkpoint.FORMAT_VERSION, **asdict(description), "created": time.time()}
        if save.tier.node is not None:
            save.manifest["node"] = save.tier.node
        self._start(save, "writing", lambda: _write_files(save.staging, save.files))
        if not self._background:
            self.finish()

    def poll(self) -> list[Saved]:
        """Return the saves that ended since the last call; one that is still at work does not hold up the ranks.

        Collective: world; nothing is communicated when no save is under way.
        """
        save = self._save
        if save is not None and save.job is not None and not distributed.any_rank(not save.job.done()):
            self._advance(save)
        ended, self._ended = self._ended, []
        return ended

    def finish(self) -> None:
        """Wait for the save under way, if there is one; `poll` tells what became of it. Collective: world."""
        while self._save is not None:
            self._advance(self._save)

    def require_saved(self) -> None:
        """Raise if the last save failed, where no later one will make up for it.

        Raises:
            RuntimeError: it did; on every rank.
        """
        if self.last is not None and self.last.error is not None:
            raise RuntimeError(
                f"{self.last.tier.run_folder}: the state at step {self.last.step} was not saved: {self.last.error}. A "
                "run ends with a checkpoint. Make room or make the folder writable, and start again: it goes on from "
                "the newest checkpoint."
            )

    def _advance(self, save: _Save) -> None:
        """Wait for this stage on all ranks, then begin the next one or end the save. Collective: world."""
        assert save.job is not None
        outcomes: list[_Outcome] = distributed.gather_objects(save.job.result())
        errors = _in_one([outcome.error for outcome in outcomes])
        if errors is not None or save.stage == "removing":
            self._end(save, errors)
        elif save.stage == "writing":
            save.write_s += max(outcome.seconds for outcome in outcomes)
            save.files = {}
            entries = {name: entry for rank in save.tier.ranks for name, entry in outcomes[rank].value.items()}
            save.manifest["files"] = dict(sorted(entries.items()))
            self._start(save, "committing", lambda: _commit(save) if save.tier.leads else None)
        else:
            save.write_s += max(outcome.seconds for outcome in outcomes)
            self._start(save, "removing", lambda: self._retain(save) if save.tier.leads else None)

    def _start(self, save: _Save, stage: Literal["writing", "committing", "removing"], work: Callable[[], Any]) -> None:
        save.stage = stage
        save.job = self._thread.submit(_attempt, work)

    def _retain(self, save: _Save) -> None:
        shared = save.tier is self.shared
        try:
            retention.retain(
                save.tier.run_folder,
                self._keep_last if shared else 1,
                self._protected_steps() if shared else (),
                keep_every_tokens=self._keep_every_tokens if shared else None,
                verified_step=save.step,
            )
        except OSError as error:  # the new checkpoint is there: that others cannot be listed makes it no failure
            _log.warning("%s: cannot look after older checkpoints: %s", save.tier.run_folder, error)

    def _end(self, save: _Save, error: str | None) -> None:
        if error is not None:
            if save.tier.leads:
                shutil.rmtree(save.staging, ignore_errors=True)
            if distributed.is_main():
                _log.warning(
                    "%s: the checkpoint of step %d was not saved: %s. Older ones are untouched. Make room, or make the "
                    "folder writable, before the next save.", save.staging.parent, save.step, error,
                )  # fmt: skip
        self._save = None
        self.last = Saved(save.step, save.tier, save.write_s, error)
        self._ended.append(self.last)


def _in_one(errors: list[str | None]) -> str | None:
    """Put the errors of ranks into one text; None where no rank has any."""
    told = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error is not None]
    return "; ".join(told) or None


def _attempt(work: Callable[[], Any]) -> _Outcome:
    started = time.monotonic()
    try:
        return _Outcome(work(), None, time.monotonic() - started)
    except Exception as error:  # whatever it is, the other ranks are to hear of it; there is no collective in here
        return _Outcome(None, f"{type(error).__name__}: {error}", time.monotonic() - started)


# ---- files


class _HashedFile:
    """What torch.save writes to: a file and the hash of what was written.

    An error is kept until `close`: in torch's writer the callback that raises is lost behind one of its own.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=0)
        self._digest, self._bytes = hashlib.sha256(), 0
        self._error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content).cast("B")
        left = view
        while left and self._error is None:
            try:
                left = left[self._file.write(left) :]
            except OSError as error:
                error.filename = self._file.name
                self._error = error
        self._digest.update(view)
        self._bytes += len(view)
        return len(view)

    def flush(self) -> None:
        pass

    def close(self) -> dict[str, Any]:
        """Bring the file to the disk and return its entry in the manifest."""
        try:
            if self._error is not None:
                raise self._error
            os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


def write_file(path: Path, content: Any) -> dict[str, Any]:
    """Write bytes, or what torch.save takes, to the disk; return size and hash as they stand in a manifest.

    Raises:
        OSError: the disk is full, the folder cannot be written, and the like.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _HashedFile(path)
    try:
        if isinstance(content, bytes):
            file.write(content)
        else:
            torch.save(content, cast(IO[bytes], file))
    finally:
        entry = file.close()
    return entry


def _write_files(staging: Path, files: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: write_file(staging / name, content) for name, content in files.items()}


def _make_anew(staging: Path) -> None:
    """Make the empty folder of a new checkpoint; a run has one save under way at a time, so others are of the past."""
    staging.parent.mkdir(parents=True, exist_ok=True)
    for path in list(staging.parent.iterdir()):
        if _IN_TRANSIT.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    staging.mkdir()


# ---- commit


def _commit(save: _Save) -> None:
    """Put manifest and folder in place, the marker last; each is on disk before the next is touched.

    A kill or a power cut at any moment leaves the new checkpoint whole or the older ones as they were. An older
    checkpoint of the same step is replaced, and can be found until the new one is committed.
    """
    staging, manifest = save.staging, json.dumps(save.manifest, indent=1).encode()
    target = checkpoint.step_folder(save.tier.run_folder, save.step)
    _write_and_flush(staging / checkpoint.MANIFEST, manifest)
    for folder, _, _ in os.walk(staging):
        _flush_folder(Path(folder))
    replaced = target.parent / f".replaced-{target.name}"
    if target.exists():
        if replaced.exists() and checkpoint.verify(target):
            shutil.rmtree(target)  # left by a save that was killed before its marker: the older copy is good
        else:
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(target, replaced)
    os.replace(staging, target)
    _flush_folder(target.parent)
    _flush_folder(target.parent.parent)
    unseen = target / f".{checkpoint.MARKER}"
    _write_and_flush(unseen, hashlib.sha256(manifest).hexdigest().encode())
    os.replace(unseen, target / checkpoint.MARKER)  # whoever watches for markers never sees half of one
    _flush_folder(target)
    if replaced.exists():
        retention.remove(replaced)


def _write_and_flush(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what file systems without such a flush answer
            raise
    finally:
        os.close(descriptor)
