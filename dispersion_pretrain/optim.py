"""Parameter groups and schedules, in tokens."""

from __future__ import annotations

import math

from torch import nn

from dispersion_pretrain.config import DispersionSettings, OptimizerSettings, ScheduleSettings


def parameter_groups(module: nn.Module, settings: OptimizerSettings) -> list[dict[str, object]]:
    """Trainable parameters in two groups: matrices with weight decay; biases, norms and other vectors without.

    Decided by the number of dimensions (`ds_shape` where ZeRO-3 has partitioned the parameter). Embeddings decay, as
    GPT-2 and its successors do.
    """
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (matrices if len(shape) >= 2 else vectors).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def learning_rate(tokens: int, *, peak: float, schedule: ScheduleSettings, max_tokens: int, step_tokens: int) -> float:
    """Learning rate of the optimizer step that follows `tokens` seen tokens.

    Warm-up is linear and reaches the peak at `warmup_tokens`; its first step is not 0. Then: constant; cosine or linear
    down to `final_ratio` x peak at `max_tokens`; or the peak until the last `decay_tokens`, then linear down.
    """
    position = tokens + step_tokens  # the step is named after its end, so that no step has rate 0
    if schedule.warmup_tokens and position < schedule.warmup_tokens:
        return peak * position / schedule.warmup_tokens
    if schedule.kind == "constant":
        return peak
    start = schedule.warmup_tokens
    if schedule.kind == "warmup_stable_decay":
        start = max_tokens - schedule.decay_tokens
    progress = min(1.0, max(0.0, (position - start) / max(1, max_tokens - start)))
    shape = 0.5 * (1 + math.cos(math.pi * progress)) if schedule.kind == "cosine" else 1 - progress
    return peak * (schedule.final_ratio + (1 - schedule.final_ratio) * shape)


def dispersion_coefficient(tokens: int, *, settings: DispersionSettings, max_tokens: int, step_tokens: int) -> float:
    """Coefficient lambda of the optimizer step that follows `tokens` seen tokens.

    Linear warm-up over `warmup_tokens`, constant, and linear down to `final_ratio` x peak over the last `decay_tokens`.
    The warm-up is named after the step's end and the decay after its beginning, so that no step has 0: the term's
    statistics are never missing.
    """
    risen = min(1.0, (tokens + step_tokens) / settings.warmup_tokens) if settings.warmup_tokens else 1.0
    fallen = 0.0
    if settings.decay_tokens:
        fallen = min(1.0, max(0.0, (tokens - (max_tokens - settings.decay_tokens)) / settings.decay_tokens))
    return settings.coefficient * risen * (1.0 - fallen * (1.0 - settings.final_ratio))
