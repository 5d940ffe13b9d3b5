"""A data job that is killed: the same command makes the same bytes, whatever it was doing."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import corpus_writer
import encoding_workers
import text_files
import tokenize_to_mds
import vocabulary
from encoding_workers import EncoderPool, EncodingJob
from job_state import JobState
from portions import Portion
from prep_command import command, contents, write_lines

DATA_PREP = Path(tokenize_to_mds.__file__).parent
OPTIONS = ["--shard-bytes", "3000", "--deduplicate", "--minimum-characters", "30"]
PORTION_BYTES = 5000
KILLED = 77  # exit code of a process that ends itself at a step


@pytest.fixture
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several portions of little text, and a commit behind each that completes a shard."""
    monkeypatch.setattr(text_files, "PORTION_BYTES", PORTION_BYTES)
    monkeypatch.setattr(corpus_writer, "COMMIT_SHARE", 1e9)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer, which loads faster than one can be trained."""
    folder = tmp_path_factory.mktemp("tokenizer")
    vocabulary.save(vocabulary.train(iter(["some text about shards and ranks " * 20]), 280), folder)
    return folder


def job(folder: Path, out: Path, tokenizer: Path | str, *more: str) -> list[str]:
    arguments = command(folder / "lines.jsonl", out, *OPTIONS, *more, tokenizer=str(tokenizer))
    place = arguments.index("--seq-len")
    arguments[place + 1 : place + 2] = ["16", "24"]
    return arguments


def end_at_step(step: int, arguments: list[str]) -> None:
    """Run the command in this process, and end the process just before or after its `step`-th change on disk."""
    done = 0

    def count() -> None:
        nonlocal done
        if done == step:
            os._exit(KILLED)
        done += 1

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*positional: Any, **named: Any) -> Any:
            count()
            result = function(*positional, **named)
            count()
            return result

        return counted

    for name in ("fsync", "rename", "replace", "unlink", "rmdir"):
        setattr(os, name, counting(getattr(os, name)))
    JobState.commit = counting(JobState.commit)  # type: ignore[method-assign]
    os._exit(tokenize_to_mds.main(arguments))


@pytest.mark.slow
@pytest.mark.usefixtures("small_portions")
@pytest.mark.parametrize("overwrite", [False, True])
def test_job_goes_on_from_every_step(tmp_path: Path, tokenizer: Path, overwrite: bool) -> None:
    """A process forked from this one ends at each step in turn; the next one makes what nobody disturbed makes."""
    write_lines(tmp_path / "lines.jsonl", documents=60)
    assert tokenize_to_mds.main(job(tmp_path, tmp_path / "undisturbed", tokenizer)) == 0
    expected = contents(tmp_path / "undisturbed")
    assert len([name for name in expected if name.endswith(".mds")]) > 10
    out = tmp_path / "corpus"
    arguments = job(tmp_path, out, tokenizer, *(["--overwrite"] if overwrite else []))
    fork = multiprocessing.get_context("fork")
    code: int | None = KILLED
    step = 0
    while code == KILLED:
        if overwrite:  # something else is there
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(tmp_path / "undisturbed" / "seq16", out)
        process = fork.Process(target=end_at_step, args=(step, arguments))
        process.start()
        process.join()
        code = process.exitcode
        if not overwrite and code == KILLED and out.exists():
            assert contents(out) == expected, f"step {step}"
        assert tokenize_to_mds.main(arguments) == 0, f"step {step}"
        assert contents(out) == expected, f"step {step}"
        assert not [path for path in tmp_path.glob(".corpus*") if path.name != ".corpus.lock"], f"step {step}"
        if not overwrite:
            shutil.rmtree(out)
        step += 11 if overwrite else 5  # all of them take two minutes
    assert code == 0
    assert step > 60


@pytest.mark.usefixtures("small_portions")
def test_what_is_done_is_not_done_again(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "lines.jsonl", documents=300)
    arguments = job(tmp_path, tmp_path / "corpus", tokenizer)
    assert tokenize_to_mds.main(job(tmp_path, tmp_path / "undisturbed", tokenizer)) == 0
    portions = len(list(text_files.TextFiles(str(tmp_path / "lines.jsonl")).portions()))
    assert portions > 8
    encode = encoding_workers.PortionEncoder.__call__
    calls = 0

    def fail_at_sixth(self: encoding_workers.PortionEncoder, portion: Portion) -> encoding_workers.EncodedPortion:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return encode(self, portion)

    monkeypatch.setattr(encoding_workers.PortionEncoder, "__call__", fail_at_sixth)
    capsys.readouterr()
    assert tokenize_to_mds.main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    calls = 10
    assert tokenize_to_mds.main(arguments) == 0
    assert calls == 10 + portions - 5
    found = re.search(r"going on at (\d+) %: ([\d,]+) documents, [\d,]+ tokens are done", capsys.readouterr().err)
    assert found and 0 < int(found[1]) < 100 and 0 < int(found[2]) < 300
    assert contents(tmp_path / "corpus") == contents(tmp_path / "undisturbed")


def interrupted(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave an unfinished job with some progress behind."""

    def stop(writer: corpus_writer.CorpusWriter) -> None:
        writer.commit()
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(corpus_writer.CorpusWriter, "seal", stop)
        assert tokenize_to_mds.main(arguments) == 130


