"""One or more run folders -> one HTML page that needs nothing else: findings, pictures, tables."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from dispersion_pretrain import comparison, tables
from dispersion_pretrain.arms import Arm, choose_reference, describe, group, paired_seeds
from dispersion_pretrain.figures import SERIES, Gallery, draw_all, shorten
from dispersion_pretrain.outcomes import AVERAGE, Line, SuiteOutcome, suite_outcomes, training_lines
from dispersion_pretrain.run_folder import Run, is_finite, load_runs
from dispersion_pretrain.tables import MISSING, Row, Table, number

_NAMED = 4  # arms or runs that a sentence names one by one


class Report(NamedTuple):
    """All that a page says, before it is drawn."""

    runs: list[Run]
    arms: list[Arm]
    reference: Arm
    lines: list[Line]  # of training
    suites: list[SuiteOutcome]


def write_report(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    reference: str | None = None,
    figures_folder: str | Path | None = None,
    tables_folder: str | Path | None = None,
) -> Path:
    """Write the page; return its path.

    Args:
        folders: of runs.
        out: the page.
        reference: name of the arm that the others are compared with; None: the one without a method.
        figures_folder: where to write each figure as PNG and SVG.
        tables_folder: where to write each table as CSV and LaTeX.

    Raises:
        ValueError: a folder is no run, none is given, no arm has the reference's name, or a file is where a folder is
            to be, or the reverse.
    """
    if Path(out).is_dir():
        raise ValueError(f"--out: {out} is a folder. The name of a file is needed. Add one, such as page.html.")
    for option, folder in (("--figures", figures_folder), ("--tables", tables_folder)):
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"{option}: {folder} is a file. The name of a folder is needed. Choose another.")
    report = compile_report(folders, reference)
    gallery = draw_all(report.runs, report.arms)
    _write_atomically(Path(out), render(report, gallery).encode())
    if figures_folder is not None:
        for name, content in (file for drawing in gallery.drawings for file in drawing.files()):
            _write_atomically(Path(figures_folder, name), content)
    if tables_folder is not None:
        for table in all_tables(report):
            _write_atomically(Path(tables_folder, f"{table.slug}.csv"), table.csv().encode())
            _write_atomically(Path(tables_folder, f"{table.slug}.tex"), table.latex().encode())
    return Path(out)


def compile_report(folders: Sequence[str | Path], reference: str | None = None) -> Report:
    """Read the runs and compare their arms; raises as `write_report`."""
    runs = load_runs(folders)
    arms = group(runs)
    chosen = choose_reference(arms, reference)
    return Report(runs, arms, chosen, training_lines(arms, chosen), suite_outcomes(arms, chosen))


# ---- sentences


def findings(report: Report) -> list[str]:
    """Sentences that say what the page shows, from the runs' own numbers."""
    sentences = [_what_is_compared(report)]
    ends = [(arm.name, [run.last_half for run in arm.runs if run.last_half]) for arm in report.arms]
    changes = [(name, [sum(side) / len(side) for side in zip(*pairs, strict=True)]) for name, pairs in ends if pairs]
    if changes:
        texts = [(after, f"{name} {before:.2f} → {after:.2f}") for name, (before, after) in changes]
        sentences.append(f"Mean cosine of the last half of the layers, before → after: {_some(texts)}.")
    sentences += [_outcome(line, report) for line in report.lines]
    for suite in report.suites:
        sentences += [f"{suite.suite}: {_outcome(line, report)}" for line in _headline(suite)]
        sentences += _over_tasks(suite, report)
    return sentences + _reservations(report)


def _what_is_compared(report: Report) -> str:
    runs, arms = report.runs, report.arms
    if len(runs) == 1:
        return f"One run, {runs[0].name}, of {shorten(runs[0].tokens)} tokens."
    if len(arms) == len(runs):
        what = f"{len(runs)} runs, {_listed([run.name for run in runs])},"
    elif len(arms) == 1:
        what = f"{len(runs)} runs of one arm, {describe(arms[0])},"
    else:
        what = f"{len(runs)} runs in {len(arms)} arms, {_listed([describe(arm) for arm in arms])},"
    if not all(run.settings for run in runs):
        return f"{what} whose settings are not all known."
    keys = {row.key for row in compare_settings(runs)[0]} - {"run.seed"}
    sections = sorted({key.partition(".")[0] for key in keys})
    if sections:
        return f"{what} which differ in {_listed(sections)}."
    return f"{what} set up alike."


