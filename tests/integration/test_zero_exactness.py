"""The whole train step through DeepSpeed against one process without it: loss, gradients and update."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from dispersion_pretrain import distributed
from dispersion_pretrain.config import Settings
from dispersion_pretrain.data import Batch
from dispersion_pretrain.doctor import GradientWatch
from dispersion_pretrain.engine import DeepSpeedEngine, start_distributed
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.metrics import StepTotals
from dispersion_pretrain.model import build_model, model_config
from dispersion_pretrain.objective import DispersionTerm, StepContext, TrainingModule
from dispersion_pretrain.optim import parameter_groups
from dispersion_pretrain.settings_file import parse_settings
from dispersion_pretrain.train import train_step
from small_engine import deal
from spawn import run_ranks

SEQUENCES, LENGTH, VOCABULARY, STEPS = 16, 32, 101, 3
COEFFICIENT = 3.0  # large: the dispersion term weighs as much as cross-entropy in the gradient


def settings_for(stage: int, accumulation: int, world_size: int) -> Settings:
    model = {"model_type": "gpt2", "n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": LENGTH}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    tree = {
        "model": {"config": {**model, **no_dropout}},
        "data": {"corpus": "none", "sequence_length": LENGTH},
        "training": {
            "global_batch_tokens": SEQUENCES * LENGTH,
            "max_tokens": STEPS * SEQUENCES * LENGTH,
            "micro_batch": SEQUENCES // world_size // accumulation,
        },
        "optimizer": {"learning_rate": 1e-3, "gradient_clipping": 0.5},
        "dispersion": {
            "coefficient": COEFFICIENT,
            "pool_sequences": 4,
            "tokens_per_sequence": 8,
            "gradient_ratio_cap": 1.0,
        },
        "zero": {"stage": stage},
    }
    return parse_settings(tree, "test")


def build_module(settings: Settings, layout: BatchLayout) -> TrainingModule:
    assert settings.dispersion is not None
    distributed.seed_everything(0)
    config = model_config(settings.model, vocabulary=VOCABULARY, sequence_length=LENGTH)
    term = DispersionTerm(
        settings.dispersion,
        layers=[1, 2, 3],
        seed=0,
        pools_per_rank=layout.pools_per_rank,
        pool_group=distributed.pool_groups(layout.pool_ranks),
    )
    return TrainingModule(build_model(settings.model, config), term)


def micro_batches(step: int, layout: BatchLayout, rank: int) -> list[Batch]:
    return deal(step, layout, rank, sequences=SEQUENCES, length=LENGTH, vocabulary=VOCABULARY)


def context_for(step: int, layout: BatchLayout) -> StepContext:
    shares = layout.world_size * layout.accumulation
    return StepContext(step, SEQUENCES * (LENGTH - 1), shares, COEFFICIENT, layers=(1, 2, 3))


def reference() -> dict[str, Any]:
    """One process, plain torch: the whole global batch in one micro-batch."""
    settings = settings_for(0, 1, 1)
    layout = BatchLayout.derive(settings, 1)
    module = build_module(settings, layout)
    optimizer = torch.optim.AdamW(parameter_groups(module, settings.optimizer), lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses, norms, ratios, gradients = [], [], [], {}
    for step in range(STEPS):
        (batch,) = micro_batches(step, layout, 0)
        terms = module(batch.input_ids, batch.sample_index, context_for(step, layout))
        terms.total.backward()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
        norms.append(float(torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)))
        losses.append((float(terms.cross_entropy), float(terms.dispersion)))
        ratios.append(ratio_of(module))
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "norms": norms, "ratios": ratios, "gradients": gradients}


def ratio_of(module: torch.nn.Module) -> float:
    """Of the gradients of the two terms at the last hidden state in the step that ends."""
    cap = cast(DispersionTerm, module.get_submodule("dispersion")).cap
    assert cap is not None
    cap.end_step(COEFFICIENT)
    return cap.ratio


def through_deepspeed(stages: list[int], accumulations: list[int]) -> dict[tuple[int, int], dict[str, Any]]:
    """Every combination in one pair of processes: starting them takes longer than the steps."""
    device = start_distributed()
    found = {}
    for stage in stages:
        for accumulation in accumulations:
            settings = settings_for(stage, accumulation, distributed.world_size())
            layout = BatchLayout.derive(settings, distributed.world_size())
            assert layout.accumulation == accumulation
            engine = GradientWatch(DeepSpeedEngine(build_module(settings, layout), settings, layout))
            losses, norms, ratios, totals = [], [], [], StepTotals()
            gradients: dict[str, Tensor] = {}
            for step in range(STEPS):
                batches = iter(micro_batches(step, layout, distributed.rank()))
                train_step(engine, batches, context_for(step, layout), totals, device)
                means = totals.reduce()
                losses.append((means["cross_entropy"], means["dispersion"]))
                norms.append(engine.engine.gradient_norm())
                ratios.append(ratio_of(engine.engine.module))
                gradients = gradients or engine.gradients
            found[stage, accumulation] = {"losses": losses, "norms": norms, "ratios": ratios, "gradients": gradients}
    return found


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return reference()


@pytest.fixture(scope="module")
def found_by_rank() -> list[dict[tuple[int, int], dict[str, Any]]]:
    return run_ranks(through_deepspeed, 2, [0, 1, 2, 3], [1, 4], timeout_s=280)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_train_step_equals_one_process(
    stage: int, accumulation: int, expected: dict[str, Any], found_by_rank: list[dict[tuple[int, int], dict[str, Any]]]
) -> None:
    for rank, all_found in enumerate(found_by_rank):
        found = all_found[stage, accumulation]
        assert found["gradients"].keys() == expected["gradients"].keys()
        together = torch.cat([found["gradients"][name].flatten() for name in expected["gradients"]])
        wanted = torch.cat([gradient.flatten() for gradient in expected["gradients"].values()])
        assert relative(together, wanted) < 1e-5, f"rank {rank}: gradient length {together.norm() / wanted.norm():.4f}"
        torch.testing.assert_close(
            torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=1e-5, atol=1e-6
        )
        for key in ("norms", "ratios"):
            torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(expected[key]), rtol=1e-5, atol=0)
