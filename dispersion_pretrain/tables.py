"""Tables of a report: text for the page, LaTeX with booktabs, CSV with all digits; and how numbers are written."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from dispersion_pretrain import comparison
from dispersion_pretrain.arms import Arm
from dispersion_pretrain.comparison import Difference, Wilcoxon
from dispersion_pretrain.outcomes import Cell, Line, SuiteOutcome

_KEY_WIDTH = 1.4  # of the first column of a LaTeX table, in mean widths
MINUS, MISSING = "\u2212", "–"
_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}", MINUS: "$-$", MISSING: "--", "·": r"$\cdot$",
    "×": r"$\times$", "→": r"$\rightarrow$", "±": r"$\pm$", "ρ": r"$\rho$", "\u00a0": "~", "[": "{[}", "]": "{]}",
    "_": r"\_\allowbreak{}", "/": r"/\allowbreak{}",
} | {character: f"\\{character}" for character in "&%$#{}"}  # fmt: skip


class Row(NamedTuple):
    """One line: its cells, and where there are any a second text under each."""

    key: str
    cells: list[str]
    details: Sequence[str] = ()


class Table(NamedTuple):
    """A table of the page."""

    slug: str  # unique among a report's tables; the name of its files
    header: list[str]  # the first is that of the keys
    rows: list[Row]
    records: list[dict[str, Any]] = []  # the same with numbers as numbers, for CSV; empty: the rows are all there is

    def csv(self) -> str:
        """Comma-separated values, as RFC 4180 has them; a cell that a spreadsheet would run is kept from it."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\r\n")
        if self.records:
            writer.writerow(self.records[0])
            writer.writerows([map(_inert, record.values()) for record in self.records])
        else:
            writer.writerow(map(_inert, self.header))
            writer.writerows([map(_inert, [row.key, *row.cells]) for row in self.rows])
        return text.getvalue()

    def latex(self) -> str:
        """As wide as the text, for LaTeX with booktabs and tabularx; second texts are rows of their own."""
        others = len(self.header) - 1
        kinds = rf">{{\raggedright\arraybackslash\hsize={_KEY_WIDTH}\hsize}}X"
        width = (others + 1 - _KEY_WIDTH) / others
        kinds += rf" *{{{others}}}{{>{{\raggedleft\arraybackslash\hsize={width:.4f}\hsize}}X}}"
        lines = [r"% \usepackage{booktabs, tabularx}", rf"\begin{{tabularx}}{{\linewidth}}{{{kinds}}}", r"\toprule"]
        lines += [_latex_row(self.header), r"\midrule"]
        for row in self.rows:
            lines.append(_latex_row([row.key, *row.cells]))
            if any(row.details):
                lines.append(_latex_row(["", *row.details], r"\footnotesize "))
        return "\n".join([*lines, r"\bottomrule", r"\end{tabularx}", ""])


def _inert(value: Any) -> Any:
    is_formula = isinstance(value, str) and re.match(r"[=+\-@\t\r](?![0-9.]+(e[+-]?[0-9]+)?$)", value)
    return f"'{value}" if is_formula else value


def _latex_row(cells: Sequence[str], style: str = "") -> str:
    return " & ".join(f"{style if cell else ''}{escape_latex(cell)}" for cell in cells) + r" \\"


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(character, character) for character in re.sub(r"[ \t\r\n]+", " ", text))


# ---- lines of outcomes


def outcome_table(slug: str, title: str, arms: Sequence[str], lines: Sequence[Line], more: Sequence[Row] = ()) -> Table:
    """A table of arms side by side, differences and verdicts under their figures; `more` rows end it."""
    rows, records = [], []
    for line in lines:
        decimals = line_decimals(line)
        cells = [MISSING if cell.mean is None else number(cell.mean, decimals) for cell in line.cells]
        details = [_detail(line, cell, decimals) for cell in line.cells]
        rows.append(Row(line.label, cells, details if any(details) else ()))
        records += [_record(line, name, cell) for name, cell in zip(arms, line.cells, strict=True)]
    return Table(slug, [title, *arms], [*rows, *more], records)


def _detail(line: Line, cell: Cell, decimals: int) -> str:
    if cell.difference:
        return verdict(line, cell)
    return "" if cell.error is None else f"± {number(cell.error, decimals)}"


def _record(line: Line, arm: str, cell: Cell) -> dict[str, Any]:
    record: dict[str, Any] = {"task": line.task, "metric": line.metric, "arm": arm, "mean": cell.mean}
    difference = cell.difference
    interval = difference.interval if difference else None
    scale = math.exp if line.is_ratio else float
    record |= {"seeds": cell.num_seeds, "pairs_of_seeds": cell.num_pairs if difference else None}
    record["standard_error"] = cell.error
    record["examples"] = cell.num_examples or None
    record["comparison"] = None if difference is None else "ratio" if line.is_ratio else "difference"
    record["estimate"] = None if difference is None else scale(difference.estimate)
    record["low_95"], record["high_95"] = map(scale, interval) if interval else (None, None)
    record["p"] = difference.p if difference else None
    record["verdict"] = None if difference is None else judgement(line, difference)
    return record | {"interval_over": cell.basis or None}


