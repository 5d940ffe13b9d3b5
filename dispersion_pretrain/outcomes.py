"""What arms came to, side by side: figures of training and benchmark scores, each with its difference to a reference.

A line is one figure; its cells are the arms. Seeds are paired by `run.seed`, examples by key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dispersion_pretrain import comparison
from dispersion_pretrain.arms import Arm, paired_seeds
from dispersion_pretrain.comparison import Array, Difference, Wilcoxon
from dispersion_pretrain.run_folder import Examples, Run, is_finite

AVERAGE = "average"  # the line that averages tasks
BETTER, WORSE = "better", "worse"


class Cell(NamedTuple):
    """An arm's figure."""

    mean: float | None  # over its seeds; None: it has none
    num_seeds: int  # that have the figure
    difference: Difference | None = None  # to the reference, for a ratio of logarithms; None: nothing to compare
    num_pairs: int = 0  # seeds in pairs; 0: the two arms have no seed in common
    basis: str = ""  # what the interval rests on; empty without one
    num_examples: int = 0  # in pairs; 0: unknown
    error: float | None = None  # of the mean over examples, as the evaluations report it


class Line(NamedTuple):
    """One figure of all arms."""

    task: str  # empty: a figure of training
    metric: str
    words: tuple[str, str]  # what an arm is whose figure is significantly below or above the reference's
    cells: list[Cell]
    is_ratio: bool = False

    @property
    def label(self) -> str:
        """Its name, with the direction where less is better."""
        name = f"{self.task} · {self.metric}" if self.task else self.metric
        return f"{name} (lower is better)" if self.words[0] == BETTER else name


class SuiteOutcome(NamedTuple):
    """A benchmark suite of all arms."""

    suite: str
    lines: list[Line]  # of tasks, averages last
    metric: str  # the one that tasks are tested and ranked by
    ranks: list[float]  # mean rank of each arm; empty where tasks or arms lack
    num_ranked: int  # tasks
    tests: list[Wilcoxon | None]  # of each arm against the reference over tasks that have the metric; None: itself
    notes: list[str]


# ---- figures of training


def training_lines(arms: Sequence[Arm], reference: Arm) -> list[Line]:
    """Validation loss, cosine and step time at the end of training, with Student's intervals over pairs of seeds."""
    figures: list[tuple[str, tuple[str, str], bool, Callable[[Run], float | None]]] = [
        ("validation loss", (BETTER, WORSE), False, lambda run: run.last("validation/cross_entropy")),
        ("mean cosine, last half of the layers", ("lower", "higher"), False, _last_cosine),
        ("cost, step time in s", ("faster", "slower"), True, lambda run: run.median("step_time_s")),
    ]
    lines = []
    for name, words, is_ratio, value in figures:
        cells = [_training_cell(arm, reference, value, is_ratio) for arm in arms]
        if any(cell.mean is not None for cell in cells):
            lines.append(Line("", name, words, cells, is_ratio))
    return lines


def _last_cosine(run: Run) -> float | None:
    return run.condensations[-1].last_half if run.condensations else None


def _training_cell(arm: Arm, reference: Arm, value: Callable[[Run], float | None], is_ratio: bool) -> Cell:
    mine, theirs = _by_seed(arm, value), _by_seed(reference, value)
    if not mine:
        return Cell(None, 0)
    mean = float(np.mean(list(mine.values())))
    if arm is reference or not theirs:
        return Cell(mean, len(mine))
    scale: Callable[[float], float] = math.log if is_ratio else float
    seeds = [seed for seed in paired_seeds(arm, reference) if seed in mine and seed in theirs]
    if seeds:
        differences = np.array([scale(mine[seed]) - scale(theirs[seed]) for seed in seeds])
    else:
        differences = np.array([np.mean([*map(scale, mine.values())]) - np.mean([*map(scale, theirs.values())])])
    basis = "seeds" if len(seeds) > 1 else ""
    return Cell(mean, len(mine), comparison.over_seeds(differences), len(seeds), basis)


def _by_seed(arm: Arm, value: Callable[[Run], float | None]) -> dict[Any, float]:
    found = {seed: value(run) for seed, run in arm.by_seed.items()}
    return {seed: one for seed, one in found.items() if one is not None}


# ---- benchmarks


def suite_outcomes(arms: Sequence[Arm], reference: Arm) -> list[SuiteOutcome]:
    """Each suite that any run was evaluated with, by name."""
    names = sorted({suite for arm in arms for run in arm.runs for suite in run.evaluations})
    return [_suite_outcome(name, arms, reference) for name in names]


