"""Several models measured on the same texts: one table by size, the trend over size, and the files of both."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dispersion_pretrain.condensation import QUANTILES, Condensation, rank_correlations
from dispersion_pretrain.condensation_pictures import draw_curves, draw_heatmaps, draw_trend

_LEAST_FOR_A_TREND = 3  # models; two of them rise or fall always
_MAX_LAST = 5  # blocks


@dataclass(frozen=True)
class Member:
    """One measured model."""

    name: str
    parameters: int
    condensation: Condensation


def by_size(members: Sequence[Member]) -> list[Member]:
    """The models from small to large; those of one size stay in their order."""
    return sorted(members, key=lambda member: member.parameters)


def trend(members: Sequence[Member]) -> float | None:
    """Spearman's rho between the logarithm of the size and the mean cosine of the last half.

    Near -1: the larger the model, the less it condenses. None for fewer than 3 models of different size.
    """
    sizes = np.array([member.parameters for member in members])
    if len(set(sizes.tolist())) < _LEAST_FOR_A_TREND:
        return None
    last_half = np.array([member.condensation.last_half for member in members])
    return rank_correlations(np.log(sizes), last_half)[0]


def print_tables(members: Sequence[Member], console: Console | None = None) -> None:
    """Print the family, a line a model, then the layers of each."""
    console = console or Console()
    length = members[0].condensation.sequence_length
    family = Table(title=f"Embedding condensation on texts of {length} tokens", title_justify="left")
    family.add_column("model", overflow="fold")
    for heading in ("parameters", "blocks", "texts", "Spearman", "Kendall", "eff. rank"):
        family.add_column(heading, justify="right", no_wrap=True)
    means = Table(title="Mean cosine of the last blocks", title_justify="left")
    means.add_column("model", overflow="fold")
    for heading in ("last half", "last 1", *(f"last {k}" for k in range(2, _MAX_LAST + 1))):
        means.add_column(heading, justify="right")
    for member in by_size(members):
        result, name = member.condensation, Text(member.name)
        counts = (member.parameters, len(result.mean_cosine) - 1, result.num_texts)
        correlations = (f"{result.spearman:.3f}", f"{result.kendall:.3f}")
        family.add_row(name, *(f"{count:,}" for count in counts), *correlations, f"{result.effective_rank[-1]:.2f}")
        means.add_row(name, *(f"{mean:.4f}" for mean in (result.last_half, *result.last_k)))
    console.print(family)
    console.print(means)
    for member in by_size(members):
        layers = Table(title=Text(f"{member.name}: cosines by layer"), title_justify="left")
        for heading in ("layer", "mean", *(f"{level:.0%}" for level in QUANTILES), "eff. rank"):
            layers.add_column(heading, justify="right")
        result = member.condensation
        for layer, mean in enumerate(result.mean_cosine):
            cosines = (f"{cosine:.4f}" for cosine in (mean, *result.quantiles[layer]))
            layers.add_row(str(layer), *cosines, f"{result.effective_rank[layer]:.2f}")
        console.print(layers)
    correlation = trend(members)
    if correlation is not None:
        console.print(f"Trend over size: {_trend_in_words(correlation, len(members))}")


def write_files(members: Sequence[Member], folder: Path) -> list[Path]:
    """Write table.csv, layers.csv, one npz a model, and the pictures; returns what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    members = by_size(members)
    written = [folder / "table.csv", folder / "layers.csv"]
    _write_csv(written[0], [_row(member) for member in members])
    _write_csv(written[1], [row for member in members for row in _layers(member)])
    for member, name in zip(members, _file_names([member.name for member in members]), strict=True):
        written.append(folder / f"{name}.npz")
        member.condensation.save(written[-1])
    named = {member.name: member.condensation for member in members}
    figures = {"heatmap.png": draw_heatmaps(named), "curves.png": draw_curves(named)}
    correlation = trend(members)
    if correlation is not None:
        sizes, last_half = zip(*((member.parameters, member.condensation.last_half) for member in members), strict=True)
        title = _trend_in_words(correlation, len(members))
        figures["trend.png"] = draw_trend([member.name for member in members], sizes, last_half, title)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=200)
        written.append(folder / name)
    return written


def _trend_in_words(correlation: float, num_models: int) -> str:
    return f"Spearman rho {correlation:.2f} of last half and size, {num_models} models"


def _row(member: Member) -> dict[str, str | int | float]:
    result = member.condensation
    last = {f"last_{k}": result.last_k[k - 1] if k <= len(result.last_k) else "" for k in range(1, _MAX_LAST + 1)}
    return {
        "model": member.name,
        "parameters": member.parameters,
        "blocks": len(result.mean_cosine) - 1,
        "texts": result.num_texts,
        "tokens_per_text": result.sequence_length,
        "spearman": result.spearman,
        "kendall": result.kendall,
        **last,
        "last_half": result.last_half,
        "effective_rank": float(result.effective_rank[-1]),
    }


def _layers(member: Member) -> Iterator[dict[str, str | int | float]]:
    result = member.condensation
    for layer, mean in enumerate(result.mean_cosine):
        levels = zip(QUANTILES, result.quantiles[layer], strict=True)
        yield {
            "model": member.name,
            "layer": layer,
            "layer_fraction": float(result.layer_fraction[layer]),
            "mean_cosine": float(mean),
            **{f"quantile_{100 * level:02.0f}": float(value) for level, value in levels},
            "effective_rank": float(result.effective_rank[layer]),
        }


def _write_csv(path: Path, rows: list[dict[str, str | int | float]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _file_names(names: Sequence[str]) -> list[str]:
    """A file name for each model; where two would share one, they are numbered."""
    plain = [re.sub(r"[^A-Za-z0-9._@-]+", "_", name).strip("_.") or "model" for name in names]
    return [f"{place}-{name}" if plain.count(name) > 1 else name for place, name in enumerate(plain, 1)]
