"""The dispersion loss and its alternatives: embeddings in, a scalar with its exact gradient out.

The loss of a set of N embeddings with cosines c_ij is (arXiv 2602.00217):

    D_ij = arccos(clamp(c_ij)) / pi            L = log( 1 / (N (N - 1)) * sum over i != j of exp(-D_ij / tau) )

Every variant here is such a sum over pairs: `VARIANTS` holds what a pair contributes, pair_sums.py sums it up, and its
gradient. Any other function of a set can be added to the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dispersion_pretrain import heartbeat
from dispersion_pretrain.pair_sums import (
    DispersionOptions,
    PairSum,
    PairSumLoss,
    Pool,
    edge_of_clamp,
    without_rounding,
)

# ---- what a pair contributes


def angular(cosine: Tensor, options: DispersionOptions) -> tuple[Tensor, Tensor]:
    """Give f = -D / tau and df/dc, beyond the clamp that of its edge. Source: arXiv 2602.00217, L_disp."""
    clamped, rate = _clamp(cosine, options), 1.0 / (math.pi * options.temperature)
    return torch.acos(clamped) * -rate, torch.rsqrt(1.0 - clamped.square()) * rate


def angular_atan2(q: Tensor, a: Tensor, options: DispersionOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Give f = -D / tau with D = 2 atan2(|u - v|, |u + v|) / pi, df/dq, df/da."""
    angle, by_q, by_a = _angle(q, a)
    rate = -1.0 / (math.pi * options.temperature)
    return angle * rate, by_q * rate, by_a * rate


def orthogonalization(cosine: Tensor, options: DispersionOptions) -> tuple[Tensor, Tensor]:
    """Give f = max(0, margin - D)^2 and df/dc. Source: arXiv 2602.00217, where the margin is 1/2."""
    clamped = _clamp(cosine, options)
    short = (options.margin - torch.acos(clamped) / math.pi).clamp_min(0.0)
    return short.square(), short * torch.rsqrt(1.0 - clamped.square()) * (2.0 / math.pi)


def orthogonalization_atan2(q: Tensor, a: Tensor, options: DispersionOptions) -> tuple[Tensor, Tensor, Tensor]:
    """The same with D from atan2; df/dq, df/da."""
    angle, by_q, by_a = _angle(q, a)
    short = (options.margin - angle / math.pi).clamp_min(0.0)
    rate = short * (-2.0 / math.pi)
    return short.square(), by_q * rate, by_a * rate


def infonce_cosine(cosine: Tensor, options: DispersionOptions) -> tuple[Tensor, Tensor]:
    """Give f = c / tau and df/dc. Source: arXiv 2506.09027, InfoNCE with the cosine dissimilarity, i != j only."""
    return cosine / options.temperature, torch.full_like(cosine, 1.0 / options.temperature)


