"""The values of each example beside the scores, and questions made of held-out text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import dispersion_pretrain  # noqa: F401  (before transformers, which imports torchvision)

# isort: split
import pytest

from dispersion_pretrain import lm_tasks
from dispersion_pretrain.evaluate import Options, evaluate_model
from dispersion_pretrain.held_out import continuation_questions
from dispersion_pretrain.suites import Questions
from small_run import TEXTS, small_settings, write_corpus, write_run

OFFLINE = "configs/eval/offline.yaml"
FORM = Questions(number=1000, choices=4, context_words=5, continuation_words=3)
LONG = [" ".join(f"{name}{number}" for number in range(50)) for name in ("a", "b", "c")]


# ---- examples


def aggregate(metric: str, example: dict[str, Any]) -> float:
    """What the format promises: the score from the values of the examples alone."""
    values, weights = example["values"], example["weights"]
    if weights is None:
        return sum(values) / len(values)
    nats = -sum(values) / sum(weights)
    return nats / math.log(2) if metric == "bits_per_byte" else math.exp(nats)


def test_every_score_follows_from_its_examples(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    run = write_run(tmp_path / "run", small_settings(corpus), corpus / "tokenizer")
    results = evaluate_model(f"{run}@10", OFFLINE, tmp_path / "out", Options())
    examples = json.loads((tmp_path / "out" / "examples.json").read_text())
    assert examples["format_version"] == 1
    assert set(examples["tasks"]) == {"held_out_text", "held_out_continuation"}
    for task, metrics in examples["tasks"].items():
        scores = results["results"][task]
        assert set(metrics) == {metric for metric in scores if f"{metric}_stderr" in scores}
        for metric, example in metrics.items():
            assert aggregate(metric, example) == pytest.approx(scores[metric], rel=1e-9), metric
            assert len(example["keys"]) == len(example["values"]) == scores["samples"]
            assert example["keys"] == sorted(example["keys"])
    assert examples["tasks"]["held_out_continuation"]["acc"]["weights"] is None
    num_bytes = [len(text.encode()) for text in TEXTS]
    assert examples["tasks"]["held_out_text"]["byte_perplexity"]["weights"] == num_bytes

    (tmp_path / "out" / "examples.json").unlink()  # of results that were written before there was such a file
    assert evaluate_model(f"{run}@10", OFFLINE, tmp_path / "out", Options()) == results


def test_examples_of_a_group_have_its_tasks_in_their_keys() -> None:
    samples = {name: [{"doc_id": number, "acc": number % 2} for number in (1, 0)] for name in ("g_b", "g_a")}
    found = lm_tasks._examples("acc", "g", samples)
    assert found == {"keys": ["g_a/0", "g_a/1", "g_b/0", "g_b/1"], "values": [0.0, 1.0, 0.0, 1.0], "weights": None}


# ---- questions


def test_the_true_continuation_goes_on_and_the_others_are_from_other_documents() -> None:
    questions = continuation_questions(LONG, FORM)
    assert len(questions) == 3 * 15
    asked = set()
    for question in questions:
        truth = question["choices"][question["answer"]]
        assert any(f"{question['context']} {truth}" in text for text in LONG)
        wrong = [choice for choice in question["choices"] if choice != truth]
        assert len(set(wrong)) == 3 and all(choice[0] != truth[0] for choice in wrong)
        assert {len(choice.split()) for choice in question["choices"]} == {3}
        assert len(question["context"].split()) == 5
        asked.add(truth)
    assert len(asked) == len(questions)
    answers = [question["answer"] for question in questions]
    assert max(map(answers.count, range(4))) - min(map(answers.count, range(4))) <= 1
    assert continuation_questions(LONG, FORM) == questions
    fewer = FORM.model_copy(update={"number": 7})
    assert continuation_questions(LONG, fewer) == questions[:7]


def test_answers_that_a_model_cannot_read_are_left_out() -> None:
    everything = continuation_questions(LONG, FORM)
    longest = max((choice for question in everything for choice in question["choices"]), key=len)
    some = continuation_questions(LONG, FORM, lambda answer: len(answer) < len(longest))
    assert some and all(len(choice) < len(longest) for question in some for choice in question["choices"])


def test_a_single_document_gives_wrong_choices_away_from_the_question() -> None:
    for question in continuation_questions(LONG[:1], FORM):
        first = int(question["choices"][question["answer"]].split()[0][1:])
        for choice in question["choices"]:
            distance = abs(int(choice.split()[0][1:]) - first)
            assert distance == 0 or distance >= 5 + 3


def test_text_that_repeats_gives_no_choice_twice() -> None:
    with pytest.raises(ValueError, match=r"held_out.questions: 3 documents with 150 words give none"):
        continuation_questions(["the same words " * 16 + "and end"] * 3, FORM)


@pytest.mark.parametrize("texts", [[], ["a b c"], [" ".join("abcdefghij")]])
def test_text_that_is_too_short_for_a_question_says_so(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="Longer text is needed"):
        continuation_questions(texts, FORM)
