"""Sources of documents that are files: what they hold, how they are cut, and how they go on from a position."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import arrow_columns
import file_cuts
import portions
import python_docs
import sources
import text_files
import tokenize_to_mds
import vocabulary
from job_source import SourcePair
from portions import Portion, Position, Source
from prep_command import command, contents
from prep_errors import InputError

DATA_PREP = Path(sources.__file__).parent
DOCUMENTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), max_size=40)


@contextmanager
def small_portions(size_bytes: int) -> Iterator[None]:
    """Cut as if PORTION_BYTES were so small: a few documents then show what gigabytes would."""
    with (
        mock.patch.object(text_files, "PORTION_BYTES", size_bytes),
        mock.patch.object(file_cuts, "PORTION_BYTES", size_bytes),
        mock.patch.object(file_cuts, "_GROUP_BYTES", 8 * size_bytes),
        mock.patch.object(arrow_columns, "PORTION_BYTES", size_bytes),
        mock.patch.object(python_docs, "PORTION_BYTES", size_bytes),
    ):
        yield


def read(portion: Portion) -> list[str]:
    """Read a portion as a worker does: what was sent to it."""
    return list(pickle.loads(pickle.dumps(portion.read))())


def documents_of(source: Source) -> list[str]:
    return [text for portion in source.portions() for text in read(portion)]


def told(given: Iterator[Portion]) -> list[tuple[list[str], Position, int, Any]]:
    return [(read(portion), portion.after, portion.units, portion.split) for portion in given]


def assert_goes_on_from_everywhere(source: Source, expected: list[str]) -> int:
    """Compare the documents, and what comes behind each position with the tail; return the number of portions."""
    whole = told(source.portions())
    assert [text for documents, *_ in whole for text in documents] == [text for text in expected if text.strip()]
    if source.units is not None:
        assert sum(units for _, _, units, _ in whole) == source.units
    for number, (_, after, _, _) in enumerate(whole):
        assert told(source.portions(json.loads(json.dumps(after)))) == whole[number + 1 :]
    return len(whole)


def json_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"n": 1, key: text}, ensure_ascii=len(text) % 2 == 0) + "\n" for text in texts).encode()


def compress(content: bytes, path: Path) -> None:
    """Write two members, as parallel compressors do."""
    half = len(content) // 2
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    else:
        zstd = pa.Codec("zstd")
        path.write_bytes(zstd.compress(content[:half], asbytes=True) + zstd.compress(content[half:], asbytes=True))


def write(path: Path, texts: list[str], row_group_size: int = 5) -> None:
    if path.suffix == ".parquet":
        table = pa.table({"n": range(len(texts)), "text": pa.array(texts, pa.string())})
        pq.write_table(table, path, row_group_size=row_group_size)
    elif path.suffix == ".jsonl":
        path.write_bytes(json_lines(texts))
    else:
        compress(json_lines(texts), path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.parquet"])
@given(texts=DOCUMENTS, size_bytes=st.integers(40, 400), row_group_size=st.integers(1, 40))
@settings(max_examples=40)
def test_any_file_goes_on_from_every_position(
    tmp_path_factory: pytest.TempPathFactory, name: str, texts: list[str], size_bytes: int, row_group_size: int
) -> None:
    path = tmp_path_factory.mktemp("any", numbered=True) / name
    write(path, texts, row_group_size)
    with small_portions(size_bytes):
        source = sources.open_source(str(path))
        if texts or name != "a.parquet":  # a Parquet file without rows has no portion that could count its bytes
            assert_goes_on_from_everywhere(source, texts)
        else:
            assert not list(source.portions())


@given(files=st.lists(st.tuples(st.sampled_from(["txt", "jsonl", "jsonl.zst", "parquet"]), DOCUMENTS), max_size=7))
@settings(max_examples=30)
def test_any_folder_goes_on_from_every_position(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, list[str]]]
) -> None:
    folder = tmp_path_factory.mktemp("any", numbered=True)
    (folder / "deep").mkdir()
    expected = []
    for number, (kind, texts) in enumerate(files):
        path = folder / "deep" / f"{number}.{kind}"
        if kind == "txt":
            texts = [" ".join(texts).replace("\r", "\n")]
            path.write_text(texts[0], encoding="utf-8", newline="")
        else:
            texts = texts or ["one"]
            write(path, texts)
        expected += texts
    (folder / "last.md").write_text("# last")
    with small_portions(150):
        source = sources.open_source(str(folder))
        assert_goes_on_from_everywhere(source, [*expected, "# last"])
        both = SourcePair(source, sources.open_source(str(folder / "*.md")))  # validation comes first
        assert_goes_on_from_everywhere(both, ["# last", *expected, "# last"])


def test_small_files_share_portions_and_large_ones_are_divided(tmp_path: Path) -> None:
    texts = [f"{number} " + "words of a text " * 2000 for number in range(200)]  # 6.4 MB
    for name in ("b.jsonl", "c.jsonl.gz", "d.jsonl.zst"):
        write(tmp_path / name, texts)
    write(tmp_path / "e.parquet", texts, row_group_size=200)
    write(tmp_path / "f.parquet", texts, row_group_size=10)
    for number in range(2500):
        (tmp_path / f"a{number:04}.txt").write_text(f"tiny {number}")
    source = sources.open_source(str(tmp_path))
    small = [f"tiny {number}" for number in range(2500)]
    assert assert_goes_on_from_everywhere(source, small + texts * 5) == 2 + 7 + 7 + 7 + 1 + 5
    for portion in source.portions():
        assert sum(len(text) for text in read(portion)) < 8 * portions.PORTION_BYTES
        assert len(pickle.dumps(portion.read)) < 1.1 * portions.PORTION_BYTES


def test_rows_of_a_large_row_group_are_sent_not_read_again(tmp_path: Path) -> None:
    texts = [f"{number} " + "words of a text " * 2000 for number in range(400)]
    write(tmp_path / "a.parquet", texts, row_group_size=400)
    assert assert_goes_on_from_everywhere(sources.open_source(str(tmp_path / "a.parquet")), texts) == 13


def test_python_docs_go_on_from_every_position() -> None:
    source = sources.open_source("python-docs")
    whole = list(source.portions())
    assert len(whole) > 5 and sum(portion.units for portion in whole) == source.units
    for number in (0, len(whole) // 2, len(whole) - 1):
        tail = list(source.portions(json.loads(json.dumps(whole[number].after))))
        assert [(portion.after, portion.units) for portion in tail] == [
            (portion.after, portion.units) for portion in whole[number + 1 :]
        ]
    (last,) = source.portions(whole[-2].after)
    assert read(last) == read(whole[-1])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt"])
def test_one_document_may_have_100_megabytes(tmp_path: Path, name: str) -> None:
    large = "0123456789" * 10**7
    if name == "a.txt":
        (tmp_path / name).write_text(large)
        expected = [large]
    else:
        expected = ["before", large, "behind"]
        write(tmp_path / name, expected)
    assert documents_of(sources.open_source(str(tmp_path / name))) == expected


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_a_column_of_any_kind_of_string_may_be_chosen(tmp_path: Path, kind: pa.DataType) -> None:
    pq.write_table(pa.table({"text": [1, 2], "body": pa.array(["one", "two"], kind)}), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(json_lines(["three"], key="body"))
    source = sources.open_source(str(tmp_path), text_column="body")
    assert documents_of(source) == ["one", "two", "three"]
    assert source.identity()["text_column"] == "body"


def test_json_lines_and_patterns_are_sources(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"text {number}", "other": 1}) for number in range(3)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "a.md").write_text("# heading")
    (tmp_path / "c.bin").write_text("not text")
    expected = ["# heading", "text 0", "text 1", "text 2"]
    source = sources.open_source(str(tmp_path))
    assert documents_of(source) == expected == documents_of(source)
    assert documents_of(sources.open_source(str(tmp_path / "*.jsonl"))) == expected[1:]


def test_python_docs_are_documentation_in_a_fixed_order() -> None:
    source = sources.open_source("python-docs")
    documents = documents_of(source)
    first = next(sources.open_source("python-docs").portions())
    assert read(first) == documents[: len(read(first))]
    module = next(text for text in documents if text.startswith("tempfile\n========\n\nTemporary files."))
    assert "\n\nclass tempfile.TemporaryDirectory\n\nCreate and return a temporary directory." in module
    assert "\n\ntempfile.mkstemp(suffix=None, prefix=None, dir=None, text=False)\n\nUser-callable function" in module
    assert 2_000_000 < sum(len(text.encode()) for text in documents) < 5_000_000
    assert not [text for text in documents if text.startswith(("test.", "pip.", "idlelib.idle_test"))]
    assert all(text.strip() for text in documents)


def error_of(path: Path | str, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        documents_of(sources.open_source(str(path), **options))
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"text": "good"}\n{"text": 5}\n', r":2: no string under the key 'text' \(keys there: text\)"),
        (b'{"text": "good"}\n\n{"body": "x", "id": 1}\n', r":3: no string under the key 'text' \(keys there: body, id"),
        (b'{"text": null}\n', ":1: no string under the key 'text'"),
        (b'["text"]\n', r":1: no string under the key 'text'\. Each"),
        (b'\n{"text": \n', ":2: not JSON"),
        (b'{"text": "cut o', ":1: not JSON"),
        (b'{"text": 1' + b"0" * 5000 + b"}", ":1: not JSON"),
        (b"[" * 100_000, ":1: not JSON"),
        (b'{"text": "half \\ud800"}\n', ":1: half a surrogate pair"),
        (b'{"text": "caf\xe9"}\n', ":1: not UTF-8"),
        (b'{"text": "half \xed\xa0\x80"}\n', ":1: not UTF-8"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_wrong_line_is_named(tmp_path: Path, name: str, lines: bytes, message: str) -> None:
    """The same line again behind several portions: its number is right there, too."""
    good = json_lines(["x" * 900] * 3000)
    for before, first in ((b"", 0), (good, 3000)):
        if name == "a.jsonl":
            (tmp_path / name).write_bytes(before + lines)
        else:
            compress(before + lines, tmp_path / name)
        expected = re.sub(r"^:(\d)", lambda number: f":{int(number[1]) + first}", message)  # noqa: B023
        assert re.search(re.escape(str(tmp_path / name)) + expected, error_of(tmp_path / name))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array(["a", None]), r"a\.parquet: row 1 \(from 0\) holds no string"),
        (pa.array([1, 2]), r"column 'text' holds int64\. .*: other\. Name one with --text-column"),
        (pa.array([b"x", b"x"]), "column 'text' holds binary"),
        (pa.array([["x"], []]), "column 'text' holds list"),
    ],
)
def test_wrong_column_is_named(tmp_path: Path, values: pa.Array, message: str) -> None:
    pq.write_table(pa.table({"text": values, "other": ["a", "b"]}), tmp_path / "a.parquet")
    assert re.search(message, error_of(tmp_path / "a.parquet"))
    assert "no column 'body'. Columns of strings there: " in error_of(tmp_path / "a.parquet", text_column="body")


def test_row_that_is_not_unicode_is_named(tmp_path: Path) -> None:
    bytes_of = pa.array([b"x" * 900] * 3000 + [b"caf\xe9"], pa.large_binary())
    strings = pa.Array.from_buffers(pa.large_string(), len(bytes_of), bytes_of.buffers())
    for row_group_size in (100, 5000):
        pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet", row_group_size=row_group_size)
        assert "a.parquet: row 3000 (from 0) is not UTF-8" in error_of(tmp_path / "a.parquet")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    texts = [os.urandom(500).hex() for _ in range(3000)]
    path = tmp_path / name
    write(path, texts, row_group_size=300)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:-1], content[:3], b"", b"no such format" * 100):
        path.write_bytes(damaged)
        message = error_of(path)
        assert message.startswith(f"{path}: cannot be "), damaged[:20]
    if name.endswith(".gz"):  # the others carry no checksum unless their writer asked for one
        path.write_bytes(content[:-2000] + bytes(1000) + content[-1000:])
        assert error_of(path).startswith(f"{path}: cannot be decompressed behind byte ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/neverland/*.txt", "--source /neverland/*.txt: no text file there"),
        ("/neverland/texts", "--source /neverland/texts: neither a known source nor an existing path"),
        ("neverland.jsonl", "--source neverland.jsonl: neither a known source nor an existing path"),
        ("hf:a:b:c:d", "--source hf:a:b:c:d: not understood"),
        ("hf:", "--source hf:: not understood"),
    ],
)
def test_name_of_nothing_is_refused(name: str, message: str) -> None:
    assert error_of(name).startswith(message)


def test_option_is_named_in_errors(tmp_path: Path) -> None:
    for name in ("/neverland/x", str(tmp_path), "hf:neverland"):
        assert error_of(name, option="--validation-source").startswith(f"--validation-source {name}: ")


def test_kinds_of_files_that_are_not_read_are_refused(tmp_path: Path) -> None:
    for name, content in (("a.docx", b"x"), ("b.txt", b"caf\xe9")):
        (tmp_path / name).write_bytes(content)
    assert "a.docx: unknown kind of file" in error_of(tmp_path / "a.docx")
    assert "b.txt: not UTF-8 (unexpected end of data at byte 3)" in error_of(tmp_path)


def test_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ["text"] * 100)
    source = sources.open_source(str(tmp_path))
    os.truncate(tmp_path / "a.jsonl", 50)
    with pytest.raises(InputError, match=r"a\.jsonl: became shorter"):
        documents_of(source)


def test_identity_tells_changed_files(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "a.jsonl", ["one"])
    write(folder / "b.jsonl", ["two"])
    identity = sources.open_source(str(folder)).identity()
    assert json.loads(json.dumps(identity)) == identity == sources.open_source(str(folder)).identity()
    os.rename(folder / "a.jsonl", folder / "c.jsonl")  # same number, same bytes, another order
    renamed = sources.open_source(str(folder)).identity()
    assert {key for key in identity if identity[key] != renamed[key]} == {"listing"}
    other = sources.open_source(str(tmp_path))
    assert other.identity()["location"] != identity["location"] and other.identity()["files"] == 2


def test_same_documents_in_any_form_make_the_same_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")  # the command sets these for its process
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    texts = [f"{number} " + "shards and ranks " * (number % 50) for number in range(900)]
    vocabulary.save(vocabulary.train(iter(texts), 280), tmp_path / "tokenizer")
    made = []
    for name in ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.parquet", "hf"):
        folder = tmp_path / f"in {name}"
        folder.mkdir()
        write(folder / (name if name != "hf" else "train.parquet"), texts)
        source = f"hf:{folder}" if name == "hf" else str(folder / name)
        out = tmp_path / f"out {name}"
        assert tokenize_to_mds.main(command(source, out, tokenizer=str(tmp_path / "tokenizer"))) == 0
        made.append({file: content for file, content in contents(out).items() if file != "corpus.json"})
    assert any(file.endswith(".mds") for file in made[0])
    assert all(corpus == made[0] for corpus in made)


def test_workers_import_little(tmp_path: Path) -> None:
    """A process for each portion must start at once: without torch, transformers and datasets."""
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        write(tmp_path / name, [f"text of {name}"])
    given = [dataclasses.astuple(portion)[0] for portion in sources.open_source(str(tmp_path)).portions()]
    worker = (
        "import pickle, sys\n"
        "print([text for read in pickle.load(sys.stdin.buffer) for text in read()])\n"
        "import encoding\n"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", worker],
        input=pickle.dumps(given),
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(DATA_PREP)},
        check=True,
    )
    texts, heavy = done.stdout.decode().splitlines()
    assert texts == "['text of a.jsonl', 'text of b.jsonl.gz', 'text of c.parquet']"
    assert heavy == "set()"
