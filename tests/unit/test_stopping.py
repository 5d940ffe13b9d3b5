"""The time limit: how early it asks for a stop, and when not."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from dispersion_pretrain.stopping import SIGNALS, Stopping, process_age_s, seconds_of


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


class Clock:
    def __init__(self) -> None:
        self.age_s = 0.0

    def __call__(self) -> float:
        return self.age_s


def steps_until_stop(stop: Stopping, clock: Clock, step_s: float) -> float:
    """Age at which a loop of steps is asked to stop."""
    for _ in range(10_000):
        clock.age_s += step_s
        if stop.requested():
            return clock.age_s
    raise AssertionError("never")


def test_seconds_of_a_limit() -> None:
    assert [seconds_of(text) for text in ("0:00:01", "1:02:03", "120:00:00", "2-03:00:00")] == [
        1,
        3723,
        432_000,
        183_600,
    ]


def test_stop_leaves_time_for_the_longest_save_and_some_steps() -> None:
    clock = Clock()
    stop = Stopping("1:00:00", age_s=clock)
    stop.expect_save(parameters=10**9, ranks=1)  # 16 GB: guessed 85 s
    stop.saved(300.0)
    stop.saved(200.0)
    stopped_s = steps_until_stop(stop, clock, step_s=10.0)
    assert 3600 - 300 - 40 <= stopped_s <= 3600 - 300 - 20, "3 steps of 10 s and the longest save"
    assert "run.max_time" in stop.reason and "a save takes up to 300" in stop.reason


def test_first_measured_save_replaces_the_guess() -> None:
    clock = Clock()
    stop = Stopping("1:00:00", age_s=clock)
    stop.expect_save(parameters=8 * 10**9, ranks=1)
    stop.saved(3.0)
    assert steps_until_stop(stop, clock, step_s=1.0) >= 3600 - 3 - 4


def test_guess_holds_until_a_save_was_measured_and_takes_at_most_a_quarter() -> None:
    clock = Clock()
    stop = Stopping("1:00:00", age_s=clock)
    stop.expect_save(parameters=10**9, ranks=8)
    assert steps_until_stop(stop, clock, step_s=1.0) == pytest.approx(3600 - 15 - 3, abs=1.5)
    clock.age_s = 0.0
    huge = Stopping("1:00:00", age_s=clock)
    huge.expect_save(parameters=10**12, ranks=1)
    assert steps_until_stop(huge, clock, step_s=1.0) == 2700


def test_time_of_a_save_is_no_step() -> None:
    clock = Clock()
    stop = Stopping("1:00:00", age_s=clock)
    for _ in range(3):
        clock.age_s += 1
        assert not stop.requested()
        clock.age_s += 600
        stop.saved(600.0)
    assert steps_until_stop(stop, clock, step_s=1.0) >= 3600 - 600 - 4


def test_without_a_limit_only_a_signal_stops() -> None:
    clock = Clock()
    stop = Stopping(age_s=clock)
    clock.age_s = 1e9
    assert not stop.requested()
    signal.raise_signal(signal.SIGUSR1)
    for _ in range(1000):
        if stop.requested():
            break
        signal.sigtimedwait([], 0.01)
    assert stop.requested() and stop.reason == "SIGUSR1"


def test_age_of_the_process_counts_from_its_begin() -> None:
    first = process_age_s()
    assert 0.1 < first < 24 * 3600
    assert 0 <= process_age_s() - first < 5


def test_the_end_of_the_launcher_stops_an_orphan() -> None:
    gone = False
    stop = Stopping(age_s=lambda: 0.0, is_orphan=lambda: gone)
    assert not stop.requested()
    gone = True
    assert stop.requested() and stop.reason == "the end of its launcher"
