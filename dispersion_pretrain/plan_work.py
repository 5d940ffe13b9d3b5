"""What a micro-step computes, counted operation by operation: FLOPs of matrix products, bytes that all others move.

A step of a narrow model spends more of its time on what memory bounds, norms and activation functions, than that of a
wide one, so one utilisation does not hold for both. Two rates do (Williams et al. 2009, the roofline model).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_NO_TRAFFIC = {  # or next to none: no kernel, or one that touches a number a row
    _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided, _aten.detach,
    _aten.scatter_add_, _aten._unsafe_view,
}  # fmt: skip
_ROWS_OF_A_TABLE = {_aten.embedding, _aten.index, _aten.gather, _aten.index_select}  # do not read all of their input


class Work(NamedTuple):
    """Of one rank in one micro-step, forward and backward, recomputed parts included, without the dispersion term."""

    product_flops: float
    moved_bytes: float  # read and written by all that is no matrix product
    operations: float  # that start a kernel


class WorkCounter(TorchDispatchMode):
    """Counts while it is entered; tensors may be shapes alone."""

    def __init__(self) -> None:
        super().__init__()
        self._flops = self._bytes = self._operations = 0.0

    @property
    def work(self) -> Work:
        """All that was counted."""
        return Work(self._flops, self._bytes, self._operations)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *, backward: bool) -> None:
        """Count a fused causal attention, which makes half of its 2 products (5 in the backward pass)."""
        products = 5 if backward else 2
        per_product = query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])
        self._flops += products * per_product / 2
        self._bytes += (2 if backward else 1) * sum(_bytes(tensor) for tensor in (query, key, value, query))
        self._operations += 1

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in flop_registry:
            self._flops += flop_registry[packet](*args, **(kwargs or {}), out_val=outputs)
            self._operations += 1
        elif function.namespace == "aten" and not function.is_view and packet not in _NO_TRAFFIC:
            written = sum(_bytes(tensor) for tensor in tree_leaves(outputs) if isinstance(tensor, Tensor))
            read = sum(_bytes(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor))
            self._bytes += written + (min(read, written) if packet in _ROWS_OF_A_TABLE else read)
            self._operations += 1
        return outputs


def _bytes(tensor: Tensor) -> int:
    """Of a tensor; one that was expanded is read once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
