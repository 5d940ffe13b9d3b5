"""dispersion_pretrain.checkpoint on two gloo ranks: shared work, one answer, failing together."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dispersion_pretrain import checkpoint, distributed, retention, saving
from dispersion_pretrain.checkpoint import Tier
from dispersion_pretrain.saving import Description, Saved, Saves
from spawn import run_ranks


def save(saves: Saves, step: int, *, tier: Tier | None = None, **content: Any) -> Saved:
    """Save a shard of random bytes of this rank, and its state; wait for the end."""
    saves.begin(tier or saves.shared, step)
    saves.take(f"shard_{distributed.rank()}.pt", os.urandom(1000 + distributed.rank()))
    for name, value in content.items():
        saves.take(name, value)
    saves.take_rank_state({"rank": distributed.rank(), "random": distributed.random_state()})
    saves.write(Description(step, step * 10, step * 2, distributed.world_size()))
    saves.finish()
    (saved,) = saves.poll()
    return saved


def _commit_and_find(run_folder: Path) -> tuple[Any, ...]:
    hashed: list[str] = []
    real_sha256 = checkpoint._sha256

    def counting_sha256(path: Path) -> str:
        hashed.append(path.name)
        return real_sha256(path)

    checkpoint._sha256 = counting_sha256
    saved = save(Saves(run_folder), 100)
    assert saved.error is None and hashed == [], "a file is hashed while it is written"
    info, skipped = checkpoint.find_newest_good(run_folder)
    assert info is not None and info.path == checkpoint.step_folder(run_folder, 100)
    rank = checkpoint.load_rank_state(info.path)["rank"]
    return sorted(hashed), info.step, info.world_size, skipped, rank


def test_two_ranks_commit_one_checkpoint_and_share_the_reading(tmp_path: Path) -> None:
    first, second = run_ranks(_commit_and_find, 2, tmp_path)
    everything = ["rank_00000.pt", "rank_00001.pt", "shard_0.pt", "shard_1.pt"]
    assert len(first[0]) == len(second[0]) == 2
    assert sorted(first[0] + second[0]) == everything
    assert first[1:] == (100, 2, [], 0)
    assert second[1:] == (100, 2, [], 1)
    assert checkpoint.verify(checkpoint.step_folder(tmp_path, 100)) == []


def _message_of(action: Any) -> str:
    try:
        action()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "no error"


def _disk_full_on_rank_1(run_folder: Path, background: bool) -> tuple[Any, ...]:
    """Let rank 1 fail to write its state, then rank 0 to commit; then save without faults."""
    saves = Saves(run_folder, background=background, keep_last=5)
    save(saves, 100)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if distributed.rank() == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))  # a real write that fails half-way
    writing = save(saves, 200, large={"large": torch.zeros(10_000)}).error
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    required = _message_of(saves.require_saved)

    real_commit = saving._commit

    def no_space(save: Any) -> None:
        raise OSError(28, "No space left on device", str(save.staging))

    if distributed.is_main():
        saving._commit = no_space
    committing = save(saves, 200).error
    saving._commit = real_commit
    distributed.barrier()
    left = sorted(path.name for path in checkpoint.checkpoints_folder(run_folder).iterdir())
    distributed.barrier()
    after_failures, _ = checkpoint.find_newest_good(run_folder)
    last = save(saves, 300)
    saves.require_saved()
    info, _ = checkpoint.find_newest_good(run_folder)
    assert after_failures is not None and info is not None and last.error is None
    return writing, committing, required, left, after_failures.step, info.step


@pytest.mark.parametrize("background", [True, False])
def test_a_failing_rank_fails_the_save_on_all_and_harms_no_older_checkpoint(tmp_path: Path, background: bool) -> None:
    first, second = run_ranks(_disk_full_on_rank_1, 2, tmp_path, background)
    assert first == second
    writing, committing, required, left, after_failures, newest = first
    assert writing.startswith("rank 1: OSError: [Errno 27] File too large: ") and "00000200/large" in writing
    assert "the state at step 200 was not saved: rank 1: OSError" in required and "start again" in required
    assert committing.startswith("rank 0: OSError: [Errno 28] No space left on device")
    assert left == ["step-00000100"], "the files of a failed save take no room"
    assert (after_failures, newest) == (100, 300)


def _find_with_damage(run_folder: Path) -> tuple[int, list[str], str, str]:
    saves = Saves(run_folder, keep_last=3)
    for step in (100, 200, 300):
        save(saves, step)
    if distributed.is_main():
        for name, step in (("shard_1.pt", 300), ("shard_0.pt", 200)):  # of the right size: found by reading only
            path = checkpoint.step_folder(run_folder, step) / name
            path.write_bytes(bytes(reversed(path.read_bytes())))
    distributed.barrier()
    info, skipped = checkpoint.resolve(run_folder, "auto")
    assert info is not None
    named = _message_of(lambda: checkpoint.resolve(run_folder, checkpoint.step_folder(run_folder, 200)))
    missing = _message_of(lambda: checkpoint.resolve(run_folder, run_folder / "nowhere"))
    if distributed.is_main():
        retention.retain(run_folder, keep_last=1)
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
    save(Saves(tmp_path), 100)  # by one rank
    first, second = run_ranks(_load_at_another_world_size, 2, tmp_path)
    assert first == second
    assert "rank(s) 1 of 2 failed" in first and "rank_00001.pt" in first


# ---- the second tier


def _on_two_nodes(folder: Path, run_folder: Path) -> tuple[Any, ...]:
    """Two ranks that see different disks, as on two nodes: what counts is what both can read."""
    disk = folder / f"node-{distributed.rank()}"
    local = checkpoint.local_tier(disk, run_folder, {"stage": 2})
    saves = Saves(run_folder, local=local, keep_last=5)
    save(saves, 100)
    for step in (110, 120):
        assert save(saves, step, tier=local).error is None

    def newest(local: Tier = local) -> int:
        distributed.barrier()
        info, _ = checkpoint.find_newest_good(run_folder, local)
        assert info is not None
        assert checkpoint.load_rank_state(info.path)["rank"] == distributed.rank()
        return info.step

    kept = [path.name for path in checkpoint.checkpoints_folder(local.run_folder).iterdir()]
    files = checkpoint.check_structure(checkpoint.step_folder(local.run_folder, 120))[1]["files"]
    found = [newest()]
    other_stage = checkpoint.local_tier(disk, run_folder, {"stage": 3})
    found.append(newest(other_stage))
    assert other_stage.run_folder == local.run_folder
    _, skipped = checkpoint.find_newest_good(run_folder, other_stage)
    if distributed.rank() == 1:  # of the right size: found by reading only
        path = checkpoint.step_folder(local.run_folder, 120) / "shard_1.pt"
        path.write_bytes(bytes(reversed(path.read_bytes())))
    found.append(newest())
    if distributed.rank() == 1:  # another machine takes its place
        shutil.rmtree(disk)
    found.append(newest(checkpoint.local_tier(disk, run_folder, {"stage": 2})))
    assert save(saves, 130, tier=local).error is None
    found.append(newest())
    distributed.barrier()
    if distributed.is_main():  # the run begins again
        shutil.rmtree(run_folder)
    distributed.barrier()
    anew = checkpoint.local_tier(disk, run_folder, {"stage": 2})
    assert checkpoint.find_newest_good(run_folder, anew) == (None, [])
    return local.ranks, kept, sorted(files), found, skipped


def test_a_checkpoint_on_the_nodes_disks_counts_where_every_node_has_its_part(tmp_path: Path) -> None:
    results = run_ranks(_on_two_nodes, 2, tmp_path / "disks", tmp_path / "run")
    for rank, (ranks, kept, files, found, skipped) in enumerate(results):
        assert ranks == (rank,)
        assert kept == ["step-00000120"], "only the newest is kept"
        assert files == [f"rank_{rank:05d}.pt", f"shard_{rank}.pt"]
        assert found == [120, 100, 100, 100, 130]
        assert len(skipped) == 1 and "other zero settings" in skipped[0]


def _on_one_node(folder: Path, run_folder: Path) -> tuple[Any, ...]:
    local = checkpoint.local_tier(folder, run_folder, {"stage": 2})
    saves = Saves(run_folder, local=local)
    save(saves, 100)
    save(saves, 110, tier=local)
    info, _ = checkpoint.find_newest_good(run_folder, local)
    assert info is not None
    return local.ranks, info.step, sorted(info.manifest["files"])


def test_ranks_of_one_node_share_a_folder(tmp_path: Path) -> None:
    first, second = run_ranks(_on_one_node, 2, tmp_path / "disk", tmp_path / "run")
    files = ["rank_00000.pt", "rank_00001.pt", "shard_0.pt", "shard_1.pt"]
    assert first == second == ((0, 1), 110, files)
