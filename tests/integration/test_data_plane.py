"""From text to losses through a real object store: the data job writes there, training reads from there.

Whatever the store, a kill or another job does meanwhile, a run ends with the losses of one that read a local folder;
or, where the right bytes are nowhere, with an error that names the shard.
"""

from __future__ import annotations

import contextlib
import os
import pydoc_data.topics
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from integration.jobs import Job, finish, pretrain_command, records, run_script, trajectory, write_config
from s3_server import FaultyProxy, S3Server

BUCKET, PREFIX = "data-plane", "deep/corpus"
URL = f"s3://{BUCKET}/{PREFIX}"
LENGTH = 64
SHARD_BYTES = 8192
STEPS, STEP_TOKENS = 20, 64 * LENGTH
WINDOW_SAMPLES = 100
CACHE_LIMIT_BYTES = 2**16  # two windows with what hangs over at their ends

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500)]


@dataclass
class Plane:
    """The store, the proxy through which jobs see it, and a local copy of the corpus in it."""

    server: S3Server
    proxy: FaultyProxy
    copy: Path


@pytest.fixture(scope="module")
def plane(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plane]:
    """A corpus that the real command wrote to the store, and once more to a folder."""
    folder = tmp_path_factory.mktemp("plane")
    texts = folder / "texts"
    texts.mkdir()
    for name, text in sorted(pydoc_data.topics.topics.items())[:60]:
        (texts / f"{name}.txt").write_text(text)
    s3_server.create_bucket(BUCKET)
    with FaultyProxy(s3_server.port) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3_server.environment, **proxy.environment}.items():
            patch.setenv(name, value)
        command = ["data_prep/tokenize_to_mds.py", "--source", str(texts), "--tokenizer", "train:512"]
        command += ["--seq-len", str(LENGTH), "--validation-share", "0.1", "--shard-bytes", str(SHARD_BYTES)]
        for out in ([str(folder / "copy")], [URL, "--work", str(folder / "work")]):
            done = run_script(*command, "--out", *out)
            assert done.returncode == 0, done.stderr + done.stdout
        yield Plane(s3_server, proxy, folder / "copy")


@pytest.fixture(autouse=True)
def passing(plane: Plane) -> Iterator[None]:
    """Each test begins and ends with a store that works and holds the corpus as it was written."""
    plane.proxy.behave("pass")
    plane.proxy.requests.clear()
    plane.proxy.num_faults = 0
    yield
    plane.proxy.behave("pass")
    for path in plane.copy.rglob("*.mds"):
        key = f"{PREFIX}/{path.relative_to(plane.copy)}"
        if plane.server.get(BUCKET, key) != path.read_bytes():
            plane.server.put(BUCKET, key, path.read_bytes())


def config(folder: Path, corpus: str | Path, mirrors: tuple[Path, ...] = (), **data: Any) -> Path:
    """Settings of a run that goes through several windows of the shuffle."""
    source = {"path": str(corpus), "mirrors": [str(mirror) for mirror in mirrors]}
    return write_config(
        folder,
        Path("unused"),
        data={"corpus": None, "corpora": [source], "shuffle_window_tokens": WINDOW_SAMPLES * LENGTH, **data},
        training={"global_batch_tokens": STEP_TOKENS, "max_tokens": STEPS * STEP_TOKENS, "micro_batch": 8},
        dispersion={"warmup_tokens": 4 * STEP_TOKENS},
    )


def command(settings: Path) -> list[str]:
    return pretrain_command(settings, launcher="warm")


def shard_bytes_in(cache: Path) -> int:
    """Size of the whole shards in a cache, while others make and remove some."""
    total = 0
    for folder, _, names in os.walk(cache):
        for path in (os.path.join(folder, name) for name in names if name.endswith(".mds") and ".part" not in folder):
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(path).st_size
    return total


def downloads_in(cache: Path) -> list[str]:
    """Folders of downloads that are not done."""
    return [name for _, folders, _ in os.walk(cache) for name in folders if name.endswith(".part")]


def shared_memory_of(pid: int) -> set[Path]:
    """Files in /dev/shm that a process and its children have mapped; other jobs of the machine have theirs."""
    root = psutil.Process(pid)
    maps = [Path(f"/proc/{one.pid}/maps").read_text() for one in [root, *root.children(recursive=True)]]
    return {Path(found) for text in maps for found in re.findall(r"(/dev/shm/\S+)$", text, re.MULTILINE)}


def shards_fetched(proxy: FaultyProxy) -> set[str]:
    return {path for method, path in proxy.requests if method == "GET" and path.endswith(".mds")}


