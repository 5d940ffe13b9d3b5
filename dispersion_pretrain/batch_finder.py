"""`training.micro_batch: auto`: the largest legal micro-batch that fits the memory of every rank, tried out.

Each try is a process a rank (memory_trial.py) that may run out of memory without harm; all ranks then agree. What was
found lies in the run folder, so that a later start on the same machines takes it from there and goes on bit for bit.
"""

from __future__ import annotations

import bisect
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dispersion_pretrain import distributed, heartbeat, memory_trial, provenance
from dispersion_pretrain.assembly import Plan
from dispersion_pretrain.config import Settings
from dispersion_pretrain.engine import start_distributed
from dispersion_pretrain.launcher import Launcher
from dispersion_pretrain.layout import legal_micro_batches
from dispersion_pretrain.run_lock import only_start

FOUND_FILE = "micro_batch.json"  # of a run folder

# How a process says that memory was lacking, in lower case: PyTorch on GPUs and on CPUs, C, Python, cuBLAS.
_OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "memoryerror", "bad_alloc", "alloc_failed",
)  # fmt: skip
_TAIL = 3000  # characters of a trial's output that are looked at, and shown
# What, besides machines and versions, decides how much memory a micro-batch takes.
_SECTIONS = ("model", "dispersion", "noisy_embeddings", "distillation", "zero")


def settle_micro_batch(settings: Settings) -> Settings:
    """Replace training.micro_batch=auto by the largest that fits on every rank; other settings stay as they are.

    Prints what was found, and keeps it in the run folder. To be called before training, while the devices are free: it
    waits for an earlier start of the run to end.

    Collective: world; joins the ranks.

    Raises:
        ValueError: as `Plan.make`.
        RuntimeError: not even the smallest legal micro-batch fits, or a trial failed otherwise; on every rank.
    """
    if settings.training.micro_batch != "auto":
        return settings
    launcher = Launcher()
    device = start_distributed(settings.faults.hang_s)
    world_size = distributed.world_size()
    Plan.make(settings, world_size)  # raises before anything expensive happens
    heartbeat.mark("waiting for an earlier start to end", heartbeat.LONG)
    with only_start(settings.run_folder, launcher.is_gone):
        path, conditions = settings.run_folder / FOUND_FILE, _conditions(settings, device)
        found = distributed.from_main(f"{path}: cannot be read", lambda: _read(path, conditions))
        if found is not None:
            _say(f"{found}, as an earlier start found (remove {path} to try again)")
        else:
            found = _find(settings, legal_micro_batches(settings, world_size))
            content = {"micro_batch": found, "for": conditions}
            distributed.from_main(f"{path}: cannot be written", lambda: _write(path, content))
    training = settings.training.model_copy(update={"micro_batch": found})
    return settings.model_copy(update={"training": training})


def largest_that_fits(legal: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending values for which `fits` holds, if it holds for all smaller ones; None if for none.

    Halves from the largest until one fits, then closes in from both sides.
    """
    fitting, failing = -1, len(legal)  # places
    place = failing - 1
    while failing - fitting > 1:
        if fits(legal[place]):
            fitting = place
        else:
            failing = place
        if fitting >= 0:
            place = (fitting + failing) // 2
        else:
            place = max(0, bisect.bisect_right(legal, legal[failing] // 2) - 1)
    return legal[fitting] if fitting >= 0 else None


def _find(settings: Settings, legal: list[int]) -> int:
    """Try out on all ranks. Collective: world."""

    def fits(micro_batch: int) -> bool:
        heartbeat.mark(f"trying a micro-batch of {micro_batch}", heartbeat.LONG)
        with distributed.failing_together(f"training.micro_batch: auto, and the trial of {micro_batch} failed"):
            own = fits_this_rank(settings, micro_batch)
        lacking = sum(distributed.gather_objects(not own))
        if lacking:
            _say(f"{micro_batch} sequences do not fit on {lacking} of {distributed.world_size()} ranks")
        return not lacking

    found = largest_that_fits(legal, fits)
    if found is None:
        raise RuntimeError(
            f"training.micro_batch: auto, but not even {legal[0]} x {settings.data.sequence_length} tokens fit the "
            "memory of every rank. The smallest legal micro-batch must fit. Raise zero.stage, set "
            "model.activation_checkpointing=true or zero.offload_optimizer=true, or use more ranks; launch/plan.py "
            "says what takes the memory."
        )
    _say(f"{found}, the largest that fits of {', '.join(map(str, legal))}")
    return found


def fits_this_rank(settings: Settings, micro_batch: int) -> bool:
    """Let a process of its own train with this micro-batch on this rank's device. No collective.

    Raises:
        RuntimeError: it failed for another reason than memory; with its last words.
    """
    request = {"settings": settings.model_dump(mode="json"), "micro_batch": micro_batch}
    # The ranks' addresses and ports mean nothing to it, as it communicates with nobody.
    environment = {**os.environ, "WORLD_SIZE": str(distributed.world_size())}
    with tempfile.TemporaryFile() as output:
        trial = subprocess.Popen(
            [sys.executable, "-m", memory_trial.__name__],
            stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, env=environment, text=True,
        )  # fmt: skip
        assert trial.stdin is not None
        with trial, suppress(BrokenPipeError):  # it may have ended
            trial.stdin.write(json.dumps(request) + "\n")
            trial.stdin.flush()
            trial.wait()  # its standard input stays open: it ends when that closes, should this process be killed
        output.seek(0)
        words = output.read().decode(errors="replace")[-_TAIL:]
    if trial.returncode == 0:
        return True
    # The kernel kills what takes too much.
    if trial.returncode == -signal.SIGKILL or any(sign in words.lower() for sign in _OUT_OF_MEMORY):
        return False
    raise RuntimeError(
        f"it ended with {trial.returncode}, for another reason than memory. Give training.micro_batch as a number to "
        f"start without a trial. Its last words:\n{words}"
    )


def _conditions(settings: Settings, device: torch.device) -> dict[str, Any]:
    """All on which the answer depends, as JSON. Collective: world."""
    tree = settings.model_dump(mode="json")
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}, {torch.cuda.get_device_properties(device).total_memory} bytes"
    else:
        machine = f"cpu, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')} bytes"
    return {
        "ranks": distributed.world_size(),
        "machines": sorted(set(distributed.gather_objects(machine))),
        "versions": provenance.versions(),
        "sequence_length": settings.data.sequence_length,
        "global_batch_tokens": settings.training.global_batch_tokens,
        **{section: tree[section] for section in _SECTIONS},
    }


def _read(path: Path, conditions: dict[str, Any]) -> int | None:
    """What an earlier start found under the same conditions; None where none did."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return int(content["micro_batch"]) if content["for"] == conditions else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # a file that a kill cut short is as good as none
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    passing = path.with_suffix(".tmp")
    passing.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    passing.replace(path)


def _say(text: str) -> None:
    if distributed.is_main():
        print(f"micro-batch: {text}", flush=True)
