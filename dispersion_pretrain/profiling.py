"""Where the time of a step goes: a table of phases, and a trace for Perfetto or TensorBoard.

Two windows of steps. In the first the phases that `heartbeat` marks are timed, with the device idle at each mark, so
that a phase has the time of its own kernels; the loss head and the dispersion term count apart from the rest of the
forward pass. The second runs undisturbed under PyTorch's profiler, which says what the collectives take, what the
two terms cost in the backward pass, and which operators cost most.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from dispersion_pretrain import heartbeat
from dispersion_pretrain.config import ProfilingSettings

FOLDER = "profile"  # of a run folder: phases.txt, operators.txt, trace.json.gz
_OPERATORS = 25  # rows of operators.txt
# Events of the trace by the beginnings of their names.
_OF_THE_TRACE = {
    "collectives": ("gloo:", "nccl:"),
    "loss head, in the backward pass": ("autograd::engine::evaluate_function: _SummedCrossEntropyBackward",),
    "dispersion, in the backward pass": ("autograd::engine::evaluate_function: PairSumLossBackward",),
}


class StepProfiler:
    """Watches some steps of a run; off without settings, and where a run starts behind the first of these steps."""

    def __init__(
        self,
        section: ProfilingSettings | None,
        run_folder: Path,
        device: torch.device,
        parts: Iterable[tuple[str, nn.Module]],
    ) -> None:
        """Watch this process.

        Args:
            parts: modules whose forward passes count by themselves, with their names.
        """
        self._section, self._folder, self._device = section, run_folder / FOLDER, device
        self._parts = list(parts)
        self._hooks: list[Any] = []
        self._clock: _Clock | None = None
        self._trace: _Trace | None = None
        self._begun = 0  # steps of the present window; a rollback repeats numbers, so they are counted

    def reach(self, step: int) -> None:
        """Say that the 0-based step is about to begin."""
        if self._section is None:
            return
        self._begun += 1
        if self._trace is not None:
            if self._begun > self._section.steps:
                self._finish(self._section.steps)
        elif self._clock is not None:
            if self._begun > self._section.steps:
                self._clock.stop()
                self._remove_hooks()
                self._trace, self._begun = _Trace(self._device), 1
                heartbeat.now.observer = self._trace.enter
        elif step == self._section.first_step:
            self._clock, self._begun = _Clock(self._device), 1
            heartbeat.now.observer = self._clock.enter
            for name, module in self._parts:
                self._hooks += self._clock.watch(name, module)

    def close(self) -> None:
        """End what has begun: of a trace that was cut short there are the steps so far, of less there is nothing."""
        if self._trace is not None:
            self._finish(self._begun)
        self._remove_hooks()
        heartbeat.now.observer = self._clock = None

    def _finish(self, traced_steps: int) -> None:
        """Print the table and write the files."""
        assert self._section is not None and self._clock is not None and self._trace is not None
        heartbeat.now.observer = None
        clock, trace, self._clock, self._trace = self._clock, self._trace, None, None
        trace.stop()
        table = phase_table(clock.seconds, self._section.steps, trace.averages(), traced_steps)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "phases.txt").write_text(table + "\n", encoding="utf-8")
        (self._folder / "operators.txt").write_text(trace.operators(), encoding="utf-8")
        trace.write(self._folder / "trace.json.gz")
        print(f"{table}\nprofile: {self._folder}", flush=True)

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class _Clock:
    """Seconds by phase, the device being idle wherever one ends."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._phase = device, "between steps"
        self._part, self._around = "", ""  # the module at work, and the phase in which it works
        self._since = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def enter(self, phase: str) -> None:
        """Say which phase begins; back in that around a module at work, it is the module's time."""
        self._switch(self._part if self._part and phase == self._around else phase)

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Let a module's forward passes count under its name; returns the hooks."""

        def begin(*_: Any) -> None:
            self._part, self._around = name, heartbeat.now.phase
            self._switch(name)

        def end(*_: Any) -> None:
            self._part = ""
            self._switch(heartbeat.now.phase)

        return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    def _switch(self, phase: str) -> None:
        now = self._now()
        self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase, now

    def stop(self) -> None:
        self._switch("")


class _Trace:
    """PyTorch's profiler with a range for each phase."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profile = profile(activities=activities)
        self._profile.start()
        self._range = ExitStack()
        self._thread = threading.get_ident()

    def enter(self, phase: str) -> None:
        if threading.get_ident() == self._thread:  # a range must end in the thread in which it began
            self._range.close()
            self._range.enter_context(record_function(phase))

    def stop(self) -> None:
        self._range.close()
        self._profile.stop()

    def averages(self) -> dict[str, tuple[int, float]]:
        """Calls and seconds of each event, on the GPU where there is one."""
        return {
            event.key: (event.count, 1e-6 * (event.device_time_total if self._on_gpu else event.cpu_time_total))
            for event in self._profile.key_averages()
        }

    def operators(self) -> str:
        """The operators that cost most themselves."""
        key = "self_cuda_time_total" if self._on_gpu else "self_cpu_time_total"
        return str(self._profile.key_averages().table(sort_by=key, row_limit=_OPERATORS))

    def write(self, path: Path) -> None:
        """For Perfetto, or TensorBoard's profiler plugin."""
        self._profile.export_chrome_trace(str(path))


def phase_table(seconds: dict[str, float], steps: int, events: dict[str, tuple[int, float]], traced_steps: int) -> str:
    """Lines of phases, with milliseconds a step and their share; then what the trace says besides.

    Args:
        seconds: by phase, over all `steps`.
        events: calls and seconds of the trace's events, over all `traced_steps`.
    """
    total = sum(seconds.values())
    lines = [f"{'phase':<36}{'ms a step':>12}{'share':>9}"]
    for phase, time_s in sorted(seconds.items(), key=lambda item: -item[1]):
        lines.append(f"{phase:<36}{1e3 * time_s / steps:12.2f}{time_s / total:9.1%}")
    lines.append(f"{'step':<36}{1e3 * total / steps:12.2f}{1:9.1%}")
    lines.append("of the traced steps, within these phases or beside them:")
    for name, beginnings in _OF_THE_TRACE.items():
        found = [event for key, event in events.items() if key.startswith(beginnings)]
        calls, time_s = sum(count for count, _ in found), sum(each for _, each in found)
        lines.append(f"{name:<36}{1e3 * time_s / traced_steps:12.2f}{calls / traced_steps:9.1f} calls a step")
    return "\n".join(lines)
