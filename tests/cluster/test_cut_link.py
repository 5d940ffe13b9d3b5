"""A network that is cut in mid-step: a clear end on both sides, and nothing lost when it is back. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from integration.jobs import Job, pretrain_command, records, write_config

HANG_S = 8.0
NAMES = [f"cut{os.getpid()}n{number}" for number in (0, 1)]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces with a cable between them, 10.78.0.1 and 10.78.0.2."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and iproute2")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", "cable", "netns", NAMES[0], "type", "veth", "peer", "name", "cable", "netns", NAMES[1])
        for number, name in enumerate(NAMES, start=1):
            ip("-n", name, "addr", "add", f"10.78.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield NAMES
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False)


def start(hosts: list[str], config: Path, logs: Path, *arguments: str) -> list[Job]:
    """A rank in each namespace, without a launcher."""
    jobs = []
    for rank, host in enumerate(hosts):
        variables = [f"RANK={rank}", "LOCAL_RANK=0", "WORLD_SIZE=2", "MASTER_ADDR=10.78.0.1", "MASTER_PORT=23456"]
        inside = ["ip", "netns", "exec", host, "env", *variables, "GLOO_SOCKET_IFNAME=cable"]
        jobs.append(Job([*inside, *pretrain_command(config, *arguments, launcher="python")], logs / f"log-{rank}"))
    return jobs


@pytest.mark.timeout(600)
def test_cut_link_ends_both_sides_and_the_run_goes_on_when_it_is_back(
    hosts: list[str],
    corpus: Path,
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    config = write_config(
        tmp_path, corpus, run={"doctor": False}, faults={"hang_s": HANG_S}, validation=None,
        training={"max_tokens": 10**6},
    )  # fmt: skip
    jobs = start(hosts, config, tmp_path)
    family: list[psutil.Process] = []
    try:
        jobs[0].wait_for(lambda: max((record["step"] for record in records(run)), default=0) >= 6, 200)
        family = [child for job in jobs for child in psutil.Process(job.process.pid).children(recursive=True)]
        ip("-n", hosts[1], "link", "set", "cable", "down")
        cut = time.monotonic()
        assert [job.wait(HANG_S + 60) for job in jobs] == [86, 86]
        assert time.monotonic() - cut < HANG_S + 40
        _, alive = psutil.wait_procs(family, 5)
        assert not alive
        report = "".join(job.output() for job in jobs)
        assert "hang: no progress for " in report and "ranks 0-1 wait, in: " in report, report

        ip("-n", hosts[1], "link", "set", "cable", "up")
        done = max(record["step"] for record in records(run))
        jobs = start(hosts, config, tmp_path, f"training.max_tokens={512 * (done + 3)}")
        assert [job.wait(200) for job in jobs] == [0, 0]
        assert sorted({record["step"] for record in records(run)}) == list(range(1, done + 4)), "no step is missing"
    finally:
        for job in jobs:
            if job.process.poll() is None:
                job.kill()
