"""What a run folder holds, read for looking at it: metrics, settings, starts, condensation measurements, scores.

What a folder lacks or what is damaged is put into words; only a folder that is no run is an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from dispersion_pretrain.condensation import Condensation
from dispersion_pretrain.metrics import read_metrics


class Series(NamedTuple):
    """One metric of a run over training."""

    tokens: NDArray[np.float64]
    values: NDArray[np.float64]


class Examples(NamedTuple):
    """What a model made of each example of a task, under one metric."""

    keys: list[str]  # distinct; the same example has the same key in every evaluation
    values: NDArray[np.float64]
    weights: NDArray[np.float64] | None  # words or bytes of documents whose log-likelihoods the values are


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
    examples: dict[str, dict[tuple[str, str], Examples]] = field(default_factory=dict)  # suite -> by task and metric
    missing: list[str] = field(default_factory=list)

    def series(self, key: str) -> Series:
        """Finite values of a metric; empty where there is none."""
        pairs = [(record.get("tokens"), record.get(key)) for record in self.records]
        finite = [(tokens, value) for tokens, value in pairs if is_finite(tokens) and is_finite(value)]
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
        return max((int(record["tokens"]) for record in self.records if is_finite(record.get("tokens"))), default=0)

    @property
    def last_half(self) -> tuple[float, float] | None:
        """Mean cosine of the last half of the layers at the first and the last measurement, if there are two."""
        if len(self.condensations) < 2:
            return None
        return self.condensations[0].last_half, self.condensations[-1].last_half


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Read run folders; runs of the same name are told apart by their parent folders.

    Raises:
        ValueError: a folder is no run, or none is given.
    """
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    if not paths:
        raise ValueError("runs: none are given. At least one folder is needed. Name the folders of the runs to show.")
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return [_load_run(path, "/".join(path.parts[-depth:])) for path in paths]


def _load_run(folder: Path, name: str) -> Run:
    if not any((folder / marker).is_file() for marker in ("config.yaml", "metrics.jsonl")):
        raise ValueError(
            f"{folder}: is no run folder: it has neither config.yaml nor metrics.jsonl. A folder that "
            "launch/pretrain.py wrote is needed. Correct the path."
        )
    run = Run(name, folder, records=read_metrics(folder))
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
            suite = path.parent.parent.name
            run.evaluations[suite] = results
            try:
                run.examples[suite] = _load_examples(path.with_name("examples.json"))
            except ValueError as error:
                run.examples[suite] = {}
                run.missing.append(f"{suite}/{path.parent.name}/examples.json is left out ({error})")
            run.missing += [f"benchmark failed: {task}" for task in results.get("errors") or ()]
    for path in sorted((folder / "evaluations").glob("*/step-*/failed.json")):
        if not path.with_name("results.json").exists():
            run.missing.append(f"evaluation {path.parent.parent.name}/{path.parent.name} failed")
    run.missing += _lacks(run)
    return run


def _load_examples(path: Path) -> dict[tuple[str, str], Examples]:
    """Read the examples beside a results.json; older evaluations have none.

    Raises:
        ValueError: the file is not what it must be; says why.
    """
    if not path.is_file():
        return {}
    content = _json(path.read_bytes())
    if content is None or content.get("format_version") != 1 or not isinstance(content.get("tasks"), dict):
        raise ValueError("no examples of format version 1")
    examples = {}
    for task, metrics in content["tasks"].items():
        for metric, entry in metrics.items() if isinstance(metrics, dict) else ():
            try:
                keys = list(map(str, entry["keys"]))
                values = np.array(entry["values"], dtype=np.float64)
                weights = None if entry["weights"] is None else np.array(entry["weights"], dtype=np.float64)
            except (KeyError, TypeError, ValueError):
                raise ValueError(f"{task} {metric}: no lists of keys, values and weights") from None
            shapes = {(len(keys),), values.shape} | ({weights.shape} if weights is not None else set())
            if len(shapes) > 1 or len(set(keys)) < len(keys):
                raise ValueError(f"{task} {metric}: keys, values and weights do not belong together")
            if not np.isfinite(values).all() or (weights is not None and not (weights >= 0).all()):
                raise ValueError(f"{task} {metric}: values that are not finite, or weights below 0")
            examples[task, metric] = Examples(keys, values, weights)
    return examples


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


def is_finite(value: Any) -> bool:
    """Whether it is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and math.isfinite(value)
