"""Tasks over held-out text of a corpus: documents for perplexities, and questions which of several texts goes on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from dispersion_pretrain.corpus import CorpusManifest, TokenCorpus, read_manifest, tokenizer_path
from dispersion_pretrain.suites import HeldOut, Questions, SuiteTask

_CHARACTERS_A_WORD = 12  # of a continuation, on average, at most; English has 6


@dataclass(frozen=True)
class Text:
    """Where held-out text comes from; `corpus` is None where none was named."""

    corpus: str | None
    cache: str | None  # for the shards of a remote corpus
    scratch: Path  # empty folder for files that nobody needs afterwards


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


def continuation_questions(
    texts: list[str], form: Questions, fits: Callable[[str], bool] = lambda _: True
) -> list[dict[str, Any]]:
    """Make questions of texts, the same from the same texts; words are what white space separates.

    Places lie one continuation apart, so that no two questions ask for the same words. Which of them are used, in which
    order, and which other places give the wrong choices, is decided by hashes of the places. Wrong choices come from
    other documents, and only where those are too few from the same one, away from the question. The true choice is in
    turn the first, second and so on. Continuations with very long words (rulers, tables, base64) are left out: they are
    no text.

    Args:
        fits: whether a model can read a continuation; others are left out, too.

    Returns:
        `context` (text), `choices` (texts) and `answer` (index of the true one) of each question.

    Raises:
        ValueError: the texts are too short for a single one.
    """
    places: list[tuple[int, int]] = []  # document, first word of the continuation
    words = [list(re.finditer(r"\S+", text)) for text in texts]
    for document, found in enumerate(words):
        last = len(found) - form.continuation_words
        places += [(document, first) for first in range(form.context_words, last + 1, form.continuation_words)]
    continuations = {}
    for document, first in places:
        begin, end = words[document][first].start(), words[document][first + form.continuation_words - 1].end()
        answer = texts[document][begin:end]
        if len(answer) <= _CHARACTERS_A_WORD * form.continuation_words and fits(answer):
            continuations[document, first] = answer
    questions: list[dict[str, Any]] = []
    for place in sorted(continuations, key=_hash)[: form.number]:
        document, first = place
        begin, end = words[document][first - form.context_words].start(), words[document][first - 1].end()
        choices = _wrong_choices(place, continuations, form)
        if len(choices) == form.choices - 1:
            truth = len(questions) % form.choices
            choices.insert(truth, continuations[place])
            questions.append({"context": texts[document][begin:end], "choices": choices, "answer": truth})
    if not questions:
        raise ValueError(
            f"held_out.questions: {len(texts)} documents with {sum(map(len, words))} words give none with "
            f"{form.context_words} words before {form.continuation_words} and {form.choices} choices. Longer text is "
            "needed. Take a larger corpus or more of it, or ask for fewer words"
        )
    return questions


def _fitting(manifest: CorpusManifest, cache: str | None) -> Callable[[str], bool]:
    """Whether an answer has less tokens than the corpus' sequences, of which a model trained on them reads no more.

    A matter of the corpus alone, so that its questions are the same for every model.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path(manifest, cache), trust_remote_code=False)
    longest = manifest.sequence_length - 1
    return lambda answer: len(tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]) <= longest


def _wrong_choices(place: tuple[int, int], texts: dict[tuple[int, int], str], form: Questions) -> list[str]:
    document, first = place
    away = form.context_words + form.continuation_words
    others = [other for other in texts if other[0] != document]
    if len({texts[other] for other in others} - {texts[place]}) < form.choices - 1:
        others += [other for other in texts if other[0] == document and abs(other[1] - first) >= away]
    ordered = sorted(others, key=lambda other: (other[0] == document, _hash((*place, *other))))
    distinct = dict.fromkeys(texts[other] for other in ordered if texts[other] != texts[place])
    return list(distinct)[: form.choices - 1]


def _hash(place: tuple[int, ...]) -> bytes:
    return hashlib.sha256(repr(place).encode()).digest()


def task_config(task: SuiteTask, text: Text) -> dict[str, Any]:
    """Write the data of a task over held-out text and return its lm-eval configuration.

    Raises:
        ValueError, RuntimeError: no corpus is named, it cannot be read, or its held-out text is empty or too short.
    """
    assert task.held_out is not None and task.config is not None
    if text.corpus is None:
        raise ValueError("--corpus: is missing. The model is no run, so its corpus must be named. Give --corpus")
    cache = text.cache or (str(text.scratch / "corpus") if "://" in text.corpus else None)
    texts = held_out_texts(text.corpus, task.held_out, cache)
    if not texts:
        raise ValueError(
            f"{text.corpus}: its held-out text is empty. Words in the validation split are needed. Make the corpus "
            "anew with a larger share of validation"
        )
    questions = task.held_out.questions
    rows = (
        [{"text": one} for one in texts]
        if questions is None
        else continuation_questions(texts, questions, _fitting(read_manifest(text.corpus), cache))
    )
    path = (text.scratch / f"{task.task}.jsonl").resolve()
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return {
        **task.config,
        "task": task.task,
        "dataset_kwargs": {
            "data_files": {task.config["test_split"]: str(path)},
            "cache_dir": str(text.scratch / "datasets"),
        },
        "metric_list": [{"metric": metric} for metric in task.metrics],
    }
