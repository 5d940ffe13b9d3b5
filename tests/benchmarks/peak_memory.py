"""Peak memory of a function in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_mib(
    function: Callable[[Any], object], make: Callable[[Any], Any], sizes: tuple[Any, Any], threads: int
) -> float:
    """Peak over what was there before the call, MiB.

    Args:
        make: makes the function's argument of a size.
        sizes: a small one for a first call, in which libraries load their parts, and the one that is measured.

    Returns:
        NaN where the process died.
    """
    context = multiprocessing.get_context("spawn")
    result = context.SimpleQueue()
    process = context.Process(target=_measure, args=(function, make, sizes, threads, result))
    process.start()
    process.join()
    return float(result.get()) if process.exitcode == 0 else float("nan")


def _measure(
    function: Callable[[Any], object],
    make: Callable[[Any], Any],
    sizes: tuple[Any, Any],
    threads: int,
    result: multiprocessing.SimpleQueue,
) -> None:
    torch.set_num_threads(threads)
    function(make(sizes[0]))
    argument = make(sizes[1])
    before = _memory_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    function(argument)
    result.put(_memory_of("VmHWM") - before)


def _memory_of(field: str) -> float:
    """A field of this process' memory figures, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
