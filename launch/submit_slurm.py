#!/usr/bin/env python3
"""Submit pretraining runs to Slurm: configs and cluster options in, a readable batch script and a job out.

python launch/submit_slurm.py --config configs/demo.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 [--dry-run]
python launch/submit_slurm.py --config configs/demo*.yaml --cluster configs/cluster/gpu.yaml --array 0-4   # a sweep
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dispersion_pretrain import slurm
from dispersion_pretrain.cluster_file import ClusterSettings, load_cluster
from dispersion_pretrain.settings_file import load_settings
from dispersion_pretrain.slurm_script import Origin
from dispersion_pretrain.submission import parse_after, parse_seeds, prepare, refuse_second_job, seeded, submit


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="sbatch's environment variables set the rest, such as memory: SBATCH_MEM_PER_NODE=0.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", type=Path, nargs="+", required=True, metavar="FILE", help="settings; several are a sweep")
    add("--override", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE", help="as for pretrain.py")
    add("--array", nargs="+", default=[], metavar="SEEDS", help="3, 0-4: a run with a folder of its own for each seed")
    add("--at-once", type=_whole(1), metavar="N", help="runs of a sweep at a time (default: all)")
    add("--cluster", type=Path, metavar="FILE", help="a site's defaults, see configs/cluster/; options go before them")
    add("--nodes", type=_whole(1))
    add("--gpus-per-node", type=_whole(0), help="one rank is started for each; 0: train on CPUs")
    add("--ranks-per-node", type=_whole(1), help="only with --gpus-per-node 0 (default 1)")
    add("--cpus-per-task", type=_whole(1), help="a task is a rank (default 4)")
    for name in slurm.VALUES:
        add(f"--{name}", help="default: the run's name" if name == "job-name" else "passed to sbatch")
    add("--container", metavar="IMAGE", help="run the ranks in it; the cluster file says how (container.runtime)")
    add("--export", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="variables of the ranks")
    add("--after", nargs="+", default=[], metavar="JOB", help="start when JOB ended well; any:JOB: however it ended")
    add("--notice", type=_whole(1), metavar="SECONDS", help="stop and save so long before the limit (default 120)")
    add("--max-requeues", type=_whole(0), metavar="N", help="restarts before a job is left alone (default 50)")
    add("--dry-run", action="store_true", help="print the batch script, write and submit nothing")
    return parser.parse_args(arguments)


def _whole(least: int) -> Any:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed. Whole numbers from {least} are. Correct the value."
            )
        return int(text)

    return parse


def _variables(texts: Sequence[str]) -> dict[str, str]:
    variables = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise ValueError(
                f"--export: {text!r} has no value. NAME=VALUE is allowed; what is exported in the shell goes with the "
                "job anyway. Add =VALUE."
            )
        variables[name] = value
    return variables


def _cluster(options: argparse.Namespace) -> ClusterSettings:
    given = {name: getattr(options, name.replace("-", "_")) for name in slurm.VALUES if name != "job-name"}
    for name in ("nodes", "gpus_per_node", "ranks_per_node", "cpus_per_task", "max_requeues"):
        given[name] = getattr(options, name)
    given["notice_s"] = options.notice
    given["export"] = _variables(options.export)
    given["container"] = {} if options.container is None else {"image": options.container}
    if options.cluster is None and None in (options.nodes, options.gpus_per_node):
        raise ValueError(
            "--nodes and --gpus-per-node: one is missing, and no --cluster file gives it. Both are needed. Add it."
        )
    return load_cluster(options.cluster, given)


def main(arguments: Sequence[str] | None = None) -> int:
    """Submit; 0 when the job is in the queue, 2 with a message when nothing was submitted."""
    options = _parse(arguments)
    command = [sys.executable, *sys.argv] if arguments is None else ["launch/submit_slurm.py", *arguments]
    try:
        cluster = _cluster(options)
        seeds, (dependency, after) = parse_seeds(options.array), parse_after(options.after)
        settings = [load_settings(path, options.override) for path in options.config]
        if seeds:
            settings = [seeded(each, seed) for each in settings for seed in seeds]
        origin = Origin(" ".join([*map(str, options.config), *options.override]), sys.executable, Path.cwd())
        job = prepare(settings, cluster, origin, name=options.job_name, dependency=dependency, at_once=options.at_once)
        if options.dry_run:
            print(job.text, end="")
            return 0
        refuse_second_job(job, after)
        records = submit(job, command)
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    whole = records[0]["job"].split("_")[0]
    print(f"job         {whole}: {cluster.nodes} nodes, {cluster.world_size} ranks" + _times(len(records)))
    for record in records:
        print(f"run folder  {record['run']}" + (f"  ({record['job']})" if len(records) > 1 else ""))
    print(f"script      {job.script}")
    folders = " ".join(shlex.quote(record["run"]) for record in records)
    print(f"watch       python launch/runs.py {folders}; tail -F {shlex.quote(records[0]['log'])}")
    print(f"stop        scancel --batch --signal=TERM {whole}    (saves first; a plain scancel may not)")
    print("resume      the same command again")
    return 0


def _times(number: int) -> str:
    return f", {number} runs" if number > 1 else ""


if __name__ == "__main__":
    sys.exit(main())
