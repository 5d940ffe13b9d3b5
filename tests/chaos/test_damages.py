"""Two hundred damages to checkpoints of a real run: each is noticed, and the one before is what a resume takes."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from chaos.damages import DAMAGES
from chaos.survival import Survivor
from dispersion_pretrain import checkpoint
from dispersion_pretrain.checkpoint import Tier

NUMBER = 200


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"CHAOS_SEED={chosen}")
    return chosen


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


def test_every_damage_is_noticed_and_the_one_before_is_used(undisturbed: Survivor, tmp_path: Path, seed: int) -> None:
    dice, damaged = random.Random(seed), Damaged(undisturbed, tmp_path)
    older, newest = checkpoint.committed_steps(undisturbed.run)
    table: dict[str, Counter[str]] = {}
    files: Counter[str] = Counter()
    for number in range(NUMBER):
        damaged.renew()
        tier = ("shared", "local")[number % 2]
        if tier == "local":  # make it the newest: the one before is then on the other tier
            shutil.rmtree(checkpoint.step_folder(damaged.run, newest))
        folder = damaged.run if tier == "shared" else damaged.local.run_folder
        victim = checkpoint.step_folder(folder, checkpoint.committed_steps(folder)[-1])
        # With an intact copy it is the victim that is taken: the harness does not fool itself.
        if number < 2:
            found, skipped = checkpoint.resolve(damaged.run, "auto", damaged.local)
            assert found is not None and found.path == victim and not skipped
        damage = DAMAGES[number // 2 % len(DAMAGES)]
        what = damage(victim, checkpoint.step_folder(damaged.run, older), dice)
        files[what] += 1
        label = f"CHAOS_SEED={seed}, number {number}: {damage.__name__} of {what} in {victim}"
        noticed = checkpoint.verify(victim)
        found, skipped = checkpoint.resolve(damaged.run, "auto", damaged.local)
        expected = newest - 2 if tier == "shared" else older  # the local tier's lies between the shared ones
        used = found is not None and found.step == expected and not checkpoint.verify(found.path)
        with pytest.raises(RuntimeError, match="is not whole"):
            checkpoint.resolve(damaged.run, str(victim))
        row = table.setdefault(damage.__name__.replace("_", " "), Counter())
        row.update(number=1, noticed=bool(noticed), used=used)
        assert noticed, f"{label}: loads in silence"
        assert used and [line for line in skipped if line.startswith(f"{victim}: ")], f"{label}: {found}, {skipped}"
    print(f"\n{'damage':36} {'number':>7} {'noticed':>8} {'the one before is used':>23}")
    for name, row in table.items():
        print(f"{name:36} {row['number']:7} {row['noticed']:8} {row['used']:23}")
    print("of:", ", ".join(f"{name} {count}" for name, count in sorted(files.items())))


def test_where_nothing_is_whole_no_run_begins_anew(undisturbed: Survivor, tmp_path: Path, seed: int) -> None:
    dice, damaged = random.Random(seed), Damaged(undisturbed, tmp_path)
    damaged.renew()
    folders = [
        path for tier in (damaged.run, damaged.local.run_folder) for _, path in checkpoint.candidates(tier)
    ]  # fmt: skip
    for victim in folders:
        shard = dice.choice(sorted((victim / "engine").iterdir()))
        os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(RuntimeError, match=r"no checkpoint is whole\.(\n.* bytes instead of .*){3}"):
        checkpoint.resolve(damaged.run, "auto", damaged.local)
