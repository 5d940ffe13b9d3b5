"""One or more run folders -> one HTML page that needs nothing else: pictures first, tables after."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from dispersion_pretrain.figures import SERIES, Drawing, draw_all, shorten
from dispersion_pretrain.run_folder import Run, is_finite, load_runs


def write_report(folders: Sequence[str | Path], out: str | Path, figures_folder: str | Path | None = None) -> Path:
    """Write the page, and with `figures_folder` each figure as a PNG file there; returns the page's path.

    Raises:
        ValueError: a folder is no run, or none is given.
    """
    runs = load_runs(folders)
    groups = draw_all(runs)
    _write_atomically(Path(out), render(runs, groups).encode())
    if figures_folder is not None:
        for drawing in (drawing for group in groups for drawing in group):
            _write_atomically(Path(figures_folder, f"{drawing.slug}.png"), drawing.png())
    return Path(out)


def findings(runs: list[Run]) -> list[str]:
    """Sentences that say what the page shows, from the runs' own numbers."""
    sentences = [_what_is_compared(runs)]
    pairs = [(run.name, run.last_half) for run in runs]
    cosines = [(pair[1], f"{name} {pair[0]:.2f} → {pair[1]:.2f}") for name, pair in pairs if pair is not None]
    if cosines:
        sentences.append(f"Mean cosine of the last half of the layers, before → after: {_some(cosines)}.")
    last = [(run.name, run.last("validation/cross_entropy")) for run in runs]
    losses = [(loss, f"{name} {loss:.3f}") for name, loss in last if loss is not None]
    if losses:
        sentences.append(f"Last validation loss: {_some(losses)}.")
    ends = [(float(run.tokens), f"{run.name} {shorten(run.tokens)}") for run in runs]
    if len({tokens for tokens, _ in ends}) > 1:
        sentences.append(f"The runs have not seen the same number of tokens ({_some(ends)}): compare at equal tokens.")
    seeds = {json.dumps(_section(run, "run").get("seed")) for run in runs}
    if len(runs) > 1 and len(seeds) == 1 and seeds != {"null"}:
        sentences.append(
            f"All have seed {seeds.pop()}: these runs do not tell how far another seed would move a figure."
        )
    return sentences


def _what_is_compared(runs: list[Run]) -> str:
    names = _listed([run.name for run in runs])
    if len(runs) == 1:
        return f"One run, {names}, of {shorten(runs[0].tokens)} tokens."
    if not all(run.settings for run in runs):
        return f"{len(runs)} runs, {names}, whose settings are not all known."
    sections = sorted({row.key.partition(".")[0] for row in compare_settings(runs)[0]})
    return f"{len(runs)} runs, {names}, " + (f"which differ in {_listed(sections)}." if sections else "set up alike.")


def _some(figures: list[tuple[float, str]]) -> str:
    """All of a few figures; of many the lowest and the highest."""
    if len(figures) <= 4:
        return ", ".join(text for _, text in figures)
    return f"from {min(figures)[1]} to {max(figures)[1]}"


def _section(run: Run, name: str) -> dict[str, Any]:
    section = run.settings.get(name)
    return section if isinstance(section, dict) else {}


class Row(NamedTuple):
    """One line of a comparison, a cell for each run."""

    key: str
    cells: list[str]


HEADINGS = (
    *("tokens", "train loss", "validation loss", "perplexity"),
    *("cosine, last half", "Spearman ρ", "tokens/s", "step time"),
)  # fmt: skip


def summary(runs: list[Run]) -> list[Row]:
    """One row a run, its cells under `HEADINGS`."""
    reference = next((run for run in runs if not run.settings.get("dispersion")), runs[0])
    reference_s = reference.median("step_time_s")
    rows = []
    for run in runs:
        pair, after = run.last_half, run.condensations[-1] if run.condensations else None
        step_s, speed = run.median("step_time_s"), run.median("tokens_per_s")
        loss = run.last("validation/cross_entropy")
        cosine = f"{pair[0]:.3f} → {pair[1]:.3f}" if pair else _number(after.last_half if after else None)
        ratio = f" (× {step_s / reference_s:.2f})" if step_s and reference_s and len(runs) > 1 else ""
        cells = [
            shorten(run.tokens),
            _number(run.training_loss),
            _number(loss),
            _number(math.exp(loss) if loss is not None and loss < 700 else None, 1),
            cosine,
            _number(after.spearman if after else None, 2),
            "–" if speed is None else shorten(speed),
            "–" if step_s is None else f"{_duration(step_s)}{ratio}",
        ]
        rows.append(Row(run.name, cells))
    return rows


def compare_settings(runs: list[Run]) -> tuple[list[Row], list[Row]]:
    """Rows of the resolved settings: those that differ, and those that all runs share; the run's name is none."""
    flat = [dict(_flatten(run.settings)) for run in runs]
    for one in flat:
        for key in ("run.name", "run.folder"):
            one.pop(key, None)
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
    return column.get(key, "off" if is_off else "–")


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _flatten(below, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value if isinstance(value, str) else json.dumps(value, default=str)


def evaluation_tables(runs: list[Run]) -> list[tuple[str, list[Row]]]:
    """(suite, rows) with a row for each task and metric, standard errors beside the values."""
    tables = []
    for suite in sorted({suite for run in runs for suite in run.evaluations}):
        scores = [dict(_scores(run.evaluations.get(suite, {}))) for run in runs]
        keys = list(dict.fromkeys(key for column in scores for key in column))
        rows = [Row(key, [column.get(key, "–") for column in scores]) for key in keys]
        steps = [str(run.evaluations[suite].get("step", "–")) if suite in run.evaluations else "–" for run in runs]
        tables.append((suite, [*rows, Row("at step", steps)]))
    return tables


def _scores(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    tasks = {**results.get("results", {}), "average": results.get("averages")}
    for task, scores in tasks.items():
        for metric, value in scores.items() if isinstance(scores, dict) else ():
            if is_finite(value) and metric != "samples" and not metric.endswith("_stderr"):
                error = scores.get(f"{metric}_stderr")
                yield f"{task} · {metric}", f"{value:.5g}" + (f" ± {error:.2g}" if is_finite(error) else "")


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def render(runs: list[Run], groups: list[list[Drawing]]) -> str:
    """Fill the template; everything but the pictures is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        runs=runs,
        findings=findings(runs),
        headings=HEADINGS,
        rows=summary(runs),
        groups=groups,
        evaluations=evaluation_tables(runs),
        settings=compare_settings(runs),
        environments=compare_environments(runs),
        num_colors=len(SERIES),
    )


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.chmod(temporary, 0o644)  # mkstemp makes it private
    os.replace(temporary, path)
