#!/usr/bin/env python3
"""Compare runs on one HTML page that opens offline.

python launch/report.py runs/demo_baseline runs/demo --out report.html [--figures FOLDER] [--tables FOLDER]

Runs that differ in their seed only are one arm; arms are compared with the one that has no method section.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dispersion_pretrain.report import write_report


def main(arguments: list[str] | None = None) -> int:
    """Write the page and print its path; 1 with one line of explanation when a folder is no run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="page to write")
    parser.add_argument("--reference", metavar="NAME", help="arm to compare with, as the page names it")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="write each figure as PNG and SVG there, too")
    parser.add_argument("--tables", type=Path, metavar="FOLDER", help="write each table as CSV and LaTeX there, too")
    options = parser.parse_args(arguments)
    try:
        page = write_report(
            options.runs,
            options.out,
            reference=options.reference,
            figures_folder=options.figures,
            tables_folder=options.tables,
        )
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
