"""Noisy embeddings and active forgetting by themselves, and in the training module of one process."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dispersion_pretrain import baselines
from dispersion_pretrain.baselines import (
    NoisyEmbeddings,
    count_resets,
    embedding_noise,
    forgets_at,
    fresh_embeddings,
)
from dispersion_pretrain.config import (
    ActiveForgettingSettings,
    NoisyEmbeddingsSettings,
)
from dispersion_pretrain.objective import EvaluationOutputs, StepContext, TrainingModule

LENGTH, ENTRIES = 16, 50


def draw(seed: int = 0, step: int = 0, samples: list[int] | None = None, **shape: Any) -> Tensor:
    shape = {"length": LENGTH, "width": 24, "alpha": 5.0, **shape}
    return embedding_noise(seed, step, torch.tensor([0, 1, 2] if samples is None else samples), **shape)


def student(model_type: str = "gpt2", **fields: Any) -> Any:
    shapes = {
        "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32},
        "llama": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "max_position_embeddings": 32,
        },
    }[model_type]  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(model_type, **{"vocab_size": ENTRIES, **shapes, **fields})
    ).train()


def batch(num_sequences: int = 4) -> Tensor:
    return torch.randint(0, ENTRIES, (num_sequences, LENGTH), generator=torch.Generator().manual_seed(1))


def context(step: int = 0, shares: int = 1) -> StepContext:
    return StepContext(step=step, targets=4 * (LENGTH - 1), shares=shares, coefficient=0.0)


def generators() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]


class TestNoise:
    @pytest.mark.parametrize(("length", "width"), [(1, 1), (5, 7), (16, 24), (128, 64)])
    def test_shape_and_bound(self, length: int, width: int) -> None:
        noise = draw(samples=list(range(9)), length=length, width=width, alpha=3.0)
        assert noise.shape == (9, length, width) and noise.dtype == torch.float32
        bound = 3.0 / (length * width) ** 0.5
        assert noise.abs().max() <= bound
        assert length * width < 100 or noise.max() > 0.99 * bound and noise.min() < -0.99 * bound

    def test_uniform_and_independent(self) -> None:
        noise = draw(seed=3, samples=list(range(40))).flatten(1).double() * (LENGTH * 24) ** 0.5 / 5
        assert stats.kstest(noise.flatten().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
        # Each 64-bit word makes two neighbours; they, neighbouring samples and steps must not know of each other.
        others = {
            "neighbour": (noise[:, :-1], noise[:, 1:]),
            "sample": (noise[:-1], noise[1:]),
            "step": (noise, draw(seed=3, step=1, samples=list(range(40))).flatten(1).double()),
        }
        for name, (one, other) in others.items():
            correlation = np.corrcoef(one.flatten().numpy(), other.flatten().numpy())[0, 1]
            assert abs(correlation) < 4 / one.numel() ** 0.5, name

    def test_determined_by_seed_step_and_sample(self) -> None:
        base = draw()
        assert torch.equal(base, draw())
        assert not torch.equal(base, draw(seed=1))
        assert not torch.equal(base, draw(step=1))
        assert not torch.equal(base, draw(samples=[1, 2, 3]))
        assert not torch.equal(base[0], base[1])
        drawn = {draw(seed, step, [0], length=1, width=2).flatten()[0].item() for seed in range(8) for step in range(8)}
        assert len(drawn) == 64, "seed and step do not stand in for each other"

    def test_grouping_of_samples_does_not_matter(self) -> None:
        together = draw(samples=[4, 5, 6, 7])
        for samples in ([4], [5, 6], [7, 4], [2**40, 6]):
            for place, sample in enumerate(samples):
                if sample < 8:
                    assert torch.equal(draw(samples=samples)[place], together[sample - 4])

    def test_touches_no_generator(self) -> None:
        before = generators()
        first = draw()
        assert generators() == before
        torch.manual_seed(1)
        assert torch.equal(first, draw())

    def test_is_the_counter_hash_in_halves(self) -> None:
        """The same noise in every version and on every machine: written again with Python's integers."""

        def mix(word: int) -> int:
            word = (word + 0x9E3779B97F4A7C15) % 2**64
            word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            word = (word ^ (word >> 27)) * 0x94D049BB133111EB % 2**64
            return word ^ (word >> 31)

        expected = []
        for word in (0, 1):
            state = mix(1)
            for counter in (int.from_bytes(b"noise", "big"), 2, 3, word):
                state = mix(state ^ counter)
            expected += [half - 2**32 * (half >= 2**31) for half in (state % 2**32, state >> 32)]
        noise = draw(seed=1, step=2, samples=[3], length=1, width=3, alpha=1.0).flatten()
        assert noise.tolist() == pytest.approx([value / 2**31 / 3**0.5 for value in expected[:3]], rel=1e-6)


def module_with_noise(model: Any, alpha: float | None) -> TrainingModule:
    noise = None if alpha is None else NoisyEmbeddings(NoisyEmbeddingsSettings(alpha=alpha), seed=3)
    return TrainingModule(model, None, noise=noise)


