"""The pictures of a report: as SVG for the page and, where wanted, as PNG and SVG files for other uses.

In the page's SVG the colours are CSS variables and the text is text, so that the page's theme and font hold in it, too.
A file has the colours themselves, and its letters are shapes: it looks the same everywhere.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dispersion_pretrain.arms import Arm
from dispersion_pretrain.condensation import Condensation
from dispersion_pretrain.condensation_pictures import plot_heatmap
from dispersion_pretrain.run_folder import Run, Series

INK, MUTED, GRID = "#1f2329", "#6a727d", "#e4e7eb"
SERIES = ("#2f6fb7", "#d9622b", "#2c8a57", "#8358b5", "#b8862b", "#c2457f", "#3a8f9c", "#7a6a58")
_THEMED = {INK: "ink", MUTED: "muted", GRID: "grid"} | {color: f"series-{i}" for i, color in enumerate(SERIES)}
_DEPTH_COLORS = LinearSegmentedColormap.from_list("depth", ["#3f86c6", "#8d72b9", "#d65a7c", "#ec9440"])
STYLE: Any = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 8.5, "svg.fonttype": "none",
    "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED, "axes.edgecolor": GRID,
    "xtick.labelcolor": MUTED, "ytick.labelcolor": MUTED, "xtick.major.size": 0, "ytick.major.size": 0,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "lines.linewidth": 1.6,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.titlesize": 8.5,
    "axes.titlelocation": "left", "axes.titlecolor": MUTED, "legend.frameon": False, "figure.facecolor": "none",
    "axes.facecolor": "none", "savefig.facecolor": "none", "figure.constrained_layout.use": True,
}  # fmt: skip
_MOMENTS = 5  # of a run that have a heatmap
_POINTS = 1200  # of one drawn line; more cannot be told apart, and the page would grow with the run


class Drawing(NamedTuple):
    """One picture of the page."""

    slug: str  # unique on the page; the name of its files
    title: str
    caption: str
    svg: Markup
    figure: Figure
    lines: list[tuple[str, int]]  # name of an arm and its place among the colours; empty: no legend

    def files(self) -> Iterator[tuple[str, bytes]]:
        """File names and contents of the picture with its title and a legend, which the page has beside it. Once."""
        with matplotlib.rc_context({**STYLE, "svg.fonttype": "path", "svg.hashsalt": self.slug}):
            self.figure.suptitle(_plain(self.title), x=0.02, ha="left", fontsize=10)
            if len(self.lines) > 1:
                handles = [Line2D([], [], **_line(index)) for _, index in self.lines]
                labels = [_plain(name) for name, _ in self.lines]
                columns = max(1, min(3, 72 // (max(map(len, labels)) + 6)))  # about 72 letters fit beside each other
                rows = -(-len(labels) // columns)
                self.figure.set_figheight(self.figure.get_figheight() + 0.2 * rows)
                self.figure.legend(handles, labels, loc="outside lower center", ncols=columns)
            for ending, more in (("png", {"dpi": 200}), ("svg", {"metadata": {"Date": None}})):
                image = io.BytesIO()
                self.figure.savefig(image, format=ending, facecolor="white", **more)
                yield f"{self.slug}.{ending}", image.getvalue()


@dataclass(frozen=True)
class Gallery:
    """The pictures of a page, in its order."""

    main: list[Drawing]  # all arms in each
    by_run: list[list[Drawing]]  # heatmaps and layers of a run, beside each other
    side: list[Drawing]  # all arms in each, of less interest

    @property
    def drawings(self) -> list[Drawing]:
        """All of them."""
        return [*self.main, *(drawing for drawings in self.by_run for drawing in drawings), *self.side]


class _Comparison(NamedTuple):
    """A picture with a line for each run; `draw` tells whether the run has such data."""

    slug: str
    title: str
    caption: str
    draw: Callable[[Axes, Run, int], bool]
    finish: Callable[[Axes], None]


def draw_all(runs: list[Run], arms: Sequence[Arm]) -> Gallery:
    """Draw what the runs have data for; those of one arm have one colour."""
    slugs = [_slug(run.name) for run in runs]
    if len(set(slugs)) < len(slugs):
        slugs = [f"{place}-{slug}" for place, slug in enumerate(slugs)]
    measured = [(run, slug) for run, slug in zip(runs, slugs, strict=True) if run.condensations]
    with matplotlib.rc_context(STYLE):
        return Gallery(
            _compare(arms, _main_comparisons()),
            [[_draw_heatmaps(run, slug), _draw_layers(run, slug, runs)] for run, slug in measured],
            _compare(arms, _side_comparisons()),
        )


def shorten(value: float) -> str:
    """Three digits and a letter: 1234567 -> 1.23M."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


