"""Checkpoints in one process: commit, kill at every write, damage, resume, retain."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dispersion_pretrain import checkpoint, distributed, retention
from dispersion_pretrain.saving import Description, Saves

COMMITTED_STEP = 100


def save(run_folder: Path, step: int, content: bytes = b"weights") -> Path:
    """Save a small checkpoint of three files in the way a training run does, and keep the others."""
    saves = Saves(run_folder, keep_last=10**6)
    saves.begin(saves.shared, step)
    saves.take("engine/shard_0.pt", content * 50 + str(step).encode())
    saves.take("engine/shard_1.pt", content[::-1] * 50 + str(step).encode())
    saves.take_rank_state({"random": distributed.random_state(), "data": {"epoch": 1, "step": step}})
    saves.write(description(step))
    saves.finish()
    saves.require_saved()
    return checkpoint.step_folder(run_folder, step)


def description(step: int) -> Description:
    return Description(
        step=step,
        tokens=step * 10,
        samples=step * 2,
        world_size=1,
        settings={"run": {"seed": 1}},
        versions={"torch": torch.__version__},
        extra={"data_fingerprint": "abc"},
    )


def names(run_folder: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.checkpoints_folder(run_folder).iterdir())


# ---- commit


def test_a_committed_checkpoint_is_whole_and_says_what_it_is(tmp_path: Path) -> None:
    path = save(tmp_path, COMMITTED_STEP)
    assert path == checkpoint.step_folder(tmp_path, COMMITTED_STEP)
    assert names(tmp_path) == ["step-00000100"]
    assert checkpoint.verify(path) == []
    info, skipped = checkpoint.find_newest_good(tmp_path)
    assert info is not None and skipped == []
    assert (info.path, info.step, info.tokens, info.samples, info.world_size) == (path, 100, 1000, 200, 1)
    assert info.manifest["extra"] == {"data_fingerprint": "abc"}
    assert info.manifest["settings"] == {"run": {"seed": 1}}
    assert set(info.manifest["files"]) == {"engine/shard_0.pt", "engine/shard_1.pt", "rank_00000.pt"}
    state = checkpoint.load_rank_state(path)
    assert state["data"] == {"epoch": 1, "step": 100}
    distributed.restore_random_state(state["random"])


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 100, b"old")
    path = save(tmp_path, 100, b"new")
    assert (path / "engine" / "shard_0.pt").read_bytes().startswith(b"new")
    assert checkpoint.verify(path) == []
    assert names(tmp_path) == ["step-00000100"]


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path: Path) -> None:
    for name in (".saving-step-00000090", ".saving-step-00000100", ".removing-step-00000010"):
        folder = checkpoint.checkpoints_folder(tmp_path) / name / "engine"
        folder.mkdir(parents=True)
        (folder / "half").write_bytes(b"x")
    save(tmp_path, 100)
    assert names(tmp_path) == ["step-00000100"]


def test_everything_is_on_disk_before_the_folder_and_then_the_marker_appear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}")).relative_to(tmp_path)
        events.append(("flush", path.as_posix().replace("checkpoints/.saving-step-00000100", "staging")))
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append(("rename", target.name))
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    save(tmp_path, 100)
    renamed = events.index(("rename", "step-00000100"))
    files = ["engine/shard_0.pt", "engine/shard_1.pt", "rank_00000.pt", "manifest.json", "engine"]
    before = {("flush", f"staging/{name}") for name in files} | {("flush", "staging")}
    assert set(events[:renamed]) == before
    target = "checkpoints/step-00000100"
    assert events[renamed + 1 :] == [
        ("flush", "checkpoints"),
        ("flush", "."),
        ("flush", f"{target}/.COMMITTED"),
        ("rename", "COMMITTED"),
        ("flush", target),
    ]


# ---- kill -9 at every write


def die_at_write(point: int, torn: bool) -> list[int]:
    """Let this process SIGKILL itself just before its write `point`; return the growing list of writes.

    A write is opening a file for writing, a rename, a removal, a new folder, or a flush to disk. With `torn`,
    a file about to be flushed is first cut to half its length, as a power cut leaves data not yet on disk.
    """
    seen: list[int] = []

    def at_point(descriptor: int | None = None) -> None:
        if len(seen) == point:
            if torn and descriptor is not None and os.path.isfile(f"/proc/self/fd/{descriptor}"):
                os.truncate(f"/proc/self/fd/{descriptor}", os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(point)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            at_point()
        elif event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            at_point()

    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        at_point(descriptor)
        real_fsync(descriptor)

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(audit)
    return seen


def run_child(action: Callable[[], Any], point: int, torn: bool) -> int | None:
    """Run `action` in a child that dies at the point; return its number of points if it came to the end."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            seen = die_at_write(point, torn)
            action()
            os.write(writer, str(len(seen)).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return int(answer)


def check_after_kill(run_folder: Path, contents: dict[int, list[bytes]]) -> int:
    """Assert that the newest good checkpoint is whole and what was saved; return its step."""
    for marker in checkpoint.checkpoints_folder(run_folder).glob(f"*step-*/{checkpoint.MARKER}"):
        assert checkpoint.verify(marker.parent) == []  # whoever watches for markers sees whole ones only
    info, _ = checkpoint.find_newest_good(run_folder)
    assert info is not None
    shard = (info.path / "engine" / "shard_0.pt").read_bytes()
    assert any(shard == content * 50 + str(info.step).encode() for content in contents[info.step])
    checkpoint.load_rank_state(info.path)
    return info.step


@pytest.mark.parametrize("torn", [False, True], ids=["kill", "kill and lose unflushed data"])
@pytest.mark.parametrize("scenario", ["next step", "same step again", "same step a third time", "retain"])
def test_kill_at_every_write(tmp_path: Path, scenario: str, torn: bool) -> None:
    def prepare(run_folder: Path) -> None:
        save(run_folder, 50, b"first")
        save(run_folder, 100, b"old")
        if scenario == "same step a third time":  # the second time was killed just before the marker
            newer = checkpoint.step_folder(run_folder, 100)
            older = newer.rename(newer.with_name(".replaced-step-00000100"))
            shutil.copytree(older, newer, ignore=shutil.ignore_patterns(checkpoint.MARKER))

    def act(run_folder: Path) -> None:
        if scenario == "retain":
            retention.retain(run_folder, keep_last=1)
        else:
            save(run_folder, 200 if scenario == "next step" else 100, b"new")

    contents = {50: [b"first"], 100: [b"old", b"new"], 200: [b"new"]}
    template = tmp_path / "template"
    prepare(template)
    found = []
    point = 0
    while True:
        run_folder = tmp_path / f"killed-{point}"
        shutil.copytree(template, run_folder)
        points = run_child(lambda folder=run_folder: act(folder), point, torn)  # type: ignore[misc]
        found.append(check_after_kill(run_folder, contents))
        act(run_folder)  # the run goes on: what the kill left must not be in the way
        assert check_after_kill(run_folder, contents) == (200 if scenario == "next step" else 100)
        if scenario != "retain":
            assert not [name for name in names(run_folder) if name.startswith(".")]
        shutil.rmtree(run_folder)
        if points is not None:
            break
        point += 1
    print(f"{scenario}: {point} kills")
    assert points == point  # every write of the whole action was a kill point once
    assert point >= (6 if scenario == "retain" else 14)
    if scenario == "next step":
        assert found == sorted(found) and set(found) == {100, 200}
    else:
        assert set(found) == {100}


# ---- damage


def files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


def truncate(path: Path, dice: random.Random) -> str:
    file = dice.choice(files_of(path))
    os.truncate(file, dice.randrange(file.stat().st_size))
    return f"truncate {file.name}"


def flip_bit(path: Path, dice: random.Random) -> str:
    file = dice.choice(files_of(path))
    content = bytearray(file.read_bytes())
    position = dice.randrange(len(content))
    content[position] ^= 1 << dice.randrange(8)
    file.write_bytes(content)
    return f"flip a bit of {file.name} at {position}"


def delete(path: Path, dice: random.Random) -> str:
    file = dice.choice(files_of(path))
    file.unlink()
    return f"delete {file.name}"


def empty(path: Path, dice: random.Random) -> str:
    file = dice.choice(files_of(path))
    file.write_bytes(b"")
    return f"empty {file.name}"


def swap(path: Path, dice: random.Random) -> str:
    first, second = dice.sample(files_of(path), 2)
    first_content, second_content = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_content)
    second.write_bytes(first_content)
    return f"swap {first.name} and {second.name}"


