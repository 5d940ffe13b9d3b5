"""Compares what train.py trained: a page and tables for each question, and figures.md with the figures of all.

python tests/evidence/compare.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dispersion_pretrain import tables
from dispersion_pretrain.arms import Arm
from dispersion_pretrain.outcomes import Line
from dispersion_pretrain.report import Report, compile_report, write_report
from dispersion_pretrain.suites import format_table
from evidence import experiments
from evidence.experiments import Question

OUT = Path(__file__).parent / "results"
_HEAD = """# Figures

Written by `make evidence`. Means over seeds; under each the difference to the first column with its 95 % interval,
paired by seed and, for benchmarks, by example. Before and after: the first and the last step of training.
"""


def main() -> None:
    """Write everything anew."""
    parts = [_HEAD]
    for question in experiments.QUESTIONS:
        folders = [arm.run_folder(seed) for arm in question.arms for seed in arm.seeds]
        write_report(folders, OUT / f"{question.key}.html", tables_folder=OUT / question.key)
        parts.append(_section(question, compile_report(folders)))
    untouched = json.loads((experiments.UNTOUCHED / "results.json").read_bytes())
    parts.append(f"## SmolLM2-135M-Instruct before any training\n\n```\n{format_table(untouched)}\n```\n")
    (OUT / "figures.md").write_text("\n".join(parts), encoding="utf-8")


def _section(question: Question, report: Report) -> str:
    lines = [line for line in report.lines if not line.is_ratio]  # step times are of a machine with other work
    lines += [line for suite in report.suites for line in suite.lines]
    rows = [["", *(f"{arm.name} ({len(arm.runs)} seed{'s' * (len(arm.runs) > 1)})" for arm in report.arms)]]
    rows.append(["---"] * len(rows[0]))
    rows += [["Spearman ρ of cosine and layer, before → after", *map(_spearman, report.arms)]]
    rows += [["mean cosine, last half, before → after", *map(_cosine, report.arms)]]
    rows += [[line.label, *_cells(line)] for line in lines]
    return f"## {question.title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _spearman(arm: Arm) -> str:
    ends = np.array([[run.condensations[place].spearman for place in (0, -1)] for run in arm.runs])
    return " → ".join(tables.number(mean, 2) for mean in ends.mean(axis=0))


def _cosine(arm: Arm) -> str:
    ends = np.array([[run.condensations[place].last_half for place in (0, -1)] for run in arm.runs])
    seeds = ", ".join(tables.number(after, 3) for after in ends[:, 1])
    return " → ".join(tables.number(mean, 3) for mean in ends.mean(axis=0)) + f" ({seeds})"


def _cells(line: Line) -> Iterator[str]:
    decimals = tables.line_decimals(line)
    for cell in line.cells:
        figure = tables.number(cell.mean, decimals)
        yield f"{figure}<br>{tables.verdict(line, cell)}" if cell.difference else figure


if __name__ == "__main__":
    main()
