"""Losses that are sums over the pairs of a set: value and exact gradient in one sweep.

For vectors x_i = r_i z_i and a symmetric pair function f(i, j) of their inner product and lengths, the sum
S = sum over i != j of f(i, j) holds every sample twice, as i and as j, with the same derivative. The gradient of one
row therefore needs the others only as constants, and it is one matrix product:

    dS/dz_i = 2 sum_j A_ij z_j      A_ij = r_i r_j df/dc_ij,   A_ii from the lengths and from x = z / |z|

So ranks that share a set gather it once, each sweeps its own rows, and no collective is left for the backward pass.
Two matrix products instead of autograd's three, and nothing larger than the embeddings kept for backward.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dispersion_pretrain import angular_kernel, heartbeat

# Pairs held at once by the sweep. A temporary of 1 Mi float32 pairs is 4 MiB: it stays in a processor's cache from
# step to step (12 % faster than 4 Mi at 4096 embeddings of 1024).
_PAIRS_PER_BLOCK = 1024 * 1024
# On a GPU a block is a dozen kernel launches, and a temporary of 64 MiB is little of its memory.
_PAIRS_PER_GPU_BLOCK = 16 * _PAIRS_PER_BLOCK
# Rows of a block are a multiple of this, so that the compiled sweep's tiles do not straddle blocks.
_ROW_MULTIPLE = 64
# From so many pairs on, a quarter of the inner products saved is worth a second matrix product and a second sweep. One
# of each takes 0.93 of the time of two at 4 sets of 256 (width 1,024), as long at 8 and 1.11 of it at 12 (width 768).
_PAIRS_WORTH_SAVING = 512 * 1024


class DispersionOptions(NamedTuple):
    """Settings of a loss, as `dispersion.dispersion_loss` explains them."""

    variant: str = "angular"
    temperature: float = 1.0
    cosine_clamp: float = 0.1
    angle: Literal["arccos", "atan2"] = "arccos"
    margin: float = 0.5
    norm_weight: float = 0.1
    norm_epsilon: float = 0.0


class PairSum(NamedTuple):
    """A variant whose loss is a mean, or the logarithm of a mean of exponentials, over pairs i != j."""

    # Of cosines, or inner products of raw vectors: terms(c, options) -> f, df/dc. Of squared distances: terms(q, a,
    # options) -> f, df/dq, df/da with q = |x_i - x_j|^2 and a = |x_i|^2 + |x_j|^2. All elementwise, float32 or float64,
    # (sets, rows, columns).
    terms: Callable[..., tuple[Tensor, ...]]
    of: Literal["cosine", "distance"]
    # unit: x = z / (|z| + epsilon); standardised: the same after each z has lost its mean over features; raw: x = z.
    vectors: Literal["unit", "standardised", "raw"]
    logarithm: bool  # the loss is log mean exp(f) rather than mean f
    ignores_origin: bool = False  # f is of q alone: raw vectors are taken from their mean, where they round less
    has_clamp: bool = False  # f clamps cosines at `edge_of_clamp`
    has_kernel: bool = False  # `angular_kernel` computes it on CPUs in float32
    penalizes_norms: bool = False  # norm_weight x mean square is added


class Pool(NamedTuple):
    """The embeddings of all ranks that share a pool, outside autograd; float32, or float64."""

    z: Tensor  # (sets, N, dim)
    scale: Tensor  # (sets, N) 1 / (|z| + epsilon); 0 for a vector so short that it has no direction
    norm: Tensor  # (sets, N) |z|, at least the square root of the smallest number
    norm_epsilon: float

    @classmethod
    def of(cls, embeddings: Tensor, norm_epsilon: float) -> Pool:
        """Make a pool of (sets, N, dim) of any float type."""
        z = in_full_precision(embeddings)
        return cls(z, *_unit_scale(z, norm_epsilon), norm_epsilon)


class PairSumLoss(torch.autograd.Function):
    """The sweep in forward; backward scales what it left, the gradient or the weights of its last product."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        pool: Pool,
        group: dist.ProcessGroup | None,
        pair: PairSum,
        options: DispersionOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Value of each set, the share of its pairs beyond the clamp, and their mean inner product x_i . x_j.

        Args:
            embeddings: (sets, n, dim) of this rank.
            pool: those of all ranks of `group` in order, the same numbers everywhere.

        Returns:
            Three of (sets,), equal on all ranks of the group; only the first is differentiable.

        Collective: one all-reduce over `group`.
        """
        num_ranks = 1 if group is None else dist.get_world_size(group)
        num_rows, num_embeddings = embeddings.shape[1], pool.z.shape[1]
        first_row = 0 if group is None else dist.get_rank(group) * num_rows
        num_pairs = num_embeddings * (num_embeddings - 1)
        with torch.autocast(embeddings.device.type, enabled=False):
            vectors = _prepare(pool, pair)
            sweep = _angular_sweep if _runs_kernel(pair, vectors, options) else _sweep
            found = sweep(vectors, slice(first_row, first_row + num_rows), pair, options)
            own = torch.stack([found.value, found.clamped, found.product])
            over_ranks = _over_ranks(own, group, pair.logarithm)
            total, of_pairs = over_ranks[0], over_ranks[1:]
            if pair.logarithm:
                loss = total - math.log(num_pairs)  # in float64: both are near 10, and their difference below 1
                factor = torch.exp(found.shift - total[:, None]).to(pool.z.dtype)
            else:
                loss = total / num_pairs
                factor = torch.full_like(found.shift, 1.0 / num_pairs)
        # 2: a sample is i and j. num_ranks: averaging over the pool's ranks becomes the sum over its rows.
        factor = factor.mul_(2.0 * num_ranks).unsqueeze(-1)
        ctx.save_for_backward(factor, *([found.gradient] if found.weights is None else [found.weights, embeddings]))
        ctx.input_dtype = embeddings.dtype
        clamped_share, mean_product = (of_pairs / num_pairs).to(pool.z.dtype).unbind(0)
        ctx.mark_non_differentiable(clamped_share, mean_product)
        return loss.to(pool.z.dtype), clamped_share, mean_product

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the own rows."""
        factor, kept, *embeddings = ctx.saved_tensors
        with torch.autocast(kept.device.type, enabled=False):
            factor = factor * grad_loss[:, None, None]
            if embeddings:  # scaled after the product, as elsewhere, so that a pool's layout changes no rounding
                gradient = torch.bmm(kept, in_full_precision(embeddings[0])).mul_(factor)
            else:
                gradient = kept * factor
        return gradient.to(ctx.input_dtype), None, None, None, None


