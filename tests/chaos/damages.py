"""What disks, copies and people do to the files of a checkpoint: each function does one such thing and says to what."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from chaos.survival import Survivor
from dispersion_pretrain import checkpoint
from dispersion_pretrain.checkpoint import MANIFEST, MARKER, Tier

Damage = Callable[[Path, Path, random.Random], str]
"""(checkpoint, an older one, dice) -> what was done"""

_SECTOR = 512


def _files(target: Path) -> list[Path]:
    return sorted(path for path in target.rglob("*") if path.is_file())


def _pick(target: Path, dice: random.Random) -> Path:
    """A file; small ones, the manifest and the marker are as likely as the shards."""
    return dice.choice(_files(target))


def truncated(target: Path, _: Path, dice: random.Random) -> str:
    """A write that came only part of the way."""
    file = _pick(target, dice)
    os.truncate(file, dice.randrange(file.stat().st_size))
    return file.name


def bit_flipped(target: Path, _: Path, dice: random.Random) -> str:
    """Memory or a cable."""
    file = _pick(target, dice)
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)
    return file.name


def sector_zeroed(target: Path, _: Path, dice: random.Random) -> str:
    """The length is right, and a part was never written."""
    file = dice.choice([file for file in _files(target) if any(file.read_bytes())])
    content = bytearray(file.read_bytes())
    place = dice.choice([start for start in range(0, len(content), _SECTOR) if any(content[start : start + _SECTOR])])
    content[place : place + _SECTOR] = bytes(len(content[place : place + _SECTOR]))
    file.write_bytes(content)
    return file.name


def missing(target: Path, _: Path, dice: random.Random) -> str:
    """A copy that left a file out."""
    file = _pick(target, dice)
    file.unlink()
    return file.name


def emptied(target: Path, _: Path, dice: random.Random) -> str:
    """What a file system leaves of a file that was not flushed before a power cut."""
    file = _pick(target, dice)
    file.write_bytes(b"")
    return file.name


def grown(target: Path, _: Path, dice: random.Random) -> str:
    """Something was appended."""
    file = _pick(target, dice)
    with open(file, "ab") as end:
        end.write(dice.randbytes(dice.randrange(1, 100)))
    return file.name


def ranks_swapped(target: Path, _: Path, dice: random.Random) -> str:
    """Files of two ranks under each other's names; they have one size."""
    first, second = dice.choice([("rank_00000.pt", "rank_00001.pt"), (_shard(0), _shard(1))])
    one, other, aside = target / first, target / second, target.parent / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"{first} and {second}"


def _shard(rank: int) -> str:
    return f"engine/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def file_of_an_older_one(target: Path, older: Path, dice: random.Random) -> str:
    """A copy that mixed two checkpoints."""
    file = _pick(target, dice)
    while file.read_bytes() == (older / file.relative_to(target)).read_bytes():  # the model's config is the same
        file = _pick(target, dice)
    shutil.copyfile(older / file.relative_to(target), file)
    return file.name


def manifest_and_marker_of_an_older_one(target: Path, older: Path, _: random.Random) -> str:
    """Both fit each other."""
    for name in (MANIFEST, MARKER):
        shutil.copyfile(older / name, target / name)
    return f"{MANIFEST} and {MARKER}"


def an_older_one_under_its_name(target: Path, older: Path, _: random.Random) -> str:
    """Whole, but of another step."""
    shutil.rmtree(target)
    shutil.copytree(older, target)
    return "all files"


def stray_file(target: Path, _: Path, dice: random.Random) -> str:
    """An empty file that does not belong to it: a shard of a rank that the manifest does not know."""
    name = dice.choice([_shard(7), "rank_00002.pt", "model_config/generation_config.json"])
    (target / name).touch()
    return name


def folder_for_a_file(target: Path, _: Path, dice: random.Random) -> str:
    """A folder of the name of a file."""
    file = _pick(target, dice)
    file.unlink()
    file.mkdir()
    return file.name


def dead_link(target: Path, _: Path, dice: random.Random) -> str:
    """A file that was moved away and linked to, and is not there any more."""
    file = _pick(target, dice)
    file.unlink()
    file.symlink_to(target.parent / "elsewhere" / file.name)
    return file.name


def unmarked(target: Path, _: Path, __: random.Random) -> str:
    """A save that did not come to its end."""
    (target / MARKER).unlink()
    return MARKER


DAMAGES: list[Damage] = [
    truncated, bit_flipped, sector_zeroed, missing, emptied, grown, ranks_swapped, file_of_an_older_one,
    manifest_and_marker_of_an_older_one, an_older_one_under_its_name, stray_file, folder_for_a_file, dead_link,
    unmarked,
]  # fmt: skip


class Damaged:
    """Copies of a run's checkpoints on both tiers, as one process sees them."""

    def __init__(self, original: Survivor, folder: Path) -> None:
        self._original = original
        (place,) = (original.folder / "disk").glob("run-*")
        self.run, self._place = folder / "run", folder / "disk"
        self._sources = {self.run: original.run, self._place: place}
        (newest,) = checkpoint.committed_steps(place)
        node = json.loads((checkpoint.step_folder(place, newest) / checkpoint.MANIFEST).read_text())["node"]
        self.local = Tier(self._place, (0,), node)

    def renew(self) -> None:
        """Undo everything."""
        for copy, source in self._sources.items():
            shutil.rmtree(checkpoint.checkpoints_folder(copy), ignore_errors=True)
            shutil.copytree(checkpoint.checkpoints_folder(source), checkpoint.checkpoints_folder(copy))
