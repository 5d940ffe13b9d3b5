"""Which checkpoints of a run are kept, and how the others are removed."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from dispersion_pretrain import checkpoint

_log = logging.getLogger(__name__)


def retain(
    run_folder: Path | str,
    keep_last: int,
    protected_steps: Iterable[int] = (),
    *,
    keep_every_tokens: int | None = None,
    verified_step: int | None = None,
) -> list[Path]:
    """Remove committed checkpoints except the last `keep_last`, the protected ones, milestones and the newest good one.

    A milestone is the first checkpoint at or after a multiple of `keep_every_tokens` tokens; it is kept for ever.
    Damaged checkpoints and saves under way are left alone. The newest good one is found by reading it;
    `verified_step`, which this process has just committed, is believed unread.

    Returns:
        The folders removed. What cannot be deleted is logged and does not stop the run.

    Raises:
        ValueError: `keep_last` is below 1.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last: {keep_last} would keep no checkpoint. Allowed: 1 or more. Raise it.")
    tokens: dict[Path, int] = {}
    whole: list[tuple[int, Path]] = []
    for step, path in checkpoint.candidates(run_folder):
        problems, manifest = checkpoint.check_structure(path)
        if not problems:
            whole.append((step, path))
            tokens[path] = manifest["tokens"]
    good = (step for step, path in whole if step == verified_step or not checkpoint.verify(path))
    newest_good = next(good, None)
    if newest_good is None:
        return []
    steps = sorted({step for step, _ in whole}, reverse=True)
    kept = {newest_good, *steps[:keep_last], *protected_steps}
    if keep_every_tokens is not None:
        kept |= _milestones([(step, tokens[path]) for step, path in whole], keep_every_tokens)
    return [path for step, path in whole if step not in kept and remove(path)]


def _milestones(checkpoints: list[tuple[int, int]], every_tokens: int) -> set[int]:
    """Steps, of (step, tokens), of the first checkpoint at or after each multiple of `every_tokens`.

    It comes out the same whichever others have been removed, since a milestone itself never is.
    """
    kept, passed = set(), 0
    for step, tokens in sorted(checkpoints):
        if tokens // every_tokens > passed:
            kept.add(step)
            passed = tokens // every_tokens
    return kept


def remove(folder: Path) -> bool:
    """Delete a checkpoint so that a kill on the way leaves nothing that passes for one; tell if gone."""
    removing = folder.parent / f".removing-{folder.name.removeprefix('.replaced-')}"
    try:
        (folder / checkpoint.MARKER).unlink(missing_ok=True)
        shutil.rmtree(removing, ignore_errors=True)
        os.replace(folder, removing)
        shutil.rmtree(removing)
    except OSError as error:
        _log.warning("%s: cannot delete this older checkpoint: %s", folder, error)
        return False
    return True
