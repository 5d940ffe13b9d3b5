"""A rank that does nothing but make marks, then goes wrong: FOLDER RANK WORLD_SIZE HANG_S BEHAVIOUR."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

from dispersion_pretrain import heartbeat
from dispersion_pretrain import watchdog as watchdog_module
from dispersion_pretrain.stopping import Stopping
from dispersion_pretrain.watchdog import Watchdog


def work(num_steps: int) -> None:
    """Make short steps: as many on every rank, so that all come to stand at the same mark."""
    for step in range(num_steps):
        heartbeat.begin_step(step)
        heartbeat.mark("reading data")
        heartbeat.mark("forward pass")
        time.sleep(0.01)


def lock_twice() -> None:
    """Wait in C, with the interpreter free, so that no Python handler of a signal is called any more."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def main() -> None:
    folder, rank, world_size, hang_s, behaviour = sys.argv[1:]
    if behaviour == "waits-elsewhere":  # for another machine's ranks the real patience is most of a minute
        watchdog_module._UNSEEN_S, watchdog_module._LONGEST_INTERVAL_S = 4.0, 0.5
    watchdog = Watchdog(float(hang_s), rank=int(rank), world_size=int(world_size))
    if behaviour == "waits-elsewhere":
        watchdog._machine = "another machine"
    watchdog.publish(Path(folder), first_step=0)
    Stopping(leave_at_once=watchdog.leave_at_once)
    work(80)
    Path(folder, f"ready-{rank}").touch()
    if behaviour == "loops":
        while True:
            pass
    elif behaviour == "holds":
        ctypes.PyDLL(None).sleep(10**6)
    elif behaviour in ("waits", "waits-elsewhere"):
        heartbeat.mark("backward pass")
        lock_twice()
    elif behaviour == "works":
        work(400)
    watchdog.end(0)
    os._exit(0)


if __name__ == "__main__":
    main()