def test_unfinished_job_of_other_arguments_is_in_the_way(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_lines(tmp_path / "lines.jsonl")
    arguments = job(tmp_path, tmp_path / "corpus", tokenizer)
    interrupted(arguments, monkeypatch)
    others = [*arguments, "--minimum-characters", "31", "--no-deduplicate"]
    capsys.readouterr()
    assert tokenize_to_mds.main(others) == 2
    message = capsys.readouterr().err
    assert "an unfinished job there was begun otherwise" in message and "--overwrite to start anew" in message
    assert "minimum_characters is 30 there, 31 is asked for; deduplicate is True there, False" in message
    assert (tmp_path / ".corpus.partial" / "seq16" / "train" / "shard.00000.mds").exists()
    assert tokenize_to_mds.main([*others, "--overwrite"]) == 0
    assert "going on" not in capsys.readouterr().err
    assert json.loads((tmp_path / "corpus" / "seq16" / "corpus.json").read_text())["minimum_characters"] == 31


@pytest.mark.parametrize("lost", ["seq24/tokenizer/tokenizer.json", "seq16/train/shard.0000*.mds", ""])
def test_lost_files_of_an_unfinished_job_are_made_anew(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    write_lines(tmp_path / "lines.jsonl")
    arguments = job(tmp_path, tmp_path / "corpus", tokenizer)
    interrupted(arguments, monkeypatch)
    partial = tmp_path / ".corpus.partial"
    if lost:
        for path in partial.glob(lost):
            path.unlink()
    else:
        shutil.rmtree(partial)
    capsys.readouterr()
    assert tokenize_to_mds.main(arguments) == 0
    assert "missing from the unfinished job: starting anew" in capsys.readouterr().err
    assert tokenize_to_mds.main(job(tmp_path, tmp_path / "undisturbed", tokenizer)) == 0
    assert contents(tmp_path / "corpus") == contents(tmp_path / "undisturbed")


def test_damaged_state_is_named(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "lines.jsonl")
    (tmp_path / ".corpus.partial.sqlite").write_text("not a database, but long enough to be read as one" * 100)
    arguments = job(tmp_path, tmp_path / "corpus", tokenizer)
    assert tokenize_to_mds.main(arguments) == 2
    assert ".corpus.partial.sqlite: the state of an unfinished job there is damaged" in capsys.readouterr().err
    assert tokenize_to_mds.main([*arguments, "--overwrite"]) == 0


def test_hashes_are_seen_once(tmp_path: Path) -> None:
    state = JobState(tmp_path / "state.sqlite")
    hashes = [number.to_bytes(16, "big") for number in range(1200)]
    assert state.are_new(hashes) == [True] * 1200
    state.commit()
    more = [hashes[7], b"x" * 16, hashes[1199], b"x" * 16, b"y" * 16]
    assert state.are_new(more) == [False, True, False, False, True]
    state.close()  # without a commit: those were never seen
    state = JobState(tmp_path / "state.sqlite")
    assert state.are_new(more) == [False, True, False, False, True]
    state.close()


def encoding_job(tokenizer: Path) -> EncodingJob:
    return EncodingJob(tokenizer / "tokenizer.json", 0, "uint16", 0.2, 0, False)


def kill_own_process() -> Iterator[str]:
    os.kill(os.getpid(), signal.SIGKILL)
    yield "never"


def wait_for_ever() -> Iterator[str]:
    time.sleep(1000)
    yield "never"


def fail_soon() -> Iterator[str]:
    raise OSError("no such disk")
    yield "never"


def test_killed_worker_is_named(tokenizer: Path) -> None:
    portions = [Portion(kill_own_process, {}, 1)]
    with pytest.raises(ChildProcessError, match="--processes 2: a worker process was killed. Usually memory ran out"):
        with EncoderPool(2) as pool:
            list(pool.encode(iter(portions), encoding_job(tokenizer)))
    assert_no_child_is_left()


def test_error_does_not_wait_for_other_workers(tokenizer: Path) -> None:
    portions = [Portion(fail_soon, {}, 1), Portion(wait_for_ever, {}, 1)]
    with pytest.raises(OSError, match="no such disk"):
        with EncoderPool(2) as pool:
            list(pool.encode(iter(portions), encoding_job(tokenizer)))
    assert_no_child_is_left()


def assert_no_child_is_left() -> None:
    """A thread of the pool may still be taking leave of an ended process: it then counts as active for a moment."""
    deadline = time.monotonic() + 20
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


class Killing:
    """Starts the real command and kills it when it is where a test wants it."""

    def __init__(self, folder: Path, arguments: list[str]) -> None:
        # In portions of little text, so that there is something between which to kill.
        small = f"import sys; sys.path.insert(0, {str(DATA_PREP)!r}); import portions; "
        small += f"portions.PORTION_BYTES = {PORTION_BYTES}; import corpus_writer; corpus_writer.COMMIT_SHARE = 1e9; "
        self._command = [sys.executable, "-c", f"{small} import tokenize_to_mds; sys.exit(tokenize_to_mds.main())"]
        self._command += arguments
        self._folder = folder
        self.errors = folder / "errors"

    def run(self, until: Callable[[], bool] | None = None, delay_s: float = 0.0) -> int:
        """Return the exit code; no process of the command is left."""
        with self.errors.open("w") as errors:
            process = subprocess.Popen(
                self._command, cwd=self._folder, stderr=errors, stdout=errors, start_new_session=True
            )
        while until is not None and process.poll() is None and not until():
            time.sleep(0.001)
        family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        if until is not None:
            time.sleep(delay_s)
            if process.poll() is None:
                family += psutil.Process(process.pid).children(recursive=True)
            process.kill()
        process.wait(timeout=120)
        _, left = psutil.wait_procs(family, timeout=20)
        assert not [one for one in left if one.status() != psutil.STATUS_ZOMBIE]
        return process.returncode


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_command_is_killed_twenty_times(tmp_path: Path) -> None:
    write_lines(tmp_path / "lines.jsonl", documents=700)
    out, partial = tmp_path / "corpus", tmp_path / ".corpus.partial"
    undisturbed = Killing(tmp_path, job(tmp_path, tmp_path / "undisturbed", "train:300"))
    assert undisturbed.run() == 0, undisturbed.errors.read_text()
    expected = contents(tmp_path / "undisturbed")
    dice = random.Random(5)
    command_of_all = Killing(tmp_path, job(tmp_path, out, "train:300", "--processes", "2"))
    seen: dict[str, int] = {}
    resumed = 0

    def shards(at_least: int) -> Callable[[], bool]:
        return lambda: len(list(partial.glob("seq16/train/*.mds"))) >= at_least

    delays = {"start": 3.0, "second": 0.02, "end": 0.02}
    while sum(seen.values()) < 20:
        there = len(list(partial.glob("seq16/train/*.mds")))
        moments = {
            "start": lambda: True,
            "training": lambda: "training" in command_of_all.errors.read_text(),
            "shards": shards(there + dice.randrange(1, 6)),
            # A second shard begins when the first is committed, so that there is something to go on from.
            "second": shards(there + 2),
            "end": lambda: any(partial.glob("seq*/*/*.last")) or any(partial.glob("seq*/*/index.json")),
        }
        where = list(moments)[sum(seen.values()) % 5]
        code = command_of_all.run(moments[where], dice.random() * delays.get(where, 0.3))
        resumed += "going on at" in command_of_all.errors.read_text()
        if code == -signal.SIGKILL:
            seen[where] = seen.get(where, 0) + 1
        else:
            assert code == 0, command_of_all.errors.read_text()
        if out.exists():
            assert contents(out) == expected
            shutil.rmtree(out)
    assert command_of_all.run() == 0
    assert contents(out) == expected
    assert resumed >= 5 and len(seen) == 5, (resumed, seen)
