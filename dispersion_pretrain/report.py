"""One or more run folders -> one HTML page that needs nothing else: pictures first, figures and settings after.

What a run folder lacks is said on the page; only a folder that is no run is an error. Figures are inline SVG whose
colours are CSS variables, so that they follow the reader's light or dark theme.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import matplotlib
import numpy as np
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dispersion_pretrain.condensation import Condensation, plot_heatmap

INK, MUTED, GRID = "#1f2329", "#6a727d", "#e4e7eb"
SERIES = ("#2f6fb7", "#d9622b", "#2c8a57", "#8358b5", "#b8862b", "#c2457f", "#3a8f9c", "#7a6a58")
_THEMED = {INK: "ink", MUTED: "muted", GRID: "grid"} | {color: f"series-{i}" for i, color in enumerate(SERIES)}
_DEPTH_COLORS = LinearSegmentedColormap.from_list("depth", ["#3f86c6", "#8d72b9", "#d65a7c", "#ec9440"])
_STYLE: dict[str, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8.5, "svg.fonttype": "none",
    "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.edgecolor": GRID,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "xtick.major.size": 0, "ytick.major.size": 0,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "lines.linewidth": 1.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.titlesize": 8.5,
    "axes.titlelocation": "left", "axes.titlecolor": MUTED, "legend.frameon": False, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "figure.constrained_layout.use": True,
}  # fmt: skip
_POINTS = 1200  # of one drawn line; more cannot be told apart, and the page would grow with the run


class Series(NamedTuple):
    """One metric of a run over training."""

    tokens: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass
class Run:
    """What a run folder holds. `missing` says in words what it lacks."""

    name: str
    folder: Path
    records: list[dict[str, Any]] = field(default_factory=list)  # one a step, ascending
    settings: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    condensations: list[Condensation] = field(default_factory=list)  # by step, ascending
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)  # suite -> results.json of the last step
    missing: list[str] = field(default_factory=list)

    def series(self, key: str) -> Series:
        """Finite values of a metric; empty where there is none."""
        pairs = [(record.get("tokens"), record.get(key)) for record in self.records]
        finite = [(tokens, value) for tokens, value in pairs if _is_finite(tokens) and _is_finite(value)]
        table = np.array(finite, dtype=np.float64).reshape(-1, 2)
        return Series(table[:, 0], table[:, 1])

    def last(self, key: str) -> float | None:
        """The last finite value of a metric."""
        values = self.series(key).values
        return float(values[-1]) if len(values) else None

    def median(self, key: str) -> float | None:
        """The median of a metric without its first record, which has the warm-up in it."""
        values = self.series(key).values
        return float(np.median(values[1:] if len(values) > 1 else values)) if len(values) else None

    @property
    def training_loss(self) -> float | None:
        """Cross-entropy at the end of training: the mean of the last twentieth of the records."""
        values = self.series("loss/cross_entropy").values
        return float(values[-max(1, len(values) // 20) :].mean()) if len(values) else None

    @property
    def tokens(self) -> int:
        """Tokens seen up to the last record."""
        return max((int(record["tokens"]) for record in self.records if _is_finite(record.get("tokens"))), default=0)

    @property
    def last_half(self) -> tuple[float, float] | None:
        """Mean cosine of the last half of the layers at the first and the last measurement, if there are two."""
        if len(self.condensations) < 2:
            return None
        return self.condensations[0].last_half, self.condensations[-1].last_half


class Drawing(NamedTuple):
    """A figure of the page. `svg` is themed; `png` is the same picture for other uses, with a legend."""

    slug: str
    title: str
    caption: str
    svg: Markup
    png: bytes
    runs: list[tuple[str, int]]  # name and colour of the lines; empty: no legend


def write_report(folders: Sequence[str | Path], out: str | Path, figures_folder: str | Path | None = None) -> Path:
    """Write the page, and with `figures_folder` each figure as a PNG file there; returns the page's path.

    Raises:
        ValueError: a folder is no run, or none is given.
    """
    runs = load_runs(folders)
    drawings = draw_all(runs)
    page = render(runs, drawings)
    _write_atomically(Path(out), page.encode())
    if figures_folder is not None:
        for drawing in drawings:
            _write_atomically(Path(figures_folder, f"{drawing.slug}.png"), drawing.png)
    return Path(out)


# ---- reading


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read run folders; runs of the same name are told apart by their parent folders.

    Raises:
        ValueError: a folder is no run, or none is given.
    """
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if not paths:
        raise ValueError("runs: none are given. At least one run folder is needed. Name the folders of the runs to show.")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [_load_run(path, "/".join(path.parts[-depth:])) for path in paths]


