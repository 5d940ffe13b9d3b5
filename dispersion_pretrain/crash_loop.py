"""How the starts of a run ended, and an end to starts that fail at one step again and again.

A rank that is killed can write nothing. So each start reads, from the heartbeats that the one before left, how that
ended, appends it to `ends.jsonl`, and removes them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dispersion_pretrain import distributed, exit_codes, heartbeat, provenance
from dispersion_pretrain.config import Settings
from dispersion_pretrain.heartbeat import Beat
from dispersion_pretrain.metrics import STARTS_FILE, append_line, cut_torn_line, last_training_record
from dispersion_pretrain.settings_file import dump_settings

ENDS_FILE = "ends.jsonl"

# What a rank says whose peer has gone: not the cause.
_OF_A_PEER = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed? ?out|NCCL|DistBackendError|remote process", re.IGNORECASE
)


class CrashLoopError(RuntimeError):
    """The last two starts failed at one step, and nothing has changed since."""


@dataclass(frozen=True)
class End:
    """How a start ended. `step` is the 0-based one it was in; it is known within `uncertain_steps`."""

    time: float  # of the last sign of it
    first_step: int
    step: int
    exit_code: int | None  # None: killed
    reason: str
    uncertain_steps: int
    fingerprint: str  # of settings and code

    @property
    def is_failure(self) -> bool:
        """Whether another start would be in doubt: not after the last step, a request, or a person's signal."""
        if self.exit_code is None:
            return True
        return self.exit_code not in (exit_codes.DONE, exit_codes.REQUEUE) and self.exit_code < exit_codes.KILLED

    def repeats(self, earlier: End) -> bool:
        """Whether both failed at one step for one reason, with equal settings and code. Numbers in it may differ."""
        return (
            self.is_failure
            and earlier.is_failure
            and self.fingerprint == earlier.fingerprint
            and abs(self.step - earlier.step) <= max(self.uncertain_steps, earlier.uncertain_steps)
            and re.sub(r"\d+", "#", self.reason) == re.sub(r"\d+", "#", earlier.reason)
        )


def refuse_crash_loop(settings: Settings, *, resume: str) -> None:
    """Record how the last start ended; raise if it failed as the one before it did. To be called before a start.

    A resume from a named checkpoint is a person's decision and is not refused.

    Collective: world. Rank 0 reads and writes.

    Raises:
        CrashLoopError: on every rank.
        RuntimeError: the run folder cannot be written; on every rank.
    """
    folder = settings.run_folder
    ends = distributed.from_main(
        f"{folder}: cannot record how the last start ended", lambda: _record_last(folder, settings.logging.every_steps)
    )
    current = distributed.from_main(f"{folder}: cannot read versions", lambda: _fingerprint(dump_settings(settings)))
    if resume != "auto" or len(ends) < 2 or ends[-1].fingerprint != current or not ends[-1].repeats(ends[-2]):
        return
    last = ends[-1]
    raise CrashLoopError(
        f"{folder}: the last two starts ended in step {last.step} (from steps {ends[-2].first_step} and "
        f"{last.first_step}), both with: {last.reason}. With the same settings and code a third would end there too, "
        "so it is not allowed. Change what the reason says, in the settings or in committed code; or name an older "
        f"checkpoint with --resume PATH; or remove {folder / ENDS_FILE} to try once more."
    )


def _record_last(folder: Path, log_every_steps: int) -> list[End]:
    """The ends of all starts, the last one's added; its heartbeats are gone afterwards."""
    path, beats_folder = folder / ENDS_FILE, folder / heartbeat.FOLDER
    ends = read_ends(path)
    beats, start = heartbeat.read_beats(beats_folder), _last_start(folder)
    if beats and start is not None:
        first_step, fingerprint, metrics_bytes = start
        logged = None
        if metrics_bytes is not None:
            logged = last_training_record(folder, behind_bytes=metrics_bytes).get("step", first_step)
        end = conclude(beats, first_step, fingerprint, logged_step=logged, log_every_steps=log_every_steps)
        if not ends or ends[-1].time != end.time:  # else a kill came between the two lines below
            cut_torn_line(path)
            append_line(path, asdict(end))
            ends.append(end)
    shutil.rmtree(beats_folder, ignore_errors=True)
    return ends


