"""The data job: sources, tokenizer, packing, and what the command leaves behind."""

from __future__ import annotations

import hashlib
import importlib.machinery
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from transformers import AutoTokenizer

import tokenize_to_mds
import vocabulary
from data_job import DataJob
from dispersion_pretrain.corpus import read_manifest
from document_hash import document_digest, falls_into_validation
from prep_command import command, contents, read_blocks, write_lines, write_texts

DATA_PREP = Path(tokenize_to_mds.__file__).parent


@pytest.fixture(autouse=True)
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command sets these for its process: they must not outlive a test."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The texts of a source, and the corpus that the command made of it."""
    folder = tmp_path_factory.mktemp("made")
    texts = write_texts(folder / "texts")
    assert tokenize_to_mds.main(command(folder / "texts", folder / "corpus")) == 0
    return texts, folder / "corpus"


def is_validation(text: str) -> bool:
    return falls_into_validation(document_digest(text.encode("utf-8")), 0.2)


def test_blocks_hold_the_documents_in_order(made: tuple[list[str], Path]) -> None:
    texts, corpus = made
    described = json.loads((corpus / "corpus.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    assert described["eos_token_id"] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert described["vocab_size"] == len(tokenizer) == 300
    assert described["token_dtype"] == "uint16"
    for split, in_validation in (("train", False), ("validation", True)):
        entry = described["splits"][split]
        expected = [text for text in texts if is_validation(text) is in_validation]
        blocks = read_blocks(corpus, split)
        assert blocks.dtype == np.uint16
        assert blocks.shape == (entry["sequences"], 16)
        whole = "".join(text + "<|endoftext|>" for text in expected)
        tail = tokenizer.encode(whole, add_special_tokens=False)[blocks.size :]
        assert tokenizer.decode([*blocks.reshape(-1).tolist(), *tail]) == whole
        assert entry["dropped_tokens"] == len(tail) < 16
        assert entry["tokens"] == blocks.size
        assert entry["documents"] == len(expected) == whole.count("<|endoftext|>")
        assert entry["bytes"] == sum(len(text.encode()) for text in expected)
        index = (corpus / split / "index.json").read_bytes()
        assert entry["index_sha256"] == hashlib.sha256(index).hexdigest()


def test_tokenizer_never_saw_the_validation_split(made: tuple[list[str], Path]) -> None:
    texts, corpus = made
    vocabularies = []
    for wanted in (texts, [text for text in texts if not is_validation(text)]):
        vocabularies.append(vocabulary.train(iter(wanted), 300).get_vocab())
    everything, train_only = vocabularies
    assert AutoTokenizer.from_pretrained(corpus / "tokenizer").get_vocab() == train_only != everything


def test_described_tokenizer_is_the_one_in_the_folder(made: tuple[list[str], Path]) -> None:
    described = json.loads((made[1] / "corpus.json").read_text())["tokenizer"]
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (made[1] / described["folder"]).iterdir()
    }
    assert described["files"] == hashes
    assert described["sha256"] == hashes["tokenizer.json"]


def test_same_command_makes_the_same_bytes(made: tuple[list[str], Path], tmp_path: Path) -> None:
    source = made[1].parent / "texts"
    assert tokenize_to_mds.main(command(source, tmp_path / "again")) == 0
    assert contents(tmp_path / "again") == contents(made[1])


def test_same_command_again_finds_the_corpus(
    made: tuple[list[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DataJob, "run", lambda *arguments: pytest.fail("made anew"))
    assert tokenize_to_mds.main(command(made[1].parent / "texts", made[1])) == 0
    assert "a whole corpus made with the same arguments is there" in capsys.readouterr().out


def error_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, expect exit code 2 and one line of error; return the line."""
    try:
        code: Any = tokenize_to_mds.main(arguments)
    except SystemExit as stop:  # argparse
        code = stop.code
    lines = capsys.readouterr().err.splitlines()
    assert code == 2
    errors = [line for line in lines if not line.startswith(("tokenizing", "training", "going on"))]
    assert len(errors) == 1 and errors[0].startswith("error: ")
    return errors[0]


def test_other_arguments_are_named(made: tuple[list[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(made[1])
    message = error_of(command(made[1].parent / "texts", made[1], tokenizer="train:299", length=8), capsys)
    assert "sequence_length is 16 there, 8 is asked for" in message
    assert "tokenizer.name is 'train:300' there, 'train:299' is asked for" in message
    assert "--overwrite" in message
    assert "source" not in message and "share" not in message
    assert contents(made[1]) == before


def test_changed_source_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "texts")
    arguments = command(tmp_path / "texts", tmp_path / "corpus")
    assert tokenize_to_mds.main(arguments) == 0
    capsys.readouterr()
    (tmp_path / "texts" / "more.txt").write_text("one document more")
    assert "source.files is 60 there, 61 is asked for" in error_of(arguments, capsys)
    assert tokenize_to_mds.main([*arguments, "--overwrite"]) == 0
    assert json.loads((tmp_path / "corpus" / "corpus.json").read_text())["source"]["files"] == 61
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["corpus", "texts"]


@pytest.mark.parametrize(
    "damaged", ["train/shard.00000.mds", "train/index.json", "tokenizer/tokenizer.json", "corpus.json"]
)
def test_damaged_corpus_is_not_taken_for_whole(
    tmp_path: Path, damaged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "texts")
    arguments = command(tmp_path / "texts", tmp_path / "corpus")
    assert tokenize_to_mds.main(arguments) == 0
    capsys.readouterr()
    if damaged.startswith("tokenizer"):
        (tmp_path / "corpus" / damaged).unlink()
    else:
        os.truncate(tmp_path / "corpus" / damaged, 20)
    message = error_of(arguments, capsys)
    assert "damaged" in message and damaged in message


def test_overwrite_never_removes_what_is_no_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "texts")
    message = error_of(command(tmp_path / "texts", tmp_path / "texts", "--overwrite"), capsys)
    assert "exists and is no corpus" in message
    assert len(list((tmp_path / "texts").iterdir())) == 60


def test_failure_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "texts")
    message = error_of(command(tmp_path / "texts", tmp_path / "corpus", length=100_000), capsys)
    assert "--seq-len 100000: train has only" in message
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["texts"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"--source": "neverland"}, "--source neverland: neither a known source nor an existing path"),
        ({"--tokenizer": "train:256"}, "--tokenizer train:256: '256' is no vocabulary size.*At least 257"),
        ({"--tokenizer": "train:many"}, "--tokenizer train:many"),
        ({"--tokenizer": "train:50000"}, r"--tokenizer train:50000: the training text yields only \d+ tokens"),
        ({"--tokenizer": "/neverland"}, "--tokenizer /neverland: cannot be loaded"),
        ({"--seq-len": "1"}, "--seq-len 1: too short"),
        ({"--seq-len": "long"}, "argument --seq-len: invalid int value: 'long'"),
        ({"--seq-len": "10000000"}, "--shard-bytes 33554432: does not do for blocks of 10000000 tokens"),
        ({"--out": "ftp://host/corpus"}, "--out ftp://host/corpus: unknown kind of storage. s3://, gs://"),
        ({"--validation-share": "0"}, "--validation-share 0.0: leaves a split empty"),
        ({"--validation-share": "1e-9"}, "the validation split gets none of the source's 60 documents"),
        ({"--processes": "0"}, "--processes 0"),
    ],
)
def test_wrong_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, str], message: str
) -> None:
    write_texts(tmp_path / "texts")
    arguments = command(tmp_path / "texts", tmp_path / "corpus")
    for option, value in changed.items():
        arguments[arguments.index(option) + 1] = value
    assert re.search(message, error_of(arguments, capsys))


def test_existing_tokenizer_is_taken_as_it_is(made: tuple[list[str], Path], tmp_path: Path) -> None:
    folder = made[1] / "tokenizer"
    arguments = command(made[1].parent / "texts", tmp_path / "corpus", tokenizer=str(folder))
    assert tokenize_to_mds.main(arguments) == 0
    for split in ("train", "validation"):
        np.testing.assert_array_equal(read_blocks(tmp_path / "corpus", split), read_blocks(made[1], split))


def test_end_of_document_token_is_needed(
    made: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made[1] / "tokenizer")
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    arguments = command(made[1].parent / "texts", tmp_path / "corpus", tokenizer=str(tmp_path / "tokenizer"))
    assert "has no end-of-document token" in error_of(arguments, capsys)


def test_number_of_processes_does_not_change_a_byte(tmp_path: Path) -> None:
    write_lines(tmp_path / "lines.jsonl", documents=6000)  # several portions
    arguments = ["--deduplicate", "--minimum-characters", "40", "--shard-bytes", "50000"]
    for processes in ("1", "2", "3"):
        out = tmp_path / processes
        assert tokenize_to_mds.main(command(tmp_path / "lines.jsonl", out, *arguments, "--processes", processes)) == 0
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert len(list((tmp_path / "1" / "train").glob("*.mds"))) > 5


def test_each_length_is_a_corpus_of_its_own(tmp_path: Path) -> None:
    write_lines(tmp_path / "lines.jsonl")
    for length in (16, 24):
        assert tokenize_to_mds.main(command(tmp_path / "lines.jsonl", tmp_path / str(length), length=length)) == 0
    both = command(tmp_path / "lines.jsonl", tmp_path / "both")
    both[both.index("--seq-len") + 1 : both.index("--seq-len") + 2] = ["16", "24"]
    assert tokenize_to_mds.main(both) == 0
    for length in (16, 24):
        assert contents(tmp_path / "both" / f"seq{length}") == contents(tmp_path / str(length))
    assert sorted(path.name for path in (tmp_path / "both").iterdir()) == ["seq16", "seq24"]
    assert tokenize_to_mds.main(both) == 0


def test_other_lengths_are_another_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_texts(tmp_path / "texts")
    one = command(tmp_path / "texts", tmp_path / "corpus")
    assert tokenize_to_mds.main(one) == 0
    capsys.readouterr()
    both = list(one)
    both[both.index("--seq-len") + 1 : both.index("--seq-len") + 2] = ["16", "24"]
    assert "seq16/corpus.json is missing" in error_of(both, capsys)
    assert tokenize_to_mds.main([*both, "--overwrite"]) == 0
    capsys.readouterr()
    assert "made otherwise (corpus.json is missing)" in error_of(one, capsys)


def test_short_documents_and_duplicates_are_left_out(tmp_path: Path) -> None:
    texts = [f"a document of its own, {number}" for number in range(40)]
    with_others = [*texts[:20], "too short", *texts[5:25], texts[3], *texts[25:], *texts]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in with_others))
    (tmp_path / "clean.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = tmp_path / "tokenizer"
    vocabulary.save(vocabulary.train(iter(texts), 280), tokenizer)
    filters = ["--minimum-characters", "10", "--deduplicate", "--shard-bytes", "1000"]
    for name in ("lines", "clean"):
        out = tmp_path / name
        assert tokenize_to_mds.main(command(tmp_path / f"{name}.jsonl", out, *filters, tokenizer=str(tokenizer))) == 0
    for split in ("train", "validation"):
        np.testing.assert_array_equal(read_blocks(tmp_path / "lines", split), read_blocks(tmp_path / "clean", split))
    described = [json.loads((tmp_path / name / "corpus.json").read_text()) for name in ("lines", "clean")]
    assert described[0]["filtered"] == {"short": 1, "duplicates": len(with_others) - 1 - len(texts)}
    assert described[1]["filtered"] == {"short": 0, "duplicates": 0}
    assert described[0]["splits"] == described[1]["splits"]


def test_validation_source_is_the_validation_split(tmp_path: Path) -> None:
    texts = [f"a document of its own, {number}" for number in range(60)]
    for name, some in (("train", texts[:50]), ("other", texts[45:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    arguments = command(tmp_path / "train.jsonl", tmp_path / "corpus", "--deduplicate", tokenizer="train:280")
    place = arguments.index("--validation-share")
    arguments[place : place + 2] = ["--validation-source", str(tmp_path / "other.jsonl")]
    assert tokenize_to_mds.main(arguments) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "corpus" / "tokenizer")
    for split, expected in (("train", texts[:45]), ("validation", texts[45:])):  # common ones leave the train split
        whole = "".join(text + "<|endoftext|>" for text in expected)
        decoded = tokenizer.decode(read_blocks(tmp_path / "corpus", split).reshape(-1).tolist())
        assert whole.startswith(decoded) and len(whole) - len(decoded) < 60
    described = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    assert described["source"]["validation"]["location"] == str(tmp_path / "other.jsonl")
    assert described["filtered"]["duplicates"] == 5
    assert read_manifest(tmp_path / "corpus").splits["train"].documents == 45
    with pytest.raises(SystemExit):
        tokenize_to_mds.main([*arguments, "--validation-share", "0.2"])


def test_recipe_gives_what_the_command_line_does_not(tmp_path: Path) -> None:
    write_lines(tmp_path / "lines.jsonl")
    recipe: dict[str, Any] = {"source": str(tmp_path / "lines.jsonl"), "tokenizer": "train:300", "seq_len": [16, 24]}
    recipe |= {"validation_share": 0.2, "deduplicate": True, "minimum_characters": 50}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    start = ["--recipe", str(tmp_path / "recipe.yaml"), "--processes", "1", "--out"]
    assert tokenize_to_mds.main([*start, str(tmp_path / "as_it_says")]) == 0
    described = json.loads((tmp_path / "as_it_says" / "seq24" / "corpus.json").read_text())
    assert (described["deduplicate"], described["minimum_characters"], described["validation_share"]) == (True, 50, 0.2)
    assert described["filtered"]["short"] > 0 and described["filtered"]["duplicates"] > 0
    others = ["--no-deduplicate", "--seq-len", "20", "--validation-source", str(tmp_path / "lines.jsonl")]
    assert tokenize_to_mds.main([*start, str(tmp_path / "otherwise"), *others]) == 0
    described = json.loads((tmp_path / "otherwise" / "corpus.json").read_text())
    assert (described["deduplicate"], described["sequence_length"], described["validation_share"]) == (False, 20, None)
    assert described["minimum_characters"] == 50 and described["source"]["validation"]["name"] == "text"


def test_a_corpus_made_before_there_were_filters_is_found(made: tuple[list[str], Path], tmp_path: Path) -> None:
    shutil.copytree(made[1], tmp_path / "corpus")
    described = json.loads((tmp_path / "corpus" / "corpus.json").read_text())
    for key in ("minimum_characters", "deduplicate", "shard_bytes", "filtered"):
        described.pop(key)
    (tmp_path / "corpus" / "corpus.json").write_text(json.dumps(described))
    assert tokenize_to_mds.main(command(made[1].parent / "texts", tmp_path / "corpus")) == 0


def test_no_file_shadows_a_library_or_imports_the_training_package() -> None:
    """The folder of a script comes first on the path: data_prep/tokenize.py would break `import torch`."""
    others = [place for place in sys.path if Path(place or ".").resolve() != DATA_PREP]
    for file in DATA_PREP.glob("*.py"):
        assert file.stem not in sys.stdlib_module_names
        assert importlib.machinery.PathFinder.find_spec(file.stem, others) is None, file.stem
        assert "dispersion_pretrain" not in file.read_text()