def _load_run(folder: Path, name: str) -> Run:
    if not any((folder / marker).is_file() for marker in ("config.yaml", "metrics.jsonl")):
        raise ValueError(
            f"{folder}: is no run folder: it has neither config.yaml nor metrics.jsonl. A folder that launch/pretrain.py "
            "wrote is needed. Correct the path."
        )
    run = Run(name, folder)
    by_step: dict[int, dict[str, Any]] = {}
    for record in _json_lines(folder / "metrics.jsonl"):
        if isinstance(record.get("step"), int):
            by_step.setdefault(record["step"], {}).update(record)  # after a resume the last record of a step counts
    run.records = [by_step[step] for step in sorted(by_step)]
    run.starts = list(_json_lines(folder / "starts.jsonl"))
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        run.settings = settings if isinstance(settings, dict) else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.missing.append(f"config.yaml cannot be read ({type(error).__name__})")
    for path in sorted((folder / "condensation").glob("step-*.npz")):
        try:
            run.condensations.append(Condensation.load(path))
        except ValueError:
            run.missing.append(f"{path.name} is damaged and left out")
    run.condensations.sort(key=lambda measurement: measurement.step)
    for path in sorted((folder / "evaluations").glob("*/step-*/results.json")):
        results = _json(path.read_bytes())
        if results is None or not isinstance(results.get("results"), dict):
            run.missing.append(f"{path.parent.parent.name}/{path.parent.name}/results.json is damaged and left out")
        else:
            run.evaluations[path.parent.parent.name] = results
    run.missing += _lacks(run)
    return run


def _lacks(run: Run) -> list[str]:
    lacks = {
        "no training records": not len(run.series("loss/cross_entropy").values),
        "no validation": not len(run.series("validation/cross_entropy").values),
        "no condensation measurement": not run.condensations,
        "one condensation measurement only, so no before and after": len(run.condensations) == 1,
        "no evaluation results": not run.evaluations,
        "no record of its starts": not run.starts,
    }
    return [words for words, is_so in lacks.items() if is_so]


