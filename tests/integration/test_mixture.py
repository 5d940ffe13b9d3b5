"""A run over two corpora: killed and resumed it is the same run, and another order is refused by name."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from integration.jobs import ROOT, Job, finish, pretrain_command, records, trajectory, write_config


@pytest.fixture(scope="module")
def mix(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The corpus of the other tests, and one of this repository's own sources with the same tokenizer."""
    sources = tmp_path_factory.mktemp("mix")
    for script in (ROOT / "dispersion_pretrain").glob("*.py"):
        shutil.copy(script, sources / f"{script.stem}.txt")
    other = tmp_path_factory.mktemp("other") / "corpus"
    command = [sys.executable, str(ROOT / "data_prep" / "tokenize_to_mds.py"), "--source", str(sources)]
    command += ["--tokenizer", str(corpus / "tokenizer"), "--seq-len", "64", "--out", str(other)]
    finish([*command, "--validation-share", "0.2"], other.parent / "log")
    return [{"path": str(corpus), "proportion": 3}, {"path": str(other), "proportion": 1}]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_killed_run_over_two_corpora_goes_on_exactly(mix: list[dict[str, Any]], tmp_path: Path) -> None:
    def config(name: str) -> Path:
        return write_config(tmp_path / name, Path("unused"), data={"corpus": None, "corpora": mix})

    planned = finish(pretrain_command(config("whole"), "--dry-run", launcher="warm"), tmp_path / "log")
    assert "0.75 of the mix" in planned and "0.25 of the mix" in planned
    finish(pretrain_command(config("whole"), launcher="warm"), tmp_path / "log")
    run = tmp_path / "killed" / "run"
    job = Job(pretrain_command(config("killed"), launcher="warm"), tmp_path / "log2")
    job.wait_for(lambda: any(record["step"] >= 6 and "loss/total" in record for record in records(run)))
    job.kill()
    finish(pretrain_command(config("killed"), launcher="warm"), tmp_path / "log2")
    assert trajectory(run) == trajectory(tmp_path / "whole" / "run")

    longer = [f"training.max_tokens={14 * 512}", "data.shuffle=none"]
    refused = finish(pretrain_command(config("killed"), *longer, launcher="warm"), tmp_path / "log3", expected=1)
    assert "data.shuffle was 'windows' and is 'none'" in refused and "data.allow_change=true" in refused
    longer.append("data.allow_change=true")
    allowed = finish(pretrain_command(config("killed"), *longer, launcher="warm"), tmp_path / "log4")
    assert "The data goes on in the new order, at sample 96" in allowed
    assert max(trajectory(run)) == 14
