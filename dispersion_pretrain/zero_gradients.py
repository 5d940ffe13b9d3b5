"""Where DeepSpeed's optimizers hold gradients between the last backward pass of a step and its update.

A part of engine.py, on whose behalf it reads and clears attributes of 0.19.8's optimizers; tests look at every stage.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_BEFORE_THE_FIRST_MICRO_STEP = -1  # DeepSpeed's INITIAL_MICRO_STEP_ID


def square_of_own(optimizer: Any, parameters: Iterable[Tensor], world_size: int) -> Tensor:
    """This rank's part of the square of the global gradient norm, before clipping: float64 scalar on the device.

    Summed over ranks it is the whole; not finite where a gradient is not, or where its norm has no float32. One pass
    over the gradients that this rank holds; with an offloaded optimizer none, as DeepSpeed notes norms on the way.
    No collective, and no waiting for the device.
    """
    if _is_offloaded(optimizer):
        norms = [norm.float().reshape(()) for norm in optimizer.norm_for_param_grads.values()]
        return torch.stack(norms).norm().double().square() if norms else torch.zeros((), dtype=torch.float64)
    if hasattr(optimizer, "grad_partitions_flat_buffer"):  # stage 3
        return _norm([optimizer.grad_partitions_flat_buffer]).square()
    if hasattr(optimizer, "averaged_gradients"):  # stages 1 and 2
        return _norm(part for group in optimizer.averaged_gradients.values() for part in group or ()).square()
    if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # stage 1, bf16 accumulated in float32
        return _norm(optimizer.fp32_groups_gradient_flat_partition).square()
    # Stage 0: every rank has the whole averaged gradient.
    return _norm(gradient for p in parameters if (gradient := p.grad) is not None).square() / world_size


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    return torch.nn.utils.get_total_norm(list(gradients)).double()


def drop(optimizer: Any) -> None:
    """Forget the gradients of the step that ends, as DeepSpeed does after an overflow in float16.

    Gradients that hang at parameters are left to `zero_grad`, which follows. No collective.
    """
    if hasattr(optimizer, "grad_partitions_flat_buffer"):  # stage 3
        optimizer._pre_step()  # counters of micro-steps and buckets start anew
        optimizer.averaged_gradients = {}
        optimizer.grad_partitions_flat_buffer.zero_()  # a parameter without a gradient would keep the old one
    elif hasattr(optimizer, "averaged_gradients"):  # stages 1 and 2
        optimizer.micro_step_id = _BEFORE_THE_FIRST_MICRO_STEP
        optimizer._release_preflattened_grad_buffers()
        for group in optimizer.averaged_gradients:
            optimizer.averaged_gradients[group] = optimizer.all_grad_tensors[group] = None
        optimizer._offload_accumulated_param_ids = set()
    elif hasattr(optimizer, "clear_hp_grads"):  # stage 1, bf16 accumulated in float32
        optimizer.clear_hp_grads()
    if _is_offloaded(optimizer):
        optimizer.reset_cpu_buffers()
        masters = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_partitioned_groups_flat
        for master in masters:
            if master.grad is not None:
                master.grad.zero_()


def _is_offloaded(optimizer: Any) -> bool:
    return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))
