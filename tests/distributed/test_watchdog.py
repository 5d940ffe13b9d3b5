"""Ranks without a launcher that hang or die: each process ends by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dispersion_pretrain.heartbeat import read_beat, read_beats

SCRIPT = Path(__file__).with_name("watched_rank.py")
ROOT = SCRIPT.parents[2]


@contextmanager
def ranks(folder: Path, *behaviours: str, hang_s: float) -> Iterator[list[subprocess.Popen[str]]]:
    """Start them and wait until all have gone through a second of steps."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(rank), str(len(behaviours)), str(hang_s), behaviour],
            env=environment,
            text=True,
            stderr=subprocess.PIPE,
        )
        for rank, behaviour in enumerate(behaviours)
    ]
    try:
        deadline = time.monotonic() + 120
        while not all((folder / f"ready-{rank}").exists() for rank in range(len(behaviours))):
            assert time.monotonic() < deadline, "not started"
            time.sleep(0.05)
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def outcome(process: subprocess.Popen[str], timeout_s: float = 60.0) -> tuple[int, str]:
    _, text = process.communicate(timeout=timeout_s)
    return process.returncode, text


def test_loop_in_python_is_named_by_the_ranks_that_wait(tmp_path: Path) -> None:
    with ranks(tmp_path, "waits", "loops", "waits", hang_s=3) as processes:
        found = [outcome(process) for process in processes]
    assert [code for code, _ in found] == [86, 86, 86]
    (report,) = [text for _, text in found if "hang: " in text]
    assert "watched_rank.py:" in report and "in main" in report and "in lock_twice" in report
    (folder,) = (tmp_path / "hangs").iterdir()
    assert {path.name for path in folder.iterdir()} == {"report.txt", *(f"rank_0000{rank}.txt" for rank in range(3))}
    assert "in lock_twice" in (folder / "rank_00002.txt").read_text()


def test_code_that_holds_the_interpreter_ends_too(tmp_path: Path) -> None:
    with ranks(tmp_path, "waits", "holds", hang_s=3) as processes:
        (code, report), (code_of_holder, stack) = [outcome(process) for process in processes]
    # whichever comes first: the report, or the timer in the rank itself
    assert code == 86 and ("rank 1 has not been seen for " in report or "rank 1 is gone" in report)
    assert code_of_holder == 1 and "Timeout" in stack and "watched_rank.py" in stack


@pytest.mark.slow
def test_neighbour_that_was_killed_ends_the_others_long_before_the_limit(tmp_path: Path) -> None:
    with ranks(tmp_path, "waits", "waits", "waits", hang_s=1800) as processes:
        processes[1].kill()
        started = time.monotonic()
        found = [outcome(process) for process in (processes[0], processes[2])]
        assert time.monotonic() - started < 55
    assert [code for code, _ in found] == [86, 86]
    assert any("rank 1 is gone" in text for _, text in found)


def test_neighbour_on_another_machine_is_missed(tmp_path: Path) -> None:
    with ranks(tmp_path, "waits-elsewhere", "waits", hang_s=1800) as processes:
        processes[1].send_signal(signal.SIGSTOP)
        code, report = outcome(processes[0])
    assert code == 86 and "rank 1 has given no sign for " in report and "rank 1 has not been seen for " in report


def test_suspended_job_goes_on(tmp_path: Path) -> None:
    with ranks(tmp_path, "works", "works", hang_s=3) as processes:
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                process.send_signal(number)
            time.sleep(2.8)  # with what passes before and after it, more than hang_s without a mark
        assert [outcome(process)[0] for process in processes] == [0, 0]
    assert not (tmp_path / "hangs").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_second_signal_leaves_at_once_though_the_rank_waits_in_a_collective(
    tmp_path: Path, number: signal.Signals
) -> None:
    with ranks(tmp_path, "waits", hang_s=1800) as (process,):
        process.send_signal(number)
        time.sleep(0.5)
        assert process.poll() is None, "the first is only noted"
        process.send_signal(number)
        assert outcome(process, 10.0)[0] == 128 + number
    beat = read_beat(tmp_path / "heartbeats", 0)
    assert beat is not None and (beat.exit_code, beat.reason) == (128 + number, f"{number.name} came twice")


def test_last_word_of_a_rank_that_is_done(tmp_path: Path) -> None:
    with ranks(tmp_path, "ends", hang_s=3) as (process,):
        assert outcome(process)[0] == 0
    assert read_beats(tmp_path / "heartbeats")[0].exit_code == 0