# ---- runs on one pair of axes


def _main_comparisons() -> list[_Comparison]:
    return [
        _Comparison(
            "training_loss",
            "Training cross-entropy",
            "In nats, over tokens seen. Line: moving mean; faint: as logged.",
            lambda axes, run, index: _draw_noisy(axes, run, index, "loss/cross_entropy"),
            _tokens_axis,
        ),
        _Comparison("validation_loss", "Validation loss", "In nats, over tokens seen.", _draw_validation, _tokens_axis),
        _Comparison(
            "last_half_cosine",
            "Mean cosine, last half of the layers",
            "Over tokens seen, on validation texts.",
            _draw_last_half,
            _tokens_axis,
        ),
        _Comparison(
            "cosine_by_depth",
            "Mean cosine by depth",
            "Dashed: first measurement; solid: last. 0 is the embedding output.",
            _draw_by_depth,
            _fraction_axis,
        ),
    ]


def _side_comparisons() -> list[_Comparison]:
    return [
        _Comparison(
            "dispersion_loss",
            "Dispersion loss",
            "Before its coefficient; lower is more spread out.",
            lambda axes, run, index: _draw_noisy(axes, run, index, "loss/dispersion"),
            _tokens_axis,
        ),
        _Comparison(
            "tokens_per_s",
            "Speed",
            "Tokens a second, over tokens seen.",
            lambda axes, run, index: _draw_noisy(axes, run, index, "tokens_per_s"),
            _speed_axis,
        ),
    ]


def _compare(arms: Sequence[Arm], comparisons: list[_Comparison]) -> list[Drawing]:
    drawings = []
    for slug, title, caption, draw, finish in comparisons:
        figure = Figure(figsize=(5.4, 2.9))
        axes = figure.subplots()
        drawn = [[draw(axes, run, index) for run in arm.runs] for index, arm in enumerate(arms)]
        shown = [(arm.name, index) for index, arm in enumerate(arms) if any(drawn[index])]
        finish(axes)
        if shown:
            drawings.append(_finish(figure, slug, title, caption, shown))
    return drawings