@pytest.fixture(scope="module")
def undisturbed(plane: Plane, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """What a run shows that reads the local copy in place."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(command(config(folder, plane.copy)), folder / "log")
    steps = trajectory(folder / "run")
    assert sorted(steps) == list(range(STEPS + 1))
    return steps


def test_the_command_writes_the_same_corpus_to_a_store(plane: Plane) -> None:
    written = {path.relative_to(plane.copy).as_posix(): path for path in plane.copy.rglob("*") if path.is_file()}
    assert plane.server.keys(BUCKET) == sorted(f"{PREFIX}/{name}" for name in written)
    assert len([name for name in written if name.startswith("train/shard")]) >= 12
    for name, path in written.items():
        assert plane.server.get(BUCKET, f"{PREFIX}/{name}") == path.read_bytes()
    done = run_script("data_prep/verify_mds.py", URL)
    assert done.returncode == 0 and f"{URL}: good" in done.stdout, done.stdout + done.stderr


def test_two_runs_share_a_cold_bounded_cache_before_a_store_that_is_busy_for_a_while(
    plane: Plane, undisturbed: dict[int, dict[str, float]], tmp_path: Path
) -> None:
    cache, limit_bytes = tmp_path / "cache", 2 * CACHE_LIMIT_BYTES  # each run has windows of its own
    names, jobs = ("one", "other"), []
    for name in names:
        settings = config(tmp_path / name, URL, cache=str(cache), cache_limit_gib=limit_bytes / 2**30)
        jobs.append(Job(command(settings), tmp_path / f"{name}.log"))
    jobs[0].wait_for(lambda: any(record["step"] >= 1 for name in names for record in records(tmp_path / name / "run")))
    plane.proxy.behave("503", num_requests=12, matching="shard")
    largest_bytes = 0
    while any(job.process.poll() is None for job in jobs):
        largest_bytes = max(largest_bytes, shard_bytes_in(cache))
        time.sleep(0.01)
    for job in jobs:
        assert job.wait() == 0, job.output()
    assert plane.proxy.num_faults == 12, "the runs had need of the store while it was busy"
    assert all(trajectory(tmp_path / name / "run") == undisturbed for name in names)
    allowed_bytes = limit_bytes + 4 * SHARD_BYTES  # one shard over for each process
    assert 0 < largest_bytes <= allowed_bytes
    assert len(shards_fetched(plane.proxy)) * SHARD_BYTES > allowed_bytes, "a cache without a bound would show"


def test_an_object_damaged_in_the_store_is_taken_from_a_mirror_then_from_the_cache(
    plane: Plane, undisturbed: dict[int, dict[str, float]], tmp_path: Path
) -> None:
    damaged = sorted(key for key in plane.server.keys(BUCKET, f"{PREFIX}/train/") if key.endswith(".mds"))
    for key in damaged:  # every one: whatever the order, the run meets it first
        plane.server.corrupt(BUCKET, key)
    cache = tmp_path / "cache"
    mirrored = config(tmp_path / "mirrored", URL, mirrors=(plane.copy,), cache=str(cache))
    output = finish(command(mirrored), tmp_path / "log")
    assert "/train/shard.00" in output and "damaged, first at byte" in output
    assert trajectory(tmp_path / "mirrored" / "run") == undisturbed

    plane.proxy.requests.clear()
    finish(command(config(tmp_path / "cached", URL, cache=str(cache))), tmp_path / "log2")
    assert trajectory(tmp_path / "cached" / "run") == undisturbed
    assert shards_fetched(plane.proxy) == set()


def test_an_object_damaged_everywhere_ends_the_run_with_its_name(plane: Plane, tmp_path: Path) -> None:
    for key in plane.server.keys(BUCKET, f"{PREFIX}/train/"):
        if key.endswith("shard.00003.mds"):
            plane.server.corrupt(BUCKET, key)
    settings = config(tmp_path, URL, cache=str(tmp_path / "cache"), shuffle="none")
    output = finish(command(settings), tmp_path / "log", expected=1)
    assert "/train/shard.00003.mds: is damaged" in output and "Copy it again" in output
    assert max(record["step"] for record in records(tmp_path / "run")) < STEPS
    done = run_script("data_prep/verify_mds.py", URL)
    assert done.returncode == 1 and "error: train/shard.00003.mds: sha256 is " in done.stdout


def test_a_run_killed_while_it_fetches_goes_on_and_leaves_nothing_behind(
    plane: Plane, undisturbed: dict[int, dict[str, float]], tmp_path: Path
) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    settings = config(tmp_path, URL, cache=str(cache), cache_limit_gib=CACHE_LIMIT_BYTES / 2**30)
    job = Job(command(settings), tmp_path / "log")
    job.wait_for(lambda: any(record["step"] >= 1 for record in records(run)))
    plane.proxy.behave("slow", matching=r"shard.*mds", bytes_per_s=100)
    job.wait_for(lambda: plane.proxy.num_faults > 0 and bool(downloads_in(cache)))
    shared = shared_memory_of(job.process.pid)
    job.kill()
    assert downloads_in(cache), "it was fetching"
    plane.proxy.behave("pass")
    finish(command(settings), tmp_path / "log")
    assert trajectory(run) == undisturbed
    assert not downloads_in(cache)
    assert [path for path in shared if path.exists()] == []
