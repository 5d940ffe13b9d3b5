"""Listening to what a piece of code sends to other ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Communication(TorchDispatchMode):
    """Records every collective issued in its scope, however it was called: names, and types of what was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            leaves = tree_leaves((args, kwargs))
            sent = {str(leaf.dtype) for leaf in leaves if isinstance(leaf, Tensor)}
            self.calls.append((func.overloadpacket.__name__.strip("_"), ",".join(sorted(sent))))
        return func(*args, **(kwargs or {}))
