"""The dispersion loss: embeddings in, a scalar with its exact gradient out.

The loss of a set of N embeddings with cosines c_ij is (arXiv 2602.00217):

    D_ij = arccos(clamp(c_ij)) / pi            L = log( 1 / (N (N - 1)) * sum over i != j of exp(-D_ij / tau) )

D is symmetric, so the gradient of one row has a closed form that needs the other rows only as constants:

    dL/du_i = 2 / (S pi tau) * sum_j e_ij / sqrt(1 - c_ij^2) * u_j      with  e = exp(-D / tau),  S = sum e

One sweep over the pairs therefore gives value and gradient together: two matrix products instead of autograd's three,
nothing of size N x N kept for backward and, where ranks share a set, no collective in the backward pass.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

# Pairs held at once by the sweep; past this, columns are taken in blocks. A temporary of 1 Mi float32 pairs is 4 MiB:
# it stays in a processor's cache from step to step (12 % faster than 4 Mi at 4096 embeddings of 1024).
_PAIRS_PER_BLOCK = 1024 * 1024


class DispersionTerms(NamedTuple):
    """Value and statistics of each set; only `loss` carries a gradient."""

    loss: Tensor  # (sets,)
    mean_cosine: (
        Tensor  # (sets,) mean of the unclamped cosine over i != j: the loss is blind beyond the clamp, this is not
    )
    clamped_share: Tensor  # (sets,) share of the pairs i != j whose cosine lies beyond the clamp


def dispersion_loss(
    embeddings: Tensor, *, temperature: float = 1.0, cosine_clamp: float = 0.1, norm_epsilon: float = 0.0
) -> Tensor:
    """Angular dispersion loss of each set of embeddings, averaged over the sets.

    Args:
        embeddings: (sets, tokens, dim), any float type; at least 2 tokens. The mathematics is float32 (float64 stays).
        temperature: tau > 0.
        cosine_clamp: t in [0, 1): cosines are clamped to [-1 + t, 1 - t], straight-through (beyond the band the
            gradient is that of the band's edge).
        norm_epsilon: added to each norm, u = z / (|z| + norm_epsilon); the paper's scripts use 1e-2.

    Returns:
        Scalar, differentiable once.

    Raises:
        ValueError: a shape or a setting out of range.

    Source: arXiv 2602.00217, L_disp; the mean over i != j of its scripts, where the paper prints a sum (a constant
        apart).
    """
    return set_dispersion(
        embeddings, temperature=temperature, cosine_clamp=cosine_clamp, norm_epsilon=norm_epsilon
    ).loss.mean()


def pooled_dispersion_loss(
    embeddings: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    cosine_clamp: float = 0.1,
    norm_epsilon: float = 0.0,
) -> Tensor:
    """Dispersion loss of pools whose embeddings lie on several ranks.

    Args:
        embeddings: (layers, own tokens, dim) of this rank; the same shape on every rank of `group`. A layer's set is
            the union over the ranks, in rank order.
        group: the ranks that share the pool; None: this rank alone.
        temperature, cosine_clamp, norm_epsilon: as in `dispersion_loss`.

    Returns:
        (layers,) the value of the whole pool, equal on all its ranks. The gradient of the own rows is exact when
        gradients are averaged over `group` afterwards, as data parallelism does: own rows carry the factor of the
        group's size.

    Collective: one all-gather and one all-reduce in the forward pass over `group`; none in the backward pass.

    Raises:
        ValueError: a shape or a setting out of range.
    """
    return pooled_dispersion(
        embeddings, group=group, temperature=temperature, cosine_clamp=cosine_clamp, norm_epsilon=norm_epsilon
    ).loss


def set_dispersion(
    embeddings: Tensor, *, temperature: float, cosine_clamp: float, norm_epsilon: float
) -> DispersionTerms:
    """`dispersion_loss` set by set, with statistics. embeddings: (sets, tokens, dim)."""
    return pooled_dispersion(
        embeddings, group=None, temperature=temperature, cosine_clamp=cosine_clamp, norm_epsilon=norm_epsilon
    )


def pooled_dispersion(
    embeddings: Tensor,
    *,
    group: dist.ProcessGroup | None,
    temperature: float,
    cosine_clamp: float,
    norm_epsilon: float,
) -> DispersionTerms:
    """`pooled_dispersion_loss` with statistics. Collective: as there."""
    num_ranks = 1 if group is None else dist.get_world_size(group)
    _check(embeddings, num_ranks, temperature, cosine_clamp, norm_epsilon)
    terms = _PooledAngularDispersion.apply(  # type: ignore[no-untyped-call]
        embeddings, group, temperature, cosine_clamp, norm_epsilon
    )
    return DispersionTerms(*terms)


def _check(embeddings: Tensor, num_ranks: int, temperature: float, cosine_clamp: float, norm_epsilon: float) -> None:
    if embeddings.dim() != 3 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings: got shape {tuple(embeddings.shape)} of {embeddings.dtype}. A floating-point tensor (sets, "
            "tokens, dim) "
            "is needed. Stack the sets in the first dimension."
        )
    if embeddings.shape[1] * num_ranks < 2:
        raise ValueError(
            f"embeddings: a set of {embeddings.shape[1] * num_ranks} embedding has no pair. At least 2 are needed. "
            "Sample more tokens or sequences."
        )
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not allowed. It must be > 0. The paper uses 1.0.")
    if not 0 <= cosine_clamp < 1:
        raise ValueError(f"cosine_clamp: {cosine_clamp} is not allowed. It must lie in [0, 1). The paper uses 0.1.")
    if not norm_epsilon >= 0:
        raise ValueError(f"norm_epsilon: {norm_epsilon} is not allowed. It must be >= 0. The paper's scripts use 1e-2.")


class _PooledAngularDispersion(torch.autograd.Function):
    """The sweep in forward; backward only scales what it left."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        group: dist.ProcessGroup | None,
        temperature: float,
        cosine_clamp: float,
        norm_epsilon: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(embeddings.device.type, enabled=False):
            own, norm = _unit_vectors(embeddings, norm_epsilon)
            if group is None:
                pool, first_row, num_ranks = own, 0, 1
            else:  # gathered in the embeddings' own type: a bf16 model sends half the bytes and loses nothing
                pool, _ = _unit_vectors(_gather_tokens(embeddings, group), norm_epsilon)
                num_ranks = dist.get_world_size(group)
                first_row = dist.get_rank(group) * own.shape[1]
            num_embeddings = pool.shape[1]
            num_pairs = num_embeddings * (num_embeddings - 1)
            sums, gradient = _sweep(own, pool, first_row, temperature, cosine_clamp)
            if group is not None:
                dist.all_reduce(sums, group=group)
            similarity_sum, num_clamped = sums.unbind(0)
            loss = torch.log(similarity_sum / num_pairs)
            own_share = torch.linalg.vector_norm(pool, dim=(1, 2)).square()
            mean_cosine = (pool.sum(1).square().sum(-1) - own_share) / num_pairs
            # dL/du times this factor, which also turns averaging over the pool's ranks into the sum over its rows ...
            scale = (2.0 * num_ranks / (math.pi * temperature) / similarity_sum)[:, None, None]
            # ... and through u = z / (|z| + epsilon): the part along z only feels epsilon
            along = torch.linalg.vecdot(gradient, own).unsqueeze(-1) * (scale / norm)
            gradient.mul_(scale / (norm + norm_epsilon)).addcmul_(own, along, value=-1.0)
            # a vector at the floor of `_unit_vectors` has no direction to turn: 1 / floor would drown all else
            gradient.masked_fill_(norm + norm_epsilon <= _smallest_norm(norm.dtype), 0.0)
        ctx.save_for_backward(gradient)
        ctx.input_dtype = embeddings.dtype
        clamped_share = num_clamped / num_pairs
        ctx.mark_non_differentiable(mean_cosine, clamped_share)
        return loss, mean_cosine, clamped_share

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss[:, None, None]).to(ctx.input_dtype), None, None, None, None


