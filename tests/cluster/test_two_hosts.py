"""Two hosts without Slurm: launched by `deepspeed --hostfile` over ssh and by torchrun, and with a link that is cut."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.two_hosts import TwoHosts
from dispersion_pretrain.exit_codes import HANG
from dispersion_pretrain.heartbeat import read_beats
from integration.jobs import (
    ROOT,
    Job,
    environment,
    finish,
    free_port,
    pretrain_command,
    records,
    trajectory,
    write_config,
)

HANG_S = 8.0
BINARIES = Path(sys.executable).parent


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoHosts]:
    monkeypatch.chdir(ROOT)
    with TwoHosts() as found:
        yield found


def hostfile_command(hosts: TwoHosts, config: Path, *arguments: str) -> list[str]:
    """README's command on `left`. ssh hands no environment on: DeepSpeed takes it from a file."""
    variables = ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TORCH_EXTENSIONS_DIR")
    told = {name: value for name, value in environment().items() if name in variables}
    (hosts.folder / "environment").write_text(
        "".join(f"{name}={value}\n" for name, value in {**told, "GLOO_SOCKET_IFNAME": "cable"}.items())
    )
    script = [str(ROOT / "launch" / "pretrain.py"), "--config", str(config), *arguments]
    launcher = [str(BINARIES / "deepspeed"), "--hostfile", str(hosts.folder / "hostfile"), *script]
    return hosts.command("left", "env", f"DS_ENV_FILE={hosts.folder}/environment", *launcher)


def torchrun_jobs(hosts: TwoHosts, config: Path, logs: Path, *arguments: str) -> list[Job]:
    port = str(free_port())
    jobs = []
    for rank, name in enumerate(hosts.names):
        launcher = [str(BINARIES / "torchrun"), "--nnodes", "2", "--node_rank", str(rank), "--nproc_per_node", "1"]
        launcher += ["--master_addr", "left", "--master_port", port]
        script = [str(ROOT / "launch" / "pretrain.py"), "--config", str(config), *arguments]
        inside = hosts.command(name, "env", "GLOO_SOCKET_IFNAME=cable", *launcher, *script)
        jobs.append(Job(inside, logs / f"torchrun-{name}"))
    return jobs


@pytest.mark.timeout(600)
def test_run_on_two_hosts_survives_a_cut_link_and_is_that_of_one_host(
    hosts: TwoHosts, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = write_config(
        tmp_path, corpus, run={"doctor": False}, faults={"hang_s": HANG_S}, validation=None,
        schedule={"kind": "constant"}, training={"max_tokens": 10**7},
    )  # fmt: skip
    jobs = [Job(hostfile_command(hosts, config), tmp_path / "deepspeed")]
    try:
        jobs[0].wait_for(lambda: max((record["step"] for record in records(run)), default=0) >= 6, 200)
        assert all(hosts.processes(name, "pretrain.py") for name in hosts.names), "a rank on each host"
        hosts.plug("down")
        cut = time.monotonic()
        while any(hosts.processes(name, "pretrain.py") for name in hosts.names):
            assert time.monotonic() - cut < HANG_S + 40, "both sides have to end by themselves"
            time.sleep(0.3)
        assert jobs[0].wait(60) != 0
        beats = read_beats(run / "heartbeats")
        assert {rank: beat.exit_code for rank, beat in beats.items()} == {0: HANG, 1: HANG}
        assert len({beat.machine for beat in beats.values()}) == 2
        # The rank that notices first prints it too, but on `right` nobody could read that.
        (report,) = [path.read_text() for path in (run / "hangs").glob("*/report.txt")]
        assert "hang: no progress for " in report and "ranks 0-1 wait, in: " in report, report

        hosts.plug("up")
        done = max(record["step"] for record in records(run))
        again = hostfile_command(hosts, config, f"training.max_tokens={512 * (done + 3)}")
        finish(again, tmp_path / "again")
        jobs = torchrun_jobs(hosts, config, tmp_path, f"training.max_tokens={512 * (done + 6)}")
        assert [job.wait(200) for job in jobs] == [0, 0], jobs[0].output() + jobs[1].output()
        for log in (tmp_path / "again", jobs[0].log):
            assert "resume: data and random state exact" in log.read_text()
    finally:
        for job in jobs:
            if job.process.poll() is None:
                job.kill()

    single = tmp_path / "single"
    one_host = [f"training.max_tokens={512 * (done + 6)}", f"run.folder={single}"]
    finish(pretrain_command(config, *one_host), tmp_path / "one-host")
    expected = trajectory(single)
    assert sorted(expected) == list(range(1, done + 7)) and trajectory(run) == expected