def infonce_l2(q: Tensor, a: Tensor, options: DispersionOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Give f = -|z_i - z_j|^2 / tau, df/dq, df/da. Source: arXiv 2506.09027, InfoNCE with squared l2, i != j only."""
    return q / -options.temperature, torch.full_like(q, -1.0 / options.temperature), torch.zeros_like(q)


def decorrelation(correlation: Tensor, options: DispersionOptions) -> tuple[Tensor, Tensor]:
    """Give f = Cov_ij^2 and its slope; of vectors standardised over features it is their correlation.

    Source: arXiv 2602.00217; `norm_epsilon` is added to the norm of the centred vector.
    """
    return correlation.square(), 2.0 * correlation


def _clamp(cosine: Tensor, options: DispersionOptions) -> Tensor:
    edge = edge_of_clamp(options, cosine.dtype)
    return cosine.clamp(-edge, edge)


def _angle(q: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2 atan2(|u - v|, |u + v|) with q = |u - v|^2, a = |u|^2 + |v|^2, so |u + v|^2 = 2 a - q; by q; by a."""
    together = without_rounding(2.0 * a - q, a)
    product = q * together
    # Equal and opposite vectors have no direction in which to turn; vectors without direction are at a right angle.
    slope = torch.where(product == 0, torch.zeros_like(q), torch.rsqrt(product))
    is_nowhere = a <= torch.finfo(a.dtype).tiny
    angle = torch.where(is_nowhere, math.pi / 2, 2.0 * torch.atan2(q.sqrt(), together.sqrt()))
    return angle, slope, torch.where(is_nowhere, torch.zeros_like(q), -q / a * slope)


# A variant is a sum over pairs, or any function (sets, tokens, dim) float32 -> (sets,) that autograd understands.
VARIANTS: dict[str, PairSum | Callable[[Tensor, DispersionOptions], Tensor]] = {
    "angular": PairSum(angular, of="cosine", vectors="unit", logarithm=True, has_clamp=True, has_kernel=True),
    "decorrelation": PairSum(decorrelation, of="cosine", vectors="standardised", logarithm=False),
    "l2_repel": PairSum(
        infonce_l2, of="distance", vectors="raw", logarithm=True, ignores_origin=True, penalizes_norms=True
    ),
    "orthogonalization": PairSum(orthogonalization, of="cosine", vectors="unit", logarithm=False, has_clamp=True),
    "infonce_cosine": PairSum(infonce_cosine, of="cosine", vectors="unit", logarithm=True),
    "infonce_l2": PairSum(infonce_l2, of="distance", vectors="raw", logarithm=True, ignores_origin=True),
}
_WITH_ATAN2 = {
    "angular": PairSum(angular_atan2, of="distance", vectors="unit", logarithm=True),
    "orthogonalization": PairSum(orthogonalization_atan2, of="distance", vectors="unit", logarithm=False),
}


# ---- losses


class DispersionTerms(NamedTuple):
    """Value and statistics of each set; only `loss` carries a gradient."""

    loss: Tensor  # (sets,)
    mean_cosine: Tensor  # (sets,) of the unclamped cosine over i != j: the loss is blind beyond the clamp, this is not
    clamped_share: Tensor  # (sets,) share of the pairs i != j beyond the clamp; 0 for variants without one


def dispersion_loss(
    embeddings: Tensor,
    *,
    variant: str = "angular",
    temperature: float = 1.0,
    cosine_clamp: float = 0.1,
    angle: Literal["arccos", "atan2"] = "arccos",
    margin: float = 0.5,
    norm_weight: float = 0.1,
    norm_epsilon: float = 0.0,
) -> Tensor:
    """Dispersion loss of each set of embeddings, averaged over the sets.

    Args:
        embeddings: (sets, tokens, dim), any float type; at least 2 tokens. The mathematics is float32 (float64 stays).
            A vector of length 0 has no direction: it counts as at a right angle to all others, and gets no gradient.
            One that is not finite makes the loss NaN.
        variant: an entry of `VARIANTS`.
        temperature: tau > 0, of the variants with an exponential.
        cosine_clamp: t in [0, 1): angular and orthogonalization clamp cosines to [-1 + t, 1 - t], straight-through
            (beyond the band the gradient is that of the band's edge).
        angle: of angular and orthogonalization. "atan2" computes 2 atan2(|u - v|, |u + v|), without a clamp: its
            gradient does not fade as embeddings align. In float32 it resolves angles down to about a thousandth of
            the set's spread; closer pairs, equal ones among them, count as equal and push nowhere.
        margin: of orthogonalization, in (0, 1]: pairs with D < margin are pushed apart.
        norm_weight: of l2_repel, >= 0: weight of the mean square of all coordinates.
        norm_epsilon: added to each norm, u = z / (|z| + norm_epsilon); the paper's scripts use 1e-2. infonce_l2 and
            l2_repel take no norms.

    Returns:
        Scalar, differentiable once.

    Raises:
        ValueError: a shape or a setting out of range, an unknown variant.

    Source: arXiv 2602.00217; means over i != j as in its scripts, where the paper prints sums (a constant apart), and
        nothing is added inside the logarithm.
    """
    options = DispersionOptions(variant, temperature, cosine_clamp, angle, margin, norm_weight, norm_epsilon)
    return pooled_dispersion(embeddings, group=None, options=options).loss.mean()


def pooled_dispersion_loss(
    embeddings: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    variant: str = "angular",
    temperature: float = 1.0,
    cosine_clamp: float = 0.1,
    angle: Literal["arccos", "atan2"] = "arccos",
    margin: float = 0.5,
    norm_weight: float = 0.1,
    norm_epsilon: float = 0.0,
) -> Tensor:
    """Dispersion loss of pools whose embeddings lie on several ranks.

    Args:
        embeddings: (layers, own tokens, dim) of this rank; the same shape and type on every rank of `group`, which is
            not compared (it would cost another collective). A layer's set is the union over the ranks, in rank order.
        group: the ranks that share the pool; None: this rank alone.
        variant, temperature, cosine_clamp, angle, margin, norm_weight, norm_epsilon: as in `dispersion_loss`.

    Returns:
        (layers,) the value of the whole pool, equal on all its ranks. The gradient of the own rows is exact when
        gradients are averaged over `group` afterwards, as data parallelism does: own rows carry the factor of the
        group's size.

    Collective: over `group` in the forward pass one all-gather and one all-reduce (none for a variant that is no sum
        over pairs); none in the backward pass.

    Raises:
        ValueError: a shape or a setting out of range, an unknown variant.
    """
    options = DispersionOptions(variant, temperature, cosine_clamp, angle, margin, norm_weight, norm_epsilon)
    return pooled_dispersion(embeddings, group=group, options=options).loss


def pooled_dispersion(
    embeddings: Tensor, *, group: dist.ProcessGroup | None, options: DispersionOptions
) -> DispersionTerms:
    """`pooled_dispersion_loss` with statistics. Collective: as there."""
    num_ranks = 1 if group is None else dist.get_world_size(group)
    if num_ranks < 1:
        raise ValueError("group: this rank is no member of it. Only its members may call. Pass the group of this rank.")
    _check_embeddings(embeddings, num_ranks)
    variant = checked_variant(options)
    pool = Pool.of(embeddings if group is None else _gather_tokens(embeddings, group), options.norm_epsilon)
    if not isinstance(variant, PairSum):
        loss = _of_set(embeddings, pool, group, variant, options)
        return DispersionTerms(loss, mean_cosine(pool), torch.zeros_like(loss.detach()))
    loss, clamped_share, mean_product = PairSumLoss.apply(  # type: ignore[no-untyped-call]
        embeddings, pool, group, variant, options
    )
    if variant.penalizes_norms:
        loss = loss + options.norm_weight * _mean_square(embeddings, pool, num_ranks)
    return DispersionTerms(loss, mean_product if variant.vectors == "unit" else mean_cosine(pool), clamped_share)


def checked_variant(options: DispersionOptions) -> PairSum | Callable[[Tensor, DispersionOptions], Tensor]:
    """What computes the loss of `options`; raises ValueError for an unknown name or an option out of range."""
    known = ", ".join(VARIANTS)
    if not isinstance(options.variant, str) or options.variant not in VARIANTS:
        raise ValueError(
            f"variant: {options.variant!r} is not known. The entries of dispersion.VARIANTS are allowed: {known}. "
            "Correct the name, or add the entry before the run starts."
        )
    if options.angle not in ("arccos", "atan2"):
        raise ValueError(f"angle: {options.angle!r} is not known. arccos and atan2 are allowed. Choose one of them.")
    if options.angle == "atan2" and options.variant not in _WITH_ATAN2:
        raise ValueError(
            f"angle: atan2 has no meaning for {options.variant}, which takes no angles. {' and '.join(_WITH_ATAN2)} "
            "do. Leave angle out."
        )
    for name, (is_allowed, rule, hint) in _RANGES.items():
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}: {value!r} is no number. It must be one {rule}. {hint}.")
        if not (math.isfinite(value) and is_allowed(value)):
            raise ValueError(f"{name}: {value} is not allowed. It must be {rule}. {hint}.")
    return _WITH_ATAN2[options.variant] if options.angle == "atan2" else VARIANTS[options.variant]


