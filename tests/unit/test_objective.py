"""Sampled positions, the training module in one process, and cross-entropy against transformers' own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch._dynamo.utils import counters

from dispersion_pretrain.config import DispersionSettings, ModelSettings
from dispersion_pretrain.dispersion import VARIANTS, dispersion_loss
from dispersion_pretrain.engine import compile_blocks
from dispersion_pretrain.model import build_model, model_config
from dispersion_pretrain.objective import (
    DispersionTerm,
    EvaluationOutputs,
    LossTerms,
    StepContext,
    TrainingModule,
    sample_positions,
    token_cross_entropy,
)

LENGTH, VOCABULARY = 16, 50

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 4, "n_embd": 16, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.3},
    "qwen3": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "head_dim": 8,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
    },
    "llama": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
    },
}  # fmt: skip


def draw(seed: int = 0, step: int = 0, samples: list[int] | None = None, layers: tuple[int, ...] = (1, 2),
         num_tokens: int = 5, length: int = LENGTH) -> Tensor:  # fmt: skip
    sample_index = torch.tensor(samples if samples is not None else [0, 1, 2])
    return sample_positions(
        seed, step, sample_index, torch.tensor(layers), num_tokens=num_tokens, sequence_length=length
    )


def build(model_type: str, *, recompute: bool | int = False) -> torch.nn.Module:
    settings = ModelSettings(
        config={"model_type": model_type, **MODELS[model_type]}, activation_checkpointing=recompute
    )
    torch.manual_seed(0)
    return build_model(settings, model_config(settings, vocabulary=VOCABULARY, sequence_length=LENGTH)).train()


def term(layers: list[int], *, pools_per_rank: int = 1, **settings: Any) -> DispersionTerm:
    settings = {"pool_sequences": 2, "tokens_per_sequence": 6, **settings}
    return DispersionTerm(
        DispersionSettings(**settings), layers=layers, seed=3, pools_per_rank=pools_per_rank, pool_group=None
    )


def batch(num_sequences: int = 4) -> Tensor:
    return torch.randint(0, VOCABULARY, (num_sequences, LENGTH), generator=torch.Generator().manual_seed(1))


def context(coefficient: float, num_sequences: int = 4, step: int = 0) -> StepContext:
    return StepContext(step=step, targets=num_sequences * (LENGTH - 1), shares=1, coefficient=coefficient)


def loss_and_gradients(module: TrainingModule, coefficient: float, step: int = 0) -> tuple[LossTerms, list[Tensor]]:
    torch.manual_seed(5)  # of the dropout masks
    terms = module(batch(), torch.arange(4), context(coefficient, step=step))
    assert isinstance(terms, LossTerms)
    return terms, list(torch.autograd.grad(terms.total, list(module.model.parameters())))


class TestPositions:
    def test_shape_range_and_no_replacement(self) -> None:
        for length, num_tokens in [(2, 1), (5, 5), (16, 7), (17, 17), (256, 64), (1000, 256)]:
            positions = draw(samples=list(range(9)), num_tokens=num_tokens, length=length)
            assert positions.shape == (2, 9, num_tokens)
            assert positions.dtype == torch.int64
            assert positions.min() >= 0
            assert positions.max() < length
            assert (positions.sort(-1).values.diff(dim=-1) > 0).all()

    @pytest.mark.parametrize(("length", "num_tokens"), [(16, 1), (16, 4), (17, 5), (33, 32)])
    def test_every_position_is_as_likely(self, length: int, num_tokens: int) -> None:
        positions = draw(seed=1, samples=list(range(3000)), num_tokens=num_tokens, length=length)
        counts = torch.bincount(positions.flatten(), minlength=length)
        # Draws without replacement vary less than the multinomial of the test: by (1 - m / L) of its variance.
        shrinkage = 1 - (num_tokens - 1) / (length - 1)
        statistic = ((counts - counts.double().mean()) ** 2 / counts.double().mean()).sum() / shrinkage
        assert 1e-4 < stats.chi2.sf(statistic.item(), length - 1) < 1 - 1e-4

    def test_every_pair_of_positions_is_as_likely(self) -> None:
        positions = draw(seed=2, samples=list(range(3000)), num_tokens=2, length=8).flatten(0, 1).sort(-1).values
        counts = torch.bincount(positions[:, 0] * 8 + positions[:, 1], minlength=64)
        pairs = [counts[i * 8 + j].item() for i, j in itertools.combinations(range(8), 2)]
        assert sum(pairs) == 6000
        assert 1e-4 < stats.chisquare(pairs).pvalue

    def test_determined_by_seed_step_sample_and_layer(self) -> None:
        base = draw()
        assert torch.equal(base, draw())
        assert not torch.equal(base, draw(seed=1))
        assert not torch.equal(base, draw(step=1))
        assert not torch.equal(base, draw(samples=[1, 2, 3]))
        assert not torch.equal(base[0], base[1]), "layers draw apart"
        assert not torch.equal(base[:, 0], base[:, 1]), "samples draw apart"

    def test_different_counters_draw_independently(self) -> None:
        def overlap(one: Tensor, other: Tensor) -> float:
            return (one[..., :, None] == other[..., None, :]).double().sum((-1, -2)).mean().item()

        samples = list(range(500))
        one = draw(samples=samples, num_tokens=32, length=256)
        others = [
            draw(samples=samples, step=1, num_tokens=32, length=256),
            draw(samples=samples, seed=1, num_tokens=32, length=256),
            draw(samples=[sample + 1 for sample in samples], num_tokens=32, length=256),
            draw(samples=samples, layers=(2, 3), num_tokens=32, length=256),
            one.flip(0),
        ]
        for other in others:  # two independent draws of 32 from 256 share 4 on average, with deviation 1.75
            assert overlap(one, other) == pytest.approx(4.0, abs=5 * 1.75 / 1000**0.5)

    def test_seed_and_step_do_not_stand_in_for_each_other(self) -> None:
        drawn = {tuple(draw(seed=seed, step=step, samples=[0]).flatten().tolist())
                 for seed in range(8) for step in range(8)}  # fmt: skip
        assert len(drawn) == 64

    def test_grouping_of_samples_does_not_matter(self) -> None:
        together = draw(samples=[4, 5, 6, 7], layers=(1, 2, 5))
        for samples in ([4], [5, 6], [7, 4]):
            places = [sample - 4 for sample in samples]
            assert torch.equal(draw(samples=samples, layers=(1, 2, 5)), together[:, places])
        assert torch.equal(draw(samples=[4, 5, 6, 7], layers=(5,))[0], together[2])

    def test_large_counters(self) -> None:
        far = draw(step=10**7, samples=[2**40, 2**40 + 1], num_tokens=LENGTH)
        assert torch.equal(far.sort(-1).values, torch.arange(LENGTH).expand(2, 2, LENGTH))
        assert not torch.equal(far[:, 0], far[:, 1])


class TestCrossEntropy:
    @pytest.mark.parametrize("model_type", MODELS)
    def test_equals_transformers_own(self, model_type: str) -> None:
        model = build(model_type).eval()
        outputs = model(input_ids=batch(), labels=batch())
        assert token_cross_entropy(outputs.logits, batch()).mean().item() == pytest.approx(
            outputs.loss.item(), rel=1e-6
        )

    def test_in_order_and_in_float32(self) -> None:
        logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
        ids = torch.tensor([[0, 1, 2, 3, 4], [6, 5, 4, 3, 2]])
        losses = token_cross_entropy(logits, ids)
        assert losses.dtype == torch.float32
        expected = [
            -torch.log_softmax(logits[row, place].float(), 0)[ids[row, place + 1]]
            for row in (0, 1)
            for place in range(4)
        ]
        assert torch.allclose(losses, torch.stack(expected))

    def test_shares_are_normalised_by_the_whole_batch(self) -> None:
        module = TrainingModule(build("qwen3"), None)
        ids = batch(4)
        whole = module(ids, torch.arange(4), context(0.0)).cross_entropy
        halves = [
            module(ids[rows], torch.arange(4)[rows], StepContext(0, torch.tensor(4 * (LENGTH - 1)), 2, 0.0))
            for rows in (slice(0, 1), slice(1, 4))
        ]  # uneven shares of one step, as after padding: their mean is still the mean over targets
        assert torch.stack([half.cross_entropy for half in halves]).mean().item() == pytest.approx(
            whole.item(), rel=1e-6
        )


class TestTrainingModule:
    @pytest.mark.parametrize("model_type", MODELS)
    def test_coefficient_zero_is_bit_equal_to_no_term(self, model_type: str) -> None:
        without, without_gradients = loss_and_gradients(TrainingModule(build(model_type), None), 0.0)
        off, off_gradients = loss_and_gradients(TrainingModule(build(model_type), term([1, 2, 3, 4])), 0.0)
        for one, other in zip((*without, *without_gradients), (*off, *off_gradients), strict=True):
            assert torch.equal(one, other)
        assert without.dispersion == 0
        assert len(without.mean_cosine) == 0

    @pytest.mark.parametrize("model_type", MODELS)
    @pytest.mark.parametrize("recompute", [False, True])
    def test_forward_touches_no_generator_and_no_dropout_mask(self, model_type: str, recompute: bool) -> None:
        """The term changes the loss only: cross-entropy (with dropout) and the generator are those of a run without."""
        states, entropies = [], []
        for dispersion in (None, term([1, 4])):
            module = TrainingModule(build(model_type, recompute=recompute), dispersion)
            terms, _ = loss_and_gradients(module, 0.5)
            states.append(torch.get_rng_state())
            entropies.append(terms.cross_entropy)
        assert torch.equal(*states)
        assert torch.equal(*entropies)

    def test_positions_do_not_come_from_the_global_generator(self) -> None:
        torch.manual_seed(0)
        before, first = torch.get_rng_state(), draw()
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(1)
        assert torch.equal(first, draw())

    @pytest.mark.parametrize("recompute", [False, True, 2])
    @pytest.mark.parametrize("model_type", MODELS)
    def test_it_breaks_no_graph_of_a_compiled_model(self, model_type: str, recompute: bool | int) -> None:
        for dispersion in (None, term([1, 2, 3, 4])):
            torch.compiler.reset()
            counters.clear()
            module = TrainingModule(build(model_type, recompute=recompute), dispersion)
            compile_blocks(module.get_submodule("model"), "eager")  # as the engine does, without kernels
            graphs = []
            for step in range(4):
                batch = torch.randint(0, VOCABULARY, (2, LENGTH)), torch.arange(2)
                module(*batch, StepContext(step, 2 * (LENGTH - 1.0), 1, 0.1)).total.backward()
                graphs.append(counters["stats"]["unique_graphs"])
            assert not counters["graph_break"]
            # transformers wraps the blocks in the first step that asks for hidden states, which makes a second graph
            assert graphs[0] == 1 and graphs[1] == graphs[3] <= 2

    @pytest.mark.parametrize("recompute", [True, 2])
    @pytest.mark.parametrize("model_type", MODELS)
    def test_a_compiled_model_that_recomputes_has_the_same_gradients(
        self, model_type: str, recompute: bool | int
    ) -> None:
        torch.compiler.reset()
        plain, compiled = (
            TrainingModule(build(model_type, recompute=recompute).eval(), term([1, 2, 3, 4])) for _ in range(2)
        )
        compile_blocks(compiled.get_submodule("model"), "aot_eager")
        for module in (plain, compiled):  # recompute is on in training alone, and dropout has other numbers compiled
            for part in module.train().modules():
                if isinstance(part, torch.nn.Dropout):
                    part.p = 0.0
        expected, expected_gradients = loss_and_gradients(plain, 1.0)
        found, gradients = loss_and_gradients(compiled, 1.0)
        for one, other in zip((*expected, *expected_gradients), (*found, *gradients), strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("recompute", [True, 2])
    @pytest.mark.parametrize("model_type", MODELS)
    def test_recompute_changes_nothing(self, model_type: str, recompute: bool | int) -> None:
        plain, plain_gradients = loss_and_gradients(TrainingModule(build(model_type), term([1, 2, 3, 4])), 1.0)
        again, again_gradients = loss_and_gradients(
            TrainingModule(build(model_type, recompute=recompute), term([1, 2, 3, 4])), 1.0
        )
        for one, other in zip((*plain, *plain_gradients), (*again, *again_gradients), strict=True):
            assert torch.equal(one, other)

    @pytest.mark.parametrize("model_type", MODELS)
    def test_total_is_cross_entropy_plus_the_mean_over_layers_and_pools(self, model_type: str) -> None:
        model = build(model_type).eval()
        module = TrainingModule(model, term([2, 4], pools_per_rank=2)).eval()
        terms = module(batch(), torch.arange(10, 14), context(0.7, step=9))
        hidden = model(input_ids=batch(), output_hidden_states=True).hidden_states
        assert len(hidden) == 5
        positions = sample_positions(
            3, 9, torch.arange(10, 14), torch.tensor([2, 4]), num_tokens=6, sequence_length=LENGTH
        )
        losses = []
        for place, layer in enumerate((2, 4)):
            for pool in ([0, 1], [2, 3]):
                drawn = torch.cat([hidden[layer][row, positions[place, row]] for row in pool])
                losses.append(dispersion_loss(drawn[None]))
        assert terms.dispersion.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
        assert terms.total.item() == pytest.approx(terms.cross_entropy.item() + 0.7 * terms.dispersion.item(), rel=1e-6)
        assert terms.layer_dispersion.tolist() == pytest.approx(
            [torch.stack(pair).mean().item() for pair in (losses[:2], losses[2:])], rel=1e-6
        )
        assert terms.mean_cosine.shape == terms.clamped_share.shape == (2,)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_embeddings_that_are_not_finite_show_in_their_layer_alone(self, variant: str, value: float) -> None:
        hidden = [torch.randn(4, LENGTH, 8) for _ in range(5)]
        hidden[2][1] = value
        by_layer, _, _ = term([1, 2, 4], variant=variant)(tuple(hidden), torch.arange(4), 0)
        assert torch.isfinite(by_layer).tolist() == [True, False, True]

    def test_only_the_total_is_differentiable(self) -> None:
        terms, _ = loss_and_gradients(TrainingModule(build("gpt2"), term([1])), 1.0)
        assert terms.total.requires_grad
        assert not any(part.requires_grad for part in terms[1:])
        assert terms.total.shape == terms.cross_entropy.shape == terms.dispersion.shape == ()

    def test_the_step_moves_the_positions(self) -> None:
        module = TrainingModule(build("qwen3"), term([1, 2, 3, 4]))
        losses = [loss_and_gradients(module, 1.0, step)[0].dispersion.item() for step in (0, 0, 1)]
        assert losses[0] == losses[1] != losses[2]

    def test_the_term_reaches_the_layers_below_and_none_above(self) -> None:
        model: Any = build("qwen3")
        hidden = model(input_ids=batch(), output_hidden_states=True).hidden_states
        (loss,), _, _ = term([2])(hidden, torch.arange(4), 0)
        blocks = model.model.layers
        reached = [
            torch.autograd.grad(loss, block.mlp.up_proj.weight, retain_graph=True, allow_unused=True)[0] is not None
            for block in blocks
        ]
        assert reached == [True, True, False, False]

    def test_layers_of_different_widths_are_named(self) -> None:
        hidden = tuple(torch.randn(4, LENGTH, width) for width in (8, 8, 8, 12))
        with pytest.raises(ValueError, match=r"dispersion\.layers: .* widths \{2: 8, 3: 12\}"):
            term([2, 3])(hidden, torch.arange(4), 0)
        assert term([1, 2])(hidden, torch.arange(4), 0)[0].shape == (2,)

    def test_without_a_context_it_evaluates(self) -> None:
        module = TrainingModule(build("gpt2"), term([1])).eval()
        with torch.no_grad():
            outputs = module(batch(), with_logits=True)
            assert module(batch()).logits is None
        assert isinstance(outputs, EvaluationOutputs) and outputs.logits is not None
        assert outputs.cross_entropy_sums.shape == (4,)
        assert outputs.logits.shape == (4, LENGTH, VOCABULARY)
        assert [tuple(hidden.shape) for hidden in outputs.hidden_states] == [(4, LENGTH, 16)] * 5
        expected = token_cross_entropy(outputs.logits, batch()).sum()
        assert outputs.cross_entropy_sums.sum().item() == pytest.approx(expected.item(), rel=1e-6)


class TestLayers:
    @pytest.mark.parametrize(
        ("layers", "num_layers", "expected"),
        [
            ("all", 4, [1, 2, 3, 4]), ("last", 4, [4]), ("early_half", 4, [1, 2]), ("late_half", 4, [3, 4]),
            ("early_half", 5, [1, 2]), ("late_half", 5, [3, 4, 5]), ("all", 1, [1]), ("last", 1, [1]),
            ("early_half", 1, [1]), ("late_half", 1, [1]), ([2], 4, [2]), ([4, 1], 4, [1, 4]),
        ],
    )  # fmt: skip
    def test_chosen(self, layers: Any, num_layers: int, expected: list[int]) -> None:
        assert DispersionSettings(layers=layers).layer_indices(num_layers) == expected

    @pytest.mark.parametrize("layers", [[0], [5], [-1], [1, 5], [2, 2], []])
    def test_refused(self, layers: list[int]) -> None:
        with pytest.raises(ValueError, match=r"^dispersion.layers: .* Distinct layers from 1 to 4 are allowed"):
            DispersionSettings(layers=layers).layer_indices(4)


class TestGradientRatioCap:
    @staticmethod
    def norms(model: Any, coefficient: float) -> tuple[float, float]:
        """Of the term's and of cross-entropy's gradient at the last hidden state, by autograd; positions of step 2."""
        outputs = model(input_ids=batch(), output_hidden_states=True)
        last = outputs.hidden_states[-1]
        positions = sample_positions(3, 2, torch.arange(4), torch.tensor([4]), num_tokens=6, sequence_length=LENGTH)
        drawn = last[torch.arange(4)[:, None], positions[0]].reshape(2, 12, -1)
        dispersion = coefficient * dispersion_loss(drawn) / 2  # of two layers; the other one is no function of the last
        cross_entropy = token_cross_entropy(outputs.logits, batch()).mean()
        of_term = torch.autograd.grad(dispersion, last, retain_graph=True)[0].norm()
        return of_term.item(), torch.autograd.grad(cross_entropy, last)[0].norm().item()

    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("model_type", MODELS)
    def test_ratio_is_that_of_autograd(self, model_type: str, recompute: bool) -> None:
        model: Any = build(model_type, recompute=recompute).eval()
        dispersion = term([2, 4], pools_per_rank=2, gradient_ratio_cap=0.5)
        cap = dispersion.cap
        assert cap is not None
        module = TrainingModule(model, dispersion)
        module.train().model.eval()
        module(batch(), torch.arange(4), context(3.0, step=2)).total.backward()
        cap.end_step(3.0)
        of_term, of_rest = self.norms(model, 3.0)
        assert cap.ratio == pytest.approx(of_term / of_rest, rel=1e-4)
        assert cap.bound == pytest.approx(3.0 * 0.5 * of_rest / of_term, rel=1e-4)

    def test_the_next_step_is_bounded_while_the_schedule_rises_too(self) -> None:
        dispersion = term([4], gradient_ratio_cap=0.01)
        cap = dispersion.cap
        assert cap is not None
        module = TrainingModule(build("qwen3"), dispersion)
        ratios = []
        for scheduled in (25.0, 50.0, 75.0, 1e-6):  # the same weights and positions each time
            coefficient = min(scheduled, cap.bound)
            module(batch(), torch.arange(4), context(coefficient)).total.backward()
            cap.end_step(coefficient)
            ratios.append(cap.ratio)
        assert ratios[0] > 0.1, "the first step only shows the ratio"
        assert ratios[1:3] == pytest.approx([0.01, 0.01], rel=1e-3)
        assert ratios[3] < 1e-4, "a bound is no target"

    def test_a_step_without_the_term_changes_nothing(self) -> None:
        dispersion = term([4], gradient_ratio_cap=0.01)
        assert dispersion.cap is not None
        module = TrainingModule(build("gpt2"), dispersion)
        module(batch(), torch.arange(4), context(0.0)).total.backward()
        dispersion.cap.end_step(0.0)
        assert dispersion.cap.bound == math.inf and math.isnan(dispersion.cap.ratio)

    def test_evaluation_is_not_measured(self) -> None:
        dispersion = term([4], gradient_ratio_cap=0.01)
        assert dispersion.cap is not None
        module = TrainingModule(build("gpt2"), dispersion)
        module(batch(), torch.arange(4), context(1.0)).total.backward()
        squares = dispersion.cap._squares
        assert squares is not None
        before = squares.clone()
        module(batch(), with_logits=True).logits.sum().backward()
        assert torch.equal(squares, before)

    def test_a_head_that_reads_nothing_is_an_error(self) -> None:
        dispersion = term([4], gradient_ratio_cap=0.01)
        cap = dispersion.cap
        assert cap is not None
        sampled = torch.randn(3, requires_grad=True)
        cap.watch(sampled, 0)
        sampled.sum().backward()
        with pytest.raises(RuntimeError, match="no gradient of cross-entropy reached the last hidden state"):
            cap.end_step(1.0)

    def test_measuring_changes_no_gradient(self) -> None:
        plain = loss_and_gradients(TrainingModule(build("gpt2"), term([1, 4])), 1.0)
        capped = loss_and_gradients(TrainingModule(build("gpt2"), term([1, 4], gradient_ratio_cap=0.1)), 1.0)
        for one, other in zip((*plain[0], *plain[1]), (*capped[0], *capped[1]), strict=True):
            assert torch.equal(one, other)