def _unit_vectors(embeddings: Tensor, norm_epsilon: float) -> tuple[Tensor, Tensor]:
    """U = z / (|z| + epsilon) in float32 (float64 stays), and |z| as (..., 1)."""
    z = embeddings.detach()
    z = z if z.dtype == torch.float64 else z.float()
    norm = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(_smallest_norm(z.dtype))
    return z / (norm + norm_epsilon), norm


def _smallest_norm(dtype: torch.dtype) -> float:
    """Below it the square of a norm is no normal number any more."""
    return float(torch.finfo(dtype).tiny ** 0.5)


def _gather_tokens(embeddings: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(layers, n, dim) on each rank -> (layers, ranks * n, dim), ranks in order. Collective: one all-gather."""
    own = embeddings.detach().contiguous()
    num_ranks = dist.get_world_size(group)
    gathered = own.new_empty((num_ranks * own.shape[0], *own.shape[1:]))
    dist.all_gather_into_tensor(gathered, own, group=group)
    by_rank = gathered.view(num_ranks, *own.shape)
    return by_rank.transpose(0, 1).reshape(own.shape[0], num_ranks * own.shape[1], own.shape[2])


def _sweep(own: Tensor, pool: Tensor, first_row: int, temperature: float, cosine_clamp: float) -> tuple[Tensor, Tensor]:
    """All pairs (own row, pool column) but a row with itself.

    Args:
        own: (sets, n, dim) unit vectors, rows first_row ... first_row + n of pool: (sets, N, dim).

    Returns:
        sums (2, sets): sum of exp(-D / tau), and number of pairs beyond the clamp;
        gradient (sets, n, dim): sum over columns of exp(-D / tau) / sqrt(1 - c^2) * u_j.
    """
    num_sets, num_rows, _ = own.shape
    # With no clamp a pair of equal directions has slope infinity; the type's own resolution bounds it.
    edge = 1.0 - max(cosine_clamp, torch.finfo(own.dtype).eps)
    block = max(1, min(pool.shape[1], _PAIRS_PER_BLOCK // max(1, num_sets * num_rows)))
    sums = own.new_zeros(2, num_sets)
    gradient = torch.zeros_like(own)
    for start in range(0, pool.shape[1], block):
        columns = pool[:, start : start + block]
        cosine = torch.bmm(own, columns.transpose(1, 2))
        diagonal = torch.diagonal(cosine, offset=first_row - start, dim1=1, dim2=2)
        diagonal.zero_()  # inside the band, so that a row with itself never counts as clamped
        similarity = cosine.abs()  # the one temporary of the loop, used again below
        sums[1] += similarity.gt_(edge).sum((1, 2))
        cosine.clamp_(-edge, edge)
        torch.acos(cosine, out=similarity).mul_(-1.0 / (math.pi * temperature)).exp_()
        torch.diagonal(similarity, offset=first_row - start, dim1=1, dim2=2).zero_()
        sums[0] += similarity.sum((1, 2))
        similarity.mul_(cosine.square_().neg_().add_(1.0).rsqrt_())
        gradient.baddbmm_(similarity, columns)
    return sums, gradient
