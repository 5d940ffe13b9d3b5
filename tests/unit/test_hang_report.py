"""The words of a report, and what a watchdog takes for a hang: not what clocks do."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dispersion_pretrain import heartbeat
from dispersion_pretrain.hang_report import describe, main_thread_place
from dispersion_pretrain.heartbeat import Beat, read_beat, read_beats, write_beat
from dispersion_pretrain.watchdog import Watchdog


def beat(rank: int, **changes: Any) -> Beat:
    """A rank that waits in the pool's all-gather of step 120."""
    fields: dict[str, Any] = {
        "rank": rank, "host": f"node{rank}", "machine": "m", "pid": 100 + rank, "process_start": 1, "number": 5,
        "step": 120, "micro_step": 1, "marks": 7, "phase": "the pool's all-gather", "standing_s": 35.2,
        "place": "dispersion.py:268 in _gather_tokens (all_gather_into_tensor)", "in_collective": True,
        "pace_steps": 1, "time": 1000.0,
    }  # fmt: skip
    return Beat(**(fields | changes))


def late(rank: int, **changes: Any) -> Beat:
    """A rank that reads data while the others wait."""
    fields = {"marks": 5, "phase": "reading data", "place": "data.py:88 in __next__", "in_collective": False}
    return beat(rank, **(fields | changes))


def words(*beats: Beat, world_size: int, unseen_s: dict[int, float] | None = None, gone: set[int] | None = None) -> str:
    by_rank = {one.rank: one for one in beats}
    return "\n".join(describe(by_rank, world_size, unseen_s=unseen_s or {}, gone=gone or set()))


def test_rank_that_never_entered_is_named_and_those_that_wait_are_counted_up() -> None:
    assert words(beat(0), late(1), beat(2), beat(3), world_size=4) == (
        "rank 1 never entered the pool's all-gather at step 120: it is in: reading data, step 120, micro-step 1 for "
        "35 s, at data.py:88 in __next__ (host node1, process 101)\n"
        "ranks 0, 2-3 wait, in: the pool's all-gather, step 120, micro-step 1, at dispersion.py:268 in _gather_tokens "
        "(all_gather_into_tensor)"
    )


def test_rank_that_is_a_step_behind() -> None:
    text = words(beat(0), late(1, step=119, marks=9), world_size=2)
    assert "rank 1 never entered the pool's all-gather of step 120: it is in: reading data, step 119" in text


def test_ranks_at_one_mark_are_told_apart_by_their_stacks() -> None:
    text = words(
        beat(0, phase="forward pass"),
        beat(1, phase="forward pass", in_collective=False, place="model.py:3 in forward"),
        world_size=2,
    )
    assert "rank 1 is in no collective: it is in: forward pass" in text and "model.py:3 in forward" in text
    assert "rank 0 waits in a collective, in: forward pass" in text


def test_all_ranks_in_one_collective_and_none_to_blame() -> None:
    assert words(beat(0), beat(1), world_size=2).splitlines()[0].startswith("ranks 0-1 wait, in: the pool's all-gather")


def test_silent_stopped_and_dead_ranks() -> None:
    text = words(beat(0), late(1), late(2), world_size=4, unseen_s={1: 40.3}, gone={2})
    assert "rank 3: no heartbeat at all" in text
    assert "rank 1 has not been seen for 40 s: it is stopped" in text
    assert "rank 2 is gone: its process was killed" in text
    assert "rank 0 waits, in: the pool's all-gather" in text and "rank 1 never entered" not in text


def test_rank_that_failed_is_quoted() -> None:
    text = words(beat(0), late(1, exit_code=1, reason="OSError: on fire"), world_size=2)
    assert "rank 1 has ended with code 1: OSError: on fire" in text


def test_heartbeat_is_read_as_it_was_written_and_damage_is_no_error(tmp_path: Path) -> None:
    write_beat(tmp_path, beat(3))
    write_beat(tmp_path, beat(4))
    heartbeat.beat_file(tmp_path, 4).write_text('{"rank": 4')
    assert read_beats(tmp_path) == {3: beat(3)} and read_beat(tmp_path, 4) is None


def test_place_is_the_innermost_line_outside_libraries() -> None:
    with ThreadPoolExecutor() as pool:
        place, in_collective = pool.submit(main_thread_place).result()
    assert re.fullmatch(r"test_hang_report\.py:\d+ in test_place_is_the_innermost_line_outside_libraries", place)
    assert not in_collective


class Clock:
    """Advances with real time, plus what is added."""

    def __init__(self) -> None:
        self.extra_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.extra_s


@pytest.fixture(autouse=True)
def _marks_as_before() -> Iterator[None]:
    yield
    heartbeat.now.__init__()  # type: ignore[misc]


def begin_later_step() -> None:
    """The first one has more patience."""
    heartbeat.begin_step(5)
    heartbeat.mark("forward pass")


@pytest.mark.parametrize("jump_s", [1e6, -1e6])
def test_clock_that_jumps_is_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float) -> None:
    clock, codes = Clock(), list[int]()
    watchdog = Watchdog(3.0, rank=0, world_size=1, clock_s=clock, leave=codes.append)
    watchdog.publish(tmp_path, first_step=0)
    begin_later_step()
    time.sleep(1.0)
    clock.extra_s += jump_s
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + jump_s)
    time.sleep(1.0)
    before = read_beat(tmp_path / "heartbeats", 0)
    assert codes == [] and before is not None and 0 < before.standing_s < 3
    deadline = time.monotonic() + 20  # a real hang is still one
    while not codes and time.monotonic() < deadline:
        time.sleep(0.05)
    watchdog.end(0)
    assert codes == [86]


def test_phase_may_ask_for_patience(tmp_path: Path) -> None:
    codes = list[int]()
    watchdog = Watchdog(1.0, rank=0, world_size=1, leave=codes.append)
    watchdog.publish(tmp_path, first_step=0)
    begin_later_step()
    heartbeat.mark("saving a checkpoint", 1000.0)
    time.sleep(2.0)
    watchdog.end(0)
    assert codes == [] and not (tmp_path / "hangs").exists()
