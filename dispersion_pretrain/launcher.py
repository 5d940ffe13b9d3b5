"""The launcher above this process. When it is killed, its ranks live on as orphans, and nobody would stop them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from dispersion_pretrain.heartbeat import process_start

_PROGRAMS = {"deepspeed", "torchrun", "deepspeed.launcher.launch", "deepspeed.launcher.runner", "torch.distributed.run"}
_SETS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")  # variables by which deepspeed's and torchrun's ranks know them
_INTERVAL_S = 1.0  # between two looks


class Launcher:
    """Every process of deepspeed or torchrun among the ancestors; none where another program starts the ranks.

    A shell is no launcher: a run that was sent into the background goes on when its shell ends.
    """

    def __init__(self) -> None:
        """Look at the ancestors; to be called early, while they are there."""
        self._found = [(pid, process_start(pid)) for pid in _ancestors() if _is_launcher(pid)]
        self._gone = not self._found and os.getppid() == 1 and any(name in os.environ for name in _SETS)
        self._looked_s = time.monotonic()

    def is_gone(self) -> bool:
        """Whether one of them has ended. Cheap: looks once a second at most."""
        now_s = time.monotonic()
        if not self._gone and now_s - self._looked_s >= _INTERVAL_S:
            self._looked_s = now_s
            self._gone = any(process_start(pid) != start for pid, start in self._found)
        return self._gone


def _ancestors() -> Iterator[int]:
    """Process ids from the parent up to the first process that this one may see; none on no Linux."""
    pid = os.getppid()
    while pid > 0:
        yield pid
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return
        pid = int(fields[1])


def _is_launcher(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return False
    # `python -u -m deepspeed.launcher.launch ...`, `python /bin/torchrun ...`: what is run comes within these words.
    return any(os.path.basename(word) in _PROGRAMS for word in words[:4])
