"""Two starts in one run folder: the second waits, and goes on only where the first has ended."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dispersion_pretrain import distributed, heartbeat
from dispersion_pretrain.heartbeat import write_beat
from dispersion_pretrain.run_lock import LOCK_FILE, only_start
from spawn import run_ranks
from unit.test_hang_report import beat

ROOT = Path(__file__).resolve().parents[2]
HOLD = """
import os, signal, sys
from pathlib import Path
from dispersion_pretrain.run_lock import only_start
with only_start(Path(sys.argv[1]), lambda: False, wait_s=0.0):
    print("holds", flush=True)
    signal.pause()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has locked the folder for a run of one rank."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "holds\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_second_start_is_refused_with_the_name_of_the_first(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    message = rf"rank 0, process {holder.pid} on .* is at work in this run folder; .* remove {tmp_path / LOCK_FILE}"
    with pytest.raises(RuntimeError, match=message), only_start(tmp_path, lambda: False, wait_s=0.0):
        pass
    with pytest.raises(RuntimeError, match="launcher .* has ended, and rank 0, process"):
        with only_start(tmp_path, lambda: True):
            pass


def _wait_and_enter(folder: Path) -> bool:
    """Whether the first start is dead when this one comes in."""
    if distributed.is_main():
        (folder / "comes").touch()
    with only_start(folder / "run", lambda: False):
        return heartbeat.process_start(int((folder / "pid").read_text())) == 0


def test_two_ranks_wait_for_whichever_rank_of_the_first_lives(tmp_path: Path) -> None:
    """The holder is rank 2 of an earlier, larger start: no rank of the new one has its number."""
    hold_second = HOLD.replace("with only_start", "import dispersion_pretrain.distributed as d\nd.rank = lambda: 2\n"
                               "d.world_size = lambda: 1\nwith only_start")  # fmt: skip
    hold_second = hold_second.replace("(rank == 0, rank > 0)", "")
    command = [sys.executable, "-c", hold_second, str(tmp_path / "run")]
    first = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None and first.stdout.readline() == "holds\n"
    (tmp_path / "pid").write_text(str(first.pid))
    watcher = subprocess.Popen(
        ["bash", "-c", f"until [ -e {tmp_path / 'comes'} ]; do sleep 0.05; done; sleep 1; kill -9 {first.pid}"]
    )
    try:
        assert run_ranks(_wait_and_enter, 2, tmp_path) == [True, True]
    finally:
        watcher.wait()
        first.kill()
        first.wait()
        first.stdout.close()


def test_a_dead_machines_lock_does_not_hold_for_ever(
    tmp_path: Path, holder: subprocess.Popen[str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / heartbeat.FOLDER).mkdir()
    fields: dict[str, Any] = asdict(beat(0)) | {"machine": "another"}
    write_beat(tmp_path / heartbeat.FOLDER, heartbeat.Beat(**fields))
    with only_start(tmp_path, lambda: False, wait_s=0.3):
        assert "has given no sign for 0.3 s: taken for dead" in caplog.text
    fields |= {"machine": heartbeat.own_machine(), "pid": os.getpid()}
    fields |= {"process_start": heartbeat.process_start(os.getpid())}  # it lives, so it may only be busy
    write_beat(tmp_path / heartbeat.FOLDER, heartbeat.Beat(**fields))
    with pytest.raises(RuntimeError, match="is at work"), only_start(tmp_path, lambda: False, wait_s=0.3):
        pass


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with only_start(tmp_path, lambda: False):
        assert "this file system has no locks" in caplog.text


def test_an_orphan_does_not_begin(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the launcher that started this process has ended"):
        with only_start(tmp_path, lambda: True):
            pass


LAUNCHED = """
import sys, time
from dispersion_pretrain.launcher import Launcher
launcher = Launcher()
launcher._looked_s = 0.0
print(launcher.is_gone(), flush=True)
sys.stdin.readline()
time.sleep(1.1)
print(launcher.is_gone(), flush=True)
"""


@pytest.mark.parametrize(("program", "gone"), [("torchrun", True), ("shell", False)])
def test_a_launcher_is_missed_and_a_shell_is_not(tmp_path: Path, program: str, gone: bool) -> None:
    reader, writer = os.pipe()
    script = tmp_path / program
    script.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {LAUNCHED!r}])\n")
    parent = subprocess.Popen(
        [sys.executable, str(script)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=reader,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(reader)
    assert parent.stdout is not None
    with parent.stdout, os.fdopen(writer, "w") as line:
        assert parent.stdout.readline() == "False\n"
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        line.write("\n")
        line.flush()
        assert parent.stdout.readline() == f"{gone}\n"
