"""What a committed checkpoint is: its form, whether it is whole, which is the newest; saving.py writes them.

`runs/NAME/checkpoints/step-00000100/` holds the caller's files, manifest.json (size and hash of each of them)
and COMMITTED (the hash of manifest.json, written last). Hidden neighbours are in transit: `.saving-step-*` is
being written, `.removing-step-*` deleted, `.replaced-step-*` is the older copy of a step that is being saved
again.

A second tier has the same form on a disk of each node, where the checkpoint of a step is one folder a node, with the
files of the node's ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dispersion_pretrain import distributed

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MARKER = "COMMITTED"

_CANDIDATE = re.compile(r"(?:\.replaced-)?step-(\d{8,})")


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
    return sorted({step for step, folder in candidates(run_folder) if (folder / MARKER).is_file()})


def candidates(run_folder: Path | str) -> list[tuple[int, Path]]:
    """List (step, folder), newest first; of a step that was being saved again the older copy comes second."""
    folder = checkpoints_folder(run_folder)
    if not folder.is_dir():
        return []
    found = []
    for path in folder.iterdir():
        match = _CANDIDATE.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found, key=lambda candidate: _age(candidate[1]))


def _age(path: Path) -> tuple[int, bool]:
    """What sorts candidates from new to old."""
    match = _CANDIDATE.fullmatch(path.name)
    assert match is not None
    return -int(match[1]), path.name.startswith(".")


def rank_file(rank: int) -> str:
    """Return the name of what only that rank knows (its random state, ...) within a checkpoint."""
    return f"rank_{rank:05d}.pt"


# ---- tiers


@dataclass(frozen=True)
class Tier:
    """A place for the checkpoints of a run, as this rank sees it.

    `ranks` are those that see the same place; the first of them makes, commits and removes its folders. `node` is None
    where a checkpoint is whole in one folder. Else it says whose files lie here, and a checkpoint counts only for the
    same ones.
    """

    run_folder: Path
    ranks: tuple[int, ...]
    node: dict[str, Any] | None = None

    @property
    def leads(self) -> bool:
        return distributed.rank() == self.ranks[0]


def shared_tier(run_folder: Path | str) -> Tier:
    """Return the run folder itself, which all ranks see."""
    return Tier(Path(run_folder), tuple(range(distributed.world_size())))


def local_tier(folder: Path | str, run_folder: Path, zero: dict[str, Any]) -> Tier:
    """Return this node's part of the second tier, below `folder`, after finding out which ranks see the same disk.

    The run's place in it has a random name that is kept in the run folder: when that is removed and the run begins
    again, what is left on the disks of nodes does not count. `zero` is how the state is divided, as JSON: since a node
    lacks the files of others, another division can make nothing of them.

    Collective: world.

    Raises:
        RuntimeError: a rank cannot write there; raised on every rank.
    """

    def identity() -> tuple[str, str]:
        path = run_folder / "local_tier"
        if not path.exists():
            run_folder.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".tmp").write_text(secrets.token_hex(8))
            path.with_suffix(".tmp").replace(path)
        return path.read_text(), secrets.token_hex(8)

    name, token = distributed.from_main(f"{run_folder}: cannot name the run on the disks of its nodes", identity)
    place = Path(folder).expanduser().absolute() / f"{run_folder.name}-{name}"
    own = place / f".here-{token}-{distributed.rank()}"
    ranks: list[int] = []
    with distributed.failing_together(f"checkpoint.local_folder: {place} cannot be written"):
        place.mkdir(parents=True, exist_ok=True)
        own.touch()
    with distributed.failing_together(f"checkpoint.local_folder: {place} cannot be read"):
        ranks = sorted(int(path.name.rpartition("-")[2]) for path in place.glob(f".here-{token}-*"))
    with distributed.failing_together(f"checkpoint.local_folder: {place} cannot be written"):
        own.unlink()
    node = {"ranks": ranks, "world_size": distributed.world_size(), "zero": zero}
    return Tier(place, tuple(ranks), node)


def load_rank_state(checkpoint: Path, rank: int | None = None) -> dict[str, Any]:
    """Return what this rank alone (or another) knew when the checkpoint was saved, tensors on the CPU.

    Collective: world.

    Raises:
        RuntimeError: the checkpoint holds no readable state for some rank; raised on every rank.
    """
    path = checkpoint / rank_file(distributed.rank() if rank is None else rank)
    state: dict[str, Any] = {}
    with distributed.failing_together(f"{path}: cannot load the state of this rank"):
        state = torch.load(path, map_location="cpu", weights_only=True)
    return state


# ---- verifying


def _share(sizes: dict[str, int], ranks: Sequence[int]) -> list[str]:
    """Return this rank's share of the files, so that each of `ranks` reads about as many bytes."""
    loads = [0] * len(ranks)
    own = []
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = loads.index(min(loads))
        loads[owner] += sizes[name]
        if ranks[owner] == distributed.rank():
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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(checkpoint: Path) -> list[str]:
    """Return what is wrong with a checkpoint, reading every byte of it; empty when it is whole."""
    problems, manifest = check_structure(checkpoint)
    return problems or _check_content(checkpoint, manifest["files"], manifest["files"])


