"""A disk that fills up, a run folder that cannot be written, a clock that jumps: a clear end, and nothing lost."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.survival import NUM_STEPS, Survivor
from dispersion_pretrain import checkpoint

HOURS = 3600.0


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


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_full_disk_then_read_only_then_a_jumping_clock(
    undisturbed: Survivor, corpus: Path, tmp_path: Path, disk: Callable[[str], None]
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
    assert "Traceback" not in output
    kept = checkpoint.committed_steps(run.run)
    assert kept and all(checkpoint.verify(checkpoint.step_folder(run.run, step)) == [] for step in kept)

    disk("ro")
    job = run.start()
    assert job.wait() == 1
    output = job.log.read_text()
    assert re.search(rf"^error.*{run.run}: .*Read-only file system", output, re.MULTILINE | re.DOTALL), output[-6000:]
    assert "Traceback" not in output and checkpoint.committed_steps(run.run) == kept

    disk("rw")
    ballast.unlink()
    run.finish(CHAOS_CLOCK=str(2 * HOURS))
    run.check(undisturbed)
    times = [record["time"] for record in run.lines("run/metrics.jsonl")[-20:]]
    assert max(times) - min(times) > 3 * HOURS, "the clock did jump"
    assert "hang" not in run.log.read_text()
