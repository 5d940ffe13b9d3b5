"""Jobs in a real Slurm: the time limit, a node that goes, a person who stops them, and an array of seeds.

One job goes through all of it, and its losses are those of a run that nothing disturbed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cluster.slurm_cluster import SlurmCluster, wait_for
from dispersion_pretrain import checkpoint
from dispersion_pretrain.evaluation_jobs import pending_evaluations, start_evaluation_job
from dispersion_pretrain.run_list import list_runs
from integration.jobs import ROOT, environment, finish, pretrain_command, records, trajectory, write_config

NASTY = '$(touch x) `touch x` it\'s; "two" words * # ${HOME} \\ é'
CHECKPOINT_STEPS = 20

pytestmark = pytest.mark.timeout(600)  # the job of all tests is part of the one that comes first


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    with SlurmCluster(3) as cluster:
        yield cluster


def submit(cluster: SlurmCluster, config: Path, *arguments: str, expected: int = 0) -> str:
    """Submit on CPUs; return the job's number, or the message where it is to be refused."""
    command = [sys.executable, str(ROOT / "launch" / "submit_slurm.py"), "--config", str(config)]
    command += ["--gpus-per-node", "0", "--cpus-per-task", "1", *arguments]
    variables = {**environment(), **cluster.environment}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == expected, done.stdout + done.stderr
    if expected:
        return done.stderr
    return re.search(r"^job +(\d+): ", done.stdout, re.MULTILINE)[1]  # type: ignore[index]


def settings_of(folder: Path, corpus: Path, **training: object) -> Path:
    """A run without an end of its own, whose first steps do not depend on when it ends."""
    return write_config(
        folder, corpus, training={"max_tokens": 10**8, **training}, schedule={"kind": "constant"}, validation=None,
        checkpoint={"every_steps": CHECKPOINT_STEPS, "keep_last": 1}, faults={"hang_s": 120}, run={"doctor": False},
        evaluation={"via": "slurm", "sbatch": {"time": "5", "cpus-per-task": "1", "hold": ""}},
    )  # fmt: skip


def last_step(run: Path) -> int:
    return max((record["step"] for record in records(run)), default=0)