def _verify_together(path: Path, ranks: Sequence[int]) -> tuple[list[str], dict[str, Any]]:
    """Return problems, alike on all ranks, and the manifest of what `path` is to this rank.

    The `ranks` that see the same `path` share the reading. Collective: world.
    """
    leads = distributed.rank() == ranks[0]
    structures = distributed.gather_objects(check_structure(path) if leads else None)
    problems = [problem for structure in structures if structure is not None for problem in structure[0]]
    manifest: dict[str, Any] = structures[ranks[0]][1]
    if not problems:
        files = manifest["files"]
        own = _share({name: files[name]["bytes"] for name in files}, ranks)
        parts = distributed.gather_objects(_check_content(path, files, own))
        problems = [problem for part in parts for problem in part]
    return problems, manifest


def check_structure(checkpoint: Path) -> tuple[list[str], dict[str, Any]]:
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


def find_newest_good(run_folder: Path | str, local: Tier | None = None) -> tuple[CheckpointInfo | None, list[str]]:
    """Walk back from the newest checkpoint of both tiers to the first that is whole; say why newer ones were skipped.

    One of the second tier is whole if the part of every node is, for the ranks that now run there.

    Collective: world; the ranks share the reading and get the same answer, but for the path on a node's own disk.
    Skipped ones are left for inspection.
    """
    tiers = [tier for tier in (local, shared_tier(run_folder)) if tier is not None]
    # What rank 0 does not see lacks a part. Of one step, a node's own disk comes first.
    listed = distributed.from_main(
        f"{checkpoints_folder(run_folder)}: cannot list the checkpoints",
        lambda: sorted(
            (_age(path), number, path.name)
            for number, tier in enumerate(tiers)
            for _, path in candidates(tier.run_folder)
        ),
    )
    skipped: list[str] = []
    for _, number, name in listed:
        tier = tiers[number]
        path = checkpoints_folder(tier.run_folder) / name
        problems, manifest = _verify_together(path, tier.ranks)
        elsewhere = distributed.any_rank(not problems and manifest.get("node") != tier.node)
        if not problems and not elsewhere:
            return _info(path, manifest), skipped
        problems = problems or ["it is of other ranks, or of other zero settings, than those that run here now"]
        skipped.append(f"{path}: {'; '.join(problems)}")
    return None, skipped


def resolve(
    run_folder: Path | str, resume: str | Path, local: Tier | None = None
) -> tuple[CheckpointInfo | None, list[str]]:
    """Return the checkpoint that `resume` asks for, or None for step 0, and why newer ones were skipped.

    Collective: world. `resume` is "auto" (the newest good one of the run, on either tier, or a start), "none" (a
    start), or the folder of a checkpoint, of this run or another.

    Raises:
        ValueError: the named folder does not exist.
        RuntimeError: the named checkpoint is damaged; or "auto" finds committed checkpoints of which none is
            whole: a run does not silently begin again at step 0.
    """
    if resume == "none":
        return None, []
    if resume == "auto":
        info, skipped = find_newest_good(run_folder, local)
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
    problems, manifest = _verify_together(path, range(distributed.world_size()))
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
