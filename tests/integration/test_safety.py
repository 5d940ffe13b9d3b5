"""What a real run leaves: nothing secret of its environment, and nothing that everyone may write."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from integration.jobs import finish, pretrain_command, records, run_script, write_config

SECRET = "wJalrXUtnFEMI-not-to-be-seen"


def test_a_run_folder_has_no_secret_and_is_not_writable_for_everyone(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "WANDB_API_KEY", "SOME_PASSWORD"):
        monkeypatch.setenv(name, SECRET)
    sections = {"faults": {"replica_check_steps": 2}, "condensation": {"every_steps": 4, "num_texts": 4}}
    config, run = write_config(tmp_path, corpus, training={"micro_batch": 4}, **sections), tmp_path / "run"
    before = os.umask(0)
    try:
        output = finish(pretrain_command(config, ranks=1, launcher="python"), tmp_path / "log")
    finally:
        os.umask(before)
    done = run_script("launch/report.py", str(run), "--out", str(tmp_path / "page.html"))
    assert done.returncode == 0, done.stderr
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in [*files, tmp_path / "page.html"]:
        assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in output
    open_to_all = [path for path in [run, *run.rglob("*")] if path.stat().st_mode & stat.S_IWOTH]
    assert open_to_all == []
    seconds = {record["step"]: record["faults/replica_check_s"] for record in records(run) if len(record) == 4
               and "faults/replica_check_s" in record}  # fmt: skip
    assert sorted(seconds) == [2, 4, 6, 8, 10, 12] and all(0 < value < 5 for value in seconds.values())