_SMALLEST_TEMPERATURE = 1e-30  # its reciprocal is a float32 number, with room for what it multiplies
_RANGES: dict[str, tuple[Callable[[float], bool], str, str]] = {
    "temperature": (lambda value: value >= _SMALLEST_TEMPERATURE, "> 0 (at least 1e-30)", "The paper uses 1.0"),
    "cosine_clamp": (lambda value: 0 <= value < 1, "in [0, 1)", "The paper uses 0.1"),
    "margin": (lambda value: 0 < value <= 1, "in (0, 1]", "The paper uses 0.5"),
    "norm_weight": (lambda value: value >= 0, ">= 0", "The paper uses 0.1"),
    "norm_epsilon": (lambda value: value >= 0, ">= 0", "The paper's scripts use 1e-2"),
}


def check_own_pair_sum(options: DispersionOptions) -> None:
    """Refuse an entry of `VARIANTS` whose fields are unknown, or whose slopes are not those of its values.

    Both are compared in float64 at pairs within reach of unit vectors. Where the values are flat, as beyond a clamp,
    any slope is allowed, unless they are flat everywhere.

    Raises:
        ValueError: it is wrong.
    """
    pair = checked_variant(options)
    if not isinstance(pair, PairSum):
        return
    place = f"variant {options.variant}"
    for name, allowed in (("of", ("cosine", "distance")), ("vectors", ("unit", "standardised", "raw"))):
        found = getattr(pair, name)
        if found not in allowed:
            raise ValueError(
                f"{place}: {name} is {found!r}. One of {', '.join(allowed)} is allowed. Correct the entry."
            )
    spread = torch.linspace(-0.97, 0.97, 64, dtype=torch.float64).view(1, 8, 8)
    points = [spread] if pair.of == "cosine" else [1.0 - spread, 2.0 + 0.3 * spread.transpose(1, 2)]
    with torch.enable_grad():
        leaves = [point.clone().requires_grad_() for point in points]
        terms = pair.terms(*leaves, options)
        if not (isinstance(terms, tuple) and len(terms) == 1 + len(leaves)):
            got = f"{len(terms)} tensors" if isinstance(terms, tuple) else type(terms).__name__
            raise ValueError(
                f"{place}: terms returned {got}. A tuple of {1 + len(leaves)} tensors is needed: the values, and the "
                f"slope by each argument."
            )
        expected = torch.autograd.grad(terms[0].sum(), leaves, allow_unused=True, materialize_grads=True)
    for number, (slope, known) in enumerate(zip(terms[1:], expected, strict=True), 1):
        is_known = known != 0 if known.any() else torch.ones_like(known, dtype=torch.bool)
        wrong = (is_known & ~torch.isclose(slope.detach(), known, rtol=1e-6, atol=1e-9)).nonzero()
        if len(wrong):
            at = tuple(wrong[0].tolist())
            arguments = ", ".join(f"{point[at].item():.4g}" for point in points)
            raise ValueError(
                f"{place}: slope {number} of terms is {slope[at].item():.6g} at {arguments}, where its values have "
                f"{known[at].item():.6g}. Slopes must be derivatives of the values. Correct the formula."
            )


