#!/usr/bin/env python3
"""Bring the data sets of suites into a folder, for machines without the Hugging Face hub.

python launch/mirror_datasets.py --suite configs/eval/paper.yaml --condensation --out datasets
python launch/evaluate_checkpoint.py --model runs/demo --suite configs/eval/paper.yaml --datasets datasets
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dispersion_pretrain import dataset_mirror
from dispersion_pretrain.suites import load_suite


def main(arguments: list[str] | None = None) -> int:
    """Fill the folder; 1 and one line of explanation where something cannot be had."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--suite", action="append", default=[], help="a suite whose data sets to bring; may be repeated"
    )
    parser.add_argument(
        "--condensation", action="store_true", help="what published models' condensation is measured on"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder; what it has already is kept")
    parser.add_argument("--source", type=Path, help="folder with copies of data-set repositories, instead of the hub")
    options = parser.parse_args(arguments)
    if not options.suite and not options.condensation:
        parser.error("--suite: is missing. A suite or --condensation says what to bring. Give one.")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: {options.out} is a file. The name of a folder is needed. Choose another.")
    unknown = []
    try:
        parts = list(dataset_mirror.CONDENSATION) if options.condensation else []
        for task in (task for suite in options.suite for task in load_suite(suite).tasks):
            if task.held_out is None and task.task not in dataset_mirror.index():
                unknown.append(dataset_mirror.unknown_task(task.task))
                continue
            parts += [part for of_task in dataset_mirror.parts_of(task).values() for part in of_task]
        files = dataset_mirror.fill(options.out, parts, options.source)
    except (ValueError, RuntimeError, OSError) as error:
        print("\n".join([*unknown, str(error)]), file=sys.stderr)
        return 1
    total = sum(file["bytes"] for file in files.values())
    print(f"{options.out}: {len(files)} files, {total / 2**20:.1f} MiB")
    if unknown:  # the other tasks' data sets are there
        print("\n".join(unknown), file=sys.stderr)
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
