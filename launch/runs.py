#!/usr/bin/env python3
"""List runs: state, step, tokens, loss, tokens/s, time left, job.

python launch/runs.py                 # those in runs/
python launch/runs.py FOLDER ... [--json]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dispersion_pretrain.run_list import as_json, as_table, list_runs


def main(arguments: list[str] | None = None) -> int:
    """Print the list; 1 with one line of explanation when a folder is not there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("runs")], help="runs, or folders of runs")
    parser.add_argument("--json", action="store_true", help="a list of objects with all fields, for other programs")
    options = parser.parse_args(arguments)
    try:
        runs = list_runs(options.folders)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(as_json(runs) if options.json else as_table(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