def swap_with_older(path: Path, dice: random.Random) -> str:
    file = dice.choice(files_of(path))
    older = path.parent / "step-00000100" / file.relative_to(path)
    file.write_bytes(older.read_bytes())
    return f"{file.name} of an older checkpoint"


def edit_manifest(path: Path, dice: random.Random) -> str:
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    key = dice.choice(["step", "tokens", "samples", "world_size", "format_version"])
    manifest[key] += dice.choice([-1, 1])
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest, indent=1))
    return f"manifest says another {key}"


def forget_file(path: Path, dice: random.Random) -> str:
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    name = dice.choice(sorted(manifest["files"]))
    del manifest["files"][name]
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest, indent=1))
    return f"manifest forgets {name}"


def remove_marker(path: Path, dice: random.Random) -> str:
    (path / checkpoint.MARKER).unlink()
    return "no marker"


def add_file(path: Path, dice: random.Random) -> str:
    (path / "engine" / f"shard_{dice.randrange(2, 9)}.pt").write_bytes(b"x")
    return "an extra file"


DAMAGES = [truncate, flip_bit, flip_bit, delete, empty, swap, swap_with_older]
DAMAGES += [edit_manifest, forget_file, remove_marker, add_file]


def test_sixty_random_damages_are_all_found(tmp_path: Path) -> None:
    seed = int(os.environ.get("DAMAGE_SEED", random.SystemRandom().randrange(2**32)))
    print(f"DAMAGE_SEED={seed}")
    dice = random.Random(seed)
    template = tmp_path / "template"
    save(template, 100, b"older")
    save(template, 200, b"newer")
    for number in range(60):
        run_folder = tmp_path / f"damaged-{number}"
        shutil.copytree(template, run_folder)
        path = checkpoint.step_folder(run_folder, 200)
        damage = DAMAGES[number % len(DAMAGES)](path, dice)
        assert checkpoint.verify(path), f"DAMAGE_SEED={seed}, number {number}: not found: {damage}"
        info, skipped = checkpoint.find_newest_good(run_folder)
        assert info is not None and info.step == 100, damage
        assert len(skipped) == 1 and skipped[0].startswith(str(path)), damage
        assert path.is_dir()  # left for inspection
        shutil.rmtree(run_folder)


