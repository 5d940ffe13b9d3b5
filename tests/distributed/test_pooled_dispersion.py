"""Pools over gloo ranks against autograd on the joined batch, in float64; and what the ranks say to each other."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dispersion_pretrain import angular_kernel, pair_sums
from dispersion_pretrain.dispersion import VARIANTS, pooled_dispersion, pooled_dispersion_loss
from dispersion_pretrain.distributed import pool_groups
from dispersion_pretrain.pair_sums import DispersionOptions
from numerics.communication import Communication
from numerics.plain_dispersion import plain_dispersion_loss
from spawn import run_ranks

LAYERS, TOKENS, DIM = 3, 16, 10  # of a pool; divided by 1, 2 and 4 ranks
WEIGHTS = torch.tensor([1.0, 0.25, -2.0], dtype=torch.float64)  # upstream gradients of the layers

CASES: dict[str, dict[str, Any]] = {
    "paper": {"temperature": 1.0, "cosine_clamp": 0.1, "norm_epsilon": 0.0},
    "sharp": {"temperature": 0.3, "cosine_clamp": 0.4, "norm_epsilon": 0.0},
    "scripts": {"temperature": 0.5, "cosine_clamp": 0.1, "norm_epsilon": 1e-2},
    "cold": {"temperature": 1e-3, "cosine_clamp": 0.0},  # exp(-D / tau) of every pair is below the smallest number
    "angular, atan2": {"angle": "atan2", "norm_epsilon": 1e-2},
    "orthogonalization": {"variant": "orthogonalization", "margin": 0.6},
    "orthogonalization, atan2": {"variant": "orthogonalization", "angle": "atan2"},
    "decorrelation": {"variant": "decorrelation", "norm_epsilon": 1e-2},
    "infonce_cosine": {"variant": "infonce_cosine", "temperature": 0.5},
    "infonce_l2": {"variant": "infonce_l2", "temperature": 0.01},  # cold as well
    "l2_repel": {"variant": "l2_repel", "norm_weight": 0.3},
}
WORLDS = [(1, 1), (2, 2), (4, 4), (4, 2), (4, 1)]  # ranks, ranks a pool


def pool_embeddings(num_pools: int) -> Tensor:
    """(pools, layers, tokens, dim): some layers condensed beyond the clamp, some spread; any rank makes the same."""
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(num_pools, LAYERS, TOKENS, DIM, generator=generator, dtype=torch.float64)
    common = torch.randn(num_pools, 1, 1, DIM, generator=generator, dtype=torch.float64)
    return noise + torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)[:, None, None] * common


def own_part(num_pools: int, pool_ranks: int) -> Tensor:
    pool, place = divmod(dist.get_rank(), pool_ranks)
    own_tokens = TOKENS // pool_ranks
    return pool_embeddings(num_pools)[pool, :, place * own_tokens : (place + 1) * own_tokens].clone()


def loss_and_gradient_on_rank(pool_ranks: int, pairs_per_block: int | None) -> dict[str, dict[str, Tensor]]:
    if pairs_per_block is not None:
        pair_sums._PAIRS_PER_BLOCK = pairs_per_block
    num_pools = dist.get_world_size() // pool_ranks
    group = pool_groups(pool_ranks)
    results = {}
    for name, options in CASES.items():
        own = own_part(num_pools, pool_ranks).requires_grad_()
        loss = pooled_dispersion_loss(own, group=group, **options)
        (gradient,) = torch.autograd.grad(loss @ WEIGHTS, own)
        results[name] = {"loss": loss.detach(), "gradient": gradient}
    return results


@functools.cache
def results_of(
    num_ranks: int, pool_ranks: int, pairs_per_block: int | None = None
) -> list[dict[str, dict[str, Tensor]]]:
    return run_ranks(loss_and_gradient_on_rank, num_ranks, pool_ranks, pairs_per_block)


def expected_of(num_pools: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Losses (pools, layers), and the gradient of their weighted sum averaged over pools."""
    joined = pool_embeddings(num_pools).requires_grad_()
    losses = plain_dispersion_loss(joined.flatten(0, 1), **options).view(num_pools, LAYERS)
    (gradient,) = torch.autograd.grad((losses @ WEIGHTS).mean(), joined)
    return losses.detach(), gradient


