#!/usr/bin/env python3
"""Export a checkpoint of a run as a Hugging Face folder, and check it against the running model's logits.

python launch/export_hf.py runs/demo [--step 100] --out exported [--dtype bf16]
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from dispersion_pretrain.export import export_run, read_record


def main(arguments: list[str] | None = None) -> int:
    """Export and print the folder and the difference of logits; 1 with one line of explanation when it fails."""
    os.umask(os.umask(0o022) | 0o002)  # what a run leaves is never writable for everyone
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", help="run folder")
    parser.add_argument("--step", type=int, help="a saved step; default: the newest good checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--dtype", choices=("float32", "bf16"), help="of the weights; default: the run's precision")
    parser.add_argument("--no-check", action="store_true", help="do not compare logits with the running model's")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    run = options.run if options.step is None else f"{options.run}@{options.step}"
    try:
        folder = export_run(run, options.out, check=not options.no_check, dtype=options.dtype)
    except (ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    record = read_record(folder) or {}
    difference = record.get("logits_difference")
    print(f"{folder}  (step {record.get('step')}, {record.get('precision')})")
    compared = "were not compared" if difference is None else f"differ by {difference:.1e} of the largest"
    print(f"logits of the export and of the running model: {compared}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
