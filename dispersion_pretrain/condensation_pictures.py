"""Pictures of condensation: the paper's heatmap, mean cosines over depth, a family side by side and over size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from dispersion_pretrain.condensation import QUANTILES, Condensation

MAX_DENSITY = 10.0  # upper end of the heatmap's colour scale
HEATMAP_COLORS = ("#ffffff", "#fde3cf", "#f6a878", "#e2604f", "#ad2750", "#5a1246")  # of density 0 ... MAX_DENSITY
_TRAINING_SIZE = (4.0, 3.2)  # inches of a picture in TensorBoard, at 100 dots an inch


def plot_heatmap(condensation: Condensation, axes: Axes, title: str = "") -> AxesImage:
    """Draw the density of cosines (colour, 0 ... 10) over layer fraction (x) and cosine (y); returns the image."""
    half_cell = 0.5 / (len(condensation.mean_cosine) - 1)
    image = axes.imshow(
        condensation.histogram.T,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap=LinearSegmentedColormap.from_list("density", HEATMAP_COLORS),
        vmin=0.0,
        vmax=MAX_DENSITY,
        extent=(-half_cell, 1 + half_cell, -1.0, 1.0),  # a column is centred on its layer's fraction
    )
    axes.set(xlabel="layer fraction", ylabel="cosine", xticks=[0, 0.5, 1], yticks=[-1, -0.5, 0, 0.5, 1], title=title)
    return image


def plot_curves(condensations: Mapping[str, Condensation], axes: Axes) -> None:
    """Draw the mean cosine over layer fraction, a line each; the keys are the labels."""
    for label, condensation in condensations.items():
        axes.plot(condensation.layer_fraction, condensation.mean_cosine, marker="o", markersize=3, label=label)
    axes.set(xlabel="layer fraction", ylabel="mean cosine", xlim=(-0.02, 1.02))


def draw_heatmaps(condensations: Mapping[str, Condensation]) -> Figure:
    """The heatmaps of one or more models side by side, on one scale; the keys are the titles."""
    figure = Figure(figsize=(1.2 + 3.4 * len(condensations), 3.4), layout="constrained")
    panels = figure.subplots(1, len(condensations), squeeze=False, sharey=True)[0]
    for axes, (name, condensation) in zip(panels, condensations.items(), strict=True):
        image = plot_heatmap(condensation, axes, _plain(name))
        axes.label_outer()
    figure.colorbar(image, ax=panels.tolist(), label="probability density")
    return figure


def draw_curves(condensations: Mapping[str, Condensation]) -> Figure:
    """The mean cosines of models over depth, in one plot."""
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.subplots()
    plot_curves({_plain(name): condensation for name, condensation in condensations.items()}, axes)
    axes.legend(frameon=False)
    return figure


def draw_trend(names: Sequence[str], parameters: Sequence[int], last_half: Sequence[float], title: str) -> Figure:
    """The mean cosine of each model's last half over its size, on a logarithmic axis."""
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(parameters, last_half, marker="o", markersize=5, linewidth=1)
    for name, size, mean in zip(names, parameters, last_half, strict=True):
        axes.annotate(_plain(name), (size, mean), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="parameters", ylabel="mean cosine, last half", title=title)
    axes.margins(x=0.25, y=0.15)
    return figure


def training_pictures(condensation: Condensation) -> dict[str, NDArray[np.uint8]]:
    """The pictures of one measurement under their TensorBoard tags, each (height, width, 3)."""
    title = f"step {condensation.step:,}"
    heatmap = Figure(figsize=_TRAINING_SIZE, layout="constrained")
    axes = heatmap.subplots()
    heatmap.colorbar(plot_heatmap(condensation, axes, title), ax=axes, label="probability density")
    curves = Figure(figsize=_TRAINING_SIZE, layout="constrained")
    axes = curves.subplots()
    for k in range(len(QUANTILES) // 2):
        low, high = condensation.quantiles[:, k], condensation.quantiles[:, -1 - k]
        label = f"{QUANTILES[k]:.0%} to {QUANTILES[-1 - k]:.0%} of pairs"
        axes.fill_between(condensation.layer_fraction, low, high, color="C0", alpha=0.2, linewidth=0, label=label)
    plot_curves({"mean": condensation}, axes)
    axes.set(
        ylim=(-1.05, 1.05), ylabel="cosine", title=title
    )  # the same at each step, so that the slider shows what moves
    axes.legend(frameon=False, fontsize=7, loc="lower left")
    return {"condensation/heatmap": _pixels(heatmap), "condensation/curves": _pixels(curves)}


def _pixels(figure: Figure) -> NDArray[np.uint8]:
    canvas = FigureCanvasAgg(figure)  # pyplot would keep every figure of a run
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _plain(name: str) -> str:
    return name.replace("$", r"\$")
