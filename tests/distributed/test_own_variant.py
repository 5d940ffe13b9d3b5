"""A regulariser from outside the package: one function and one entry in the table, exact over ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from dispersion_pretrain.config import DispersionSettings
from dispersion_pretrain.dispersion import VARIANTS, dispersion_loss, pooled_dispersion_loss
from dispersion_pretrain.distributed import pool_groups
from dispersion_pretrain.objective import DispersionTerm
from dispersion_pretrain.pair_sums import DispersionOptions, PairSum
from numerics.communication import Communication
from spawn import run_ranks

LAYERS, TOKENS, DIM = 2, 12, 9


def log_determinant(embeddings: Tensor, options: DispersionOptions) -> Tensor:
    """Volume of the directions, as -log det of their Gram matrix; (sets, tokens, dim) -> (sets,)."""
    unit = functional.normalize(embeddings, dim=-1)
    gram = unit @ unit.transpose(1, 2)
    return -torch.logdet(gram + options.temperature * torch.eye(gram.shape[1], dtype=gram.dtype))


def cubed_cosine(cosine: Tensor, options: DispersionOptions) -> tuple[Tensor, Tensor]:
    """A sum over pairs: what a pair contributes, and its slope."""
    return cosine**3 / options.temperature, 3 * cosine**2 / options.temperature


OWN: dict[str, PairSum | Callable[[Tensor, DispersionOptions], Tensor]] = {
    "log_determinant": log_determinant,
    "cubed_cosine": PairSum(cubed_cosine, of="cosine", vectors="unit", logarithm=False),
}


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, variant in OWN.items():
        monkeypatch.setitem(VARIANTS, name, variant)


def whole_pool() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return 0.7 + torch.randn(LAYERS, TOKENS, DIM, generator=generator, dtype=torch.float64)


def plain(name: str, embeddings: Tensor) -> Tensor:
    if name == "log_determinant":
        return log_determinant(embeddings, DispersionOptions(temperature=0.5))
    unit = functional.normalize(embeddings, dim=-1)
    cosine = (unit @ unit.transpose(1, 2))[:, ~torch.eye(TOKENS, dtype=torch.bool)]
    return (cosine**3 / 0.5).mean(1)


def on_rank(name: str) -> tuple[Tensor, Tensor, list[str], list[str]]:
    VARIANTS[name] = OWN[name]
    own_tokens = TOKENS // dist.get_world_size()
    first = dist.get_rank() * own_tokens
    own = whole_pool()[:, first : first + own_tokens].clone().requires_grad_()
    group = pool_groups(dist.get_world_size())
    with Communication() as forward:
        loss = pooled_dispersion_loss(own, group=group, variant=name, temperature=0.5)
    with Communication() as backward:
        (gradient,) = torch.autograd.grad(loss.sum(), own)
    return loss.detach(), gradient, [call for call, _ in forward.calls], [call for call, _ in backward.calls]


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_equals_the_joined_batch_in_value_length_and_direction(name: str, num_ranks: int) -> None:
    leaf = whole_pool().requires_grad_()
    expected_loss = plain(name, leaf)
    (expected,) = torch.autograd.grad(expected_loss.sum(), leaf)
    results = run_ranks(on_rank, num_ranks, name)
    averaged = torch.cat([gradient for _, gradient, _, _ in results], dim=1) / num_ranks
    assert abs(averaged.norm() / expected.norm() - 1) < 1e-12
    assert (averaged / averaged.norm() - expected / expected.norm()).norm() < 1e-12
    for loss, _, forward, backward in results:
        assert torch.allclose(loss, expected_loss.detach(), rtol=1e-12)
        gathers = ["allgather_base"] if num_ranks > 1 else []
        assert forward == gathers + (["allreduce"] if gathers and name == "cubed_cosine" else [])
        assert backward == []


def test_it_trains_by_its_name() -> None:
    settings = DispersionSettings(variant="log_determinant", pool_sequences=2, tokens_per_sequence=4, temperature=0.5)
    term = DispersionTerm(settings, layers=[1], seed=0, pools_per_rank=1, pool_group=None)
    hidden = (torch.randn(2, 8, 5), torch.randn(2, 8, 5, requires_grad=True))
    loss, _, _ = term(hidden, torch.arange(2), 0)
    assert torch.autograd.grad(loss.sum(), hidden[1])[0].abs().sum() > 0


def test_a_function_that_does_not_reduce_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "unreduced", lambda embeddings, options: embeddings.sum(-1))
    with pytest.raises(ValueError, match=r"variant unreduced: returned shape \(3, 5\) for 3 sets"):
        dispersion_loss(torch.randn(3, 5, 4), variant="unreduced")
