"""Every kind of damage to a corpus is found and named, and a whole corpus is called good."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import corpus_manifest
import places
import shard_check
import tokenize_to_mds
import verify_mds
from s3_server import FaultyProxy, S3Server

LENGTH = 16
SAMPLE_BYTES = 2 * LENGTH
WORDS = "shard rank token batch layer step cosine angle pool sample text loss page order seed".split()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of several shards, made by the data job."""
    folder = tmp_path_factory.mktemp("verified")
    random = np.random.default_rng(7)
    (folder / "texts").mkdir()
    for number in range(40):
        text = f"Document {number}: " + " ".join(random.choice(WORDS, random.integers(20, 60))) + " – façade ☃\n"
        (folder / "texts" / f"{number:03}.txt").write_text(text, encoding="utf-8")
    command = ["--source", str(folder / "texts"), "--tokenizer", "train:300", "--seq-len", str(LENGTH)]
    command += ["--out", str(folder / "corpus"), "--validation-share", "0.2", "--processes", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYON_NUM_THREADS", "1")  # the command sets these two for its process
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        assert tokenize_to_mds.main([*command, "--shard-bytes", "1500"]) == 0
    assert len(list((folder / "corpus" / "train").glob("*.mds"))) >= 3
    return folder / "corpus"


@pytest.fixture
def corpus(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "corpus"))


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Run the command; return its exit code and what it calls an error."""

    def run(location: Path | str, *more: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        code = verify_mds.main([str(location), *more])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        lines = [*captured.out.splitlines(), *captured.err.splitlines()]
        assert (code == 0) == any(": good (" in line for line in lines)
        return code, [line for line in lines if line.startswith("error: ")]

    return run


Verify = Callable[..., tuple[int, list[str]]]


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def change_manifest(corpus: Path, change: Callable[[dict[str, Any]], object], checksum: bool = True) -> None:
    """Change corpus.json, as a job that writes something wrong would; or as a hand that knows of no checksum."""
    described = read_json(corpus / "corpus.json")
    change(described)
    described = corpus_manifest.with_checksum(described) if checksum else described
    (corpus / "corpus.json").write_text(json.dumps(described, indent=1) + "\n")


def change_index(corpus: Path, split: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change an index, and its hash in corpus.json with it."""
    path = corpus / split / "index.json"
    index = read_json(path)
    change(index)
    path.write_text(json.dumps(index))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    change_manifest(corpus, lambda described: described["splits"][split].update(index_sha256=sha256))


def change_shard(corpus: Path, name: str, change: Callable[[bytearray], object], rehash: bool = False) -> None:
    """Change the bytes of a shard; with `rehash`, its hash in the index, too: the job wrote it so."""
    path = corpus / name
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    if rehash:
        split, file = name.split("/")

        def correct(index: dict[str, Any]) -> None:
            (data,) = [one["raw_data"] for one in index["shards"] if one["raw_data"]["basename"] == file]
            data.update(bytes=len(content), hashes={"sha256": hashlib.sha256(content).hexdigest()})

        change_index(corpus, split, correct)


def flip(place: int) -> Callable[[bytearray], object]:
    return lambda content: content.__setitem__(place, content[place] ^ 0x10)


SHARD = "train/shard.00001.mds"


def test_a_whole_corpus_is_good(whole: Path, verify: Verify, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(whole) == (0, [])
    verify_mds.main([str(whole), "--samples", "2", "--processes", "3"])
    printed = capsys.readouterr().out
    described = read_json(whole / "corpus.json")["splits"]["train"]
    assert f"{described['sequences']:,} sequences, {described['tokens']:,} tokens, " in printed
    assert "warning" not in printed
    assert printed.count("train sample ") == printed.count("validation sample ") == 2
    assert "train sample 0: Document 0: " in printed and "☃" not in printed.splitlines()[0]
    assert str(whole) + ": good (" in printed


def test_the_command_stands_alone(corpus: Path) -> None:
    """The real script from another folder, without the training package and without torch, on a damaged corpus."""
    change_shard(corpus, SHARD, flip(-3))
    script = Path(verify_mds.__file__)
    program = f"import runpy, sys; sys.argv = ['v', {str(corpus)!r}]; sys.path.insert(0, {str(script.parent)!r})\n"
    program += f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
    program += "finally: assert not {'torch', 'streaming', 'dispersion_pretrain'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=corpus.parent, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert f"error: {SHARD}: sha256 is " in done.stdout and "checking: " in done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.__delitem__(slice(-5, None)), " bytes, index.json says "),
        (lambda content: content.extend(b"xx"), " bytes, index.json says "),
        (lambda content: content.clear(), "0 bytes, index.json says "),
        (flip(0), "byte 0: the header counts "),
        (flip(4), "byte 4: the offset of sample 0 is "),
        (flip(4 + 4 * 7), "byte 32: the offset of sample 7 is "),
        (lambda content: content.__setitem__(content.index(b"{"), 0), "the header's columns are no JSON"),
        (
            lambda content: content.__setitem__(content.index(b"uint16") + 4, ord("3")),
            "the header has columns ['tokens']",
        ),
        (flip(-3), "sha256 is "),
    ],
    ids=["truncated", "longer", "empty", "count", "first-offset", "offset", "columns", "type", "token"],
)
def test_a_damaged_shard_is_named(
    corpus: Path, verify: Verify, change: Callable[[bytearray], object], message: str
) -> None:
    change_shard(corpus, SHARD, change)
    code, errors = verify(corpus)
    assert code == 1
    assert errors and all(error.startswith(f"error: {SHARD}: ") for error in errors)
    assert any(message in error for error in errors)


