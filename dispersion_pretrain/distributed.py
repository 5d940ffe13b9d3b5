"""Ranks, collectives, failing together, and random numbers.

Without a process group everything works as a world of one rank.
"""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: the increment of splitmix64
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def is_initialized() -> bool:
    """Tell whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process in the world; 0 without a process group."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Return the number of ranks in the world; 1 without a process group."""
    return dist.get_world_size() if is_initialized() else 1


def local_rank() -> int:
    """Return the rank of this process on its host: LOCAL_RANK, as the launchers set it, or 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Tell whether this is rank 0, the one that writes shared files."""
    return rank() == 0


def collective_device() -> torch.device:
    """Return where the default group reduces tensors: the current CUDA device, or under gloo the CPU."""
    if is_initialized() and torch.cuda.is_available() and dist.get_backend() != "gloo":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    """Wait for all ranks. Collective: world."""
    if world_size() > 1:
        device = collective_device()
        dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)


def broadcast_object(value: Any, source: int = 0) -> Any:
    """Return the `value` of rank `source` on every rank; it must be picklable. Collective: world."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=source)
    return values[0]


def gather_objects(value: Any) -> list[Any]:
    """Return the picklable values of all ranks, in rank order, on every rank. Collective: world."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """Tell every rank whether `flag` is true on at least one. Collective: world; waits for the device."""
    if world_size() == 1:
        return flag
    count = torch.tensor([int(flag)], dtype=torch.int64, device=collective_device())
    return bool(all_reduce_sum(count).item())


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum `tensor` over the group's ranks, in place, outside autograd, and return it.

    Collective: `group`; None is the whole world, as in torch.distributed. `pool_groups` says None for a pool
    of one rank: a caller with such a pool must skip the call.
    """
    if world_size() > 1:
        with torch.no_grad():
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def raise_together(error: str | None) -> None:
    """Raise on every rank if any rank passes an error, so that nobody is left waiting in a later collective.

    Collective: world. One small reduction when all is well.

    Raises:
        RuntimeError: the same on every rank, naming each rank that failed and its message.
    """
    if not any_rank(error is not None):
        return
    failures = [(number, text) for number, text in enumerate(gather_objects(error)) if text is not None]
    if world_size() == 1:
        raise RuntimeError(failures[0][1])
    ranks = ", ".join(str(number) for number, _ in failures)
    details = "\n".join(f"rank {number}: {text}" for number, text in failures)
    raise RuntimeError(f"rank(s) {ranks} of {world_size()} failed:\n{details}")


@contextmanager
def failing_together(action: str) -> Iterator[None]:
    """Run a block without collectives; an exception on any rank becomes a RuntimeError on all of them.

    Collective: world, at the end of the block. `action` opens the message.

    Raises:
        RuntimeError: as `raise_together`; on a rank that failed, its own exception is the cause.
    """
    cause: Exception | None = None
    try:
        yield
    except Exception as exception:  # the block holds no collective, so no rank waits inside it for this one
        cause = exception
    try:
        raise_together(None if cause is None else f"{action}: {type(cause).__name__}: {cause}")
    except RuntimeError as error:
        raise error from cause


