"""The closed form against the formula written naively, in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dispersion_pretrain import pair_sums
from dispersion_pretrain.dispersion import DispersionTerms, dispersion_loss, pooled_dispersion, pooled_dispersion_loss
from dispersion_pretrain.pair_sums import DispersionOptions
from numerics.plain_dispersion import double_loop_dispersion, plain_dispersion_loss

SHAPES = [(1, 2, 3), (1, 5, 4), (3, 7, 5), (2, 16, 32), (4, 33, 8), (1, 64, 100)]
OPTIONS = [
    {"temperature": temperature, "cosine_clamp": clamp, "norm_epsilon": epsilon}
    for temperature, clamp, epsilon in itertools.product((0.3, 1.0, 2.0), (0.0, 0.1, 0.4), (0.0, 1e-2))
]


ALTERNATIVES: list[dict[str, Any]] = [
    {"variant": "angular", "angle": "atan2"},
    {"variant": "angular", "angle": "atan2", "temperature": 0.3, "norm_epsilon": 1e-2},
    {"variant": "orthogonalization"},
    {"variant": "orthogonalization", "margin": 0.8, "cosine_clamp": 0.4, "norm_epsilon": 1e-2},
    {"variant": "orthogonalization", "angle": "atan2", "norm_epsilon": 1.0},
    {"variant": "decorrelation"},
    {"variant": "decorrelation", "norm_epsilon": 1e-2},
    {"variant": "infonce_cosine"},
    {"variant": "infonce_cosine", "temperature": 0.2, "norm_epsilon": 1e-2},
    {"variant": "infonce_l2"},
    {"variant": "infonce_l2", "temperature": 0.01},
    {"variant": "l2_repel"},
    {"variant": "l2_repel", "temperature": 5.0, "norm_weight": 2.0},
]

KINDS: list[dict[str, Any]] = [
    {"variant": "angular", "angle": "atan2"},
    {"variant": "orthogonalization"},
    {"variant": "orthogonalization", "angle": "atan2"},
    {"variant": "decorrelation"},
    {"variant": "infonce_cosine"},
    {"variant": "infonce_l2"},
    {"variant": "l2_repel"},
]


def terms_of(embeddings: Tensor, **options: Any) -> DispersionTerms:
    return pooled_dispersion(embeddings, group=None, options=DispersionOptions(**options))


def embeddings_of(shape: tuple[int, ...], *, offset: float = 0.0, spread: float = 1.0, seed: int = 0) -> Tensor:
    """Random float64 vectors; an offset common to all of them condenses them."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    common = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return offset * common + spread * noise