def _outcome(line: Line, report: Report) -> str:
    """One figure of all arms, with what may be said of the differences."""
    decimals = tables.line_decimals(line)
    cells = list(zip(report.arms, line.cells, strict=True))
    texts = [f"{arm.name} {number(cell.mean, decimals)}" for arm, cell in cells if arm is report.reference]
    others = [(arm.name, cell) for arm, cell in cells if arm is not report.reference and cell.mean is not None]
    if len(others) <= _NAMED:
        for name, cell in others:
            against = f" ({tables.verdict(line, cell)})" if cell.difference else ""
            texts.append(f"{name} {number(cell.mean, decimals)}{against}")
    else:
        by_verdict: dict[str, list[str]] = {}
        for name, cell in others:
            words = tables.judgement(line, cell.difference) if cell.difference else "without a counterpart"
            by_verdict.setdefault(words, []).append(name)
        texts += [f"{words}: {_listed(names)}" for words, names in by_verdict.items()]
    label = f"{line.label[0].upper()}{line.label[1:]}" if not line.task else line.label
    return f"{label}: {'; '.join(texts)}."


def _headline(suite: SuiteOutcome) -> list[Line]:
    """The lines of a suite that stand for it: its averages, or else the first."""
    return [line for line in suite.lines if line.task == AVERAGE] or suite.lines[:1]


def _over_tasks(suite: SuiteOutcome, report: Report) -> list[str]:
    if not suite.ranks:
        return []
    names = [arm.name for arm in report.arms]
    ranks = [(rank, f"{name} {rank:.2f}") for name, rank in zip(names, suite.ranks, strict=True)]
    by_words: dict[str, list[str]] = {}
    for name, test in zip(names, suite.tests, strict=True):
        if test is not None:
            words = tables.wilcoxon_words(test)
            short = words if len(names) - 1 <= _NAMED else words.partition(" (")[0].rpartition(", ")[2]
            by_words.setdefault(short, []).append(name)
    tests = "; ".join(f"{_listed(alike)} {words}" for words, alike in by_words.items())
    tasks = f"{suite.num_ranked} task{'s' * (suite.num_ranked > 1)}"
    return [
        f"{suite.suite}: average rank over {tasks} (1 is best): {_some(ranks)}. "
        f"Wilcoxon signed-rank test over tasks, {suite.metric}: {tests}."
    ]


def _reservations(report: Report) -> list[str]:
    """What a reader must not conclude."""
    runs, sentences = report.runs, []
    ends = [(float(run.tokens), f"{run.name} {shorten(run.tokens)}") for run in runs]
    if len({tokens for tokens, _ in ends}) > 1:
        sentences.append(f"The runs have not seen the same number of tokens ({_some(ends)}): compare at equal tokens.")
    others = [arm for arm in report.arms if arm is not report.reference]
    for arm in others:
        seeds = paired_seeds(arm, report.reference)
        if seeds and len(seeds) < max(len(arm.runs), len(report.reference.runs)):
            sentences.append(
                f"Figures of {arm.name} and {report.reference.name} are means over all their seeds, differences are of "
                f"the pairs alone (seed{'s' * (len(seeds) > 1)} {_listed([str(seed) for seed in seeds])})."
            )
    single = [arm.name for arm in others if len(paired_seeds(arm, report.reference)) < 2]
    if single:
        sentences.append(
            f"Seeds were not varied in pairs for {_listed(single)}: figures of training are not tested, intervals of "
            "benchmarks are over examples only, and how far another seed would move a figure is not known."
        )
    return sentences


def _some(figures: list[tuple[float, str]]) -> str:
    """All of a few figures; of many the lowest and the highest."""
    if len(figures) <= _NAMED:
        return ", ".join(text for _, text in figures)
    return f"from {min(figures)[1]} to {max(figures)[1]}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# ---- tables


def all_tables(report: Report) -> list[Table]:
    """Every table of the page, for files."""
    names = [run.name for run in report.runs]
    diffs = (("settings", compare_settings(report.runs)), ("environment", compare_environments(report.runs)))
    both = [Table(slug, [slug, *names], [*differing, *same]) for slug, (differing, same) in diffs]
    return [arms_table(report), runs_table(report.runs), *benchmark_tables(report), *both]


def arms_table(report: Report) -> Table:
    """What the arms are and what training came to."""
    arms = report.arms
    names = [f"{arm.name} (reference)" if arm is report.reference and len(arms) > 1 else arm.name for arm in arms]
    table = tables.outcome_table("arms", "arm", [arm.name for arm in arms], report.lines)
    runs = Row("runs", [", ".join(run.name for run in arm.runs) for arm in arms])
    seeds = Row("seeds", [", ".join(MISSING if seed is None else str(seed) for seed in arm.by_seed) for arm in arms])
    return table._replace(header=["arm", *names], rows=[runs, seeds, *table.rows])