def from_main(action: str, function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only and return its picklable result on every rank.

    Collective: world.

    Raises:
        RuntimeError: it raised on rank 0; the same on every rank, opened by `action`.
    """
    result: T | None = None
    with failing_together(action):
        if is_main():
            result = function()
    return cast(T, broadcast_object(result))


def is_own_error(error: BaseException) -> bool:
    """Whether this package raised it, with a message for its user; for a library's own error the traceback is what
    helps.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "dispersion_pretrain" in Path(trace.tb_frame.f_code.co_filename).parts


def pool_groups(pool_size_in_ranks: int) -> dist.ProcessGroup | None:
    """Split the world into groups of `pool_size_in_ranks` consecutive ranks and return the one of this rank.

    Collective: world; every rank creates all groups in the same order. Groups cost memory: a second call returns the
    same ones.

    Returns:
        None when a pool is one rank (nothing to communicate), the default group when it is the whole world.

    Raises:
        ValueError: the pool does not divide the world.
    """
    world = world_size()
    if pool_size_in_ranks < 1 or world % pool_size_in_ranks != 0:
        legal = ", ".join(str(size) for size in range(1, world + 1) if world % size == 0)
        raise ValueError(
            f"pool size: {pool_size_in_ranks} ranks do not divide a world of {world}. "
            f"Legal sizes in ranks: {legal}. Change the pool or the number of ranks."
        )
    if pool_size_in_ranks == 1:
        return None
    if pool_size_in_ranks == world:
        return dist.group.WORLD
    return _consecutive_group(dist.group.WORLD, pool_size_in_ranks)


@functools.cache
def _consecutive_group(_: dist.ProcessGroup, size: int) -> dist.ProcessGroup | None:
    """The group of `size` consecutive ranks of this world to which this rank belongs."""
    own = None
    for first in range(0, world_size(), size):
        members = list(range(first, first + size))
        group = dist.new_group(members)
        if rank() in members:
            own = group
    return own


@contextmanager
def without_process_group() -> Iterator[None]:
    """Let a block find no process group, as a world of one rank: for a reference on which ranks can have no say.

    No collectives inside. The group is back at the end.
    """
    world = dist.group.WORLD
    dist.group.WORLD = None
    try:
        yield
    finally:
        dist.group.WORLD = world


def _numpy() -> ModuleType | None:
    try:
        import numpy
    except ImportError:
        return None
    return numpy


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices) alike on every rank, so that all build the same weights.

    Follow with `seed_dropout` once the model is built.
    """
    random.seed(seed)
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_dropout(seed: int, step: int = 0) -> None:
    """Give torch's generators (all devices) a stream of this rank's own, so that dropout differs by rank.

    `step` is that from which the stream begins: it differs from those of other beginnings.
    """
    torch.manual_seed(int(counter_hash(seed, rank(), step).item()))


def random_state() -> dict[str, Tensor]:
    """Return the state of this process's generators as CPU tensors, which a weights-only torch.load reads.

    Keys: python, python_gauss, torch_cpu; where they exist numpy, numpy_gauss, torch_cuda (current device).
    """
    version, words, gauss = random.getstate()
    state = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "torch_cpu": torch.get_rng_state(),
    }
    numpy = _numpy()
    if numpy is not None:
        _, keys, position, has_gauss, cached = numpy.random.get_state()
        state["numpy"] = torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64)
        state["numpy_gauss"] = torch.tensor([cached], dtype=torch.float64)
    if torch.cuda.is_available():
        state["torch_cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Put every generator back where `random_state` found it.

    Raises:
        RuntimeError: the state lacks a generator of this process (saved without CUDA, continued with it).
    """
    numpy = _numpy()
    needed = ["python", "python_gauss", "torch_cpu"]
    needed += ["numpy", "numpy_gauss"] if numpy is not None else []
    needed += ["torch_cuda"] if torch.cuda.is_available() else []
    missing = [key for key in needed if key not in state]
    if missing:
        raise RuntimeError(
            f"random state: no entry for {', '.join(missing)}; it was saved on another kind of machine. "
            f"Resume where the same generators exist (saved: {', '.join(sorted(state))})."
        )
    version, *words = state["python"].tolist()
    gauss = state["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    torch.set_rng_state(state["torch_cpu"].cpu())
    if numpy is not None:
        *keys, position, has_gauss = state["numpy"].tolist()
        words_32 = numpy.array(keys, dtype=numpy.uint32)
        numpy.random.set_state(("MT19937", words_32, position, has_gauss, state["numpy_gauss"].item()))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["torch_cuda"].cpu())


def _signed(value: int) -> int:
    """Return the int64 that has the low 64 bits of `value`."""
    return (value + 2**63) % 2**64 - 2**63


def _logical_shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # >> of int64 copies the sign bit: mask it away


def _splitmix64(x: Tensor) -> Tensor:
    """Mix int64 words; products wrap modulo 2^64. Source: Steele, Lea, Flood, OOPSLA 2014, section 4."""
    x = x + _signed(_GOLDEN)
    x = (x ^ _logical_shift_right(x, 30)) * _signed(_MIX_1)
    x = (x ^ _logical_shift_right(x, 27)) * _signed(_MIX_2)
    return x ^ _logical_shift_right(x, 31)


def counter_hash(seed: int, *counters: Tensor | int) -> Tensor:
    """Hash (seed, counters...) to 64 uniform bits: random numbers without a generator, the same everywhere.

    Counters are ints or integer tensors on one device; they broadcast. The result has their joint shape and
    device (the CPU when all are ints), dtype int64, negative values included: shift or mask before use. The
    order of the counters matters: h = mix(seed), then h = mix(h XOR counter) for each, mix being splitmix64.
    """
    devices = [counter.device for counter in counters if isinstance(counter, Tensor)]
    device = devices[0] if devices else torch.device("cpu")
    state = _splitmix64(torch.full((), _signed(seed), dtype=torch.int64, device=device))
    for counter in counters:
        word = counter.to(torch.int64) if isinstance(counter, Tensor) else _signed(counter)
        state = _splitmix64(state ^ word)
    return state