def value_and_gradient(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("options", OPTIONS + ALTERNATIVES, ids=str)
@pytest.mark.parametrize("offset", [0.0, 1.5], ids=["spread", "half-condensed"])
def test_value_and_gradient_equal_plain_autograd(options: dict[str, Any], offset: float) -> None:
    for seed, shape in enumerate(SHAPES):
        z = embeddings_of(shape, offset=offset, seed=seed).requires_grad_()
        expected = value_and_gradient(plain_dispersion_loss(z, **options).mean(), z)
        actual = value_and_gradient(dispersion_loss(z, **options), z)
        assert relative_difference(actual[0], expected[0]) < 1e-12, shape
        assert relative_difference(actual[1], expected[1]) < 1e-12, shape


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_equals_double_loop(options: dict[str, Any]) -> None:
    for shape in [(2, 3), (5, 4), (9, 6)]:
        z = embeddings_of(shape, offset=1.0)
        expected = double_loop_dispersion(z.tolist(), **options)
        assert dispersion_loss(z[None], **options).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("norm_epsilon", [0.0, 1e-2, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_gradcheck_inside_the_band(temperature: float, norm_epsilon: float) -> None:
    z = embeddings_of((2, 5, 12)).requires_grad_()
    options: dict[str, Any] = {"temperature": temperature, "cosine_clamp": 0.1, "norm_epsilon": norm_epsilon}
    assert terms_of(z, **options).clamped_share.max() == 0, "finite differences do not see a clamped pair"
    assert torch.autograd.gradcheck(lambda x: dispersion_loss(x, **options), (z,), rtol=1e-6)
    assert torch.autograd.gradcheck(lambda x: pooled_dispersion_loss(x, group=None, **options), (z,), rtol=1e-6)


def test_each_set_has_its_own_upstream_gradient() -> None:
    z = embeddings_of((3, 6, 5)).requires_grad_()
    weights = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64)
    _, expected = value_and_gradient(plain_dispersion_loss(z) @ weights, z)
    _, actual = value_and_gradient(pooled_dispersion_loss(z) @ weights, z)
    assert relative_difference(actual, expected) < 1e-12
    assert actual[2].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_beyond_the_band_is_that_of_its_edge(dtype: torch.dtype) -> None:
    condensed = embeddings_of((2, 12, 16), offset=3.0, spread=0.3).to(dtype)
    opposite = torch.cat([condensed, -condensed], dim=1)  # both edges of the band
    for z in (condensed, opposite):
        z = z.clone().requires_grad_()
        assert terms_of(z, temperature=1.0, cosine_clamp=0.1, norm_epsilon=0.0).clamped_share.min() == 1
        reference = z.detach().double().requires_grad_()
        _, expected = value_and_gradient(plain_dispersion_loss(reference).mean(), reference)
        _, actual = value_and_gradient(dispersion_loss(z), z)
        assert actual.norm() > 0
        assert relative_difference(actual.double(), expected) < (1e-12 if dtype == torch.float64 else 1e-4)


def test_descent_spreads_condensed_embeddings() -> None:
    z = embeddings_of((1, 24, 16), offset=3.0, spread=0.1)
    options = {"temperature": 1.0, "cosine_clamp": 0.1, "norm_epsilon": 0.0}
    cosines = []
    for _ in range(4):
        z.requires_grad_()
        terms = terms_of(z, **options)
        cosines.append(terms.mean_cosine.item())
        _, gradient = value_and_gradient(terms.loss.mean(), z)
        z = (z - 3000.0 * gradient).detach()
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[0] > 0.9
    assert cosines[-1] < 0.99 * cosines[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_epsilon", [0.0, 1e-2])
@pytest.mark.parametrize("options", [{"cosine_clamp": 0.0}, {"cosine_clamp": 0.1}, *KINDS], ids=str)
def test_zero_and_identical_vectors_give_finite_numbers(
    dtype: torch.dtype, norm_epsilon: float, options: dict[str, Any]
) -> None:
    some = embeddings_of((6, 8))
    with_zeros = some.clone()
    with_zeros[2:4] = 0
    sets = torch.stack([some, with_zeros, some[:1].expand(6, 8), torch.zeros(6, 8), -some[:1].expand(6, 8)])
    z = sets.to(dtype).requires_grad_()
    terms = terms_of(z, **options, norm_epsilon=norm_epsilon)
    _, gradient = value_and_gradient(terms.loss.mean(), z)
    assert all(torch.isfinite(part).all() for part in (*terms, gradient))
    assert gradient.double().square().sum() < 1e6, "its square is summed into the gradient norm of the model"
    if norm_epsilon == 0 and "l2" not in options.get("variant", ""):
        assert gradient[1, 2:4].abs().max() == 0, "a vector without direction cannot be turned"
    assert gradient[2].abs().max() < (0.1 if options.get("variant") == "l2_repel" else 1e-2), (
        "equal vectors push each other along themselves only: no direction"
    )


def test_short_vectors_keep_their_direction() -> None:
    z = embeddings_of((1, 6, 8)).float()
    for scale in (1e-12, 1e12):
        assert dispersion_loss(z * scale).item() == pytest.approx(dispersion_loss(z).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_equal_rows_push_each_other_nowhere(options: dict[str, Any], temperature: float, dtype: torch.dtype) -> None:
    # ordinary in a causal model: sequences that begin with the same token have the same states there
    z = embeddings_of((1, 16, 24), offset=1.0)[:, torch.arange(64) % 16].to(dtype)
    if "l2" in options["variant"]:
        temperature *= 30.0
    reference, leaf = z.double().requires_grad_(), z.clone().requires_grad_()
    plain = plain_dispersion_loss(reference, **options, temperature=temperature)
    expected = value_and_gradient(plain.mean(), reference)
    actual = value_and_gradient(dispersion_loss(leaf, **options, temperature=temperature), leaf)
    bound = 1e-11 if dtype == torch.float64 else 1e-5 if "l2" not in options["variant"] else 1e-3
    assert relative_difference(actual[0].double(), expected[0]) < bound
    assert relative_difference(actual[1].double(), expected[1]) < bound


def test_only_variants_with_a_clamp_count_clamped_pairs() -> None:
    condensed = embeddings_of((1, 12, 16), offset=30.0, spread=0.1)
    for options in [{}, *KINDS]:
        has_clamp = options.get("variant") in (None, "orthogonalization") and "angle" not in options
        assert terms_of(condensed, **options).clamped_share.item() == (1.0 if has_clamp else 0.0)


@pytest.mark.parametrize("options", [{}, *KINDS], ids=str)
def test_non_finite_embeddings_are_not_hidden(options: dict[str, Any]) -> None:
    for value in (float("nan"), float("inf")):
        for dtype in (torch.float32, torch.float64):
            z = embeddings_of((1, 6, 8)).to(dtype)
            z[0, 3, 2] = value
            assert not torch.isfinite(dispersion_loss(z, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    half = embeddings_of((2, 20, 32), offset=2.0).to(dtype).requires_grad_()
    full = half.detach().float().requires_grad_()
    expected = value_and_gradient(dispersion_loss(full), full)
    actual = value_and_gradient(dispersion_loss(half), half)
    assert actual[0].dtype == torch.float32
    assert actual[1].dtype == dtype
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1].to(dtype))


def test_float32_is_close_to_float64() -> None:
    z = embeddings_of((4, 128, 64), offset=1.0)
    double, single = z.clone().requires_grad_(), z.float().requires_grad_()
    expected = value_and_gradient(dispersion_loss(double), double)
    actual = value_and_gradient(dispersion_loss(single), single)
    assert relative_difference(actual[0].double(), expected[0]) < 1e-6
    assert relative_difference(actual[1].double(), expected[1]) < 1e-5


@pytest.mark.parametrize(
    "options", [{"variant": "angular", "angle": "atan2"}, {"variant": "infonce_l2"}, {"variant": "l2_repel"}], ids=str
)
def test_distances_of_condensed_vectors_are_accurate_in_float32(options: dict[str, Any]) -> None:
    z = embeddings_of((2, 40, 32), offset=30.0, spread=0.1)  # cosines of 0.99999
    single, double = z.float().requires_grad_(), z.float().double().requires_grad_()
    expected = value_and_gradient(dispersion_loss(double, **options), double)
    actual = value_and_gradient(dispersion_loss(single, **options), single)
    assert relative_difference(actual[0].double(), expected[0]) < 1e-5
    assert relative_difference(actual[1].double(), expected[1]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_has_no_influence(dtype: torch.dtype) -> None:
    z = embeddings_of((2, 20, 32), offset=1.0).to(dtype).requires_grad_()
    expected = value_and_gradient(dispersion_loss(z), z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = value_and_gradient(dispersion_loss(z), z)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("pairs_per_block", [1, 40, 41, 200, 100_000])
def test_blocks_equal_one_sweep(monkeypatch: pytest.MonkeyPatch, pairs_per_block: int) -> None:
    z = embeddings_of((2, 20, 8), offset=1.0).requires_grad_()
    whole = terms_of(z, temperature=1.0, cosine_clamp=0.1, norm_epsilon=0.0)
    _, expected = value_and_gradient(whole.loss.sum(), z)
    monkeypatch.setattr(pair_sums, "_PAIRS_PER_BLOCK", pairs_per_block)
    blocked = terms_of(z, temperature=1.0, cosine_clamp=0.1, norm_epsilon=0.0)
    _, actual = value_and_gradient(blocked.loss.sum(), z)
    for one, other in zip(whole, blocked, strict=True):
        assert relative_difference(other, one) < 1e-14
    assert relative_difference(actual, expected) < 1e-14


def test_order_and_length_of_vectors_do_not_matter() -> None:
    z = embeddings_of((1, 15, 6), offset=0.5)
    lengths = torch.rand(1, 15, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1
    shuffled = (z * lengths)[:, torch.randperm(15, generator=torch.Generator().manual_seed(2))]
    assert dispersion_loss(shuffled).item() == pytest.approx(dispersion_loss(z).item(), rel=1e-13)


def test_second_derivative_is_refused() -> None:
    z = embeddings_of((1, 4, 3)).requires_grad_()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(scale * dispersion_loss(z), z, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_input_is_left_alone() -> None:
    z = embeddings_of((2, 6, 5))
    before = z.clone()
    leaf = z.requires_grad_()
    dispersion_loss(leaf).backward()
    assert torch.equal(z.detach(), before)
