"""What is told of runs: from folders as training leaves them, and from a stand-in for squeue."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from dispersion_pretrain import heartbeat, metrics
from dispersion_pretrain.run_list import RunState, as_json, as_table, list_runs
from launch import runs as script
from unit.test_hang_report import beat

SETTINGS = {"run": {"name": "a-name"}, "training": {"global_batch_tokens": 512, "max_tokens": 51_200 - 1}}


def write_run(
    folder: Path, *beats: dict[str, Any], job: str | None = None, end: dict[str, Any] | None = None, step: int = 40
) -> Path:
    (folder / "heartbeats").mkdir(parents=True)
    (folder / "starts.jsonl").touch()
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    records = [
        {"step": step - 1, "tokens": (step - 1) * 512, "loss/total": 5.5, "tokens_per_s": 90.0},
        {"step": step, "tokens": step * 512, "loss/total": 5.25, "tokens_per_s": 100.0},
        {"step": step, "tokens": step * 512, "checkpoint_s": 0.1},
    ]
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 99, "loss/tot']))  # a kill cut the last one
    for rank, changes in enumerate(beats):
        heartbeat.write_beat(folder / "heartbeats", beat(rank, **{"time": time.time(), **changes}))
    if job is not None:
        (folder / "slurm" / "20260101").mkdir(parents=True)
        (folder / "slurm" / "20260101" / "submission.json").write_text(json.dumps({"job": job}))
    if end is not None:
        (folder / "ends.jsonl").write_text(json.dumps(end) + "\n")
    return folder


def state_of(folder: Path) -> RunState:
    (state,) = list_runs([folder])
    return state


ALIVE: dict[str, Any] = {"host": "elsewhere", "phase": "update"}
HERE = {"machine": heartbeat.own_machine(), "pid": os.getpid(), "process_start": heartbeat.process_start(os.getpid())}


@pytest.mark.parametrize(
    ("beats", "state", "note"),
    [
        ([ALIVE, ALIVE], "running", "update"),
        ([HERE], "running", "the pool's all-gather"),
        ([HERE | {"process_start": 1}], "crashed", "rank 0 was killed"),
        ([{**ALIVE, "time": 1000.0}] * 2, "crashed", "2 ranks were killed"),
        ([{"exit_code": 0}] * 2, "ended", ""),
        ([{"exit_code": 85}] * 2, "stopped", ""),
        ([{"exit_code": 86, "reason": "no progress"}, ALIVE], "hung", "no progress"),
        ([{"exit_code": 1, "reason": "on fire"}, {"exit_code": 1, "reason": "Connection reset"}], "crashed", "on fire"),
        ([{"exit_code": 87, "reason": "twice"}], "crashed", "twice"),
        ([{"exit_code": 143, "reason": "SIGTERM came twice"}], "stopped", "SIGTERM came twice"),
    ],
)
def test_state_is_told_by_heartbeats(tmp_path: Path, beats: list[dict[str, Any]], state: str, note: str) -> None:
    found = state_of(write_run(tmp_path / "run", *beats))
    assert found.state == state and note in found.note
    assert (found.eta_s is None) is (state != "running")


def test_last_whole_record_of_training_counts(tmp_path: Path) -> None:
    found = state_of(write_run(tmp_path / "run", ALIVE))
    assert (found.name, found.step, found.num_steps, found.tokens) == ("a-name", 40, 100, 40 * 512)
    assert (found.loss, found.tokens_per_s) == (5.25, 100.0)
    assert found.eta_s == pytest.approx((51_199 - 40 * 512) / 100)


def test_only_the_end_of_a_long_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", ALIVE)
    monkeypatch.setattr(metrics, "_TAIL_BYTES", 10)
    assert state_of(run).step is None  # no whole record in so little


def test_end_of_an_earlier_start_counts_while_the_next_has_not_come_to_train(tmp_path: Path) -> None:
    end = {
        "time": 1.0, "first_step": 0, "step": 7, "exit_code": 86, "reason": "no progress", "uncertain_steps": 0,
        "fingerprint": "f",
    }  # fmt: skip
    assert state_of(write_run(tmp_path / "b", end=end)).state == "hung"
    assert state_of(write_run(tmp_path / "c")).state == "new"


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What squeue prints."""
    text = tmp_path / "queue"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "squeue").write_text(f'#!/bin/bash\ncat "{text}"\n')
    (tmp_path / "bin" / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    text.write_text("")
    return text


@pytest.mark.parametrize(
    ("line", "beats", "state", "note"),
    [
        ("7 PENDING 0 Dependency", [], "queued", "Dependency"),
        ("7 PENDING 2 BeginTime", [{"exit_code": 85}], "requeued", "BeginTime"),
        ("7 RUNNING 0 None", [], "starting", "running"),
        ("7 RUNNING 1 None", [{"exit_code": 85}], "starting", "running"),
        ("7 RUNNING 1 None", [ALIVE], "running", "update"),
        ("7 COMPLETING 1 None", [{"exit_code": 85}], "stopped", ""),
        ("7 COMPLETING 0 None", [ALIVE], "running", "update"),
        ("8 RUNNING 1 None", [], "crashed", "before it trained"),
        ("", [{"exit_code": 85}], "stopped", ""),
    ],
)
def test_queue_goes_before_old_heartbeats(
    tmp_path: Path, queue: Path, line: str, beats: list[dict[str, Any]], state: str, note: str
) -> None:
    queue.write_text(f"{line}\n" if line else "")
    found = state_of(write_run(tmp_path / "run", *beats, job="7"))
    assert (found.state, found.job) == (state, "7") and note in found.note


def test_run_that_waits_for_its_first_start_shows_the_settings_of_its_submission(tmp_path: Path, queue: Path) -> None:
    queue.write_text("7_1 PENDING 0 Resources\n")
    folder = tmp_path / "runs" / "run" / "slurm" / "20260101"
    folder.mkdir(parents=True)
    (folder / "submission.json").write_text('{"job": "7_1"}')
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    (tmp_path / "runs" / "sweeps" / "20260101").mkdir(parents=True)
    (found,) = list_runs([tmp_path / "runs"])
    assert (found.name, found.state, found.job, found.num_steps, found.step) == ("a-name", "queued", "7_1", 100, None)


def test_script_prints_a_table_or_json_and_names_a_folder_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs" / "one", ALIVE)
    write_run(tmp_path / "runs" / "group" / "two", {"exit_code": 0}, step=100)
    assert script.main([str(tmp_path / "runs")]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "step", "tokens", "loss", "tokens/s", "ETA", "job", "note"]
    assert lines[0].split() == ["a-name", "ended", "100/100", "51,200", "5.2500", "100", "-", "-"]
    assert lines[1].split() == ["a-name", "running", "40/100", "20,480", "5.2500", "100", "0:05:07", "-", "update"]
    assert script.main([str(tmp_path / "runs"), "--json"]) == 0
    assert {run["state"] for run in json.loads(capsys.readouterr().out)} == {"running", "ended"}
    assert script.main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err
    assert as_table([]).startswith("run") and as_json([]) == "[]"
