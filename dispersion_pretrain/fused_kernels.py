"""Fused Triton kernels of liger-kernel for RMSNorm, rotary embeddings and SwiGLU, put into a model that is built.

Only its operators are taken. Its own patches replace classes for a whole process, leave the norms of queries and keys
(Qwen3) as they are once a model is built, and follow other versions of transformers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# Families whose every norm, rotary embedding and MLP is of the three kinds: tests compare losses and gradients.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
_ROTARY = "apply_rotary_pos_emb"  # a function in the module of each family


def refuse_unknown_family(config: PretrainedConfig) -> None:
    """Raise ValueError unless the kernels compute what this model does. Nothing is imported or built."""
    family = config.model_type
    if family not in FAMILIES:
        raise ValueError(
            f"model.kernels: liger has none for {family} here. {', '.join(FAMILIES)} have them. Set model.kernels: "
            "torch; model.compile: true fuses operations of any family."
        )
    if config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"model.kernels: liger has SwiGLU (hidden_act silu), and this model's hidden_act is {config.hidden_act!r}. "
            "Set model.kernels: torch."
        )


def use_fused_kernels(model: PreTrainedModel) -> None:
    """Let tensors on a GPU go through the fused kernels; parameters, their names and what the CPU computes stay.

    The rotary embedding is a function of the family's module: other models of the family in this process get it, too.

    Args:
        model: of a config that `refuse_unknown_family` lets pass.

    Raises:
        ValueError: no GPU, or liger-kernel is not installed.
    """
    if not torch.cuda.is_available() and not _interpreted():
        raise ValueError("model.kernels: liger is for GPUs, and there is none. Set model.kernels: torch.")
    try:
        import liger_kernel.ops  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"model.kernels: liger needs the package liger-kernel, which cannot be imported ({error}). Install it with "
            "pip install -c constraints.txt -e '.[gpu]', or set model.kernels: torch."
        ) from None
    for module in list(model.modules()):
        if type(module).__name__.endswith("RMSNorm"):
            _mix_in(_FusedNorm, module)
        elif all(isinstance(getattr(module, name, None), nn.Linear) for name in ("gate_proj", "up_proj", "down_proj")):
            _mix_in(_FusedSwiGLU, module)
    functions: Any = sys.modules[type(model).__module__]
    plain = getattr(functions, _ROTARY)
    if not isinstance(plain, _FusedRotary):
        setattr(functions, _ROTARY, _FusedRotary(plain))


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch: kernels run on the CPU, slowly, for tests


def _is_fused(tensor: Tensor) -> bool:
    return tensor.is_cuda or _interpreted()


def _mix_in(kind: type[nn.Module], module: nn.Module) -> None:
    plain = type(module)
    if not issubclass(plain, kind):
        module.__class__ = type(f"Fused{plain.__name__}", (kind, plain), {"__module__": plain.__module__})


class _FusedNorm(nn.Module):
    """Before a family's RMSNorm in the order of classes; (..., dim) -> the same."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _is_fused(hidden_states):
            return super().forward(hidden_states)
        from liger_kernel.ops import LigerRMSNormFunction

        # "llama": the mean of squares in float32, the product with the weight in the tensors' type, as transformers
        # has it. Not in place: the gradient of the output may be another's as well.
        normed: Tensor = LigerRMSNormFunction.apply(
            hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", False, None
        )
        return normed


class _FusedSwiGLU(nn.Module):
    """Before a family's gated MLP in the order of classes; (..., dim) -> the same."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if not _is_fused(x):
            return super().forward(x)
        from liger_kernel.ops import LigerSiLUMulFunction

        projected: Tensor = self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))
        return projected


class _FusedRotary:
    """In place of a family's function of the same arguments.

    q, k: (batch, heads, positions, head dim), k with its own number of heads; cos, sin: (batch or 1, positions, head
    dim). Heads and positions are the other way round where `unsqueeze_dim` is 2, which the kernel does not know.
    """

    def __init__(self, plain: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self._plain = plain

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        if not _is_fused(q) or unsqueeze_dim != 1:
            return self._plain(q, k, cos, sin, position_ids, unsqueeze_dim)
        from liger_kernel.ops import LigerRopeFunction

        rotated: tuple[Tensor, Tensor] = LigerRopeFunction.apply(q, k, cos, sin)
        return rotated