def _over_ranks(own: Tensor, group: dist.ProcessGroup | None, logarithm: bool) -> Tensor:
    """Add the rows of (numbers, sets) over the ranks; the first row is a logarithm if `logarithm`.

    Collective: one all-reduce. Each rank fills a place of its own with zeros elsewhere: a sum of logarithms would
    need their maximum first, another round.
    """
    if group is None:
        return own
    places = own.new_zeros(dist.get_world_size(group), *own.shape)
    places[dist.get_rank(group)] = own
    with heartbeat.inside("the pool's all-reduce"):
        dist.all_reduce(places, group=group)
    total = places[:, 0].logsumexp(0) if logarithm else places[:, 0].sum(0)
    return torch.cat([total[None], places[:, 1:].sum(0)])


# ---- vectors


class _Vectors(NamedTuple):
    """A pool made ready: what inner products are taken of, and what the gradient is a combination of."""

    basis: Tensor  # (sets, N, dim) z
    points: Tensor  # (sets, N, dim) whose inner products are taken; often z
    scale: Tensor  # (sets, N) r
    along: Tensor  # (sets, N) r / |z|: what x = r z takes off along z; 0 for raw vectors
    square: Tensor  # (sets, N) |point|^2
    size: Tensor  # (sets, N) |x|^2


