"""Kill everything, run the same command again: the losses are those of an undisturbed run, bit for bit."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from integration.jobs import Job, finish, pretrain_command, records, trajectory, write_config


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(pretrain_command(write_config(folder, corpus), launcher="warm"), folder / "log")
    return folder / "run"


def test_undisturbed_run_is_whole(undisturbed: Path) -> None:
    steps = trajectory(undisturbed)
    assert sorted(steps) == list(range(13)), "step 0 is the validation before training"
    assert steps[12]["loss/cross_entropy"] < steps[1]["loss/cross_entropy"] - 0.3
    assert {path.name for path in (undisturbed / "checkpoints").iterdir()} == {"step-00000008", "step-00000012"}
    coefficients = [steps[step]["dispersion/coefficient"] for step in range(1, 13)]
    assert coefficients[0] == 0.025 and 0 < max(coefficients[4:]) < 0.05, "the bound on the gradient ratio must act"
    assert all(
        "loss/dispersion" in steps[step] and "dispersion/cosine/layer_02" in steps[step] for step in range(1, 13)
    )


@pytest.mark.timeout(400)
def test_sigkill_at_a_random_step(undisturbed: Path, corpus: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    generator = random.Random(seed)
    config, run = write_config(tmp_path, corpus), tmp_path / "run"
    step, delay = generator.randrange(1, 12), generator.random() * 0.05
    print(f"kill after step {step} + {delay:.3f} s (seed {seed})")
    job = Job(pretrain_command(config), tmp_path / "log")
    job.wait_for(lambda: any(record["step"] >= step and "loss/total" in record for record in records(run)))
    time.sleep(delay)
    job.kill()
    finish(pretrain_command(config), tmp_path / "log")
    assert trajectory(run) == trajectory(undisturbed)
    first = [record["step"] for record in records(run)]
    assert len(first) >= 12


@pytest.mark.timeout(400)
def test_sigkill_in_the_middle_of_a_save(undisturbed: Path, corpus: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path, corpus), tmp_path / "run"
    saving = run / "checkpoints" / ".saving-step-00000008"
    job = Job(pretrain_command(config, launcher="warm"), tmp_path / "log")
    job.wait_for(saving.exists)
    job.kill()
    assert not (run / "checkpoints" / "step-00000008" / "COMMITTED").exists(), "the save was over before the kill"
    finish(pretrain_command(config, launcher="warm"), tmp_path / "log")
    again = [record["step"] for record in records(run)]
    assert again.count(5) == 2, "the second start went on from step 4"
    assert trajectory(run) == trajectory(undisturbed)


def test_sigterm_saves_and_asks_to_be_started_again(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path, corpus, checkpoint={"every_steps": 1000}, training={"micro_batch": 4})
    job = Job(pretrain_command(config, ranks=1, launcher="python"), tmp_path / "log")
    job.wait_for(lambda: any("loss/total" in record for record in records(run)))
    psutil.Process(job.process.pid).send_signal(signal.SIGTERM)
    assert job.wait() == 85, job.output()
    done = max(record["step"] for record in records(run))
    assert done < 12
    assert (run / "checkpoints" / f"step-{done:08d}" / "COMMITTED").exists()
    finish(pretrain_command(config, ranks=1, launcher="warm"), tmp_path / "log")
    assert sorted(trajectory(run)) == list(range(13))
    counts = [record["step"] for record in records(run) if "loss/total" in record]
    assert counts == list(range(1, 13)), "no step was lost and none done twice"


@pytest.mark.timeout(400)
def test_time_limit_saves_and_the_resume_is_exact(undisturbed: Path, corpus: Path, tmp_path: Path) -> None:
    config, run = write_config(tmp_path, corpus), tmp_path / "run"
    output = finish(pretrain_command(config, "run.max_time=0:00:01"), tmp_path / "log", expected=85)
    assert "stopped by run.max_time: " in output and "step 1, state saved" in output
    assert (run / "checkpoints" / "step-00000001" / "COMMITTED").exists()
    finish(pretrain_command(config, launcher="warm"), tmp_path / "log")
    assert trajectory(run) == trajectory(undisturbed)


def test_resume_of_another_run_is_refused(undisturbed: Path, corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    other = [f"run.folder={undisturbed}", "run.seed=4"]
    output = finish(pretrain_command(config, *other, launcher="warm"), tmp_path / "log", expected=1)
    assert "run.seed was 3 and is 4" in output
    refused = [f"run.folder={undisturbed}", "training.micro_batch=4", "--resume", "none"]
    output = finish(pretrain_command(config, *refused, ranks=1, launcher="warm"), tmp_path / "log2", expected=1)
    assert "has checkpoints" in output