def _json(text: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except ValueError:  # a line that a kill cut, or another program's file
        return None
    return value if isinstance(value, dict) else None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        yield from filter(None, map(_json, path.read_bytes().splitlines()))


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---- words and tables


def findings(runs: list[Run]) -> list[str]:
    """Sentences that say what the page shows, from the runs' own numbers."""
    names = _listed([run.name for run in runs])
    differing, _ = compare_settings(runs)
    sections = sorted({row.key.partition(".")[0] for row in differing})
    if len(runs) == 1:
        sentences = [f"One run, {names}, over {_count(runs[0].tokens)} tokens."]
    else:
        what = f"which differ in {_listed(sections)}" if sections else "with the same settings"
        sentences = [f"{len(runs)} runs, {names}, {what}."]
    cosines = [f"{run.name} {pair[0]:.2f} → {pair[1]:.2f}" for run in runs if (pair := run.last_half)]
    if cosines:
        sentences.append(f"Mean cosine of the last half of the layers, before → after: {', '.join(cosines)}.")
    losses = [(run.name, run.last("validation/cross_entropy")) for run in runs]
    measured = [f"{name} {loss:.3f}" for name, loss in losses if loss is not None]
    if measured:
        sentences.append(f"Last validation loss: {', '.join(measured)}.")
    if len({run.tokens for run in runs}) > 1:
        ends = ", ".join(f"{run.name} {_count(run.tokens)}" for run in runs)
        sentences.append(f"The runs stand at different points ({ends} tokens): their last figures do not compare like with like.")
    seeds = {run.settings["run"].get("seed") for run in runs if isinstance(run.settings.get("run"), dict)}
    if len(runs) > 1 and len(seeds) == 1:
        sentences.append(f"All have seed {seeds.pop()}: how far another seed would move a figure is not known from these runs.")
    return sentences


class Row(NamedTuple):
    """One line of a comparison, a cell for each run."""

    key: str
    cells: list[str]


def summary(runs: list[Run]) -> tuple[list[str], list[Row]]:
    """Headings and one row a run."""
    reference = next((run for run in runs if not run.settings.get("dispersion")), runs[0])
    reference_s = reference.median("step_time_s")
    headings = ["tokens", "train loss", "validation loss", "perplexity", "cosine, last half", "Spearman ρ", "tokens/s", "step time"]
    rows = []
    for run in runs:
        pair, after = run.last_half, run.condensations[-1] if run.condensations else None
        step_s, speed = run.median("step_time_s"), run.median("tokens_per_s")
        loss = run.last("validation/cross_entropy")
        cosine = f"{pair[0]:.3f} → {pair[1]:.3f}" if pair else _number(after.last_half if after else None)
        ratio = f" (× {step_s / reference_s:.2f})" if step_s and reference_s and len(runs) > 1 else ""
        cells = [
            _count(run.tokens),
            _number(run.training_loss),
            _number(loss),
            _number(math.exp(loss) if loss is not None and loss < 700 else None, 1),
            cosine,
            _number(after.spearman if after else None, 2),
            "–" if speed is None else _count(speed),
            "–" if step_s is None else f"{_duration(step_s)}{ratio}",
        ]
        rows.append(Row(run.name, cells))
    return headings, rows


def compare_settings(runs: list[Run]) -> tuple[list[Row], list[Row]]:
    """Rows of the resolved settings: those that differ, and those that all runs share. Names and folders are no settings."""
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
            if _is_finite(run.starts[-1].get("time")):
                one["time"] = f"{datetime.fromtimestamp(run.starts[-1]['time'], UTC):%Y-%m-%d %H:%M} UTC"
        flat.append(one)
    return _compare(flat)


def _compare(columns: list[dict[str, str]]) -> tuple[list[Row], list[Row]]:
    keys = list(dict.fromkeys(key for column in columns for key in column))
    # A section that is null in one run stands as a row of its own beside the other runs' keys of it: one of them is enough.
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
            if _is_finite(value) and metric != "samples" and not metric.endswith("_stderr"):
                error = scores.get(f"{metric}_stderr")
                yield f"{task} · {metric}", f"{value:.4g}" + (f" ± {error:.2g}" if _is_finite(error) else "")


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def _count(value: float) -> str:
    """1234567 -> 1.23M."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


# ---- figures


def draw_all(runs: list[Run]) -> list[Drawing]:
    """Draw what the runs have data for, in the order of the page."""
    colors = {run.name: place for place, run in enumerate(runs)}
    window = max((_window(len(run.series("loss/cross_entropy").values)) for run in runs), default=1)
    smoothing = f"Line: moving mean of {window} records; faint: as logged." if window > 1 else "As logged."
    over_tokens = "Over tokens seen."
    candidates: list[tuple[str, str, str, Callable[[Axes, Run, int], bool], Callable[[Axes], Any]]] = [
        ("training_loss", "Training cross-entropy", f"In nats, over tokens seen. {smoothing}", _draw_loss, _tokens_axis),
        ("validation_loss", "Validation loss", "In nats, over tokens seen.", _draw_validation, _tokens_axis),
        ("last_half_cosine", "Mean cosine, last half of the layers", over_tokens, _draw_last_half, _tokens_axis),
        ("cosine_by_layer", "Mean cosine by depth", "Dashed: before; solid: after. 0 is the embedding output, 1 the last "
         "block.", _draw_by_layer, _fraction_axis),
        ("dispersion_loss", "Dispersion loss", f"The term before its coefficient. {smoothing}", _draw_dispersion, _tokens_axis),
    ]  # fmt: skip
    drawings = []
    with matplotlib.rc_context(_STYLE):
        for slug, title, caption, draw, finish in candidates:
            figure = Figure(figsize=(5.4, 2.9))
            axes = figure.subplots()
            shown = [(run.name, colors[run.name]) for run in runs if draw(axes, run, colors[run.name])]
            finish(axes)
            if shown:
                drawings.append(_finish(figure, slug, title, caption, shown))
        drawings += [_draw_layers(run, runs) for run in runs if run.condensations]
        drawings += [_draw_heatmaps(run) for run in runs if run.condensations]
    return drawings


def _line(index: int) -> dict[str, Any]:
    return {"color": SERIES[index % len(SERIES)], "linestyle": ("-", "-.", ":")[index // len(SERIES) % 3]}


def _draw_loss(axes: Axes, run: Run, index: int, key: str = "loss/cross_entropy") -> bool:
    tokens, values = run.series(key)
    window = _window(len(values))
    if window > 1:
        axes.plot(*_thinned(tokens, values), color=_line(index)["color"], linewidth=0.8, alpha=0.28)
        weights = np.convolve(np.ones_like(values), np.ones(window), "same")
        values = np.convolve(values, np.ones(window), "same") / weights
    axes.plot(*_thinned(tokens, values), **_line(index))
    return len(values) > 0


def _draw_dispersion(axes: Axes, run: Run, index: int) -> bool:
    return _draw_loss(axes, run, index, "loss/dispersion")


def _draw_validation(axes: Axes, run: Run, index: int) -> bool:
    tokens, values = run.series("validation/cross_entropy")
    axes.plot(*_thinned(tokens, values), marker="o", markersize=3.2, **_line(index))
    return len(values) > 0


def _draw_last_half(axes: Axes, run: Run, index: int) -> bool:
    tokens = [measurement.tokens for measurement in run.condensations]
    axes.plot(tokens, [measurement.last_half for measurement in run.condensations], marker="o", markersize=3.2, **_line(index))
    return bool(run.condensations)


def _draw_by_layer(axes: Axes, run: Run, index: int) -> bool:
    if len(run.condensations) > 1:
        before = run.condensations[0]
        axes.plot(before.layer_fraction, before.mean_cosine, color=_line(index)["color"], linewidth=1.2, dashes=(3, 2))
    for after in run.condensations[-1:]:
        axes.plot(after.layer_fraction, after.mean_cosine, marker="o", markersize=3.2, **_line(index))
    return bool(run.condensations)


def _tokens_axis(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: _count(value))
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6))
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens")


def _fraction_axis(axes: Axes) -> None:
    axes.set(xlabel="layer fraction", xlim=(-0.02, 1.02))


def _draw_layers(run: Run, runs: list[Run]) -> Drawing:
    """One line a layer over training; all runs share the scale, so that their pictures can be compared."""
    means = np.array([measurement.mean_cosine for other in runs for measurement in other.condensations][:0])
    every = [measurement.mean_cosine for other in runs for measurement in other.condensations]
    lowest, highest = min(float(mean.min()) for mean in every), max(float(mean.max()) for mean in every)
    margin = 0.05 * max(highest - lowest, 0.02)
    figure = Figure(figsize=(5.4, 2.9))
    axes = figure.subplots()
    num_states = len(run.condensations[-1].mean_cosine)
    same = [measurement for measurement in run.condensations if len(measurement.mean_cosine) == num_states]
    means = np.array([measurement.mean_cosine for measurement in same])
    tokens = [measurement.tokens for measurement in same]
    scale = ScalarMappable(Normalize(0, num_states - 1), _DEPTH_COLORS)
    for layer in range(num_states):
        axes.plot(tokens, means[:, layer], color=scale.to_rgba(layer), linewidth=1.3, marker="o", markersize=2.4)
    _tokens_axis(axes)
    axes.set_ylim(lowest - margin, highest + margin)
    bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=28, label="layer")
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.ax.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))
    caption = "Mean cosine of each hidden state over tokens seen; 0 is the embedding output."
    return _finish(figure, f"layers-{_slug(run.name)}", f"Layers over training: {run.name}", caption, [])


def _draw_heatmaps(run: Run) -> Drawing:
    """The density of cosines at the first and the last measurement."""
    chosen = run.condensations[:1] + run.condensations[1:][-1:]
    figure = Figure(figsize=(5.4, 2.7))
    panels = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    for axes, measurement in zip(panels, chosen, strict=False):
        when = f"after {_count(measurement.tokens)} tokens" if measurement.step else "before training"
        image = plot_heatmap(measurement, axes, when)
        axes.grid(False)
        axes.label_outer()
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=list(panels[: len(chosen)]), pad=0.02, aspect=28, label="density")
    bar.outline.set_visible(False)  # type: ignore[operator]
    measurement = chosen[-1]
    caption = (
        f"Cosines of token pairs, averaged over {measurement.num_texts} validation texts of {measurement.sequence_length} "
        "tokens. Condensed layers have their mass near 1."
    )
    return _finish(figure, f"heatmap-{_slug(run.name)}", f"Cosine heatmap: {run.name}", caption, [])


def _finish(figure: Figure, slug: str, title: str, caption: str, shown: list[tuple[str, int]]) -> Drawing:
    with matplotlib.rc_context({"svg.hashsalt": slug}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = _themed(buffer.getvalue(), slug, title)
    figure.suptitle(_plain(title), x=0.02, ha="left", fontsize=10)
    if len(shown) > 1:
        handles = [matplotlib.lines.Line2D([], [], **_line(index)) for _, index in shown]
        figure.legend(handles, [_plain(name) for name, _ in shown], loc="outside lower center", ncols=3)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=200, facecolor="white")
    return Drawing(slug, title, caption, svg, image.getvalue(), shown)


def _plain(text: str) -> str:
    """Keep matplotlib from reading `$` as mathematics and a leading `_` as "no legend"."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _themed(svg: str, slug: str, title: str) -> Markup:
    """Make matplotlib's SVG part of a page: no prologue, no metadata, ids of its own, the page's font and colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{slug}-", svg)
    svg = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font-size: \1", svg)
    for color, name in _THEMED.items():
        svg = svg.replace(color, f"var(--{name})")
    label = Markup.escape(title)
    svg = re.sub(r'<svg (.*?)width="[^"]*"', rf'<svg role="img" aria-label="@label@" \1', svg, count=1, flags=re.DOTALL)
    svg = re.sub(r'height="[0-9.]+pt" ', "", svg, count=1)
    return Markup(svg.replace("@label@", str(label), 1))  # noqa: S704  matplotlib has escaped all text of the picture


def _window(num_records: int) -> int:
    """Records in the moving mean: odd, a fortieth of the run."""
    return num_records // 40 // 2 * 2 + 1 if num_records >= 120 else (3 if num_records >= 30 else 1)


def _thinned(tokens: NDArray[np.float64], values: NDArray[np.float64]) -> Series:
    """At most `_POINTS` points; of each stretch that is left out the lowest and the highest stay, so spikes do."""
    if len(values) <= _POINTS:
        return Series(tokens, values)
    stretches = np.array_split(np.arange(len(values)), _POINTS // 2)
    ends = [(part[np.argmin(values[part])], part[np.argmax(values[part])]) for part in stretches]
    kept = np.unique(np.array(ends).ravel())
    return Series(tokens[kept], values[kept])


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "run"


# ---- the page


def render(runs: list[Run], drawings: list[Drawing]) -> str:
    """Fill the template; everything but the pictures is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    headings, rows = summary(runs)
    return environment.get_template("report.html.jinja").render(
        runs=runs,
        findings=findings(runs),
        headings=headings,
        rows=rows,
        drawings=drawings,
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
