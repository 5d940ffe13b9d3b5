"""dispersion_pretrain.checkpoint on two gloo ranks: shared work, one answer, failing together."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch

from dispersion_pretrain import checkpoint, distributed
from spawn import run_ranks


def save(run_folder: Path, step: int) -> Path:
    staging = checkpoint.staging_folder(run_folder, step)
    (staging / f"shard_{distributed.rank()}.pt").write_bytes(os.urandom(1000 + distributed.rank()))
    checkpoint.save_rank_state(staging, {"rank": distributed.rank(), "random": distributed.random_state()})
    return checkpoint.commit(
        staging,
        step=step,
        tokens=step * 10,
        samples=step * 2,
        world_size=distributed.world_size(),
        settings={},
        versions={},
        extra={},
    )


def _commit_and_find(run_folder: Path) -> tuple[Any, ...]:
    hashed: list[str] = []
    real_sha256 = checkpoint._sha256

    def counting_sha256(path: Path, flush: bool = False) -> str:
        hashed.append(path.name)
        return real_sha256(path, flush)

    checkpoint._sha256 = counting_sha256
    path = save(run_folder, 100)
    saved = sorted(hashed)
    hashed.clear()
    info, skipped = checkpoint.find_newest_good(run_folder)
    assert info is not None and info.path == path
    rank = checkpoint.load_rank_state(info.path)["rank"]
    return saved, sorted(hashed), info.step, info.world_size, skipped, rank


def test_two_ranks_commit_one_checkpoint_and_share_the_reading(tmp_path: Path) -> None:
    first, second = run_ranks(_commit_and_find, 2, tmp_path)
    everything = ["rank_00000.pt", "rank_00001.pt", "shard_0.pt", "shard_1.pt"]
    for stage in (0, 1):  # at the commit and at the search
        assert len(first[stage]) == len(second[stage]) == 2
        assert sorted(first[stage] + second[stage]) == everything
    assert first[2:] == (100, 2, [], 0)
    assert second[2:] == (100, 2, [], 1)
    assert checkpoint.verify(checkpoint.step_folder(tmp_path, 100)) == []


def _message_of(action: Any) -> str:
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def _disk_full_on_rank_1(run_folder: Path) -> tuple[str, str, int, int]:
    """Let rank 1 fail to write its state, then to read back its share at the commit; then save without faults."""
    save(run_folder, 100)
    staging = checkpoint.staging_folder(run_folder, 200)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # a real write that fails half-way
    writing = _message_of(lambda: checkpoint.save_rank_state(staging, {"large": torch.zeros(10_000)}))
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    real_sha256 = checkpoint._sha256

    def no_space(path: Path, flush: bool = False) -> str:
        raise OSError(28, "No space left on device", str(path))

    if distributed.rank() == 1:
        checkpoint._sha256 = no_space
    committing = _message_of(lambda: save(run_folder, 200))
    checkpoint._sha256 = real_sha256
    after_failures, _ = checkpoint.find_newest_good(run_folder)
    save(run_folder, 300)
    info, _ = checkpoint.find_newest_good(run_folder)
    assert after_failures is not None and info is not None
    return writing, committing, after_failures.step, info.step


def test_a_failing_rank_stops_all_and_harms_no_older_checkpoint(tmp_path: Path) -> None:
    first, second = run_ranks(_disk_full_on_rank_1, 2, tmp_path)
    assert first == second
    writing, committing, after_failures, newest = first
    assert "rank(s) 1 of 2 failed" in writing and "rank_00001.pt" in writing and "File too large" in writing
    assert "rank(s) 1 of 2 failed" in committing and "No space left on device" in committing
    assert (after_failures, newest) == (100, 300)


def _find_with_damage(run_folder: Path) -> tuple[int, list[str], str, str]:
    for step in (100, 200, 300):
        save(run_folder, step)
    if distributed.is_main():
        for name, step in (("shard_1.pt", 300), ("shard_0.pt", 200)):  # of the right size: found by reading only
            path = checkpoint.step_folder(run_folder, step) / name
            path.write_bytes(bytes(reversed(path.read_bytes())))
    distributed.barrier()
    info, skipped = checkpoint.resolve(run_folder, "auto")
    assert info is not None
    named = _message_of(lambda: checkpoint.resolve(run_folder, checkpoint.step_folder(run_folder, 200)))
    missing = _message_of(lambda: checkpoint.resolve(run_folder, run_folder / "nowhere"))
    checkpoint.retain(run_folder, keep_last=1)
    distributed.barrier()
    return info.step, skipped, named, missing


def test_damage_that_one_rank_finds_is_known_to_all(tmp_path: Path) -> None:
    first, second = run_ranks(_find_with_damage, 2, tmp_path)
    assert first == second
    step, skipped, named, missing = first
    assert step == 100
    assert [reason.rsplit(": ", 1)[1].split()[0] for reason in skipped] == ["shard_1.pt", "shard_0.pt"]
    assert "shard_0.pt has another content than was saved" in named
    assert "nowhere is not a folder" in missing
    assert 100 in checkpoint.committed_steps(tmp_path)


def _load_at_another_world_size(run_folder: Path) -> str:
    return _message_of(lambda: checkpoint.load_rank_state(checkpoint.step_folder(run_folder, 100)))


def test_a_rank_without_state_is_an_error_on_all(tmp_path: Path) -> None:
    save(tmp_path, 100)  # by one rank
    first, second = run_ranks(_load_at_another_world_size, 2, tmp_path)
    assert first == second
    assert "rank(s) 1 of 2 failed" in first and "rank_00001.pt" in first