def _line(index: int) -> dict[str, Any]:
    return {"color": SERIES[index % len(SERIES)], "linestyle": ("-", "-.", ":")[index // len(SERIES) % 3]}


def _draw_noisy(axes: Axes, run: Run, index: int, key: str) -> bool:
    tokens, values = run.series(key)
    window = _window(len(values))
    if window > 1:
        axes.plot(*_thinned(tokens, values), color=_line(index)["color"], linewidth=0.8, alpha=0.3)
        kernel = np.ones(window)  # at the ends the mean is that of the records there are
        values = np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")
    axes.plot(*_thinned(tokens, values), **_line(index))
    return len(values) > 0


def _draw_validation(axes: Axes, run: Run, index: int) -> bool:
    tokens, values = run.series("validation/cross_entropy")
    axes.plot(*_thinned(tokens, values), marker="o", markersize=3.2, **_line(index))
    return len(values) > 0


def _draw_last_half(axes: Axes, run: Run, index: int) -> bool:
    tokens = [measurement.tokens for measurement in run.condensations]
    cosines = [measurement.last_half for measurement in run.condensations]
    axes.plot(tokens, cosines, marker="o", markersize=3.2, **_line(index))
    return bool(tokens)


def _draw_by_depth(axes: Axes, run: Run, index: int) -> bool:
    if len(run.condensations) > 1:
        first = run.condensations[0]
        axes.plot(first.layer_fraction, first.mean_cosine, color=_line(index)["color"], linewidth=1.2, dashes=(3, 2))
    for last in run.condensations[-1:]:
        axes.plot(last.layer_fraction, last.mean_cosine, marker="o", markersize=3.2, **_line(index))
    return bool(run.condensations)


def _tokens_axis(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(lambda value, _: shorten(value))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlim(left=0)
    axes.set_xlabel("tokens")


def _speed_axis(axes: Axes) -> None:
    _tokens_axis(axes)
    axes.yaxis.set_major_formatter(lambda value, _: shorten(value))
    axes.set_ylim(bottom=0)


def _fraction_axis(axes: Axes) -> None:
    axes.set(xlabel="layer fraction", xlim=(-0.02, 1.02))


def _window(num_records: int) -> int:
    """Records in the moving mean: an odd number, about a fortieth of the run, 1 where there is little to smooth."""
    return 1 if num_records < 30 else max(3, num_records // 40 // 2 * 2 + 1)


def _thinned(tokens: NDArray[np.float64], values: NDArray[np.float64]) -> Series:
    """At most `_POINTS` points; of each stretch that is left out the lowest and the highest stay, so spikes do."""
    if len(values) <= _POINTS:
        return Series(tokens, values)
    stretches = np.array_split(np.arange(len(values)), _POINTS // 2)
    ends = [(part[np.argmin(values[part])], part[np.argmax(values[part])]) for part in stretches]
    kept = np.unique(np.array(ends).ravel())
    return Series(tokens[kept], values[kept])


# ---- one run


def _draw_heatmaps(run: Run, slug: str) -> Drawing:
    """The density of cosines at up to five measurements, from the first to the last."""
    chosen = moments(run.condensations)
    figure = Figure(figsize=(7.4, 2.3))
    panels = figure.subplots(1, max(2, len(chosen)), sharey=True, squeeze=False)[0]
    for axes, measurement in zip(panels, chosen, strict=False):
        when = f"{shorten(measurement.tokens)} tokens" if measurement.step else "before training"
        image = plot_heatmap(measurement, axes, when)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.grid(False)
        axes.spines[["top", "right", "left"]].set_visible(True)
        axes.label_outer()
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    bar = figure.colorbar(image, ax=list(panels[: len(chosen)]), pad=0.012, aspect=28, label="density")
    bar.outline.set_visible(False)
    last = chosen[-1]
    caption = (
        f"Cosines of token pairs, averaged over {last.num_texts} validation texts of {last.sequence_length} tokens. "
        "Condensed layers have their mass near 1."
    )
    return _finish(figure, f"heatmap-{slug}", f"Cosine heatmaps: {run.name}", caption, [])


def moments(measurements: Sequence[Condensation]) -> list[Condensation]:
    """The first, the last and up to three evenly between them."""
    places = np.linspace(0, len(measurements) - 1, min(_MOMENTS, len(measurements)))
    return [measurements[place] for place in places.round().astype(int)]


def _draw_layers(run: Run, slug: str, runs: list[Run]) -> Drawing:
    """One line a layer over training; all runs share the scale, so that their pictures can be compared."""
    every = [measurement.mean_cosine for other in runs for measurement in other.condensations]
    lowest, highest = min(float(mean.min()) for mean in every), max(float(mean.max()) for mean in every)
    margin = 0.05 * max(highest - lowest, 0.02)
    figure = Figure(figsize=(3.5, 2.3))
    axes = figure.subplots()
    num_states = len(run.condensations[-1].mean_cosine)
    # The run's folder may have been used before with another model: its measurements are no part of these lines.
    measured = [measurement for measurement in run.condensations if len(measurement.mean_cosine) == num_states]
    tokens = [measurement.tokens for measurement in measured]
    for layer in range(num_states):
        means = [measurement.mean_cosine[layer] for measurement in measured]
        color = _DEPTH_COLORS(layer / (num_states - 1))
        axes.plot(tokens, means, color=color, linewidth=1.3, marker="o", markersize=2.4)
    _tokens_axis(axes)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_ylim(lowest - margin, highest + margin)
    scale = ScalarMappable(Normalize(0, num_states - 1), _DEPTH_COLORS)
    bar = figure.colorbar(scale, ax=axes, pad=0.02, aspect=28, label="layer")
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    caption = "Mean cosine of each hidden state; 0 is the embedding output."
    return _finish(figure, f"layers-{slug}", f"Layers over training: {run.name}", caption, [])


# ---- files


def _finish(figure: Figure, slug: str, title: str, caption: str, lines: list[tuple[str, int]]) -> Drawing:
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": slug}):  # the same ids for the same picture
        figure.savefig(text, format="svg", metadata={"Date": None})
    return Drawing(slug, title, caption, _themed(text.getvalue(), slug, title), figure, lines)


def _plain(text: str) -> str:
    """Keep matplotlib from reading `$` as mathematics and a leading `_` as "no legend"."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _themed(svg: str, slug: str, title: str) -> Markup:
    """Make matplotlib's SVG part of a page: no prologue, no metadata, ids of its own, the page's font and colours."""
    opening, rest = svg[svg.index("<svg") :].split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', opening)
    assert view_box is not None, opening
    rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    rest = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{slug}-", rest)
    rest = re.sub(r"font: ([0-9.]+px)[^;\"]*", r"font-size: \1", rest)
    for color, name in _THEMED.items():
        rest = rest.replace(color, f"var(--{name})")
    label = Markup('<svg role="img" aria-label="{}" ').format(title)
    return label + Markup(f"{view_box.group()}>{rest}")  # matplotlib has escaped all text in it


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-") or "run"
