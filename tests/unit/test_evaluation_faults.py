"""Evaluations that are killed, shared by processes, or asked of what cannot be evaluated."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import dispersion_pretrain  # noqa: F401  (before transformers, which imports torchvision)

# isort: split
import pytest
import torch
import yaml
from transformers import AutoTokenizer

from dispersion_pretrain import lm_tasks
from dispersion_pretrain.evaluate import Options, evaluate_model
from small_run import launch_script, small_model, small_settings, write_corpus, write_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "evaluate_checkpoint.py"
TEXT, CONTINUATION = yaml.safe_load((ROOT / "configs" / "eval" / "offline.yaml").read_text())["tasks"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("run") / "run", small_settings(corpus), corpus / "tokenizer")


def write_suite(folder: Path, *tasks: dict[str, Any]) -> str:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "faults", "tasks": list(tasks)}))
    return str(path)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_what_was_done_before_a_kill_is_not_run_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"task{number}" for number in range(12)]
    suite = write_suite(tmp_path, *({**TEXT, "task": name} for name in names))
    out, log = tmp_path / "out", tmp_path / "log.txt"
    command = [sys.executable, str(SCRIPT), "--model", f"{run}@10", "--suite", suite, "--out", str(out)]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment())
        deadline = time.monotonic() + 300
        while not (out / "partial.json").exists():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "results.json").exists() and not (out / "examples.json").exists()
    done = json.loads((out / "partial.json").read_text())
    assert 1 <= len(done["results"]) < len(names)

    ran: list[str] = []
    run_task = lm_tasks.run_task

    def recorded(lm: Any, task: Any, *rest: Any) -> Any:
        ran.append(task.task)
        return run_task(lm, task, *rest)

    monkeypatch.setattr(lm_tasks, "run_task", recorded)
    results = evaluate_model(f"{run}@10", suite, out, Options())
    assert ran == [name for name in names if name not in done["results"]]
    assert list(results["results"]) == names and results["errors"] == {}
    assert results["results"][names[0]] == done["results"][names[0]]
    assert list(json.loads((out / "examples.json").read_text())["tasks"]) == names
    assert not (out / "partial.json").exists()


def test_two_processes_give_what_one_gives(run: Path, tmp_path: Path) -> None:
    single = {**TEXT, "task": "one_document", "limit": 1}  # fewer than there are processes
    suite = write_suite(tmp_path, TEXT, CONTINUATION, single)
    command = [sys.executable, str(SCRIPT), "--model", f"{run}@10", "--suite", suite, "--device", "cpu"]
    command += ["--out", str(tmp_path / "two"), "--processes", "2"]
    finished = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=600)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("held_out_continuation") == 3  # its metrics, told once
    one = evaluate_model(f"{run}@10", suite, tmp_path / "one", Options(device="cpu"))
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    assert list(two["results"]) == list(one["results"]) and two["errors"] == {}
    for task, scores in one["results"].items():
        for name, value in scores.items():
            found = two["results"][task][name]
            assert found == (None if value is None else pytest.approx(value, rel=1e-6)), (task, name)
    of_one, of_two = (json.loads((tmp_path / name / "examples.json").read_text())["tasks"] for name in ("one", "two"))
    for task, metrics in of_one.items():
        for metric, example in metrics.items():
            assert of_two[task][metric]["keys"] == example["keys"]
            assert of_two[task][metric]["values"] == pytest.approx(example["values"], rel=1e-5)


# ---- bad input


@pytest.fixture
def model(tmp_path: Path, corpus: Path) -> Path:
    """A Hugging Face folder."""
    folder = tmp_path / "model"
    small_model(small_settings(corpus), seed=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(corpus / "tokenizer").save_pretrained(folder)
    return folder


def evaluate(model: Path, corpus: Path, suite: str, out: Path) -> tuple[int, dict[str, Any]]:
    arguments = ["--model", str(model), "--suite", suite, "--out", str(out), "--corpus", str(corpus), "--limit", "2"]
    code = launch_script("evaluate_checkpoint").main(arguments)
    return code, json.loads((out / "results.json").read_text())


def test_weights_that_are_no_numbers_give_errors_and_no_scores(model: Path, corpus: Path, tmp_path: Path) -> None:
    broken = small_model(small_settings(corpus), seed=1)
    with torch.no_grad():
        next(broken.parameters())[:, 0] = float("nan")
    broken.save_pretrained(model)
    code, results = evaluate(model, corpus, write_suite(tmp_path, TEXT, CONTINUATION), tmp_path / "out")
    assert code == 1 and results["results"] == {}
    for task in ("held_out_text", "held_out_continuation"):
        assert results["errors"][task].startswith(f"{task}: ")
        assert f"{model} gives example 0 of {task} the log-likelihood nan" in results["errors"][task]


def test_an_unknown_task_is_named_with_its_nearest_and_the_others_go_on(
    model: Path, corpus: Path, tmp_path: Path
) -> None:
    suite = write_suite(tmp_path, {"task": "arc_eazy", "metrics": ["acc"]}, TEXT)
    code, results = evaluate(model, corpus, suite, tmp_path / "out")
    assert code == 1 and list(results["results"]) == ["held_out_text"]
    assert "arc_eazy: lm-eval has no such task. The nearest are arc_easy" in results["errors"]["arc_eazy"]


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    model: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["one_more"])
    tokenizer.save_pretrained(model)
    arguments = ["--model", str(model), "--suite", write_suite(tmp_path, TEXT), "--out", str(tmp_path / "out")]
    assert launch_script("evaluate_checkpoint").main([*arguments, "--corpus", str(corpus)]) == 1
    assert f"--model: the tokenizer of '{model}' has ids up to 300, its embedding 300 rows" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


def test_held_out_text_without_words_is_an_error_of_its_task(model: Path, tmp_path: Path) -> None:
    empty = write_corpus(tmp_path / "empty", [" ", "\n\n"])
    code, results = evaluate(model, empty, write_suite(tmp_path, TEXT, CONTINUATION), tmp_path / "out")
    assert code == 1 and results["results"] == {}
    for task in ("held_out_text", "held_out_continuation"):
        assert f"{task}: its held-out text cannot be read" in results["errors"][task]
        assert "its held-out text is empty" in results["errors"][task]


def test_a_context_of_ones_own_is_used_and_one_beyond_the_model_refused(run: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"name": "text", "tasks": [TEXT]}))
    found = {length: evaluate_model(str(run), suite, None, Options(max_length=length)) for length in (None, 8)}
    assert [each["settings"]["max_length"] for each in found.values()] == [32, 8]
    scores = [each["results"]["held_out_text"]["byte_perplexity"] for each in found.values()]
    assert scores[0] != scores[1]
    with pytest.raises(ValueError, match="--max-length: 65, but .* has 64 positions. At most that many are allowed"):
        evaluate_model(str(run), suite, None, Options(max_length=65))


def test_answers_beyond_the_context_are_an_error_of_their_task(run: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump({"name": "both", "tasks": [TEXT, CONTINUATION]}))
    results = evaluate_model(str(run), suite, None, Options(max_length=4))
    assert list(results["results"]) == ["held_out_text"]
    (error,) = results["errors"].values()
    assert error.startswith("held_out_continuation: an answer has more tokens than the model's context. Shorter ones")


def test_a_model_without_a_tokenizer_is_named(run: Path, corpus: Path, tmp_path: Path) -> None:
    small_model(small_settings(corpus), seed=1).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^--model: '.*model' cannot be loaded .* with a tokenizer"):
        evaluate_model(
            str(tmp_path / "model"), write_suite(tmp_path, TEXT), tmp_path / "out", Options(corpus=str(corpus))
        )


@pytest.mark.parametrize("device", ["npu", "cuda:99", "cpu:0", ""])
@pytest.mark.parametrize("more", [["--model", "RUN"], ["--model", "RUN", "--processes", "2"], ["--watch", "RUN"]])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(
    device: str, more: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, before = [str(run) if word == "RUN" else word for word in more], set(run.rglob("*"))
    assert launch_script("evaluate_checkpoint").main([*more, "--suite", "none.yaml", "--device", device]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"--device: {device!r} is no device of this machine, where torch sees ")
    assert set(run.rglob("*")) == before


def test_a_job_whose_checkpoint_was_removed_before_it_began_says_so(run: Path, tmp_path: Path) -> None:
    folder = run / "evaluations" / "faults" / "step-00000015"
    folder.mkdir(parents=True)  # as who starts a job makes it
    try:
        with pytest.raises(RuntimeError, match=r"step-00000015: no manifest can be read"):
            evaluate_model(f"{run}@15", write_suite(tmp_path, TEXT), None, Options())
        assert "no manifest can be read" in json.loads((folder / "failed.json").read_text())["error"]
    finally:
        shutil.rmtree(run / "evaluations")


@pytest.mark.parametrize(
    ("step", "message"),
    [("15", r"has no checkpoint of step 15\. Saved steps: 10"), ("abc", "--model: 'abc' in .* is no step")],
)
def test_a_step_that_is_not_there_is_named_and_leaves_no_trace(
    run: Path, tmp_path: Path, step: str, message: str
) -> None:
    before = sorted(run.rglob("*"))
    with pytest.raises(ValueError, match=message):
        evaluate_model(f"{run}@{step}", write_suite(tmp_path, TEXT), None, Options())
    assert sorted(run.rglob("*")) == before
