"""Run folders made by hand for the tests of reports: metrics, condensation, and evaluations with their examples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from dispersion_pretrain.condensation import Condensation

NASTY = "<script>alert(1)<" + "b>$x$&\"'--><!--"  # a name that no page may take for its own text
TASKS = ("anli_r2", "arc_easy", "lambada", "mmlu", "openbookqa", "piqa", "winogrande")
DISPERSION = {"coefficient": 0.1}


def make_run(
    folder: Path,
    *,
    settings: dict[str, Any] | None = None,
    losses: tuple[float, ...] = (9.0, 8.0, 7.0),
    validation: tuple[float, ...] = (9.1, 7.1),
    cosines: tuple[float, ...] = (0.2, 0.6),
    step_time_s: float = 0.5,
) -> Path:
    """A run of one record every 10 steps of 1,000 tokens each; `cosines` is the last half's at each measurement."""
    folder.mkdir(parents=True)
    tree = settings if settings is not None else {"run": {"name": folder.name, "seed": 3}, "dispersion": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    records: list[dict[str, Any]] = []
    for number, loss in enumerate(losses, start=1):
        speed = {"step_time_s": step_time_s, "tokens_per_s": 1000 / step_time_s}
        records.append({"loss/cross_entropy": loss, **speed} | position(10 * number))
    for number, loss in enumerate(validation):
        records.append({"validation/cross_entropy": loss} | position(20 * number))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for number, cosine in enumerate(cosines):
        measurement(cosine, step=20 * number).save(folder / "condensation" / f"step-{20 * number:08d}.npz")
    (folder / "starts.jsonl").write_text(
        json.dumps({"time": 1.7e9, "world_size": 2, "versions": {"torch": "2"}}) + "\n"
    )
    return folder


def position(step: int) -> dict[str, Any]:
    """Where in training a record was made."""
    return {"step": step, "tokens": 1000 * step, "time": 1.7e9 + step}


def measurement(cosine: float, step: int, num_states: int = 3) -> Condensation:
    """Cosines that rise from 0.1 at the embedding output to `cosine` at the last block."""
    means = np.linspace(0.1, cosine, num_states)
    edges = np.linspace(-1, 1, 129)
    centres = (edges[1:] + edges[:-1]) / 2
    histogram = np.exp(-0.5 * ((centres - means[:, None]) / 0.08) ** 2)
    histogram /= histogram.sum(axis=1, keepdims=True) * (edges[1] - edges[0])
    return Condensation(means, histogram, edges, 1.0, 1.0, cosine, 8, 16, step, 1000 * step)


def seeded(name: str, seed: int, **sections: Any) -> dict[str, Any]:
    """Settings of a run; `sections` are those of methods."""
    methods = {"dispersion": None, "noisy_embeddings": None} | sections
    return {"run": {"name": name, "seed": seed}, "model": {"config": "gpt2"}, **methods}


def write_scores(run: Path, step: int, value: float, suite: str = "offline", **more: Any) -> Path:
    """Results of one task with a standard error and without examples."""
    scores = {"acc": value, "acc_stderr": 0.01, "samples": 500}
    return write_results(run, suite, step, {"task_a": scores}, **more)


def write_results(run: Path, suite: str, step: int, results: dict[str, Any], **more: Any) -> Path:
    """A results.json as an evaluation writes it."""
    folder = run / "evaluations" / suite / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"step": step, "results": results, "averages": {}, **more}))
    return folder


def write_accuracies(run: Path, answers: dict[str, NDArray[np.float64]], step: int = 40, suite: str = "paper") -> Path:
    """An evaluation whose tasks have (examples,) answers of 0 and 1, with the file of its examples."""
    results, tasks = {}, {}
    for task, right in answers.items():
        error = float(right.std() / np.sqrt(len(right)))
        results[task] = {"acc": float(right.mean()), "acc_stderr": error, "samples": len(right)}
        keys = [f"{task}/{place}" for place in range(len(right))]
        tasks[task] = {"acc": {"keys": keys, "values": right.tolist(), "weights": None}}
    average = float(np.mean([scores["acc"] for scores in results.values()]))
    folder = write_results(run, suite, step, results, averages={"acc": average})
    write_examples(folder, tasks)
    return folder


def write_examples(folder: Path, tasks: dict[str, Any]) -> None:
    """The file of examples beside a results.json."""
    (folder / "examples.json").write_text(json.dumps({"format_version": 1, "tasks": tasks}))


def answers(num_examples: int, level: float, effect: float, seed: int, arm: int) -> NDArray[np.float64]:
    """Right and wrong answers: examples differ in how hard they are, in the same way for all; chance is small.

    `effect` is what the arm adds to the share of right answers.
    """
    hardness = np.random.default_rng(num_examples).normal(size=num_examples)
    chance = np.random.default_rng([num_examples, seed, arm]).normal(scale=0.3, size=num_examples)
    order = np.argsort(np.argsort(hardness + chance))
    right = order < round(num_examples * (level + effect))
    return right.astype(np.float64)


def two_arms(
    root: Path, effect: float, seeds: tuple[int, ...] = (0, 1, 2), tasks: tuple[str, ...] = TASKS
) -> list[Path]:
    """Runs of a baseline and of an arm with the dispersion loss that answers `effect` more of the examples rightly."""
    folders = []
    for arm, section in enumerate((None, DISPERSION)):
        for seed in seeds:
            name = f"{('base', 'spread')[arm]}_s{seed}"
            chance = float(np.random.default_rng([seed, arm]).normal(scale=0.01))
            folder = make_run(
                root / name,
                settings=seeded(name, seed, dispersion=section),
                validation=(9.1, 7.1 + 0.3 * seed - 5 * effect * arm + chance),
                cosines=(0.2, 0.6 - 6 * effect * arm + chance),
                step_time_s=0.5 * (1.01 if arm else 1.0) * (1 + chance / 10),
            )
            luck = np.random.default_rng([seed, arm]).normal(scale=0.01, size=len(tasks))
            scored = {
                task: answers(300 + place, 0.3 + 0.05 * place, effect * arm + luck[place], seed, arm)
                for place, task in enumerate(tasks)
            }
            write_accuracies(folder, scored)
            folders.append(folder)
    return folders