def verdict(line: Line, cell: Cell) -> str:
    """`+0.61 [+0.10, +1.12], significantly better`, `−0.2 [−0.5, +0.1], not significant`, or without an interval."""
    difference = cell.difference
    assert difference is not None
    if line.is_ratio:
        ratio, interval = comparison.ratio(difference)
        reach = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        return f"×\u00a0{ratio:.3f}{reach}, {judgement(line, difference)}"
    decimals = line_decimals(line)
    bounds = difference.interval
    reach = f" [{signed(bounds[0], decimals)}, {signed(bounds[1], decimals)}]" if bounds else ""
    return f"{signed(difference.estimate, decimals)}{reach}, {judgement(line, difference)}"


def judgement(line: Line, difference: Difference) -> str:
    """What may be said of a difference, in words."""
    if difference.interval is None:
        return "not tested"
    if not difference.is_significant:
        return "not significant"
    return f"significantly {line.words[difference.estimate > 0]}"


def benchmark_table(outcome: SuiteOutcome, arms: Sequence[Arm]) -> Table:
    """A suite's lines, then average ranks, tests over tasks and where in training the arms were evaluated."""
    more: list[Row] = []
    records: list[dict[str, Any]] = []
    if outcome.ranks:
        label = f"average rank over {outcome.num_ranked} task{'s' * (outcome.num_ranked > 1)} (1 is best)"
        more.append(Row(label, [number(rank, 2) for rank in outcome.ranks]))
        pairs = zip(arms, outcome.ranks, strict=True)
        records += [{"metric": label, "arm": arm.name, "mean": rank} for arm, rank in pairs]
    if any(outcome.tests):
        label = f"Wilcoxon signed-rank test over tasks, {outcome.metric}"
        more.append(Row(label, [MISSING if test is None else wilcoxon_words(test) for test in outcome.tests]))
        for arm, test in zip(arms, outcome.tests, strict=True):
            if test is not None:
                records.append({"metric": label, "arm": arm.name, "p": test.p, "verdict": wilcoxon_words(test)})
    more.append(Row("at step", [_steps(arm, outcome.suite) for arm in arms]))
    table = outcome_table(f"benchmarks-{outcome.suite}", outcome.suite, [a.name for a in arms], outcome.lines, more)
    blank = dict.fromkeys(table.records[0]) if table.records else {}
    return table._replace(records=[*table.records, *(blank | record for record in records)])


def _steps(arm: Arm, suite: str) -> str:
    steps = [str(run.evaluations[suite].get("step", MISSING)) for run in arm.runs if suite in run.evaluations]
    return ", ".join(dict.fromkeys(steps)) or MISSING


def wilcoxon_words(test: Wilcoxon) -> str:
    """`p = 0.031, 10 tasks, significant`, or that there are too few tasks."""
    if test.p is None:
        return f"too few tasks ({test.num_tasks} with a difference, {comparison.MINIMUM_PAIRS} are needed)"
    word = "significant" if test.p < 1 - comparison.CONFIDENCE else "not significant"
    return f"{p_value(test.p)}, {test.num_tasks} tasks, {word}"


# ---- numbers


def p_value(p: float) -> str:
    """`p = 0.031`, or `p < 0.001`."""
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def line_decimals(line: Line) -> int:
    """Decimals of a line's figures: two digits of a middling standard error, four of a figure without one."""
    errors = [cell.difference.standard_error for cell in line.cells if cell.difference] if not line.is_ratio else []
    errors += [cell.error for cell in line.cells if cell.error]
    errors = [error for error in errors if error > 0]  # which leaves NaN out, too
    if errors:
        return _decimals(math.exp(sum(map(math.log, errors)) / len(errors)), 2)
    return _decimals(max((abs(cell.mean) for cell in line.cells if cell.mean is not None), default=0.0), 4)


def _decimals(value: float, digits: int) -> int:
    return min(6, max(0, digits - 1 - math.floor(math.log10(value)))) if value > 0 else digits


def number(value: float | None, decimals: int = 3) -> str:
    """With thousands set apart and a true minus; a dash for none."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:,.{decimals}f}".replace("-", MINUS)


def signed(value: float, decimals: int) -> str:
    """A number that says `+` where it is not below 0; 0 has no sign."""
    text = f"{value:+,.{decimals}f}".replace("-", MINUS)
    return text if any(digit in text for digit in "123456789") else text[1:]
