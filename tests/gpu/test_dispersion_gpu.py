"""The loss on a GPU, where the elementwise part is one compiled kernel, against float64 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dispersion_pretrain.dispersion import dispersion_loss, pooled_dispersion
from dispersion_pretrain.pair_sums import DispersionOptions
from numerics.plain_dispersion import plain_dispersion_loss

KINDS: list[dict[str, Any]] = [
    {"variant": "angular"},
    {"variant": "angular", "angle": "atan2"},
    {"variant": "orthogonalization"},
    {"variant": "orthogonalization", "angle": "atan2"},
    {"variant": "decorrelation"},
    {"variant": "infonce_cosine"},
    {"variant": "infonce_l2", "temperature": 50.0},
    {"variant": "l2_repel", "temperature": 50.0},
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """From its ninth shape on a compiled function would run eagerly, in silence."""
    torch.compiler.reset()


def embeddings(shape: tuple[int, int, int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64) + torch.randn(
        shape[-1], generator=generator, dtype=torch.float64
    )


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double().cpu() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(4, 256, 96), (1, 1500, 64)], ids=str)
def test_value_and_gradient(shape: tuple[int, int, int], options: dict[str, Any], dtype: torch.dtype) -> None:
    z = embeddings(shape).to(dtype)
    reference = z.double().requires_grad_()
    expected = plain_dispersion_loss(reference, **options).mean()
    (expected_gradient,) = torch.autograd.grad(expected, reference)
    leaf = z.cuda().requires_grad_()
    actual = dispersion_loss(leaf, **options)
    (gradient,) = torch.autograd.grad(actual, leaf)
    assert abs(actual.item() - expected.item()) < 1e-5 * max(1.0, abs(expected.item()))
    assert relative(gradient, expected_gradient) < (1e-4 if dtype == torch.float32 else 1e-2)


def test_nothing_waits_for_the_device() -> None:
    leaf = embeddings((4, 128, 64)).float().cuda().requires_grad_()
    dispersion_loss(leaf).backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pooled_dispersion(leaf, group=None, options=DispersionOptions()).loss.mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
