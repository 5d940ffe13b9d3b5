"""From settings to a job in Slurm's queue: what is trained, what is kept of it, and the record of it in the run folder.

A sweep is one array: one call of sbatch, one id to hold or cancel, a bound of elements at a time, and one readable
script; each element trains a run with a folder of its own and is requeued by itself.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dispersion_pretrain import provenance, slurm
from dispersion_pretrain.cluster_file import ClusterSettings
from dispersion_pretrain.config import Settings
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.settings_file import dump_settings
from dispersion_pretrain.slurm_script import Origin, Submission, render_script, sbatch_options

RECORD = "submission.json"  # of a submission's folder in RUN/slurm


@dataclass(frozen=True)
class Job:
    """What `prepare` found to be in order: nothing is written yet."""

    cluster: ClusterSettings
    settings: list[Settings]
    runs: list[Submission]
    script: Path
    text: str
    log: Path  # with sbatch's %j, or %A and %a


def seeded(settings: Settings, seed: int) -> Settings:
    """The same run from another seed, with a name and a folder of its own."""
    changes: dict[str, Any] = {"seed": seed, "name": f"{settings.run.name}-seed{seed}"}
    if settings.run.folder:
        changes["folder"] = f"{settings.run.folder.rstrip('/')}-seed{seed}"
    return settings.model_copy(update={"run": settings.run.model_copy(update=changes)})


def prepare(
    settings: Sequence[Settings],
    cluster: ClusterSettings,
    origin: Origin,
    *,
    name: str | None = None,
    dependency: str | None = None,
    at_once: int | None = None,
) -> Job:
    """Check everything that can be known before the queue, and render the script.

    Args:
        settings: of the runs, one an element of the array.
        name: of the job; None: that of the first run.

    Raises:
        ValueError: a run does not fit the ranks, two runs would share a folder, or a value does not fit into a script.
    """
    folders = [each.run_folder.absolute() for each in settings]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ValueError(
                f"run.folder: {folder} would be that of {folders.count(folder)} runs. One run a folder is allowed. "
                "Give the configs names of their own (run.name)."
            )
    kept = []
    for each in settings:
        # Called for its checks: what does not divide is refused here and not after hours in the queue.
        BatchLayout.derive(each, cluster.world_size)
        if each.evaluation.via == "slurm" and not each.evaluation.sbatch:
            evaluation = each.evaluation.model_copy(update={"sbatch": cluster.evaluation})
            each = each.model_copy(update={"evaluation": evaluation})
        for key, value in each.evaluation.sbatch.items():
            slurm.option(key, value)
        kept.append(each)
    # A folder for each submission: a queued job keeps reading the settings that it was submitted with.
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
    runs = [Submission(folder, folder / "slurm" / stamp / "config.yaml") for folder in folders]
    if len(runs) == 1:
        script, log = runs[0].snapshot.with_name("job.sh"), folders[0] / "slurm" / "%j.log"
    else:
        sweep = Path(os.path.commonpath([folder.parent for folder in folders])) / "sweeps" / stamp
        script, log = sweep / "job.sh", sweep / "%A_%a.log"
    options = sbatch_options(
        cluster, name or settings[0].run.name, log, dependency=dependency, elements=len(runs), at_once=at_once
    )
    return Job(cluster, kept, runs, script, render_script(options, cluster, runs, origin), log)


def refuse_second_job(job: Job, after: Sequence[str]) -> None:
    """Raise where a job that is not in `after` trains one of these runs, or waits to.

    Raises:
        ValueError: names run and job.
    """
    earlier = {record["job"]: run.folder for run in job.runs for record in read_records(run.folder)}
    for number, entry in (slurm.queue(list(earlier)) or {}).items():
        if number not in after and number.split("_")[0] not in after:
            raise ValueError(
                f"{earlier[number]}: job {number} of this run is in the queue ({entry.state}). One job at a time may "
                f"train a run. Wait, cancel it, or submit with --after any:{number}."
            )


def submit(job: Job, command: Sequence[str]) -> list[dict[str, Any]]:
    """Write settings, code state and script, hand it to sbatch, and record it in the run folders.

    Returns:
        A record a run: job, run, log, script, time, nodes, ranks, command.

    Raises:
        RuntimeError: sbatch is missing or refuses.
    """
    for run, settings in zip(job.runs, job.settings, strict=True):
        run.snapshot.parent.mkdir(parents=True)
        run.snapshot.write_text(dump_settings(settings), encoding="utf-8")
        provenance.save_code_state(run.snapshot.parent)
    job.script.parent.mkdir(parents=True, exist_ok=True)
    job.script.write_text(job.text, encoding="utf-8")
    number = slurm.submit(job.script)
    records = []
    for index, run in enumerate(job.runs):
        element = number if len(job.runs) == 1 else f"{number}_{index}"
        log = str(job.log).replace("%j", number).replace("%A", number).replace("%a", str(index))
        record = {
            "job": element,
            "run": str(run.folder),
            "log": log,
            "script": str(job.script),
            "time": time.time(),
            "nodes": job.cluster.nodes,
            "ranks": job.cluster.world_size,
            "command": shlex.join(command),
        }
        (run.snapshot.parent / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        records.append(record)
    return records


def read_records(run_folder: Path) -> list[dict[str, Any]]:
    """What `submit` recorded for a run, oldest first; what is not whole is left out."""
    records = []
    for path in sorted((run_folder / "slurm").glob(f"*/{RECORD}")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and isinstance(record.get("job"), str):
            records.append(record)
    return records


def parse_after(jobs: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return sbatch's dependency, and the jobs, of `JOB`, `ok:JOB` (the same) or `any:JOB`.

    Raises:
        ValueError: one of them is something else.
    """
    kinds: dict[str, list[str]] = {}
    for text in jobs:
        match = re.fullmatch(r"(?:(ok|any):)?(\d+(?:_\d+)?)", text)
        if match is None:
            raise ValueError(
                f"--after: {text!r} is not allowed. A job's number, or any: before one to start however it ended, is. "
                "Correct it."
            )
        kinds.setdefault(match[1] or "ok", []).append(match[2])
    dependency = ",".join(f"after{kind}:{':'.join(numbers)}" for kind, numbers in kinds.items())
    return dependency or None, [number for numbers in kinds.values() for number in numbers]


def parse_seeds(texts: Sequence[str]) -> list[int]:
    """Seeds of `3`, `0-4`, or several of them. Raises ValueError."""
    seeds: list[int] = []
    for text in texts:
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ValueError(
                f"--array: {text!r} is not allowed. A seed such as 3, or seeds such as 0-4 are. Correct it."
            )
        seeds += range(first, last + 1)
    twice = sorted({seed for seed in seeds if seeds.count(seed) > 1})
    if twice:
        raise ValueError(f"--array: seed {twice[0]} is there twice. Once is allowed. Leave one out.")
    return seeds
