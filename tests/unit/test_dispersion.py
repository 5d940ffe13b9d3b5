"""The dispersion loss as its callers see it: known values, statistics, errors."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any

import pytest
import torch

from dispersion_pretrain.config import DispersionSettings
from dispersion_pretrain.dispersion import (
    DispersionTerms,
    dispersion_loss,
    pooled_dispersion,
    pooled_dispersion_loss,
)
from dispersion_pretrain.pair_sums import DispersionOptions


def terms_of(embeddings: torch.Tensor, cosine_clamp: float = 0.1) -> DispersionTerms:
    return pooled_dispersion(embeddings, group=None, options=DispersionOptions(cosine_clamp=cosine_clamp))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_orthogonal_vectors_are_half_a_turn_apart(temperature: float) -> None:
    loss = dispersion_loss(torch.eye(5)[None], temperature=temperature)
    assert loss.item() == pytest.approx(-0.5 / temperature, rel=1e-6)


@pytest.mark.parametrize("clamp", [0.05, 0.1, 0.5])
def test_the_value_saturates_at_the_clamp(clamp: float) -> None:
    identical = torch.ones(1, 4, 3)
    opposite = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    nearest = math.acos(1 - clamp) / math.pi
    assert dispersion_loss(identical, cosine_clamp=clamp).item() == pytest.approx(-nearest, rel=1e-5)
    assert dispersion_loss(opposite, cosine_clamp=clamp).item() == pytest.approx(-(1 - nearest), rel=1e-5)


def test_condensed_sets_cost_more_than_spread_ones() -> None:
    noise = torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(0))
    losses = [dispersion_loss(offset + noise).item() for offset in (0.0, 0.5, 1.0, 2.0)]
    assert losses == sorted(losses)


def test_norm_epsilon_shortens_vectors() -> None:
    pair = torch.tensor([[[3.0, 4.0], [5.0, 0.0]]])  # both of norm 5, cosine 0.6
    shortened = 0.6 * (5 / 6) ** 2
    expected = -math.acos(shortened) / math.pi
    assert dispersion_loss(pair, norm_epsilon=1.0).item() == pytest.approx(expected, rel=1e-5)


def test_loss_is_the_mean_over_sets_and_terms_keep_them_apart() -> None:
    sets = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    each = torch.stack([dispersion_loss(one[None]) for one in sets])
    assert torch.allclose(pooled_dispersion_loss(sets), each)
    assert torch.allclose(terms_of(sets).loss, each)
    assert dispersion_loss(sets).item() == pytest.approx(each.mean().item())
    assert dispersion_loss(sets).shape == ()


def test_mean_cosine_is_unclamped_and_leaves_the_diagonal_out() -> None:
    sets = 1.0 + torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(2))
    unit = torch.nn.functional.normalize(sets, dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    expected = torch.stack([one[~torch.eye(9, dtype=torch.bool)].mean() for one in cosine])
    assert torch.allclose(terms_of(sets, cosine_clamp=0.9).mean_cosine, expected, rtol=1e-5)


def test_clamped_share_counts_both_ends_and_leaves_the_diagonal_out() -> None:
    x, y = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]
    opposite = [-1.0, 0.0, 0.0]
    sets = torch.tensor([[x, x, y, opposite], [x, y, [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]])
    # first set: pairs x-x, and each x with the opposite: 3 of 6
    assert terms_of(sets).clamped_share.tolist() == pytest.approx([0.5, 0.0])


def test_only_the_loss_carries_a_gradient() -> None:
    embeddings = torch.randn(2, 4, 3, requires_grad=True)
    terms = terms_of(embeddings)
    assert terms.loss.requires_grad
    assert not terms.mean_cosine.requires_grad
    assert not terms.clamped_share.requires_grad
    assert not dispersion_loss(embeddings.detach()).requires_grad


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.zeros(4, 3), r"shape \(4, 3\)"),
        (torch.zeros(2, 4, 3, dtype=torch.int64), "int64"),
        (torch.zeros(2, 1, 3), "a set of 1 embedding has no pair"),
        (torch.zeros(2, 0, 3), "a set of 0 embedding has no pair"),
        ([torch.zeros(2, 3), torch.zeros(2, 4)], r"got a list\. One tensor \(sets, tokens, dim\).* Stack sets of"),
        (torch.zeros(0, 4, 3), r"shape \(0, 4, 3\)"),
        (torch.zeros(2, 4, 0), r"shape \(2, 4, 0\)"),
    ],
)
def test_wrong_tensors_are_refused(embeddings: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^embeddings: .*{message}"):
        dispersion_loss(embeddings)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("cosine_clamp", -0.1),
        ("cosine_clamp", 1.0),
        ("cosine_clamp", math.nan),
        ("temperature", math.inf),
        ("margin", 0.0),
        ("margin", 1.5),
        ("norm_weight", -0.1),
        ("norm_weight", math.inf),
        ("norm_epsilon", -1e-3),
        ("norm_epsilon", math.nan),
    ],
)
def test_settings_out_of_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{key}: {value} is not allowed"):
        dispersion_loss(torch.ones(1, 3, 2), **{key: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", "1"), ("temperature", None), ("temperature", True), ("cosine_clamp", "0.1"), ("margin", [1])],
)
def test_settings_that_are_no_numbers_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{key}: {re.escape(repr(value))} is no number"):
        dispersion_loss(torch.ones(1, 3, 2), **{key: value})


def test_a_temperature_without_a_reciprocal_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^temperature: 1e-40 is not allowed. It must be > 0 \(at least 1e-30\)"):
        dispersion_loss(torch.ones(1, 3, 2), temperature=1e-40)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    sets = torch.ones(1, 3, 2)
    with pytest.raises(ValueError, match=r"^variant: 'angualr' is not known\. .*angular, decorrelation, l2_repel"):
        dispersion_loss(sets, variant="angualr")
    with pytest.raises(ValueError, match=r"^angle: 'arcsin' is not known\. arccos and atan2 are allowed"):
        dispersion_loss(sets, angle="arcsin")  # type: ignore[arg-type]


@pytest.mark.parametrize("variant", ["decorrelation", "l2_repel", "infonce_cosine", "infonce_l2"])
def test_atan2_is_refused_where_there_are_no_angles(variant: str) -> None:
    with pytest.raises(ValueError, match=f"^angle: atan2 has no meaning for {variant}"):
        dispersion_loss(torch.ones(1, 3, 2), variant=variant, angle="atan2")


# Worked out by hand: two pairs of vectors, one at 60 degrees and one at a right angle.
SIXTY = torch.tensor([[[2.0, 0.0], [1.0, math.sqrt(3.0)]]])
RIGHT = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])


@pytest.mark.parametrize(
    ("options", "sixty", "right"),
    [
        ({"variant": "angular"}, -1 / 3, -1 / 2),
        ({"variant": "angular", "angle": "atan2", "temperature": 0.5}, -2 / 3, -1.0),
        ({"variant": "orthogonalization"}, (1 / 6) ** 2, 0.0),
        ({"variant": "orthogonalization", "angle": "atan2", "margin": 0.75}, (5 / 12) ** 2, (1 / 4) ** 2),
        ({"variant": "infonce_cosine", "temperature": 0.5}, 1.0, 0.0),
        ({"variant": "infonce_l2"}, -4.0, -10.0),
        ({"variant": "infonce_l2", "temperature": 0.01}, -400.0, -1000.0),  # exp of it is no float32
        ({"variant": "l2_repel", "norm_weight": 0.5}, -4.0 + 0.5 * 8 / 4, -10.0 + 0.5 * 10 / 4),
        ({"variant": "decorrelation"}, 1.0, 1.0),  # two features: all there is after centring is a sign
    ],
    ids=str,
)
def test_known_values(options: dict[str, Any], sixty: float, right: float) -> None:
    assert dispersion_loss(SIXTY, **options).item() == pytest.approx(sixty, abs=1e-5)
    assert dispersion_loss(RIGHT, **options).item() == pytest.approx(right, rel=1e-5, abs=1e-5)


def test_decorrelation_is_the_squared_correlation_of_standardised_tokens() -> None:
    sets = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3)) * 3 + 1
    correlation = torch.stack([torch.corrcoef(one) for one in sets])
    expected = correlation[:, ~torch.eye(5, dtype=torch.bool)].square().mean()
    assert dispersion_loss(sets, variant="decorrelation").item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_of_atan2_does_not_fade_where_the_clamp_makes_it() -> None:
    generator = torch.Generator().manual_seed(0)
    common, noise = torch.randn(8, generator=generator), torch.randn(1, 12, 8, generator=generator)
    norms = {}
    for angle in ("arccos", "atan2"):
        for spread in (0.3, 0.01):
            leaf = (common + spread * noise).requires_grad_()
            (gradient,) = torch.autograd.grad(dispersion_loss(leaf, angle=angle), leaf)
            norms[angle, spread] = gradient.norm().item()
    assert norms["atan2", 0.01] > 0.7 * norms["atan2", 0.3]
    assert norms["arccos", 0.01] < 0.2 * norms["arccos", 0.3]


def test_defaults_are_the_same_everywhere() -> None:
    of_options = DispersionOptions()._asdict()
    settings = DispersionSettings()
    assert {name: getattr(settings, name) for name in of_options} == of_options
    for function in (dispersion_loss, pooled_dispersion_loss):
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in of_options} == of_options
