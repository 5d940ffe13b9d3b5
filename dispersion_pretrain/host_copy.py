"""A copy of a training state in host memory, to be written while training goes on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """Copies states into host memory that is kept and used again by the next copy.

    It takes as much memory as this rank writes into a checkpoint, from the first copy to the end of the run.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, name: str, state: Any) -> Any:
        """Return a copy of a tree of dictionaries, lists and tuples that shares no memory with it.

        A view is copied without the rest of its storage; tensors that are one in `state` are one in the copy. What was
        returned for the same `name` before is overwritten.
        """
        return self._copied(state, (name,), {})

    def _copied(self, value: Any, place: tuple[Any, ...], seen: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(value, Tensor):
            key = (value.device, value.dtype, value.data_ptr(), value.shape, value.stride())
            if key not in seen:
                seen[key] = self._buffer(place, value).copy_(value.detach())
            return seen[key]
        if isinstance(value, dict):
            copied = copy.copy(value)  # of the same type, with the attributes that a state_dict has
            for key, inner in value.items():
                copied[key] = self._copied(inner, (*place, key), seen)
            return copied
        if type(value) in (list, tuple) or hasattr(value, "_fields"):
            items = [self._copied(inner, (*place, number), seen) for number, inner in enumerate(value)]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return copy.deepcopy(value)  # a number, a torch.Size (which is a tuple, too), an object of DeepSpeed's

    def _buffer(self, place: tuple[Any, ...], like: Tensor) -> Tensor:
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != like.shape or buffer.dtype != like.dtype:
            buffer = self._buffers[place] = torch.empty(like.shape, dtype=like.dtype)
        return buffer