def test_problems_name_the_file_and_the_fault(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    (path / "engine" / "shard_0.pt").unlink()
    os.truncate(path / "engine" / "shard_1.pt", 3)
    (path / "notes.txt").write_text("x")
    (path / ".nfs0001").write_text("deleted, but open somewhere")
    problems = checkpoint.verify(path)
    assert problems == [
        "engine/shard_0.pt is missing",
        "engine/shard_1.pt has 3 bytes instead of 353",
        "notes.txt does not belong to it",
    ]


def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    renamed = path.rename(path.with_name("step-00000300"))
    assert checkpoint.verify(renamed) == ["manifest.json is of step 100"]
    copied = renamed.rename(tmp_path / "best")  # a name that claims no step is fine
    assert checkpoint.verify(copied) == []


# ---- resume


def test_resolve(tmp_path: Path) -> None:
    assert checkpoint.resolve(tmp_path, "auto") == (None, [])
    save(tmp_path, 100)
    newest = save(tmp_path, 200)
    assert checkpoint.resolve(tmp_path, "none") == (None, [])
    info, _ = checkpoint.resolve(tmp_path, "auto")
    assert info is not None and info.step == 200
    older, _ = checkpoint.resolve(tmp_path, str(checkpoint.step_folder(tmp_path, 100)))
    assert older is not None and older.step == 100
    os.truncate(newest / "rank_00000.pt", 10)
    info, skipped = checkpoint.resolve(tmp_path, "auto")
    assert info is not None and info.step == 100 and len(skipped) == 1
    with pytest.raises(RuntimeError, match="rank_00000.pt has 10 bytes instead of"):
        checkpoint.resolve(tmp_path, newest)
    with pytest.raises(ValueError, match="is not a folder"):
        checkpoint.resolve(tmp_path, tmp_path / "nowhere")
    with pytest.raises(RuntimeError, match="is not whole"):
        checkpoint.resolve(tmp_path, tmp_path)


def test_auto_does_not_silently_start_anew_when_every_checkpoint_is_damaged(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    (path / "engine" / "shard_0.pt").unlink()
    assert checkpoint.find_newest_good(tmp_path)[0] is None
    with pytest.raises(RuntimeError, match="no checkpoint is whole.\n.*shard_0.pt is missing"):
        checkpoint.resolve(tmp_path, "auto")


def test_auto_starts_anew_when_the_very_first_save_was_killed(tmp_path: Path) -> None:
    path = save(tmp_path, 100)
    (path / checkpoint.MARKER).unlink()
    info, skipped = checkpoint.resolve(tmp_path, "auto")
    assert info is None
    assert skipped == [f"{path}: no COMMITTED marker: the save was not finished"]


# ---- retain


def test_retain_keeps_the_last_and_the_protected(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400, 500):
        save(tmp_path, step)
    staging = checkpoint.checkpoints_folder(tmp_path) / ".saving-step-00000600"
    staging.mkdir()
    removed = retention.retain(tmp_path, keep_last=2, protected_steps={200}, verified_step=500)
    assert sorted(path.name for path in removed) == ["step-00000100", "step-00000300"]
    assert checkpoint.committed_steps(tmp_path) == [200, 400, 500]
    assert staging.is_dir()
    assert retention.retain(tmp_path, keep_last=2, protected_steps={200}) == []
    with pytest.raises(ValueError, match="keep_last: 0"):
        retention.retain(tmp_path, keep_last=0)


def test_retain_never_removes_the_newest_good_one(tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        save(tmp_path, step)
    shard = checkpoint.step_folder(tmp_path, 400) / "engine" / "shard_0.pt"
    shard.write_bytes(bytes(reversed(shard.read_bytes())))  # the right size: found by reading only
    (checkpoint.step_folder(tmp_path, 300) / "engine" / "shard_0.pt").unlink()
    retention.retain(tmp_path, keep_last=1)
    info, _ = checkpoint.find_newest_good(tmp_path)
    assert info is not None and info.step == 200
    assert names(tmp_path) == ["step-00000200", "step-00000300", "step-00000400"]


def test_retain_removes_nothing_when_nothing_is_whole(tmp_path: Path) -> None:
    for step in (100, 200):
        shard = save(tmp_path, step) / "engine" / "shard_0.pt"
        shard.write_bytes(bytes(reversed(shard.read_bytes())))
    assert retention.retain(tmp_path, keep_last=1) == []
    assert checkpoint.committed_steps(tmp_path) == [100, 200]
