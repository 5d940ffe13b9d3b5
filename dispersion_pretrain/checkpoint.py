"""Checkpoints that are whole or absent: commit, verify, find the newest good one, retain.

`runs/NAME/checkpoints/step-00000100/` holds the caller's files, manifest.json (size and hash of each of them)
and COMMITTED (the hash of manifest.json, written last). Hidden neighbours are in transit: `.saving-step-*` is
being written, `.removing-step-*` deleted, `.replaced-step-*` is the older copy of a step that is being saved
again.
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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dispersion_pretrain import distributed

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MARKER = "COMMITTED"

_CANDIDATE = re.compile(r"(?:\.replaced-)?step-(\d{8,})")
_IN_TRANSIT = re.compile(r"\.(?:saving|removing)-step-\d{8,}")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint whose content was verified.

    When it was saved, `world_size` ranks had made `step` updates, seen `tokens` tokens and consumed `samples`
    sequences of the data stream.
    """

    path: Path
    step: int
    tokens: int
    samples: int
    world_size: int
    manifest: dict[str, Any]


# ---- paths


def checkpoints_folder(run_folder: Path | str) -> Path:
    """Return the folder that holds the checkpoints of a run."""
    return Path(run_folder) / "checkpoints"


def step_folder(run_folder: Path | str, step: int) -> Path:
    """Return where the committed checkpoint of `step` lies, whether or not it exists."""
    return checkpoints_folder(run_folder) / f"step-{step:08d}"


def committed_steps(run_folder: Path | str) -> list[int]:
    """Return the steps that have a COMMITTED marker, ascending; contents are not verified."""
    return sorted({step for step, folder in _candidates(run_folder) if (folder / MARKER).is_file()})


def _candidates(run_folder: Path | str) -> list[tuple[int, Path]]:
    """List (step, folder), newest first; of a step that was being saved again the older copy comes second."""
    folder = checkpoints_folder(run_folder)
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _CANDIDATE.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found, key=lambda candidate: (-candidate[0], candidate[1].name.startswith(".")))


def _rank_file(rank: int) -> str:
    return f"rank_{rank:05d}.pt"


# ---- saving


def staging_folder(run_folder: Path | str, step: int) -> Path:
    """Make the empty folder into which every rank writes its files of a new checkpoint.

    Collective: world. What earlier, killed saves left behind is removed: a run has one save under way at a
    time.

    Raises:
        RuntimeError: rank 0 cannot make the folder; raised on every rank.
    """
    staging = checkpoints_folder(run_folder) / f".saving-step-{step:08d}"

    def make_anew() -> None:
        staging.parent.mkdir(parents=True, exist_ok=True)
        for path in list(staging.parent.iterdir()):
            if _IN_TRANSIT.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)
        staging.mkdir()

    distributed.from_main(f"{staging}: cannot make the folder of a new checkpoint", make_anew)
    return staging


def save_rank_state(staging: Path, state: dict[str, Any]) -> None:
    """Write what only this rank knows (its random state, ...) into the checkpoint as rank_00000.pt.

    Collective: world. `state` may hold what a weights-only torch.load reads: tensors, numbers, strings,
    lists, dictionaries.

    Raises:
        RuntimeError: a rank cannot write its state, or could never load it again; raised on every rank.
    """
    path = staging / _rank_file(distributed.rank())
    with distributed.failing_together(f"{path.name}: cannot save the state of this rank"):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)  # better to fail at the save than at the resume
        path.write_bytes(buffer.getbuffer())


def load_rank_state(checkpoint: Path) -> dict[str, Any]:
    """Return what `save_rank_state` wrote on this rank, tensors on the CPU.

    Collective: world.

    Raises:
        RuntimeError: the checkpoint holds no readable state for some rank; raised on every rank.
    """
    path = checkpoint / _rank_file(distributed.rank())
    state: dict[str, Any] = {}
    with distributed.failing_together(f"{path}: cannot load the state of this rank"):
        state = torch.load(path, map_location="cpu", weights_only=True)
    return state


