"""Numbers gone wrong: what a step's losses and gradients are looked at for, and what a run then does.

`examine` is the one look of each step, before its update. `FaultWatch` decides by the settings of `faults`, alike on
every rank, and carries what a resume needs to decide alike.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dispersion_pretrain import distributed
from dispersion_pretrain.config import FaultSettings
from dispersion_pretrain.objective import LossTerms, StepContext

_TERMS = ("the total loss", "cross-entropy", "distillation")
_LARGEST_SQUARE = torch.finfo(torch.float32).max  # of a gradient norm: DeepSpeed clips by its float32 square
_NAMED_PARAMETERS = 3
_DEVIATIONS = 1.4826  # of a normal distribution: standard deviation over median absolute deviation
_FLAT = 0.005  # deviations below this share of the loss (or below so many nats) count as that: a flat curve has none


class StepHealth(NamedTuple):
    """What the look at a step found, the same on every rank."""

    loss: float  # the step's objective: the mean over ranks and micro-steps
    broken: str = ""  # what is not finite, in words; empty when all is well
    stopping: bool = False  # some rank wishes to stop after this step


NUM_SUMS = len(_TERMS)  # besides one for each layer of the dispersion term


def add_sums(sums: Tensor, terms: LossTerms) -> None:
    """Add the losses of a micro-step that must be finite: those of `_TERMS`, then the dispersion of each layer.

    Args:
        sums: (NUM_SUMS + layers,) float64 on the device.
    """
    sums[:NUM_SUMS] += torch.stack([terms.total.detach(), terms.cross_entropy, terms.distillation])
    if terms.layer_dispersion.numel():
        sums[NUM_SUMS:] += terms.layer_dispersion


def examine(
    sums: Tensor,
    gradient_square: Tensor,
    context: StepContext,
    non_finite_gradients: Callable[[], list[str]],
    wants_stop: bool = False,
) -> StepHealth:
    """Look at the losses and gradients of a step before its update, and at who wishes to stop after it.

    Args:
        sums: what `add_sums` added up over the micro-steps.
        gradient_square: this rank's part of the square of the gradient norm.
        non_finite_gradients: names parameters; a collective, called on all ranks if losses are finite and gradients
            are not.
        wants_stop: whether this rank wishes to.

    Collective: world, one all-reduce. Waits for the device: the one time in a step that is not logged.
    """
    numbers = torch.cat([sums, gradient_square.to(sums.device).reshape(1)])
    wish = torch.full_like(numbers[:1], float(wants_stop))
    table = torch.cat([(~torch.isfinite(numbers)).double(), numbers[:1], numbers[-1:], wish])
    *not_finite, loss, square, wishes = distributed.all_reduce_sum(table.to(distributed.collective_device())).tolist()
    stopping = wishes > 0
    *of_losses, of_gradients = not_finite
    loss /= context.shares
    names = [name for name, count in zip(_TERMS, of_losses, strict=False) if count]
    if len(names) > 1:
        names = names[1:]  # the total is broken with each of its terms
    layers = [str(layer) for layer, count in zip(context.layers, of_losses[len(_TERMS) :], strict=False) if count]
    if layers:
        names = [name for name in names if name != _TERMS[0]]
        names.append(f"the dispersion of layer{'s' * (len(layers) > 1)} {', '.join(layers)}")
    if names:
        where = f"on {int(max(of_losses))} of {distributed.world_size()} ranks"
        broken = f"{' and '.join(names)} {'are' if len(names) > 1 else 'is'} not finite {where}"
        return StepHealth(loss, broken, stopping)
    if of_gradients or not square < _LARGEST_SQUARE:
        return StepHealth(loss, _describe_gradients(non_finite_gradients()), stopping)
    return StepHealth(loss, stopping=stopping)


def _describe_gradients(parameters: list[str]) -> str:
    if not parameters:
        return "the gradient norm is beyond float32, though every gradient is finite"
    more = len(parameters) - _NAMED_PARAMETERS
    others = f" and {more} other parameters" if more > 0 else ""
    return f"the losses are finite, but not the gradient of {', '.join(parameters[:_NAMED_PARAMETERS])}{others}"


class Verdict(NamedTuple):
    """What a run does after a step."""

    message: str = ""  # for the user, when something was wrong
    figures: dict[str, float] = {}  # for the metrics of the step
    skipped: bool = False
    rolls_back: bool = False


class PassedOver(NamedTuple):
    """Samples of the global order that a rollback left out."""

    step: int  # of the checkpoint that was gone back to
    first_sample: int
    last_sample: int


class FaultWatch:
    """Judges each step. What it carries is a part of every checkpoint, so that a resume judges alike.

    `data_offset_steps` is how far the data has run ahead of the steps: the 0-based step s reads the global batch
    s + data_offset_steps of the order.
    """

    def __init__(self, settings: FaultSettings, global_batch_sequences: int) -> None:
        self.settings = settings
        self.data_offset_steps = 0
        self.passed_over: list[PassedOver] = []
        self._samples = global_batch_sequences
        self._skips = self._skips_in_a_row = self._rollbacks = 0
        self._spiking = False
        self._losses: deque[float] = deque(maxlen=settings.spike_window_steps)

    def judge(self, step: int, health: StepHealth) -> Verdict:
        """Decide about the step with this 1-based number, whose update was left out if something is broken.

        The same on every rank, since `health` is. No collective.

        Raises:
            RuntimeError: the run is to end; says what was wrong and what to do.
        """
        policy = self.settings.non_finite
        if not health.broken:
            self._skips_in_a_row = 0
            return self._judge_loss(step, health.loss)
        message = f"step {step}: {health.broken}. No update was made."
        if policy == "rollback":
            return Verdict(message, rolls_back=True)
        if policy == "stop":
            raise RuntimeError(
                f"{message} Lower optimizer.learning_rate or lengthen schedule.warmup_tokens and start again: the "
                "newest checkpoint is untouched. faults.non_finite=skip or rollback goes on by itself."
            )
        self._skips += 1
        self._skips_in_a_row += 1
        if self._skips_in_a_row > self.settings.max_skips:
            raise RuntimeError(
                f"{message} It is number {self._skips_in_a_row} in a row, faults.max_skips is "
                f"{self.settings.max_skips}. Lower optimizer.learning_rate and start again: the newest checkpoint is "
                "untouched."
            )
        left = f"{self._skips_in_a_row} of at most {self.settings.max_skips} in a row"
        return Verdict(f"{message} The run goes on ({left}).", {"faults/skipped": self._skips}, skipped=True)

    def _judge_loss(self, step: int, loss: float) -> Verdict:
        if self.settings.spike == "off":
            return Verdict()
        score = spike_score(self._losses, self.settings.spike_window_steps, loss)
        again, self._spiking = self._spiking, score >= self.settings.spike_score
        median = statistics.median(self._losses) if self._spiking else math.nan
        if self._spiking and self.settings.spike == "rollback":
            return Verdict(self._describe_spike(step, loss, score, median), rolls_back=True)
        self._losses.append(loss)
        if not self._spiking or again:  # one message for each rise
            return Verdict()
        return Verdict(self._describe_spike(step, loss, score, median), {"faults/spike_score": score})

    def _describe_spike(self, step: int, loss: float, score: float, median: float) -> str:
        return (
            f"step {step}: the loss rose to {loss:.4g}, {score:.1f} robust standard deviations above {median:.4g}, the "
            f"median of the last {len(self._losses)} steps (faults.spike_score: {self.settings.spike_score:g})."
        )

    def expect_jump(self) -> None:
        """Forget the losses so far: the next ones are of changed weights (forgetting), and no spike beside them."""
        self._losses.clear()

    def refuse_more_rollbacks(self, message: str) -> None:
        """Raise if the run has gone back as often as it may.

        Raises:
            RuntimeError: it has; opened by `message`.
        """
        if self._rollbacks >= self.settings.max_rollbacks:
            raise RuntimeError(
                f"{message} The run has gone back {self._rollbacks} times, faults.max_rollbacks is "
                f"{self.settings.max_rollbacks}. Lower optimizer.learning_rate and start again: the newest checkpoint "
                "is untouched."
            )

    def go_back(self, step: int, saved_step: int, saved: dict[str, Any] | None) -> Verdict:
        """Take up the state that was saved after `saved_step` steps, and pass over all samples since, up to `step`'s.

        Args:
            step: 1-based number of the step that went wrong.
        """
        next_batch, rollbacks = step + self.data_offset_steps, self._rollbacks + 1
        self.restore(saved)
        first = (saved_step + self.data_offset_steps) * self._samples
        passed = PassedOver(saved_step, first, next_batch * self._samples - 1)
        self.data_offset_steps = next_batch - saved_step
        self.passed_over.append(passed)
        self._rollbacks = rollbacks
        message = (
            f"went back to step {saved_step} and passed over samples {passed.first_sample:,} to "
            f"{passed.last_sample:,} (rollback {rollbacks} of at most {self.settings.max_rollbacks})"
        )
        return Verdict(
            message,
            {
                "faults/rollbacks": rollbacks,
                "faults/passed_over_first_sample": passed.first_sample,
                "faults/passed_over_last_sample": passed.last_sample,
            },
        )

    def state(self) -> dict[str, Any]:
        """All that later decisions depend on, as JSON; the same on every rank."""
        return {
            "data_offset_steps": self.data_offset_steps,
            "passed_over": [list(passed) for passed in self.passed_over],
            "skips": self._skips,
            "skips_in_a_row": self._skips_in_a_row,
            "rollbacks": self._rollbacks,
            "spiking": self._spiking,
            "losses": list(self._losses),
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Take up what `state` returned; None: nothing has happened yet."""
        state = state or {}
        self.data_offset_steps = state.get("data_offset_steps", 0)
        self.passed_over = [PassedOver(*passed) for passed in state.get("passed_over", [])]
        self._skips = state.get("skips", 0)
        self._skips_in_a_row = state.get("skips_in_a_row", 0)
        self._rollbacks = state.get("rollbacks", 0)
        self._spiking = state.get("spiking", False)
        self._losses = deque(state.get("losses", []), maxlen=self.settings.spike_window_steps)


def spike_score(window: deque[float], full_steps: int, loss: float) -> float:
    """How many robust standard deviations `loss` lies above the median of the losses before it.

    The deviation is 1.4826 times the median absolute one, and at least 0.5 % of the loss (or 0.005 nats): a flat curve
    has none of its own. 0 while fewer than half of `full_steps` losses are known.
    """
    if len(window) < full_steps / 2:
        return 0.0
    median = statistics.median(window)
    deviation = _DEVIATIONS * statistics.median(abs(value - median) for value in window)
    return (loss - median) / max(deviation, _FLAT * max(1.0, abs(median)))
