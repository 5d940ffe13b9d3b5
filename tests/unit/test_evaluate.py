"""Evaluation of a checkpoint with lm-eval, and the jobs that training starts."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dispersion_pretrain  # noqa: F401  (before transformers, which imports torchvision)

# isort: split
import huggingface_hub.constants
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, PreTrainedModel

from dispersion_pretrain import checkpoint, evaluate, evaluation_jobs, export, held_out, lm_tasks, suites
from dispersion_pretrain.evaluate import Options, evaluate_model
from dispersion_pretrain.evaluation_jobs import pending_evaluations, start_evaluation_job
from dispersion_pretrain.held_out import held_out_texts
from dispersion_pretrain.suites import HeldOut, Suite, averages, format_table, load_suite
from small_run import (
    SEQUENCE_LENGTH,
    TEXTS,
    damage,
    launch_script,
    save_step,
    small_model,
    small_settings,
    write_corpus,
    write_run,
)

ROOT = Path(__file__).resolve().parents[2]
OFFLINE = str(ROOT / "configs" / "eval" / "offline.yaml")
EVERYTHING = HeldOut(documents=100, tokens=10**6)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Path:
    return write_run(tmp_path / "run", small_settings(corpus), corpus / "tokenizer")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> SimpleNamespace:
    """A run evaluated once with the offline suite; tests only look at it."""
    run = write_run(tmp_path_factory.mktemp("evaluated") / "run", small_settings(corpus), corpus / "tokenizer")
    results = evaluate_model(f"{run}@10", OFFLINE, None, Options())
    return SimpleNamespace(run=run, results=results, folder=run / "evaluations" / "offline" / "step-00000010")


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a model is loaded: what is there already must do."""

    def refuse(*_: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(evaluate, "_language_model", refuse)


def rolling_log_likelihood(model: PreTrainedModel, ids: list[int], prefix: int, context: int) -> float:
    """lm-eval's convention: full windows overlap by one token, the last one reaches back to the full context."""
    total = 0.0
    for begin in range(0, len(ids), context):
        end = min(begin + context, len(ids))
        stream = [prefix, *ids]
        first = begin if end - begin == context or begin == 0 else end - context
        inputs = torch.tensor([stream[first:end]])
        with torch.no_grad():
            log_probabilities = model(input_ids=inputs).logits[0].double().log_softmax(-1)
        targets = torch.tensor(ids[begin:end])
        total += float(log_probabilities[-len(targets) :].gather(1, targets[:, None]).sum())
    return total


# ---- what is measured


def test_perplexities_are_those_of_the_model_on_the_texts(evaluated: SimpleNamespace, corpus: Path) -> None:
    texts = held_out_texts(str(corpus), EVERYTHING)
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    model = small_model(small_settings(corpus), seed=10)
    tokens = [tokenizer.encode(text) for text in texts]
    assert max(map(len, tokens)) > 2 * SEQUENCE_LENGTH  # several windows, and more positions than the model has
    likelihood = sum(rolling_log_likelihood(model, ids, 0, SEQUENCE_LENGTH) for ids in tokens)
    num_bytes = sum(len(text.encode()) for text in texts)
    num_words = sum(len(re.split(r"\s+", text)) for text in texts)
    scores = evaluated.results["results"]["held_out_text"]
    assert scores["byte_perplexity"] == pytest.approx(math.exp(-likelihood / num_bytes), rel=1e-5)
    assert scores["word_perplexity"] == pytest.approx(math.exp(-likelihood / num_words), rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(-likelihood / num_bytes / math.log(2), rel=1e-5)
    assert scores["samples"] == len(texts)
    assert scores["byte_perplexity_stderr"] is None


def test_held_out_texts_are_the_documents(corpus: Path, tmp_path: Path) -> None:
    assert held_out_texts(str(corpus), EVERYTHING) == TEXTS
    assert held_out_texts(str(corpus), HeldOut(documents=2, tokens=10**6)) == TEXTS[:2]
    cut = held_out_texts(str(corpus), HeldOut(documents=100, tokens=40))
    assert len(cut) == 1 and TEXTS[0].startswith(cut[0]) and len(cut[0]) < len(TEXTS[0])
    smiles = write_corpus(tmp_path / "smiles", ["".join(map(chr, range(0x1F600, 0x1F640)))])  # too many to merge
    for tokens in range(2, 12):  # some of the cuts fall within a character of several bytes
        assert all("\ufffd" not in text for text in held_out_texts(str(smiles), HeldOut(documents=1, tokens=tokens)))


def test_positions_that_a_run_from_scratch_never_saw_are_not_used(evaluated: SimpleNamespace) -> None:
    assert evaluated.results["settings"]["max_length"] == SEQUENCE_LENGTH


# ---- what comes out


def test_results_say_what_was_evaluated(evaluated: SimpleNamespace) -> None:
    results = json.loads((evaluated.folder / "results.json").read_text())
    assert results == evaluated.results
    assert {key: results[key] for key in ("format_version", "run", "step", "tokens", "suite", "errors")} == {
        "format_version": 1,
        "run": str(evaluated.run),
        "step": 10,
        "tokens": 10 * SEQUENCE_LENGTH,
        "suite": "offline",
        "errors": {},
    }
    assert {"lm_eval", "datasets", "torch", "transformers"} <= set(results["versions"])
    assert sorted(path.name for path in evaluated.folder.iterdir()) == ["examples.json", "lock", "results.json"]
    table = format_table(results).splitlines()
    assert table[0].split() == ["task", "metric", "value", "stderr", "samples"] and len(table) == 8


def test_scores_are_in_tensorboard_at_the_step(evaluated: SimpleNamespace) -> None:
    events = EventAccumulator(str(evaluated.run / "tensorboard" / "evaluation"))
    events.Reload()
    (event,) = events.Scalars("evaluation/held_out_text/byte_perplexity")
    assert event.step == 10
    assert event.value == pytest.approx(evaluated.results["results"]["held_out_text"]["byte_perplexity"], rel=1e-6)


def test_a_hugging_face_folder_scores_as_the_run_it_was_exported_from(
    evaluated: SimpleNamespace, corpus: Path, tmp_path: Path
) -> None:
    options = Options(corpus=str(corpus), limit=1, keep_export=True)
    of_run = evaluate_model(f"{evaluated.run}@10", OFFLINE, tmp_path / "a", options)
    of_folder = evaluate_model(str(tmp_path / "a" / "model"), OFFLINE, tmp_path / "b", options)
    assert of_run["results"]["held_out_text"]["samples"] == 1
    assert of_folder["settings"]["max_length"] == 2 * SEQUENCE_LENGTH  # nothing is known of its training
    assert of_folder["run"] is None and of_folder["step"] is None
    with pytest.raises(ValueError, match="--out: .* holds the results of"):
        evaluate_model(str(tmp_path / "a" / "model"), OFFLINE, tmp_path / "a", options)
    with pytest.raises(ValueError, match="--out: is missing"):
        evaluate_model(str(tmp_path / "a" / "model"), OFFLINE, None, options)


# ---- repeating


def test_whole_results_are_reused_also_without_the_checkpoint(
    evaluated: SimpleNamespace, no_model: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate_model(f"{evaluated.run}@10", OFFLINE, None, Options()) == evaluated.results
    assert "is there already" in capsys.readouterr().out
    folder = checkpoint.step_folder(evaluated.run, 10)
    folder.rename(folder.with_name("elsewhere"))
    try:
        assert evaluate_model(f"{evaluated.run}@10", OFFLINE, None, Options()) == evaluated.results
    finally:
        folder.with_name("elsewhere").rename(folder)


@pytest.mark.parametrize("change", ["force", "limit", "length", "suite", "checkpoint"])
def test_what_would_give_other_scores_is_evaluated_again(
    run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    value = 2.0

    def scores(lm: object, tasks: list[suites.SuiteTask], *_: object) -> Any:
        found = {"byte_perplexity": value, "byte_perplexity_stderr": None, "acc": value, "samples": 4}
        return [(task.task, found, {}, None) for task in tasks]

    monkeypatch.setattr(lm_tasks, "run_tasks", scores)
    evaluate_model(f"{run}@10", OFFLINE, None, Options())
    suite, options = OFFLINE, Options()
    if change == "force":
        options = Options(force=True)
    elif change == "limit":
        options = Options(limit=3)
    elif change == "length":
        options = Options(max_length=16)
    elif change == "suite":
        tree = yaml.safe_load(Path(OFFLINE).read_text())
        tree["tasks"][0]["held_out"]["tokens"] += 1
        suite = str(tmp_path / "changed.yaml")
        Path(suite).write_text(yaml.safe_dump(tree))
    else:
        save_step(run, small_settings(corpus), 10, small_model(small_settings(corpus), seed=11))
    value = 3.0
    repeated = evaluate_model(f"{run}@10", suite, None, options)
    assert repeated["results"]["held_out_text"]["byte_perplexity"] == 3.0
    value = 4.0
    if change != "force":
        assert evaluate_model(f"{run}@10", suite, None, options) == repeated


def test_a_second_evaluation_waits_for_the_first_and_takes_its_results(
    evaluated: SimpleNamespace, no_model: None
) -> None:
    outcome: list[Any] = []
    second = threading.Thread(
        target=lambda: outcome.append(evaluate_model(f"{evaluated.run}@10", OFFLINE, None, Options()))
    )
    with evaluate._exclusive(evaluated.folder):
        second.start()
        second.join(timeout=1.0)
        assert outcome == []
    second.join(timeout=60.0)
    assert outcome == [evaluated.results]


# ---- failing


def test_a_damaged_checkpoint_leaves_a_failure_record_and_no_results(run: Path) -> None:
    damage(checkpoint.step_folder(run, 10) / "engine" / "mp_rank_00_model_states.pt")
    with pytest.raises(RuntimeError, match="damaged"):
        evaluate_model(f"{run}@10", OFFLINE, None, Options())
    folder = run / "evaluations" / "offline" / "step-00000010"
    assert "damaged" in json.loads((folder / "failed.json").read_text())["error"]
    assert sorted(path.name for path in folder.iterdir()) == ["failed.json", "lock"]


def test_a_task_without_its_data_fails_in_one_line_and_the_others_go_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(Path(OFFLINE).read_text())
    known = {"task": "arc_easy", "dataset": "allenai/ai2_arc", "num_fewshot": 1, "metrics": ["acc"]}
    unknown_metric = {**tree["tasks"][0], "task": "no_such_score", "metrics": ["byte_perplexity", "acc"]}
    tree["tasks"] = [known, unknown_metric, tree["tasks"][0]]
    suite = tmp_path / "mixed.yaml"
    suite.write_text(yaml.safe_dump(tree))
    command = launch_script("evaluate_checkpoint")
    arguments = ["--model", f"{run}@10", "--suite", str(suite), "--out", str(tmp_path / "out"), "--limit", "1"]
    assert command.main(arguments) == 1
    printed = capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["results"]) == ["held_out_text"]
    assert set(results["errors"]) == {"arc_easy", "no_such_score"}
    message = results["errors"]["arc_easy"]
    assert message in printed.err.splitlines()
    assert message.startswith("arc_easy: its data set allenai/ai2_arc cannot be loaded") and "HF_HOME" in message
    assert "held_out_text" in printed.out


def test_a_repetition_runs_only_what_is_missing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = yaml.safe_load(Path(OFFLINE).read_text())
    tree["tasks"][1:] = [{**tree["tasks"][0], "task": "second"}]
    suite = tmp_path / "two.yaml"
    suite.write_text(yaml.safe_dump(tree))
    asked: list[list[str]] = []

    def first_task_only(lm: object, tasks: list[suites.SuiteTask], *_: object) -> Any:
        asked.append([task.task for task in tasks])
        scores = {"bits_per_byte": 1.0, "bits_per_byte_stderr": None, "samples": 4}
        return [(tasks[0].task, scores, {}, None), *((task.task, {}, {}, "no") for task in tasks[1:])]

    monkeypatch.setattr(lm_tasks, "run_tasks", first_task_only)
    assert list(evaluate_model(f"{run}@10", suite, None, Options())["errors"]) == ["second"]
    whole = evaluate_model(f"{run}@10", suite, None, Options())
    assert list(whole["results"]) == ["held_out_text", "second"] and whole["errors"] == {}
    assert asked == [["held_out_text", "second"], ["second"]]


def test_a_corpus_is_needed_for_held_out_text(tmp_path: Path) -> None:
    loaded, errors = lm_tasks.load_tasks(load_suite(OFFLINE).tasks, held_out.Text(None, None, tmp_path))
    assert loaded == {} and "--corpus: is missing" in errors["held_out_text"]


def test_an_unreachable_hub_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class NotFound(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with HTTPServer(("127.0.0.1", 0), NotFound) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        answering = threading.Thread(target=server.handle_request)
        answering.start()
        lm_tasks._use_cache_without_hub()
        answering.join()
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    lm_tasks._use_cache_without_hub()  # nobody listens there any more
    assert huggingface_hub.constants.HF_HUB_OFFLINE is True and os.environ["HF_HUB_OFFLINE"] == "1"


# ---- suites


def test_the_papers_suite_has_its_tasks_shots_and_limits() -> None:
    suite = load_suite("configs/eval/paper.yaml")
    zero = "anli_r2 lambada_openai openbookqa piqa truthfulqa_mc2 winogrande"
    one = "arc_easy arc_challenge medmcqa mmlu"
    benchmarks = {task.task: task for task in suite.tasks if "acc" in task.metrics}
    assert {name for name, task in benchmarks.items() if task.num_fewshot == 0} == set(zero.split())
    assert {name for name, task in benchmarks.items() if task.num_fewshot == 1} == set(one.split())
    assert {task.limit for task in benchmarks.values()} == {500}
    assert [(task.task, task.metrics) for task in suite.tasks if task.task not in benchmarks] == [
        ("paloma_wikitext_103", ["word_perplexity"])
    ]
    assert all(task.dataset for task in suite.tasks)


def test_the_average_needs_every_task_that_has_the_metric() -> None:
    tasks = [{"task": name, "metrics": ["acc"]} for name in "ab"] + [{"task": "c", "metrics": ["word_perplexity"]}]
    suite = Suite.model_validate({"name": "s", "average": "acc", "tasks": tasks})
    scores = {"a": {"acc": 0.25}, "b": {"acc": 0.5}, "c": {"word_perplexity": 9.0}}
    assert averages(suite, scores) == {"acc": 0.375}
    del scores["b"]
    assert averages(suite, scores) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x"}, "name"),
        ({"tasks": []}, "tasks"),
        ({"tasks": [{"task": "a", "metrics": ["acc"]}] * 2}, "twice"),
        ({"tasks": [{"task": "a", "metrics": ["acc"], "shots": 1}]}, "shots"),
        ({"tasks": [{"task": "a", "metrics": ["acc"], "held_out": {"documents": 1, "tokens": 9}}]}, "one without"),
    ],
)
def test_faults_of_a_suite_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "tasks": [{"task": "a", "metrics": ["acc"]}], **change}))
    with pytest.raises(ValueError, match=f"suite.yaml: .*{message}"):
        load_suite(path)
    with pytest.raises(ValueError, match="nowhere.yaml: cannot be read"):
        load_suite("nowhere.yaml")


