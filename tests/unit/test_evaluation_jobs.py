"""Evaluations as jobs of Slurm's, against a stand-in for sbatch that runs the script at once, and the watcher."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import dispersion_pretrain  # noqa: F401  (before transformers, which imports torchvision)

# isort: split
import pytest

from dispersion_pretrain import checkpoint, evaluate, evaluation_jobs, retention
from dispersion_pretrain.evaluation_jobs import finish_submissions, pending_evaluations, start_evaluation_job
from small_run import launch_script, save_step, small_model, small_settings, write_corpus, write_run
from unit.test_slurm_script import shellcheck

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = str(ROOT / "configs" / "eval" / "offline.yaml")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Path:
    return write_run(tmp_path / "it's a run", small_settings(corpus), corpus / "tokenizer", steps=(10, 100))


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder: `queue` is what squeue prints, `calls` has a line for each sbatch, `refusal` makes it refuse."""
    folder = tmp_path / "slurm"
    (folder / "bin").mkdir(parents=True)
    programs = {
        "squeue": f"cat '{folder}/queue'",
        "sbatch": f"if [ -e '{folder}/refusal' ]; then echo 'no such partition' >&2; exit 1; fi\n"
        f"echo \"${{@: -1}}\" >> '{folder}/calls'; env > '{folder}/environment'; echo '77;cluster'",
    }
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    return folder


def start(run: Path, **sbatch: str) -> Path:
    start_evaluation_job(run, 10, OFFLINE, via="slurm", sbatch=sbatch)
    finish_submissions()
    return evaluate.evaluation_folder(run, "offline", 10)


def test_job_of_slurm_evaluates_its_checkpoint_once_and_is_no_part_of_the_training_job(
    run: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    folder = start(run, partition="small", gpus="1")
    script = (folder / "job.sh").read_text()
    assert "#SBATCH --job-name=it_s_a_run-offline-10\n#SBATCH --partition=small\n#SBATCH --gpus=1\n" in script
    checked = subprocess.run([shellcheck(), str(folder / "job.sh")], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    told = dict(line.partition("=")[::2] for line in (slurm / "environment").read_text().splitlines())
    assert told["SLURM_CONF"] == "/etc/slurm.conf"
    assert not {"SLURM_JOB_ID", "SLURM_NTASKS", "RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"} & set(told)

    (slurm / "queue").write_text("77 PENDING 0 Resources\n")
    assert pending_evaluations(run) == {10}
    start(run)
    assert len((slurm / "calls").read_text().splitlines()) == 1, "it waits in the queue already"

    command = shlex.split(script.rpartition("\nexec ")[2].replace("\\\n", ""))  # tests/cluster runs the script itself
    assert launch_script("evaluate_checkpoint").main(command[2:]) == 0
    (slurm / "queue").write_text("")
    assert pending_evaluations(run) == set()
    assert json.loads((folder / "results.json").read_text())["step"] == 10
    start(run)
    assert len((slurm / "calls").read_text().splitlines()) == 1, "it is evaluated already"


@pytest.mark.parametrize(("queue", "pending"), [("77 RUNNING 0 None\n", True), ("78 RUNNING 0 None\n", False)])
def test_checkpoint_is_kept_while_its_job_is_in_the_queue(run: Path, slurm: Path, queue: str, pending: bool) -> None:
    start(run)
    (slurm / "queue").write_text(queue)
    removed = retention.retain(run, 1, pending_evaluations(run), verified_step=100)
    assert [path.name for path in removed] == ([] if pending else ["step-00000010"])


def test_checkpoint_is_kept_while_the_queue_cannot_be_asked(run: Path, slurm: Path) -> None:
    folder = start(run)
    record = json.loads((folder / "pending").read_text())
    (folder / "pending").write_text(json.dumps(record | {"host": "elsewhere"}))
    (slurm / "bin" / "squeue").write_text("#!/bin/bash\nexit 1\n")
    assert pending_evaluations(run) == {10}


def test_refusal_of_sbatch_is_recorded_and_the_checkpoint_is_free(
    run: Path, slurm: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (slurm / "refusal").touch()
    folder = start(run)
    assert "no such partition" in json.loads((folder / "failed.json").read_text())["error"]
    assert "no such partition" in caplog.text
    assert pending_evaluations(run) == set()
    (slurm / "refusal").unlink()
    start(run)
    assert not (folder / "failed.json").exists() and (slurm / "calls").exists()


def test_option_that_is_none_is_recorded_and_nothing_is_started_without_a_way(run: Path, slurm: Path) -> None:
    folder = start(run, **{"parti tion": "small"})
    assert "sbatch.parti tion" in json.loads((folder / "failed.json").read_text())["error"]
    start_evaluation_job(run, 100, OFFLINE, via="none")
    assert not (slurm / "calls").exists()
    assert not evaluate.evaluation_folder(run, "offline", 100).exists()


def test_watcher_evaluates_what_is_committed_until_the_last_step(
    run: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small_settings(corpus)
    retention.remove(checkpoint.step_folder(run, 100))
    commits = [(20, 20), (100, 100)]  # one while the watcher sleeps, then that of the last step
    evaluated: list[str] = []

    def sleep(_: float) -> None:
        step, seed = commits.pop(0)
        save_step(run, settings, step, small_model(settings, seed=seed))

    def evaluate_or_fail(model: str, *_: Any) -> dict[str, Any]:
        evaluated.append(model.rpartition("@")[2])
        if model.endswith("@20"):
            raise OSError("the disk is on fire")
        return evaluate.evaluate_model(model, *_)

    monkeypatch.setattr(evaluation_jobs.time, "sleep", sleep)
    monkeypatch.setattr(evaluation_jobs, "evaluate_model", evaluate_or_fail)
    script = launch_script("evaluate_checkpoint")
    assert script.main(["--watch", str(run), "--suite", OFFLINE]) == 1, "one has failed"
    assert evaluated == ["10", "20", "100"], "a failure is not tried again, and does not end the watch"
    printed = capsys.readouterr()
    assert "step 20: OSError: the disk is on fire" in printed.err and "held_out_text" in printed.out
    assert (evaluate.evaluation_folder(run, "offline", 100) / "results.json").exists()


def test_watcher_keeps_to_the_steps_that_the_settings_name(
    run: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(
        text.replace("  every: null\n", "  every: 100\n").replace(
            "  every_steps: null\n  every_minutes", "  every_steps: 100\n  every_minutes"
        )
    )
    evaluated: list[str] = []

    def record(model: str, *_: Any) -> dict[str, Any]:
        evaluated.append(model.rpartition("@")[2])
        return {"results": {}, "averages": {}, "errors": {}, "suite": "s", "model": model, "step": 1}

    monkeypatch.setattr(evaluation_jobs, "evaluate_model", record)
    monkeypatch.setattr(evaluation_jobs, "format_table", lambda _: "")
    assert evaluation_jobs.watch(run, OFFLINE, evaluate.Options(), 1.0) == 0
    assert evaluated == ["100"]
