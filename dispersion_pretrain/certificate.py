"""The resume certificate: what a checkpoint promises about the step after it, and whether a resume keeps it.

The checkpoint's manifest holds hashes of the samples of the next steps and of every rank's random state. Loss and
gradient norm of the next step are known one step later: they follow in `runs/NAME/certificates/step-00000100.json`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from dispersion_pretrain import checkpoint, distributed, provenance
from dispersion_pretrain.assembly import RunParts
from dispersion_pretrain.metrics import StepTotals

_STEPS = 4  # whose samples are promised
_TERMS = ("total", "cross_entropy", "dispersion", "distillation")
_FIGURES = (*(f"loss/{term}" for term in _TERMS), "grad_norm")
_TOLERANCE = {"float32": 1e-4, "bf16": 1e-2}  # relative, where sums are made in another order
_SMALLEST = 1e-6  # of what a difference is taken relative to

# What changes the loss on purpose, what only the order of its sums, and what besides draws other dropout masks.
_ON_PURPOSE = ("optimizer.", "schedule.", "dispersion", "training.max_tokens", "distillation.teacher")
_DRAWS = ("world size", "micro-batch", "device")
_ROUNDING = (
    *_DRAWS, "zero.", "versions.", "git commit", "model.attention", "model.compile", "model.kernels",
    "model.activation_checkpointing", "distillation.sharded",
)  # fmt: skip

_log = logging.getLogger(__name__)


class Change(NamedTuple):
    """Something that was otherwise when the checkpoint was saved."""

    what: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.what} {self.was} -> {self.now}"


def changes_since(found: checkpoint.CheckpointInfo, parts: RunParts) -> list[Change]:
    """Return all settings, versions and facts of the machine that differ from those of the checkpoint.

    Collective: world; the same on every rank.
    """
    manifest = found.manifest
    promised = manifest["extra"].get("certificate", {})

    def compare() -> list[Change]:
        was = {
            "world size": found.world_size,
            **promised.get("layout", {}),
            **_flat({"versions": manifest["versions"]}),
            "git commit": manifest["extra"].get("git_commit"),
            **_flat(manifest["settings"]),
        }
        now = {
            "world size": parts.layout.world_size,
            **(_layout(parts) if "layout" in promised else {}),
            **_flat({"versions": provenance.versions()}),
            "git commit": provenance.git_commit(),
            **_flat(parts.settings.model_dump(mode="json")),
        }
        return [
            Change(what, was.get(what), now.get(what))
            for what in {**was, **now}
            if was.get(what) != now.get(what) and what != "training.micro_batch"  # the layout says what came of it
        ]

    return distributed.from_main(f"{found.path}: cannot compare its settings", compare)


def _flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _flat(value, f"{above}{key}.") if isinstance(value, dict) and value else {f"{above}{key}": value}
    return leaves


def _layout(parts: RunParts) -> dict[str, Any]:
    return {"micro-batch": parts.layout.micro_batch, "device": parts.device_name}


def _among(changes: Iterable[Change], prefixes: tuple[str, ...]) -> list[Change]:
    return [change for change in changes if change.what.startswith(prefixes)]


@dataclass(frozen=True)
class _NextStep:
    """The step after `step`, to be compared with `known`, or to be written down where that is None."""

    step: int
    identity: str
    known: dict[str, float] | None
    rounding: list[Change]  # since the checkpoint was saved


class Certificate:
    """Watches the first step after each save and after a resume. All methods on all ranks alike."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts
        self._next: _NextStep | None = None
        self._other_totals = StepTotals()
        self._generators = ""

    # ---- saving

    def promise(self, step: int, samples: int) -> dict[str, Any]:
        """What the manifest of a checkpoint is to say, while the generators are as it holds them.

        Args:
            step: steps done.
            samples: the position in the data that follows.

        Collective: world.
        """
        identity, hash_of_samples = distributed.from_main(
            "the certificate of the checkpoint", lambda: (uuid.uuid4().hex, self._hash_of_samples(samples))
        )
        generators = distributed.gather_objects(_hash_of(distributed.random_state()))
        self._next = _NextStep(step, identity, known=None, rounding=[])
        return {
            "identity": identity,  # a later checkpoint of the same step has another
            "samples": hash_of_samples,
            "random_state": generators,
            "layout": _layout(self._parts),
        }

    def _hash_of_samples(self, first: int) -> str:
        """Of corpus and sample at each position of the global batches of the next steps."""
        order, count = self._parts.corpora.order, _STEPS * self._parts.settings.global_batch_sequences
        places = [order.place(position) for position in range(first, first + count)]
        return hashlib.sha256(np.asarray(places, "<i8").tobytes()).hexdigest()

    # ---- resuming

    def check_resumed(self, found: checkpoint.CheckpointInfo, changes: list[Change], *, reordered: bool) -> None:
        """Compare samples and random state with the checkpoint's, and prepare to compare the next step.

        Args:
            reordered: the order of the data was changed on purpose.

        Collective: world.

        Raises:
            RuntimeError: they differ, and checkpoint.on_mismatch is stop; on every rank.
        """
        parts = self._parts
        promised = found.manifest["extra"].get("certificate")
        if promised is None:
            _say("the checkpoint holds no certificate")
            return
        wrong, exact = [], []
        if not reordered:
            exact.append("data")
            samples = distributed.from_main(
                f"{found.path}: cannot look up the next samples", lambda: self._hash_of_samples(found.samples)
            )
            if samples != promised["samples"]:
                wrong.append(f"the hash of the next {_STEPS} steps' samples is {samples} and was {promised['samples']}")
        if found.world_size == parts.layout.world_size:
            exact.append("random state")
            current = distributed.gather_objects(_hash_of(distributed.random_state()))
            for rank, (is_now, was) in enumerate(zip(current, promised["random_state"], strict=True)):
                if is_now != was:
                    wrong.append(f"the hash of rank {rank}'s random state is {is_now} and was {was}")
        if wrong:
            self._complain(found.path, wrong)
            return
        if found.step == parts.settings.num_steps:
            return
        record = distributed.from_main(
            f"{self._path(found.step)}: cannot be read", lambda: _read(self._path(found.step), promised["identity"])
        )
        on_purpose = ["the order of the data"] * reordered + [str(change) for change in _among(changes, _ON_PURPOSE)]
        rounding = _among(changes, _ROUNDING)
        redrawn = _among(changes, _DRAWS) if record is not None and record["random_numbers"] else []
        begin = f"{' and '.join(exact)} exact; " if exact else ""
        if on_purpose:
            _say(f"{begin}the losses are not compared, since this was changed: {', '.join(on_purpose)}")
        elif record is None:
            _say(f"{begin}the next step was not known")
            if not rounding:
                self._next = _NextStep(found.step, promised["identity"], known=None, rounding=[])
        elif redrawn:
            reasons = ", ".join(map(str, redrawn))
            _say(f"{begin}the losses are not compared, since dropout draws other numbers ({reasons})")
        else:
            self._next = _NextStep(found.step, promised["identity"], record["figures"], rounding)

    def _path(self, step: int) -> Path:
        return self._parts.settings.run_folder / "certificates" / f"step-{step:08d}.json"

    def _complain(self, place: Path, wrong: list[str]) -> None:
        text = (
            f"{place}: {'; '.join(wrong)}. A resume must do the step that the checkpoint promises. Find out what was "
            "changed, or let checkpoint.on_mismatch=warn go on."
        )
        if self._parts.settings.checkpoint.on_mismatch == "stop":
            raise RuntimeError(text)
        if distributed.is_main():
            _log.warning("%s", text)

    # ---- the next step

    def begin_step(self) -> None:
        """Let the step that begins have sums of its own, if it is the first after a save or a resume."""
        if self._next is None:
            return
        self._other_totals, self._parts.totals = self._parts.totals, StepTotals()
        self._generators = _hash_of(_torch_state())

    def end_step(self, step: int) -> None:
        """Write down or compare loss and gradient norm of the step that made `step`, if it is to be.

        Collective: world, at the first step after a save or a resume.

        Raises:
            RuntimeError: they differ from what was written down, and checkpoint.on_mismatch is stop; on every rank.
        """
        following, self._next = self._next, None
        if following is None:
            return
        own, self._parts.totals = self._parts.totals, self._other_totals
        self._parts.totals.merge(own)
        means = own.reduce()
        if not means:
            return  # the step was left out
        values = [*(means[term] for term in _TERMS), self._parts.engine.gradient_norm()]
        figures = dict(zip(_FIGURES, values, strict=True))
        random_numbers = distributed.any_rank(_hash_of(_torch_state()) != self._generators)
        if following.known is None:
            if distributed.is_main():
                record = {"identity": following.identity, "random_numbers": random_numbers, "figures": figures}
                self._write(following.step, record)
            return
        wrong, worst = distributed.broadcast_object(self._compare(following, figures))
        if wrong:
            self._complain(self._path(following.step), [f"step {step}: {text}" for text in wrong])
            return
        reasons = f" ({', '.join(map(str, following.rounding))})" if following.rounding else ""
        _say(f"within {worst:.0e}".replace("e-0", "e-") + reasons if worst else f"exact{reasons}")

    def _compare(self, following: _NextStep, figures: dict[str, float]) -> tuple[list[str], float]:
        """What is wrong, and the largest relative difference."""
        assert following.known is not None
        tolerance = _TOLERANCE[self._parts.settings.model.precision] if following.rounding else 0.0
        wrong, worst = [], 0.0
        for name, now in figures.items():
            was = following.known[name]
            difference = abs(now - was) / max(abs(was), _SMALLEST)
            if not difference <= tolerance:  # of NaN as well
                limit = f"at most {tolerance:g} of it is allowed" if tolerance else "nothing is allowed"
                wrong.append(f"{name} is {now!r} and was {was!r}, {difference:.1e} of it apart ({limit})")
            worst = max(worst, difference)
        return wrong, worst

    def _write(self, step: int, record: dict[str, Any]) -> None:
        """Replace the file of `step` and remove those of checkpoints that are gone. A full disk does not end a run."""
        path, committed = self._path(step), checkpoint.committed_steps(self._parts.settings.run_folder)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".tmp")
            with open(unfinished, "w", encoding="utf-8") as file:
                json.dump(record, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
            for other in path.parent.glob("step-*.json"):
                number = int(other.stem.removeprefix("step-"))
                if number not in committed and number < max(committed, default=0):
                    other.unlink()
        except OSError as error:
            _log.warning("%s: cannot be written: %s", path, error)


def _read(path: Path, identity: str) -> dict[str, Any] | None:
    """What was written down about the step after a checkpoint; None if nothing was, or about another checkpoint."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["identity"] != identity:
            return None
        figures = {name: float(record["figures"][name]) for name in _FIGURES}
        return {"figures": figures, "random_numbers": bool(record["random_numbers"])}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        _log.warning("%s: is damaged and not used: %r", path, error)
        return None


def _torch_state() -> dict[str, Tensor]:
    """The generators from which a model draws."""
    return {key: value for key, value in distributed.random_state().items() if key.startswith("torch")}


def _hash_of(state: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode() + state[key].numpy().tobytes())
    return digest.hexdigest()


def _say(text: str) -> None:
    if distributed.is_main():
        print(f"resume: {text}", flush=True)