def commit(
    staging: Path,
    *,
    step: int,
    tokens: int,
    samples: int,
    world_size: int,
    settings: dict[str, Any],
    versions: dict[str, str],
    extra: dict[str, Any],
) -> Path:
    """Turn the files in `staging` into the committed checkpoint of `step` and return its folder.

    Collective: world; all files are closed before. The ranks share hashing (SHA-256) and flushing to disk. A
    kill or a power cut at any moment leaves the new checkpoint whole or the older ones as they were. An older
    checkpoint of the same step is replaced, and can be found until the new one is committed. `samples` is the
    position in the data stream; `extra` holds git commit, fingerprint of the data and the like.

    Raises:
        RuntimeError: a rank failed (disk full, a file vanished); raised on every rank, older checkpoints
            untouched.
    """
    target = staging.parent / f"step-{step:08d}"
    distributed.barrier()
    sizes = distributed.from_main(f"{staging}: cannot list the files", lambda: _sizes(staging))
    own: dict[str, str] = {}
    with distributed.failing_together(f"{staging}: cannot read back and flush the files"):
        for name in _share(sizes):
            own[name] = _sha256(staging / name, flush=True)
    hashes = {name: digest for part in distributed.gather_objects(own) for name, digest in part.items()}
    manifest = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "tokens": tokens,
        "samples": samples,
        "world_size": world_size,
        "created": time.time(),
        "versions": versions,
        "settings": settings,
        "extra": extra,
        "files": {name: {"bytes": sizes[name], "sha256": hashes[name]} for name in sorted(sizes)},
    }
    distributed.from_main(
        f"{target}: cannot commit the checkpoint",
        lambda: _publish(staging, target, json.dumps(manifest, indent=1).encode()),
    )
    return target


def _publish(staging: Path, target: Path, manifest: bytes) -> None:
    """Put manifest and folder in place, the marker last; each is on disk before the next is touched."""
    _write_and_flush(staging / MANIFEST, manifest)
    for folder, _, _ in os.walk(staging):
        _flush_folder(Path(folder))
    replaced = target.parent / f".replaced-{target.name}"
    if target.exists():
        if replaced.exists() and verify(target):
            shutil.rmtree(target)  # left by a save that was killed before its marker: the older copy is good
        else:
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(target, replaced)
    os.replace(staging, target)
    _flush_folder(target.parent)
    _flush_folder(target.parent.parent)
    unseen = target / f".{MARKER}"
    _write_and_flush(unseen, hashlib.sha256(manifest).hexdigest().encode())
    os.replace(unseen, target / MARKER)  # whoever watches for markers never sees half of one
    _flush_folder(target)
    if replaced.exists():
        _remove(replaced)


def _share(sizes: dict[str, int]) -> list[str]:
    """Return this rank's share of the files, so that every rank reads about as many bytes."""
    loads = [0] * distributed.world_size()
    own = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = loads.index(min(loads))
        loads[owner] += sizes[name]
        if owner == distributed.rank():
            own.append(name)
    return own


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of every file below `folder`, except manifest and marker, by its relative name."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            relative = Path(parent, name).relative_to(folder).as_posix()
            # NFS keeps a deleted file as .nfs* for as long as some process has it open.
            if relative not in (MANIFEST, MARKER) and not name.startswith(".nfs"):
                sizes[relative] = Path(parent, name).stat().st_size
    return sizes


def _sha256(path: Path, flush: bool = False) -> str:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if flush:
            os.fsync(file.fileno())
    return digest


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


# ---- verifying


def verify(checkpoint: Path) -> list[str]:
    """Return what is wrong with a checkpoint, reading every byte of it; empty when it is whole."""
    problems, manifest = _check_structure(checkpoint)
    return problems or _check_content(checkpoint, manifest["files"], manifest["files"])


def _verify_together(checkpoint: Path) -> tuple[list[str], dict[str, Any]]:
    """Return problems and manifest, alike on all ranks; the ranks share the reading. Collective: world."""
    problems, manifest = distributed.from_main(
        f"{checkpoint}: cannot check the checkpoint", lambda: _check_structure(checkpoint)
    )
    if not problems:
        files = manifest["files"]
        own = _share({name: files[name]["bytes"] for name in files})
        parts = distributed.gather_objects(_check_content(checkpoint, files, own))
        problems = [problem for part in parts for problem in part]
    return problems, manifest


def _check_structure(checkpoint: Path) -> tuple[list[str], dict[str, Any]]:
    """Return problems of marker, manifest, names and sizes, and the manifest ({} if not believable)."""
    try:
        if not (checkpoint / MARKER).is_file():
            return [f"no {MARKER} marker: the save was not finished"], {}
        if not (checkpoint / MANIFEST).is_file():
            return [f"{MANIFEST} is missing"], {}
        content = (checkpoint / MANIFEST).read_bytes()
        if (checkpoint / MARKER).read_bytes() != hashlib.sha256(content).hexdigest().encode():
            return [f"{MANIFEST} is not the one that {MARKER} was written for"], {}
        sizes = _sizes(checkpoint)
    except OSError as error:
        return [f"cannot be read: {error}"], {}
    manifest = json.loads(content)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        return [f"{MANIFEST} has format version {version}, this program reads {FORMAT_VERSION}"], {}
    problems = []
    match = _CANDIDATE.fullmatch(checkpoint.name)
    if match and int(match[1]) != manifest["step"]:
        problems.append(f"{MANIFEST} is of step {manifest['step']}")
    for name, entry in manifest["files"].items():
        if name not in sizes:
            problems.append(f"{name} is missing")
        elif sizes[name] != entry["bytes"]:
            problems.append(f"{name} has {sizes[name]} bytes instead of {entry['bytes']}")
    problems += [f"{name} does not belong to it" for name in sorted(sizes.keys() - manifest["files"].keys())]
    return problems, manifest