def _unit_scale(z: Tensor, norm_epsilon: float) -> tuple[Tensor, Tensor]:
    """R = 1 / (|z| + epsilon), and |z|, both (..., tokens). r is 0 for a vector so short that it has no direction."""
    norm = torch.linalg.vector_norm(z, dim=-1)
    smallest = torch.finfo(z.dtype).tiny ** 0.5  # below it the square of a norm is no normal number any more
    length = norm + norm_epsilon if norm_epsilon else norm
    return length.reciprocal().masked_fill_(length <= smallest, 0.0), norm.clamp_min(smallest)


def in_full_precision(embeddings: Tensor) -> Tensor:
    """Float32 outside autograd; float64 stays."""
    z = embeddings.detach()
    return z if z.dtype == torch.float64 else z.float()


def _prepare(pool: Pool, pair: PairSum) -> _Vectors:
    z, scale, norm, epsilon = pool
    if pair.vectors == "raw":
        z = z - z.mean(1, keepdim=True) if pair.ignores_origin else z
        square = z.square().sum(-1)
        return _Vectors(z, z, torch.ones_like(square), torch.zeros_like(square), square, square)
    if pair.vectors == "standardised":  # a combination of centred vectors is centred: so is the gradient as it comes
        z = z - z.mean(-1, keepdim=True)
        scale, norm = _unit_scale(z, epsilon)
    size = (scale * norm).square()
    if pair.of == "cosine":
        return _Vectors(z, z, scale, scale / norm, size, size)
    points = z * scale.unsqueeze(-1)
    points = points - points.mean(1, keepdim=True)
    return _Vectors(z, points, scale, scale / norm, points.square().sum(-1), size)


# ---- the sweep in PyTorch


class _Found(NamedTuple):
    value: Tensor  # (sets,) float64: sum of f over own pairs, or logarithm of that of exp(f)
    shift: Tensor  # (sets, n), or (sets, 1) for all rows alike: the row's gradient is to be multiplied by exp(shift)
    clamped: Tensor  # (sets,) float64: own pairs beyond the clamp
    product: Tensor  # (sets,) float64: sum of x_i . x_j over own pairs
    # Half of dS/dz, or of d(sum of exp(f - shift))/dz: the gradient itself, (sets, n, dim); or the weights A, (sets, N,
    # N), where a set is whole and N <= dim: they are smaller, and the product can wait for the backward pass.
    gradient: Tensor | None = None
    weights: Tensor | None = None


def _sweep(vectors: _Vectors, own: slice, pair: PairSum, options: DispersionOptions) -> _Found:
    """All pairs (own row, any column), in blocks of rows."""
    num_sets, num_columns, dim = vectors.basis.shape
    num_rows = own.stop - own.start
    like = vectors.basis
    value = like.new_empty(num_sets, num_rows, dtype=torch.float64)
    clamped, product = like.new_zeros(2, num_sets, dtype=torch.float64)
    shift, gradient = like.new_empty(num_sets, num_rows), like.new_empty(num_sets, num_rows, dim)
    block_terms = _compiled_block_terms() if like.is_cuda else _block_terms
    pairs = _PAIRS_PER_GPU_BLOCK if like.is_cuda else _PAIRS_PER_BLOCK
    for sets, rows in _blocks(num_sets, num_rows, num_columns, 1, pairs):
        part = _Vectors(*(field[sets] for field in vectors))
        in_pool = slice(own.start + rows.start, own.start + rows.stop)
        block = _Vectors(*(field[:, in_pool] for field in part))
        gram = torch.bmm(block.points, part.points.transpose(1, 2))
        own_columns = torch.arange(in_pool.start, in_pool.stop, device=like.device)
        weights, value[sets, rows], shift[sets, rows], of_sets = block_terms(
            gram, block[2:], part[2:], own_columns, pair, options
        )
        clamped[sets] += of_sets[0]
        product[sets] += of_sets[1]
        gradient[sets, rows] = torch.bmm(weights, part.basis)
    return _Found(value.logsumexp(1) if pair.logarithm else value.sum(1), shift, clamped, product, gradient)


