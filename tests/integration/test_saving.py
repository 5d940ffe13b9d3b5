"""Saves through DeepSpeed and through the real job: what is written while training goes on, and what fails."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest

from dispersion_pretrain import checkpoint, distributed, saving
from dispersion_pretrain.engine import DeepSpeedEngine, start_distributed
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.metrics import StepTotals
from dispersion_pretrain.objective import TrainingModule
from dispersion_pretrain.saving import Description, Saves
from dispersion_pretrain.train import train_step
from integration.jobs import Job, finish, pretrain_command, records, trajectory, write_config
from integration.test_baselines_zero import build, context_for, micro_batches, settings_for
from spawn import run_ranks

# stage, precision, tied embeddings
CASES = [(0, "float32", True), (0, "bf16", True), (1, "bf16", False), (2, "float32", True), (3, "bf16", True),
         (3, "float32", False)]  # fmt: skip


def _train_while_saving(folder: Path) -> dict[Any, Any]:
    """Save twice with a disk that writes only after two more steps: for all nodes, and on a disk of each rank's own."""
    device = start_distributed()
    disk_is_ready, write_file = threading.Event(), saving.write_file

    def wait_and_write(path: Path, content: Any) -> dict[str, Any]:
        assert disk_is_ready.wait(60)
        return write_file(path, content)

    saving.write_file = wait_and_write
    found = {}
    for case in CASES:
        stage, precision, tied = case
        settings = settings_for(stage, precision, tied, 4)
        layout = BatchLayout.derive(settings, distributed.world_size())

        def engine_of(settings: Any = settings, layout: BatchLayout = layout) -> DeepSpeedEngine:
            return DeepSpeedEngine(TrainingModule(build(settings), None), settings, layout)

        def train(engine: DeepSpeedEngine, step: int, layout: BatchLayout = layout) -> float:
            totals = StepTotals()
            engine.set_learning_rate(1e-2 / (step + 1))
            batches = iter(micro_batches(step, layout, distributed.rank()))
            train_step(engine, batches, context_for(step, layout), totals, device)
            return totals.reduce()["cross_entropy"]

        place = folder / "-".join(map(str, case))
        local = checkpoint.local_tier(place / f"disk-{distributed.rank()}", place / "run", {"stage": stage})
        saves = Saves(place / "run", local=local)
        engine = engine_of()
        losses = [train(engine, 0), train(engine, 1)]
        for tier, step in ((saves.shared, 2), (local, 4)):
            disk_is_ready.clear()
            saves.begin(tier, step)
            engine.save(saves.take, whole_model=tier.leads)
            saves.take_rank_state({})
            saves.write(Description(step, 0, 0, 2))
            losses += [train(engine, step), train(engine, step + 1)]
            assert saves.poll() == []
            disk_is_ready.set()
            saves.finish()
            assert [saved.error for saved in saves.poll()] == [None]
        again = {}
        for tier, step in ((saves.shared, 2), (local, 4)):
            resumed = engine_of()
            resumed.load(checkpoint.step_folder(tier.run_folder, step))
            again[step] = [train(resumed, number) for number in range(step, 6)]
        distributed.barrier()
        newest, _ = checkpoint.find_newest_good(place / "run", local)
        assert newest is not None
        found[case] = (losses, again, newest.path == checkpoint.step_folder(local.run_folder, 4))
    return found


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_resume_repeats_what_was_trained_while_the_files_were_written(tmp_path: Path) -> None:
    first, second = run_ranks(_train_while_saving, 2, tmp_path, timeout_s=350)
    assert first == second
    for case, (losses, again, newest_is_local) in first.items():
        assert len(set(losses)) == 6, case
        assert again == {2: losses[2:], 4: losses[4:]}, case
        assert newest_is_local, case


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A function that mounts so many KiB at a folder."""
    mounted: list[Path] = []

    def mount(folder: Path, size_kib: int) -> None:
        folder.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kib}k", "none", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_run_goes_on_when_its_disk_is_full_and_ends_with_an_error(
    corpus: Path, tmp_path: Path, small_disk: Any
) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path, corpus, dispersion=None, validation=None)
    small_disk(run / "checkpoints", 100)
    output = finish(pretrain_command(config, "run.doctor=false", launcher="warm"), tmp_path / "log", expected=1)
    written = records(run)
    assert [record["step"] for record in written if "loss/total" in record] == list(range(1, 13))
    assert [record["step"] for record in written if record.get("checkpoint/failed")] == [4, 8, 12]
    assert "the checkpoint of step 4 was not saved: rank" in output and "No space left on device" in output
    assert "error: " in output and "the state at step 12 was not saved" in output
    assert not list((run / "checkpoints").iterdir()), "what was written of them takes no room"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sigkill_between_the_tiers_saves(corpus: Path, tmp_path: Path) -> None:
    tiers = {"every_steps": 6, "local_folder": str(tmp_path / "disk"), "local_every_steps": 2}
    config, run = write_config(tmp_path, corpus, checkpoint=tiers), tmp_path / "run"
    job = Job(pretrain_command(config, launcher="warm"), tmp_path / "log")
    job.wait_for(lambda: len(list((tmp_path / "disk").glob("run-*/checkpoints/step-00000004/COMMITTED"))) == 1)
    job.kill()
    before = trajectory(run)
    output = finish(pretrain_command(config, launcher="warm"), tmp_path / "log")
    steps = [record["step"] for record in records(run) if "loss/total" in record]
    assert len(before) >= 5 and steps.count(4) == 1 and sorted(set(steps)) == list(range(1, 13)), output
    after = trajectory(run)
    assert all(after[step] == before[step] for step in before if step > 4 and "loss/total" in before[step])
    assert checkpoint.committed_steps(run) == [6, 12]
    (place,) = (tmp_path / "disk").glob("run-*")
    assert checkpoint.committed_steps(place) == [10], "the newest only; with step 6 and 12 the run folder has its own"