def averaged_gradient(results: list[dict[str, Tensor]], pool_ranks: int) -> Tensor:
    """What data parallelism makes of the gradients of the ranks, (pools, layers, tokens, dim): their mean over ranks.

    Each token lives on one rank, so the sum over ranks is a concatenation.
    """
    pools = [
        torch.cat([part["gradient"] for part in results[first : first + pool_ranks]], dim=1)
        for first in range(0, len(results), pool_ranks)
    ]
    return torch.stack(pools) / len(results)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("num_ranks", "pool_ranks"), WORLDS)
def test_loss_equals_the_joined_batch(num_ranks: int, pool_ranks: int, case: str) -> None:
    expected, _ = expected_of(num_ranks // pool_ranks, CASES[case])
    for rank, result in enumerate(results_of(num_ranks, pool_ranks)):
        own = expected[rank // pool_ranks]
        assert ((result[case]["loss"] - own) / own).abs().max() <= 1e-12


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("num_ranks", "pool_ranks"), WORLDS)
def test_averaged_gradient_has_the_length_of_the_joined_batch(num_ranks: int, pool_ranks: int, case: str) -> None:
    _, expected = expected_of(num_ranks // pool_ranks, CASES[case])
    actual = averaged_gradient([result[case] for result in results_of(num_ranks, pool_ranks)], pool_ranks)
    assert abs(actual.norm() / expected.norm() - 1) <= 1e-12
    assert ((actual.norm(dim=(2, 3)) / expected.norm(dim=(2, 3)) - 1).abs() <= 1e-12).all(), "of each pool and layer"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("num_ranks", "pool_ranks"), WORLDS)
def test_averaged_gradient_has_the_direction_of_the_joined_batch(num_ranks: int, pool_ranks: int, case: str) -> None:
    _, expected = expected_of(num_ranks // pool_ranks, CASES[case])
    actual = averaged_gradient([result[case] for result in results_of(num_ranks, pool_ranks)], pool_ranks)
    assert (actual / actual.norm() - expected / expected.norm()).norm() <= 1e-12


def test_every_variant_is_among_the_cases() -> None:
    assert {options.get("variant", "angular") for options in CASES.values()} == set(VARIANTS)


def test_blocks_of_rows_change_nothing() -> None:
    whole, blocked = results_of(4, 4), results_of(4, 4, 40)  # 2 of 4 rows at a time
    for one, other in zip(whole, blocked, strict=True):
        for case in CASES:
            for key in ("loss", "gradient"):
                assert (one[case][key] - other[case][key]).norm() <= 1e-12 * one[case][key].norm(), case


def communication_on_rank(pool_ranks: int, dtype: torch.dtype) -> dict[str, Any]:
    group = pool_groups(pool_ranks)
    own = own_part(dist.get_world_size() // pool_ranks, pool_ranks).to(dtype).requires_grad_()
    with Communication() as forward:
        terms = pooled_dispersion(own, group=group, options=DispersionOptions(**CASES["paper"]))
    with Communication() as backward:
        terms.loss.sum().backward()
    with Communication() as control:  # the recorder must not be blind
        dist.all_reduce(torch.ones(1))
    return {
        "forward": forward.calls,
        "backward": backward.calls,
        "control": control.calls,
        "terms": tuple(part.detach() for part in terms),
    }


@pytest.mark.parametrize(
    ("num_ranks", "pool_ranks", "dtype"), [(2, 2, torch.float32), (4, 2, torch.bfloat16), (2, 1, torch.float32)]
)
def test_communication(num_ranks: int, pool_ranks: int, dtype: torch.dtype) -> None:
    results = run_ranks(communication_on_rank, num_ranks, pool_ranks, dtype)
    # The samples travel in their own type, for all layers at once; the sums, three numbers a layer, in float64.
    expected = [("allgather_base", str(dtype)), ("allreduce", "torch.float64")] if pool_ranks > 1 else []
    for result in results:
        assert result["control"] == [("allreduce", "torch.float32")]
        assert result["forward"] == expected
        assert result["backward"] == []
    for first in range(0, num_ranks, pool_ranks):
        for result in results[first : first + pool_ranks]:
            for own, other in zip(result["terms"], results[first]["terms"], strict=True):
                assert torch.equal(own, other), "every rank of a pool knows the same loss and statistics"


def statistics_on_rank(pool_ranks: int) -> tuple[Tensor, Tensor]:
    own = own_part(dist.get_world_size() // pool_ranks, pool_ranks)
    terms = pooled_dispersion(own, group=pool_groups(pool_ranks), options=DispersionOptions(**CASES["paper"]))
    return terms.mean_cosine, terms.clamped_share


def test_statistics_are_those_of_the_joined_batch() -> None:
    results = run_ranks(statistics_on_rank, 4, 2)
    joined = [
        pooled_dispersion(pool, group=None, options=DispersionOptions(**CASES["paper"])) for pool in pool_embeddings(2)
    ]
    for rank, (mean_cosine, clamped_share) in enumerate(results):
        assert torch.allclose(mean_cosine, joined[rank // 2].mean_cosine, rtol=1e-12, atol=0)
        assert torch.allclose(clamped_share, joined[rank // 2].clamped_share, rtol=1e-12, atol=0)


def single_tokens_on_rank() -> tuple[Tensor, str]:
    loss = pooled_dispersion_loss(own_part(1, 4)[:, :1], group=pool_groups(4))
    try:
        pooled_dispersion_loss(own_part(1, 4)[:, :1], group=None)
    except ValueError as error:
        return loss, str(error)
    return loss, ""


def test_one_token_a_rank_is_enough_in_a_shared_pool() -> None:
    tokens = pool_embeddings(1)[0, :, :: TOKENS // 4]
    for loss, alone in run_ranks(single_tokens_on_rank, 4):
        assert torch.allclose(loss, plain_dispersion_loss(tokens), rtol=1e-12, atol=0)
        assert "a set of 1 embedding has no pair" in alone


def kernel_on_rank() -> tuple[Tensor, Tensor, bool]:
    own = large_pool()[:, slice(*own_rows())].float().clone().requires_grad_()
    group = pool_groups(dist.get_world_size())
    loss = pooled_dispersion_loss(own, group=group)
    (gradient,) = torch.autograd.grad(loss @ WEIGHTS.float(), own)
    return loss.detach(), gradient, angular_kernel.load() is not None


def own_rows() -> tuple[int, int]:
    num_own = large_pool().shape[1] // dist.get_world_size()
    return dist.get_rank() * num_own, (dist.get_rank() + 1) * num_own


def large_pool() -> Tensor:
    """Parts of ranks that are no multiple of the kernel's tiles."""
    generator = torch.Generator().manual_seed(6)
    return 0.5 + torch.randn(LAYERS, 4 * 83, 40, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_the_compiled_kernel_in_a_shared_pool(num_ranks: int) -> None:
    leaf = large_pool().requires_grad_()
    losses = plain_dispersion_loss(leaf)
    (expected,) = torch.autograd.grad(losses @ WEIGHTS, leaf)
    results = run_ranks(kernel_on_rank, num_ranks)
    averaged = torch.cat([gradient for _, gradient, _ in results], dim=1).double() / num_ranks
    assert abs(averaged.norm() / expected.norm() - 1) <= 1e-6
    assert (averaged / averaged.norm() - expected / expected.norm()).norm() <= 2e-6
    for loss, _, has_kernel in results:
        assert has_kernel
        assert torch.allclose(loss.double(), losses.detach(), rtol=1e-6)
