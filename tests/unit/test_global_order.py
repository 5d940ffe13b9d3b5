"""The order of samples: a pure function of corpora, shares, shuffle and seed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dispersion_pretrain import order as order_module
from dispersion_pretrain.order import GlobalOrder, OrderedCorpus, Share, round_samples

shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(lambda sizes: np.array(sizes, np.int64))
shuffles = st.sampled_from(["windows", "none"])


def make(*corpora: OrderedCorpus, **arguments: Any) -> GlobalOrder:
    defaults: dict[str, Any] = {"shuffle": "windows", "seed": 0, "window_samples": 16, "sequence_length": 8}
    return GlobalOrder(corpora, **(defaults | arguments))


def alone(sizes: NDArray[np.int64] | list[int], **arguments: Any) -> GlobalOrder:
    return make(OrderedCorpus("numbers", np.array(sizes, np.int64)), **arguments)


def ids(order: GlobalOrder, first: int, last: int) -> list[int]:
    return [order.place(position).sample_id for position in range(first, last)]


@given(sizes=shard_sizes, shuffle=shuffles, seed=st.integers(0, 2**31), window=st.integers(1, 100))
def test_an_epoch_holds_every_sample_once(sizes: NDArray[np.int64], shuffle: Any, seed: int, window: int) -> None:
    total = int(sizes.sum())
    order = alone(sizes, shuffle=shuffle, seed=seed, window_samples=window)
    for epoch in (0, 1, 5):
        assert sorted(ids(order, epoch * total, (epoch + 1) * total)) == list(range(total))


def test_epochs_seeds_and_corpora_differ() -> None:
    seen = set()
    for seed in range(4):
        for content in ("a", "b"):
            order = make(OrderedCorpus(content, np.array([200])), seed=seed)
            for epoch in range(4):
                seen.add(tuple(ids(order, epoch * 200, (epoch + 1) * 200)))
    assert len(seen) == 32


def test_order_is_the_one_that_runs_were_started_with() -> None:
    """Any change here breaks the resume of every run that exists, and must raise order.ALGORITHM."""
    order = alone([7, 8, 10], seed=17, window_samples=13)
    assert ids(order, 25, 37) == [5, 19, 3, 4, 16, 17, 18, 1, 6, 15, 0, 2]
    mix = make(OrderedCorpus("a", np.array([7, 8]), 3), OrderedCorpus("b", np.array([9]), 5), seed=17)
    assert [tuple(mix.place(position)) for position in range(10)] == [
        (0, 2),
        (1, 2),
        (1, 8),
        (0, 5),
        (1, 0),
        (1, 4),
        (0, 13),
        (1, 3),
        (0, 8),
        (1, 1),
    ]
    assert order_module.ALGORITHM == 1


@given(sizes=shard_sizes, shuffle=shuffles, window=st.integers(1, 50))
def test_a_window_reads_the_shards_that_it_names(sizes: NDArray[np.int64], shuffle: Any, window: int) -> None:
    total, order = int(sizes.sum()), alone(sizes, shuffle=shuffle, window_samples=window)
    corpus = order.orders[0]
    ends = np.cumsum(sizes)
    needed: dict[int, list[int]] = {}
    for position in range(3 * total):
        shard = int(np.searchsorted(ends, order.place(position).sample_id, side="right"))
        shards = needed.setdefault(corpus.window(position), [])
        if shard not in shards:
            shards.append(shard)
    assert list(needed) == list(range(len(needed)))
    assert needed == {number: corpus.window_shards(number) for number in needed}


def test_windows_mix_shards_but_need_few_of_them() -> None:
    order = alone([100] * 50, window_samples=1000).orders[0]
    windows = [order.window_shards(number) for number in range(5)]
    assert all(10 <= len(shards) <= 11 for shards in windows)
    first_window = [order.sample_id(position) // 100 for position in range(1000)]
    assert len(set(first_window[:30])) > 5  # the samples of a shard are spread over the window
    assert windows[0] != sorted(windows[0])


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    def mix() -> GlobalOrder:
        return make(OrderedCorpus("a", np.array([30, 12]), 42), OrderedCorpus("b", np.array([50]), 150_000))

    order = mix()
    positions = np.random.default_rng(0).integers(0, 2_000_000, 60).tolist()
    jumping = [(order.place(position), order.counts(position)) for position in positions]
    assert jumping == [(mix().place(position), mix().counts(position)) for position in positions]


@given(
    amounts=st.lists(st.integers(1, 60), min_size=2, max_size=4),
    block=st.sampled_from([5, 32, 2**16]),
    first=st.integers(0, 300),
)
def test_a_mix_holds_each_corpus_in_its_share(amounts: list[int], block: int, first: int) -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(order_module, "MIX_BLOCK_SAMPLES", block)
    corpora = [OrderedCorpus(str(number), np.array([20, 17]), amount) for number, amount in enumerate(amounts)]
    order = make(*corpora)
    patch.undo()
    total = sum(amounts)
    places = [order.place(position) for position in range(3 * total)]
    for round_ in range(3):  # exact in each round
        assert Counter(place.corpus for place in places[round_ * total :][:total]) == Counter(dict(enumerate(amounts)))
    for corpus in range(len(amounts)):  # and each goes through its own order, without a gap
        own = [place.sample_id for place in places if place.corpus == corpus]
        assert own == [order.orders[corpus].sample_id(position) for position in range(len(own))]
    first = min(first, 3 * total)
    begun = Counter(place.corpus for place in places[:first])
    assert order.counts(first) == [begun[corpus] for corpus in range(len(amounts))]
    if block == 2**16:  # evenly within a round
        for corpus, amount in enumerate(amounts):
            assert abs(begun[corpus] - first * amount / total) < len(amounts) + 1


def test_shares_become_samples() -> None:
    assert round_samples([10, 10], [Share(proportion=3), Share(proportion=1)], 8) == [49152, 16384]
    assert sum(round_samples([1] * 7, [Share(proportion=weight) for weight in (1, 2, 3, 5, 7, 11, 13)], 8)) == 65536
    assert round_samples([100, 100, 100, 33], [Share(), Share(repeat=2), Share(repeat=0.25), Share(tokens=100)], 8) == [
        100, 200, 25, 13
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([Share(proportion=1e-6), Share(proportion=1)], r"data.corpora\[0\].proportion: 1e-06 is less than 1/65,536"),
        ([Share(), Share(repeat=0.01)], r"data.corpora\[1\].repeat: 0.01 of 20 samples is none"),
    ],
)
def test_shares_of_nothing(shares: list[Share], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        round_samples([20, 20], shares, 8)


def test_fingerprint_names_what_decides_the_order() -> None:
    first, second = OrderedCorpus("a", np.array([30]), 20), OrderedCorpus("b", np.array([30]), 20)
    base = make(first, second).fingerprint()
    assert base == make(first, second).fingerprint()
    others = {
        "data.shuffle": make(first, second, shuffle="none"),
        "run.seed": make(first, second, seed=1),
        "data.sequence_length": make(first, second, sequence_length=16),
        "data.shuffle_window_tokens (in samples)": make(first, second, window_samples=17),
        "number of corpora": make(first),
        "content of data.corpora[1] (index.json)": make(first, OrderedCorpus("c", np.array([30]), 20)),
        "share of data.corpora[0]": make(OrderedCorpus("a", np.array([30]), 21), second),
    }
    for field, order in others.items():
        other = order.fingerprint()
        assert other.get(field) != base[field], field


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(shuffle="random"), "data.shuffle: 'random'"),
        (dict(seed=-1), "run.seed: -1"),
        (dict(window_samples=0), "window_samples: 0"),
    ],
)
def test_wrong_order_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alone([7, 8, 10], **arguments)