def _suite_outcome(suite: str, arms: Sequence[Arm], reference: Arm) -> SuiteOutcome:
    results = [run.evaluations[suite] for arm in arms for run in arm.runs if suite in run.evaluations]
    by_task: dict[str, list[str]] = {}
    for task, metric in dict.fromkeys(pair for one in results for pair in _scored(one)):
        by_task.setdefault(task, []).append(metric)
    averaged = list(dict.fromkeys(metric for one in results for metric in one.get("averages") or {}))
    first = [metrics[0] for metrics in by_task.values()]
    main = averaged[0] if averaged else first[0] if first else ""
    everything = [([task], metric) for task, metrics in by_task.items() for metric in metrics]
    everything += [([task for task in by_task if metric in by_task[task]], metric) for metric in averaged]
    lines: list[Line] = []
    notes: list[str] = []
    for place, (tasks, metric) in enumerate(everything):
        is_average = place >= len(everything) - len(averaged)
        words = (BETTER, WORSE) if comparison.lower_is_better(metric) else (WORSE, BETTER)
        cells = [_score_cell(suite, tasks, metric, arm, reference, notes) for arm in arms]
        lines.append(Line(AVERAGE if is_average else tasks[0], metric, words, cells))
    single = [line for line in lines if line.task != AVERAGE]
    ranks, num_ranked = _ranks(single, by_task, main, len(arms))
    tests = [None if arm is reference else _wilcoxon(single, main, place) for place, arm in enumerate(arms)]
    notes += [*_without_examples(lines), *_unequal_steps(suite, arms)]
    return SuiteOutcome(suite, lines, main, ranks, num_ranked, tests, list(dict.fromkeys(notes)))


