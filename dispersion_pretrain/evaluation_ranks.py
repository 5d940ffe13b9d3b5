"""Several processes that share the examples of an evaluation, each on a device of its own, through accelerate.

lm-eval deals out a task's examples by rank and gathers what came of them; rank 0 alone decides what is done and writes.
A launcher's environment (torchrun, `accelerate launch`, or `start`) says which rank a process is; without one it is
alone.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import torch

_WAIT = datetime.timedelta(weeks=52)  # rank 0 may wait for another evaluation, and ranks for each other's examples


def rank() -> int:
    """This process' rank; that of a job around it, which says nothing of a world, is not meant."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start(num_processes: int, function: Callable[..., int], *arguments: Any) -> int:
    """Call a function in so many processes of this machine and return what it returned on rank 0.

    Raises:
        RuntimeError: a process died; the others were ended.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
        start_method="spawn",
    )
    try:
        return int(elastic_launch(config, function)(*arguments)[0])
    except ChildFailedError as error:
        failed, failure = error.get_first_failure()
        raise RuntimeError(
            f"--processes: process {failed} ended with exit code {failure.exitcode}, which its own message above "
            "explains. All have to live until the end. Repeat the command: tasks that were done are not run again."
        ) from None


def join(device: str | None) -> None:
    """Join the process group. Collective: all ranks."""
    from accelerate import PartialState

    if device is not None and device not in ("cpu", "cuda"):
        raise ValueError(
            f"--device: {device!r} is one device, but there are {count()} processes. cpu or cuda is allowed: each "
            "takes a GPU of its own. Leave it out."
        )
    PartialState(cpu=device == "cpu", timeout=_WAIT)


@contextlib.contextmanager
def one_leads() -> Iterator[Callable[[Any], Any]]:
    """Yield a function that returns rank 0's argument on every rank; every rank calls it once. Collective: all ranks.

    Where rank 0 does not come to call it, the others get None. A rank that fails after it ends its process, since the
    others would wait for it: their launcher ends them.
    """
    told = False

    def tell(content: Any) -> Any:
        nonlocal told
        told = True
        return content if count() == 1 else broadcast_object_list([content])[0]

    from accelerate.utils import broadcast_object_list

    try:
        yield tell
    except Exception as error:
        if told and count() > 1:
            print(f"rank {rank()}: {error}", file=sys.stderr, flush=True)
            raise SystemExit(1) from error
        raise
    finally:
        if not told:
            tell(None)


def union(errors: dict[str, str]) -> dict[str, str]:
    """Return the errors of all ranks; the lowest rank's where several have one. Collective: all ranks."""
    if count() == 1:
        return errors
    from accelerate.utils import gather_object

    merged: dict[str, str] = {}
    for of_rank in reversed(gather_object([errors])):
        merged |= of_rank
    return merged


def check_device(name: str) -> None:
    """Raise ValueError unless there is such a device here."""
    gpus = torch.cuda.device_count()
    if name == "cpu" or (gpus > 0 and name in ("cuda", *(f"cuda:{number}" for number in range(gpus)))):
        return
    allowed = "cpu is" if gpus == 0 else f"cpu, cuda and cuda:0 to cuda:{gpus - 1} are"
    raise ValueError(
        f"--device: {name!r} is no device of this machine, where torch sees {gpus} GPU(s). {allowed} allowed. "
        "Correct it, or leave it out."
    )


def device(wanted: str | None) -> torch.device:
    """Where this process' model lies: as wanted, or of several processes a GPU each."""
    if count() > 1:
        from accelerate import PartialState

        return torch.device(PartialState().device)
    return torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))


def divide_examples(lm: Any) -> None:
    """Have lm-eval's model take its rank's part. Of a model in memory it leaves that to the caller."""
    if count() > 1:
        from accelerate import Accelerator

        lm.accelerator = Accelerator()
        # lm-eval itself takes the rank within the node, and only with several GPUs in sight.
        lm._rank, lm._world_size = rank(), count()
