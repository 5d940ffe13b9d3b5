"""What a run does about numbers gone wrong: policies, counts, spikes, and the state that a resume needs."""

from __future__ import annotations

import json
import math
from collections import deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dispersion_pretrain.config import FaultSettings
from dispersion_pretrain.faults import NUM_SUMS, FaultWatch, StepHealth, Verdict, examine, spike_score
from dispersion_pretrain.objective import StepContext

BROKEN = StepHealth(math.nan, "cross-entropy is not finite on 1 of 2 ranks")
GLOBAL_BATCH = 512


def watch_with(**settings: object) -> FaultWatch:
    return FaultWatch(FaultSettings.model_validate(settings), GLOBAL_BATCH)


def reborn(watch: FaultWatch) -> FaultWatch:
    """As after a save and a resume."""
    again = FaultWatch(watch.settings, GLOBAL_BATCH)
    again.restore(json.loads(json.dumps(watch.state(), allow_nan=False)))
    return again


@pytest.mark.parametrize("wants_stop", [False, True])
@pytest.mark.parametrize(("loss", "square"), [(1.0, 1.0), (math.nan, 1.0), (1.0, math.inf)])
def test_a_wish_to_stop_is_heard_whatever_the_numbers(loss: float, square: float, wants_stop: bool) -> None:
    context = StepContext(step=0, targets=4, shares=1, coefficient=0.0, layers=())
    sums = torch.full((NUM_SUMS,), loss, dtype=torch.float64)
    health = examine(sums, torch.tensor(square, dtype=torch.float64), context, lambda: ["weight"], wants_stop)
    assert health.stopping == wants_stop
    assert bool(health.broken) == (not math.isfinite(loss + square))


def test_stop_names_step_term_and_cure() -> None:
    with pytest.raises(RuntimeError, match=r"^step 7: cross-entropy is not finite on 1 of 2 ranks\. No update.*Lower"):
        watch_with().judge(7, BROKEN)


def test_skips_are_counted_and_only_so_many_in_a_row_allowed() -> None:
    watch = watch_with(non_finite="skip", max_skips=2)
    counts = []
    for step in (1, 2, 4, 5):
        verdict = watch.judge(step, BROKEN)
        assert verdict.skipped and not verdict.rolls_back and f"step {step}: " in verdict.message
        counts.append(verdict.figures["faults/skipped"])
        if step == 2:
            assert watch.judge(3, StepHealth(1.0)) == Verdict()
    assert counts == [1, 2, 3, 4]
    for watcher in (watch, reborn(watch)):
        with pytest.raises(RuntimeError, match=r"step 6: .*number 3 in a row, faults\.max_skips is 2\."):
            watcher.judge(6, BROKEN)


def test_a_rollback_moves_the_data_behind_the_bad_batch() -> None:
    watch = watch_with(non_finite="rollback", max_rollbacks=2)
    saved = watch.state()  # after 8 steps
    assert watch.judge(10, BROKEN).rolls_back
    watch.refuse_more_rollbacks("step 10: x.")
    verdict = watch.go_back(10, 8, saved)
    assert "passed over samples 4,096 to 5,119 (rollback 1 of at most 2)" in verdict.message
    assert watch.data_offset_steps == 2, "step 8 reads the global batch number 10"
    assert verdict.figures == {
        "faults/rollbacks": 1,
        "faults/passed_over_first_sample": 4096,
        "faults/passed_over_last_sample": 5119,
    }
    # again before the next checkpoint: one range, from where that checkpoint's data stopped
    watch.go_back(9, 8, saved)
    assert [tuple(passed) for passed in watch.passed_over] == [(8, 4096, 5631)]
    assert watch.data_offset_steps == 3
    with pytest.raises(RuntimeError, match=r"^step 12: x\. The run has gone back 2 times, faults\.max_rollbacks is 2"):
        watch.refuse_more_rollbacks("step 12: x.")


