"""How a global batch lies on ranks, micro-batches and pools."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dispersion_pretrain.config import Settings

# A derived micro-batch holds at most this many tokens a rank: enough to fill a GPU, small enough to fit most models.
_DERIVED_MICRO_BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class BatchLayout:
    """How a global batch is dealt: world_size x micro_batch x accumulation sequences."""

    world_size: int
    micro_batch: int
    accumulation: int
    pool_ranks: int  # consecutive ranks that share a pool; 1: a rank holds one or more whole pools
    pools_per_rank: int  # whole pools in a rank's micro-batch; 1 where ranks share a pool

    @classmethod
    def derive(cls, settings: Settings, world_size: int) -> BatchLayout:
        """The layout of `settings` on `world_size` ranks.

        The derived micro-batch is the largest legal one of at most 16,384 tokens (or the smallest legal one). It also
        stands for `auto` until that is found (batch_finder.py).

        Raises:
            ValueError: the batch does not divide, or a pool would cross micro-steps; names the legal values.
        """
        sequences = settings.global_batch_sequences
        pool = settings.dispersion.pool_sequences if settings.dispersion else 1
        if sequences % world_size:
            near = sorted({max(1, sequences // world_size), sequences // world_size + 1})
            tokens = [n * world_size * settings.data.sequence_length for n in near]
            raise ValueError(
                f"training.global_batch_tokens: {sequences} sequences cannot be divided among {world_size} ranks. A "
                "multiple of the number "
                f"of ranks is allowed. Use {' or '.join(map(str, tokens))} tokens, or {_join(_divisors(sequences))} "
                "ranks."
            )
        per_rank = sequences // world_size
        legal = legal_micro_batches(settings, world_size)
        if not legal:
            pools = [p for p in _divisors(sequences) if any(_pool_fits(p, world_size, n) for n in _divisors(per_rank))]
            raise ValueError(
                f"dispersion.pool_sequences: {pool} fits no micro-batch of {sequences} sequences a step on "
                f"{world_size} ranks. A pool must "
                "divide world size x micro-batch, into whole micro-batches or whole pools: it cannot cross "
                "accumulation micro-steps. "
                f"Use pool_sequences {_join(pools)}."
            )
        wanted = settings.training.micro_batch
        if wanted is None or wanted == "auto":
            length = settings.data.sequence_length
            fitting = [n for n in legal if n * length <= _DERIVED_MICRO_BATCH_TOKENS]
            wanted = max(fitting) if fitting else min(legal)
        elif wanted not in legal:
            key = "dispersion.pool_sequences" if wanted in _divisors(per_rank) else "training.micro_batch"
            raise ValueError(
                f"{key}: a micro-batch of {wanted} does not fit {per_rank} sequences a rank and step with pools of "
                f"{pool} sequences on "
                f"{world_size} ranks. A pool cannot cross accumulation micro-steps. Use training.micro_batch "
                f"{_join(legal)}."
            )
        return cls(
            world_size=world_size,
            micro_batch=wanted,
            accumulation=per_rank // wanted,
            pool_ranks=max(1, pool // wanted),
            pools_per_rank=max(1, wanted // pool),
        )


def legal_micro_batches(settings: Settings, world_size: int) -> list[int]:
    """Sequences a rank and micro-step that divide the batch and keep pools within a micro-step, ascending; or none."""
    pool = settings.dispersion.pool_sequences if settings.dispersion else 1
    per_rank, rest = divmod(settings.global_batch_sequences, world_size)
    return [] if rest else [n for n in _divisors(per_rank) if _pool_fits(pool, world_size, n)]


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _pool_fits(pool: int, world_size: int, micro_batch: int) -> bool:
    if pool <= micro_batch:
        return micro_batch % pool == 0
    return pool % micro_batch == 0 and world_size % (pool // micro_batch) == 0


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "(none)"
