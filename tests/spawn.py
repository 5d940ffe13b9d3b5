"""Run a function on several gloo ranks of this machine and collect what each returned."""

from __future__ import annotations

import datetime
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from warm_processes import warm_process


def _rank_main(
    rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        outcome: tuple[bool, Any] = (True, function(*arguments))
    except BaseException:
        outcome = (False, traceback.format_exc())
    Path(folder, f"result-{rank}.tmp").write_bytes(pickle.dumps(outcome))
    Path(folder, f"result-{rank}.tmp").rename(Path(folder, f"result-{rank}"))
    if outcome[0]:
        dist.barrier()
        dist.destroy_process_group()
    os._exit(0 if outcome[0] else 1)  # a failed rank must not wait in destructors for peers that will never come


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `function(*arguments)` on `world_size` gloo ranks, processes of their own; return the results in rank order.

    `function` must be importable (module level) and its result picklable. The rendezvous is a file, so that no port
    can clash. RANK, LOCAL_RANK, WORLD_SIZE and LOCAL_WORLD_SIZE are set as a launcher would.

    Raises:
        AssertionError: a rank raised (its traceback is the message), died, or the time is over.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            warm_process(_rank_main, rank, world_size, folder, function, arguments) for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s
        while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
            time.sleep(0.02)
            if any(process.exitcode not in (None, 0) for process in processes):
                break
        failures = []
        for rank, process in enumerate(processes):
            if process.is_alive():
                process.join(timeout=1.0)
            if process.is_alive():
                process.kill()
                process.join()
            result = Path(folder, f"result-{rank}")
            if not result.exists():
                failures.append(f"rank {rank}: no result, exit code {process.exitcode}")
            else:
                succeeded, value = pickle.loads(result.read_bytes())
                if not succeeded:
                    failures.append(f"rank {rank}:\n{value}")
        assert not failures, "\n".join(failures)
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes())[1] for rank in range(world_size)]
