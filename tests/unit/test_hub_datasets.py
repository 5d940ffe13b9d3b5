"""Hugging Face datasets as sources, as far as that goes without a hub: folders of data files, and saved datasets."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import arrow_columns
import hub_datasets
import sources
from portions import Portion, Source
from prep_errors import InputError

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=60)
SHARE = st.floats(0, 0.999)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def read(portion: Portion) -> list[str]:
    return list(pickle.loads(pickle.dumps(portion.read))())


def documents_of(source: Source) -> list[str]:
    return [text for portion in source.portions() for text in read(portion)]


def assert_goes_on(source: Source, expected: list[str], share: float) -> int:
    """Compare the documents, and what comes behind a position with the tail; return the number of portions."""
    whole = [(read(portion), portion.after, portion.units) for portion in source.portions()]
    assert [text for texts, *_ in whole for text in texts] == [text for text in expected if text.strip()]
    assert sum(units for *_, units in whole) == len(expected)
    number = int(share * len(whole))
    tail = source.portions(json.loads(json.dumps(whole[number][1])))
    assert [(read(portion), portion.after, portion.units) for portion in tail] == whole[number + 1 :]
    return len(whole)


def write_parquet(folder: Path, files: list[list[str]], row_group_size: int = 7) -> list[str]:
    folder.mkdir(parents=True)
    for number, texts in enumerate(files):
        table = pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=row_group_size)
    return [text for texts in files for text in texts]


@given(
    files=st.lists(TEXTS, min_size=1, max_size=3),
    row_group_size=st.integers(1, 40),
    batch_rows=st.integers(1, 30),
    portion_bytes=st.integers(30, 500),
    share=SHARE,
)
@settings(max_examples=20)
def test_a_stream_goes_on_from_every_position(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[list[str]],
    row_group_size: int,
    batch_rows: int,
    portion_bytes: int,
    share: float,
) -> None:
    folder = tmp_path_factory.mktemp("any", numbered=True) / "data"
    expected = write_parquet(folder, files, row_group_size)
    with (
        mock.patch.object(arrow_columns, "PORTION_BYTES", portion_bytes),
        mock.patch.object(hub_datasets, "_BATCH_ROWS", batch_rows),
    ):
        assert_goes_on(sources.open_source(f"hf:{folder}"), expected, share)


@given(texts=TEXTS, num_shards=st.integers(1, 4), portion_bytes=st.integers(30, 500), share=SHARE)
@settings(max_examples=20)
def test_a_saved_dataset_goes_on_from_every_position(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], num_shards: int, portion_bytes: int, share: float
) -> None:
    folder = tmp_path_factory.mktemp("any", numbered=True) / "saved"
    rows = datasets.Dataset.from_dict({"text": texts, "id": list(range(len(texts)))})
    rows.save_to_disk(folder, num_shards=min(num_shards, len(texts)))
    with mock.patch.object(arrow_columns, "PORTION_BYTES", portion_bytes):
        source = sources.open_source(str(folder))  # without hf: as its files say what it is
        assert source.units == len(texts)
        assert_goes_on(source, texts, share)


def test_portions_of_many_rows(tmp_path: Path) -> None:
    """At the real sizes: a stream sends its rows and no more, a saved dataset their numbers."""
    texts = [f"{number} " + "words of a text " * (number % 600) for number in range(1500)]
    write_parquet(tmp_path / "data", [texts[:1000], texts[1000:]], row_group_size=1000)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    for name, sent_bytes in ((f"hf:{tmp_path / 'data'}", 1.2 * 2**20), (str(tmp_path / "saved"), 1000)):
        source = sources.open_source(name)
        assert max(len(pickle.dumps(portion.read)) for portion in source.portions()) < sent_bytes
        assert assert_goes_on(source, texts, 0.3) in (7, 8)


def test_json_lines_of_a_folder_are_streamed(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        lines = [json.dumps({"text": f"{split} {number}", "n": number}) + "\n" for number in range(300)]
        (tmp_path / f"{split}.jsonl").write_text("".join(lines))
    source = sources.open_source(f"hf:{tmp_path}", dataset_split="validation")
    with mock.patch.object(arrow_columns, "PORTION_BYTES", 1000):
        for share in (0, 0.5, 0.9):
            assert_goes_on(source, [f"validation {number}" for number in range(300)], share)


def test_saved_splits_are_chosen(tmp_path: Path) -> None:
    splits = {split: datasets.Dataset.from_dict({"body": [f"{split} text"]}) for split in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    for name in (str(tmp_path / "saved"), f"hf:{tmp_path / 'saved'}"):
        source = sources.open_source(name, text_column="body", dataset_split="test")
        assert documents_of(source) == ["test text"]
    suffixed = sources.open_source(f"hf:{tmp_path / 'saved'}::test", text_column="body")
    assert documents_of(suffixed) == ["test text"]
    assert suffixed.identity() == source.identity()


def test_identity_tells_changed_datasets(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data", [["one"], ["two"]])
    identity = sources.open_source(f"hf:{tmp_path / 'data'}").identity()
    assert identity == sources.open_source(f"hf:{tmp_path / 'data'}").identity()
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["name"], identity["split"]) == ("hf", "train") and "text_column" not in identity
    pq.write_table(pa.table({"id": [1], "text": ["three"]}), tmp_path / "data" / "part-0.parquet")
    assert sources.open_source(f"hf:{tmp_path / 'data'}").identity()["revision"] != identity["revision"]

    for number, texts in enumerate((["one"], ["six"])):
        datasets.Dataset.from_dict({"text": texts, "other": texts}).save_to_disk(tmp_path / str(number))
    one, six = (sources.open_source(str(tmp_path / name)).identity() for name in "01")
    assert one == sources.open_source(str(tmp_path / "0")).identity() and one["rows"] == 1
    assert one["fingerprint"] != six["fingerprint"]
    assert sources.open_source(str(tmp_path / "0"), text_column="other").identity()["text_column"] == "other"


def error_of(name: str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        documents_of(sources.open_source(name, **options))
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    return str(caught.value)


@pytest.mark.parametrize("name", ["hf:owner/neverland", "owner/neverland", "neverland", "hf:neverland:en:validation"])
def test_hub_that_cannot_be_reached_is_one_line_at_once(name: str) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    start_s = time.monotonic()
    message = error_of(name)
    assert time.monotonic() - start_s < 5
    assert message.startswith(f"--source {name}: ")
    assert ("neither a known source nor an existing path" in message) is not name.startswith("hf:")
    assert "Couldn't reach" in message and "neverland' on the Hub" in message
    assert "Give a name on a hub that this machine reaches" in message


def test_what_a_dataset_lacks_is_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data", [["one"]])
    name = f"hf:{tmp_path / 'data'}"
    assert "Bad split: test. Available splits: ['train']" in error_of(name, dataset_split="test")
    assert "BuilderConfig 'en' not found. Available: ['default']" in error_of(name, dataset_config="en")
    assert "no column 'body'. Columns of strings there: text." in error_of(name, text_column="body")
    assert "column 'id' holds int64. Strings are needed" in error_of(name, text_column="id")
    (tmp_path / "empty").mkdir()
    assert "doesn't contain any data files" in error_of(f"hf:{tmp_path / 'empty'}")

    datasets.Dataset.from_dict({"text": ["one"], "id": [1]}).save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    assert documents_of(sources.open_source(saved, dataset_split="test")) == ["one"]
    both = {split: datasets.load_from_disk(saved) for split in ("train", "validation")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "both")
    assert "no split 'test'. There are train, validation." in error_of(str(tmp_path / "both"), dataset_split="test")
    assert "no column 'body'. Columns of strings there: text." in error_of(saved, text_column="body")
    (tmp_path / "saved" / "data-00000-of-00001.arrow").write_bytes(b"damaged")
    assert "a saved dataset that cannot be loaded (" in error_of(saved)


def test_wrong_rows_are_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": "x", "n": number}) for number in range(400)]
    path = tmp_path / "data" / "a.jsonl"
    path.write_text("\n".join([*lines, '{"n": 1}']))
    name = f"hf:{tmp_path / 'data'}"
    assert f"--source {name}, shard 0: row 400 (from 0) holds no string" in error_of(name)
    assert f"--source {name}: no column 'body'. Columns of strings there: text." in error_of(name, text_column="body")
    path.write_text("\n".join([*lines, '{"text": ']))
    assert f"--source {name}, shard 0: cannot be read on behind row " in error_of(name)
    datasets.Dataset.from_dict({"text": ["one", None]}).save_to_disk(tmp_path / "saved")
    assert "data-00000-of-00001.arrow: row 1 (from 0) holds no string" in error_of(str(tmp_path / "saved"))