# ---- jobs beside training


def wait_for(path: Path, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.02)


def test_a_job_is_detached_and_no_rank_of_the_training(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "job.py"
    seen = tmp_path / "seen.json"
    script.write_text(
        "import json, os, sys, time\n"
        "print('hello from the job', flush=True)\n"
        "time.sleep(0.5)\n"
        "facts = {'arguments': sys.argv[1:], 'environment': dict(os.environ), 'session': os.getsid(0),\n"
        "         'pid': os.getpid(), 'nice': os.nice(0), 'input': sys.stdin.read()}\n"
        f"open({str(seen) + '.tmp'!r}, 'w').write(json.dumps(facts))\n"
        f"os.rename({str(seen) + '.tmp'!r}, {str(seen)!r})\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(evaluation_jobs, "_SCRIPT", script)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "CROSS_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    typed, terminal = os.pipe()
    os.write(terminal, b"for the training")
    os.close(terminal)
    own_input = os.dup(0)
    os.dup2(typed, 0)
    before = time.monotonic()
    start_evaluation_job(run, 10, OFFLINE)
    os.dup2(own_input, 0)
    os.close(own_input)
    os.close(typed)
    assert time.monotonic() - before < 20  # the job takes 60 s
    assert pending_evaluations(run) == {10}
    wait_for(seen)
    facts = json.loads(seen.read_text())
    assert facts["arguments"][:2] == ["--model", f"{run}@10"]
    assert facts["arguments"][facts["arguments"].index("--suite") + 1] == OFFLINE
    left = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "CROSS_SIZE"}
    assert not (left | {"TORCHELASTIC_RUN_ID"}) & set(facts["environment"])
    assert facts["environment"]["CUDA_VISIBLE_DEVICES"] == "3,4"
    assert facts["session"] == facts["pid"] != os.getsid(0)
    assert facts["nice"] == min(19, os.nice(0) + 10) and facts["input"] == ""
    os.kill(facts["pid"], 9)
    deadline = time.monotonic() + 10
    while pending_evaluations(run):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not Path(f"/proc/{facts['pid']}").exists()  # not even a zombie
    assert "hello from the job" in (run / "evaluations/offline/step-00000010/log.txt").read_text()


def test_a_job_that_cannot_start_is_recorded_and_raises_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    start_evaluation_job(run, 10, "nowhere.yaml")
    folder = run / "evaluations" / "nowhere" / "step-00000010"
    assert "nowhere.yaml: cannot be read" in json.loads((folder / "failed.json").read_text())["error"]
    assert "step 10 cannot be started" in caplog.text
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no-python"))
    start_evaluation_job(run, 10, OFFLINE)
    assert (run / "evaluations/offline/step-00000010/failed.json").exists()
    assert pending_evaluations(run) == set()
    (tmp_path / "file").write_text("")
    start_evaluation_job(tmp_path / "file", 10, OFFLINE)  # a folder that cannot be made


def test_pending_is_what_lives_and_has_not_ended(tmp_path: Path) -> None:
    folders = {step: evaluate.evaluation_folder(tmp_path, "s", step) for step in range(1, 8)}
    for folder in folders.values():
        folder.mkdir(parents=True)
    assert pending_evaluations(tmp_path) == set()
    child = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(Path(f"/proc/{child.pid}"))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    evaluate.write_pending(folders[1], os.getpid())
    for step, name in ((2, "results.json"), (3, "failed.json")):
        evaluate.write_pending(folders[step], os.getpid())
        (folders[step] / name).write_text("{}")
    evaluate.write_pending(folders[4], dead.pid)
    evaluate.write_pending(folders[5], child.pid)
    evaluate.write_pending(folders[6], os.getpid())
    record = json.loads((folders[6] / "pending").read_text())
    (folders[6] / "pending").write_text(json.dumps(record | {"started": record["started"] - 1}))  # another process
    (folders[7] / "pending").write_text(json.dumps(record | {"host": "elsewhere"}))
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert pending_evaluations(tmp_path) == {1, 7}  # the child is a zombie by now
    (folders[7] / "pending").write_text(json.dumps(record | {"host": "elsewhere", "time": time.time() - 2 * 86400}))
    assert pending_evaluations(tmp_path) == {1}
    child.wait()


def test_results_of_a_checkpoint_that_was_replaced_are_removed_when_a_job_starts(
    run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.py").write_text("")
    monkeypatch.setattr(evaluation_jobs, "_SCRIPT", tmp_path / "job.py")
    folder = evaluate.evaluation_folder(run, "offline", 10)
    folder.mkdir(parents=True)
    current = export.checkpoint_hash(checkpoint.step_folder(run, 10))
    (folder / "results.json").write_text(json.dumps({"settings": {"identity": {"model": current}}}))
    start_evaluation_job(run, 10, OFFLINE)
    assert (folder / "results.json").exists()
    save_step(run, small_settings(corpus), 10, small_model(small_settings(corpus), seed=12))
    start_evaluation_job(run, 10, OFFLINE)
    assert not (folder / "results.json").exists()
