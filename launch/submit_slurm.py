#!/usr/bin/env python3
"""Submit a pretraining run to Slurm: a config and cluster options in, a readable batch script and a job out.

    python launch/submit_slurm.py --config configs/demo.yaml --nodes 4 --gpus-per-node 8 [--dry-run]

One Slurm task is one rank, started by srun itself. A launcher on each node would stand between Slurm and
the ranks. torchrun turns every exit code into 1, so that a rank could not ask to be requeued; it keeps its
workers in sessions of their own, where Slurm's signals do not reach them, and gives them 30 s to save.
deepspeed needs ssh or a hostfile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from dispersion_pretrain import exit_codes
from dispersion_pretrain.config import Settings
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.settings_file import dump_settings, load_settings

CRASH_WAIT_S = 300  # between the first rank that ends and the end of all; covers the slowest ordinary end
_TEMPLATE = Path(__file__).resolve().with_name("slurm_job.sh.jinja")
_PRETRAIN = Path(__file__).resolve().with_name("pretrain.py")

# An #SBATCH line ends at a newline, and sbatch has quotes of its own: only characters that it takes as is.
_SBATCH_VALUES = {
    "job-name": r"[A-Za-z0-9_.:=@+-]+",
    "partition": r"[A-Za-z0-9_.:@,+-]+",
    "account": r"[A-Za-z0-9_.:@+-]+",
    "qos": r"[A-Za-z0-9_.:@+-]+",
    "time": r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED",
    "constraint": r"[A-Za-z0-9_.:,&|*()\[\]-]+",
}


@dataclass(frozen=True)
class Cluster:
    """What the job asks of Slurm; `ranks_per_node` is one a GPU wherever there are GPUs."""

    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    cpus_per_task: int
    notice_s: int
    max_requeues: int
    named: dict[str, str]  # job-name, partition, account, qos, time, constraint: those that were given

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


class _Verbatim(str):
    """Text that the template takes as it is; everything else is quoted for the shell."""


def _finalize(value: Any) -> str:
    if isinstance(value, _Verbatim):
        return value
    if isinstance(value, list):
        return " \\\n    ".join(shlex.quote(str(part)) for part in value)
    return shlex.quote(str(value))


def sbatch_options(cluster: Cluster, log_folder: Path) -> list[str]:
    """The job's #SBATCH options.

    Raises:
        ValueError: a value that could leave its line or mean something to sbatch.
    """
    for name, value in cluster.named.items():
        if not re.fullmatch(_SBATCH_VALUES[name], value):
            raise ValueError(f"--{name}: {value!r} is not allowed. It must match {_SBATCH_VALUES[name]}. Correct it.")
    if re.search(r'["\\%]', str(log_folder)) or not str(log_folder).isprintable():
        raise ValueError(
            f"run.folder: {str(log_folder)!r} cannot be named in a batch script. "
            'Printable characters except ", \\ and % are allowed. Choose another folder.'
        )
    options = [f"--{name}={value}" for name, value in cluster.named.items()]
    options += [
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={cluster.ranks_per_node}",
        f"--cpus-per-task={cluster.cpus_per_task}",
    ]
    if cluster.gpus_per_node:
        options.append(f"--gpus-per-node={cluster.gpus_per_node}")
    return [
        *options,
        f'--output="{log_folder}/%j.log"',
        "--open-mode=append",
        f"--signal=B:USR1@{cluster.notice_s}",
        "--requeue",
    ]


def render_script(
    cluster: Cluster, run_folder: Path, snapshot: Path, origin: str, python: str, working_folder: Path
) -> str:
    """The batch script that trains the settings in `snapshot` and requeues itself when the ranks ask for it.

    Every value is quoted by the template engine, so that it arrives at the ranks as it is. `python` is the
    interpreter on the compute nodes.

    Raises:
        ValueError: as `sbatch_options`.
    """
    environment = jinja2.Environment(
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        sbatch_options=[_Verbatim(option) for option in sbatch_options(cluster, run_folder / "slurm")],
        origin=_Verbatim(json.dumps(origin)),  # in a comment: JSON keeps it on one line
        run_folder=run_folder,
        working_folder=working_folder,
        executables_folder=Path(python).parent,
        requeue_exit_code=exit_codes.REQUEUE,
        hang_exit_code=exit_codes.HANG,
        max_requeues=cluster.max_requeues,
        world_size=cluster.world_size,
        ranks_per_node=cluster.ranks_per_node,
        cpus_per_task=cluster.cpus_per_task,
        wait_s=CRASH_WAIT_S,
        command=[python, _PRETRAIN, "--config", snapshot],
    )


def submit(script: Path) -> str:
    """Hand the script to sbatch; return the job id.

    Raises:
        RuntimeError: sbatch is missing or refuses, in its own words.
    """
    try:
        answer = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError(
            "sbatch: not found. A login node of a Slurm cluster is needed. Use --dry-run elsewhere."
        ) from None
    if answer.returncode:
        raise RuntimeError(f"sbatch: refused {script} ({answer.stderr.strip()}). Correct the options that it names.")
    return answer.stdout.strip().split(";")[0]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Submit a pretraining run to Slurm.",
        epilog="sbatch's environment variables set the rest, such as memory: SBATCH_MEM_PER_NODE=0.",
    )
    parser.add_argument("--config", type=Path, required=True, help="settings of the run (YAML)")
    parser.add_argument(
        "--override",
        nargs="+",
        action="extend",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="as for launch/pretrain.py",
    )
    parser.add_argument("--nodes", type=_whole(1), required=True)
    parser.add_argument(
        "--gpus-per-node",
        type=_whole(0),
        required=True,
        help="one rank is started for each; 0: train on CPUs",
    )
    parser.add_argument("--ranks-per-node", type=_whole(1), help="only with --gpus-per-node 0 (default 1)")
    parser.add_argument("--cpus-per-task", type=_whole(1), default=4, help="a task is a rank (default 4)")
    for name in _SBATCH_VALUES:
        parser.add_argument(f"--{name}", help="default: the run's name" if name == "job-name" else "passed to sbatch")
    parser.add_argument(
        "--notice",
        type=_whole(1),
        default=120,
        metavar="SECONDS",
        help="stop and save this long before the time limit (default 120)",
    )
    parser.add_argument(
        "--max-requeues",
        type=_whole(0),
        default=50,
        help="restarts of a job before it is left alone (default 50)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the batch script, write and submit nothing")
    return parser.parse_args(arguments)


def _whole(least: int) -> Any:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed. Whole numbers from {least} are. Correct the value."
            )
        return int(text)

    return parse


def _cluster(options: argparse.Namespace, settings: Settings) -> Cluster:
    if options.gpus_per_node and options.ranks_per_node not in (None, options.gpus_per_node):
        raise ValueError(
            f"--ranks-per-node: {options.ranks_per_node} with {options.gpus_per_node} GPUs a node. "
            "One rank a GPU is allowed. Leave it out."
        )
    named = {name: getattr(options, name.replace("-", "_")) for name in _SBATCH_VALUES}
    named["job-name"] = named["job-name"] or settings.run.name
    return Cluster(
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        ranks_per_node=options.gpus_per_node or options.ranks_per_node or 1,
        cpus_per_task=options.cpus_per_task,
        notice_s=options.notice,
        max_requeues=options.max_requeues,
        named={name: value for name, value in named.items() if value is not None},
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    try:
        settings = load_settings(options.config, options.override)
        cluster = _cluster(options, settings)
        # Called for its checks: what does not divide is refused here and not after hours in the queue.
        BatchLayout.derive(settings, cluster.world_size)
        run_folder = settings.run_folder.absolute()
        # A folder for each submission: a queued job keeps reading the settings that it was submitted with.
        folder = run_folder / "slurm" / datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%f")
        snapshot = folder / "config.yaml"
        origin = " ".join([str(options.config), *options.override])
        text = render_script(cluster, run_folder, snapshot, origin, sys.executable, Path.cwd())
        if options.dry_run:
            print(text, end="")
            return 0
        folder.mkdir(parents=True)
        snapshot.write_text(dump_settings(settings), encoding="utf-8")
        script = folder / "job.sh"
        script.write_text(text, encoding="utf-8")
        job = submit(script)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    log = shlex.quote(f"{run_folder}/slurm/{job}.log")
    print(f"job         {job}: {cluster.nodes} nodes, {cluster.world_size} ranks")
    print(f"run folder  {run_folder}")
    print(f"script      {script}")
    print(f"watch       squeue --job {job}; tail -F {log}")
    print(f"stop        scancel --batch --signal=TERM {job}    (saves first; a plain scancel may not)")
    print("resume      the same command again")
    return 0


if __name__ == "__main__":
    sys.exit(main())