@pytest.fixture(scope="module")
def disturbed(slurm: SlurmCluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run on two nodes: warned of its time limit, deprived of a node, stopped, submitted again, and ended."""
    folder = tmp_path_factory.mktemp("disturbed")
    config, run = settings_of(folder, corpus), folder / "run"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    job = submit(slurm, config, "--nodes", "2", "--time", "30", "--notice", "200")
    log = run / "slurm" / f"{job}.log"

    def explain() -> str:
        return f"{slurm.job(job)}\n{log.read_text()[-3000:] if log.exists() else ''}\n{slurm.logs()}"

    def trains_again(restarts: int, after: int) -> bool:
        found = slurm.job(job)
        assert found["JobState"] not in ("FAILED", "CANCELLED", "COMPLETED", "TIMEOUT"), explain()
        return found["Restarts"] == str(restarts) and found["JobState"] == "RUNNING" and last_step(run) >= after

    listed = []

    def look() -> None:
        with pytest.MonkeyPatch.context() as context:
            for name, value in slurm.environment.items():
                context.setenv(name, value)
            (found,) = list_runs([folder])
        listed.append((found.state, found.job))

    # Slurm looks at limits, which are whole minutes, every 30 s: this one leaves it 45 s to 105 s for its warning.
    wait_for(lambda: trains_again(0, 20), 150, explain)
    hours, minutes, seconds = (int(part) for part in slurm.job(job)["RunTime"].split(":"))
    limit = (hours * 3600 + minutes * 60 + seconds + 45) // 60 + 1
    slurm.call("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    # For a moment the requeued job is still COMPLETING. Then it is PENDING for two minutes, longer than a look takes.
    wait_for(lambda: (slurm.job(job)["Restarts"], slurm.states()[job]) == ("1", "PENDING"), 100, explain)
    look()
    slurm.call("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    warned = last_step(run)
    wait_for(lambda: trains_again(1, warned + 20), 150, explain)
    look()
    second = submit(slurm, config, "--nodes", "2", expected=2)

    nodes = slurm.call("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).split()
    slurm.power_off(nodes[1])
    wait_for(lambda: slurm.job(job)["Restarts"] == "2", 60, explain)
    down = last_step(run)
    wait_for(lambda: trains_again(2, down + 5), 150, explain)
    spared = slurm.call("scontrol", "show", "hostnames", slurm.job(job)["NodeList"]).split()

    slurm.call("scancel", "--batch", "--signal=TERM", job)
    wait_for(lambda: slurm.job(job)["JobState"] == "FAILED", 60, explain)
    stopped, ended = last_step(run), slurm.job(job)
    steps = (stopped // CHECKPOINT_STEPS + 1) * CHECKPOINT_STEPS
    overrides = [f"training.max_tokens={512 * steps}", f"evaluation.every={CHECKPOINT_STEPS}"]
    again = submit(slurm, config, "--nodes", "2", "--override", *overrides)
    wait_for(lambda: slurm.job(again)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"), 150, slurm.logs)
    look()
    return SimpleNamespace(
        folder=folder, run=run, job=job, log=log.read_text(), second=second, nodes=nodes, spared=spared, ended=ended,
        again=slurm.job(again), again_log=(run / "slurm" / f"{again}.log").read_text(), steps=steps, warned=warned,
        stopped=stopped, listed=listed, again_job=again, commit=commit,
    )  # fmt: skip


def test_job_is_warned_of_its_limit_saves_and_is_requeued(disturbed: SimpleNamespace) -> None:
    assert f"stopped by SIGUSR1: step {disturbed.warned}, state saved" in disturbed.log
    requeue = "exit code 85: saved before the announced end of the job"
    assert f"{requeue}: requeue 1 of at most 50" in disturbed.log
    lines = (disturbed.run / "slurm" / "requeues.jsonl").read_text().splitlines()
    assert len(lines) == 1, "neither a failed node nor a person's stop is a requeue of the script's"
    line = json.loads(lines[0])
    assert (line["job"], line["requeue"], line["exit_code"], line["reason"]) == (disturbed.job, 1, 85, requeue)


def test_job_goes_on_without_the_node_that_failed(disturbed: SimpleNamespace) -> None:
    assert disturbed.nodes[1] not in disturbed.spared and len(disturbed.spared) == 2


def test_stop_saves_and_is_no_requeue_and_the_same_command_goes_on(disturbed: SimpleNamespace) -> None:
    assert "stopped by SIGTERM, exit code 85; submit again to resume" in disturbed.log
    assert (disturbed.ended["Restarts"], disturbed.ended["ExitCode"]) == ("2", "85:0")
    assert f"step {disturbed.stopped}, state saved" in disturbed.log
    assert disturbed.again["JobState"] == "COMPLETED", disturbed.again_log
    assert "resume: data and random state exact" in disturbed.again_log


def test_list_of_runs_tells_where_it_stood(disturbed: SimpleNamespace) -> None:
    first, again = disturbed.job, disturbed.again_job
    assert disturbed.listed == [("requeued", first), ("running", first), ("ended", again)]


def test_second_job_for_a_run_is_refused(disturbed: SimpleNamespace) -> None:
    assert f"job {disturbed.job} of this run is in the queue (RUNNING)" in disturbed.second


def test_losses_are_those_of_an_undisturbed_run_without_slurm(
    disturbed: SimpleNamespace, corpus: Path, tmp_path: Path
) -> None:
    config = settings_of(tmp_path, corpus, max_tokens=512 * disturbed.steps)
    finish(pretrain_command(config, launcher="torchrun"), tmp_path / "log")
    expected = trajectory(tmp_path / "run")
    assert len(expected) == disturbed.steps and trajectory(disturbed.run) == expected


def test_evaluation_is_a_job_of_its_own_that_protects_its_checkpoint_and_scores_at_its_step(
    disturbed: SimpleNamespace, slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    folder = disturbed.run / "evaluations" / "offline" / f"step-{disturbed.steps:08d}"
    job = (folder / "job.id").read_text().strip()
    assert slurm.job(job)["Reason"] == "JobHeldUser"
    assert pending_evaluations(disturbed.run) == {disturbed.steps}
    start_evaluation_job(disturbed.run, disturbed.steps, "configs/eval/offline.yaml", via="slurm")
    assert (folder / "job.id").read_text().strip() == job, "what waits already is not submitted again"

    slurm.call("scontrol", "release", job)
    wait_for(lambda: slurm.job(job)["JobState"] == "COMPLETED", 120, lambda: (folder / "log.txt").read_text())
    assert pending_evaluations(disturbed.run) == set()
    scores = json.loads((folder / "results.json").read_text())["results"]["held_out_text"]
    board = EventAccumulator(str(disturbed.run / "tensorboard" / "evaluation")).Reload()
    found = {event.step: event.value for event in board.Scalars("evaluation/held_out_text/bits_per_byte")}
    assert found == {disturbed.steps: pytest.approx(scores["bits_per_byte"], rel=1e-6)}
    start_evaluation_job(disturbed.run, disturbed.steps, "configs/eval/offline.yaml", via="slurm")
    assert (folder / "job.id").read_text().strip() == job, "what was evaluated is not submitted again"


def test_code_of_a_submission_is_kept_beside_its_settings(disturbed: SimpleNamespace) -> None:
    submissions = sorted(path.parent for path in (disturbed.run / "slurm").glob("*/submission.json"))
    assert len(submissions) == 2
    assert f"commit: {disturbed.commit}" in (submissions[0] / "code.txt").read_text()
    for folder in submissions:
        assert (folder / "code.txt").read_text().startswith("commit: ")
        assert (folder / "config.yaml").exists() and (folder / "job.sh").exists()


def test_array_of_seeds_with_values_that_are_no_commands(slurm: SlurmCluster, corpus: Path, tmp_path: Path) -> None:
    awkward = tmp_path / f"corpus {NASTY.replace('/', '')}"
    shutil.copytree(corpus, awkward)
    config = settings_of(tmp_path, awkward)
    job = submit(
        slurm, config, "--nodes", "1", "--array", "3-4", "--export", f"NASTY={NASTY}", "--override",
        "run.folder=" + str(tmp_path / "it's $(touch x) run"), "training.micro_batch=4", "--time", "10",
    )  # fmt: skip
    runs = [tmp_path / f"it's $(touch x) run-seed{seed}" for seed in (3, 4)]
    sweep = next((tmp_path / "sweeps").iterdir())

    def explain() -> str:
        return "\n".join(path.read_text()[-2000:] for path in sweep.glob("*.log")) + slurm.logs()

    wait_for(lambda: all(last_step(run) > CHECKPOINT_STEPS for run in runs), 150, explain)
    ranks = [process for process in slurm.processes() if process.environ().get("LOCAL_RANK") == "0"]
    assert ranks and {process.environ()["NASTY"] for process in ranks} == {NASTY}
    losses = [{record["step"]: record.get("loss/total") for record in records(run)}[1] for run in runs]
    assert losses[0] != losses[1], "each seed is a run of its own"

    # The last element's own id is that of the array: requeued by it, all elements would be.
    assert slurm.job(f"{job}_1")["JobId"] == job
    slurm.call("scancel", "--batch", "--signal=USR1", f"{job}_1")
    wait_for(lambda: slurm.job(f"{job}_1")["Restarts"] == "1", 60, explain)
    assert (slurm.job(f"{job}_0")["Restarts"], slurm.job(f"{job}_0")["JobState"]) == ("0", "RUNNING")

    slurm.call("scancel", f"{job}_0")
    wait_for(lambda: slurm.job(f"{job}_0")["JobState"] == "CANCELLED", 60, explain)
    newest = max(checkpoint.candidates(runs[0]))[1]
    assert checkpoint.verify(newest) == []
    assert not (runs[0] / "slurm" / "requeues.jsonl").exists()

    saved = last_step(runs[1])
    wait_for(lambda: last_step(runs[1]) > saved, 120, explain)
    assert "resume: data and random state exact" in (sweep / f"{job}_1.log").read_text()
    slurm.call("scancel", job)
    assert not [path for path in tmp_path.rglob("x") if path.name == "x"], "a value was run as a command"
    assert not (ROOT / "x").exists() and not Path(os.environ.get("HOME", "/"), "x").exists()
