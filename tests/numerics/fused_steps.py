"""A training step of a tiny model of each family with plain and with fused kernels, in Triton's interpreter.

TRITON_INTERPRET=1 python tests/numerics/fused_steps.py FAMILY [FAMILY ...]

Prints JSON: family -> relative differences of loss and gradients, the classes of modules that are fused and that are
not, and the calls of the fused rotary embedding. Of tests/numerics/test_fused_kernels.py.
"""

from __future__ import annotations

import collections
import json
import sys
from typing import Any
from unittest import mock

import liger_kernel.ops.rms_norm as rms_norm
import torch
import triton
import triton.language as tl
from liger_kernel.ops import LigerRopeFunction
from torch import nn
from transformers import AutoConfig

from dispersion_pretrain.config import DispersionSettings, ModelSettings
from dispersion_pretrain.model import build_model, model_config, tiny_fields
from dispersion_pretrain.objective import DispersionTerm, StepContext, TrainingModule

LENGTH = 16  # tokens


@triton.jit
def _rsqrt(x):  # type: ignore[no-untyped-def]
    return tl.rsqrt(x)


rms_norm.rsqrt = _rsqrt  # the interpreter has none of libdevice's functions: the kernel would store None


def step(family: str, kernels: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], nn.Module]:
    """Loss, gradients by parameter, and the model, of one micro-step with dispersion; a block is recomputed."""
    fields = {**tiny_fields(AutoConfig.for_model(family)), "rms_norm_eps": 1e-2}  # no default: it is the model's
    settings = ModelSettings.model_validate({"config": fields, "kernels": kernels, "activation_checkpointing": 2})
    torch.manual_seed(1)
    model = build_model(settings, model_config(settings, vocabulary=None, sequence_length=LENGTH)).train()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones at first: a kernel that left them out would not be seen
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.3)
    section = DispersionSettings(coefficient=1.0, pool_sequences=1, tokens_per_sequence=8)
    module = TrainingModule(model, DispersionTerm(section, layers=[1, 2], seed=0, pools_per_rank=2, pool_group=None))
    ids = torch.randint(fields["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(2))
    loss = module(ids, torch.arange(2), StepContext(0, 2 * (LENGTH - 1.0), 1, 1.0)).total
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, model


def compare(family: str) -> dict[str, Any]:
    """Figures of one family."""
    loss, gradients, _ = step(family, "torch")
    with mock.patch.object(LigerRopeFunction, "apply", wraps=LigerRopeFunction.apply) as rotary:
        fused_loss, fused_gradients, model = step(family, "liger")
    assert gradients.keys() == fused_gradients.keys()
    differences = {
        name: float((fused_gradients[name] - gradient).norm() / gradient.norm()) for name, gradient in gradients.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    kinds = collections.Counter(type(module).__name__ for module in model.modules())
    return {
        "loss": float((fused_loss - loss).abs() / loss.abs()),
        "bit_equal": all(torch.equal(fused_gradients[name], gradients[name]) for name in gradients),
        "worst_gradient": [worst, differences[worst]],
        "fused": {name: count for name, count in kinds.items() if name.startswith("Fused")},
        "rotary": rotary.call_count,
        "plain": sorted(name for name in kinds if name.endswith(("RMSNorm", "MLP")) and not name.startswith("Fused")),
    }


if __name__ == "__main__":
    print(json.dumps({family: compare(family) for family in sys.argv[1:]}))
