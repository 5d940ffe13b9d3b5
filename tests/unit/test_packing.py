"""Shards: byte by byte what mosaicml-streaming writes, wherever the writing stopped and went on."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import _torchvision_guard  # noqa: F401  (before streaming)

# isort: split
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from streaming import MDSWriter

from packing import ShardFormat, ShardStream, put_last_shard, token_dtype, write_index
from prep_command import contents, read_blocks
from prep_errors import InputError


def write_stream(folder: Path, shard_format: ShardFormat, pieces: list[NDArray[Any]], stops: set[int]) -> None:
    """Write the pieces; before those in `stops` another process goes on, which finds more on disk than was counted."""
    stream = ShardStream(folder, shard_format)
    shards = []
    for index, piece in enumerate(pieces):
        if index in stops:
            stream.flush()
            number, tokens = stream.number, stream.tokens
            stream.add(np.ones(5 * shard_format.length, shard_format.dtype))
            stream.finish()
            stream.close()
            stream = ShardStream(folder, shard_format, number, tokens)
        shards += stream.add(piece)
    last = stream.finish()
    stream.close()
    put_last_shard(folder, stream.number, last[0][1]["samples"] if last else 0)
    write_index(folder, [entry for _, entry in shards + last])


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(0, 70), max_size=12),
    length=st.integers(1, 17),
    dtype=st.sampled_from(["uint16", "uint32"]),
    room=st.integers(0, 300),
    stops=st.sets(st.integers(0, 11)),
)
def test_shards_are_those_of_the_library(sizes: list[int], length: int, dtype: str, room: int, stops: set[int]) -> None:
    random = np.random.default_rng(sum(sizes))
    pieces = [random.integers(0, np.iinfo(dtype).max, size).astype(dtype) for size in sizes]
    whole = np.concatenate([*pieces, np.empty(0, dtype)])
    whole = whole[: len(whole) // length * length]
    with tempfile.TemporaryDirectory() as folder:
        shard_bytes = smallest_shard(length, dtype) + room
        write_stream(Path(folder, "ours"), ShardFormat(length, dtype, shard_bytes), pieces, stops)
        columns = {"tokens": f"ndarray:{dtype}:{length}"}
        out = str(Path(folder, "library"))
        with MDSWriter(columns=columns, out=out, hashes=["sha256"], size_limit=shard_bytes) as writer:
            for block in whole.reshape(-1, length):
                writer.write({"tokens": block})
        assert contents(Path(folder, "ours")) == contents(Path(folder, "library"))
        if len(whole):
            np.testing.assert_array_equal(read_blocks(Path(folder), "ours").reshape(-1), whole)


def smallest_shard(length: int, dtype: str) -> int:
    """Return what the message says is the least."""
    with pytest.raises(InputError, match="--shard-bytes 1: does not do") as error:
        ShardFormat(length, dtype, 1)
    smallest = int(str(error.value).split(" to ")[0].split()[-1])
    with pytest.raises(InputError):
        ShardFormat(length, dtype, smallest - 1)
    return smallest


@pytest.mark.parametrize("shard_bytes", [0, 2**32])
def test_impossible_sizes_are_refused(shard_bytes: int) -> None:
    with pytest.raises(InputError, match=f"--shard-bytes {shard_bytes}"):
        ShardFormat(16, "uint16", shard_bytes)


def test_lost_bytes_are_noticed(tmp_path: Path) -> None:
    shard_format = ShardFormat(16, "uint16", 10_000)
    stream = ShardStream(tmp_path, shard_format)
    stream.add(np.arange(100, dtype=np.uint16))
    stream.close()
    path = tmp_path / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileNotFoundError, match=r"shard.00000.mds: is shorter"):
        ShardStream(tmp_path, shard_format, 0, 100)


def test_what_the_state_does_not_know_is_removed(tmp_path: Path) -> None:
    """A store would get it, and for a shard that is whole."""
    stream = ShardStream(tmp_path, ShardFormat(16, "uint16", 1000))
    stream.add(np.arange(3000, dtype=np.uint16))
    stream.finish()
    stream.close()

    def names() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    assert len(names()) > 6 and names()[-2].endswith(".last")
    for tokens, known in ((16, 3), (0, 2)):  # of shard 2
        ShardStream(tmp_path, ShardFormat(16, "uint16", 1000), 2, tokens).close()
        assert names() == [f"shard.0000{number}.mds" for number in range(known)]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_tokens_take_the_smallest_type_that_holds_them(vocab_size: int, dtype: str) -> None:
    assert token_dtype(vocab_size) == dtype


def test_index_of_a_large_shard_has_no_rounded_numbers(tmp_path: Path) -> None:
    """Offsets near the end of what 32 bits hold."""
    shard_format = ShardFormat(2**20, "uint32", 2**32 - 1)
    head = np.frombuffer(
        shard_format.head(shard_format.blocks_in_shard)[: 4 * (shard_format.blocks_in_shard + 2)], np.uint32
    )
    assert head[0] == shard_format.blocks_in_shard == 1023
    assert (np.diff(head[1:].astype(np.int64)) == 2**22).all()
    assert json.loads(json.dumps(shard_format.entry(0, 1023, "")))["raw_data"]["bytes"] == int(head[-1])
