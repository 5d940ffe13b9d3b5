"""Slurm's commands: options of sbatch that stay what they are, submitting, and looking at the queue."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# An #SBATCH line ends at a newline, and sbatch has quotes of its own: only characters that it takes as is.
VALUES = {
    "job-name": r"[A-Za-z0-9_.:=@+-]+",
    "partition": r"[A-Za-z0-9_.:@,+-]+",
    "account": r"[A-Za-z0-9_.:@+-]+",
    "qos": r"[A-Za-z0-9_.:@+-]+",
    "time": r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED",
    "constraint": r"[A-Za-z0-9_.:,&|*()\[\]-]+",
    "reservation": r"[A-Za-z0-9_.:@,+-]+",
}
_OTHER_NAME, _OTHER_VALUE = r"[a-z][a-z-]+", r"[A-Za-z0-9_.:,@+*=/\[\]-]*"
# What scripts say themselves: twice it would contradict. The second set is said by scripts of trainings only.
_OF_SCRIPTS = {"export", "open-mode", "output", "parsable", "wait", "wrap"}
OF_TRAININGS = {
    "array", "cpus-per-task", "dependency", "gpus-per-node", "kill-on-invalid-dep", "nodes", "ntasks-per-node",
    "requeue", "signal",
}  # fmt: skip
_ANSWER_S = 30.0  # a busy controller takes seconds


class QueueEntry(NamedTuple):
    """What squeue says of a job."""

    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it waits
    restarts: int


def option(name: str, value: str, *, taken: Collection[str] = ()) -> str:
    """`--name=value` as it may stand in an #SBATCH line; `--name` for an empty value.

    Args:
        taken: names that the script says itself, beside those that every script does.

    Raises:
        ValueError: the value could leave its line or mean something to sbatch.
    """
    rule = VALUES.get(name)
    known = {*_OF_SCRIPTS, *taken}
    if rule is None and (not re.fullmatch(_OTHER_NAME, name) or name in known):
        raise ValueError(
            f"sbatch.{name}: is not allowed. A long option of sbatch without its dashes is, except "
            f"{', '.join(sorted(known))}, which the script sets itself. Correct the name."
        )
    if not re.fullmatch(rule or _OTHER_VALUE, value):
        raise ValueError(f"--{name}: {value!r} is not allowed. It must match {rule or _OTHER_VALUE}. Correct it.")
    return f"--{name}={value}" if value else f"--{name}"


def log_option(pattern: Path) -> str:
    """The option that names the log; sbatch replaces %j, %A and %a in the file's name.

    Raises:
        ValueError: sbatch would misread the folder.
    """
    folder = str(pattern.parent)
    if re.search(r'["\\%]', folder) or not folder.isprintable():
        raise ValueError(
            f"run.folder: {folder!r} cannot be named in a batch script. "
            'Printable characters except ", \\ and % are allowed. Choose another folder.'
        )
    return f'--output="{pattern}"'


def submit(script: Path, environment: Mapping[str, str] | None = None) -> str:
    """Hand the script to sbatch; return the job id.

    Raises:
        RuntimeError: sbatch is missing, does not answer, or refuses, in its own words.
    """
    try:
        answer = subprocess.run(
            ["sbatch", "--parsable", str(script)],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_ANSWER_S,
            check=False,
        )
    except FileNotFoundError:
        raise RuntimeError(
            "sbatch: not found. A login node of a Slurm cluster is needed. Use --dry-run elsewhere."
        ) from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"sbatch: no answer to {script} within {_ANSWER_S:.0f} s. It may be in the queue all the same. "
            "Look with squeue before you submit again."
        ) from None
    if answer.returncode:
        raise RuntimeError(f"sbatch: refused {script} ({answer.stderr.strip()}). Correct the options that it names.")
    return answer.stdout.strip().split(";")[0]


def queue(jobs: Sequence[str]) -> dict[str, QueueEntry] | None:
    """Those of the jobs that wait or run, by id (ARRAY_INDEX for an element of an array).

    Returns:
        None where that cannot be known: there is no squeue, or it does not answer.
    """
    if not jobs or shutil.which("squeue") is None:
        return {} if not jobs else None
    # All jobs of the user, since one unknown id makes squeue fail; --array: an element a line, waiting ones too.
    command = ["squeue", "--me", "--array", "--noheader", "--Format=JobArrayID:64,State:24,RestartCnt:12,Reason:64"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode:
        return None
    found = {}
    for line in answer.stdout.splitlines():
        job, state, restarts, *reason = line.split(maxsplit=3)
        found[job] = QueueEntry(state, reason[0].strip() if reason else "", int(restarts))
    return {job: found[job] for job in jobs if job in found}


def outer_environment() -> dict[str, str]:
    """This environment without what Slurm tells the processes of a job: for a job that is submitted from within one."""
    kept = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CLUSTER_NAME")
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM") or name in kept}
