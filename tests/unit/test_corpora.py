"""Several corpora read as one, and the shards fetched ahead."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dispersion_pretrain.config import DataSettings
from dispersion_pretrain.corpora import Corpora, CorporaPlan
from dispersion_pretrain.layout import BatchLayout
from small_corpus import LENGTH, TRAIN_SEQUENCES, VALIDATION_SEQUENCES, sequence, write_corpus

SECOND = 1000  # number of the first sample of the second corpus


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two corpora that no test changes."""
    folder = tmp_path_factory.mktemp("corpora")
    return [write_corpus(folder / "first"), write_corpus(folder / "second", SECOND)]


def settings(*corpora: dict[str, Any], **more: Any) -> DataSettings:
    return DataSettings.model_validate(
        {"corpora": list(corpora), "sequence_length": LENGTH, "shuffle_window_tokens": 15 * LENGTH, **more}
    )


def layout(world_size: int, micro_batch: int, accumulation: int = 1) -> BatchLayout:
    return BatchLayout(world_size, micro_batch, accumulation, pool_ranks=1, pools_per_rank=1)


def read(corpora: Corpora, layout: BatchLayout, steps: int) -> torch.Tensor:
    """All samples of the first steps, in the global order: (steps * global batch, length)."""
    ranks = []
    for rank in range(layout.world_size):
        stream = corpora.batches(layout, rank, 0)
        ranks.append([next(stream).input_ids for _ in range(steps * layout.accumulation)])
        stream.close()
    return torch.cat([torch.cat(batches) for batches in zip(*ranks, strict=True)])


@pytest.mark.parametrize("share", [{"repeat": 2.0}, {"proportion": 2}, {"tokens": 600}])
def test_a_mix_is_one_order_on_any_layout(folders: list[Path], share: dict[str, Any]) -> None:
    other = {"proportion": 1} if "proportion" in share else {}
    data = settings({"path": str(folders[0]), **share}, {"path": str(folders[1]), **other})
    corpora = Corpora(CorporaPlan.make(data), seed=5)
    expected = []
    for position in range(4 * 24):
        corpus, sample_id = corpora.order.place(position)
        expected.append(sequence("train", sample_id + corpus * SECOND))
    for parts in (layout(1, 24), layout(1, 6, 4), layout(2, 12), layout(4, 3, 2)):
        np.testing.assert_array_equal(read(corpora, parts, steps=4).numpy(), np.stack(expected))


def test_a_round_of_repetitions_holds_each_sample_as_often_as_asked(folders: list[Path]) -> None:
    data = settings({"path": str(folders[0]), "repeat": 2}, {"path": str(folders[1])})
    corpora = Corpora(CorporaPlan.make(data), seed=5)
    seen = read(corpora, layout(1, 3 * TRAIN_SEQUENCES), steps=1).tolist()
    for sample_id in range(TRAIN_SEQUENCES):
        assert seen.count(sequence("train", sample_id).tolist()) == 2
        assert seen.count(sequence("train", SECOND + sample_id).tolist()) == 1


def test_one_corpus_may_be_named_either_way(folders: list[Path]) -> None:
    short = DataSettings(corpus=str(folders[0]), sequence_length=LENGTH, shuffle_window_tokens=15 * LENGTH)
    orders = [Corpora(CorporaPlan.make(data), 1).order for data in (short, settings({"path": str(folders[0])}))]
    assert orders[0].fingerprint() == orders[1].fingerprint()


def test_validation_takes_the_shares_of_the_mix(folders: list[Path]) -> None:
    data = settings({"path": str(folders[0]), "proportion": 3}, {"path": str(folders[1]), "proportion": 1})
    corpora = Corpora(CorporaPlan.make(data), seed=5)
    seen = []
    for rank in range(2):
        for batch in corpora.validation_batches(layout(2, 3), rank, num_sequences=8):
            seen += batch.input_ids[batch.valid].tolist()
    expected = [*range(6), SECOND, SECOND + 1]
    assert sorted(seen) == sorted(sequence("validation", number).tolist() for number in expected)
    everything = corpora.validation_batches(layout(1, 30), 0, num_sequences=1000)
    assert [int(batch.valid.sum()) for batch in everything] == [2 * VALIDATION_SEQUENCES]


def test_description_says_how_often_each_corpus_is_read(folders: list[Path]) -> None:
    data = settings({"path": str(folders[0]), "proportion": 3}, {"path": str(folders[1]), "proportion": 1})
    first, second = CorporaPlan.make(data).describe(run_tokens=8 * TRAIN_SEQUENCES * LENGTH)
    assert f"{folders[0]}: {TRAIN_SEQUENCES * LENGTH} training tokens" in first and "0.75 of the mix" in first
    assert first.endswith("6.00 epochs") and second.endswith("0.25 of the mix, 2.00 epochs")


def test_corpora_of_different_tokenizers_are_refused(folders: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    described = json.loads((other / "corpus.json").read_text())
    described["tokenizer"] |= {"name": "train:8", "sha256": "0" * 64}
    (other / "corpus.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"data\.corpora: .*other was made with the tokenizer train:8.*need one"):
        CorporaPlan.make(settings({"path": str(folders[0])}, {"path": str(other)}))


def test_corpora_of_another_length_are_refused(folders: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"data\.sequence_length: 16, but .*first holds sequences of 8 .* Use 8"):
        CorporaPlan.make(settings({"path": str(folders[0])}, sequence_length=16))


def test_a_cache_too_small_for_the_shuffle_is_refused(folders: list[Path], tmp_path: Path) -> None:
    data = settings({"path": str(folders[0])}, cache=str(tmp_path), cache_limit_gib=1000 / 2**30)
    with pytest.raises(ValueError, match=r"data\.cache_limit_gib: .* but two windows .*shuffle_window_tokens \(120\)"):
        Corpora(CorporaPlan.make(data), seed=0)


def test_the_shards_of_two_windows_are_fetched_ahead(folders: list[Path], tmp_path: Path) -> None:
    data = settings({"path": str(folders[0])}, cache=str(tmp_path), prefetch=1, shuffle_window_tokens=9 * LENGTH)
    corpora = Corpora(CorporaPlan.make(data), seed=2)
    order = corpora.order.orders[0]
    wanted = {f"shard.{shard:05}.mds" for window in (0, 1) for shard in order.window_shards(window)}
    assert len(wanted) < 4, "the rest must stay away"
    stream = corpora.batches(layout(1, 1), 0, 0)
    next(stream)
    deadline = time.monotonic() + 20
    while (found := {path.name for path in tmp_path.rglob("*.mds")}) != wanted:
        assert time.monotonic() < deadline, (found, wanted)
        time.sleep(0.01)
    stream.close()
    time.sleep(0.05)
    assert not [thread for thread in threading.enumerate() if "shard-prefetch" in thread.name]
