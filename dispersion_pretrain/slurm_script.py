"""The batch scripts: every value is quoted by the template engine, so that it arrives as it is.

One Slurm task is one rank, started by srun itself. A launcher on each node would stand between Slurm and the ranks.
torchrun turns every exit code into 1, so that a rank could not ask to be requeued; it keeps its workers in sessions of
their own, where Slurm's signals do not reach them, and gives them 30 s to save. deepspeed needs ssh or a hostfile.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from dispersion_pretrain import exit_codes, slurm
from dispersion_pretrain.cluster_file import ClusterSettings

CRASH_WAIT_S = 300  # between the first rank that ends and the end of all; covers the slowest ordinary end
_ROOT = Path(__file__).resolve().parent.parent


class Submission(NamedTuple):
    """One run of a job: its folder, and the settings that were kept for this submission."""

    folder: Path
    snapshot: Path


class Origin(NamedTuple):
    """Where the job was asked for, and how."""

    command: str  # for a comment
    python: str  # the interpreter on the compute nodes
    working_folder: Path


class _Verbatim(str):
    """Text that the template takes as it is; everything else is quoted for the shell."""


def _finalize(value: Any) -> str:
    if isinstance(value, _Verbatim):
        return value
    if isinstance(value, list):
        return " \\\n    ".join(shlex.quote(str(part)) for part in value)
    return shlex.quote(str(value))


def sbatch_options(
    cluster: ClusterSettings,
    name: str,
    log: Path,
    *,
    dependency: str | None = None,
    elements: int = 1,
    at_once: int | None = None,
) -> list[str]:
    """The job's #SBATCH options.

    Args:
        log: file with sbatch's %j, or %A and %a.
        dependency: as sbatch takes it, such as afterok:7.
        elements: of an array; 1: none.
        at_once: elements that may run at a time; None: all.

    Raises:
        ValueError: a value that could leave its line or mean something to sbatch.
    """
    options = [slurm.option("job-name", name)]
    options += [slurm.option(key, value) for key, value in cluster.options.items()]
    options += [
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={cluster.tasks_per_node}",
        f"--cpus-per-task={cluster.cpus_per_task}",
    ]
    if cluster.gpus_per_node:
        options.append(f"--gpus-per-node={cluster.gpus_per_node}")
    if elements > 1:
        options.append(f"--array=0-{elements - 1}" + ("" if at_once is None else f"%{at_once}"))
    if dependency is not None:
        options += [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]
    return [
        *options,
        slurm.log_option(log),
        "--open-mode=append",
        f"--signal=B:USR1@{cluster.notice_s}",
        "--requeue",
    ]


def render_script(options: Sequence[str], cluster: ClusterSettings, runs: Sequence[Submission], origin: Origin) -> str:
    """The batch script that trains a run, or a run an element of an array, and requeues itself when ranks ask for it.

    Args:
        options: `sbatch_options`.
    """
    command: list[object] = [origin.python, _ROOT / "launch" / "pretrain.py"]
    srun_options: list[str] = []
    if cluster.container.image is not None:
        srun_options, command = _in_container(cluster, cluster.container.image, runs, origin.working_folder)
    return _render(
        "slurm_job.sh.jinja",
        sbatch_options=[_Verbatim(option) for option in options],
        origin=_Verbatim(json.dumps(origin.command)),  # in a comment: JSON keeps it on one line
        runs=runs,
        working_folder=origin.working_folder,
        executables_folder=Path(origin.python).parent,
        shell_setup=_Verbatim(cluster.shell_setup.strip("\n")),
        variables=cluster.export,
        requeue_exit_code=exit_codes.REQUEUE,
        hang_exit_code=exit_codes.HANG,
        max_requeues=cluster.max_requeues,
        world_size=cluster.world_size,
        tasks_per_node=cluster.tasks_per_node,
        cpus_per_task=cluster.cpus_per_task,
        wait_s=CRASH_WAIT_S,
        srun_options=srun_options,
        command=command,
    )


def render_evaluation(sbatch: dict[str, str], name: str, log: Path, command: Sequence[str], python: str) -> str:
    """The batch script that evaluates one checkpoint; safe to run twice.

    Args:
        sbatch: long options by name; a job name and a log are added.
        command: of the evaluation, run in this process' working folder.

    Raises:
        ValueError: as `sbatch_options`.
    """
    options = [slurm.option("job-name", re.sub(r"[^A-Za-z0-9_.-]", "_", name))]
    options += [slurm.option(key, value) for key, value in sbatch.items()]
    return _render(
        "slurm_evaluation.sh.jinja",
        sbatch_options=[_Verbatim(option) for option in [*options, slurm.log_option(log), "--open-mode=append"]],
        working_folder=Path.cwd(),
        executables_folder=Path(python).parent,
        command=list(command),
    )


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = Path(__file__).resolve().with_name(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**values)


def _in_container(
    cluster: ClusterSettings, image: str, runs: Sequence[Submission], working_folder: Path
) -> tuple[list[str], list[object]]:
    """Options of srun and the command of a rank, which runs the image's own Python and code.

    Raises:
        ValueError: a folder that neither runtime can mount.
    """
    container = cluster.container
    outside = (run.folder for run in runs if not run.folder.is_relative_to(working_folder))
    folders = dict.fromkeys([working_folder, *outside])
    for folder in folders:
        if re.search("[:,]", str(folder)):
            raise ValueError(
                f"run.folder: {str(folder)!r} cannot be mounted in a container. A path without colons and commas is "
                "allowed. Choose another folder."
            )
    mounts = [*(f"{folder}:{folder}" for folder in folders), *container.mounts]
    command: list[object] = ["python", f"{container.code}/launch/pretrain.py"]
    if container.runtime == "pyxis":
        options = [f"--container-image={image}", f"--container-mounts={','.join(mounts)}"]
        return [*options, f"--container-workdir={working_folder}"], command
    gpus = ["--nv"] if cluster.gpus_per_node else []
    binds = [part for mount in mounts for part in ("--bind", mount)]
    return [], ["apptainer", "exec", *gpus, *binds, "--pwd", working_folder, image, *command]
