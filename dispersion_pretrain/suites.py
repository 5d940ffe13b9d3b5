"""Suites of lm-eval tasks: what an evaluation runs, how tasks are loaded, and their scores."""

from __future__ import annotations

import json
import logging
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import AutoTokenizer

from dispersion_pretrain.corpus import TokenCorpus, read_manifest, tokenizer_path

_REPOSITORY = Path(__file__).resolve().parent.parent
_BOOTSTRAP_DRAWS = 100  # for the standard error of metrics that have no closed form

_log = logging.getLogger(__name__)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class HeldOut(_Section):
    """How much of the corpus' validation split a task reads, from its beginning."""

    documents: int = Field(ge=1)
    tokens: int = Field(ge=2)


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


@dataclass(frozen=True)
class Text:
    """Where held-out text comes from; `corpus` is None where none was named."""

    corpus: str | None
    cache: str | None  # for the shards of a remote corpus
    scratch: Path  # empty folder for files that nobody needs afterwards


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


# ---- loading


def load_tasks(tasks: list[SuiteTask], text: Text) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Load tasks and their data.

    Returns:
        lm-eval's objects by task, for `run_task`;
        one line by task that cannot be loaded, with what to do about it.
    """
    from_hub = any(task.held_out is None for task in tasks)
    if from_hub:
        _use_cache_without_hub()
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about our way of calling it
    manager = TaskManager(include_defaults=from_hub)
    loaded: dict[str, list[Any]] = {}
    errors: dict[str, str] = {}
    for task in tasks:
        try:
            found = manager.load([_text_task(task, text) if task.held_out else task.task])
        except Exception as error:  # data sets run code of their own; the other tasks go on
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if task.held_out is not None:
                errors[task.task] = f"{task.task}: its held-out text cannot be read ({what})."
            else:
                errors[task.task] = (
                    f"{task.task}: its data set {task.dataset or ''} cannot be loaded ({what}). The Hugging Face hub, "
                    "a mirror or a cache with it is needed. Set HF_ENDPOINT to a mirror, or HF_HOME to a cache that "
                    "was filled where the hub can be reached."
                )
            continue
        group = found.get("groups", {}).get(task.task)
        loaded[task.task] = [group] if group is not None else list(found["tasks"].values())
    return loaded, errors


def held_out_texts(corpus: str, bounds: HeldOut, cache: str | None = None) -> list[str]:
    """Decode the first documents of the corpus' validation split; the bound on tokens may cut the last one.

    Raises:
        ValueError, RuntimeError: the corpus cannot be read.
    """
    manifest = read_manifest(corpus)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path(manifest, cache), trust_remote_code=False)
    sequences = TokenCorpus(manifest, "validation", cache)
    documents: list[list[int]] = [[]]
    for index in range(min(len(sequences), -(-bounds.tokens // manifest.sequence_length))):
        left = bounds.tokens - index * manifest.sequence_length
        for token in sequences[index][:left].tolist():
            if token == manifest.eos_token_id:
                documents.append([])
            else:
                documents[-1].append(token)
        if len(documents) > bounds.documents:
            break
    texts = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in documents[: bounds.documents]]
    if len(documents) <= bounds.documents:
        texts[-1] = texts[-1].rstrip("\ufffd")  # a cut may fall within a character
    return [text for text in texts if text.strip()]


def _text_task(task: SuiteTask, text: Text) -> dict[str, Any]:
    """Write the held-out documents of a task of ours and return its lm-eval configuration."""
    assert task.held_out is not None and task.config is not None
    if text.corpus is None:
        raise ValueError("--corpus: is missing. The model is no run, so its corpus must be named. Give --corpus")
    cache = text.cache or (str(text.scratch / "corpus") if "://" in text.corpus else None)
    path = (text.scratch / f"{task.task}.jsonl").resolve()
    lines = [json.dumps({"text": document}) for document in held_out_texts(text.corpus, task.held_out, cache)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return {
        **task.config,
        "task": task.task,
        "dataset_kwargs": {
            "data_files": {task.config["test_split"]: str(path)},
            "cache_dir": str(text.scratch / "datasets"),
        },
        "metric_list": [{"metric": metric} for metric in task.metrics],
    }


def _use_cache_without_hub() -> None:
    """Where the hub does not answer, look into the local cache at once, instead of 23 s of retries for each task."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5).close()
    except urllib.error.HTTPError:
        return  # it answers, though not to this
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when `datasets` is imported
        huggingface_hub.constants.HF_HUB_OFFLINE = True


# ---- running


def run_task(lm: Any, task: SuiteTask, objects: list[Any], limit: int | None) -> dict[str, Any]:
    """Evaluate one loaded task; `limit` bounds its examples further.

    Returns:
        for each metric of the task its value and `<metric>_stderr` (None where lm-eval knows none), and `samples`.

    Raises:
        ValueError: lm-eval does not give such a metric.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    bounds = [bound for bound in (task.limit, limit) if bound is not None]
    output: Any = simple_evaluate(
        model=lm,
        tasks=objects,
        task_manager=TaskManager(include_defaults=False),  # the default one reads 14,000 files each time
        num_fewshot=task.num_fewshot,
        limit=min(bounds) if bounds else None,
        log_samples=False,
        bootstrap_iters=_BOOTSTRAP_DRAWS,
    )
    values = {key.partition(",")[0]: value for key, value in output["results"][task.task].items()}
    absent = [metric for metric in task.metrics if metric not in values]
    if absent:
        known = sorted(key for key, value in values.items() if f"{key}_stderr" in values)
        raise ValueError(
            f"metrics: lm-eval gives no {', '.join(absent)}. It gives {', '.join(known)}. Correct the suite"
        )
    scores: dict[str, Any] = {}
    for metric in task.metrics:
        error = values.get(f"{metric}_stderr")
        scores[metric] = float(values[metric])
        scores[f"{metric}_stderr"] = float(error) if isinstance(error, int | float) else None
    counts = {name: count["effective"] for name, count in output["n-samples"].items()}
    scores["samples"] = int(counts.get(task.task, sum(counts.values())))  # a group's are those of its tasks
    return scores


def run_tasks(
    lm: Any, tasks: list[SuiteTask], loaded: dict[str, list[Any]], limit: int | None
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Evaluate the tasks that are loaded; return scores and, for those that failed, one line each."""
    scores: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    for task in (task for task in tasks if task.task in loaded):
        try:
            scores[task.task] = run_task(lm, task, loaded[task.task], limit)
        except Exception as error:  # code of lm-eval and of its tasks; the other tasks go on
            _log.exception("%s failed", task.task)
            text = " ".join(str(error).split())[:300]
            errors[task.task] = f"{task.task}: the evaluation failed ({type(error).__name__}: {text})."
    return scores, errors


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
