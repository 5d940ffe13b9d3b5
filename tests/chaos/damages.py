"""What disks, copies and people do to the files of a checkpoint. Each function does one such thing and says what."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from dispersion_pretrain.checkpoint import MANIFEST, MARKER

Damage = Callable[[Path, Path, random.Random], str]
"""(checkpoint, an older one, dice) -> what was done"""

_SECTOR = 512


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def _pick(checkpoint: Path, dice: random.Random) -> Path:
    """A file; small ones, the manifest and the marker are as likely as the shards."""
    return dice.choice(_files(checkpoint))


def truncated(checkpoint: Path, _: Path, dice: random.Random) -> str:
    """A write that came only part of the way."""
    file = _pick(checkpoint, dice)
    os.truncate(file, dice.randrange(file.stat().st_size))
    return file.name


def bit_flipped(checkpoint: Path, _: Path, dice: random.Random) -> str:
    """Memory or a cable."""
    file = _pick(checkpoint, dice)
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)
    return file.name


def sector_zeroed(checkpoint: Path, _: Path, dice: random.Random) -> str:
    """The length is right, and a part was never written."""
    file = dice.choice([file for file in _files(checkpoint) if any(file.read_bytes())])
    content = bytearray(file.read_bytes())
    place = dice.choice([start for start in range(0, len(content), _SECTOR) if any(content[start : start + _SECTOR])])
    content[place : place + _SECTOR] = bytes(len(content[place : place + _SECTOR]))
    file.write_bytes(content)
    return file.name


def missing(checkpoint: Path, _: Path, dice: random.Random) -> str:
    """A copy that left a file out."""
    file = _pick(checkpoint, dice)
    file.unlink()
    return file.name


def emptied(checkpoint: Path, _: Path, dice: random.Random) -> str:
    """What a file system leaves of a file that was not flushed before a power cut."""
    file = _pick(checkpoint, dice)
    file.write_bytes(b"")
    return file.name


def grown(checkpoint: Path, _: Path, dice: random.Random) -> str:
    """Something was appended."""
    file = _pick(checkpoint, dice)
    with open(file, "ab") as end:
        end.write(dice.randbytes(dice.randrange(1, 100)))
    return file.name


def ranks_swapped(checkpoint: Path, _: Path, dice: random.Random) -> str:
    """Files of two ranks under each other's names; they have one size."""
    first, second = dice.choice([("rank_00000.pt", "rank_00001.pt"), (_shard(0), _shard(1))])
    one, other, aside = checkpoint / first, checkpoint / second, checkpoint.parent / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return f"{first} and {second}"


def _shard(rank: int) -> str:
    return f"engine/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def file_of_an_older_one(checkpoint: Path, older: Path, dice: random.Random) -> str:
    """A copy that mixed two checkpoints."""
    file = _pick(checkpoint, dice)
    while file.read_bytes() == (older / file.relative_to(checkpoint)).read_bytes():  # the model's config is the same
        file = _pick(checkpoint, dice)
    shutil.copyfile(older / file.relative_to(checkpoint), file)
    return file.name


def manifest_and_marker_of_an_older_one(checkpoint: Path, older: Path, _: random.Random) -> str:
    """Both fit each other."""
    for name in (MANIFEST, MARKER):
        shutil.copyfile(older / name, checkpoint / name)
    return f"{MANIFEST} and {MARKER}"


def an_older_one_under_its_name(checkpoint: Path, older: Path, _: random.Random) -> str:
    """Whole, but of another step."""
    shutil.rmtree(checkpoint)
    shutil.copytree(older, checkpoint)
    return "all files"


def stray_file(checkpoint: Path, _: Path, dice: random.Random) -> str:
    """An empty file that does not belong to it: a shard of a rank that the manifest does not know."""
    name = dice.choice([_shard(7), "rank_00002.pt", "model_config/generation_config.json"])
    (checkpoint / name).touch()
    return name


def folder_for_a_file(checkpoint: Path, _: Path, dice: random.Random) -> str:
    """A folder of the name of a file."""
    file = _pick(checkpoint, dice)
    file.unlink()
    file.mkdir()
    return file.name


def dead_link(checkpoint: Path, _: Path, dice: random.Random) -> str:
    """A file that was moved away and linked to, and is not there any more."""
    file = _pick(checkpoint, dice)
    file.unlink()
    file.symlink_to(checkpoint.parent / "elsewhere" / file.name)
    return file.name


def unmarked(checkpoint: Path, _: Path, __: random.Random) -> str:
    """A save that did not come to its end."""
    (checkpoint / MARKER).unlink()
    return MARKER


DAMAGES: list[Damage] = [
    truncated, bit_flipped, sector_zeroed, missing, emptied, grown, ranks_swapped, file_of_an_older_one,
    manifest_and_marker_of_an_older_one, an_older_one_under_its_name, stray_file, folder_for_a_file, dead_link,
    unmarked,
]  # fmt: skip