def _check_content(checkpoint: Path, files: dict[str, Any], names: Iterable[str]) -> list[str]:
    problems = []
    for name in names:
        try:
            if _sha256(checkpoint / name) != files[name]["sha256"]:
                problems.append(f"{name} has another content than was saved")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error}")
    return problems


# ---- finding


def find_newest_good(run_folder: Path | str) -> tuple[CheckpointInfo | None, list[str]]:
    """Walk back from the newest checkpoint to the first that is whole; say why newer ones were skipped.

    Collective: world; the ranks share the reading and get the same answer. Skipped ones are left for
    inspection.
    """
    candidates = distributed.from_main(
        f"{checkpoints_folder(run_folder)}: cannot list the checkpoints", lambda: _candidates(run_folder)
    )
    skipped: list[str] = []
    for _, path in candidates:
        problems, manifest = _verify_together(path)
        if not problems:
            return _info(path, manifest), skipped
        skipped.append(f"{path}: {'; '.join(problems)}")
    return None, skipped


def resolve(run_folder: Path | str, resume: str | Path) -> tuple[CheckpointInfo | None, list[str]]:
    """Return the checkpoint that `resume` asks for, or None for step 0, and why newer ones were skipped.

    Collective: world. `resume` is "auto" (the newest good one of the run, or a start), "none" (a start), or
    the folder of a checkpoint, of this run or another.

    Raises:
        ValueError: the named folder does not exist.
        RuntimeError: the named checkpoint is damaged; or "auto" finds committed checkpoints of which none is
            whole: a run does not silently begin again at step 0.
    """
    if resume == "none":
        return None, []
    if resume == "auto":
        info, skipped = find_newest_good(run_folder)
        folder = checkpoints_folder(run_folder)
        if info is None and distributed.from_main(f"{folder}", lambda: committed_steps(run_folder)):
            reasons = "\n".join(skipped)
            raise RuntimeError(
                f"{folder}: no checkpoint is whole.\n{reasons}\n"
                "Restore one from a copy, or start at step 0 in a new run folder (run.name)."
            )
        return info, skipped
    path = Path(resume).absolute()
    allowed = (
        'Allowed: "auto" (the newest good one), "none", or the folder of a whole checkpoint, '
        "such as runs/NAME/checkpoints/step-00000100."
    )
    if not distributed.from_main(f"{path}", path.is_dir):
        raise ValueError(f"--resume: {path} is not a folder. {allowed} Correct the path.")
    problems, manifest = _verify_together(path)
    if problems:
        raise RuntimeError(f"--resume: {path} is not whole: {'; '.join(problems)}. {allowed} Name another one.")
    return _info(path, manifest), []


def _info(path: Path, manifest: dict[str, Any]) -> CheckpointInfo:
    return CheckpointInfo(
        path=path,
        step=manifest["step"],
        tokens=manifest["tokens"],
        samples=manifest["samples"],
        world_size=manifest["world_size"],
        manifest=manifest,
    )


# ---- retaining


def retain(
    run_folder: Path | str,
    keep_last: int,
    protected_steps: Iterable[int] = (),
    *,
    verified_step: int | None = None,
) -> list[Path]:
    """Remove committed checkpoints except the last `keep_last`, the protected ones and the newest good one.

    Rank 0 alone acts, the others return at once. Damaged checkpoints and saves under way are left alone. The
    newest good one is found by reading it; `verified_step`, which this process has just committed, is
    believed unread.

    Returns:
        The folders removed (on rank 0). What cannot be deleted is logged and does not stop the run.

    Raises:
        ValueError: `keep_last` is below 1.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last: {keep_last} would keep no checkpoint. Allowed: 1 or more. Raise it.")
    if not distributed.is_main():
        return []
    whole = [(step, path) for step, path in _candidates(run_folder) if not _check_structure(path)[0]]
    good = (step for step, path in whole if step == verified_step or not verify(path))
    newest_good = next(good, None)
    if newest_good is None:
        return []
    steps = sorted({step for step, _ in whole}, reverse=True)
    kept = {newest_good, *steps[:keep_last], *protected_steps}
    return [path for step, path in whole if step not in kept and _remove(path)]


def _remove(checkpoint: Path) -> bool:
    """Delete a checkpoint so that a kill on the way leaves nothing that passes for one; tell if gone."""
    removing = checkpoint.parent / f".removing-{checkpoint.name.removeprefix('.replaced-')}"
    try:
        (checkpoint / MARKER).unlink(missing_ok=True)
        shutil.rmtree(removing, ignore_errors=True)
        os.replace(checkpoint, removing)
        shutil.rmtree(removing)
    except OSError as error:
        _log.warning("%s: cannot delete this older checkpoint: %s", checkpoint, error)
        return False
    return True
