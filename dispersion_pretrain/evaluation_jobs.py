"""Evaluations beside training: started by rank 0 when a checkpoint is committed, or from outside by a watcher.

Training never waits for one and never fails with one. Each is idempotent by checkpoint and suite, so it does not matter
how often it is asked for. A checkpoint whose evaluation was started and has not ended is kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from dispersion_pretrain import checkpoint, export, heartbeat, slurm, suites
from dispersion_pretrain.evaluate import (
    EXAMPLES,
    FAILURE,
    PENDING,
    RESULTS,
    Options,
    evaluate_model,
    evaluation_folder,
    read_json,
    write_json,
    write_pending,
)
from dispersion_pretrain.settings_file import load_settings
from dispersion_pretrain.slurm_script import render_evaluation
from dispersion_pretrain.suites import Suite, format_table, load_suite

JOB_ID = "job.id"  # of an evaluation's folder: the job of Slurm's that was submitted for it

_SCRIPT = Path(__file__).resolve().parent.parent / "launch" / "evaluate_checkpoint.py"
_NICENESS = 10  # beside training a job gets about a tenth of a core that training wants too
_UNSEEN_HOST_S = 24 * 3600.0  # a process on another host cannot be looked at: believed for so long
# What would make the job take itself for a rank of the training, or use as few threads as one.
_LAUNCHER_VARIABLES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NODE_RANK"}
_LAUNCHER_PREFIXES = (
    *("MASTER_", "GROUP_", "CROSS_", "ROLE_", "TORCHELASTIC_", "ACCELERATE_", "OMP_", "KMP_", "GOMP_"),
    *("OMPI_", "PMI_", "PMIX_", "SLURM_PROCID", "SLURM_LOCALID"),
)
# Leaves the job's id whole or not at all. In a process of its own, since a busy controller answers after seconds.
_SUBMIT = 'sbatch --parsable "$1" > "$2.tmp" && mv -- "$2.tmp" "$2"'

_log = logging.getLogger(__name__)
_children: list[subprocess.Popen[bytes]] = []  # of this process, until they have ended and were waited for
_submissions: list[tuple[subprocess.Popen[bytes], Path]] = []  # those that hand an evaluation to Slurm, and its folder


def start_evaluation_job(
    run_folder: Path,
    step: int,
    suite: str,
    *,
    device: str = "cpu",
    via: Literal["local", "slurm", "none"] = "local",
    sbatch: Mapping[str, str] | None = None,
) -> None:
    """Have a committed checkpoint evaluated; never wait for it and never raise.

    Its output goes to log.txt of the evaluation's folder. On the CPU by default: on the training's own GPU it could
    take the memory that the next step needs. A failure to start is logged and written to failed.json there.

    Args:
        via: local: a process of its own, which ends with the job of Slurm's that it is in; slurm: a job of its own;
            none: nothing is started.
        sbatch: long options of such a job.
    """
    if via == "none":
        return
    folder = evaluation_folder(run_folder, Path(suite).stem, step)
    try:
        loaded = load_suite(suite)
        folder = evaluation_folder(run_folder, loaded.name, step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FAILURE).unlink(missing_ok=True)
        _remove_stale_results(run_folder, step, folder)
        command = [sys.executable, str(_SCRIPT), "--model", f"{run_folder.resolve()}@{step}"]
        command += ["--suite", str(suites.suite_path(suite).resolve()), "--device", device]
        if via == "local":
            _start(command, folder)
        elif not _is_done(folder, loaded) and not _is_queued(folder):
            _submit(command, folder, dict(sbatch or {}), f"{run_folder.resolve().name}-{loaded.name}-{step}")
    except Exception as error:  # training goes on whatever happens to an evaluation; no collective in here
        _log.warning("the evaluation of step %d cannot be started: %s", step, error)
        _record_failure(folder, f"cannot be started: {error}")


def _start(command: list[str], folder: Path) -> None:
    process = _spawn(command, folder, _job_environment(dict(os.environ)))
    _children.append(process)
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, process.pid, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)
    write_pending(folder, process.pid)


def _submit(command: list[str], folder: Path, sbatch: dict[str, str], name: str) -> None:
    (folder / JOB_ID).unlink(missing_ok=True)
    script = folder.resolve() / "job.sh"
    text = render_evaluation(sbatch, name, folder.resolve() / "log.txt", command, sys.executable)
    script.write_text(text, encoding="utf-8")
    environment = _job_environment(slurm.outer_environment())
    environment.pop("CUDA_VISIBLE_DEVICES", None)  # the training's
    process = _spawn(["bash", "-c", _SUBMIT, "submit", str(script), str(folder / JOB_ID)], folder, environment)
    _submissions.append((process, folder))
    write_pending(folder, process.pid)


def _spawn(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _is_done(folder: Path, suite: Suite) -> bool:
    """Whether these very tasks were run on the checkpoint, all of them; results of an earlier one have been removed."""
    results = read_json(folder / RESULTS)
    if results is None or results["errors"]:
        return False
    return bool(results["settings"]["identity"]["suite"] == suite.model_dump(mode="json"))


def _is_queued(folder: Path) -> bool:
    """Whether a job that was submitted before still waits: it will find what the checkpoint is by then."""
    job = _submitted_job(folder)
    entry = None if job is None else (slurm.queue([job]) or {}).get(job)
    return entry is not None and entry.state == "PENDING"


def finish_submissions(timeout_s: float = 40.0) -> None:
    """Wait until sbatch has answered, at the end of a run: Slurm ends every process of a job with it. Never raises."""
    deadline = time.monotonic() + timeout_s
    for process, _ in _submissions:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    _bury()


def pending_evaluations(run_folder: Path) -> set[int]:
    """Steps whose evaluation has started and neither ended nor died: their checkpoints are still needed."""
    _bury()
    steps = set()
    for marker in (Path(run_folder) / "evaluations").glob(f"*/step-*/{PENDING}"):
        ended = any((marker.parent / name).exists() for name in (RESULTS, FAILURE))
        record = read_json(marker)
        number = marker.parent.name.removeprefix("step-")
        if number.isdigit() and not ended and record is not None and _lives(record, marker.parent):
            steps.add(int(number))
    _bury()  # who was found dead by now
    return steps


def _bury() -> None:
    """Wait for children that have ended, and record what sbatch has refused."""
    _children[:] = [process for process in _children if process.poll() is None]
    for process, folder in _submissions:
        if process.poll():
            said = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip()[-500:]
            _log.warning("%s: sbatch refused the evaluation: %s", folder, said)
            _record_failure(folder, f"sbatch refused it: {said}")
    _submissions[:] = [(process, folder) for process, folder in _submissions if process.poll() is None]


def _record_failure(folder: Path, error: str) -> None:
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FAILURE, {"time": time.time(), "error": error})


def _remove_stale_results(run_folder: Path, step: int, folder: Path) -> None:
    """Remove results of an earlier checkpoint of this step, which a resumed run has replaced."""
    earlier = read_json(folder / RESULTS)
    current = export.checkpoint_hash(checkpoint.step_folder(run_folder, step))
    if earlier is not None and earlier["settings"]["identity"]["model"] != current:
        (folder / RESULTS).unlink()
        (folder / EXAMPLES).unlink(missing_ok=True)


def _job_environment(environment: dict[str, str]) -> dict[str, str]:
    kept = {
        name: value
        for name, value in environment.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith(_LAUNCHER_PREFIXES)
    }
    return kept | {"TQDM_MININTERVAL": "60"}  # progress bars would fill the log


def _submitted_job(folder: Path) -> str | None:
    try:
        return (folder / JOB_ID).read_text(encoding="utf-8").strip().split(";")[0] or None
    except OSError:
        return None


def _lives(record: dict[str, Any], folder: Path) -> bool:
    """Whether the process of a `pending` record is there and no other under the same number, or its job in the queue.

    What cannot be known is believed: a checkpoint too many does less harm than one too few.
    """
    if record["host"] == socket.gethostname():
        started = heartbeat.process_start(int(record["pid"]))
        if started and started == record["started"]:
            return True
    job = _submitted_job(folder) or record.get("job")
    if job is not None:
        queue = slurm.queue([job])
        if queue is not None:
            return job in queue
    return record["host"] != socket.gethostname() and time.time() - float(record["time"]) < _UNSEEN_HOST_S


def watch(run_folder: Path, suite: str, options: Options, poll_s: float) -> int:
    """Evaluate the checkpoints of a run as they are committed, until that of its last step; return how many failed.

    Those that `evaluation.every` names, or all where it names none. What fails is told and not tried again.

    Raises:
        ValueError: the suite or the folder is not what it must be.
    """
    load_suite(suite)
    tried: set[str] = set()
    failed = 0
    while True:
        settings = load_settings(run_folder / "config.yaml")
        found = sorted(checkpoint.candidates(run_folder))
        for step, path in found:
            if settings.evaluation.every is not None and step % settings.evaluation.every:
                continue
            try:
                identity = export.checkpoint_hash(path)
                if identity in tried:
                    continue
                tried.add(identity)
                results = evaluate_model(f"{run_folder}@{step}", suite, None, options)
            except Exception as error:  # whatever a task raises: the next checkpoint may be fine
                print(f"step {step}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                failed += 1
                continue
            print(f"step {step}\n{format_table(results)}", flush=True)
            failed += bool(results["errors"])
        if found and found[-1][0] >= settings.num_steps:
            return failed
        time.sleep(poll_s)
