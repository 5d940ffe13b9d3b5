"""How the end of a start is concluded from its heartbeats, and when the next one is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dispersion_pretrain import metrics, provenance
from dispersion_pretrain.config import Settings
from dispersion_pretrain.crash_loop import CrashLoopError, End, conclude, refuse_crash_loop
from dispersion_pretrain.heartbeat import Beat, write_beat
from dispersion_pretrain.settings_file import dump_settings, parse_settings
from unit.test_hang_report import beat

NAN = "RuntimeError: step 120: cross-entropy is not finite on 1 of 2 ranks"
PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:5213"


def concluded(*beats: Beat) -> tuple[int | None, int, str, int]:
    end = conclude({one.rank: one for one in beats}, first_step=100, fingerprint="f")
    return end.exit_code, end.step, end.reason, end.uncertain_steps


def test_error_is_the_cause_and_broken_connections_and_kills_are_not() -> None:
    ranks = [beat(0, exit_code=1, reason=PEER), beat(1, exit_code=1, reason=NAN), beat(2)]
    assert concluded(*ranks) == (1, 120, NAN, 0)


def test_killed_rank_is_the_cause_where_the_others_only_lost_it() -> None:
    code, step, reason, uncertain = concluded(beat(0, exit_code=1, reason=PEER, step=123), beat(1, pace_steps=7))
    assert (code, step, uncertain) == (None, 123, 1) and reason.startswith("rank 1 was killed")
    code, step, reason, uncertain = concluded(beat(0, pace_steps=7), beat(1, step=119))
    assert (code, step, uncertain) == (None, 120, 8) and reason.startswith("2 ranks were killed")


def test_hang_is_a_cause_though_its_words_name_a_connection() -> None:
    assert concluded(beat(0, exit_code=86, reason="no progress, timed out"), beat(1))[:2] == (86, 120)


@pytest.mark.parametrize("codes", [(0, 0), (85, 85)])
def test_clean_ends(codes: tuple[int, int]) -> None:
    assert concluded(*(beat(rank, exit_code=code) for rank, code in enumerate(codes)))[0] == codes[0]


def end(**changes: Any) -> End:
    fields: dict[str, Any] = {
        "time": 0.0, "first_step": 100, "step": 120, "exit_code": 1, "reason": NAN, "uncertain_steps": 0,
        "fingerprint": "f",
    }  # fmt: skip
    return End(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "repeats"),
    [
        ({}, True),
        ({"first_step": 110, "reason": NAN.replace("1 of 2", "2 of 2")}, True),
        ({"step": 121}, False),
        ({"step": 127, "uncertain_steps": 8}, True),
        ({"reason": "OSError: on fire"}, False),
        ({"fingerprint": "g"}, False),
        ({"exit_code": 85}, False),
        ({"exit_code": 0}, False),
        ({"exit_code": 143}, False),
    ],
)
def test_what_counts_as_the_same_failure(changes: dict[str, Any], repeats: bool) -> None:
    assert end(**changes).repeats(end()) is repeats


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return parse_settings(
        {
            "run": {"folder": str(tmp_path)},
            "model": {"config": {"model_type": "gpt2"}},
            "data": {"corpus": "c", "sequence_length": 32},
            "training": {"global_batch_tokens": 32, "max_tokens": 64},
            "logging": {"every_steps": 2},
        },
        "test",
    )


def leave(settings: Settings, *beats: Beat, first_step: int = 100, logged: Sequence[int] = ()) -> None:
    """What a start leaves that ended so, having written records of the steps `logged`."""
    folder = settings.run_folder
    (folder / "config.yaml").write_text(dump_settings(settings))
    start = {
        "resumed_from_step": first_step, "versions": provenance.versions(), "git_commit": provenance.git_commit(),
        "metrics_bytes": metrics.size_of_records(folder),
    }  # fmt: skip
    for step in logged:
        metrics.append_line(folder / "metrics.jsonl", {"step": step, "loss/total": 1.0})
    if logged:  # of a save that began earlier
        metrics.append_line(folder / "metrics.jsonl", {"step": logged[0] - 4, "checkpoint/write_s": 1.0})
    with open(folder / "starts.jsonl", "a") as file:
        file.write(json.dumps(start) + "\n")
    (folder / "heartbeats").mkdir()
    for one in beats:
        write_beat(folder / "heartbeats", one)


def test_third_start_is_refused_until_something_changes(settings: Settings) -> None:
    refuse_crash_loop(settings, resume="auto")  # a first start
    leave(settings, beat(0, exit_code=1, reason=NAN, time=1.0))
    refuse_crash_loop(settings, resume="auto")
    assert not (settings.run_folder / "heartbeats").exists()
    refuse_crash_loop(settings, resume="auto")  # a start that came to nothing leaves no heartbeats and counts for none
    leave(settings, beat(0, exit_code=1, reason=NAN, time=2.0))
    for _ in range(2):
        with pytest.raises(CrashLoopError, match=r"ended in step 120 .* is not finite .*--resume PATH; or remove"):
            refuse_crash_loop(settings, resume="auto")
    refuse_crash_loop(settings, resume="checkpoints/step-00000050")
    refuse_crash_loop(
        settings.model_copy(update={"optimizer": settings.optimizer.model_copy(update={"epsilon": 1e-6})}),
        resume="auto",
    )
    (settings.run_folder / "ends.jsonl").unlink()
    refuse_crash_loop(settings, resume="auto")


def test_start_that_came_further_clears_it(settings: Settings) -> None:
    for moment, step in enumerate([120, 130, 120]):
        leave(settings, beat(0, exit_code=1, reason=NAN, step=step, time=float(moment)))
        refuse_crash_loop(settings, resume="auto")


def test_kills_at_different_steps_are_no_loop_though_heartbeats_are_seldom(settings: Settings) -> None:
    """With 40 steps from one heartbeat to the next, all that is known of both kills from heartbeats may be one step."""
    for moment, logged in enumerate([[101, 108], [105, 116], [], [113, 124]]):
        leave(settings, beat(0, step=100, pace_steps=40, time=float(moment)), logged=logged)
        refuse_crash_loop(settings, resume="auto")
    ends = [json.loads(line) for line in (settings.run_folder / "ends.jsonl").read_text().splitlines()]
    assert [(end["step"], end["uncertain_steps"]) for end in ends] == [(108, 2), (116, 2), (100, 2), (124, 2)]
    leave(settings, beat(0, step=124, pace_steps=40, time=9.0), logged=[121, 124])
    with pytest.raises(CrashLoopError, match="rank 0 was killed"):
        refuse_crash_loop(settings, resume="auto")


def test_heartbeats_count_where_records_were_not_written(settings: Settings) -> None:
    """A full disk: a kill for memory in one step is known for a loop all the same."""
    for moment, step in enumerate([130, 155]):
        leave(settings, beat(0, step=step, pace_steps=40, time=float(moment)), logged=[101])
        if moment == 0:
            refuse_crash_loop(settings, resume="auto")
    with pytest.raises(CrashLoopError, match="rank 0 was killed"):
        refuse_crash_loop(settings, resume="auto")


def test_end_is_recorded_once_though_a_kill_came_before_the_heartbeats_were_removed(settings: Settings) -> None:
    for _ in range(2):
        leave(settings, beat(0, exit_code=1, reason=NAN))
        refuse_crash_loop(settings, resume="auto")
    assert len((settings.run_folder / "ends.jsonl").read_text().splitlines()) == 1


def test_damaged_records_stop_no_start(settings: Settings) -> None:
    leave(settings, beat(0, exit_code=1, reason=NAN))
    (settings.run_folder / "starts.jsonl").write_text("{")
    (settings.run_folder / "ends.jsonl").write_text('{"time": 1}\n{"ti')
    refuse_crash_loop(settings, resume="auto")
