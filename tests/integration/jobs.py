"""Start the real commands as a user does, watch them, and kill them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml

from warm_processes import WarmRanks

ROOT = Path(__file__).resolve().parents[2]
TINY_MODEL = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.1,  # dropout: an exact resume must restore the generators
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
}


def write_config(folder: Path, corpus: Path, **sections: dict[str, Any] | None) -> Path:
    """Write the settings of a run of seconds into `folder`; sections replace or extend the defaults."""
    tree: dict[str, Any] = {
        "run": {"name": "tiny", "folder": str(folder / "run"), "seed": 3},
        "model": {"config": TINY_MODEL},
        "data": {"corpus": str(corpus), "sequence_length": 64},
        "training": {"global_batch_tokens": 512, "max_tokens": 12 * 512, "micro_batch": 2},
        "optimizer": {"learning_rate": 5e-3},
        "dispersion": {
            "coefficient": 0.1,
            "pool_sequences": 4,
            "tokens_per_sequence": 16,
            "warmup_tokens": 2048,
            "gradient_ratio_cap": 1e-3,  # the bound that it sets is state, which a resume must restore
        },
        "validation": {"every_steps": 6, "sequences": 8},
        "checkpoint": {"every_steps": 4, "keep_last": 2},
        "logging": {"every_steps": 1},
    }
    for name, section in sections.items():
        tree[name] = None if section is None else {**(tree.get(name) or {}), **section}
    path = folder / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def environment() -> dict[str, str]:
    """The environment of a job on two cores that may find no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pretrain_command(config: Path, *arguments: str, ranks: int = 2, launcher: str = "deepspeed") -> list[str]:
    """The main job as README gives it."""
    return command("pretrain", config, *arguments, ranks=ranks, launcher=launcher)


def command(name: str, config: Path, *arguments: str, ranks: int = 2, launcher: str = "deepspeed") -> list[str]:
    """A script of launch/ that runs on ranks.

    Args:
        launcher: `deepspeed`, `torchrun`, or `python` for one process without a launcher. `warm`: `Job` forks the
            ranks itself from a process that has imported the packages, in a small part of a launcher's time; for tests
            that start often and ask for what a run computes, whoever launched it.
    """
    script = [str(ROOT / "launch" / f"{name}.py"), "--config", str(config), *arguments]
    binaries = Path(sys.executable).parent
    if launcher == "deepspeed":
        port = ["--master_port", str(free_port())]
        return [str(binaries / "deepspeed"), "--num_gpus", str(ranks), *port, *script]
    if launcher == "warm":
        return ["warm", str(ranks), *script]
    if launcher == "torchrun":
        port = ["--master_port", str(free_port())]
        return [str(binaries / "torchrun"), "--nproc_per_node", str(ranks), *port, *script]
    return [sys.executable, *script]


class Job:
    """A running command with all its children."""

    def __init__(self, command: list[str], log: Path, **variables: str) -> None:
        """Start it; `variables` are added to its environment."""
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # the launcher looks for ninja and python there
        variables = {**environment(), "PATH": path, **variables}
        self.process: subprocess.Popen[bytes] | WarmRanks
        if command[0] == "warm":
            log.touch()
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            self.process = WarmRanks(command[2:], int(command[1]), cwd=ROOT, env=variables, log=log)
        else:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log.open("ab"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, timeout_s: float = 200.0) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"no end within {timeout_s} s:\n{self.output()}") from None

    def kill(self) -> None:
        """SIGKILL to the command and every descendant, children first being stopped so that none notices another's
        end.
        """
        family = [self.process.pid]
        try:
            family += [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            pass
        for number in (signal.SIGSTOP, signal.SIGKILL):
            for pid in family:
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    continue
        self.process.wait(30)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Poll densely until `condition` holds; fail if the job ends first."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.output()}"
            assert time.monotonic() < deadline, f"waited {timeout_s} s:\n{self.output()}"
            time.sleep(0.0005)

    def output(self) -> str:
        return self.log.read_text(errors="replace")[-6000:]


def finish(command: list[str], log: Path, expected: int = 0, **variables: str) -> str:
    """Run a command to its end and return its output."""
    job = Job(command, log, **variables)
    code = job.wait()
    assert code == expected, f"exit code {code}:\n{job.output()}"
    return job.output()


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the project in this interpreter."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=250
    )


def records(run_folder: Path) -> list[dict[str, Any]]:
    """All whole records of metrics.jsonl, in order of writing."""
    path = run_folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


TRAJECTORY = (
    "loss/total",
    "loss/cross_entropy",
    "loss/dispersion",
    "grad_norm",
    "learning_rate",
    "validation/cross_entropy",
)


def trajectory(run_folder: Path) -> dict[int, dict[str, float]]:
    """What must be bit-equal after a resume, by step; of a step written twice, the last record."""
    steps: dict[int, dict[str, float]] = {}
    for record in records(run_folder):
        figures = {key: value for key, value in record.items() if key in TRAJECTORY or key.startswith("dispersion/")}
        steps.setdefault(record["step"], {}).update(figures)
    return steps
