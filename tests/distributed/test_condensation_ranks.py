"""The condensation measurement on several ranks equals that on one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dispersion_pretrain.condensation import Condensation, CosineAccumulator
from spawn import run_ranks

_TEXTS = 7  # odd, so that the last batch of two ranks is filled up


def _states() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(_TEXTS, 6, 16, generator=generator) + layer for layer in range(4)]


def _measure_share() -> Condensation:
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    states = _states()
    accumulator = CosineAccumulator(4, 6, "cpu")
    for first in range(0, _TEXTS, world):
        index = first + rank
        valid = torch.tensor([index < _TEXTS])
        text = min(index, _TEXTS - 1)
        accumulator.add([state[text : text + 1] for state in states], valid)
    accumulator.reduce()
    return accumulator.result(step=1, tokens=2)


def _measure_on_rank_0_only() -> int:
    accumulator = CosineAccumulator(4, 6, "cpu")
    if dist.get_rank() == 0:
        accumulator.add(_states())
    accumulator.reduce()
    return accumulator.result().num_texts


def _measure_nan_on_rank_1() -> str:
    accumulator = CosineAccumulator(4, 6, "cpu")
    states = _states()
    if dist.get_rank() == 1:
        states[3][0, 0, 0] = float("nan")
    accumulator.add(states)
    accumulator.reduce()
    with pytest.raises(RuntimeError) as caught:
        accumulator.result()
    return str(caught.value)


def test_ranks_equal_one_process() -> None:
    expected = _measure_share()
    assert expected.num_texts == _TEXTS
    for world_size in (1, 2):
        for result in run_ranks(_measure_share, world_size):
            assert result.num_texts == _TEXTS
            np.testing.assert_allclose(result.mean_cosine, expected.mean_cosine, rtol=0, atol=1e-12)
            np.testing.assert_allclose(result.histogram, expected.histogram, rtol=0, atol=1e-12)
            np.testing.assert_allclose(result.quantiles, expected.quantiles, rtol=0, atol=1e-12)
            np.testing.assert_allclose(result.effective_rank, expected.effective_rank, rtol=1e-12)
            assert (result.spearman, result.kendall) == (expected.spearman, expected.kendall)


def test_a_rank_may_have_no_text() -> None:
    assert run_ranks(_measure_on_rank_0_only, 2) == [_TEXTS, _TEXTS]


def test_a_nan_on_one_rank_is_an_error_on_all() -> None:
    messages = run_ranks(_measure_nan_on_rank_1, 2)
    assert messages[0] == messages[1]
    assert "layer(s) 3 " in messages[0]
