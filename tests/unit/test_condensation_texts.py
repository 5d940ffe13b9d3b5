"""Sources of texts for the condensation measurement: what each gives, and what each says of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from dispersion_pretrain.condensation_texts import (
    DATASETS,
    CorpusTexts,
    DatasetTexts,
    FileTexts,
    Subject,
    TextBatches,
    load_tokenizer,
)
from dispersion_pretrain.model import load_exported
from small_models import gpt2, make_texts, write_model
from small_run import write_corpus

LENGTH = 24


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = write_model(tmp_path_factory.mktemp("model"))
    return Subject("tiny", load_exported(folder), load_tokenizer(str(folder)))


def write_mirror(folder: Path, dataset: str, rows: list[str]) -> Path:
    """One data set of the paper as launch/mirror_datasets.py leaves it."""
    source = DATASETS[dataset]
    path = folder / source.hub_name / (source.config or "default") / "train.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(rows))), source.column: rows}), path)
    return folder


def expected_ids(subject: Subject, texts: list[str]) -> list[list[int]]:
    assert subject.tokenizer is not None
    return [subject.tokenizer(text)["input_ids"][:LENGTH] for text in texts]


def read(batches: TextBatches) -> list[list[int]]:
    return [row for batch in batches for row in batch.tolist()]


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_file_has_a_text_a_line_and_short_ones_are_counted(subject: Subject, tmp_path: Path, suffix: str) -> None:
    texts = make_texts(5)
    lines = [texts[0], "too short", *texts[1:], ""]
    if suffix == "jsonl":
        lines = [json.dumps({"id": 1, "text": line}) if line else line for line in lines]
    path = tmp_path / f"texts.{suffix}"
    path.write_text("\r\n".join(lines), newline="")
    batches = TextBatches(FileTexts(path, 4, LENGTH), subject, num_texts=4, batch_size=3)
    assert [len(batch) for batch in batches] == [3, 1]
    batches = TextBatches(FileTexts(path, 9, LENGTH), subject, num_texts=9, batch_size=3)
    assert read(batches) == expected_ids(subject, texts)
    assert batches.num_short == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: holds no text"),
        ("a.txt", b"\n \n", "a.txt: holds no text"),
        ("a.txt", b"good\n\xff\xfe\n", "a.txt, line 2: is not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": " "}\n', "a.jsonl, line 2: the text is empty"),
        ("a.jsonl", b'{"txt": "x"}\n', "a.jsonl, line 1: has no text"),
        ("a.jsonl", b'["x"]\n', "a.jsonl, line 1: has no text"),
        ("a.jsonl", b'{"text": 3}\n', "a.jsonl, line 1: has no text"),
        ("a.jsonl", b"{", "a.jsonl, line 1: is no JSON"),
        ("b.txt", None, "b.txt: is no file"),
    ],
)
def test_a_bad_file_is_named_before_a_model_is_loaded(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        FileTexts(tmp_path / name, 10, None)


def test_texts_that_are_all_too_short_say_how_long_they_are(subject: Subject, tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("narrow cone\nnarrow cone and depth\n")
    (longest,) = {len(ids) for ids in expected_ids(subject, ["narrow cone and depth"])}
    with pytest.raises(
        ValueError, match=f"tiny: none of 2 texts .* the longest has {longest}.*--max-length {longest} "
    ):
        read(TextBatches(FileTexts(path, 10, LENGTH), subject, 10, 4))


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_data_set_is_drawn_as_the_package_draws_it(subject: Subject, tmp_path: Path, dataset: str) -> None:
    rows = [" " if number % 3 == 0 else text for number, text in enumerate(make_texts(200, words=40))]
    texts = DatasetTexts(dataset, write_mirror(tmp_path, dataset, rows), 3, LENGTH)
    for repetition in range(3):
        first = int(np.random.default_rng(seed=repetition).integers(0, int(len(rows) * 0.95)))
        text = texts.text(repetition)
        assert "".join(rows[first:]).startswith(text)
        assert 1024 <= len(text.split()) < 1024 + 40
    assert read(TextBatches(texts, subject, 3, 2)) == expected_ids(subject, [texts.text(r) for r in range(3)])


def test_a_data_set_that_ends_gives_a_short_text(tmp_path: Path) -> None:
    texts = DatasetTexts("squad", write_mirror(tmp_path, "squad", ["one", "two"]), 1, LENGTH)
    assert texts.text(0) == "onetwo"


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"imdb/default/train.parquet.*mirror_datasets"):
        DatasetTexts("imdb", tmp_path, 1, LENGTH)
    with pytest.raises(ValueError, match="--dataset squad: .*rajpurkar/squad of the Hugging Face hub"):
        DatasetTexts("squad", None, 1, LENGTH)  # tests run offline
    mirror = write_mirror(tmp_path, "squad", ["x"])
    path = mirror / "rajpurkar/squad/default/train.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["x"]}), path)
    with pytest.raises(ValueError, match="column 'context'"):
        DatasetTexts("squad", mirror, 1, LENGTH)


def test_a_corpus_gives_its_validation_sequences(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    model = load_exported(write_model(tmp_path / "model", vocabulary=0))
    subject = Subject("tiny", model, AutoTokenizer.from_pretrained(corpus / "tokenizer"))
    assert CorpusTexts(str(corpus), None, None).length == 32  # of the corpus, less than the paper's 512
    batches = TextBatches(CorpusTexts(str(corpus), None, 8), subject, 2, 2)
    (batch,) = list(batches)
    assert batch.shape == (2, 8)
    with pytest.raises(ValueError, match="--max-length: 33, but the texts .* have 32 tokens"):
        CorpusTexts(str(corpus), None, 33)


def test_tokens_that_mean_nothing_to_the_model_are_refused(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(make_texts(2)))
    texts = FileTexts(tmp_path / "texts.txt", 2, LENGTH)
    narrow = Subject("narrow", load_exported(write_model(tmp_path / "a", gpt2(vocab_size=100))), subject.tokenizer)
    with pytest.raises(ValueError, match="narrow: its tokenizer gives the token id 299, .* 100 rows"):
        read(TextBatches(texts, narrow, 2, 2))
    with pytest.raises(ValueError, match="dumb: comes without a tokenizer"):
        read(TextBatches(texts, Subject("dumb", subject.model, None), 2, 2))
    corpus = write_corpus(tmp_path / "corpus")
    with pytest.raises(ValueError, match="narrow: its vocabulary has 100 tokens, .* has 300"):
        read(TextBatches(CorpusTexts(str(corpus), None, 8), narrow, 2, 2))
    with pytest.raises(ValueError, match="tiny: its tokenizer .* have another id or none"):
        read(TextBatches(CorpusTexts(str(corpus), None, 8), subject, 2, 2))


def test_an_added_token_beyond_the_embedding_is_refused_where_it_occurs(subject: Subject, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_model(tmp_path / "model")))
    assert tokenizer is not None
    tokenizer.add_tokens(["<new>"])
    (tmp_path / "good.txt").write_text("\n".join(make_texts(2)))
    (tmp_path / "bad.txt").write_text("\n".join(["<new> " + text for text in make_texts(2)]))
    added = Subject("added", subject.model, tokenizer)
    assert len(read(TextBatches(FileTexts(tmp_path / "good.txt", 2, LENGTH), added, 2, 2))) == 2
    with pytest.raises(ValueError, match="added: its tokenizer gives the token id 300, .* 300 rows"):
        read(TextBatches(FileTexts(tmp_path / "bad.txt", 2, LENGTH), added, 2, 2))
