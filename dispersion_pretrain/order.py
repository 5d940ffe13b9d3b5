"""The one global order of samples: which sample of which corpus stands at position 0, 1, 2, ... of a run.

It is a pure function of the corpora, their shares, the shuffle and the seed, and knows nothing of ranks. Any position
is found without the ones before it, and memory holds two windows of the shuffle, however large the corpora are.

mosaicml-streaming's shuffles are not used: each builds the order of a whole epoch in memory on every rank (8 bytes a
sample), and NumPy promises no stable stream for the generator's methods that they call. Here only raw output of the
Philox generator and stable sorting enter, both of which are fixed for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Shuffle = Literal["windows", "none"]

ALGORITHM = 1  # part of the fingerprint; to be raised when the order changes, as that ends exact resumes
MIX_BLOCK_SAMPLES = 2**16  # a mix is dealt out in blocks of about this size
_SHARDS, _WINDOW, _MIX = range(3)  # purposes of random numbers


class _Block(NamedTuple):
    """Consecutive positions of a mix: where they begin, and of each its corpus and the rank in that corpus' order."""

    first: int
    corpora: NDArray[np.int64]
    ranks: NDArray[np.int64]


class Place(NamedTuple):
    """Where a sample lies: which corpus of the mix, and which sample of it."""

    corpus: int
    sample_id: int


@dataclass(frozen=True)
class OrderedCorpus:
    """What the order must know of a corpus.

    `identity` tells its content, such as the hash of its index. `shard_sizes` are the samples of each shard.
    `round_samples` is how many of its samples are in one round of the mix; a corpus that is alone needs none.
    """

    identity: str
    shard_sizes: NDArray[np.int64]
    round_samples: int = 0


def _random_words(count: int, *key: int) -> NDArray[np.uint64]:
    """Random 64-bit numbers that depend on the key alone."""
    return np.random.Philox(key=np.random.SeedSequence(key).generate_state(2, np.uint64)).random_raw(count)


class _Memory:
    """The last two values of a costly function of one number: a batch may span the border between two."""

    def __init__(self, function: Callable[[int], Any]) -> None:
        self._function = function
        self._values: dict[int, Any] = {}

    def __call__(self, number: int) -> Any:
        value = self._values.get(number)
        if value is None:
            value = self._function(number)
            newest = dict(list(self._values.items())[-1:])
            self._values = newest | {number: value}
        return value


class CorpusOrder:
    """The endless order of one corpus: each sample once in an epoch, every epoch in a way of its own.

    Shards are put in a random order and laid end to end, the row is cut into windows of about `window_samples`, and
    each window is shuffled as a whole. So a reader needs the shards of one window at a time, and the next.
    """

    def __init__(self, corpus: OrderedCorpus, shuffle: Shuffle, seed: int, window_samples: int) -> None:
        self.num_samples = int(corpus.shard_sizes.sum())
        self._sizes = corpus.shard_sizes
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._shuffle = shuffle
        self._key = (seed, int.from_bytes(corpus.identity.encode(), "big"))
        self._num_windows = max(1, round(self.num_samples / window_samples))
        self._shards = _Memory(self._shards_of_epoch)
        self._samples = _Memory(self._samples_of_window)

    def sample_id(self, position: int) -> int:
        """Return which sample stands at `position` (0, 1, ... without end)."""
        epoch, offset = divmod(position, self.num_samples)
        if self._shuffle == "none":
            return offset
        window = self._window_at(offset)
        return int(self._samples(epoch * self._num_windows + window)[offset - self._bound(window)])

    def window(self, position: int) -> int:
        """Return the number of the window that holds `position`, counted from the first epoch on."""
        epoch, offset = divmod(position, self.num_samples)
        return epoch * self._num_windows + self._window_at(offset)

    def window_shards(self, number: int) -> list[int]:
        """Return the shards that a window reads, in the order in which they are first needed."""
        if self._shuffle == "none":
            window = number % self._num_windows
            first, last = self._bound(window), self._bound(window + 1) - 1
            return list(range(self._shard_of(first), self._shard_of(last) + 1))
        shards = np.searchsorted(self._starts, self._samples(number), side="right") - 1
        found, first_need = np.unique(shards, return_index=True)
        return [int(shard) for shard in found[np.argsort(first_need)]]

    def _shard_of(self, sample_id: int) -> int:
        return int(np.searchsorted(self._starts, sample_id, side="right")) - 1

    def _bound(self, window: int) -> int:
        return window * self.num_samples // self._num_windows

    def _window_at(self, offset: int) -> int:
        window = offset * self._num_windows // self.num_samples
        return window + (offset >= self._bound(window + 1))  # bounds are rounded down

    def _shards_of_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards in the epoch's order, and where each ends in the row."""
        shards = np.argsort(_random_words(len(self._sizes), *self._key, _SHARDS, epoch), kind="stable")
        return shards, np.cumsum(self._sizes[shards])

    def _samples_of_window(self, number: int) -> NDArray[np.int64]:
        epoch, window = divmod(number, self._num_windows)
        first, last = self._bound(window), self._bound(window + 1)
        shards, ends = self._shards(epoch)
        row = np.arange(first, last)
        slot = np.searchsorted(ends, row, side="right")
        samples = row - (ends - self._sizes[shards])[slot] + self._starts[shards][slot]
        shuffled = np.argsort(_random_words(last - first, *self._key, _WINDOW, number), kind="stable")
        return np.asarray(samples[shuffled], np.int64)


