"""Each rank's share of the global order."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dispersion_pretrain.corpus import TokenCorpus
from dispersion_pretrain.data import BatchStream, validation_batches, validation_counts
from small_corpus import (
    LENGTH,
    TRAIN_SEQUENCES,
    VALIDATION_SEQUENCES,
    flip_byte,
    order_of,
    sequence,
    take,
    write_corpus,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that no test changes."""
    return write_corpus(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus that the test may damage."""
    return write_corpus(tmp_path / "corpus")


def test_what_fails_in_the_thread_reaches_next(folder: Path) -> None:
    flip_byte(folder / "train" / "shard.00002.mds")
    corpus = TokenCorpus(folder, "train")
    layout = dict(rank=0, world_size=1, micro_batch=4, accumulation=1)
    stream = BatchStream([corpus], order_of(corpus, shuffle="none"), start_step=0, **layout)
    good = 0
    with pytest.raises(RuntimeError, match=r"shard\.00002\.mds: is damaged"):
        for _ in range(TRAIN_SEQUENCES):
            next(stream)
            good += 1
    assert good == int(corpus.shard_sizes[:2].sum()) // 4
    with pytest.raises(RuntimeError, match=r"shard\.00002\.mds"):  # and not a wait for ever
        next(stream)
    stream.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rank=2), "rank: 2 does not exist"),
        (dict(micro_batch=0), "micro_batch: 0 is too few"),
        (dict(accumulation=0), "accumulation: 0 is too few"),
        (dict(prefetch=0), "prefetch: 0 is too few"),
        (dict(start_step=-1), "start_step: -1 is negative"),
    ],
)
def test_wrong_stream_arguments(whole: Path, arguments: dict[str, int], message: str) -> None:
    corpus = TokenCorpus(whole, "train")
    good = dict(rank=0, world_size=2, micro_batch=1, accumulation=1, start_step=0)
    with pytest.raises(ValueError, match=message):
        BatchStream([corpus], order_of(corpus), **(good | arguments))


def test_batch_has_the_promised_types(whole: Path) -> None:
    corpus = TokenCorpus(whole, "train")
    (batch,) = take(corpus, steps=1, rank=0, world_size=1, micro_batch=3, accumulation=1)
    assert batch.input_ids.dtype == batch.sample_index.dtype == torch.int64
    assert batch.valid.dtype == torch.bool and batch.valid.all()
    assert batch.input_ids.shape == (3, LENGTH) and batch.sample_index.shape == batch.valid.shape == (3,)


@given(
    world_size=st.integers(1, 5),
    micro_batch=st.integers(1, 5),
    accumulation=st.integers(1, 4),
    start_step=st.integers(0, 20),
)
def test_every_position_once_in_its_place(
    whole: Path, world_size: int, micro_batch: int, accumulation: int, start_step: int
) -> None:
    """The rule of dealing, from the global position: step, then micro-step, then rank, then place in the batch."""
    corpus = TokenCorpus(whole, "train")
    order = order_of(corpus)
    steps = 2
    seen = []
    for rank in range(world_size):
        layout = dict(rank=rank, world_size=world_size, micro_batch=micro_batch, accumulation=accumulation)
        batches = take(corpus, steps=steps, start_step=start_step, **layout)
        for number, batch in enumerate(batches):
            step, micro_step = divmod(number, accumulation)
            first = ((start_step + step) * accumulation + micro_step) * world_size * micro_batch
            expected = first + rank * micro_batch + torch.arange(micro_batch)
            assert torch.equal(batch.sample_index, expected)
            for position, tokens in zip(batch.sample_index.tolist(), batch.input_ids.numpy(), strict=True):
                np.testing.assert_array_equal(tokens, sequence("train", order.place(position).sample_id))
            seen += batch.sample_index.tolist()
    global_batch = world_size * micro_batch * accumulation
    assert sorted(seen) == list(range(start_step * global_batch, (start_step + steps) * global_batch))


@pytest.mark.parametrize("global_batch", [4, 24])
def test_a_step_sees_the_same_samples_however_it_is_divided(whole: Path, global_batch: int) -> None:
    corpus = TokenCorpus(whole, "train")
    steps = 2 * TRAIN_SEQUENCES // global_batch + 1  # beyond the second epoch
    reference = None
    for world_size in (1, 2, 4):
        for micro_batch in (1, 2, 4, 8):
            if global_batch % (world_size * micro_batch):
                continue
            accumulation = global_batch // (world_size * micro_batch)
            layout = dict(world_size=world_size, micro_batch=micro_batch, accumulation=accumulation)
            ranks = [take(corpus, steps=steps, rank=rank, **layout) for rank in range(world_size)]
            micro_steps = [torch.cat([batch.input_ids for batch in batches]) for batches in zip(*ranks, strict=True)]
            stream = torch.cat(micro_steps)
            reference = stream if reference is None else reference
            assert torch.equal(stream, reference), layout
    assert reference is not None
    epoch = sorted(map(tuple, reference[:TRAIN_SEQUENCES].tolist()))
    assert epoch == sorted(tuple(sequence("train", sample_id).tolist()) for sample_id in range(TRAIN_SEQUENCES))


def test_start_step_continues_where_the_stream_was(whole: Path) -> None:
    corpus = TokenCorpus(whole, "train")
    layout = dict(rank=1, world_size=2, micro_batch=3, accumulation=2)
    uninterrupted = take(corpus, steps=9, **layout)
    resumed = take(TokenCorpus(whole, "train"), steps=5, start_step=4, **layout)
    for before, after in zip(uninterrupted[8:], resumed, strict=True):
        assert torch.equal(before.input_ids, after.input_ids)
        assert torch.equal(before.sample_index, after.sample_index)


def test_reading_ahead_is_bounded_and_ends_with_close(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = TokenCorpus(whole, "train")
    read: list[int] = []
    original = TokenCorpus.read

    def counting(self: TokenCorpus, sample_ids: list[int]) -> NDArray[np.generic]:
        read.extend(sample_ids)
        return original(self, sample_ids)

    monkeypatch.setattr(TokenCorpus, "read", counting)
    layout = dict(rank=0, world_size=1, micro_batch=2, accumulation=1)
    stream = BatchStream([corpus], order_of(corpus), start_step=0, prefetch=3, **layout)
    next(stream)
    time.sleep(0.3)
    assert len(read) == 2 * (1 + 3 + 1)  # taken, waiting, and the one that waits for a place
    stream.close()
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batch-stream"]


def test_waiting_is_counted(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = TokenCorpus(whole, "train")
    original = TokenCorpus.read

    def slow(self: TokenCorpus, sample_ids: list[int]) -> NDArray[np.generic]:
        time.sleep(0.1)
        return original(self, sample_ids)

    monkeypatch.setattr(TokenCorpus, "read", slow)
    layout = dict(rank=0, world_size=1, micro_batch=2, accumulation=1)
    stream = BatchStream([corpus], order_of(corpus), start_step=0, **layout)
    for _ in range(3):
        next(stream)
    assert 0.2 < stream.wait_s < 2
    stream.close()


@given(
    world_size=st.integers(1, 5),
    micro_batch=st.integers(1, 5),
    num_sequences=st.integers(1, 2 * VALIDATION_SEQUENCES),
)
def test_validation_counts_every_sample_once_and_ranks_stay_together(
    whole: Path, world_size: int, micro_batch: int, num_sequences: int
) -> None:
    corpus = TokenCorpus(whole, "validation")
    counts = validation_counts(order_of(corpus), [len(corpus)], num_sequences)
    layout = dict(world_size=world_size, micro_batch=micro_batch)
    ranks = [validation_batches([corpus], counts, rank=rank, **layout) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    counted = []
    for together in zip(*ranks, strict=True):
        for batch in together:
            assert batch.input_ids.shape == (micro_batch, LENGTH)
            for sample_id, tokens in zip(batch.sample_index.tolist(), batch.input_ids.numpy(), strict=True):
                np.testing.assert_array_equal(tokens, sequence("validation", sample_id))
            counted += batch.sample_index[batch.valid].tolist()
    wanted = min(num_sequences, VALIDATION_SEQUENCES)
    assert counted == list(range(wanted))
    assert len(ranks[0]) == -(-wanted // (world_size * micro_batch))