def _check_embeddings(embeddings: Tensor, num_ranks: int) -> None:
    if not isinstance(embeddings, Tensor):
        raise ValueError(
            f"embeddings: got a {type(embeddings).__name__}. One tensor (sets, tokens, dim) is needed. Stack sets of "
            "one shape, and call once for each shape."
        )
    if embeddings.dim() != 3 or not embeddings.is_floating_point() or 0 in (embeddings.shape[0], embeddings.shape[-1]):
        raise ValueError(
            f"embeddings: got shape {tuple(embeddings.shape)} of {embeddings.dtype}. A floating-point tensor (sets, "
            "tokens, dim) with at least one set and one dimension is needed. Stack the sets in the first dimension."
        )
    num_tokens = embeddings.shape[1] * num_ranks
    if num_tokens < 2:
        raise ValueError(
            f"embeddings: a set of {num_tokens} embedding has no pair. At least 2 are needed. Sample more tokens or "
            "sequences."
        )


def _gather_tokens(embeddings: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(layers, n, dim) on each rank -> (layers, ranks * n, dim), ranks in order, in the embeddings' own type.

    Collective: one all-gather. A bf16 model sends half the bytes and loses nothing.
    """
    own = embeddings.detach().contiguous()
    num_ranks = dist.get_world_size(group)
    gathered = own.new_empty((num_ranks * own.shape[0], *own.shape[1:]))
    with heartbeat.inside("the pool's all-gather"):
        dist.all_gather_into_tensor(gathered, own, group=group)
    by_rank = gathered.view(num_ranks, *own.shape)
    return by_rank.transpose(0, 1).reshape(own.shape[0], num_ranks * own.shape[1], own.shape[2])


def _of_set(
    embeddings: Tensor,
    pool: Pool,
    group: dist.ProcessGroup | None,
    function: Callable[[Tensor, DispersionOptions], Tensor],
    options: DispersionOptions,
) -> Tensor:
    """Value (sets,) of any function of the whole pool: every rank computes it, with its own rows alive."""
    with torch.autocast(embeddings.device.type, enabled=False):
        own = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
        if group is not None:
            num_ranks, first = dist.get_world_size(group), dist.get_rank(group) * own.shape[1]
            if own.requires_grad:
                own = own.clone()
                # averaging over ranks divides by their number
                own.register_hook(lambda gradient: gradient * num_ranks)  # type: ignore[no-untyped-call]
            own = torch.cat([pool.z[:, :first], own, pool.z[:, first + own.shape[1] :]], dim=1)
        values = function(own, options)
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape != embeddings.shape[:1]:
        got = type(values).__name__
        if isinstance(values, Tensor):
            got = f"shape {tuple(values.shape)}" + ("" if values.is_floating_point() else f" of {values.dtype}")
        raise ValueError(
            f"variant {options.variant}: returned {got} for {embeddings.shape[0]} sets. One floating-point value a set "
            "is needed. Reduce over tokens and features only."
        )
    return values


def _mean_square(embeddings: Tensor, pool: Pool, num_ranks: int) -> Tensor:
    """(sets,) mean of z^2 over the pool, with the gradient of the own rows as `PairSumLoss` scales it."""
    value = pool.z.square().mean((1, 2))
    own = embeddings.to(value.dtype).square().sum((1, 2)) * (num_ranks / pool.z[0].numel())
    return value + (own - own.detach())


def mean_cosine(pool: Pool) -> Tensor:
    """(sets,) mean of the unclamped cosine over i != j, in one pass over the vectors; without a gradient."""
    num_tokens = pool.z.shape[1]
    with torch.autocast(pool.z.device.type, enabled=False):
        together = torch.bmm(pool.scale.unsqueeze(1), pool.z).squeeze(1).square().sum(-1)
    return (together - (pool.scale * pool.norm).square().sum(1)) / (num_tokens * (num_tokens - 1))
