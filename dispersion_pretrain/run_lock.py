"""One start at a time in a run folder: what a killed one left alive must not write beside the next.

Every rank locks its own part of one file in the run folder, for as long as its process lives, and writes there who it
is. The kernel frees a lock when the process ends, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dispersion_pretrain import distributed, heartbeat
from dispersion_pretrain.heartbeat import Beat

LOCK_FILE = "ranks.lock"  # of a run folder
_SLOT_BYTES = 128  # a rank's part of the file
_POLL_S = 0.1
_BEAT_S_PER_RANK = 0.04  # twice the watchdog's longest interval, which grows with the ranks
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)  # what file systems without locks answer

_log = logging.getLogger(__name__)


@contextmanager
def only_start(run_folder: Path, is_orphan: Callable[[], bool], *, wait_s: float = 60.0) -> Iterator[None]:
    """Keep other starts out of the run folder; wait for what an earlier one left alive.

    Args:
        is_orphan: whether this start has itself been left alone, so that it must make room.
        wait_s: for how long; longer where many ranks make heartbeats seldom. If no heartbeat has moved meanwhile, and
            none is of a process that lives on this machine, the holder is taken for dead: a file server may keep the
            lock of a machine that lost its power.

    Collective: world, at the beginning.

    Raises:
        RuntimeError: another start is at work there, or this one is an orphan; on every rank.
    """
    path, rank, world_size = run_folder / LOCK_FILE, distributed.rank(), distributed.world_size()
    wait_s, descriptor = max(wait_s, world_size * _BEAT_S_PER_RANK), -1
    with distributed.failing_together(f"{run_folder}: cannot be locked against a second start"):
        run_folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o664)
    try:
        for turn in (rank == 0, rank > 0):  # of two starts at once the one whose rank 0 is first comes in
            with distributed.failing_together(f"{path}: this start must not go on"):
                if turn:
                    _lock(descriptor, path, rank, wait_s, is_orphan)
        with distributed.failing_together(f"{path}: this start must not go on"):
            if rank == 0:  # an earlier start may have had more ranks
                _lock(descriptor, path, world_size, wait_s, is_orphan, to_the_end=True)
            if is_orphan():
                raise RuntimeError("the launcher that started this process has ended. Start the run again.")
        yield
    finally:
        os.close(descriptor)


def _lock(
    descriptor: int, path: Path, slot: int, wait_s: float, is_orphan: Callable[[], bool], *, to_the_end: bool = False
) -> None:
    """Lock one slot, or all from there on, and write down who holds it."""
    beats_folder, deadline_s = path.parent / heartbeat.FOLDER, time.monotonic() + wait_s
    before: dict[int, Beat] | None = None
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 0 if to_the_end else _SLOT_BYTES, slot * _SLOT_BYTES)
            break
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _log.warning("%s: this file system has no locks: a second start would not be noticed: %s", path, error)
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        holder = os.pread(descriptor, _SLOT_BYTES, slot * _SLOT_BYTES).decode(errors="replace").strip("\0\n ")
        holder = holder or "another process"
        if before is None:
            before = heartbeat.read_beats(beats_folder)
            print(f"waiting for {holder}, of an earlier start of this run, to end", flush=True)
        if is_orphan():
            raise RuntimeError(f"the launcher that started this process has ended, and {holder} is at work here now.")
        if time.monotonic() >= deadline_s:
            if before and before == heartbeat.read_beats(beats_folder) and all(map(_may_be_dead, before.values())):
                _log.warning("%s: held by %s, which has given no sign for %g s: taken for dead", path, holder, wait_s)
                return
            raise RuntimeError(
                f"{holder} is at work in this run folder; one start at a time is allowed. Wait for its end, stop it "
                f"with SIGTERM (it saves first), or set another run.name. If that process is gone, remove {path}."
            )
        time.sleep(_POLL_S)
    if not to_the_end:
        name = f"rank {slot}, process {os.getpid()} on {socket.gethostname()}"
        os.pwrite(descriptor, name.encode()[: _SLOT_BYTES - 1].ljust(_SLOT_BYTES - 1) + b"\n", slot * _SLOT_BYTES)


def _may_be_dead(beat: Beat) -> bool:
    """Of a rank whose heartbeat stands still: all but a process of this machine that lives."""
    machine = heartbeat.own_machine()
    return beat.exit_code is not None or beat.machine != machine or heartbeat.is_gone(beat, machine)