class TestNoisyModule:
    @pytest.mark.parametrize("model_type", ["gpt2", "llama"])
    def test_is_the_model_on_noisy_embeddings(self, model_type: str) -> None:
        model = student(model_type)
        ids, samples = batch(), torch.arange(8, 12)
        torch.manual_seed(5)  # of the dropout masks
        terms = module_with_noise(model, 2.0)(ids, samples, context(step=6))
        terms.total.backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        noise = embedding_noise(3, 6, samples, length=LENGTH, width=16, alpha=2.0)
        model.zero_grad()
        torch.manual_seed(5)
        loss = model(inputs_embeds=model.get_input_embeddings()(ids) + noise, labels=ids).loss
        loss.backward()
        assert terms.cross_entropy.item() == pytest.approx(loss.item(), rel=1e-6)
        for one, other in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(one, other.grad)

    def test_an_infinitesimal_noise_changes_nothing_and_keeps_the_dropout_masks(self) -> None:
        losses, states = [], []
        for alpha in (None, 1e-30):
            torch.manual_seed(5)
            losses.append(module_with_noise(student(), alpha)(batch(), torch.arange(4), context()).cross_entropy)
            states.append(torch.get_rng_state())
        assert torch.equal(*losses) and torch.equal(*states)

    def test_none_in_evaluation(self) -> None:
        plain, noisy = (module_with_noise(student(), alpha).eval() for alpha in (None, 100.0))
        with torch.no_grad():
            one, other = plain(batch(), with_logits=True), noisy(batch(), with_logits=True)
            assert isinstance(one, EvaluationOutputs) and isinstance(other, EvaluationOutputs)
            assert one.logits is not None and other.logits is not None
            assert torch.equal(one.logits, other.logits)
            terms = [module(batch(), torch.arange(4), context()) for module in (plain, noisy)]
        assert torch.equal(terms[0].cross_entropy, terms[1].cross_entropy)

    def test_micro_batches_add_up(self) -> None:
        module = module_with_noise(student(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), 50.0)
        ids, index = batch(), torch.arange(20, 24)
        whole = module(ids, index, context(step=2)).cross_entropy
        parts = [module(ids[i : i + 1], index[i : i + 1], context(step=2, shares=4)).cross_entropy for i in range(4)]
        assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-6)
        assert module(ids, index, context(step=3)).cross_entropy != whole

    def test_bf16_embeddings_stay_bf16(self) -> None:
        embeddings = torch.zeros(2, LENGTH, 8, dtype=torch.bfloat16)
        noisy = NoisyEmbeddings(NoisyEmbeddingsSettings(alpha=5.0), seed=0).added(embeddings, torch.arange(2), 0)
        assert noisy.dtype == torch.bfloat16
        exact = embedding_noise(0, 0, torch.arange(2), length=LENGTH, width=8, alpha=5.0)
        assert torch.equal(noisy, exact.bfloat16())

    def test_recompute_and_compile_draw_the_same(self) -> None:
        results = []
        for change in ("none", "recompute", "compile"):
            model = student("llama")
            if change == "recompute":
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if change == "compile":
                model.compile(backend="eager")  # the graphs are made, no kernel is
            terms = module_with_noise(model, 5.0)(batch(), torch.arange(4), context())
            terms.total.backward()
            results.append((terms.total.detach(), [p.grad for p in model.parameters()]))
        for total, gradients in results[1:]:
            assert torch.equal(results[0][0], total)
            assert all(torch.equal(one, other) for one, other in zip(results[0][1], gradients, strict=True))


class TestForgetting:
    @pytest.mark.parametrize(
        ("every", "last_phase", "num_steps", "expected"),
        [
            (24, 0.3, 120, [24, 48, 72]), (1000, 0.2, 5000, [1000, 2000, 3000]), (10, 0.0, 30, [10, 20]),
            (1, 0.5, 8, [1, 2, 3]), (3, 0.1, 30, [3, 6, 9, 12, 15, 18, 21, 24]), (4, 0.9, 10, []), (50, 0.0, 40, []),
            (2, 0.2, 8, [2, 4, 6]), (2, 0.2, 7, [2, 4]),
        ],
    )  # fmt: skip
    def test_steps(self, every: int, last_phase: float, num_steps: int, expected: list[int]) -> None:
        section = ActiveForgettingSettings(every_steps=every, last_phase=last_phase)
        assert [step for step in range(num_steps) if forgets_at(section, step, num_steps)] == expected
        assert all(step < (1 - last_phase) * num_steps for step in expected)
        for done in range(num_steps + 1):
            assert count_resets(section, done, num_steps) == sum(step < done for step in expected)
        assert not any(forgets_at(None, step, num_steps) for step in range(num_steps))

    def test_distribution_padding_and_counters(self) -> None:
        embedding = nn.Embedding(300, 40, padding_idx=7)
        before = generators()
        value = fresh_embeddings(embedding, standard_deviation=0.02, seed=1, step=10)
        assert generators() == before
        assert value.shape == (300, 40) and value.dtype == torch.float32 and (value[7] == 0).all()
        drawn = torch.cat([value[:7], value[8:]]).flatten().numpy()
        assert stats.kstest(drawn, stats.norm(0, 0.02).cdf).pvalue > 1e-3
        assert torch.equal(value, fresh_embeddings(embedding, standard_deviation=0.02, seed=1, step=10))
        for seed, step in ((2, 10), (1, 20), (10, 1)):
            other = fresh_embeddings(embedding, standard_deviation=0.02, seed=seed, step=step)
            assert not torch.equal(value, other)

    def test_a_model_that_does_not_say_how_it_starts_is_refused(self) -> None:
        config = AutoConfig.for_model("gpt2")
        assert baselines.initial_deviation(config) == 0.02
        config.initializer_range = None
        with pytest.raises(ValueError, match=r"^active_forgetting: a config of gpt2 has no initializer_range"):
            baselines.initial_deviation(config)