def _scored(results: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for task, scores in results["results"].items():
        for metric, value in scores.items() if isinstance(scores, dict) else ():
            if is_finite(value) and metric != "samples" and not metric.endswith("_stderr"):
                yield task, metric


def _score(run: Run, suite: str, task: str, metric: str) -> float | None:
    scores = run.evaluations.get(suite, {}).get("results", {}).get(task)
    value = scores.get(metric) if isinstance(scores, dict) else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _score_cell(suite: str, tasks: list[str], metric: str, arm: Arm, reference: Arm, notes: list[str]) -> Cell:
    """The mean over tasks (one, or those of an average); adds to `notes` what was missing."""

    def mean(run: Run) -> float | None:
        scores = [_score(run, suite, task, metric) for task in tasks]
        found = [score for score in scores if score is not None]
        return sum(found) / len(found) if len(found) == len(tasks) and found else None

    mine, theirs = _by_seed(arm, mean), _by_seed(reference, mean)
    if not mine:
        return Cell(None, 0)
    error = math.sqrt(
        sum(np.mean([_squared_error(arm.by_seed[seed], suite, task, metric) for seed in mine]) for task in tasks)
    ) / len(tasks)
    cell = Cell(float(np.mean(list(mine.values()))), len(mine), error=None if math.isnan(error) else error)
    if arm is reference or not theirs:
        return cell
    seeds = [seed for seed in paired_seeds(arm, reference) if seed in mine and seed in theirs]
    if seeds and len(seeds) < max(len(mine), len(theirs), len(arm.runs), len(reference.runs)):
        listed = ", ".join(map(str, seeds))
        notes.append(f"{arm.name} against {reference.name}: only seed{'s' * (len(seeds) > 1)} {listed} in pairs.")
    sides = [[side.by_seed[seed] for seed in seeds or found] for side, found in ((arm, mine), (reference, theirs))]
    unlike = {task: _unlike([*sides[0], *sides[1]], suite, task, metric) for task in tasks}
    if any(unlike.values()):  # not the same questions: a difference would be no effect of the arm
        notes += [
            f"{task}: {arm.name} and {reference.name} were not asked the same (they differ in {', '.join(names)}), so "
            "they are not compared."
            for task, names in unlike.items()
            if names
        ]
        return cell
    if not seeds:
        notes.append(f"{arm.name} against {reference.name}: no seed in common, so seeds are averaged, not resampled.")
    pairs = [_pairs(suite, task, metric, *sides, is_paired=bool(seeds), notes=notes) for task in tasks]
    difference, basis = _judge(pairs)
    num_examples = sum(pair.num_examples for pair in pairs) if basis.startswith("examples") else 0
    return cell._replace(difference=difference, num_pairs=len(seeds), basis=basis, num_examples=num_examples)


def _unlike(runs: list[Run], suite: str, task: str, metric: str) -> list[str]:
    """In what the evaluations of a task differ besides the model: settings, or the weights of examples of one key."""
    asked = [_asked(run, suite, task) for run in runs]
    names = [name for name in asked[0] if any(one[name] != asked[0][name] for one in asked[1:])]
    found = [run.examples.get(suite, {}).get((task, metric)) for run in runs]
    weighted = [one for one in found if one is not None and one.weights is not None]
    if not names and len(weighted) > 1:
        keys = _common_keys(weighted)
        first, *others = [_aligned(one.keys, one.weights, keys) for one in weighted if one.weights is not None]
        if not all(np.array_equal(first, other) for other in others):
            names.append("weights of examples")
    return names


def _asked(run: Run, suite: str, task: str) -> dict[str, Any]:
    """What decides the scores of a task besides the model, but for how many examples it took: those in common count."""
    settings = run.evaluations[suite].get("settings") or {}
    identity = settings.get("identity") or {}
    entries = (identity.get("suite") or {}).get("tasks") or []
    entry: dict[str, Any] = next((one for one in entries if one.get("task") == task), {})
    return {
        "definition of the task": {name: value for name, value in entry.items() if name not in ("limit", "metrics")},
        "--max-length": identity.get("max_length"),
        "corpus": identity.get("corpus_sha256") if entry.get("held_out") else None,
        "version of lm-eval": identity.get("lm_eval"),
    }


class _Pairs(NamedTuple):
    """Differences of one task, for each pair of seeds (or one of the means, where no seed is common)."""

    differences: Array  # (seeds,)
    resampled: Array | None  # (seeds, draws); None: without examples
    errors: Array | None  # (seeds,) standard errors of the differences, as if unpaired; None: unknown
    num_examples: int


def _pairs(
    suite: str, task: str, metric: str, mine: list[Run], theirs: list[Run], *, is_paired: bool, notes: list[str]
) -> _Pairs:
    runs = [*mine, *theirs]
    examples = [_trusted_examples(run, suite, task, metric, notes) for run in runs]
    scores = np.array([_score(run, suite, task, metric) for run in runs])
    resampled = None
    squares = np.array([_squared_error(run, suite, task, metric) for run in runs])
    num_examples = min(_samples(run, suite, task) for run in runs)
    known = [one for one in examples if one is not None]
    if len(known) == len(runs):
        keys = _common_keys(known)
        num_all = max(len(one.keys) for one in known)
        if len(keys) < num_all:
            notes.append(f"{task}: {len(keys):,} of {num_all:,} examples are in all evaluations; only these count.")
        values = np.stack([_aligned(one.keys, one.values, keys) for one in known])
        weights = None if known[0].weights is None else _aligned(known[0].keys, known[0].weights, keys)
        num_examples = len(keys)
        if keys:
            units = len(keys) if weights is None else weights.sum()
            scores = comparison.score(metric, values.sum(axis=1), units)
            resampled = comparison.resampled_scores(metric, values, weights, _stream(task))
    count = len(mine)
    if not is_paired:
        scores = np.array([scores[:count].mean(), scores[count:].mean()])
        squares = np.array([squares[:count].mean(), squares[count:].mean()])
        if resampled is not None:
            resampled = np.stack([resampled[:count].mean(axis=0), resampled[count:].mean(axis=0)])
        count = 1
    return _Pairs(
        scores[:count] - scores[count:],
        None if resampled is None else resampled[:count] - resampled[count:],
        None if np.isnan(squares).any() else np.sqrt(squares[:count] + squares[count:]),
        num_examples,
    )


def _judge(pairs: list[_Pairs]) -> tuple[Difference, str]:
    """The mean difference over tasks, with what its interval rests on."""
    differences = np.mean([pair.differences for pair in pairs], axis=0)
    num_examples = min(pair.num_examples for pair in pairs)
    and_seeds = " and seeds" if len(differences) > 1 else ""
    resampled = [pair.resampled for pair in pairs if pair.resampled is not None]
    errors = [pair.errors for pair in pairs if pair.errors is not None]
    if num_examples < comparison.MINIMUM_PAIRS:
        return Difference(float(differences.mean())), ""
    if len(resampled) == len(pairs):
        mean = np.mean(resampled, axis=0)
        return comparison.over_examples_and_seeds(differences, mean, num_examples), f"examples{and_seeds}"
    if len(errors) == len(pairs):
        error = np.sqrt(np.sum(np.square(errors), axis=0)) / len(pairs)
        return comparison.from_standard_errors(differences, error, num_examples), f"standard errors{and_seeds}"
    return comparison.over_seeds(differences), "seeds" if len(differences) > 1 else ""


def _trusted_examples(run: Run, suite: str, task: str, metric: str, notes: list[str]) -> Examples | None:
    """A run's examples of a task, unless the score of its evaluation does not follow from them."""
    examples = run.examples.get(suite, {}).get((task, metric))
    reported = _score(run, suite, task, metric)
    if examples is None or reported is None or not examples.keys:
        return None
    units = len(examples.keys) if examples.weights is None else float(examples.weights.sum())
    found = float(comparison.score(metric, np.array([examples.values.sum()]), units)[0])
    if math.isclose(found, reported, rel_tol=1e-4, abs_tol=1e-9):
        return examples
    notes.append(f"{task} of {run.name}: its examples make {metric} {found:.5g}, its results say {reported:.5g}.")
    return None


def _common_keys(examples: list[Examples]) -> list[str]:
    """Keys that all have, in an order that is not that of any one."""
    return sorted(set(examples[0].keys).intersection(*(one.keys for one in examples[1:])))


def _aligned(keys: list[str], values: Array, wanted: list[str]) -> Array:
    place = {key: index for index, key in enumerate(keys)}
    return values[[place[key] for key in wanted]]


def _stream(task: str) -> int:
    """A seed for the draws of a task's examples: other draws for each task, the same for all arms."""
    return int.from_bytes(task.encode(), "little")


def _samples(run: Run, suite: str, task: str) -> int:
    count = run.evaluations[suite]["results"][task].get("samples")
    return count if isinstance(count, int) else comparison.MINIMUM_PAIRS


def _squared_error(run: Run, suite: str, task: str, metric: str) -> float:
    error = run.evaluations[suite]["results"][task].get(f"{metric}_stderr")
    return error**2 if isinstance(error, int | float) and math.isfinite(error) else math.nan


def _ranks(lines: list[Line], by_task: dict[str, list[str]], main: str, num_arms: int) -> tuple[list[float], int]:
    """Mean ranks over the tasks that all arms have, each task by its main metric, or else by its first."""
    chosen = {task: main if main in metrics else metrics[0] for task, metrics in by_task.items()}
    complete = [  # the reference alone has no difference
        line
        for line in lines
        if chosen[line.task] == line.metric
        and all(cell.num_seeds for cell in line.cells)
        and sum(cell.difference is None for cell in line.cells) == 1
    ]
    if num_arms < 2 or not complete:
        return [], 0
    scores = np.array([[cell.mean for cell in line.cells] for line in complete], dtype=float)
    is_lower_better = np.array([line.words[0] == BETTER for line in complete])
    return comparison.average_ranks(scores, is_lower_better).tolist(), len(complete)


def _wilcoxon(lines: list[Line], metric: str, place: int) -> Wilcoxon:
    """Test an arm's differences over the tasks that have the metric; sizes of others could not be ranked with them."""
    found = [line.cells[place].difference for line in lines if line.metric == metric]
    return comparison.wilcoxon(np.array([difference.estimate for difference in found if difference is not None]))


def _without_examples(lines: list[Line]) -> list[str]:
    """Where differences could not be judged example by example, and what they rest on instead."""
    words = {
        "standard errors": "rest on the scores' standard errors, as if arms had answered different examples",
        "seeds": "are over seeds only",
        "": "are missing",
    }
    found: dict[str, list[str]] = {}
    for line in lines:
        for basis in dict.fromkeys(cell.basis.removesuffix(" and seeds") for cell in line.cells if cell.difference):
            found.setdefault(basis, []).append(line.label)
    return [
        f"For want of examples that all runs have, intervals {what}: {', '.join(found[basis])}."
        for basis, what in words.items()
        if basis in found
    ]


def _unequal_steps(suite: str, arms: Sequence[Arm]) -> list[str]:
    evaluations = [run.evaluations[suite] for arm in arms for run in arm.runs if suite in run.evaluations]
    tokens = {str(one.get("tokens") or one.get("step")) for one in evaluations}
    return ["The runs were evaluated at unequal numbers of tokens."] if len(tokens) > 1 else []