class GlobalOrder:
    """The endless order of a run over one corpus or a mix of several.

    A mix is dealt out in rounds, in each of which a corpus has its `round_samples`. Within a round they are spread
    evenly, with a random jitter: any stretch of the order holds each corpus in its share, up to a few samples. Each
    corpus goes through its own epochs meanwhile, in its own order.

    Raises:
        ValueError: an argument is wrong; names the setting.
    """

    def __init__(
        self,
        corpora: Sequence[OrderedCorpus],
        *,
        shuffle: Shuffle,
        seed: int,
        window_samples: int,
        sequence_length: int,
    ) -> None:
        if shuffle not in ("windows", "none"):
            raise ValueError(f"data.shuffle: '{shuffle}' is unknown. windows or none is allowed.")
        if seed < 0:
            raise ValueError(f"run.seed: {seed} is negative. A whole number from 0 on is allowed.")
        if window_samples < 1:
            raise ValueError(f"window_samples: {window_samples} is too few. At least 1 is needed.")
        assert corpora and (len(corpora) == 1 or all(corpus.round_samples > 0 for corpus in corpora))
        self.corpora = list(corpora)
        self.orders = [CorpusOrder(corpus, shuffle, seed, window_samples) for corpus in corpora]
        self._shuffle, self._seed, self._window_samples = shuffle, seed, window_samples
        self._sequence_length = sequence_length
        self._round = np.array([corpus.round_samples for corpus in corpora], np.int64)
        self._round_samples = int(self._round.sum())
        self._num_blocks = max(1, self._round_samples // MIX_BLOCK_SAMPLES)
        self._blocks = _Memory(self._deal)
        self._last_block: _Block | None = None  # of the last position asked for: most often of the next, too

    def place(self, position: int) -> Place:
        """Return which sample stands at `position` (0, 1, ... without end)."""
        if len(self.orders) == 1:
            return Place(0, self.orders[0].sample_id(position))
        block = self._block_with(position)
        corpus = int(block.corpora[position - block.first])
        return Place(corpus, self.orders[corpus].sample_id(int(block.ranks[position - block.first])))

    def counts(self, position: int) -> list[int]:
        """Return how many samples of each corpus stand before `position`."""
        if len(self.orders) == 1:
            return [position]
        block = self._block_with(position)
        number = self._number_of_block(position)
        begun = np.bincount(block.corpora[: position - block.first], minlength=len(self.orders))
        return [int(count) for count in self._before(number) + begun]

    def _before(self, block: int) -> NDArray[np.int64]:
        """Samples of each corpus before a block, counted from the start of the run."""
        rounds, within = divmod(block, self._num_blocks)
        return np.asarray(rounds * self._round + within * self._round // self._num_blocks, np.int64)

    def _number_of_block(self, position: int) -> int:
        rounds, offset = divmod(position, self._round_samples)
        block = rounds * self._num_blocks + offset * self._num_blocks // self._round_samples
        while int(self._before(block).sum()) > position:  # each corpus' count is rounded down by itself
            block -= 1
        while int(self._before(block + 1).sum()) <= position:
            block += 1
        return block

    def _block_with(self, position: int) -> _Block:
        block = self._last_block
        if block is None or not block.first <= position < block.first + len(block.corpora):
            block = self._last_block = self._blocks(self._number_of_block(position))
        return block

    def _deal(self, number: int) -> _Block:
        begins, ends = self._before(number), self._before(number + 1)
        words = _random_words(int((ends - begins).sum()), self._seed, _MIX, number)
        jitter = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        corpora = np.repeat(np.arange(len(self.orders)), ends - begins)
        ranks = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
        keys = (ranks - begins[corpora] + jitter) / (ends - begins)[corpora]
        row = np.argsort(keys, kind="stable")
        return _Block(int(begins.sum()), corpora[row], ranks[row])

    def fingerprint(self) -> dict[str, Any]:
        """Return all that decides the order, as JSON by the name of the setting, to be compared when a run resumes."""
        decisive: dict[str, Any] = {
            "the order's algorithm": ALGORITHM,
            "data.sequence_length": self._sequence_length,
            "data.shuffle": self._shuffle,
            "run.seed": self._seed,
            "number of corpora": len(self.corpora),
        }
        if self._shuffle != "none":
            decisive["data.shuffle_window_tokens (in samples)"] = self._window_samples
        for number, corpus in enumerate(self.corpora):
            decisive[f"content of data.corpora[{number}] (index.json)"] = corpus.identity
            if len(self.corpora) > 1:
                share = f"{corpus.round_samples} of {self._round_samples} samples"
                decisive[f"share of data.corpora[{number}]"] = share
        return decisive


class Share(NamedTuple):
    """How much of a mix a corpus is to be; at most one is set, none is `repeat` = 1. All have a proportion or none.

    `proportion`: its tokens in relation to those of the others. `repeat`: how often it is read in one round of the mix,
    a fraction of it if below 1. `tokens`: how many of its tokens are in a round.
    """

    proportion: float | None = None
    repeat: float | None = None
    tokens: int | None = None


def round_samples(num_samples: Sequence[int], shares: Sequence[Share], sequence_length: int) -> list[int]:
    """Return the samples of each corpus in one round of the mix; `num_samples` are those that it has.

    Proportions are rounded to 1/65,536 of the mix; repetitions to whole samples, tokens up to whole samples.

    Raises:
        ValueError: a corpus would have no sample in a round.
    """
    if shares[0].proportion is not None:
        weights = np.array([share.proportion for share in shares], np.float64)
        exact = weights / weights.sum() * MIX_BLOCK_SAMPLES
        counts = np.floor(exact).astype(np.int64)
        most_short = np.argsort(counts - exact, kind="stable")  # the largest remainders get what is left
        counts[most_short[: MIX_BLOCK_SAMPLES - int(counts.sum())]] += 1
        for number, count in enumerate(counts):
            if count == 0:
                raise ValueError(
                    f"data.corpora[{number}].proportion: {shares[number].proportion:g} is less than 1/"
                    f"{MIX_BLOCK_SAMPLES:,} of the mix. At least that much is needed. Raise it or leave the corpus out."
                )
        return [int(count) for count in counts]
    amounts = []
    for number, (share, available) in enumerate(zip(shares, num_samples, strict=True)):
        if share.tokens is not None:
            amounts.append(-(-share.tokens // sequence_length))
            continue
        amount = round((1.0 if share.repeat is None else share.repeat) * available)
        if amount < 1:
            raise ValueError(
                f"data.corpora[{number}].repeat: {share.repeat:g} of {available:,} samples is none. At least one "
                "sample a round is needed. Raise it or leave the corpus out."
            )
        amounts.append(amount)
    return amounts
