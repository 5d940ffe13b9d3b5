"""A real Slurm on loopback: munged, slurmctld and several slurmd with folders and ports of their own.

Debian's slurmd may run several times on a machine. Names of nodes resolve, as they do on a cluster: the daemons, and so
the jobs, see a /etc/hosts of their own. Nothing outside the cluster's folder is changed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from cluster.debian_packages import PATH, SLURM, SLURM_PLUGINS, require
from s3_server import die_with_parent

_CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=1,bf_interval=1
EnforcePartLimits=ALL
ReturnToService=0
JobRequeue=1
KillWait=20
SlurmdTimeout=60
MessageTimeout=20
InactiveLimit=0
"""


class SlurmCluster:
    """Nodes n0, n1, ... in one partition `main`. Needs root, for the private /etc/hosts."""

    def __init__(self, num_nodes: int, cores: int = 4) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.nodes = [f"n{number}" for number in range(num_nodes)]
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": PATH}
        self._cores = cores
        self._spaces: dict[str, str] = {}

    def __enter__(self) -> SlurmCluster:
        if os.geteuid() != 0:
            raise RuntimeError("Slurm on loopback: root is needed (a mount of its own /etc/hosts). Run as root.")
        require(SLURM, also=SLURM_PLUGINS)
        try:
            self._write_configuration()
            munge = self.folder / "munge"
            self._start(
                "munged", "munged", "--foreground", "--force", f"--key-file={munge}/key", f"--socket={munge}/socket",
                f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
            )  # fmt: skip
            wait_for(lambda: (munge / "socket").exists(), 20, self.logs)
            self._start("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
            for node in self.nodes:
                self._start(node, "slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])
            wait_for(lambda: len(self._idle()) == len(self.nodes), 60, self.logs)
            # A node is known by the mounts that only its processes see.
            self._spaces = {node: os.readlink(f"/proc/{self.daemons[node].pid}/ns/mnt") for node in self.nodes}
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _write_configuration(self) -> None:
        for name in ("munge", "state", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o700)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(1 + len(self.nodes))
        user = psutil.Process().username()
        text = _CONFIGURATION.format(host=host, port=ports[0], user=user, folder=self.folder)
        for node, port in zip(self.nodes, ports[1:], strict=True):
            text += (
                f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self._cores} "
                "RealMemory=4000 State=UNKNOWN\n"
            )
        text += f"PartitionName=main Nodes={','.join(self.nodes)} Default=YES MaxTime=INFINITE State=UP\n"
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # else the host's hierarchy is probed
        names = "".join(f"127.0.0.1 {node}\n" for node in self.nodes)
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + names)

    def _start(self, name: str, *command: str) -> None:
        inside = f'mount --bind {self.folder}/hosts /etc/hosts && exec "$@"'
        with open(self.folder / f"{name}.log", "ab") as log:
            self.daemons[name] = subprocess.Popen(
                ["unshare", "--mount", "sh", "-c", inside, "sh", *command],
                env={**os.environ, **self.environment},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def call(self, *command: str) -> str:
        """Run a command of Slurm's and return what it prints."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job: JobState, Restarts, NodeList, ExitCode, Reason, ..."""
        text = self.call("scontrol", "--oneliner", "show", "job", job)
        return dict(part.split("=", 1) for part in text.splitlines()[0].split() if "=" in part)

    def states(self) -> dict[str, str]:
        """State of every job that Slurm still knows, by id."""
        lines = self.call("squeue", "--noheader", "--states=all", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def _idle(self) -> set[str]:
        command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False
        )
        return set(done.stdout.split())

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in self._logs())

    def _logs(self) -> list[Path]:
        return sorted(self.folder.glob("*.log"))

    def processes(self, *nodes: str) -> list[psutil.Process]:
        """What runs on the nodes (all, if none is named) besides their daemons: steps, and the ranks in them."""
        daemons = [self.daemons[node] for node in nodes or self.nodes if node in self.daemons]
        spaces = {self._spaces[node] for node in nodes or self.nodes if node in self._spaces}
        found = []
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/mnt") in spaces:
                    found.append(process)
            except OSError:
                continue
        return [process for process in found if process.pid not in {daemon.pid for daemon in daemons}]

    def power_off(self, node: str) -> None:
        """Kill the daemon and everything else on a node, and tell the controller, as a health check would."""
        self.daemons[node].kill()
        _kill(self.processes(node))
        self.daemons[node].wait(10)
        self.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")

    def stop(self) -> None:
        """End all jobs, then the daemons; whatever is left of the jobs is killed by its process id."""
        if "slurmctld" in self.daemons and self.daemons["slurmctld"].poll() is None:
            user = f"--user={psutil.Process().username()}"
            environment = {**os.environ, **self.environment}
            for how in (["--state=PENDING"], ["--full", "--signal=KILL"]):
                subprocess.run(["scancel", user, *how], env=environment, capture_output=True, timeout=20, check=False)
        _kill(self.processes())
        for name in [*reversed(self.nodes), "slurmctld", "munged"]:
            daemon = self.daemons.get(name)
            if daemon is None:
                continue
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_for(condition: Callable[[], bool], timeout_s: float, explain: Callable[[], str] = str) -> None:
    """Look twice a second until `condition` holds; fail with what `explain` says."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s\n{explain()}"
        time.sleep(0.3)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]
    finally:
        for probe in sockets:
            probe.close()


if __name__ == "__main__":  # a cluster to play with: PYTHONPATH=tests python tests/cluster/slurm_cluster.py
    with SlurmCluster(3) as cluster:
        ends = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        signal.sigwait(ends)
