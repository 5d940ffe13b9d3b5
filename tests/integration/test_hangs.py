"""Ranks that hang, are stopped or killed in a real run: who is where is said, and no process stays."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest

from dispersion_pretrain.heartbeat import read_beats
from integration.jobs import ROOT, Job, finish, pretrain_command, records, write_config

HANG_S = 8.0


def faulty(command: list[str]) -> list[str]:
    """The same command with a fault in its data reader, which every process takes from FAULT in its environment."""
    script, replacement = str(ROOT / "launch" / "pretrain.py"), str(ROOT / "tests/integration/faulty_pretrain.py")
    return [replacement if part == script else part for part in command]


def end_of(job: Job, *, within_s: float, since: Path) -> int:
    """Wait until `since` has heartbeats of a later step than the first, and from then on for the end of all."""
    job.wait_for(lambda: max((beat.step for beat in read_beats(since / "heartbeats").values()), default=0) > 1, 200)
    family = psutil.Process(job.process.pid).children(recursive=True)
    assert len(family) >= 2
    started = time.monotonic()
    code = job.wait(within_s)
    _, alive = psutil.wait_procs(family, max(1.0, within_s - (time.monotonic() - started)))
    assert not alive, f"processes stayed: {alive}"
    return code


def write_quick(folder: Path, corpus: Path) -> Path:
    return write_config(
        folder,
        corpus,
        run={"doctor": False},
        training={"max_tokens": 10**6},
        faults={"hang_s": HANG_S},
        validation=None,
        checkpoint={"every_steps": 2, "background": False},  # committed when the next step begins
    )


@pytest.mark.slow
def test_reader_that_never_returns_is_named_and_the_code_is_that_of_a_hang(corpus: Path, tmp_path: Path) -> None:
    config, run = write_quick(tmp_path, corpus), tmp_path / "run"
    second_of_step_6 = "sleeps 1 13"  # a step has 2 micro-steps
    job = Job(faulty(pretrain_command(config)), tmp_path / "log", FAULT=second_of_step_6)
    assert end_of(job, within_s=60, since=run) == 86
    output = job.output()
    for text in (
        "hang: no progress for ",
        "rank 1 never entered the pool's all-gather at step 6: it is in: reading data, step 6, micro-step 1 for ",
        "faulty_pretrain.py",
        "rank 0 waits, in: the pool's all-gather, step 6, micro-step 1, at dispersion.py:",
        "(all_gather_into_tensor)",
    ):
        assert text in output, (text, output)
    assert output.count("hang: ") == 1, "one rank reports"
    (folder,) = (run / "hangs").iterdir()
    stacks = {rank: (folder / f"rank_{rank:05d}.txt").read_text() for rank in (0, 1)}
    assert "_gather_tokens" in stacks[0] and "fail" in stacks[1]
    assert {beat.exit_code for beat in read_beats(run / "heartbeats").values()} == {86}
    assert max(record["step"] for record in records(run)) == 6
    assert (run / "checkpoints" / "step-00000006" / "COMMITTED").exists()


@pytest.mark.slow
def test_stopped_rank_is_missed_by_the_others(corpus: Path, tmp_path: Path) -> None:
    config, run = write_quick(tmp_path, corpus), tmp_path / "run"
    job = Job(faulty(pretrain_command(config, launcher="torchrun")), tmp_path / "log", FAULT="SIGSTOP 1 12")
    assert end_of(job, within_s=120, since=run) == 1, "torchrun has no other code"
    output = job.log.read_text()
    assert "rank 1 has not been seen for " in output and "its last heartbeat was in: " in output, output
    assert "rank 0 waits, in: the pool's all-gather, step 6" in output, output
    assert "exitcode  : 86" in output, output


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_peers_of_a_killed_rank_end(corpus: Path, tmp_path: Path, launcher: str) -> None:
    config, run = write_quick(tmp_path, corpus), tmp_path / "run"
    job = Job(faulty(pretrain_command(config, launcher=launcher)), tmp_path / "log", FAULT="SIGKILL 1 12")
    assert end_of(job, within_s=60, since=run) != 0
    assert read_beats(run / "heartbeats")[1].exit_code is None, "it was killed"


@pytest.mark.slow
def test_two_starts_that_fail_in_one_step_are_the_last(corpus: Path, tmp_path: Path) -> None:
    config, run = write_quick(tmp_path, corpus), tmp_path / "run"
    quick = pretrain_command(config, "training.micro_batch=8", ranks=1, launcher="warm")
    # The first goes on to step 5 from step 0, the second from the checkpoint after 4.
    output = finish(faulty(quick), tmp_path / "log", expected=1, FAULT="raises 0 5")
    assert "Traceback" in output and "the disk is on fire" in output
    finish(faulty(quick), tmp_path / "log", expected=1, FAULT="raises 0 1")
    output = finish(faulty(quick), tmp_path / "log", expected=87, FAULT="none 0 0")
    assert "the last two starts ended in step 5 (from steps 0 and 4), both with: OSError: the disk is on" in output
    assert str(run / "ends.jsonl") in output
    ends = [json.loads(line) for line in (run / "ends.jsonl").read_text().splitlines()]
    assert [(end["first_step"], end["step"], end["exit_code"]) for end in ends] == [(0, 5, 1), (4, 5, 1)]
    assert not any(record["step"] > 5 for record in records(run))
    finish([*quick, "training.max_tokens=3072"], tmp_path / "log")  # a changed setting: 6 steps
    assert max(record["step"] for record in records(run)) == 6
