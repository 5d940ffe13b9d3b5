"""Training figures: sums on the device, one reduction a log step, and where they are written.

metrics.jsonl holds one JSON object a line with "step", "tokens" and "time"; JSON has no NaN and no infinity,
so a value that is not finite stands there as null. After a resume a step can appear again: the last value
counts.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dispersion_pretrain import distributed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.progress import Progress
    from torch.utils.tensorboard import SummaryWriter

METRICS_FILE = "metrics.jsonl"
STARTS_FILE = "starts.jsonl"
_TAIL_BYTES = 2**18  # of metrics.jsonl, in which the last record is looked for
TENSORBOARD_FOLDER = "tensorboard"
_DETAILS = ("/layer_", "/last_blocks_")  # parts of keys that the terminal does not show
_MAX_UNWRITTEN = 10_000  # records that wait for room on the disk

_log = logging.getLogger(__name__)


# ---- sums on the device


class StepTotals:
    """Weighted means over micro-steps, steps and ranks, without waiting for the device before `reduce`."""

    def __init__(self) -> None:
        self._totals: dict[tuple[str, ...], Tensor] = {}
        self._counts: dict[tuple[str, ...], Tensor | float] = {}

    def add(self, names: str | Sequence[str], total: Tensor, count: Tensor | float = 1.0) -> None:
        """Add a total and what it is to be divided by in the end.

        A mean of values: `add("grad_norm", norm)`. A mean over tokens: `add("loss/cross_entropy", sum,
        num_tokens)`. With a sequence of names `total` is a vector of as many entries. `count` is a number or
        a scalar tensor on the device of `total`. Sums are kept in float64. Every rank must add the same names
        between two reductions.
        """
        key = (names,) if isinstance(names, str) else tuple(names)
        value = total.detach().to(torch.float64, copy=True).reshape(-1)
        if value.numel() != len(key):
            raise ValueError(f"{', '.join(key)}: {value.numel()} values for {len(key)} names. Pass one each.")
        if isinstance(count, Tensor):
            count = count.detach().to(torch.float64, copy=True)
        if key in self._totals:
            self._totals[key] += value
            self._counts[key] = self._counts[key] + count
        else:
            self._totals[key] = value
            self._counts[key] = count

    def merge(self, other: StepTotals) -> None:
        """Add the sums of another, which stays as it is."""
        for key, total in other._totals.items():
            self.add(key, total, other._counts[key])

    def reduce(self) -> dict[str, float]:
        """Return total / count of every name over all ranks and start from zero again; NaN for a count of 0.

        Collective: world, one all-reduce of one flat tensor. Waits for the device, once.
        """
        keys = sorted(self._totals)
        if not keys:
            return {}
        device = self._totals[keys[0]].device
        counts = [torch.as_tensor(self._counts[key], dtype=torch.float64, device=device) for key in keys]
        flat = torch.cat([self._totals[key] for key in keys] + [count.reshape(1) for count in counts])
        values = distributed.all_reduce_sum(flat.to(distributed.collective_device())).tolist()
        self._totals.clear()
        self._counts.clear()
        means = {}
        position = 0
        for key, count in zip(keys, values[len(values) - len(keys) :], strict=True):
            for name in key:
                means[name] = values[position] / count if count else math.nan
                position += 1
        return means


# ---- files


class MetricsWriter:
    """Writes records to metrics.jsonl, TensorBoard and the terminal; on other ranks than 0 it does nothing.

    A full disk is logged once and does not stop the run: rank 0 must not fall out of step with the others. Records that
    could not be written follow when there is room again.
    """

    def __init__(
        self, run_folder: Path | str, *, max_tokens: int, is_main: bool, progress: bool, first_step: int = 0
    ) -> None:
        """Open the files of a run for appending.

        `progress` False prints nothing; True shows a bar on a terminal and plain lines elsewhere.
        `first_step` is the first step this start will write: TensorBoard drops what an earlier start wrote
        from there on.
        """
        self._run_folder = Path(run_folder)
        self._max_tokens = max_tokens
        self._is_main = is_main
        self._prints = progress and is_main
        self._bar: Progress | None = None
        self._rate_start: tuple[float, int] | None = None  # (time, tokens) of this start's first record
        self._disk_complaint = ""
        self._unwritten: deque[dict[str, Any]] = deque(maxlen=_MAX_UNWRITTEN)
        self._tensorboard: SummaryWriter | None = None
        if not is_main:
            return
        self._run_folder.mkdir(parents=True, exist_ok=True)
        cut_torn_line(self._run_folder / METRICS_FILE)
        self._tensorboard = self._open_tensorboard(first_step)
        if self._prints and sys.stdout.isatty():
            self._bar = _start_bar(max_tokens)

    def write(self, step: int, tokens: int, values: Mapping[str, float]) -> None:
        """Write one record: `values` by metric key, at an optimizer step and the tokens seen up to it."""
        if not self._is_main:
            return
        now = time.time()
        with self._surviving_a_full_disk():
            self._unwritten.append({"step": step, "tokens": tokens, "time": now, **values})
            while self._unwritten:
                append_line(self._run_folder / METRICS_FILE, self._unwritten[0])
                self._unwritten.popleft()
            with self._tensorboard_writer(step) as writer:
                for name, value in values.items():
                    writer.add_scalar(name, value, step, walltime=now)
        if self._prints:
            self._show(step, tokens, values, now)

    def write_pictures(self, step: int, pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        """Write images of (height, width, 3) to TensorBoard by their tags; on a full disk they are lost."""
        if not self._is_main:
            return
        with self._surviving_a_full_disk(), self._tensorboard_writer(step) as writer:
            for tag, picture in pictures.items():
                writer.add_image(tag, picture, step, dataformats="HWC")

    def _open_tensorboard(self, first_step: int) -> SummaryWriter:
        from torch.utils.tensorboard import SummaryWriter  # takes a second: only the rank that writes pays

        return SummaryWriter(str(self._run_folder / TENSORBOARD_FOLDER), purge_step=first_step)

    @contextmanager
    def _tensorboard_writer(self, step: int) -> Iterator[SummaryWriter]:
        """Raises OSError; the writer's thread has then ended, and the next call opens another."""
        writer = self._tensorboard or self._open_tensorboard(step)
        self._tensorboard = None
        yield writer
        writer.flush()
        self._tensorboard = writer

    @contextmanager
    def _surviving_a_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if str(error) != self._disk_complaint:
                self._disk_complaint = str(error)
                _log.warning("%s: metrics are not written: %s", self._run_folder, error)

    def _show(self, step: int, tokens: int, values: Mapping[str, float], now: float) -> None:
        if self._rate_start is None:
            self._rate_start = (now, tokens)
        eta_s = self._seconds_left(tokens, now, values.get("tokens_per_s", math.nan))
        is_training = "loss/total" in values
        if self._bar is not None:
            if is_training:
                self._bar.update(
                    self._bar.task_ids[0],
                    completed=tokens,
                    step=f"{step:,}",
                    loss=f"{values['loss/total']:.4f}",
                    speed=f"{values.get('tokens_per_s', math.nan):,.0f}",
                    eta=format_duration(eta_s),
                )
            else:
                self._bar.console.print(_other_line(step, values), highlight=False)
        elif is_training:
            print(_training_line(step, tokens, values, eta_s), flush=True)
        else:
            print(_other_line(step, values), flush=True)

    def _seconds_left(self, tokens: int, now: float, tokens_per_s: float) -> float:
        """Estimate by the pace of this start, validation and checkpoints included; at first of the step."""
        assert self._rate_start is not None
        start, start_tokens = self._rate_start
        rate = tokens_per_s
        if tokens > start_tokens and now > start:
            rate = (tokens - start_tokens) / (now - start)
        return max(self._max_tokens - tokens, 0) / rate if rate > 0 else math.nan

    def close(self) -> None:
        """End the progress bar and write out what is buffered."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._tensorboard is not None:
            with self._surviving_a_full_disk():
                self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        """Return the writer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the writer."""
        self.close()


def append_start(run_folder: Path | str, record: Mapping[str, Any]) -> None:
    """Append one line about this start, with the time, to starts.jsonl. Only rank 0 acts."""
    if distributed.is_main():
        path = Path(run_folder) / STARTS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_line(path)
        append_line(path, {"time": time.time(), **record})


def size_of_records(run_folder: Path | str) -> int:
    """Return the bytes of metrics.jsonl; what a start adds comes behind them."""
    path = Path(run_folder) / METRICS_FILE
    return path.stat().st_size if path.exists() else 0


def read_metrics(run_folder: Path | str) -> list[dict[str, Any]]:
    """Return the figures of a run, one record a step, ascending; of a step written twice the last values.

    null is returned as NaN. Lines that are no JSON object, as a kill in mid-write leaves one, are left out.
    """
    steps: dict[int, dict[str, Any]] = {}
    for record in _read_lines(Path(run_folder) / METRICS_FILE):
        values = {key: math.nan if value is None else value for key, value in record.items()}
        steps.setdefault(record["step"], {}).update(values)
    return [steps[step] for step in sorted(steps)]


def last_training_record(run_folder: Path | str, *, behind_bytes: int = 0) -> dict[str, Any]:
    """Return the last record of an optimizer step, read from the end of metrics.jsonl alone; {} where there is none.

    Args:
        behind_bytes: only what comes behind so many bytes of the file counts.
    """
    try:
        with open(Path(run_folder) / METRICS_FILE, "rb") as file:
            file.seek(max(behind_bytes, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:  # a line that a kill cut, or the middle of one
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and "loss/total" in record:
            return record
    return {}


def cut_torn_line(path: Path) -> None:
    """Cut off a last line without newline, which a kill left, so that the next one stands alone."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            _log.warning("%s: cut off an unfinished last line of %d bytes", path, len(content) - whole)
            file.truncate(whole)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append a record as one line of JSON, whole or not at all. Raises OSError."""
    line = json.dumps(_finite(record), allow_nan=False) + "\n"
    content = line.encode()
    with open(path, "ab", buffering=0) as file:  # one system call a line: nothing waits in a buffer for a kill
        written = file.write(content)
    if written != len(content):
        cut_torn_line(path)
        raise OSError(errno.ENOSPC, f"wrote {written} of {len(content)} bytes, the disk is full", str(path))


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record
        else:
            _log.warning("%s: line %d is not a record and is left out", path, number)


def _finite(value: Any) -> Any:
    """Replace floats that JSON cannot express by None, at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


