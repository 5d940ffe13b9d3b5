"""Parameter groups, and learning rates at the boundaries of schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dispersion_pretrain.config import DispersionSettings, ModelSettings, OptimizerSettings, ScheduleSettings
from dispersion_pretrain.model import build_model, model_config
from dispersion_pretrain.optim import dispersion_coefficient, learning_rate, parameter_groups

PEAK, STEP, TOTAL = 2.0, 10, 1000


def rate(tokens: int, **schedule: Any) -> float:
    """Rate of the step that follows `tokens` tokens."""
    return learning_rate(tokens, peak=PEAK, schedule=ScheduleSettings(**schedule), max_tokens=TOTAL, step_tokens=STEP)


def curve(**schedule: Any) -> list[float]:
    return [rate(tokens, **schedule) for tokens in range(0, TOTAL, STEP)]


class TestGroups:
    def names(self, model: nn.Module, weight_decay: float = 0.1) -> dict[float, set[str]]:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = parameter_groups(model, OptimizerSettings(weight_decay=weight_decay))
        return {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in groups}  # type: ignore

    @pytest.mark.parametrize("fields", [
        {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2},
        {"model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "head_dim": 4,
         "num_attention_heads": 2, "num_key_value_heads": 1},
    ], ids=lambda fields: fields["model_type"])  # fmt: skip
    def test_matrices_decay_and_vectors_do_not(self, fields: dict[str, Any]) -> None:
        settings = ModelSettings(config=fields)
        model = build_model(settings, model_config(settings, vocabulary=11, sequence_length=8))
        groups = self.names(model)
        assert groups.keys() == {0.1, 0.0}
        assert not groups[0.1] & groups[0.0]
        assert groups[0.1] | groups[0.0] == {name for name, _ in model.named_parameters()}
        without = {name for name, _ in model.named_parameters() if "norm" in name or "ln_" in name or "bias" in name}
        assert groups[0.0] == without

    def test_each_parameter_once_though_tied(self) -> None:
        model = nn.ModuleDict({"a": nn.Embedding(5, 3), "b": nn.Linear(3, 5, bias=False)})
        model["b"].weight = model["a"].weight
        groups = parameter_groups(model, OptimizerSettings())
        assert [len(group["params"]) for group in groups] == [1]  # type: ignore[arg-type]

    def test_frozen_parameters_and_empty_groups_are_left_out(self) -> None:
        model = nn.Linear(3, 4)
        model.bias.requires_grad = False
        assert self.names(model) == {0.1: {"weight"}}
        torch.optim.AdamW(parameter_groups(model, OptimizerSettings()))

    def test_a_partitioned_parameter_counts_by_its_whole_shape(self) -> None:
        model = nn.Linear(3, 4)
        for parameter, shape in ((model.weight, (4, 3)), (model.bias, (4,))):
            parameter.ds_shape = shape  # type: ignore[attr-defined]
            parameter.data = torch.empty(0)  # as ZeRO-3 leaves it between uses
        assert self.names(model) == {0.1: {"weight"}, 0.0: {"bias"}}


class TestSchedules:
    @pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "warmup_stable_decay"])
    def test_warm_up_is_linear_and_starts_above_zero(self, kind: str) -> None:
        options = {"kind": kind, "warmup_tokens": 200, "decay_tokens": 100}
        assert rate(0, **options) == pytest.approx(PEAK * STEP / 200)
        assert rate(90, **options) == pytest.approx(PEAK / 2)
        assert rate(180, **options) < PEAK
        assert rate(190, **options) == pytest.approx(PEAK), "the step that ends at warmup_tokens"
        differences = {round(b - a, 9) for a, b in zip(curve(**options)[:19], curve(**options)[1:20], strict=True)}
        assert len(differences) == 1

    def test_a_warm_up_shorter_than_a_step(self) -> None:
        assert rate(0, kind="constant", warmup_tokens=3) == PEAK

    @pytest.mark.parametrize("kind", ["cosine", "linear", "warmup_stable_decay"])
    @pytest.mark.parametrize("final_ratio", [0.0, 0.1, 1.0])
    def test_the_last_step_has_the_final_ratio_and_nothing_lies_below(self, kind: str, final_ratio: float) -> None:
        options = {"kind": kind, "final_ratio": final_ratio, "warmup_tokens": 100, "decay_tokens": 300}
        assert rate(TOTAL - STEP, **options) == pytest.approx(PEAK * final_ratio)
        assert rate(TOTAL, **options) == pytest.approx(PEAK * final_ratio), "a budget that ends inside a step"
        after_warm_up = curve(**options)[9:]
        assert after_warm_up == sorted(after_warm_up, reverse=True)
        assert max(after_warm_up) == pytest.approx(PEAK)

    def test_half_way(self) -> None:
        half = 200 + (TOTAL - 200) // 2 - STEP
        for kind in ("cosine", "linear"):
            assert rate(half, kind=kind, warmup_tokens=200, final_ratio=0.1) == pytest.approx(PEAK * 0.55)
        quarter = 200 + (TOTAL - 200) // 4 - STEP
        cosine = 0.1 + 0.9 * 0.5 * (1 + 2**-0.5)
        assert rate(quarter, kind="cosine", warmup_tokens=200, final_ratio=0.1) == pytest.approx(PEAK * cosine)
        assert rate(quarter, kind="linear", warmup_tokens=200, final_ratio=0.1) == pytest.approx(
            PEAK * (0.1 + 0.9 * 0.75)
        )

    def test_constant_stays(self) -> None:
        assert set(curve(kind="constant")) == {PEAK}

    def test_stable_until_the_decay(self) -> None:
        options = {"kind": "warmup_stable_decay", "warmup_tokens": 100, "decay_tokens": 200, "final_ratio": 0.0}
        rates = curve(**options)
        assert set(rates[9:80]) == {PEAK}  # the last of them ends where the decay begins
        assert rates[80] == pytest.approx(PEAK * (1 - STEP / 200))
        assert rates[89] == pytest.approx(PEAK / 2)

    @given(
        kind=st.sampled_from(["cosine", "linear", "constant", "warmup_stable_decay"]),
        warmup=st.integers(0, 1000),
        decay=st.integers(1, 1000),
        final_ratio=st.floats(0, 1),
        step_tokens=st.integers(1, 2000),
        step=st.integers(0, 2000),
    )
    def test_always_above_zero_or_final_and_at_most_the_peak(
        self, kind: str, warmup: int, decay: int, final_ratio: float, step_tokens: int, step: int
    ) -> None:
        schedule = ScheduleSettings(kind=kind, warmup_tokens=warmup, decay_tokens=decay, final_ratio=final_ratio)
        value = learning_rate(
            step * step_tokens, peak=PEAK, schedule=schedule, max_tokens=1000, step_tokens=step_tokens
        )
        assert 0 <= value <= PEAK * (1 + 1e-12)
        if step * step_tokens + step_tokens >= warmup:
            assert value >= PEAK * final_ratio * (1 - 1e-12)
        else:
            assert value > 0


class TestDispersionCoefficient:
    @staticmethod
    def curve(**settings: Any) -> list[float]:
        """Of ten steps of 10 tokens."""
        term = DispersionSettings(coefficient=2.0, **settings)
        return [
            dispersion_coefficient(tokens, settings=term, max_tokens=100, step_tokens=10)
            for tokens in range(0, 100, 10)
        ]

    def test_constant_by_default(self) -> None:
        assert self.curve() == [2.0] * 10

    def test_warm_up_is_linear_and_ends_at_the_peak(self) -> None:
        assert self.curve(warmup_tokens=40) == pytest.approx([0.5, 1.0, 1.5, *[2.0] * 7])

    def test_decay_is_linear_over_the_last_tokens_and_never_zero(self) -> None:
        assert self.curve(decay_tokens=40) == pytest.approx([*[2.0] * 7, 1.5, 1.0, 0.5])
        assert self.curve(decay_tokens=20, final_ratio=0.5) == pytest.approx([*[2.0] * 9, 1.5])

    def test_both(self) -> None:
        assert self.curve(warmup_tokens=20, decay_tokens=80)[:4] == pytest.approx([1.0, 2.0, 2.0, 1.75])

    def test_zero_stays_zero(self) -> None:
        term = DispersionSettings(coefficient=0.0, warmup_tokens=10)
        assert dispersion_coefficient(0, settings=term, max_tokens=100, step_tokens=10) == 0.0
