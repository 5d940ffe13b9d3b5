"""The train step on two processes with a plain engine, no DeepSpeed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dispersion_pretrain.data import Batch
from dispersion_pretrain.metrics import StepTotals
from dispersion_pretrain.objective import LossTerms, StepContext
from dispersion_pretrain.train import train_step
from spawn import run_ranks

MICRO_STEPS, RATE = 3, 0.1


class PlainEngine:
    """Averages gradients over ranks and accumulation, then descends: all that the train step needs of an engine."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.micro_step, self.updates = module, 0, 0

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def backward(self, loss: Tensor) -> None:
        (loss / MICRO_STEPS).backward()

    def step(self) -> None:
        self.micro_step += 1
        if self.micro_step % MICRO_STEPS == 0:
            for parameter in self.module.parameters():
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                parameter.data -= RATE * parameter.grad / dist.get_world_size()
                parameter.grad = None
            self.updates += 1

    def gradient_accumulation_steps(self) -> int:
        return MICRO_STEPS


class Slope(nn.Module):
    """loss = weight x mean of the input, so its gradient is that mean."""

    def __init__(self, poison: tuple[float, float, float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.poison = poison  # factors of cross-entropy and of the dispersion of two layers

    def forward(self, input_ids: Tensor, sample_index: Tensor, context: StepContext) -> LossTerms:
        loss = self.weight * input_ids.float().mean()
        vector, by_layer = torch.arange(2.0), torch.ones(2)
        if int(sample_index[0]) == int(context.targets):  # the poisoned sample
            loss, by_layer = loss * self.poison[0], by_layer * torch.tensor(self.poison[1:])
        return LossTerms(loss, loss.detach(), torch.tensor(0.5), by_layer, vector, vector * 2)


def step_on_rank(poisoned: int, poison: tuple[float, float, float] = (math.nan, 1.0, 1.0)) -> dict[str, Any]:
    rank = dist.get_rank()
    engine, totals = PlainEngine(Slope(poison)), StepTotals()
    batches = [
        Batch(
            torch.full((1, 4), 10 * rank + k), torch.tensor([MICRO_STEPS * rank + k]), torch.ones(1, dtype=torch.bool)
        )
        for k in range(MICRO_STEPS)
    ]
    error = ""
    try:
        train_step(engine, iter(batches), StepContext(7, poisoned, 6, 0.0, layers=(3, 8)), totals, torch.device("cpu"))
    except RuntimeError as failure:
        error = str(failure)
    return {
        "weight": engine.module.get_parameter("weight").item(),
        "updates": engine.updates,
        "error": error,
        "means": totals.reduce(),
    }


def test_one_update_with_the_mean_over_ranks_and_micro_steps() -> None:
    for result in run_ranks(step_on_rank, 2, -1):
        mean = (0 + 1 + 2 + 10 + 11 + 12) / 6
        assert result["updates"] == 1 and result["error"] == ""
        assert result["weight"] == pytest.approx(2 - RATE * mean)
        assert result["means"]["cross_entropy"] == pytest.approx(2 * mean)
        assert result["means"]["dispersion"] == 0.5
        assert (result["means"]["cosine/1"], result["means"]["clamped/1"]) == (1.0, 2.0)


@pytest.mark.parametrize("poisoned", [0, 4])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_before_the_update(poisoned: int) -> None:
    for result in run_ranks(step_on_rank, 2, poisoned):
        assert result["updates"] == 0 and result["weight"] == 2.0
        assert "step 7: cross-entropy is not finite on 1 of 2 ranks" in result["error"]


@pytest.mark.parametrize(
    ("poison", "named"),
    [
        ((1.0, math.nan, 1.0), "the dispersion of layer 3 is not finite on 1 of 2 ranks"),
        ((1.0, math.inf, math.nan), "the dispersion of layers 3, 8 is not finite"),
        ((math.nan, 1.0, -math.inf), "cross-entropy and the dispersion of layer 8 is not finite"),
    ],
)
def test_the_layer_that_is_not_finite_is_named_on_all_ranks(poison: tuple[float, float, float], named: str) -> None:
    for result in run_ranks(step_on_rank, 2, 4, poison):
        assert result["updates"] == 0 and named in result["error"]