# ---- terminal


def _start_bar(max_tokens: int) -> Progress:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    bar = Progress(
        TextColumn("step {task.fields[step]}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]} | {task.fields[speed]} tokens/s | ETA {task.fields[eta]}"),
        expand=True,
    )
    bar.add_task("training", total=max_tokens, step="-", loss="-", speed="-", eta="-")
    bar.start()
    return bar


_LINE = [  # metric key, label, format
    ("loss/total", "loss", ".4f"),
    ("loss/dispersion", "dispersion", ".4f"),
    ("dispersion/cosine", "cosine", ".4f"),
    ("learning_rate", "lr", ".2e"),
    ("grad_norm", "grad norm", ".3f"),
    ("tokens_per_s", "tokens/s", ",.0f"),
]


def _training_line(step: int, tokens: int, values: Mapping[str, float], eta_s: float) -> str:
    parts = [f"step {step}", f"tokens {tokens:,}"]
    parts += [f"{label} {values[key]:{form}}" for key, label, form in _LINE if key in values]
    return " | ".join([*parts, f"ETA {format_duration(eta_s)}"])


def _other_line(step: int, values: Mapping[str, float]) -> str:
    shown = [f"{name} {value:.4f}" for name, value in values.items() if not any(part in name for part in _DETAILS)]
    return " | ".join([f"step {step}", *shown])