def benchmark_tables(report: Report) -> list[Table]:
    """One a suite."""
    made = [tables.benchmark_table(suite, report.arms) for suite in report.suites]
    slugs = [re.sub(r"[^A-Za-z0-9._-]+", "-", table.slug) for table in made]
    if len(set(slugs)) < len(slugs):
        slugs = [f"{slug}-{place}" for place, slug in enumerate(slugs)]
    return [table._replace(slug=slug) for table, slug in zip(made, slugs, strict=True)]


HEADINGS = (
    *("tokens", "train loss", "validation loss", "perplexity"),
    *("cosine, last half", "Spearman ρ", "tokens/s", "step time"),
)  # fmt: skip


def runs_table(runs: list[Run]) -> Table:
    """One row a run, its cells under `HEADINGS`."""
    rows = []
    for run in runs:
        pair, after = run.last_half, run.condensations[-1] if run.condensations else None
        step_s, speed = run.median("step_time_s"), run.median("tokens_per_s")
        loss = run.last("validation/cross_entropy")
        cells = [
            shorten(run.tokens),
            number(run.training_loss),
            number(loss),
            number(math.exp(loss) if loss is not None and loss < 700 else None, 1),
            f"{pair[0]:.3f} → {pair[1]:.3f}" if pair else number(after.last_half if after else None),
            number(after.spearman if after else None, 2),
            MISSING if speed is None else shorten(speed),
            MISSING if step_s is None else _duration(step_s),
        ]
        rows.append(Row(run.name, cells))
    return Table("runs", ["run", *HEADINGS], rows)


def compare_settings(runs: list[Run]) -> tuple[list[Row], list[Row]]:
    """Rows of the resolved settings: those that differ, and those that all runs share; the run's name is none."""
    flat = [dict(_flatten(run.settings)) for run in runs]
    off = {key for one in flat for key, value in one.items() if value == "null"}
    for one in filter(None, flat):
        for key in ("run.name", "run.folder"):
            one.pop(key, None)
        # A run from before a setting was there is like one that leaves it off (as for arms.group).
        for key in off - one.keys():
            if not any(other.startswith(f"{key}.") for other in one):
                one[key] = "null"
    return _compare(flat)


def compare_environments(runs: list[Run]) -> tuple[list[Row], list[Row]]:
    """Rows of where the runs' last starts happened, in two groups as `compare_settings`."""
    flat = []
    for run in runs:
        one = dict(_flatten(run.starts[-1])) if run.starts else {}
        if one:
            one["starts"] = str(len(run.starts))
            one.pop("metrics_bytes", None)
            seconds = run.starts[-1].get("time", math.nan)
            if is_finite(seconds):
                one["time"] = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
        flat.append(one)
    return _compare(flat)


def _compare(columns: list[dict[str, str]]) -> tuple[list[Row], list[Row]]:
    keys = list(dict.fromkeys(key for column in columns for key in column))
    # A section that is null in one run would have a row of its own beside the rows of its keys in the others.
    keys = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    rows = [Row(key, [_cell(column, key) for column in columns]) for key in keys]
    return [row for row in rows if len(set(row.cells)) > 1], [row for row in rows if len(set(row.cells)) == 1]


def _cell(column: dict[str, str], key: str) -> str:
    parts = key.split(".")
    is_off = any(column.get(".".join(parts[:depth])) == "null" for depth in range(1, len(parts)))
    return column.get(key, "off" if is_off else MISSING)


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _flatten(below, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, default=str)


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


# ---- the page


def render(report: Report, gallery: Gallery) -> str:
    """Fill the template; everything but the pictures is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        runs=report.runs,
        findings=findings(report),
        arms=arms_table(report),
        run_rows=runs_table(report.runs),
        color_of_run={run.name: place for place, arm in enumerate(report.arms) for run in arm.runs},
        gallery=gallery,
        benchmarks=list(zip(report.suites, benchmark_tables(report), strict=True)),
        settings=compare_settings(report.runs),
        environments=compare_environments(report.runs),
        reference=report.reference.name,
        draws=comparison.DRAWS,
        num_colors=len(SERIES),
    )


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.chmod(temporary, 0o644)  # mkstemp makes it private
    os.replace(temporary, path)