def conclude(
    beats: dict[int, Beat],
    first_step: int,
    fingerprint: str,
    *,
    logged_step: int | None = None,
    log_every_steps: int = 1,
) -> End:
    """How a start ended whose ranks left these heartbeats.

    `logged_step` is the last one of which the start wrote a record, or its first; None where that is not known.

    Of several reasons the one counts that can be a cause: a hang or an error before a rank that was killed (launchers
    kill the others), and that before a broken connection, which only says that a peer had gone.
    """
    last_sign = max(beat.time for beat in beats.values())
    codes = {beat.exit_code for beat in beats.values()}
    if codes <= {exit_codes.DONE, exit_codes.REQUEUE}:
        code = next(iter(codes))
        step = max(beat.step for beat in beats.values())
        return End(last_sign, first_step, step, code, "", 0, fingerprint)
    ended = [beat for beat in beats.values() if beat.exit_code is not None]
    own = [beat for beat in ended if beat.exit_code not in (exit_codes.DONE, exit_codes.REQUEUE)]
    causes = [beat for beat in own if not _OF_A_PEER.search(beat.reason) or beat.exit_code == exit_codes.HANG]
    killed = [beat for beat in beats.values() if beat.exit_code is None]
    if causes:
        cause = min(causes, key=lambda beat: (beat.exit_code != exit_codes.HANG, beat.rank))
        return End(last_sign, first_step, cause.step, cause.exit_code, cause.reason, 0, fingerprint)
    if killed:
        reason = f"{_names(killed)} killed (by the system for memory, or with its machine?)"
        # A rank that was killed is known by its last heartbeat; one that saw the connection break knows the step.
        precise = [beat.step for beat in own]
        if precise:
            return End(last_sign, first_step, max(precise), None, reason, 1, fingerprint)
        step, uncertain = max(beat.step for beat in killed), 1 + max(beat.pace_steps for beat in killed)
        if logged_step is not None and step <= logged_step + log_every_steps:  # else records were not written
            latest = min(step + uncertain, logged_step + log_every_steps)
            step = max(step, logged_step)
            uncertain = max(1, latest - step)
        return End(last_sign, first_step, step, None, reason, uncertain, fingerprint)
    first = min(own, key=lambda beat: beat.rank)
    return End(last_sign, first_step, first.step, first.exit_code, first.reason, 1, fingerprint)


def _names(beats: Iterable[Beat]) -> str:
    ranks = sorted(beat.rank for beat in beats)
    return f"rank {ranks[0]} was" if len(ranks) == 1 else f"{len(ranks)} ranks were"


def read_ends(path: Path) -> list[End]:
    """How the starts of a run ended, oldest first; lines that are not whole are left out."""
    if not path.exists():
        return []
    ends = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            ends.append(End(**json.loads(line)))
        except (ValueError, TypeError):  # a line that a kill cut
            continue
    return ends


def _last_start(folder: Path) -> tuple[int, str, int | None] | None:
    """First step and fingerprint of the last start, and how long metrics.jsonl was before it (None in older runs).

    None where the run folder does not tell.
    """
    try:
        start: dict[str, Any] = json.loads((folder / STARTS_FILE).read_text(encoding="utf-8").splitlines()[-1])
        settings = (folder / "config.yaml").read_text(encoding="utf-8")
        fingerprint = _fingerprint(settings, start["versions"], start["git_commit"])
        return start["resumed_from_step"], fingerprint, start.get("metrics_bytes")
    except (OSError, ValueError, LookupError):
        return None


def _fingerprint(settings: str, versions: dict[str, str] | None = None, commit: str | None = None) -> str:
    """Of settings and code; by default the code that runs."""
    if versions is None:
        versions, commit = provenance.versions(), provenance.git_commit()
    return hashlib.sha256(json.dumps([settings, versions, commit]).encode()).hexdigest()[:16]
