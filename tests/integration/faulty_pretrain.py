"""The main job, with a data reader that goes wrong: FAULT="KIND RANK BATCH", BATCH counted from 0 in each start."""

from __future__ import annotations

import ctypes
import itertools
import os
import runpy
import signal
import time
from pathlib import Path

from dispersion_pretrain.data import Batch, BatchStream


def fail(kind: str) -> None:
    if kind == "sleeps":
        time.sleep(10**6)
    elif kind == "loops":
        while True:
            pass
    elif kind == "holds":
        ctypes.PyDLL(None).sleep(10**6)  # unlike CDLL, PyDLL keeps the interpreter's lock
    elif kind == "raises":
        raise OSError("the disk is on fire")
    else:
        os.kill(os.getpid(), signal.Signals[kind])


kind, rank, number = os.environ.get("FAULT", "none -1 -1").split()
batches = itertools.count()
read = BatchStream.__next__


def read_or_fail(stream: BatchStream) -> Batch:
    if next(batches) == int(number) and os.environ.get("RANK", "0") == rank:
        fail(kind)
    return read(stream)


if __name__ == "__main__":
    BatchStream.__next__ = read_or_fail  # type: ignore[assignment, method-assign]
    runpy.run_path(str(Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"), run_name="__main__")
