"""lm-eval's tasks: how those of a suite are loaded and run, with their scores and the values of each example."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants

from dispersion_pretrain import dataset_mirror, evaluation_ranks, held_out
from dispersion_pretrain.suites import SuiteTask

_BOOTSTRAP_DRAWS = 100  # for the standard error of metrics that have no closed form

_log = logging.getLogger(__name__)


def load_tasks(
    tasks: list[SuiteTask], text: held_out.Text, mirror: Path | None = None
) -> tuple[dict[str, list[Any]], dict[str, str]]:
    """Load tasks and their data; from the folder `mirror` where it is given, else from the hub or its cache.

    Returns:
        lm-eval's objects by task, for `run_task`;
        one line by task that cannot be loaded, with what to do about it.
    """
    if mirror is None and any(task.held_out is None for task in tasks):
        _use_cache_without_hub()
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # its warnings are about our way of calling it
    loaded: dict[str, list[Any]] = {}
    errors: dict[str, str] = {}
    for task in tasks:
        try:
            scratch = text.scratch / "tasks" / task.task
            if task.held_out is not None:
                found = TaskManager(include_defaults=False).load([held_out.task_config(task, text)])
            elif task.task not in dataset_mirror.index():
                errors[task.task] = dataset_mirror.unknown_task(task.task)
                continue
            else:
                # A manager of its own reads the few files of the task; the default one all 14,000 again.
                scratch.mkdir(parents=True)
                dataset_mirror.write_configs(task, scratch, mirror)
                found = TaskManager(include_path=scratch, include_defaults=False).load([task.task])
        except Exception as error:  # data sets run code of their own; the other tasks go on
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if task.held_out is not None:
                errors[task.task] = f"{task.task}: its held-out text cannot be read ({what})."
            elif mirror is not None:
                errors[task.task] = f"{task.task}: its data set cannot be read from the mirror ({what})."
            else:
                errors[task.task] = (
                    f"{task.task}: its data set {task.dataset or ''} cannot be loaded ({what}). The Hugging Face hub, "
                    "a mirror or a cache with it is needed. Set HF_ENDPOINT to a mirror, HF_HOME to a cache that was "
                    "filled where the hub can be reached, or give --datasets with a folder of "
                    "launch/mirror_datasets.py."
                )
            continue
        group = found.get("groups", {}).get(task.task)
        loaded[task.task] = [group] if group is not None else list(found["tasks"].values())
    return loaded, errors


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


def run_task(lm: Any, task: SuiteTask, objects: list[Any], limit: int | None) -> Any:
    """Return what lm-eval gives for one loaded task; `limit` bounds its examples further. Collective: all ranks."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    bounds = [bound for bound in (task.limit, limit) if bound is not None]
    with _all_on_every_rank(lm) if _smallest(objects, bounds) < lm.world_size else contextlib.nullcontext():
        return simple_evaluate(
            model=lm,
            tasks=objects,
            task_manager=TaskManager(include_defaults=False),  # the default one reads 14,000 files each time
            num_fewshot=task.num_fewshot,
            limit=min(bounds) if bounds else None,
            bootstrap_iters=_BOOTSTRAP_DRAWS,
        )


def take_scores(task: SuiteTask, output: Any, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take what the suite asks for out of what lm-eval gives; `model` is its name for messages.

    Returns:
        for each metric of the task its value and `<metric>_stderr` (None where lm-eval knows none), and `samples`;
        for each metric the `keys`, `values` and `weights` of its examples, see `_examples`.

    Raises:
        ValueError: lm-eval does not give such a metric.
        FloatingPointError: the model's log-likelihoods are no finite numbers.
    """
    _require_finite(output["samples"], model)
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
    return scores, {metric: _examples(metric, task.task, output["samples"]) for metric in task.metrics}


def _smallest(objects: list[Any], bounds: list[int]) -> int:
    tasks = [leaf for one in objects for leaf in (one.get_all_tasks() if hasattr(one, "get_all_tasks") else [one])]
    return min([len(task.eval_docs) for task in tasks] + bounds)


@contextlib.contextmanager
def _all_on_every_rank(lm: Any) -> Iterator[None]:
    """lm-eval fails on a rank without an example while the others wait for it: such a task is not divided."""
    divided = lm._rank, lm._world_size
    lm._rank, lm._world_size = 0, 1
    try:
        yield
    finally:
        lm._rank, lm._world_size = divided


def _require_finite(samples: dict[str, list[dict[str, Any]]], model: str) -> None:
    for subtask, of_task in samples.items():
        for sample in of_task:
            for answer in sample["filtered_resps"]:
                likelihood = answer[0] if isinstance(answer, tuple | list) else answer
                if isinstance(likelihood, float) and not math.isfinite(likelihood):
                    raise FloatingPointError(
                        f"{model} gives example {sample['doc_id']} of {subtask} the log-likelihood {likelihood}. "
                        "Finite numbers are needed. Find out where the weights became so, or try another precision"
                    )


def _examples(metric: str, name: str, samples: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return `keys`, `values` and `weights` of a metric's examples, sorted by key.

    A key is an example's number in its data set, in groups with its task: "subtask/number". Where lm-eval has a pair
    for each example, as for perplexities, the log-likelihood is the value and the number of words or bytes the
    weight; elsewhere `weights` is None.
    """
    rows: dict[str, Any] = {}
    for subtask, of_task in samples.items():
        for sample in of_task:
            key = str(sample["doc_id"]) if subtask == name else f"{subtask}/{sample['doc_id']}"
            if metric in sample:
                rows[key] = sample[metric]  # of several filters the last one's, as in the scores
    keys = sorted(rows)
    if any(isinstance(rows[key], tuple | list) for key in keys):
        pairs = [rows[key] for key in keys]
        return {"keys": keys, "values": [float(a) for a, _ in pairs], "weights": [float(b) for _, b in pairs]}
    return {"keys": keys, "values": [float(rows[key]) for key in keys], "weights": None}


def run_tasks(
    lm: Any, tasks: list[SuiteTask], loaded: dict[str, list[Any]], limit: int | None
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], str | None]]:
    """Evaluate the tasks that are loaded, one by one. Collective: all ranks.

    Yields:
        On rank 0: task, scores and examples (empty where it failed), and one line that says why it failed, or None.

    Raises:
        SystemExit: the lm-eval of one of several ranks failed, for which the others would wait.
    """
    for task in (task for task in tasks if task.task in loaded):
        try:
            output = run_task(lm, task, loaded[task.task], limit)
        except Exception as error:  # code of lm-eval and of its tasks; the other tasks go on
            _log.exception("%s failed", task.task)
            if evaluation_ranks.count() > 1:
                raise SystemExit(1) from None
            yield task.task, {}, {}, _failure(task, error)
            continue
        if evaluation_ranks.rank() > 0:
            continue
        try:
            scores, examples = take_scores(task, output, lm.model.name_or_path)
        except (ValueError, FloatingPointError) as error:
            yield task.task, {}, {}, _failure(task, error)
            continue
        yield task.task, scores, examples, None


def _failure(task: SuiteTask, error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1].line or ""
    if isinstance(error, AssertionError) and "continuation_enc" in place:  # lm-eval's way to say it
        return (
            f"{task.task}: an answer has more tokens than the model's context. Shorter ones are allowed. Raise "
            "--max-length, or take another model or task."
        )
    text = " ".join(str(error).split())[:300] or place
    return f"{task.task}: the evaluation failed ({type(error).__name__}: {text})."