def _blocks(num_sets: int, num_rows: int, num_columns: int, multiple: int, pairs: int) -> list[tuple[slice, slice]]:
    """Blocks (sets, rows) of at most so many pairs: several whole sets, or some rows of one, a multiple of them."""
    sets = max(1, pairs // max(1, num_rows * num_columns))
    rows = num_rows
    if num_rows * num_columns > pairs:
        rows = max(multiple, pairs // num_columns // multiple * multiple)
    return [
        (slice(first_set, min(first_set + sets, num_sets)), slice(first_row, min(first_row + rows, num_rows)))
        for first_set in range(0, num_sets, sets)
        for first_row in range(0, num_rows, rows)
    ]


def _block_terms(
    gram: Tensor,
    row: tuple[Tensor, ...],
    column: tuple[Tensor, ...],
    own_columns: Tensor,
    pair: PairSum,
    options: DispersionOptions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and sums of one block.

    Args:
        gram: (sets, rows, columns) inner products of points.
        row, column: scale, along, square, size of `_Vectors`, each (sets, rows) and (sets, columns).
        own_columns: (rows,) the column in which each row meets itself.

    Returns:
        weights A (sets, rows, columns), values (float64) and shifts (sets, rows), clamped pairs and sum of products
        (2, sets) float64.
    """
    scale, along, square, size = (field.unsqueeze(2) for field in row)
    column_scale, _, column_square, column_size = (field.unsqueeze(1) for field in column)
    itself = own_columns[:, None] == torch.arange(gram.shape[2], device=gram.device)
    if pair.of == "cosine":
        product = gram * scale * column_scale
        f, slope = pair.terms(product, options)
        by_length = torch.zeros_like(slope)
        beyond = (product.abs() > edge_of_clamp(options, gram.dtype)) & ~itself & pair.has_clamp
        clamped = beyond.sum((1, 2))
    else:
        q = without_rounding(square + column_square - 2.0 * gram, square + column_square)
        a = size + column_size
        product = 0.5 * (a - q)
        f, by_distance, by_sum = pair.terms(q, a, options)
        slope, by_length = -2.0 * by_distance, 2.0 * (by_distance + by_sum)
        clamped = torch.zeros_like(f[:, 0, 0])
    zero = torch.zeros_like(f)
    if pair.logarithm:
        shift = torch.where(itself, zero - torch.inf, f).amax(2)
        similarity = torch.where(itself, zero, torch.exp(f - shift.unsqueeze(2)))
        value = shift.double() + similarity.sum(2).double().log()
        slope, by_length = slope * similarity, by_length * similarity
    else:
        shift, value = torch.zeros_like(f[:, :, 0]), torch.where(itself, zero, f).sum(2).double()
    slope = torch.where(itself, zero, slope)
    length_sum = torch.where(itself, zero, by_length).sum(2, keepdim=True)
    dots = (slope * product).sum(2, keepdim=True) + length_sum * size
    own = scale.square() * length_sum - along * dots
    of_sets = torch.stack([clamped.double(), torch.where(itself, zero, product).sum((1, 2)).double()])
    return torch.where(itself, own, slope * scale * column_scale), value, shift, of_sets


@functools.cache
def _compiled_block_terms() -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    """On a GPU the elementwise part is one kernel; on a CPU `angular_kernel` does it without a minute of compiling."""
    return torch.compile(_block_terms, dynamic=False)


def without_rounding(difference: Tensor, size: Tensor) -> Tensor:
    """`difference` of numbers of about `size`, 0 where it is no more than what rounding makes of equal numbers."""
    return torch.where(difference <= 8 * torch.finfo(size.dtype).eps * size, torch.zeros_like(difference), difference)


def edge_of_clamp(options: DispersionOptions, dtype: torch.dtype) -> float:
    """With no clamp a pair of equal directions has slope infinity; the type's own resolution bounds it."""
    return 1.0 - max(options.cosine_clamp, torch.finfo(dtype).eps)


# ---- the angular sweep by the compiled kernel


def _runs_kernel(pair: PairSum, vectors: _Vectors, options: DispersionOptions) -> bool:
    """Whether `angular_kernel` computes this: it keeps no maximum, so exp(-1 / tau) must not underflow."""
    return (
        pair.has_kernel
        and options.temperature >= 0.02
        and vectors.basis.dtype == torch.float32
        and vectors.basis.untyped_storage().device.type == "cpu"  # a tensor that is only a shape has none there
        and angular_kernel.load() is not None
    )


def _angular_sweep(vectors: _Vectors, own: slice, pair: PairSum, options: DispersionOptions) -> _Found:
    """`_sweep` of the angular variant; a whole set on this rank is symmetric, and half of its products are saved."""
    z = vectors.basis
    num_rows = own.stop - own.start
    edge = edge_of_clamp(options, z.dtype)
    sums = angular_kernel.AngularSums(
        vectors.scale[:, own], vectors.along[:, own], vectors.scale, edge=edge, temperature=options.temperature
    )
    weights = gradient = None
    if num_rows < z.shape[1]:
        gradient = _against_pool(z, own, sums)
    elif num_rows <= z.shape[2]:
        weights = _whole_sets(z, sums)
    else:
        gradient = _against_rest(z, sums)
    similarity, clamped, product = sums.sums.unbind(1)
    shift = z.new_zeros(z.shape[0], 1)
    return _Found(torch.log(similarity), shift, clamped, product, gradient, weights)


def _whole_sets(z: Tensor, sums: angular_kernel.AngularSums) -> Tensor:
    """Weights of small sets: where it pays, the lower left quarter of the inner products is not computed."""
    num_sets, tokens, _ = z.shape
    if num_sets * tokens * tokens < _PAIRS_WORTH_SAVING:
        weights = torch.bmm(z, z.transpose(1, 2))
        sums.add_rows_against_rest(weights, weights, first_set=0, first_row=0)
        return weights
    middle = tokens // 2 // _ROW_MULTIPLE * _ROW_MULTIPLE
    weights = z.new_empty(num_sets, tokens, tokens)
    sets_at_once = max(1, _PAIRS_PER_BLOCK // (tokens * tokens))
    for first_set in range(0, num_sets, sets_at_once):
        part = z[first_set : first_set + sets_at_once]
        for first, last in ((0, middle), (middle, tokens)):
            if first < last:
                gram = torch.bmm(part[:, first:last], part[:, first:].transpose(1, 2))
                target = weights[first_set:, first:, first:]
                sums.add_rows_against_rest(gram, target, first_set=first_set, first_row=first)
    return weights


def _against_pool(z: Tensor, own: slice, sums: angular_kernel.AngularSums) -> Tensor:
    """Gradient of own rows against a pool of which they are a part."""
    num_sets, num_columns, _ = z.shape
    gradient = torch.empty_like(z[:, own])
    for sets, rows in _blocks(num_sets, gradient.shape[1], num_columns, _ROW_MULTIPLE, _PAIRS_PER_BLOCK):
        first = own.start + rows.start
        weights = torch.bmm(z[sets, first : own.start + rows.stop], z[sets].transpose(1, 2))
        sums.add_rows_against_pool(weights, first_set=sets.start, first_row=rows.start, diagonal=first)
        gradient[sets, rows] = torch.bmm(weights, z[sets])
    return gradient


def _against_rest(z: Tensor, sums: angular_kernel.AngularSums) -> Tensor:
    """Gradient of large sets, each block of rows against itself and the rows after it."""
    num_sets, tokens, _ = z.shape
    gradient = torch.zeros_like(z)
    for sets, rows in _blocks(num_sets, tokens, tokens, _ROW_MULTIPLE, _PAIRS_PER_BLOCK):
        part, of_sets = z[sets, rows], gradient[sets]
        weights = torch.bmm(part, z[sets, rows.start :].transpose(1, 2))
        sums.add_rows_against_rest(weights, weights, first_set=sets.start, first_row=rows.start)
        of_sets[:, rows].baddbmm_(weights, z[sets, rows.start :])
        after = weights[:, :, rows.stop - rows.start :]
        of_sets[:, rows.stop :].baddbmm_(after.transpose(1, 2), part)
    return gradient