def test_a_missing_shard_is_named(corpus: Path, verify: Verify) -> None:
    (corpus / SHARD).unlink()
    code, (error,) = verify(corpus)
    assert code == 1 and error.startswith(f"error: {SHARD}: is missing")


def test_all_faults_are_listed(corpus: Path, verify: Verify) -> None:
    (corpus / SHARD).unlink()
    change_shard(corpus, "train/shard.00000.mds", flip(-3))
    change_shard(corpus, "validation/shard.00000.mds", flip(4))
    (corpus / "tokenizer" / "tokenizer_config.json").unlink()
    code, errors = verify(corpus)
    assert code == 1
    named = {error.split(": ")[1] for error in errors}
    assert named == {
        SHARD, "train/shard.00000.mds", "validation/shard.00000.mds", "tokenizer/tokenizer_config.json"
    }  # fmt: skip


@pytest.mark.parametrize("first", [0, 5])
def test_an_id_out_of_range_is_found_although_all_hashes_are_right(
    corpus: Path, verify: Verify, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    monkeypatch.setattr(shard_check, "CHUNK_BYTES", 3 * SAMPLE_BYTES)  # several chunks, the last one shorter

    def change(content: bytearray) -> None:
        samples = int.from_bytes(content[:4], "little")
        start = len(content) - samples * SAMPLE_BYTES
        for place in (first * SAMPLE_BYTES + 6, len(content) - start - 2):
            content[start + place : start + place + 2] = (300).to_bytes(2, "little")

    change_shard(corpus, SHARD, change, rehash=True)
    code, (error,) = verify(corpus)
    assert code == 1
    assert error.startswith(f"error: {SHARD}: sample {first}, token 3 (byte ")
    assert error.endswith("): id 300, vocab_size is 300; 2 such ids in this shard")


def test_header_damage_written_with_right_hashes_is_found(corpus: Path, verify: Verify) -> None:
    change_shard(corpus, SHARD, flip(8), rehash=True)
    code, (error,) = verify(corpus)
    assert code == 1 and error.startswith(f"error: {SHARD}: byte 8: the offset of sample 1 is ")


def test_ends_of_documents_must_occur(corpus: Path, verify: Verify) -> None:
    for path in sorted(corpus.glob("train/*.mds")):

        def change(content: bytearray) -> None:
            start = len(content) - int.from_bytes(content[:4], "little") * SAMPLE_BYTES
            ids = np.frombuffer(content, np.uint16, offset=start).copy()
            ids[ids == 0] = 1
            content[start:] = ids.tobytes()

        change_shard(corpus, f"train/{path.name}", change, rehash=True)
    code, (error,) = verify(corpus)
    assert code == 1 and error.startswith("error: train: the end-of-document id 0 occurs 0 times; ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda described: described["splits"]["train"].update(sequences=1),
            "error: corpus.json: splits.train.tokens is",
        ),
        (
            lambda described: described["splits"]["train"].update(sequences=1, tokens=LENGTH),
            "corpus.json says 1",
        ),
        (lambda described: described["splits"]["train"].update(documents=10**6), "1,000,000 documents"),
        (
            lambda described: described["splits"]["train"].update(index_sha256="0" * 64),
            "error: train/index.json: sha256",
        ),
        (lambda described: described["splits"].pop("validation"), "error: corpus.json: splits"),
        (lambda described: described.update(vocab_size=299), "has id 299, vocab_size in corpus.json is 299"),
        (lambda described: described.update(eos_token_id=300), "has no token for eos_token_id 300"),
        (lambda described: described.update(vocab_size=2**16 + 1), "token_dtype uint16 holds 65,536"),
        (lambda described: described.update(sequence_length=8), "has columns ['tokens'] as ['ndarray:uint16:16']"),
        (lambda described: described["tokenizer"].update(sha256="0" * 64), "tokenizer.sha256 is not that of"),
        (lambda described: described.update(token_dtype="int8"), "corpus.json: token_dtype: Input should be"),
    ],
)
def test_a_wrong_corpus_json_is_found(
    corpus: Path, verify: Verify, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_manifest(corpus, change)
    code, errors = verify(corpus)
    assert code == 1 and any(message in error for error in errors), errors
    assert not any("content_sha256" in error for error in errors)


def test_a_change_by_hand_is_found_by_the_checksum(corpus: Path, verify: Verify) -> None:
    change_manifest(corpus, lambda described: described["source"].update(name="other"), checksum=False)
    code, (error,) = verify(corpus)
    assert code == 1 and error.startswith("error: corpus.json: was changed: its content_sha256 ")


def test_a_corpus_json_without_checksum_is_accepted_with_a_warning(
    corpus: Path, verify: Verify, capsys: pytest.CaptureFixture[str]
) -> None:
    change_manifest(corpus, lambda described: described.pop("content_sha256"), checksum=False)
    assert verify(corpus) == (0, [])
    verify_mds.main([str(corpus)])
    assert "warning: corpus.json: has no content_sha256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index["shards"].append(index["shards"][0]), "shard.00000.mds): is listed twice"),
        (lambda index: index["shards"].pop(), "sequences, corpus.json says"),
        (lambda index: index["shards"][1]["raw_data"].update(hashes={}), "shard 1 (shard.00001.mds): has no sha256"),
        (lambda index: index["shards"][1]["raw_data"].update(bytes=9), "9 bytes cannot hold"),
        (lambda index: index["shards"][1]["raw_data"].update(basename="../up.mds"), "shards.1.raw_data.basename"),
        (lambda index: index["shards"][1].update(compression="zstd"), "shards.1.compression"),
        (lambda index: index["shards"][1].update(column_encodings=["int"]), "has columns ['tokens'] as ['int']"),
    ],
)
def test_a_wrong_index_is_found_although_its_hash_is_right(
    corpus: Path, verify: Verify, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    change_index(corpus, "train", change)
    code, errors = verify(corpus)
    assert code == 1 and any("train" in error and message in error for error in errors), errors


def test_a_changed_tokenizer_is_found(corpus: Path, verify: Verify) -> None:
    path = corpus / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    code, (error,) = verify(corpus)
    assert code == 1 and error.startswith("error: tokenizer/tokenizer.json: sha256 is ")
    path.write_text("{}")
    sha256 = hashlib.sha256(b"{}").hexdigest()
    change_manifest(
        corpus,
        lambda described: (
            described["tokenizer"].update(sha256=sha256),
            described["tokenizer"]["files"].update({"tokenizer.json": sha256}),
        ),
    )
    code, (error,) = verify(corpus)
    assert code == 1 and "the tokenizers library cannot load it" in error


def test_stray_files_are_named_and_no_fault(corpus: Path, verify: Verify, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(corpus / SHARD, corpus / "train" / "shard.00009.mds")
    (corpus / "notes.txt").touch()
    assert verify(corpus) == (0, [])
    verify_mds.main([str(corpus)])
    printed = capsys.readouterr().out
    assert "warning: train/shard.00009.mds: is in no index" in printed
    assert "warning: notes.txt: is in no index" in printed
    assert printed.count("warning") == 2


def test_several_corpora_are_checked_one_by_one(
    whole: Path, tmp_path: Path, verify: Verify, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("seq1024", "seq2048"):
        shutil.copytree(whole, tmp_path / name)
    (tmp_path / "other").mkdir()
    assert verify(tmp_path) == (0, [])
    change_shard(tmp_path / "seq1024", SHARD, flip(-2))
    assert verify_mds.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "seq1024: 1 fault (" in printed and "seq2048: good" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/none"], "none: is no folder"),
        (["{tmp}"], "is no corpus (no corpus.json)"),
        (["ftp://here"], "ftp://here: unknown kind of address"),
        (["{tmp}", "--processes", "0"], "--processes 0: nobody would work"),
        (["{tmp}", "--samples", "-1"], "--samples -1: is negative"),
        (["{tmp}", "--sample"], "ambiguous|--help shows|expected one argument"),
        ([], "the following arguments are required: corpus"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    try:
        code: Any = verify_mds.main([argument.replace("{tmp}", str(tmp_path)) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and any(part in line for part in message.split("|"))


def test_a_later_format_is_no_damage(corpus: Path, verify: Verify) -> None:
    change_manifest(corpus, lambda described: described.update(format_version=2))
    code, (error,) = verify(corpus)
    assert code == 2 and "format_version 2 is unknown here" in error


@pytest.fixture(scope="module")
def flipped(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, int]]]:
    """A copy for many flips, and its files with their sizes."""
    copy = Path(shutil.copytree(whole, tmp_path_factory.mktemp("flipped") / "corpus"))
    files = [path for path in sorted(copy.rglob("*")) if path.is_file()]
    return copy, [(path.relative_to(copy).as_posix(), path.stat().st_size) for path in files]


@given(file=st.integers(0, 2**30), place=st.integers(0, 2**30), mask=st.integers(1, 255))
def test_any_flipped_byte_is_found(
    flipped: tuple[Path, list[tuple[str, int]]], file: int, place: int, mask: int
) -> None:
    corpus, files = flipped
    name, size_bytes = files[file % len(files)]
    path = corpus / name
    before = path.read_bytes()
    after = bytearray(before)
    after[place % size_bytes] ^= mask
    path.write_bytes(after)
    try:
        code = verify_mds.main([str(corpus), "--samples", "0"])
    finally:
        path.write_bytes(before)
    if name != "corpus.json":
        assert code == 1
    elif says_the_same(bytes(after), before):
        assert code == 0
    else:
        assert code in (1, 2)


def says_the_same(after: bytes, before: bytes) -> bool:
    """Whether a flip in corpus.json changed white space only, or took the checksum's name away."""
    try:
        found, original = json.loads(after), json.loads(before)
    except ValueError:
        return False
    return bool(found == original or (isinstance(found, dict) and corpus_manifest.CHECKSUM not in found))


@pytest.fixture
def remote(whole: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The whole corpus in a store behind a proxy; no wait between attempts."""
    s3_server.create_bucket("verified")
    s3_server.put_folder("verified", "deep/corpus", whole)
    with FaultyProxy(s3_server.port) as proxy:
        for name, value in {**s3_server.environment, **proxy.environment, "AWS_MAX_ATTEMPTS": "1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(places, "RETRY_WAIT_S", 0.0)
        yield proxy
    for key in s3_server.keys("verified"):
        s3_server.delete("verified", key)


URL = "s3://verified/deep/corpus"


def test_a_remote_corpus_is_checked_without_keeping_it(
    remote: FaultyProxy,
    s3_server: S3Server,
    verify: Verify,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(places.tempfile, "tempdir", str(tmp_path))
    most_files = 0
    check = places.RemotePlace._download

    def download(self: places.RemotePlace, address: str, path: Path) -> None:
        nonlocal most_files
        check(self, address, path)
        files = [name for _, _, names in os.walk(tmp_path) for name in names]  # rglob fails where a folder vanishes
        most_files = max(most_files, sum(name.endswith(".mds") for name in files))

    monkeypatch.setattr(places.RemotePlace, "_download", download)
    assert verify(URL, "--processes", "2") == (0, [])
    assert 1 <= most_files <= 2 and list(tmp_path.iterdir()) == []
    assert verify("s3://verified/deep") == (0, []), "a prefix with a corpus below"

    s3_server.delete("verified", f"deep/corpus/{SHARD}")
    s3_server.corrupt("verified", "deep/corpus/validation/shard.00000.mds")
    s3_server.put("verified", "deep/corpus/train/shard.00009.mds", b"x")
    code, errors = verify(URL)
    assert code == 1 and len(errors) == 2
    assert errors[0] == f"error: {SHARD}: is missing ({URL}/{SHARD}: no such object)"
    assert errors[1].startswith("error: validation/shard.00000.mds: sha256 is ")
    verify_mds.main([URL])
    assert "warning: train/shard.00009.mds: is in no index" in capsys.readouterr().out


def test_a_busy_store_is_asked_again_and_no_corpus_is_said(remote: FaultyProxy, verify: Verify) -> None:
    remote.behave("503", num_requests=2, matching=f"deep/corpus/{SHARD}")
    assert verify(URL) == (0, [])
    remote.behave("503", matching=f"deep/corpus/{SHARD}")
    code, (error,) = verify(URL)
    assert code == 1 and error.startswith(f"error: {SHARD}: cannot be read (cannot be fetched (ClientError: ")
    remote.behave("pass")
    code, (error,) = verify("s3://verified/nothing")
    assert code == 2 and "is no corpus (no corpus.json)" in error
    remote.behave("503", matching="^GET|^HEAD")
    code, (error,) = verify(URL)
    assert code == 2 and "corpus.json: cannot be fetched" in error
