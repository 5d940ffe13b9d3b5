"""A thread on each rank that makes its heartbeat public and ends a run that makes no progress.

Without progress for faults.hang_s, or with a neighbour that is gone, the first rank to notice writes
`heartbeats/ending.json`; all ranks dump their stacks into `hangs/TIME/`, the first one prints who is where, and every
rank ends itself. Seconds are counted in ticks of the thread, of which each counts little: what a clock jumps, or what a
job is suspended for, is no hang.

Code that holds the interpreter stops this thread too. The others then see no sign of the rank, and a timer of
faulthandler's, which needs no interpreter, ends the rank itself (with code 1). That timer alone knows nothing of
suspended jobs, and ends one that was for longer than faults.hang_s.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dispersion_pretrain import exit_codes, heartbeat
from dispersion_pretrain.hang_report import describe, main_thread_place
from dispersion_pretrain.heartbeat import Beat

HANGS_FOLDER = "hangs"  # of a run folder: reports and stacks
_ENDING = "ending.json"
_LONGEST_INTERVAL_S = 5.0
_SHORTEST_INTERVAL_S = 0.2
_BEATS_PER_S = 50.0  # of all ranks together: more would be a burden for a shared disk
_DEAD_S = 10.0  # a rank that stands so long beside a dead neighbour ends
# The same for a neighbour on another machine that gives no sign. Only in a step: elsewhere a rank may rightly hold the
# interpreter for long.
_UNSEEN_S = 45.0

_log = logging.getLogger(__name__)


class Verdict(NamedTuple):
    """Why a rank must end."""

    reason: str
    exit_code: int


class Watchdog:
    """One a process, from before the ranks join until `end`."""

    def __init__(
        self,
        hang_s: float | None,
        *,
        rank: int,
        world_size: int,
        clock_s: Callable[[], float] = time.monotonic,
        leave: Callable[[int], None] = os._exit,
    ) -> None:
        """Start the thread.

        Args:
            hang_s: seconds without progress after which all ranks end; None: never.
            rank, world_size: as the launcher says, since the ranks have not joined yet.
        """
        self._hang_s, self._rank, self._world_size = hang_s, rank, world_size
        self._clock_s, self._leave = clock_s, leave
        longest_s = max(_LONGEST_INTERVAL_S, world_size / _BEATS_PER_S)
        wanted_s = longest_s if hang_s is None else hang_s / 10
        self._interval_s = min(longest_s, max(_SHORTEST_INTERVAL_S, wanted_s))
        self._host, self._machine = socket.gethostname(), heartbeat.own_machine()
        self._process_start = heartbeat.process_start(os.getpid())
        self._run_folder: Path | None = None
        self._first_step = -1
        self._last_tick_s = clock_s()
        self._marks, self._standing_s = -1, 0.0
        self._beats, self._last_step = 0, -1
        self._neighbour: Beat | None = None
        self._neighbour_still_s = 0.0
        self._complaint = ""
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def publish(self, run_folder: Path, first_step: int) -> None:
        """Write heartbeats into the run folder from now on; `first_step` is the 0-based one that comes next.

        The folder of heartbeats must hold none of an earlier start (`crash_loop.refuse_crash_loop` sees to that).
        """
        (run_folder / heartbeat.FOLDER).mkdir(parents=True, exist_ok=True)
        heartbeat.begin_step(first_step)  # the doctor has made steps of its own
        self._first_step, self._last_step, self._run_folder = first_step, first_step, run_folder
        self._write()

    def end(self, exit_code: int, reason: str = "") -> None:
        """Stop watching, and leave word of how this process ends."""
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        self._write(exit_code, reason)

    def leave_at_once(self, exit_code: int, reason: str) -> None:
        """`end`, and the end of the process; from any thread."""
        self.end(exit_code, reason)
        self._leave(exit_code)

    # ---- the thread

    def _watch(self) -> None:
        while not self._ended.wait(self._interval_s):
            self._tick()

    def _tick(self) -> None:
        now_s = self._clock_s()
        passed_s = min(max(now_s - self._last_tick_s, 0.0), 2 * self._interval_s)
        self._last_tick_s = now_s
        marks = heartbeat.now.marks
        self._standing_s = self._standing_s + passed_s if marks == self._marks else 0.0
        self._marks = marks
        if self._hang_s is not None and not self._ended.is_set():
            # Until the next tick. On stderr, since the disk may be what is stuck.
            faulthandler.dump_traceback_later(self._hang_s + 4 * self._interval_s, exit=True)
        self._write()
        if self._hang_s is None:
            return
        verdict = self._announced() or self._hang(self._hang_s) or self._lost_neighbour(passed_s, self._hang_s)
        if verdict is not None and not self._ended.is_set():
            self._end_all(verdict)

    @property
    def _heartbeats(self) -> Path | None:
        return None if self._run_folder is None else self._run_folder / heartbeat.FOLDER

    def _write(self, exit_code: int | None = None, reason: str = "") -> None:
        if self._heartbeats is None:
            return
        with self._writing:
            if self._ended.is_set() and exit_code is None:
                return  # the last word has been said
            beat = self._own_beat(exit_code, reason)
            try:
                heartbeat.write_beat(self._heartbeats, beat)
            except OSError as error:  # a full disk must not end a run that needs none of this
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    _log.warning("rank %d: no heartbeat is written: %s", self._rank, error)

    def _own_beat(self, exit_code: int | None, reason: str) -> Beat:
        now, (place, in_collective) = heartbeat.now, main_thread_place()
        self._beats += 1
        pace, self._last_step = max(0, now.step - self._last_step), now.step
        return Beat(
            rank=self._rank,
            host=self._host,
            machine=self._machine,
            pid=os.getpid(),
            process_start=self._process_start,
            number=self._beats,
            step=now.step,
            micro_step=now.micro_step,
            marks=now.marks - now.marks_before_step,
            phase=now.phase,
            standing_s=round(self._standing_s, 3),
            place=place,
            in_collective=in_collective,
            pace_steps=pace,
            time=time.time(),
            exit_code=exit_code,
            reason=reason,
        )

    # ---- reasons to end

    def _patience(self) -> float:
        """The first step compiles and allocates; before it, everything is slow."""
        starting = self._run_folder is None or heartbeat.now.step <= self._first_step
        return max(heartbeat.now.patience, heartbeat.LONG if starting else 1.0)

    def _hang(self, hang_s: float) -> Verdict | None:
        limit_s = hang_s * self._patience()
        if self._standing_s < limit_s:
            return None
        reason = f"no progress for {self._standing_s:.0f} s on rank {self._rank} (allowed are {limit_s:g})"
        return Verdict(reason, exit_codes.HANG)

    def _announced(self) -> Verdict | None:
        """What another rank has found."""
        if self._heartbeats is None:
            return None
        try:
            found = json.loads((self._heartbeats / _ENDING).read_text(encoding="utf-8"))
            return Verdict(found["reason"], found["exit_code"])
        except (OSError, ValueError):  # none, or being written: seen whole at the next tick
            return None

    def _lost_neighbour(self, passed_s: float, hang_s: float) -> Verdict | None:
        """Whether the next rank has died. Each rank looks at one other, so all are seen and no file is read often.

        Never while this rank makes progress: then the neighbour is alive, whatever its file says.
        """
        if self._heartbeats is None or self._world_size == 1:
            return None
        neighbour = heartbeat.read_beat(self._heartbeats, (self._rank + 1) % self._world_size)
        if neighbour is None:
            return None
        is_still = self._neighbour is not None and self._neighbour.number == neighbour.number
        self._neighbour_still_s = self._neighbour_still_s + passed_s if is_still else 0.0
        self._neighbour = neighbour
        if self._standing_s < min(_DEAD_S, hang_s):
            return None
        if neighbour.exit_code is not None:
            if neighbour.exit_code in (exit_codes.DONE, exit_codes.REQUEUE, exit_codes.HANG):
                return None
            reason = f"rank {neighbour.rank} has ended with code {neighbour.exit_code}: {neighbour.reason}"
            return Verdict(reason, exit_codes.FAILED)
        if heartbeat.is_gone(neighbour, self._machine):
            return Verdict(f"rank {neighbour.rank} was killed or died without a word", exit_codes.HANG)
        unseen_s = min(self._standing_s, self._neighbour_still_s)
        if neighbour.machine != self._machine and self._patience() == 1.0 and unseen_s >= min(_UNSEEN_S, hang_s):
            return Verdict(f"rank {neighbour.rank} has given no sign for {unseen_s:.0f} s", exit_codes.HANG)
        return None

    # ---- the end

    def _end_all(self, verdict: Verdict) -> None:
        """Leave stacks and a report, then the process."""
        faulthandler.dump_traceback_later(60 + 10 * self._interval_s, exit=True)  # should a disk be stuck
        if self._run_folder is None or self._heartbeats is None:
            where, _ = main_thread_place()
            print(f"hang: {verdict.reason}, in: {heartbeat.now.phase}, at {where}", file=sys.stderr)
            faulthandler.dump_traceback()
            self._leave(verdict.exit_code)
            return
        try:
            is_first, folder = self._announce(verdict)
            folder.mkdir(parents=True, exist_ok=True)
            stacks = _stacks(folder, self._rank)
            with open(stacks.with_suffix(".tmp"), "w") as file:
                faulthandler.dump_traceback(file)
            stacks.with_suffix(".tmp").replace(stacks)
            if is_first:
                self._report(verdict, folder)
            else:
                # The launcher kills everybody as soon as the first rank has left: not before the report is out.
                self._wait_until((folder / "report.txt").exists, intervals=8)
        except OSError as error:
            print(f"hang: {verdict.reason}; no report can be written: {error}", file=sys.stderr, flush=True)
        self.leave_at_once(verdict.exit_code, verdict.reason)

    def _announce(self, verdict: Verdict) -> tuple[bool, Path]:
        """Tell the other ranks; return whether this rank is the first to do so, and the folder for stacks."""
        assert self._run_folder is not None and self._heartbeats is not None
        moment = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
        folder = self._run_folder / HANGS_FOLDER / moment
        content = {"reason": verdict.reason, "exit_code": verdict.exit_code, "folder": moment}
        try:
            with open(self._heartbeats / _ENDING, "x", encoding="utf-8") as file:
                file.write(json.dumps(content) + "\n")
            return True, folder
        except FileExistsError:
            self._wait_until(lambda: self._announced() is not None)
            found = json.loads((self._heartbeats / _ENDING).read_text(encoding="utf-8"))
            return False, self._run_folder / HANGS_FOLDER / found["folder"]

    def _report(self, verdict: Verdict, folder: Path) -> None:
        """Wait for the stacks of those that live, then say who is where."""
        assert self._heartbeats is not None
        before = heartbeat.read_beats(self._heartbeats)
        living = [
            rank
            for rank in range(self._world_size)
            if rank not in before
            or (before[rank].exit_code is None and not heartbeat.is_gone(before[rank], self._machine))
        ]
        self._wait_until(lambda: all(_stacks(folder, rank).exists() for rank in living))
        beats = heartbeat.read_beats(self._heartbeats)
        beats[self._rank] = self._own_beat(None, "")
        gone = {
            rank for rank, beat in beats.items() if beat.exit_code is None and heartbeat.is_gone(beat, self._machine)
        }
        unseen_s = {
            rank: max(time.time() - beat.time, 0.0)
            for rank, beat in beats.items()
            if beat.exit_code is None
            and rank not in gone
            and not _stacks(folder, rank).exists()
            and rank in before
            and before[rank].number == beat.number
        }
        lines = [
            f"hang: {verdict.reason}",
            *(f"  {line}" for line in describe(beats, self._world_size, unseen_s=unseen_s, gone=gone)),
            f"  stacks: {folder}. All ranks end with code {verdict.exit_code}; checkpoints are untouched, and the same "
            "command goes on from the newest.",
        ]
        text = "\n".join(lines)
        print(text, file=sys.stderr, flush=True)
        (folder / "report.tmp").write_text(text + "\n", encoding="utf-8")
        (folder / "report.tmp").replace(folder / "report.txt")

    def _wait_until(self, condition: Callable[[], bool], intervals: int = 4) -> None:
        """Poll, for as long as other ranks need at most to see what this one has written and to act on it."""
        deadline_s = time.monotonic() + intervals * self._interval_s + 2
        while not condition() and time.monotonic() < deadline_s:
            time.sleep(0.05)


def _stacks(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.txt"
