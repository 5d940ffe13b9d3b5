"""The one global order of samples: a pure function of shard sizes, shuffle and seed, which knows nothing of ranks."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from streaming.base.shuffle import get_shuffle

SHUFFLE_BLOCK_SAMPLES = 2**18  # how far py1e carries the samples of a shard

Shuffle = Literal["py1e", "py1s", "none"]


class GlobalOrder:
    """The endless order of the samples: each once in an epoch, every epoch in a way of its own.

    It knows nothing of ranks: position p is the same sample in any run with the same arguments. `corpus_identity`
    only enters the fingerprint.
    """

    def __init__(
        self,
        num_samples: int,
        shard_sizes: NDArray[np.int64],
        shuffle: Shuffle,
        seed: int,
        corpus_identity: str = "",
    ) -> None:
        if shuffle not in ("py1e", "py1s", "none"):
            raise ValueError(f"data.shuffle: '{shuffle}' is unknown. py1e, py1s or none is allowed.")
        if num_samples < 1 or int(shard_sizes.sum()) != num_samples:
            raise ValueError(f"num_samples: {num_samples}, but the shards hold {int(shard_sizes.sum())} samples.")
        if seed < 0:
            raise ValueError(f"run.seed: {seed} is negative. A whole number from 0 on is allowed.")
        self.num_samples = num_samples
        self._shard_sizes = shard_sizes
        self._shuffle: Shuffle = shuffle
        self._seed = seed
        # Streaming adds the epoch to the seed: neighbouring seeds would see each other's epochs, one later.
        self._distant_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self._corpus_identity = corpus_identity
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def sample_id(self, position: int) -> int:
        """Return which sample of the corpus stands at `position` (0, 1, ... without end)."""
        epoch, offset = divmod(position, self.num_samples)
        if self._shuffle == "none":
            return offset
        permutation = self._epochs.get(epoch)
        if permutation is None:
            permutation = get_shuffle(
                self._shuffle, self._shard_sizes, 1, self._distant_seed, epoch, SHUFFLE_BLOCK_SAMPLES
            )
            newest = dict(list(self._epochs.items())[-1:])  # a batch may span the end of an epoch: keep two
            self._epochs = newest | {epoch: permutation}
        return int(permutation[offset])

    def fingerprint(self) -> str:
        """Return a hash of all that decides the order, to be compared when a run resumes.

        The shuffle algorithm enters by what it does to a small example, not by a version number: an upgrade that
        keeps the order is accepted, one that changes it is noticed.
        """
        example = np.array([301, 17, 190], np.int64)
        shuffled = "" if self._shuffle == "none" else get_shuffle(self._shuffle, example, 1, 5, 2, 512).tolist()
        decisive = {
            "corpus": self._corpus_identity,
            "shard_sizes": self._shard_sizes.tolist(),
            "shuffle": self._shuffle,
            "seed": self._distant_seed,
            "block_samples": SHUFFLE_BLOCK_SAMPLES,
            "shuffled_example": shuffled,
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
