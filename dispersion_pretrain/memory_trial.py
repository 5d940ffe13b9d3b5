"""Whether one micro-batch fits this rank's memory: training as in the run, in a process that ends with the answer.

`python -m dispersion_pretrain.memory_trial` builds the run's engine and makes two optimizer steps and an evaluation
pass on random tokens. Its process group is PyTorch's `fake` one: of the run's size, but every collective returns at
once with tensors of the right sizes. So nobody waits for a rank that runs out of memory, a rank needs no other to
know its answer, and nothing of it is left in the run's engine, generators or allocator.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator

import torch
import torch.distributed as dist

from dispersion_pretrain import distributed
from dispersion_pretrain.assembly import Plan, build_engine
from dispersion_pretrain.config import Settings
from dispersion_pretrain.data import Batch
from dispersion_pretrain.engine import start_distributed
from dispersion_pretrain.metrics import StepTotals
from dispersion_pretrain.objective import StepContext
from dispersion_pretrain.train import train_step

_MICRO_STEPS = 2  # of a step at most: the second finds gradients of the first
_STEPS = 2  # the second finds the optimizer's state
_SHARE_OF_DEVICE = 0.95  # what is left is for buffers of real collectives and for the allocator's gaps


def trial_settings(settings: Settings, micro_batch: int, world_size: int) -> Settings:
    """The run's settings with this micro-batch and a global batch of at most two micro-steps."""
    per_rank = settings.global_batch_sequences // world_size
    micro_steps = min(_MICRO_STEPS, per_rank // micro_batch)
    tokens = world_size * micro_batch * micro_steps * settings.data.sequence_length
    training = settings.training.model_copy(update={"micro_batch": micro_batch, "global_batch_tokens": tokens})
    return settings.model_copy(update={"training": training})


def train_a_little(settings: Settings, device: torch.device) -> None:
    """Two optimizer steps and an evaluation pass of the settings, as training makes them.

    Raises:
        RuntimeError: out of memory, in PyTorch's words; or a step was not finite, so that its update was left out.
    """
    plan = Plan.make(settings, distributed.world_size())
    engine, _ = build_engine(settings, plan, device)
    term, length = settings.dispersion, settings.data.sequence_length
    for step in range(_STEPS):
        context = StepContext(
            step=step,
            targets=settings.global_batch_sequences * (length - 1),
            shares=plan.layout.world_size * plan.layout.accumulation,
            coefficient=term.coefficient if term is not None else 0.0,
            layers=tuple(plan.layers),
        )
        health = train_step(engine, _random_batches(plan, length), context, StepTotals(), device)
        if health.broken:
            raise RuntimeError(
                f"memory trial: {health.broken}, so that no update was made. Finite numbers at the first step are "
                "needed. Give training.micro_batch as a number."
            )
    if settings.validation is not None or settings.condensation is not None:
        engine.train(False)
        with torch.no_grad():
            engine(next(_random_batches(plan, length)).input_ids.to(device))


def _random_batches(plan: Plan, length: int) -> Iterator[Batch]:
    size = plan.layout.micro_batch
    while True:
        tokens = torch.randint(0, plan.size.vocabulary, (size, length))
        yield Batch(tokens, torch.arange(size), torch.ones(size, dtype=torch.bool))


def main() -> None:
    """Read a line of JSON from standard input: the settings and the micro-batch. Ends with 0 if it fits."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    world_size = int(os.environ["WORLD_SIZE"])
    _join_nobody(world_size)
    device = start_distributed()
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(_SHARE_OF_DEVICE, device)
    settings = Settings.model_validate(request["settings"])
    train_a_little(trial_settings(settings, request["micro_batch"], world_size), device)


def _end_with_the_caller() -> None:
    sys.stdin.read()  # until it closes its end, by will or by being killed
    os._exit(1)


def _join_nobody(world_size: int) -> None:
    # As rank 0 on each device: at stage 3 DeepSpeed compares lists with those that rank 0 sends.
    os.environ["RANK"] = "0"
    from torch.testing._internal.distributed.fake_pg import FakeStore  # importing it registers the backend

    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no destructors
