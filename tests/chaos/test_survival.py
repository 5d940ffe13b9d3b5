"""What a run survives: kills, damaged checkpoints, a full or read-only disk, a clock that jumps.

In one file, since all tests compare with one undisturbed run. What is drawn at random is told as CHAOS_SEED=..., and
the variable of that name repeats it. With CHAOS_FULL=1 (`make chaos`) there are fifty kills at random moments, and one
before every write of a save.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.damages import DAMAGES, Damaged
from chaos.kills import print_table, random_kills, survive, writes_of_a_save
from chaos.survival import NUM_STEPS, Kill, Survivor
from dispersion_pretrain import checkpoint
from integration.conftest import corpus  # noqa: F401  (a fixture)

FULL = os.environ.get("CHAOS_FULL") == "1"
NUM_DAMAGES = 200
HOURS = 3600.0
PACKAGE = Path(checkpoint.__file__).parent


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Survivor:  # noqa: F811
    """A run that nothing happened to, with its checkpoints on both tiers; not to be changed."""
    run = Survivor(tmp_path_factory.mktemp("chaos") / "undisturbed", corpus)
    run.finish()
    run.check_samples()
    return run


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"CHAOS_SEED={chosen}")
    return chosen


@pytest.mark.slow
@pytest.mark.timeout(10800 if FULL else 900)
def test_kills_change_nothing(corpus: Path, undisturbed: Survivor, tmp_path: Path, seed: int) -> None:  # noqa: F811
    dice = random.Random(seed)
    kills, writes = random_kills(50 if FULL else 2, undisturbed.seconds, dice), writes_of_a_save(undisturbed)
    print(f"an undisturbed run takes {undisturbed.seconds:.0f} s, a save makes {len(writes)} writes")
    orphaned = Kill("launcher", after_steps=6)
    kills += [orphaned, *(writes if FULL else dice.sample(writes, 3))]
    outcomes = survive(kills, tmp_path, corpus, undisturbed, dice)
    print_table(outcomes)
    assert [outcome.kill.point for outcome in outcomes] == [kill.point for kill in kills], "every write was reached"
    (left_alone,) = [outcome for outcome in outcomes if outcome.kill is orphaned]
    assert left_alone.lost_steps == 0, "the orphans save, and the next start waits for them"
    assert "state saved; the same command goes on from there" in left_alone.log.read_text(), "the orphans went on"


def test_every_damage_is_noticed_and_the_one_before_is_used(undisturbed: Survivor, tmp_path: Path, seed: int) -> None:
    dice, damaged = random.Random(seed), Damaged(undisturbed, tmp_path)
    older, newest = checkpoint.committed_steps(undisturbed.run)
    table: dict[str, Counter[str]] = {}
    files: Counter[str] = Counter()
    for number in range(NUM_DAMAGES):
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


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Mount 8 MiB where the run folder will be; called again, mount it otherwise."""
    folder = tmp_path / "weather" / "run"
    mounted = False

    def mount(options: str) -> None:
        nonlocal mounted
        folder.mkdir(parents=True, exist_ok=True)
        options = f"remount,{options}" if mounted else f"size=8m,{options}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if done.returncode and not mounted:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        assert not done.returncode, done.stderr
        mounted = True

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


def fill(file: Path) -> None:
    """Write until there is no room."""
    with open(file, "wb", buffering=0) as ballast, pytest.raises(OSError, match="No space left"):
        while True:
            ballast.write(bytes(4096))


def without_tensorboards_traceback(output: str) -> str:
    """TensorBoard's writing thread prints its error, to whose frames those of its catcher here may have been added.

    A traceback stays if its thread is another's, whatever frames it has.
    """
    written = r"^Exception in thread [^\n]*\n(?:(?!^Exception in thread|^\w+Error: ).)*?"
    thread = r"/tensorboard/summary/writer/event_file_writer\.py\", line \d+, in _run\n.*?^OSError: [^\n]*\n"
    return re.sub(written + thread, "", output, flags=re.MULTILINE | re.DOTALL)


def test_only_tensorboards_traceback_is_left_out() -> None:
    begin, end = "Exception in thread T-3:\nTraceback (most recent call last):\n", "OSError: [Errno 28] full\n"
    caught = f'  File "{PACKAGE}/metrics.py", line 182, in _surviving_a_full_disk\n    yield\n'
    thread = '  File "/x/tensorboard/summary/writer/event_file_writer.py", line 244, in run\n    self._run()\n'
    theirs = begin + caught + thread + thread.replace("in run", "in _run") + end
    assert without_tensorboards_traceback(f"before\n{theirs}after\n") == "before\nafter\n"
    ours = begin + caught + end
    assert without_tensorboards_traceback(theirs + ours + theirs) == ours


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_full_disk_then_read_only_then_a_jumping_clock(
    undisturbed: Survivor,
    corpus: Path,  # noqa: F811
    tmp_path: Path,
    disk: Callable[[str], None],
) -> None:
    run = Survivor(
        tmp_path / "weather", corpus, run={"doctor": False, "max_time": "0:50:00"}, faults={"hang_s": 60.0}, tiers=1
    )  # fmt: skip
    disk("rw")
    job = run.start()
    job.wait_for(lambda: run.last_step() >= 10)
    ballast = run.run / "ballast"
    fill(ballast)
    assert job.wait() == 1
    output = job.log.read_text()
    assert run.last_step() == NUM_STEPS, "no step needs the disk"
    for told in ("checkpoint of step 20 was not saved: ", "metrics are not written: ", "No space left on device"):
        assert told in output, output[-6000:]
    assert re.search(rf"^error: .*: the state at step {NUM_STEPS} was not saved: .*No space left", output, re.MULTILINE)
    assert f"{PACKAGE}/" not in without_tensorboards_traceback(output), "no traceback comes through this package"
    kept = checkpoint.committed_steps(run.run)
    assert kept and all(checkpoint.verify(checkpoint.step_folder(run.run, step)) == [] for step in kept)

    disk("ro")
    job = run.start()
    assert job.wait() == 1
    output = job.log.read_text()
    assert re.search(rf"^error.*{run.run}: .*Read-only file system", output, re.MULTILINE | re.DOTALL), output[-6000:]
    assert f"{PACKAGE}/" not in output and checkpoint.committed_steps(run.run) == kept

    disk("rw")
    ballast.unlink()
    run.finish(CHAOS_CLOCK=str(2 * HOURS))
    run.check(undisturbed)
    times = [record["time"] for record in run.lines("run/metrics.jsonl")[-20:]]
    assert max(times) - min(times) > 3 * HOURS, "the clock did jump"
    assert "hang" not in run.log.read_text()