def format_duration(seconds: float) -> str:
    """Seconds as [Nd ]h:mm:ss; - for what is not finite."""
    if not math.isfinite(seconds):
        return "-"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


# ---- speed and memory

# Dense peaks in FLOP/s by torch.cuda.get_device_name: bf16 on tensor cores, float32 without TF32. Figures
# "with sparsity" in data sheets are twice as high. None: the device lacks the type. The first match counts.
_PEAKS: list[tuple[str, float | None, float | None]] = [
    (r"\bGB200\b", 2500e12, 80e12),
    (r"\bB200\b", 2250e12, 75e12),
    (r"\bH200 NVL\b", 835.5e12, 60e12),
    (r"\bG?H200\b", 989e12, 67e12),
    (r"\bH100 PCIe\b", 756e12, 51e12),
    (r"\bH100 NVL\b", 835.5e12, 60e12),
    (r"\bH100\b", 989e12, 67e12),
    (r"\bA100\b", 312e12, 19.5e12),
    (r"\bA40\b", 149.7e12, 37.4e12),
    (r"\bA10G\b", 70e12, 31.5e12),
    (r"\bA10\b", 125e12, 31.2e12),
    (r"\bL40S\b", 362e12, 91.6e12),
    (r"\bL40\b", 181e12, 90.5e12),
    (r"\bL4\b", 121e12, 30.3e12),
    (r"\bV100-PCIE\b", None, 14e12),
    (r"\bV100\b", None, 15.7e12),
    (r"\bT4\b", None, 8.1e12),
]


def peak_flops(device_name: str, precision: Literal["bf16", "float32"]) -> float | None:
    """Return the dense peak of a GPU in FLOP/s by its name; None for the CPU, for unknown devices and types.

    Source: NVIDIA data sheets of each product, without sparsity; float32 is the peak without TF32.
    """
    if re.search(r"\bMIG\b", device_name):
        return None  # a slice of a GPU: the name does not say of how many multiprocessors
    for pattern, bf16, float32 in _PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return bf16 if precision == "bf16" else float32
    return None


def model_flops_per_token(num_parameters: int, num_layers: int, attention_width: int, sequence_length: int) -> int:
    """Return 6 N + 12 L d s, the model FLOPs of forward and backward for one token.

    Args:
        num_parameters: N, of the matrices that a token is multiplied with: the head, and no table that is looked up.
        attention_width: d, heads x width of a head.

    Attention is counted as if every position saw all s positions: the causal mask is not discounted. Recomputed
    activations and the dispersion loss do not count.
    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    return 6 * num_parameters + 12 * num_layers * attention_width * sequence_length


def memory_gib() -> float:
    """Return this process's memory in GiB: the peak on its CUDA device, else the resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kilobytes on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
