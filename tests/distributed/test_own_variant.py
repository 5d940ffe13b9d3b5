"""A regulariser from outside the package: one function and one entry in the table, exact over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from dispersion_pretrain.config import DispersionSettings
from dispersion_pretrain.dispersion import VARIANTS, check_own_pair_sum, dispersion_loss, pooled_dispersion_loss
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


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        (lambda embeddings, options: embeddings.sum(-1), r"returned shape \(3, 5\) for 3 sets"),
        (lambda embeddings, options: (embeddings > 0).sum((1, 2)), r"returned shape \(3,\) of torch.int64 for 3 sets"),
        (lambda embeddings, options: 1.0, "returned float for 3 sets"),
    ],
)
def test_a_function_without_one_value_a_set_is_named(
    function: Callable[[Tensor, DispersionOptions], Tensor], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, "odd", function)
    with pytest.raises(ValueError, match=f"variant odd: {complaint}"):
        dispersion_loss(torch.randn(3, 5, 4), variant="odd")


# ---- sums over pairs of every kind


def squared(product: Tensor, options: DispersionOptions) -> tuple[Tensor, Tensor]:
    return product.square(), 2.0 * product


def relative(q: Tensor, a: Tensor, options: DispersionOptions) -> tuple[Tensor, Tensor, Tensor]:
    """A share of the lengths: with raw vectors it changes with the origin."""
    return q / (1.0 + a), 1.0 / (1.0 + a), -q / (1.0 + a).square()


def plainly(pair: PairSum, z: Tensor) -> Tensor:
    """The definition of `PairSum`, for autograd."""
    x = z - z.mean(-1, keepdim=True) if pair.vectors == "standardised" else z
    x = x if pair.vectors == "raw" else functional.normalize(x, dim=-1)
    product, size = x @ x.transpose(1, 2), x.square().sum(-1)
    a = size.unsqueeze(1) + size.unsqueeze(2)
    f = pair.terms(*((product,) if pair.of == "cosine" else (a - 2.0 * product, a)), DispersionOptions())[0]
    f = f[:, ~torch.eye(z.shape[1], dtype=torch.bool)]
    return f.logsumexp(1) - math.log(f.shape[1]) if pair.logarithm else f.mean(1)


@pytest.mark.parametrize("logarithm", [False, True])
@pytest.mark.parametrize("vectors", ["unit", "standardised", "raw"])
@pytest.mark.parametrize(("of", "terms"), [("cosine", squared), ("distance", relative)])
def test_a_sum_over_pairs_of_any_kind_is_its_definition(
    of: Any, terms: Callable[..., tuple[Tensor, ...]], vectors: Any, logarithm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = PairSum(terms, of=of, vectors=vectors, logarithm=logarithm)
    monkeypatch.setitem(VARIANTS, "own", pair)
    check_own_pair_sum(DispersionOptions("own"))
    leaf = whole_pool().requires_grad_()
    expected_loss = plainly(pair, leaf)
    (expected,) = torch.autograd.grad(expected_loss.sum(), leaf)
    loss = pooled_dispersion_loss(leaf, variant="own")
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.allclose(loss, expected_loss, rtol=1e-12)
    assert (gradient - expected).norm() < 1e-12 * expected.norm()


@pytest.mark.parametrize(
    ("pair", "complaint"),
    [
        (
            PairSum(lambda c, _: (c**3, 7 * c**2), "cosine", "unit", False),
            "slope 1 of terms is .* at .*, where its values have",
        ),
        (
            PairSum(lambda q, a, _: (q * a, a, 2 * q), "distance", "unit", False),
            "slope 2 of terms is .* at .*, where its values have",
        ),
        (
            PairSum(lambda q, a, _: (q, torch.ones_like(q), torch.ones_like(q)), "distance", "raw", True),
            "slope 2 of terms is 1 at .*, where its values have 0",
        ),
        (PairSum(lambda c, _: c**3, "cosine", "unit", False), "terms returned Tensor. A tuple of 2 tensors is needed"),
        (
            PairSum(lambda c, _: (c, c, c), "cosine", "unit", False),
            "terms returned 3 tensors. A tuple of 2 tensors is needed",
        ),
        (PairSum(squared, "cosine", cast(Any, "units"), False), "vectors is 'units'. One of unit, standardised, raw"),
        (PairSum(squared, cast(Any, "angle"), "unit", False), "of is 'angle'. One of cosine, distance is allowed"),
    ],
)
def test_a_wrong_sum_over_pairs_is_refused_before_it_trains(
    pair: PairSum, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(VARIANTS, "wrong", pair)
    with pytest.raises(ValueError, match=f"variant wrong: {complaint}"):
        check_own_pair_sum(DispersionOptions("wrong"))


@pytest.mark.parametrize("angle", ["arccos", "atan2"])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in OWN])
def test_the_slopes_of_the_variants_at_hand_are_derivatives(name: str, angle: Any) -> None:
    if angle == "arccos" or name in ("angular", "orthogonalization"):
        check_own_pair_sum(DispersionOptions(name, angle=angle))
