"""Silent corruption: whether ranks hold the same bits where ZeRO means them to, and which rank does not."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor

from dispersion_pretrain import distributed, metrics
from dispersion_pretrain.assembly import RunParts

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element
_NAMED = 3


def check_replicas(parts: RunParts, writer: metrics.MetricsWriter, step: int, coefficient: float) -> None:
    """Compare what all ranks should hold alike after `step` steps, where that is due, and record the seconds it took.

    Collective: world.

    Raises:
        RuntimeError: a rank differs; on every rank, naming it and what differs.
    """
    every = parts.settings.faults.replica_check_steps
    if every is None or step % every:
        return
    started = time.monotonic()
    numbers = {
        "the number of steps": float(step),
        "the learning rate": parts.learning_rate(step - 1),
        "the coefficient of the dispersion term": coefficient,
        "the offset of the data": float(parts.faults.data_offset_steps),
    }
    refuse_odd_ranks(parts.engine.replicated_tensors(), numbers, step, parts.device)
    writer.write(step, parts.tokens(step), {"faults/replica_check_s": time.monotonic() - started})


def refuse_odd_ranks(
    tensors: Iterable[tuple[str, Tensor]], numbers: dict[str, float], step: int, device: torch.device
) -> None:
    """Raise if named tensors or numbers do not have the same bits on every rank.

    Each tensor's bits are added up as integers, which is exact: one flipped bit always shows. The ranks exchange one
    number; only where that differs, one for each tensor.

    Collective: world; waits for the device.

    Raises:
        RuntimeError: they differ; on every rank. The odd ranks are those outside the majority, if there is one.
    """
    names = list(numbers)
    sums = [torch.tensor(list(numbers.values()), dtype=torch.float64).view(torch.int64).to(device)]
    for name, tensor in tensors:
        names.append(name)
        sums.append(bit_sum(tensor).reshape(1).to(device))
    own = torch.cat(sums)
    weights = distributed.counter_hash(0, torch.arange(len(names), device=device)) | 1
    if len(set(_of_all_ranks((own * weights).sum().reshape(1)))) == 1:
        return
    rows = _of_all_ranks(own)
    common, count = Counter(rows).most_common(1)[0]
    odd = [rank for rank, row in enumerate(rows) if row != common]
    different = [name for place, name in enumerate(names) if len({row[place] for row in rows}) > 1]
    what = ", ".join(different[:_NAMED]) + (f" and {len(different) - _NAMED} more" if len(different) > _NAMED else "")
    if 2 * count > len(rows):
        who = f"{_listed(odd)} differ{'s' * (len(odd) == 1)} from the other {count}"
    else:  # no majority says which is right
        who = f"{_listed(list(range(len(rows))))} differ"
    raise RuntimeError(
        f"step {step}: {who} in {what}. All ranks must hold the same bits: memory, a processor or a link is faulty. "
        "Nothing of this step is saved. Start again without that machine; the newest checkpoint may be from before."
    )


def _listed(ranks: list[int]) -> str:
    *most, last = ranks
    return f"ranks {', '.join(map(str, most))} and {last}" if most else f"rank {last}"


def bit_sum(tensor: Tensor) -> Tensor:
    """Sum of a tensor's elements, their bits read as integers: an int64 scalar on its device, modulo 2^64."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)


def _of_all_ranks(own: Tensor) -> list[tuple[int, ...]]:
    """Each rank's int64 vector, in rank order. Collective: world."""
    table = torch.zeros(distributed.world_size(), own.numel(), dtype=torch.int64, device=own.device)
    table[distributed.rank()] = own
    return [tuple(row) for row in distributed.all_reduce_sum(table.to(distributed.collective_device())).tolist()]
