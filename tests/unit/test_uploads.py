"""A corpus that is written to a real S3 server, through faults and kills."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _torchvision_guard  # noqa: F401  (before streaming)

# isort: split
import pytest

import destinations
import tokenize_to_mds
import uploads
import vocabulary
from prep_command import command, contents, write_lines
from s3_server import FaultyProxy, S3Server
from uploads import ObjectStore

DATA_PREP = Path(tokenize_to_mds.__file__).parent
BUCKET = "data-prep"


@pytest.fixture
def server(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    s3_server.create_bucket(BUCKET)
    return s3_server


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary.save(vocabulary.train(iter(["some text about shards and ranks " * 20]), 280), folder)
    return folder


def job(folder: Path, out: Path | str, tokenizer: Path, *more: str) -> list[str]:
    lines = folder / "lines.jsonl"
    if not lines.exists():
        write_lines(lines)
    arguments = command(lines, Path("out"), "--shard-bytes", "3000", *more, tokenizer=str(tokenizer))
    arguments[arguments.index("--out") + 1] = str(out)
    place = arguments.index("--seq-len")
    arguments[place + 1 : place + 2] = ["16", "24"]
    return arguments


def stored(server: S3Server, prefix: str) -> dict[str, bytes]:
    keys = server.keys(BUCKET, f"{prefix}/")
    return {key.removeprefix(f"{prefix}/"): server.get(BUCKET, key) for key in keys}


@pytest.fixture
def expected(tmp_path: Path, tokenizer: Path) -> dict[str, bytes]:
    """What a store must hold: the files of a local corpus."""
    assert tokenize_to_mds.main(job(tmp_path, tmp_path / "local", tokenizer)) == 0
    return contents(tmp_path / "local")


def test_store_holds_what_a_folder_would(
    server: S3Server,
    tmp_path: Path,
    tokenizer: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = job(tmp_path, f"s3://{BUCKET}/whole/", tokenizer)
    with FaultyProxy(server.port) as proxy, monkeypatch.context() as through_proxy:
        for name, value in proxy.environment.items():
            through_proxy.setenv(name, value)
        assert tokenize_to_mds.main(arguments) == 0
        put = [path.removeprefix(f"/{BUCKET}/whole/") for method, path in proxy.requests if method == "PUT"]
    assert stored(server, "whole") == expected
    assert sorted(put) == sorted(expected)  # each once
    assert [Path(name).name for name in put[-2:]] == ["corpus.json", "corpus.json"]
    assert [path.name for path in Path(".tokenize_to_mds").iterdir() if path.is_dir()] == []

    capsys.readouterr()
    assert tokenize_to_mds.main(arguments) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert tokenize_to_mds.main([*arguments, "--deduplicate", "--overwrite"]) == 2
    message = capsys.readouterr().err
    assert "holds a corpus that was made otherwise (deduplicate is False there, True is asked for)" in message
    assert "Give another prefix, or remove the corpus there." in message
    assert tokenize_to_mds.main([*arguments, "--overwrite"]) == 2
    assert "Nothing in a store is replaced" in capsys.readouterr().err
    assert stored(server, "whole") == expected


def test_store_that_fails_ends_the_job_and_the_same_command_goes_on(
    server: S3Server,
    tmp_path: Path,
    tokenizer: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(uploads, "UPLOAD_ATTEMPTS", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    arguments = job(tmp_path, f"s3://{BUCKET}/failing", tokenizer, "--work", str(tmp_path / "work"))
    with FaultyProxy(server.port) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        proxy.behave("503", matching="PUT .*shard.00004")
        assert tokenize_to_mds.main(arguments) == 1
        message = capsys.readouterr().err.splitlines()[-1]
        assert "shard.00004.mds: could not be uploaded to s3://data-prep/failing/seq" in message
        assert "(S3UploadFailedError: " in message and "the same command goes on" in message
        assert not any(name.endswith("corpus.json") for name in stored(server, "failing"))
        proxy.behave("503", matching="PUT .*index.json")
        assert tokenize_to_mds.main(arguments) == 1
        assert "index.json: could not be uploaded" in capsys.readouterr().err
        proxy.behave("reset", matching="PUT .*corpus.json")
        assert tokenize_to_mds.main(arguments) == 1
        proxy.behave("pass")
        assert tokenize_to_mds.main(arguments) == 0
        again = [path for method, path in proxy.requests if method == "PUT" and "shard.00000" in path]
    assert len(again) == 4  # once in each stream, in the first of four runs
    assert stored(server, "failing") == expected
    assert not (tmp_path / "work").exists()


def test_faults_that_pass_are_not_noticed(
    server: S3Server, tmp_path: Path, tokenizer: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = job(tmp_path, f"s3://{BUCKET}/shaky", tokenizer, "--work", str(tmp_path / "work"))
    with FaultyProxy(server.port) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        proxy.behave("reset", num_requests=8, matching="PUT .*shard")
        assert tokenize_to_mds.main(arguments) == 0
    assert stored(server, "shaky") == expected


@pytest.mark.parametrize(
    ("out", "variables", "message"),
    [
        ("s3://no-such-bucket/corpus", {}, "--out s3://no-such-bucket/corpus: cannot be written (ClientError"),
        (f"s3://{BUCKET}/x", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "credentials for it are needed"),
        (f"s3://{BUCKET}/x", {"S3_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot be written (EndpointConnectionError"),
    ],
)
def test_store_that_lets_nobody_in_is_named_before_the_work(
    server: S3Server,
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    out: str,
    variables: dict[str, str],
    message: str,
) -> None:
    for name, value in (variables | {"AWS_MAX_ATTEMPTS": "1"}).items():
        monkeypatch.setenv(name, value)
    assert tokenize_to_mds.main(job(tmp_path, out, tokenizer, "--work", str(tmp_path / "work"))) == 2
    errors = capsys.readouterr().err
    assert message in errors and len(errors.splitlines()) == 1


def test_unknown_answer_about_a_corpus_is_not_taken_for_none(
    server: S3Server,
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with FaultyProxy(server.port) as proxy:
        for name, value in proxy.environment.items():
            monkeypatch.setenv(name, value)
        proxy.behave("503", matching="corpus.json")
        arguments = job(tmp_path, f"s3://{BUCKET}/unknown", tokenizer, "--work", str(tmp_path / "work"))
        assert tokenize_to_mds.main(arguments) == 2
    assert f"s3://{BUCKET}/unknown/seq16/corpus.json: cannot be read" in capsys.readouterr().err


def test_work_folder_of_somebody_else_is_left_alone(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = job(tmp_path, f"s3://{BUCKET}/x", tokenizer, "--work", str(tmp_path))
    assert tokenize_to_mds.main(arguments) == 2
    assert f"--work {tmp_path}: holds something else (lines.jsonl)" in capsys.readouterr().err
    arguments = job(tmp_path, tmp_path / "corpus", tokenizer, "--work", str(tmp_path / "work"))
    assert tokenize_to_mds.main(arguments) == 2
    assert "is for an --out that is a URL" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_upload_goes_on(server: S3Server, tmp_path: Path, tokenizer: Path, expected: dict[str, bytes]) -> None:
    """The real command, killed again and again while it uploads through a slow connection."""
    arguments = job(tmp_path, f"s3://{BUCKET}/killed", tokenizer, "--work", str(tmp_path / "work"))
    dice = random.Random(3)
    kills = 0
    before = 0
    while True:
        with (tmp_path / "errors").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, str(DATA_PREP / "tokenize_to_mds.py"), *arguments], stderr=errors, stdout=errors
            )
        while process.poll() is None and (now := len(server.keys(BUCKET, "killed/"))) <= before:
            time.sleep(0.02)
        if process.poll() is None and kills < 3:
            time.sleep(dice.random() * 0.05)
            os.kill(process.pid, signal.SIGKILL)
        if process.wait(timeout=120) == 0:
            break
        assert process.returncode == -signal.SIGKILL, (tmp_path / "errors").read_text()
        kills += 1
        before = now + 5
    assert kills >= 3
    assert stored(server, "killed") == expected
    assert not (tmp_path / "work").exists()


def test_hub_gets_files_below_the_folder_of_the_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub is out of reach of a test: what streaming's uploader hands to huggingface_hub is looked at."""
    written: dict[str, bytes] = {}

    class Hub:
        def open(self, path: str, mode: str) -> Any:
            assert mode == "wb"

            class File:
                def __enter__(self) -> File:
                    return self

                def __exit__(self, *error: object) -> None: ...

                def write(self, content: bytes) -> None:
                    written[path] = content

            return File()

    monkeypatch.setattr(uploads.HFUploader, "check_dataset_exists", lambda self: setattr(self, "fs", Hub()))
    files = tmp_path / "files"
    (files / "train").mkdir(parents=True)
    (files / "train" / "shard.00000.mds").write_bytes(b"tokens")
    for url in ("hf://datasets/org/name/deep/folder", "hf://datasets/org/name"):
        store = ObjectStore(url, files)
        store.upload(files / "train" / "shard.00000.mds", then_remove=False)
        store.wait()
    assert written == {
        "datasets/org/name/deep/folder/train/shard.00000.mds": b"tokens",
        "datasets/org/name/train/shard.00000.mds": b"tokens",
    }
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["files", "hub"]'
    assert destinations.StoredCorpus("hf://datasets/org/name", tmp_path).files == files
