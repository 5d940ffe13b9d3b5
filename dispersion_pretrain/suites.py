"""Suites of lm-eval tasks: what an evaluation runs, and the tables of its scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

_REPOSITORY = Path(__file__).resolve().parent.parent


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Questions(_Section):
    """Questions made of held-out text: which of several continuations is the one that stands there."""

    number: int = Field(ge=1, description="at most; a short text gives fewer")
    choices: int = Field(4, ge=2)
    context_words: int = Field(ge=1, description="before the continuation")
    continuation_words: int = Field(ge=1)


class HeldOut(_Section):
    """How much of the corpus' validation split a task reads, from its beginning, and whether it asks about it.

    Without `questions` the task's data are the documents, in a column `text`; with them `context`, `choices` (texts)
    and `answer` (the true one's index).
    """

    documents: int = Field(ge=1)
    tokens: int = Field(ge=2)
    questions: Questions | None = None


class SuiteTask(_Section):
    """One lm-eval task or group: a known name, or a task of ours over held-out text with its own lm-eval `config`."""

    task: str
    dataset: str | None = Field(None, description="on the hub; for messages")
    num_fewshot: int = Field(0, ge=0)
    limit: int | None = Field(None, ge=1, description="examples; of a group, of each of its tasks")
    metrics: list[str] = Field(min_length=1)
    held_out: HeldOut | None = None
    config: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _config_goes_with_text(self) -> SuiteTask:
        if (self.held_out is None) != (self.config is None):
            raise ValueError("held_out and config: one without the other. Both or none are allowed. Add or remove one.")
        return self


class Suite(_Section):
    """What an evaluation runs."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    average: str | None = Field(None, description="metric whose mean over the tasks that have it is reported too")
    tasks: list[SuiteTask] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Suite:
        names = [task.task for task in self.tasks]
        if len(set(names)) < len(names):
            raise ValueError(f"tasks: {', '.join(names)} holds a task twice. Each may occur once. Remove one.")
        return self


def suite_path(path: str | Path) -> Path:
    """Where a suite lies: as named, or beside the package."""
    return Path(path) if Path(path).exists() else _REPOSITORY / path


def load_suite(path: str | Path) -> Suite:
    """Read a suite's YAML; a relative path is looked for here and then beside the package.

    Raises:
        ValueError: no such file, or a fault in it.
    """
    try:
        return Suite.model_validate(yaml.safe_load(suite_path(path).read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({text}). A suite is needed, as configs/eval/offline.yaml.") from None
    except ValidationError as error:
        lines = [f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ValueError("\n".join(lines)) from None


def averages(suite: Suite, scores: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The mean that the suite asks for; none while a task that belongs to it is missing."""
    names = [task.task for task in suite.tasks if suite.average in task.metrics]
    if suite.average is None or not names or not all(name in scores for name in names):
        return {}
    return {suite.average: sum(float(scores[name][suite.average]) for name in names) / len(names)}


def format_table(results: dict[str, Any]) -> str:
    """The scores of a results.json as lines of text."""
    rows = [("task", "metric", "value", "stderr", "samples")]
    for task, metric, value, error, samples in flat_scores(results):
        rows.append((task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}", str(samples or "")))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        cells += [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def flat_scores(results: dict[str, Any]) -> list[tuple[str, str, float, float | None, int | None]]:
    """List (task, metric, value, standard error, samples) of a results.json, averages last."""
    flat: list[tuple[str, str, float, float | None, int | None]] = []
    for task, scores in results["results"].items():
        for metric in (key for key in scores if f"{key}_stderr" in scores):
            flat.append((task, metric, scores[metric], scores[f"{metric}_stderr"], scores["samples"]))
    return flat + [("average", metric, value, None, None) for metric, value in results["averages"].items()]
