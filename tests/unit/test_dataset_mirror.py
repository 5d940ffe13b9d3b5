"""Data sets of lm-eval's tasks in a folder: filled from a copy of the hub, and evaluated without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dispersion_pretrain  # noqa: F401  (before transformers, which imports torchvision)

# isort: split
import pytest
import yaml

from benchmark_hub import write_hub
from dispersion_pretrain import dataset_mirror
from dispersion_pretrain.dataset_mirror import Part
from dispersion_pretrain.suites import load_suite
from small_run import launch_script, small_settings, write_corpus, write_run

PAPER, QUICK = "configs/eval/paper.yaml", "configs/eval/quick.yaml"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hub(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    corpus = write_corpus(folder / "corpus")
    settings = small_settings(corpus)
    longer = {**settings.model_dump(mode="json"), "data": {**settings.data.model_dump(), "sequence_length": 32}}
    return write_run(folder / "run", type(settings).model_validate(longer), corpus / "tokenizer")


@pytest.mark.parametrize("suite", [PAPER, QUICK])
def test_lm_eval_knows_the_tasks_and_reads_the_data_sets_that_the_suites_name(suite: str) -> None:
    for task in load_suite(suite).tasks:
        parts = [part for of_task in dataset_mirror.parts_of(task).values() for part in of_task]
        assert parts and {part.dataset for part in parts} == {task.dataset}, task.task


def test_what_a_group_needs_is_what_its_tasks_need() -> None:
    (mmlu,) = (task for task in load_suite(PAPER).tasks if task.task == "mmlu")
    parts = dataset_mirror.parts_of(mmlu)
    assert len(parts) == 57
    assert parts["mmlu_anatomy"] == [Part("cais/mmlu", "anatomy", "test"), Part("cais/mmlu", "anatomy", "dev")]
    assert parts["mmlu_anatomy"][0].file == "cais/mmlu/anatomy/test.parquet"
    assert Part("baber/piqa", None, "train").file == "baber/piqa/default/train.parquet"


def small_suite(folder: Path, *tasks: dict[str, Any]) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "small", "average": "acc", "tasks": list(tasks)}))
    return path


# The paper's tasks, with two of mmlu's subjects: what the small copy of the hub has.
_MMLU = [
    {"task": name, "num_fewshot": 1, "limit": 4, "metrics": ["acc"]} for name in ("mmlu_anatomy", "mmlu_marketing")
]
TASKS = [
    *(task.model_dump(exclude_none=True) | {"limit": 4} for task in load_suite(PAPER).tasks if task.task != "mmlu"),
    *_MMLU,
]


def test_the_papers_tasks_run_from_a_mirror(
    hub: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = small_suite(tmp_path, *TASKS)
    mirror, evaluate = launch_script("mirror_datasets"), launch_script("evaluate_checkpoint")
    filled = ["--suite", str(suite), "--out", str(tmp_path / "mirror"), "--source", str(hub)]
    assert mirror.main(filled) == 0
    manifest = json.loads((tmp_path / "mirror" / "manifest.json").read_text())
    assert manifest["files"]["facebook/anli/default/train_r2.parquet"]["rows"] == 6
    assert not (tmp_path / "mirror" / "partial.json").exists()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "mirror").rglob("*.parquet")}
    assert len(times) == len(manifest["files"])
    assert mirror.main(filled) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "mirror").rglob("*.parquet")} == times

    (tmp_path / "mirror" / "baber" / "piqa" / "default" / "train.parquet").unlink()
    arguments = ["--model", f"{run}@10", "--suite", str(suite), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert evaluate.main([*arguments, "--datasets", str(tmp_path / "mirror")]) == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["errors"]) == ["piqa"]
    assert "mirror/baber/piqa/default/train.parquet: is missing" in results["errors"]["piqa"]
    assert results["errors"]["piqa"] in capsys.readouterr().err
    assert mirror.main(filled) == 0
    assert evaluate.main([*arguments, "--datasets", str(tmp_path / "mirror")]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["results"]) == [task["task"] for task in TASKS]
    assert {scores["samples"] for scores in results["results"].values()} == {4}
    assert 0 <= results["averages"]["acc"] <= 1


def test_a_data_set_that_cannot_be_had_is_named_and_the_rest_is_kept(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suite = small_suite(tmp_path, {"task": "piqa", "metrics": ["acc"]}, {"task": "hellaswag", "metrics": ["acc"]})
    mirror = launch_script("mirror_datasets")
    arguments = ["--suite", str(suite), "--condensation", "--out", str(tmp_path / "out"), "--source", str(hub)]
    assert mirror.main(arguments) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if "cannot be had" in line]
    assert len(errors) == 2 + len(dataset_mirror.CONDENSATION)
    assert any(f"{hub}/Rowan/hellaswag: configuration default, split train cannot be had" in line for line in errors)
    assert not (tmp_path / "out" / "manifest.json").exists()
    partial = json.loads((tmp_path / "out" / "partial.json").read_text())
    assert list(partial["files"]) == ["baber/piqa/default/train.parquet", "baber/piqa/default/validation.parquet"]


def test_an_unknown_task_is_named_and_the_other_data_sets_are_brought(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = next(task for task in TASKS if task["task"] == "piqa")
    suite = small_suite(tmp_path, known, {**known, "task": "arc_eazy", "dataset": None})
    mirror, out = launch_script("mirror_datasets"), tmp_path / "mirror"
    filled = ["--suite", str(suite), "--out", str(out), "--source", str(hub)]
    assert mirror.main(filled) == 1
    assert "arc_eazy: lm-eval has no such task. The nearest are arc_easy" in capsys.readouterr().err
    assert list(out.rglob("*.parquet")) and (out / "manifest.json").is_file()
    (out / "manifest.json").write_text('{"files": ')
    assert mirror.main(filled) == 1
    assert f"{out / 'manifest.json'}: is damaged" in capsys.readouterr().err
