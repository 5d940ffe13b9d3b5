"""Saves in one process: the copy, waiting, failing disks, what is kept."""

from __future__ import annotations

import collections
import logging
import os
import subprocess
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from dispersion_pretrain import checkpoint, retention, saving
from dispersion_pretrain.host_copy import HostCopy
from dispersion_pretrain.saving import Description, Saved, Saves


def begin(saves: Saves, step: int, **content: Any) -> None:
    """Hand a save to the thread."""
    saves.begin(saves.shared, step)
    for name, value in content.items():
        saves.take(name, value)
    saves.write(Description(step, step * 10, step, world_size=1))


def save(saves: Saves, step: int, **content: Any) -> Saved:
    begin(saves, step, **content)
    saves.finish()
    return saves.poll()[-1]


def load(run_folder: Path, step: int, name: str) -> Any:
    return torch.load(checkpoint.step_folder(run_folder, step) / name, weights_only=False)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are written once the event is set."""
    ready, write = threading.Event(), saving.write_file

    def wait_and_write(path: Path, content: Any) -> dict[str, Any]:
        assert ready.wait(60)
        return write(path, content)

    monkeypatch.setattr(saving, "write_file", wait_and_write)
    yield ready
    ready.set()


# ---- the copy


class Pair(NamedTuple):
    left: torch.Tensor
    right: int


def test_a_copy_shares_no_memory_and_keeps_the_form(tmp_path: Path) -> None:
    flat = torch.arange(1000.0)
    module = nn.Linear(3, 2)
    state: Any = {
        "view": flat[10:14],
        "tied": [flat[10:14], flat[10:14].view(2, 2)],
        "module": module.state_dict(),
        "pair": Pair(flat[:2], 7),
        "group": {"lr": 0.1, "betas": (0.9, 0.95), "counts": collections.OrderedDict(a=[1])},
        "transposed": torch.arange(6.0).view(2, 3).t(),
        "scaler": types.SimpleNamespace(scale=1.0),
        "shape": flat.shape,
        "empty": torch.empty(0, dtype=torch.bfloat16),
    }
    copied: Any = HostCopy()("file", state)
    torch.save(copied, tmp_path / "copy")
    assert (tmp_path / "copy").stat().st_size < 6000, "the view brought its whole storage"
    flat.fill_(-1)
    nn.init.zeros_(module.weight)
    state["group"]["lr"], state["group"]["counts"]["a"][0] = 0.2, 2
    state["scaler"].scale = 2.0
    assert copied["view"].tolist() == [10, 11, 12, 13]
    assert copied["tied"][0] is copied["view"] and copied["tied"][1].tolist() == [[10, 11], [12, 13]]
    assert copied["pair"] == Pair(copied["pair"].left, 7) and copied["pair"].left.tolist() == [0, 1]
    assert copied["module"]["weight"].abs().sum() > 0
    assert copied["module"]._metadata == vars(module.state_dict())["_metadata"], "what load_state_dict looks at"
    assert copied["group"] == {"lr": 0.1, "betas": (0.9, 0.95), "counts": {"a": [1]}}
    assert copied["scaler"].scale == 1.0
    assert isinstance(copied["shape"], torch.Size)
    assert copied["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert copied["empty"].dtype == torch.bfloat16


def test_the_memory_of_a_copy_is_used_again() -> None:
    take = HostCopy()
    first = take("file", {"weight": torch.ones(4), "other": [torch.zeros(2)]})
    place = first["weight"].data_ptr()
    second = take("file", {"weight": torch.full((4,), 2.0), "other": [torch.zeros(3)]})
    assert second["weight"].data_ptr() == place and second["weight"].tolist() == [2] * 4
    assert second["other"][0].shape == (3,)


def test_what_is_written_is_the_state_of_the_saves_step(tmp_path: Path, slow_disk: threading.Event) -> None:
    weight, saves = torch.zeros(1000), Saves(tmp_path)
    begin(saves, 1, model={"weight": weight[:500]})
    weight.fill_(7)  # training goes on
    assert saves.poll() == [] and checkpoint.committed_steps(tmp_path) == []
    slow_disk.set()
    saves.finish()
    assert load(tmp_path, 1, "model")["weight"].tolist() == [0] * 500


# ---- waiting


def test_the_next_save_waits_for_a_slow_one(tmp_path: Path, slow_disk: threading.Event) -> None:
    saves = Saves(tmp_path, keep_last=2)
    started = time.monotonic()
    begin(saves, 1, model={"weight": torch.ones(2)})
    threading.Timer(1.0, slow_disk.set).start()
    begin(saves, 2, model={"weight": torch.full((2,), 2.0)})
    assert time.monotonic() - started >= 1.0
    assert checkpoint.committed_steps(tmp_path) == [1], "the first is committed before the second is copied"
    saves.finish()
    assert [saved.step for saved in saves.poll()] == [1, 2]
    assert load(tmp_path, 1, "model")["weight"].tolist() == [1, 1]
    assert load(tmp_path, 2, "model")["weight"].tolist() == [2, 2]


def test_polling_brings_a_save_to_its_end_without_waiting(tmp_path: Path, slow_disk: threading.Event) -> None:
    saves = Saves(tmp_path)
    begin(saves, 1, model=b"x")
    for _ in range(3):
        assert saves.poll() == []
    slow_disk.set()
    deadline, ended = time.monotonic() + 30, saves.poll()
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
        ended = saves.poll()
    assert [(saved.step, saved.error) for saved in ended] == [(1, None)] and ended[0].write_s > 0
    assert checkpoint.verify(checkpoint.step_folder(tmp_path, 1)) == []
    assert saves.poll() == []


def test_without_background_the_checkpoint_is_there_at_once_and_nothing_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("copied")

    monkeypatch.setattr(HostCopy, "__call__", refuse)
    saves = Saves(tmp_path, background=False)
    begin(saves, 1, model={"weight": torch.ones(2)})
    assert checkpoint.committed_steps(tmp_path) == [1]
    assert [saved.error for saved in saves.poll()] == [None]


def test_a_rank_state_that_could_not_be_loaded_is_refused_at_the_save(tmp_path: Path) -> None:
    saves = Saves(tmp_path)
    saves.begin(saves.shared, 1)
    with pytest.raises(RuntimeError, match="rank_00000.pt: a resume could not read the state of this rank"):
        saves.take_rank_state({"path": Path("x")})


# ---- failing disks


def test_no_host_memory_for_the_copy_fails_the_save_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> Any:
        raise MemoryError("no memory")

    saves = Saves(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "__call__", no_memory)
        assert save(saves, 1, model=b"x").error == "rank 0: model: cannot be copied into host memory: no memory"
    assert save(saves, 2, model=b"x").error is None
    assert checkpoint.committed_steps(tmp_path) == [2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system of 1 MiB; its options can be changed by another call."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = False

    def mount(options: str) -> Path:
        nonlocal mounted
        options = f"remount,{options}" if mounted else f"size=1m,{options}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        mounted = True
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_costs_the_new_checkpoint_only(
    small_disk: Callable[[str], Path], background: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run_folder = small_disk("rw")
    saves = Saves(run_folder, background=background)
    assert save(saves, 1, model=b"x" * 300_000).error is None
    with caplog.at_level(logging.WARNING):
        failed = save(saves, 2, model={"weight": torch.zeros(200_000)}, other=b"y")
    assert failed.error is not None and "No space left on device" in failed.error and "/model" in failed.error
    assert "step 2 was not saved" in caplog.text and "Make room" in caplog.text
    assert [path.name for path in checkpoint.checkpoints_folder(run_folder).iterdir()] == ["step-00000001"]
    assert checkpoint.verify(checkpoint.step_folder(run_folder, 1)) == []
    with pytest.raises(RuntimeError, match="the state at step 2 was not saved: .*No space left"):
        saves.require_saved()
    assert save(saves, 3, model=b"x" * 300_000).error is None, "there is room again"
    saves.require_saved()
    assert checkpoint.committed_steps(run_folder) == [3]


def test_a_read_only_run_folder_costs_the_new_checkpoint_only(small_disk: Callable[[str], Path]) -> None:
    run_folder = small_disk("rw")
    saves = Saves(run_folder)
    assert save(saves, 1, model=b"x").error is None
    small_disk("ro")
    assert "Read-only file system" in str(save(saves, 2, model=b"x").error)
    small_disk("rw")
    assert save(saves, 3, model=b"x").error is None
    assert checkpoint.committed_steps(run_folder) == [3]


def test_an_older_checkpoint_that_cannot_be_removed_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    saves = Saves(tmp_path)
    monkeypatch.setattr(retention, "retain", fail)
    assert save(saves, 1, model=b"x").error is None
    assert "cannot look after older checkpoints" in caplog.text


# ---- what is kept


def test_milestones_the_last_and_those_an_evaluation_needs_are_kept(tmp_path: Path) -> None:
    pending: set[int] = set()
    saves = Saves(tmp_path, keep_last=2, keep_every_tokens=100, protected_steps=lambda: pending)
    seen = []
    for step in (4, 8, 12, 14, 20, 22, 45, 46, 47):  # of 10 tokens each
        if step == 14:
            pending.add(12)
        if step == 46:
            pending.clear()
        save(saves, step, model=b"x")
        seen.append(checkpoint.committed_steps(tmp_path))
    assert seen == [
        [4], [4, 8], [8, 12], [12, 14], [12, 14, 20], [12, 20, 22], [12, 20, 22, 45], [12, 20, 45, 46],
        [12, 20, 45, 46, 47],
    ]  # fmt: skip
    # 12 is the first at or after 100 tokens, 20 at 200, 45 at 300 and 400.


def test_milestones_come_out_the_same_whatever_else_was_removed(tmp_path: Path) -> None:
    for step in (9, 11, 13, 21):
        save(Saves(tmp_path, keep_last=10), step, model=b"x")
    retention.retain(tmp_path, 1, keep_every_tokens=100)
    assert checkpoint.committed_steps(tmp_path) == [11, 21]
    retention.retain(tmp_path, 1, keep_every_tokens=100)
    assert checkpoint.committed_steps(tmp_path) == [11, 21]
    retention.retain(tmp_path, 1, keep_every_tokens=1000)
    assert checkpoint.committed_steps(tmp_path) == [21]


def test_a_milestone_that_is_damaged_gives_its_place_to_the_next(tmp_path: Path) -> None:
    for step in (11, 13, 30, 31):
        save(Saves(tmp_path, keep_last=10), step, model=b"x" * 10)
    os.truncate(checkpoint.step_folder(tmp_path, 11) / "model", 3)
    retention.retain(tmp_path, 1, keep_every_tokens=100)
    assert [step for step in checkpoint.committed_steps(tmp_path) if step != 11] == [13, 30, 31]


def test_pending_evaluations_are_asked_for_after_the_commit(tmp_path: Path) -> None:
    asked = []

    def protected() -> set[int]:
        asked.append(checkpoint.committed_steps(tmp_path))
        return {1}

    saves = Saves(tmp_path, keep_last=1, protected_steps=protected)
    save(saves, 1, model=b"x")
    save(saves, 2, model=b"x")
    assert asked == [[1], [1, 2]] and checkpoint.committed_steps(tmp_path) == [1, 2]
