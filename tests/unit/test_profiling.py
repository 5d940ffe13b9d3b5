"""dispersion_pretrain.profiling: what is timed and traced, and that nothing of it stays."""

from __future__ import annotations

import gzip
import json
import re
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from dispersion_pretrain import heartbeat
from dispersion_pretrain.config import ProfilingSettings
from dispersion_pretrain.profiling import StepProfiler, phase_table
from dispersion_pretrain.settings_file import load_settings

DEMO = Path(__file__).resolve().parents[2] / "configs" / "demo.yaml"
HEAD_S, GATHER_S, FORWARD_S = 0.02, 0.01, 0.03


class Head(nn.Module):
    """Takes its time, a part of it in a collective of its own."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        time.sleep(HEAD_S / 2)
        with heartbeat.inside("gathering"):
            time.sleep(GATHER_S)
        time.sleep(HEAD_S / 2)
        return rows @ rows


def train(profiler: StepProfiler, head: Head, first: int, steps: int) -> None:
    for step in range(first, steps):
        profiler.reach(step)
        heartbeat.mark("forward pass")
        time.sleep(FORWARD_S)
        head(torch.ones(4, 4))
        heartbeat.mark("update")
    profiler.close()


@pytest.mark.parametrize("steps", [8, 5], ids=["more steps follow", "the run ends with the last one"])
def test_phases_are_timed_and_steps_traced(tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int) -> None:
    head = Head()
    section = ProfilingSettings(first_step=1, steps=2)
    train(StepProfiler(section, tmp_path, torch.device("cpu"), [("loss head", head)]), head, 0, steps)
    table = (tmp_path / "profile" / "phases.txt").read_text()
    assert table in capsys.readouterr().out
    rows = re.findall(r"^(.+?) +([\d.]+) +([\d.]+)%$", table, re.MULTILINE)
    found = {name: float(milliseconds) for name, milliseconds, _ in rows}
    # What comes after the head's collective is the head's again; sleeping takes its time or longer.
    for name, least_s in (("loss head", HEAD_S), ("gathering", GATHER_S), ("forward pass", FORWARD_S)):
        assert found[name] >= 1e3 * least_s * 0.99, name
    assert found["step"] == pytest.approx(sum(found.values()) - found["step"], abs=0.05)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    ranges = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert ranges.count("update") == 2 and ranges.count("gathering") == 2  # of the two traced steps
    assert "aten::mm" in (tmp_path / "profile" / "operators.txt").read_text()
    assert heartbeat.now.observer is None and not head._forward_hooks and not head._forward_pre_hooks


def test_steps_that_a_rollback_repeats_are_counted_again(tmp_path: Path) -> None:
    head = Head()
    profiler = StepProfiler(ProfilingSettings(first_step=1, steps=2), tmp_path, torch.device("cpu"), [("head", head)])
    for step in (0, 1, 0, 1, 2):  # back in the first window; the second one begins at the second 0 + 1
        profiler.reach(step)
        heartbeat.mark("update")
        time.sleep(FORWARD_S)
    profiler.close()
    (row,) = [line for line in (tmp_path / "profile" / "phases.txt").read_text().splitlines() if "update" in line]
    assert float(row.split()[1]) == pytest.approx(1e3 * FORWARD_S, rel=0.5)  # of two steps, not of four
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    assert [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"].count(
        "update"
    ) == 2


@pytest.mark.parametrize("first", [2, 9], ids=["within the watched steps", "behind them"])
def test_a_start_that_comes_too_late_leaves_nothing(tmp_path: Path, first: int) -> None:
    head = Head()
    section = ProfilingSettings(first_step=1, steps=2)
    train(StepProfiler(section, tmp_path, torch.device("cpu"), [("loss head", head)]), head, first, 10)
    assert not list(tmp_path.iterdir())
    assert heartbeat.now.observer is None


def test_without_settings_nothing_is_watched(tmp_path: Path) -> None:
    head = Head()
    train(StepProfiler(None, tmp_path, torch.device("cpu"), [("loss head", head)]), head, 0, 2)
    assert not list(tmp_path.iterdir())


def test_collectives_and_backward_passes_are_added_up() -> None:
    backward = "autograd::engine::evaluate_function: PairSumLossBackward"
    events = {"gloo:all_reduce": (6, 0.006), "gloo:all_gather": (2, 0.002), backward: (4, 0.010), "aten::mm": (9, 9.0)}
    lines = phase_table({"update": 0.4, "forward pass": 0.6}, 4, events, 2).splitlines()
    assert re.fullmatch(r"forward pass +150\.00 +60\.0%", lines[1])
    assert [line.split()[0] for line in lines[1:4]] == ["forward", "update", "step"]
    assert re.fullmatch(r"collectives +4\.00 +4\.0 calls a step", lines[5])
    assert re.fullmatch(r"dispersion, in the backward pass +5\.00 +2\.0 calls a step", lines[7])


def test_steps_beyond_the_run_are_refused() -> None:
    with pytest.raises(ValueError, match=r"profiling: steps 115 to 124 are watched, but the run has 120"):
        load_settings(DEMO, ["profiling.first_step=115"])
    assert load_settings(DEMO, ["profiling.first_step=110"]).profiling == ProfilingSettings(first_step=110)
