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

    def skip_step(self) -> None:
        self.module.zero_grad()

    def gradient_accumulation_steps(self) -> int:
        return MICRO_STEPS

    def gradient_square(self) -> Tensor:
        """Of this rank's own sum: not the averaged gradient's, but as finite as that."""
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).double().square()

    def non_finite_gradients(self) -> list[str]:
        return [f"{name} of rank {dist.get_rank()}" for name, _ in self.module.named_parameters()]


class Slope(nn.Module):
    """loss = weight x mean of the input, so its gradient is that mean."""

    def __init__(self, poison: dict[str, Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.poison = poison  # fields of the terms of the poisoned sample

    def forward(self, input_ids: Tensor, sample_index: Tensor, context: StepContext) -> LossTerms:
        loss = self.weight * input_ids.float().mean()
        vector = torch.arange(2.0)
        terms = LossTerms(
            total=loss,
            cross_entropy=loss.detach(),
            dispersion=torch.tensor(0.5),
            layer_dispersion=torch.ones(2),
            mean_cosine=vector,
            clamped_share=vector * 2,
            distillation=torch.tensor(0.25),
        )
        if int(sample_index[0]) == int(context.targets):
            poison = dict(self.poison)
            if "gradient" in poison:
                loss.register_hook(lambda gradient, factor=self.poison["gradient"]: gradient * factor)
                del poison["gradient"]
            if "total" in poison:
                terms = terms._replace(total=loss * poison.pop("total"))
            terms = terms._replace(**{name: torch.tensor(value) for name, value in poison.items()})
        return terms


NAN, INF = math.nan, math.inf


def step_on_rank(poisoned: int, poison: dict[str, Any]) -> dict[str, Any]:
    rank = dist.get_rank()
    engine, totals = PlainEngine(Slope(poison)), StepTotals()
    batches = [
        Batch(
            torch.full((1, 4), 10 * rank + k), torch.tensor([MICRO_STEPS * rank + k]), torch.ones(1, dtype=torch.bool)
        )
        for k in range(MICRO_STEPS)
    ]
    context = StepContext(7, poisoned, 6, 0.0, layers=(3, 8))
    health = train_step(engine, iter(batches), context, totals, torch.device("cpu"))
    return {
        "weight": engine.module.get_parameter("weight").item(),
        "updates": engine.updates,
        "health": health,
        "means": totals.reduce(),
        "left": [p.grad for p in engine.module.parameters()],
    }


# What is broken in one sample, and how it is named.
BROKEN: list[tuple[int, dict[str, Any], str]] = [
    (0, {"cross_entropy": NAN}, "cross-entropy is not finite on 1 of 2 ranks"),
    (4, {"cross_entropy": INF}, "cross-entropy is not finite on 1 of 2 ranks"),
    (4, {"distillation": INF}, "distillation is not finite on 1 of 2 ranks"),
    (4, {"layer_dispersion": [NAN, 1.0]}, "the dispersion of layer 3 is not finite on 1 of 2 ranks"),
    (2, {"layer_dispersion": [INF, NAN]}, "the dispersion of layers 3, 8 is not finite on 1 of 2 ranks"),
    (2, {"cross_entropy": NAN, "layer_dispersion": [1.0, -INF]}, "cross-entropy and the dispersion of layer 8 are not"),
    (1, {"total": INF}, "the total loss is not finite on 1 of 2 ranks"),
    (1, {"total": NAN, "distillation": NAN}, "distillation is not finite on 1 of 2 ranks"),
    (0, {"gradient": NAN}, "the losses are finite, but not the gradient of weight of rank"),
    (5, {"gradient": INF}, "the losses are finite, but not the gradient of weight of rank"),
    (3, {"gradient": 1e30}, "the losses are finite, but not the gradient of weight of rank"),
]


def steps_on_rank() -> list[dict[str, Any]]:
    """A healthy step and all broken ones in one pair of processes: starting them takes longer."""
    return [step_on_rank(-1, {}), *(step_on_rank(sample, poison) for sample, poison, _ in BROKEN)]


@pytest.fixture(scope="module")
def results() -> list[list[dict[str, Any]]]:
    return run_ranks(steps_on_rank, 2)


def test_one_update_with_the_mean_over_ranks_and_micro_steps(results: list[list[dict[str, Any]]]) -> None:
    for result, *_ in results:
        mean = (0 + 1 + 2 + 10 + 11 + 12) / 6
        assert result["updates"] == 1 and result["health"].broken == ""
        assert result["health"].loss == pytest.approx(2 * mean)
        assert result["weight"] == pytest.approx(2 - RATE * mean)
        assert result["means"]["total"] == result["means"]["cross_entropy"] == pytest.approx(2 * mean)
        assert (result["means"]["dispersion"], result["means"]["distillation"]) == (0.5, 0.25)
        assert (result["means"]["cosine/1"], result["means"]["clamped/1"]) == (1.0, 2.0)


@pytest.mark.parametrize("number", range(len(BROKEN)), ids=[named for _, _, named in BROKEN])
def test_what_is_not_finite_on_one_rank_keeps_all_from_the_update(
    results: list[list[dict[str, Any]]], number: int
) -> None:
    for of_rank in results:
        result = of_rank[1 + number]
        assert result["updates"] == 0 and result["weight"] == 2.0
        assert result["health"].broken.startswith(BROKEN[number][2])
        assert result["means"] == {}, "the step does not enter the averages of the log"
        assert result["left"] == [None]
