"""The corpus, the global order, and each rank's share of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from dispersion_pretrain.data import (
    Batch,
    BatchStream,
    GlobalOrder,
    TokenCorpus,
    read_manifest,
    tokenizer_path,
    validation_batches,
)

# isort: split
from streaming import MDSWriter  # after the package, which makes torchvision importable

LENGTH = 8
TRAIN_SEQUENCES = 37
VALIDATION_SEQUENCES = 11
SHARDS = 4


def sequence(split: str, sample_id: int) -> NDArray[np.uint16]:
    """Return the tokens that `write_corpus` puts in the place of one sample."""
    return np.random.default_rng([sample_id, len(split)]).integers(0, 1000, LENGTH).astype(np.uint16)


def write_corpus(folder: Path, first_sample: int = 0) -> Path:
    """Write a small corpus of several shards by the file contract alone, without data_prep."""
    splits = {}
    for split, sequences in (("train", TRAIN_SEQUENCES), ("validation", VALIDATION_SEQUENCES)):
        columns = {"tokens": f"ndarray:uint16:{LENGTH}"}
        with MDSWriter(columns=columns, out=str(folder / split), hashes=["sha256"], size_limit=400) as writer:
            for sample_id in range(sequences):
                writer.write({"tokens": sequence(split, first_sample + sample_id)})
        splits[split] = {
            "documents": 3,
            "sequences": sequences,
            "tokens": sequences * LENGTH,
            "dropped_tokens": 1,
            "bytes": 1234,
            "index_sha256": hashlib.sha256((folder / split / "index.json").read_bytes()).hexdigest(),
        }
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    corpus = {
        "format_version": 1,
        "source": {"name": "numbers"},
        "sequence_length": LENGTH,
        "token_dtype": "uint16",
        "vocab_size": 1000,
        "eos_token_id": 0,
        "tokenizer": {"name": "none", "folder": "tokenizer", "sha256": hashlib.sha256(b"{}").hexdigest()},
        "splits": splits,
    }
    (folder / "corpus.json").write_text(json.dumps(corpus))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that no test changes."""
    return write_corpus(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus that the test may damage."""
    return write_corpus(tmp_path / "corpus")


def take(corpus: TokenCorpus, *, steps: int, start_step: int = 0, **layout: int) -> list[Batch]:
    """Read whole optimizer steps of one rank."""
    stream = BatchStream(corpus, corpus.order("py1e", seed=3), start_step=start_step, **layout)
    try:
        return [next(stream) for _ in range(steps * layout["accumulation"])]
    finally:
        stream.close()


def test_random_access_gives_every_sequence(whole: Path) -> None:
    for split in ("train", "validation"):
        corpus = TokenCorpus(whole, split)
        for sample_id in np.random.default_rng(0).permutation(len(corpus)):
            np.testing.assert_array_equal(corpus[int(sample_id)], sequence(split, int(sample_id)))
    assert len(TokenCorpus(whole, "train").shard_sizes) == SHARDS


@pytest.mark.parametrize("sample_id", [-1, TRAIN_SEQUENCES])
def test_outside_of_the_corpus_is_an_error(whole: Path, sample_id: int) -> None:
    with pytest.raises(IndexError, match=f"there are {TRAIN_SEQUENCES}"):
        TokenCorpus(whole, "train")[sample_id]


def test_manifest_says_what_corpus_json_says(whole: Path) -> None:
    manifest = read_manifest(whole)
    raw = json.loads((whole / "corpus.json").read_text())
    said = manifest.model_dump(exclude={"location", "sha256", "tokenizer"})
    assert said == {key: value for key, value in raw.items() if key != "tokenizer"}
    assert manifest.tokenizer.name == "none"
    assert manifest.location == str(whole)


def test_missing_manifest_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"corpus\.json: cannot be read.*python data_prep/tokenize_to_mds\.py.*--out"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format_version", 2),
        ("sequence_length", 1),
        ("sequence_length", "8"),
        ("token_dtype", "int64"),
        ("vocab_size", 70_000),
        ("eos_token_id", 1000),
        ("source", None),
        ("tokenizer.folder", None),
        ("tokenizer.sha256", 5),
        ("splits.train.sequences", True),
        ("splits.train.tokens", TRAIN_SEQUENCES * LENGTH + 1),
        ("splits.train.tokens", None),
        ("splits.validation.bytes", 0),
        ("splits.validation.index_sha256", None),
        ("splits.validation", None),
    ],
)
def test_wrong_field_of_the_manifest_is_named(folder: Path, path: str, value: Any) -> None:
    corpus = json.loads((folder / "corpus.json").read_text())
    *parents, key = path.split(".")
    place = corpus
    for parent in parents:
        place = place[parent]
    if value is None:
        del place[key]
    else:
        place[key] = value
    (folder / "corpus.json").write_text(json.dumps(corpus))
    with pytest.raises(ValueError, match=r"corpus\.json: .*--overwrite") as error:
        read_manifest(folder)
    # A missing split is reported as too few splits.
    assert (path if path != "splits.validation" else "splits") in str(error.value)


@pytest.mark.parametrize("content", ["", "[1]", '{"format_version": 1'])
def test_manifest_that_is_no_object(folder: Path, content: str) -> None:
    (folder / "corpus.json").write_text(content)
    with pytest.raises(ValueError, match="is not a JSON object"):
        read_manifest(folder)


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1  # in a token: the sample still has its length
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_byte, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-5])])
def test_damaged_or_missing_shard_is_named(folder: Path, damage: Any) -> None:
    damage(folder / "train" / "shard.00002.mds")
    corpus = TokenCorpus(folder, "train")
    first = int(corpus.shard_sizes[:2].sum())
    corpus[first - 1]
    corpus[first + int(corpus.shard_sizes[2])]
    with pytest.raises(RuntimeError, match=r"train/shard\.00002\.mds: is (damaged|missing).*--overwrite"):
        corpus[first]


def test_what_fails_in_the_thread_reaches_next(folder: Path) -> None:
    flip_byte(folder / "train" / "shard.00002.mds")
    corpus = TokenCorpus(folder, "train")
    layout = dict(rank=0, world_size=1, micro_batch=4, accumulation=1)
    stream = BatchStream(corpus, corpus.order("none", 0), start_step=0, **layout)
    good = 0
    with pytest.raises(RuntimeError, match=r"shard\.00002\.mds: is damaged"):
        for _ in range(TRAIN_SEQUENCES):
            next(stream)
            good += 1
    assert good == int(corpus.shard_sizes[:2].sum()) // 4
    with pytest.raises(RuntimeError, match=r"shard\.00002\.mds"):  # and not a wait for ever
        next(stream)
    stream.close()


def test_shard_that_vanishes_during_the_run_is_named(folder: Path) -> None:
    corpus = TokenCorpus(folder, "train")
    corpus[0]
    (folder / "train" / "shard.00000.mds").unlink()
    with pytest.raises(RuntimeError, match=r"shard\.00000\.mds: sample 1 can no longer be read"):
        corpus[1]


def test_changed_index_is_named(folder: Path) -> None:
    index = folder / "train" / "index.json"
    listed = json.loads(index.read_text())
    del listed["shards"][-1]
    index.write_text(json.dumps(listed))
    with pytest.raises(RuntimeError, match=r"train/index\.json: is damaged"):
        TokenCorpus(folder, "train")


def test_index_that_lists_too_little_is_noticed_although_its_hash_fits(folder: Path) -> None:
    index = folder / "train" / "index.json"
    listed = json.loads(index.read_text())
    del listed["shards"][-1]
    index.write_text(json.dumps(listed))
    corpus = json.loads((folder / "corpus.json").read_text())
    corpus["splits"]["train"]["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    (folder / "corpus.json").write_text(json.dumps(corpus))
    with pytest.raises(RuntimeError, match=rf"index\.json: lists \d+ sequences, corpus\.json {TRAIN_SEQUENCES}"):
        TokenCorpus(folder, "train")


def test_shards_of_another_length_are_noticed(folder: Path) -> None:
    corpus = json.loads((folder / "corpus.json").read_text())
    corpus["sequence_length"] = 2 * LENGTH
    for split in corpus["splits"].values():
        split["tokens"] *= 2
    (folder / "corpus.json").write_text(json.dumps(corpus))
    with pytest.raises(RuntimeError, match=r"index\.json: has columns.*uint16:8.*uint16:16"):
        TokenCorpus(folder, "train")


def test_local_corpus_is_only_read(folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    corpus = TokenCorpus(folder, "train")
    take(corpus, steps=5, rank=0, world_size=1, micro_batch=8, accumulation=1)
    tokenizer_path(corpus.manifest)
    assert sorted(folder.rglob("*")) == before


def test_cache_holds_what_was_read_and_survives_its_origin(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    corpus = TokenCorpus(folder, "train", cache)
    assert not list(cache.rglob("*.mds"))
    corpus[0]
    assert [path.name for path in cache.rglob("*.mds")] == ["shard.00000.mds"]
    for sample_id in range(len(corpus)):
        corpus[sample_id]
    manifest = read_manifest(folder)
    assert (tokenizer_path(manifest, cache) / "tokenizer.json").read_text() == "{}"
    shutil.rmtree(folder)
    again = TokenCorpus(manifest, "train", cache)
    for sample_id in range(len(again)):
        np.testing.assert_array_equal(again[sample_id], sequence("train", sample_id))


def test_damaged_copy_in_a_cache_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    TokenCorpus(folder, "train", tmp_path / "cache")[0]
    (copy,) = (tmp_path / "cache").rglob("shard.00000.mds")
    (index,) = (tmp_path / "cache").rglob("index.json")
    flip_byte(copy)
    index.write_text("{")
    corpus = TokenCorpus(folder, "train", tmp_path / "cache")
    np.testing.assert_array_equal(corpus[0], sequence("train", 0))


def test_damaged_origin_of_a_cache_is_named(folder: Path, tmp_path: Path) -> None:
    flip_byte(folder / "train" / "shard.00000.mds")
    corpus = TokenCorpus(folder, "train", tmp_path / "cache")
    with pytest.raises(RuntimeError, match=r"shard\.00000\.mds: is damaged.*Copy it again from where .*corpus"):
        corpus[0]


def test_two_corpora_do_not_meet_in_a_cache(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, second = TokenCorpus(folder, "train", cache), TokenCorpus(write_corpus(tmp_path / "b", 100), "train", cache)
    np.testing.assert_array_equal(first[0], sequence("train", 0))
    np.testing.assert_array_equal(second[0], sequence("train", 100))
    np.testing.assert_array_equal(first[1], sequence("train", 1))


def test_remote_corpus_needs_a_cache_and_a_known_storage(whole: Path) -> None:
    manifest = read_manifest(whole).model_copy(update={"location": "s3://bucket/corpus"})
    with pytest.raises(ValueError, match=r"data\.cache: is not set, but data\.corpus is remote"):
        TokenCorpus(manifest, "train")
    with pytest.raises(ValueError, match="neverland://corpus/corpus.json: cannot be read.*Unsupported remote path"):
        read_manifest("neverland://corpus")


def test_fingerprint_changes_with_all_that_decides_the_order(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = TokenCorpus(whole, "train")
    base = corpus.order("py1e", 1).fingerprint()
    assert corpus.order("py1e", 1).fingerprint() == base
    others = {corpus.order("py1e", 2).fingerprint(), corpus.order("py1s", 1).fingerprint()}
    others |= {corpus.order("none", 1).fingerprint(), TokenCorpus(whole, "validation").order("py1e", 1).fingerprint()}
    others.add(GlobalOrder(len(corpus), corpus.shard_sizes, "py1e", 1, "another corpus").fingerprint())
    order = corpus.order("py1e", 1)
    monkeypatch.setattr("dispersion_pretrain.data.get_shuffle", lambda *arguments: np.arange(508))
    others.add(order.fingerprint())  # as if another version of the library shuffled otherwise
    assert len(others | {base}) == 7


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
        BatchStream(corpus, corpus.order("py1e", 0), **(good | arguments))


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
    order = corpus.order("py1e", seed=3)
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
                np.testing.assert_array_equal(tokens, sequence("train", order.sample_id(position)))
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
    read = []
    original = TokenCorpus.__getitem__

    def counting(self: TokenCorpus, sample_id: int) -> NDArray[np.generic]:
        read.append(sample_id)
        return original(self, sample_id)

    monkeypatch.setattr(TokenCorpus, "__getitem__", counting)
    layout = dict(rank=0, world_size=1, micro_batch=2, accumulation=1)
    stream = BatchStream(corpus, corpus.order("py1e", 0), start_step=0, prefetch=3, **layout)
    next(stream)
    time.sleep(0.3)
    assert len(read) == 2 * (1 + 3 + 1)  # taken, waiting, and the one that waits for a place
    stream.close()
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batch-stream"]


def test_waiting_is_counted(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = TokenCorpus(whole, "train")
    original = TokenCorpus.__getitem__

    def slow(self: TokenCorpus, sample_id: int) -> NDArray[np.generic]:
        time.sleep(0.05)
        return original(self, sample_id)

    monkeypatch.setattr(TokenCorpus, "__getitem__", slow)
    layout = dict(rank=0, world_size=1, micro_batch=2, accumulation=1)
    stream = BatchStream(corpus, corpus.order("py1e", 0), start_step=0, **layout)
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
    layout = dict(world_size=world_size, micro_batch=micro_batch, num_sequences=num_sequences)
    ranks = [validation_batches(corpus, rank=rank, **layout) for rank in range(world_size)]
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
