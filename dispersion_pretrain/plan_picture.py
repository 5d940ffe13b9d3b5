"""The picture of a plan: how speed and the parts of a step change with the number of GPUs."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from dispersion_pretrain.figures import MUTED, SERIES, STYLE, shorten
from dispersion_pretrain.plan import Estimate, Planner

_PARTS = ("compute", "term", "zero", "pool", "update", "checkpoint")
_LABELS = ("computation", "dispersion term", "ZeRO's communication", "pool's communication", "update", "checkpoints")


def draw_scaling(planner: Planner, path: Path) -> None:
    """Write the picture; the ending of `path` (.png, .svg) says in which format.

    Raises:
        ValueError: another ending, or no number of GPUs that the batch divides among.
    """
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"picture: {path} ends with {path.suffix!r}. .png and .svg are allowed. Rename it.")
    rows = [(gpus, row) for gpus, row in planner.scaling() if isinstance(row, Estimate)]
    if not rows:
        raise ValueError("picture: no number of GPUs fits the batch. At least one is needed. See the table.")
    gpus = [number for number, _ in rows]
    speeds = [row.tokens_per_s for _, row in rows]
    per_gpu = max(speed / number for speed, number in zip(speeds, gpus, strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.4, 3.4))
        left, right = figure.subplots(1, 2)
        left.plot(gpus, [per_gpu * number for number in gpus], color=MUTED, linestyle=":", label="linear")
        left.plot(gpus, speeds, color=SERIES[0], marker="o", markersize=3.5, label="planned")
        left.set(xscale="log", yscale="log", xlabel="GPUs", title="Tokens a second")
        left.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shorten(value)))
        left.legend(loc="upper left")
        bottom = [0.0] * len(rows)
        places = range(len(rows))
        for part, label, color in zip(_PARTS, _LABELS, SERIES, strict=False):
            shares = [getattr(row.time, part) / row.time.total for _, row in rows]
            if max(shares) > 0:
                right.bar(places, shares, bottom=bottom, color=color, label=label, width=0.72)
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
        right.set(xticks=list(places), xticklabels=[f"{number:,}" for number in gpus], xlabel="GPUs", ylim=(0, 1))
        right.set_title("Parts of a step")
        right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        right.grid(axis="x", visible=False)
        left.set_xticks(gpus, [f"{number:,}" for number in gpus], rotation=0 if len(gpus) < 7 else 45)
        for axis in (left.xaxis, left.yaxis):
            axis.set_minor_locator(NullLocator())
        handles, labels = right.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3)
        settings = planner.settings
        figure.suptitle(
            f"{settings.run.name}: ZeRO stage {settings.zero.stage} on {planner.machine.name}, "
            f"{shorten(settings.training.global_batch_tokens)} tokens a step",
            x=0.02, ha="left", fontsize=10,
        )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=200, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