def test_a_later_rollback_adds_a_range() -> None:
    watch = watch_with(non_finite="rollback")
    watch.go_back(10, 8, watch.state())
    watch = reborn(watch)
    saved = watch.state()  # after 16 steps, which have read 18 global batches
    watch.go_back(17, 16, saved)
    assert [tuple(passed) for passed in watch.passed_over] == [(8, 4096, 5119), (16, 18 * 512, 19 * 512 - 1)]
    assert watch.data_offset_steps == 3


def losses_of(watch: FaultWatch, values: list[float]) -> list[int]:
    """Steps (from 1) whose loss was called a spike."""
    spikes = []
    for step, value in enumerate(values, start=1):
        verdict = watch.judge(step, StepHealth(value))
        if verdict.message:
            spikes.append(step)
    return spikes


def falling(steps: int) -> list[float]:
    """A loss as in training: falling, with noise."""
    return [3 + 5 * math.exp(-step / 20) + 0.02 * math.sin(37 * step) for step in range(steps)]


def test_a_spike_is_told_once_with_its_score() -> None:
    watch = watch_with(spike_window_steps=32)
    assert losses_of(watch, falling(80)) == []
    verdict = watch.judge(81, StepHealth(9.0))
    assert verdict.message.startswith("step 81: the loss rose to 9, ") and not verdict.rolls_back
    assert verdict.figures["faults/spike_score"] > 8
    assert watch.judge(82, StepHealth(9.1)) == Verdict(), "the same rise"
    assert watch.judge(83, StepHealth(3.1)) == Verdict()
    assert watch.judge(84, StepHealth(9.0)).message


def test_a_spike_rolls_back_where_asked_and_stays_out_of_the_window() -> None:
    watch = watch_with(spike="rollback", spike_window_steps=32)
    losses_of(watch, falling(60))
    before = watch.state()["losses"]
    assert watch.judge(61, StepHealth(9.0)).rolls_back
    assert watch.state()["losses"] == before
    assert watch_with(spike="off").judge(1, StepHealth(1e9)) == Verdict()


def test_a_flat_curve_and_a_young_window_give_no_alarm() -> None:
    watch = watch_with(spike_window_steps=16)
    assert losses_of(watch, [2.0, 900.0, 2.0, 2.0, 2.0, 2.0, 2.0]) == [], "fewer than half a window"
    assert losses_of(watch_with(spike_window_steps=16), [2.0] * 40 + [2.03, 2.0]) == []
    assert losses_of(watch_with(spike_window_steps=16), [2.0] * 40 + [2.2]) == [41]


def test_what_is_not_finite_never_enters_the_window() -> None:
    watch = watch_with(non_finite="skip", max_skips=100, spike_window_steps=16)
    losses_of(watch, [2.0] * 20)
    for step in range(21, 60):
        watch.judge(step, BROKEN)
    assert watch.state()["losses"] == [2.0] * 16
    assert watch.judge(60, StepHealth(2.5)).message, "the scale is still that of the finite losses"


def test_a_reset_of_embeddings_is_no_spike() -> None:
    watch = watch_with(spike_window_steps=16)
    losses_of(watch, [2.0] * 20)
    watch.expect_jump()
    assert losses_of(watch, [9.0] * 20) == []


@given(losses=st.lists(st.floats(0.1, 20), min_size=1, max_size=40), cut=st.integers(0, 40))
def test_a_resume_judges_alike(losses: list[float], cut: int) -> None:
    settings = {"spike_window_steps": 8, "spike_score": 3.0}
    whole, parted = watch_with(**settings), watch_with(**settings)
    for step, loss in enumerate(losses, start=1):
        if step == cut:
            parted = reborn(parted)
        assert whole.judge(step, StepHealth(loss)) == parted.judge(step, StepHealth(loss))
    assert whole.state() == parted.state()


def test_score_is_robust() -> None:
    window = deque([1.0, 2.0, 3.0, 4.0, 100.0])
    assert spike_score(window, 8, 3.0) == 0
    assert spike_score(window, 8, 3 + 1.4826) == pytest.approx(1.0), "median 3, median deviation 1"
