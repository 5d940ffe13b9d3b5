"""The invariance contract: losses and gradient of a step do not depend on how it lies on ranks and micro-steps."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dispersion_pretrain.config import Settings
from dispersion_pretrain.distributed import pool_groups
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.model import build_model, model_config
from dispersion_pretrain.objective import (
    DispersionTerm,
    LossTerms,
    StepContext,
    TrainingModule,
    sample_positions,
)
from dispersion_pretrain.settings_file import parse_settings
from numerics.communication import Communication
from numerics.plain_dispersion import plain_dispersion_loss
from spawn import run_ranks

SEQUENCES, LENGTH, VOCABULARY, POOL, STEP, SEED = 8, 24, 61, 4, 7, 11
FIRST_SAMPLE = 7 * SEQUENCES
COEFFICIENT = 6.0  # so large that an error of the term is an error of the whole gradient

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "n_layer": 3, "n_embd": 32, "n_head": 2, "n_positions": 32,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2,
    },
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
    },
}  # fmt: skip

# ranks, micro-batch, accumulation. A pool is one rank's micro-batch, two ranks', four ranks', or half a micro-batch.
LAYOUTS = [(1, 4, 2), (1, 8, 1), (2, 4, 1), (2, 2, 2), (4, 2, 1), (4, 1, 2)]
# model, recompute of activations
VARIANTS = [("gpt2", False), ("gpt2", True), ("qwen3", False), ("qwen3", True)]


def settings_of(model: str, *, recompute: bool = False, micro_batch: int | None = None) -> Settings:
    tree = {
        "model": {"config": MODELS[model], "activation_checkpointing": recompute},
        "data": {"corpus": "unused", "sequence_length": LENGTH},
        "training": {
            "global_batch_tokens": SEQUENCES * LENGTH, "max_tokens": SEQUENCES * LENGTH, "micro_batch": micro_batch,
        },
        "dispersion": {
            "coefficient": COEFFICIENT, "pool_sequences": POOL, "tokens_per_sequence": 10, "gradient_ratio_cap": 0.5,
        },
        "run": {"seed": SEED},
    }  # fmt: skip
    return parse_settings(tree, source="test")


def build(settings: Settings) -> torch.nn.Module:
    torch.manual_seed(3)
    config = model_config(settings.model, vocabulary=VOCABULARY, sequence_length=LENGTH)
    return build_model(settings.model, config).train()


def global_batch() -> Tensor:
    return torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH), generator=torch.Generator().manual_seed(0))


def module_of(settings: Settings, layout: BatchLayout, group: dist.ProcessGroup | None) -> TrainingModule:
    assert settings.dispersion is not None
    term = DispersionTerm(
        settings.dispersion, layers=[1, 2, 3], seed=SEED, pools_per_rank=layout.pools_per_rank, pool_group=group
    )
    return TrainingModule(build(settings), term)


def micro_step(module: TrainingModule, layout: BatchLayout, index: int) -> LossTerms:
    first = (index * layout.world_size + dist.get_rank()) * layout.micro_batch
    rows = torch.arange(first, first + layout.micro_batch)
    context = StepContext(
        step=STEP,
        targets=SEQUENCES * (LENGTH - 1),
        shares=layout.world_size * layout.accumulation,
        coefficient=COEFFICIENT,
    )
    terms = module(global_batch()[rows], FIRST_SAMPLE + rows, context)
    assert isinstance(terms, LossTerms)
    return terms


def step_on_rank(model: str, recompute: bool, micro_batch: int, groups: dict[int, Any]) -> dict[str, Tensor]:
    """One step as an engine does it: mean over micro-steps and ranks of gradients and of all terms."""
    settings = settings_of(model, recompute=recompute, micro_batch=micro_batch)
    layout = BatchLayout.derive(settings, dist.get_world_size())
    if layout.pool_ranks not in groups:
        groups[layout.pool_ranks] = pool_groups(layout.pool_ranks)
    module = module_of(settings, layout, groups[layout.pool_ranks])
    names = [f"loss/{name}" for name in LossTerms._fields]
    sums: dict[str, Tensor] = {}
    for index in range(layout.accumulation):
        terms = micro_step(module, layout, index)
        (terms.total / layout.accumulation).backward()
        for name, value in zip(names, terms, strict=True):
            sums[name] = sums.get(name, 0.0) + value.detach() / layout.accumulation
    assert module.dispersion is not None and module.dispersion.cap is not None
    module.dispersion.cap.end_step(COEFFICIENT)
    sums["ratio"] = torch.tensor(module.dispersion.cap.ratio)
    sums |= {
        f"gradient/{name}": parameter.grad
        for name, parameter in module.model.named_parameters()
        if parameter.grad is not None
    }
    for value in sums.values():
        dist.all_reduce(value)
        value /= layout.world_size
    return sums


def all_steps_on_rank() -> dict[tuple[str, bool, int], dict[str, Tensor]]:
    groups: dict[int, Any] = {}
    return {
        (model, recompute, micro_batch): step_on_rank(model, recompute, micro_batch, groups)
        for ranks, micro_batch, _ in LAYOUTS
        if ranks == dist.get_world_size()
        for model, recompute in VARIANTS
    }


@functools.cache
def results_of(num_ranks: int) -> dict[tuple[str, bool, int], dict[str, Tensor]]:
    return run_ranks(all_steps_on_rank, num_ranks)[0]


@functools.cache
def expected_of(model: str) -> dict[str, Tensor]:
    """The objective written naively: transformers' own loss and plain autograd, in one process, at once."""
    network = build(settings_of(model))
    ids = global_batch()
    outputs = network(input_ids=ids, labels=ids, output_hidden_states=True)
    samples = torch.arange(FIRST_SAMPLE, FIRST_SAMPLE + SEQUENCES)
    layers = torch.arange(1, 4)
    positions = sample_positions(SEED, STEP, samples, layers, num_tokens=10, sequence_length=LENGTH)
    losses = []
    for layer in (1, 2, 3):
        rows = torch.arange(SEQUENCES)[:, None]
        drawn = outputs.hidden_states[layer][rows, positions[layer - 1]]
        losses.append(plain_dispersion_loss(drawn.reshape(SEQUENCES // POOL, -1, drawn.shape[-1])).mean())
    dispersion = torch.stack(losses).mean()
    total = outputs.loss + COEFFICIENT * dispersion
    parameters = dict(network.named_parameters())
    gradients = torch.autograd.grad(total, list(parameters.values()), retain_graph=True)
    of_dispersion = torch.autograd.grad(dispersion, list(parameters.values()), allow_unused=True)
    share = sum(g.norm() ** 2 for g in of_dispersion if g is not None) ** 0.5 * COEFFICIENT
    assert share > 0.3 * sum(g.norm() ** 2 for g in gradients) ** 0.5, "the term must matter in this comparison"
    expected = {"loss/total": total, "loss/cross_entropy": outputs.loss, "loss/dispersion": dispersion}
    expected |= {f"gradient/{name}": g for name, g in zip(parameters, gradients, strict=True)}
    return {name: value.detach() for name, value in expected.items()}


def flat_gradient(result: dict[str, Tensor]) -> Tensor:
    return torch.cat([result[name].flatten() for name in sorted(result) if name.startswith("gradient/")]).double()


@pytest.mark.parametrize(("model", "recompute"), VARIANTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_a_step_does_not_depend_on_the_layout(layout: tuple[int, int, int], model: str, recompute: bool) -> None:
    ranks, micro_batch, accumulation = layout
    derived = BatchLayout.derive(settings_of(model, micro_batch=micro_batch), ranks)
    assert (derived.world_size, derived.micro_batch, derived.accumulation) == layout
    actual, expected = results_of(ranks)[model, recompute, micro_batch], expected_of(model)
    for name in ("loss/total", "loss/cross_entropy", "loss/dispersion"):
        assert abs(actual[name] / expected[name] - 1) <= 1e-6, name
    gradient, reference = flat_gradient(actual), flat_gradient(expected)
    assert abs(gradient.norm() / reference.norm() - 1) <= 1e-6
    assert (gradient / gradient.norm() - reference / reference.norm()).norm() <= 1e-6


@pytest.mark.parametrize(("model", "recompute"), VARIANTS)
def test_statistics_do_not_depend_on_the_layout(model: str, recompute: bool) -> None:
    first = results_of(1)[model, recompute, 4]
    for ranks, micro_batch, _ in LAYOUTS:
        other = results_of(ranks)[model, recompute, micro_batch]
        assert torch.allclose(other["loss/mean_cosine"], first["loss/mean_cosine"], rtol=1e-4, atol=1e-6)
        assert torch.allclose(other["loss/clamped_share"], first["loss/clamped_share"], rtol=1e-3, atol=1e-6)
        assert torch.allclose(other["ratio"], first["ratio"], rtol=1e-4) and first["ratio"] > 0.05


def communication_on_rank(recompute: bool) -> list[list[tuple[str, str]]]:
    settings = settings_of("gpt2", recompute=recompute, micro_batch=2)
    layout = BatchLayout.derive(settings, dist.get_world_size())
    module = module_of(settings, layout, pool_groups(layout.pool_ranks))
    with Communication() as forward:
        terms = micro_step(module, layout, 0)
    with Communication() as backward:
        terms.total.backward()
    return [forward.calls, backward.calls]


@pytest.mark.parametrize("recompute", [False, True])
def test_one_gather_for_all_layers_and_none_in_backward(recompute: bool) -> None:
    for forward, backward in run_ranks(communication_on_rank, 2, recompute):
        assert [name for name, _ in forward] == ["allgather_base", "allreduce"]
        assert backward == []
