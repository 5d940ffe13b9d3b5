"""The order of samples: a pure function of shard sizes, shuffle and seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dispersion_pretrain.order import GlobalOrder

shard_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(lambda sizes: np.array(sizes, np.int64))


@given(sizes=shard_sizes, shuffle=st.sampled_from(["py1e", "py1s", "none"]), seed=st.integers(0, 2**31))
def test_an_epoch_holds_every_sample_once(sizes: NDArray[np.int64], shuffle: Any, seed: int) -> None:
    total = int(sizes.sum())
    order = GlobalOrder(total, sizes, shuffle, seed)
    for epoch in (0, 1, 5):
        ids = [order.sample_id(epoch * total + offset) for offset in range(total)]
        assert sorted(ids) == list(range(total))


def test_epochs_and_neighbouring_seeds_differ() -> None:
    sizes = np.array([200], np.int64)  # one shard: where streaming's own seeds would meet
    seen = set()
    for seed in range(4):
        order = GlobalOrder(200, sizes, "py1e", seed)
        for epoch in range(4):
            seen.add(tuple(order.sample_id(epoch * 200 + offset) for offset in range(200)))
    assert len(seen) == 16


def test_order_is_the_one_that_runs_were_started_with() -> None:
    """Any change here breaks the resume of every run that exists."""
    order = GlobalOrder(25, np.array([7, 8, 10], np.int64), "py1e", seed=17)
    assert [order.sample_id(position) for position in range(25, 35)] == [12, 3, 5, 19, 11, 21, 15, 4, 9, 7]


def test_order_does_not_depend_on_what_was_asked_before() -> None:
    sizes = np.array([30, 12], np.int64)
    order = GlobalOrder(42, sizes, "py1e", 1)
    positions = np.random.default_rng(0).integers(0, 42 * 6, 300).tolist()
    jumping = [order.sample_id(position) for position in positions]
    assert jumping == [GlobalOrder(42, sizes, "py1e", 1).sample_id(position) for position in positions]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(shuffle="random"), "data.shuffle: 'random'"),
        (dict(seed=-1), "run.seed: -1"),
        (dict(num_samples=24), "num_samples: 24"),
    ],
)
def test_wrong_order_arguments(arguments: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = dict(num_samples=25, shard_sizes=np.array([7, 8, 10]), shuffle="py1e", seed=0)
    with pytest.raises(ValueError, match=message):
        GlobalOrder(**(good | arguments))
