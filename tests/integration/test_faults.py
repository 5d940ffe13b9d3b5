"""Real jobs in which samples or weights go wrong: skip, roll back, spikes, and an exact resume after each."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from integration.jobs import ROOT, Job, finish, pretrain_command, records, trajectory, write_config

STEPS = 8  # sequences of a step; a step of 512 tokens has 8 samples of 64
# The job as it is, but certain samples of the global order spoil the loss or a gradient wherever they turn up.
STRIKING = f"""
import os, runpy, torch
from dispersion_pretrain.objective import LossTerms, TrainingModule

BROKEN = {{int(sample) for sample in os.environ["BROKEN_SAMPLES"].split()}}
KIND = os.environ["BROKEN_KIND"]
forward = TrainingModule.forward


def struck(self, input_ids, sample_index=None, context=None, **options):
    terms = forward(self, input_ids, sample_index, context, **options)
    if not isinstance(terms, LossTerms) or BROKEN.isdisjoint(sample_index.tolist()):
        return terms
    if KIND == "gradient":
        terms.total.register_hook(lambda gradient: gradient * float("inf"))
        return terms
    factor = float("nan") if KIND == "nan" else 3.0
    return terms._replace(total=terms.total * factor, cross_entropy=terms.cross_entropy * factor)


TrainingModule.forward = struck
runpy.run_path({str(ROOT / "launch" / "pretrain.py")!r}, run_name="__main__")
"""


def struck_command(folder: Path, config: Path, *, ranks: int = 2) -> list[str]:
    script = folder / "striking.py"
    script.write_text(STRIKING)
    command = pretrain_command(config, ranks=ranks, launcher="warm")
    return [str(script) if part.endswith("launch/pretrain.py") else part for part in command]


def config_for(folder: Path, corpus: Path, *, ranks: int = 2, **faults: Any) -> Path:
    """A run of 12 steps without the doctor, whose own batches have the numbers of broken samples."""
    training = {"micro_batch": 4 // ranks}
    return write_config(folder, corpus, run={"doctor": False}, faults=faults, training=training, validation=None)


def manifest(run: Path, step: int) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "checkpoints" / f"step-{step:08d}" / "manifest.json").read_text())
    return content


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_rollback_passes_over_the_samples_and_resumes_exactly(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKEN_SAMPLES", "45")  # in the step that becomes number 6
    monkeypatch.setenv("BROKEN_KIND", "nan")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    output = finish(struck_command(tmp_path, config_for(whole, corpus, non_finite="rollback")), tmp_path / "log")
    assert (
        "step 6: cross-entropy is not finite on 1 of 2 ranks. No update was made. went back to step 4 and passed over "
        "samples 32 to 47 (rollback 1 of at most 3)" in output
    )
    run = whole / "run"
    told = [record for record in records(run) if "faults/rollbacks" in record]
    assert [(r["step"], r["faults/passed_over_first_sample"], r["faults/passed_over_last_sample"]) for r in told] == [
        (4, 32, 47)
    ]
    written = [record["step"] for record in records(run) if "loss/total" in record]
    assert written == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11, 12]
    for step in (8, 12):
        saved = manifest(run, step)
        assert saved["samples"] == (step + 2) * STEPS
        assert saved["extra"]["faults"]["passed_over"] == [[4, 32, 47]]

    # killed once before the next checkpoint and once behind it: the same run
    config = config_for(killed, corpus, non_finite="rollback")
    for steps_seen in (7, 10):
        job = Job(struck_command(tmp_path, config), tmp_path / "log2")
        job.wait_for(lambda steps=steps_seen: any(record["step"] >= steps for record in records(killed / "run")))
        time.sleep(0.02)
        job.kill()
    finish(struck_command(tmp_path, config), tmp_path / "log2")
    assert trajectory(killed / "run") == trajectory(run)
    assert all(math.isfinite(record["loss/total"]) for record in records(run) if "loss/total" in record)


@pytest.mark.timeout(300)
def test_skipped_steps_go_by_and_too_many_in_a_row_end_the_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BROKEN_KIND", "gradient")
    monkeypatch.setenv("BROKEN_SAMPLES", "9 18 41 51 60 64")  # of steps 2, 3, 6, 7, 8, 9
    config, run = config_for(tmp_path, corpus, ranks=1, non_finite="skip", max_skips=3), tmp_path / "run"
    output = finish(struck_command(tmp_path, config, ranks=1), tmp_path / "log", expected=1)
    assert "step 2: the losses are finite, but not the gradient of model.transformer." in output
    assert "The run goes on (1 of at most 3 in a row)" in output and "(2 of at most 3 in a row)" in output
    assert (
        "error: step 9: the losses are finite" in output and "It is number 4 in a row, faults.max_skips is 3" in output
    )
    assert [record["step"] for record in records(run) if "loss/total" in record] == [1, 4, 5]
    counts = {record["step"]: record["faults/skipped"] for record in records(run) if "faults/skipped" in record}
    assert counts == {2: 1, 3: 2, 6: 3, 7: 4, 8: 5}
    state = manifest(run, 8)["extra"]["faults"]
    assert (state["skips"], state["skips_in_a_row"]) == (5, 3)
    # a resume remembers that three went before
    output = finish(struck_command(tmp_path, config, ranks=1), tmp_path / "log2", expected=1)
    assert "step 9:" in output and "It is number 4 in a row" in output


@pytest.mark.timeout(300)
def test_a_spike_goes_back_as_often_as_allowed(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROKEN_KIND", "large")
    monkeypatch.setenv("BROKEN_SAMPLES", "61 78")  # of step 8, and of the one in its place after the rollback
    options = {"spike": "rollback", "spike_window_steps": 8, "spike_score": 10.0, "max_rollbacks": 1}
    config, run = config_for(tmp_path, corpus, ranks=1, **options), tmp_path / "run"
    output = finish(struck_command(tmp_path, config, ranks=1), tmp_path / "log", expected=1)
    assert "step 8: the loss rose to" in output and "above" in output
    assert "went back to step 4 and passed over samples 32 to 63 (rollback 1 of at most 1)" in output
    assert "error: step 6: the loss rose to" in output and "faults.max_rollbacks is 1" in output
    assert (run / "checkpoints" / "step-00000004" / "COMMITTED").exists()
