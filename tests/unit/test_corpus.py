"""The corpus: its manifest, its files, random access."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming.base.format.mds import MDSReader

from dispersion_pretrain import remotes
from dispersion_pretrain.corpus import TokenCorpus, read_manifest, tokenizer_path
from small_corpus import LENGTH, SHARDS, TRAIN_SEQUENCES, flip_byte, sequence, take, write_corpus


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus that no test changes."""
    return write_corpus(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A corpus that the test may damage."""
    return write_corpus(tmp_path / "corpus")


def test_random_access_gives_every_sequence(whole: Path) -> None:
    for split in ("train", "validation"):
        corpus = TokenCorpus(whole, split)
        for sample_id in np.random.default_rng(0).permutation(len(corpus)):
            np.testing.assert_array_equal(corpus[int(sample_id)], sequence(split, int(sample_id)))
    assert len(TokenCorpus(whole, "train").shard_sizes) == SHARDS


def test_samples_are_read_together(whole: Path) -> None:
    corpus = TokenCorpus(whole, "train")
    wanted = np.random.default_rng(1).integers(0, len(corpus), 100)  # with repetitions
    tokens = corpus.read(wanted)
    assert tokens.dtype == np.uint16 and tokens.shape == (100, LENGTH)
    np.testing.assert_array_equal(tokens, [sequence("train", int(sample_id)) for sample_id in wanted])
    assert corpus.read([]).shape == (0, LENGTH)
    with pytest.raises(IndexError, match=f"sample {TRAIN_SEQUENCES} of the train split"):
        corpus.read([0, TRAIN_SEQUENCES])


def test_shards_are_as_the_files_say(whole: Path) -> None:
    corpus = TokenCorpus(whole, "train")
    paths = sorted((whole / "train").glob("*.mds"))
    assert corpus.shard_bytes.tolist() == [path.stat().st_size for path in paths]
    first = np.cumsum(corpus.shard_sizes) - corpus.shard_sizes
    assert [corpus.shard_of(int(sample_id)) for sample_id in first] == list(range(SHARDS))
    assert [corpus.shard_of(int(sample_id) - 1) for sample_id in first[1:]] == list(range(SHARDS - 1))
    # streaming's own reader agrees
    stored = [MDSReader.from_json(str(whole), "train", shard) for shard in _index(whole)["shards"]]
    for shard_id, reader in enumerate(stored):
        for row in range(len(reader)):
            np.testing.assert_array_equal(corpus[int(first[shard_id]) + row], reader.get_item(row)["tokens"])


def test_a_shard_can_be_fetched_ahead(folder: Path, tmp_path: Path) -> None:
    corpus = TokenCorpus(folder, "train", tmp_path / "cache")
    corpus.prefetch(1)
    assert [path.name for path in (tmp_path / "cache").rglob("*.mds")] == ["shard.00001.mds"]
    shutil.rmtree(folder)
    corpus.prefetch(1)
    corpus[int(corpus.shard_sizes[0])]


def test_mirrors_stand_in_for_a_corpus_that_is_gone(folder: Path, tmp_path: Path) -> None:
    mirror, cache = tmp_path / "mirror", tmp_path / "cache"
    manifest = read_manifest(folder)
    folder.rename(mirror)
    assert read_manifest(folder, [str(mirror)]) == manifest
    corpus = TokenCorpus(str(folder), "train", cache, mirrors=[str(mirror)])
    np.testing.assert_array_equal(corpus[0], sequence("train", 0))
    assert (tokenizer_path(manifest, cache, [str(mirror)]) / "tokenizer.json").read_text() == "{}"
    with pytest.raises(ValueError, match=f"{folder}/corpus.json: cannot be read.*{folder}: .*nowhere: "):
        read_manifest(folder, [str(tmp_path / "nowhere")])


def test_a_bounded_cache_serves_the_whole_corpus(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    largest = int(TokenCorpus(folder, "train").shard_bytes.max())
    corpus = TokenCorpus(folder, "train", cache, cache_limit_bytes=largest)
    for sample_id in np.random.default_rng(0).permutation(len(corpus)):
        np.testing.assert_array_equal(corpus[int(sample_id)], sequence("train", int(sample_id)))
        assert sum(path.stat().st_size for path in cache.rglob("*.mds")) <= largest
    with pytest.raises(ValueError, match=rf"data\.cache_limit_gib: {largest - 1} bytes do not hold train/shard"):
        TokenCorpus(folder, "train", cache, cache_limit_bytes=largest - 1)


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


@pytest.mark.parametrize("damage", [flip_byte, Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-5])])
def test_damaged_or_missing_shard_is_named(folder: Path, damage: Any) -> None:
    damage(folder / "train" / "shard.00002.mds")
    corpus = TokenCorpus(folder, "train")
    first = int(corpus.shard_sizes[:2].sum())
    corpus[first - 1]
    corpus[first + int(corpus.shard_sizes[2])]
    with pytest.raises(RuntimeError, match=r"train/shard\.00002\.mds: is (damaged|missing).*--overwrite"):
        corpus[first]


def test_shard_that_vanishes_during_the_run_is_named(folder: Path) -> None:
    corpus = TokenCorpus(folder, "train")
    corpus[0]
    (folder / "train" / "shard.00000.mds").unlink()
    with pytest.raises(RuntimeError, match=r"shard\.00000\.mds: is missing.*Copy it again"):
        corpus[1]


def test_changed_index_is_named(folder: Path) -> None:
    index = folder / "train" / "index.json"
    listed = json.loads(index.read_text())
    del listed["shards"][-1]
    index.write_text(json.dumps(listed))
    with pytest.raises(RuntimeError, match=r"train/index\.json: is damaged"):
        TokenCorpus(folder, "train")


def _index(folder: Path) -> Any:
    return json.loads((folder / "train" / "index.json").read_text())


def _replace_index(folder: Path, listed: Any) -> None:
    """Write another index, and its hash into corpus.json."""
    index = folder / "train" / "index.json"
    index.write_text(json.dumps(listed))
    corpus = json.loads((folder / "corpus.json").read_text())
    corpus["splits"]["train"]["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
    (folder / "corpus.json").write_text(json.dumps(corpus))


def test_index_that_lists_too_little_is_noticed_although_its_hash_fits(folder: Path) -> None:
    listed = _index(folder)
    del listed["shards"][-1]
    _replace_index(folder, listed)
    with pytest.raises(RuntimeError, match=rf"index\.json: lists \d+ sequences, corpus\.json {TRAIN_SEQUENCES}"):
        TokenCorpus(folder, "train")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("compression", "zstd", "lists mds 2 with compression zstd. Only mds 2 without compression can be read"),
        ("format", "csv", "lists csv 2 with compression None"),
        ("version", 3, "lists mds 3 with compression None"),
        ("raw_data", {"basename": "x.mds", "bytes": 1, "hashes": {"md5": "0"}}, "lists x.mds without sha256"),
    ],
)
def test_shards_that_cannot_be_read_are_refused(folder: Path, field: str, value: Any, message: str) -> None:
    listed = _index(folder)
    listed["shards"][1][field] = value
    _replace_index(folder, listed)
    with pytest.raises(RuntimeError, match=rf"train/index\.json: {message}"):
        TokenCorpus(folder, "train")


def test_a_shard_that_does_not_hold_what_the_index_says_is_named(folder: Path) -> None:
    listed = _index(folder)
    listed["shards"][0]["samples"] += 1
    listed["shards"][1]["samples"] -= 1
    _replace_index(folder, listed)
    with pytest.raises(RuntimeError, match=r"shard\.00000\.mds: does not hold \d+ samples of 16 bytes"):
        TokenCorpus(folder, "train")[0]


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


def test_damaged_origin_of_a_cache_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remotes, "FIRST_WAIT_S", 0.0)
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
    with pytest.raises(ValueError, match="neverland://corpus: cannot be read.*Unsupported remote path"):
        read_manifest("neverland://corpus")
