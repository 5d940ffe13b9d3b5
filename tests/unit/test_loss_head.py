"""The loss head against torch's own cross-entropy, and that whole logits are never held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, PretrainedConfig

from dispersion_pretrain import loss_head
from dispersion_pretrain.config import DispersionSettings, ModelSettings
from dispersion_pretrain.loss_head import CrossEntropyHead
from dispersion_pretrain.model import build_model, has_bare_head, model_config
from dispersion_pretrain.objective import DispersionTerm, StepContext, TrainingModule

DIM, VOCABULARY, LENGTH = 16, 301, 24
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": DIM, "n_head": 2, "n_positions": LENGTH, "resid_pdrop": 0.2},
    "qwen3": {
        "hidden_size": DIM, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": LENGTH, "tie_word_embeddings": False,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces, the last one smaller, and several parts of each, by rows and by entries of the vocabulary."""
    monkeypatch.setattr(loss_head, "rows_at_once", lambda dim: 20)
    monkeypatch.setattr(loss_head, "_NUMBERS_IN_CACHE", 1000)


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returns."""
        returned = function(*args, **(kwargs or {}))
        for one in returned if isinstance(returned, tuple | list) else (returned,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return returned


def example(dtype: torch.dtype, *, bias: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(DIM, VOCABULARY, bias=bias).to(dtype)
    return head, torch.randn(70, DIM).to(dtype).requires_grad_(), torch.randint(0, VOCABULARY, (70,))


def gradients(loss: Tensor, head: nn.Linear, hidden: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(0.37 * loss, [hidden, *head.parameters()]))


class TestValueAndGradient:
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize(
        ("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)]
    )
    def test_equal_torchs(self, dtype: torch.dtype, bound: float, bias: bool) -> None:
        head, hidden, targets = example(dtype, bias=bias)
        full = torch.promote_types(dtype, torch.float32)
        plain = functional.cross_entropy(head(hidden).to(full), targets, reduction="sum")
        expected = gradients(plain, head, hidden)
        CrossEntropyHead.take_over(head)
        summed = head(hidden, targets)
        assert summed.dtype == full and summed.shape == ()
        assert summed.item() == pytest.approx(plain.item(), rel=1e-6)
        for found, wanted in zip(gradients(summed, head, hidden), expected, strict=True):
            assert found.dtype == wanted.dtype
            assert (found - wanted).norm() < bound * wanted.norm()

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_what_a_gpu_computes_at_once_is_the_same(self, dtype: torch.dtype, compiled: bool) -> None:
        torch.manual_seed(0)
        logits, targets = (3.0 * torch.randn(20, VOCABULARY)).to(dtype), torch.randint(0, VOCABULARY, (20,))
        one, other = logits.clone(), logits.clone()
        losses = loss_head._turned_into_gradient(one, targets)
        at_once = loss_head._compiled() if compiled else loss_head._turned_at_once
        assert torch.allclose(at_once(other, targets), losses, rtol=1e-6)
        assert torch.allclose(other, one, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-9)
        assert not torch.equal(other, logits)

    def test_without_gradients_each_token_has_its_loss(self) -> None:
        head, hidden, targets = example(torch.float32, bias=False)
        expected = functional.cross_entropy(head(hidden), targets, reduction="none")
        CrossEntropyHead.take_over(head)
        with torch.no_grad():
            assert torch.allclose(head(hidden, targets), expected, atol=1e-6)
        assert torch.equal(head(hidden), functional.linear(hidden, head.weight))

    def test_only_what_is_wanted_has_a_gradient(self) -> None:
        head, hidden, targets = example(torch.float32, bias=True)
        CrossEntropyHead.take_over(head)
        (expected,) = torch.autograd.grad(head(hidden, targets), hidden)
        head.requires_grad_(False)
        head(hidden, targets).backward()
        assert hidden.grad is not None and torch.equal(hidden.grad, expected)
        assert head.weight.grad is None

    def test_a_second_backward_pass_is_refused(self) -> None:
        head, hidden, targets = example(torch.float32, bias=False)
        CrossEntropyHead.take_over(head)
        loss = head(hidden, targets)
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match=r"loss head: a second backward pass.* Run the forward pass again"):
            loss.backward()

    def test_nothing_else_is_taken_over(self) -> None:
        with pytest.raises(TypeError, match=r"head: Conv1d is no plain nn\.Linear"):
            CrossEntropyHead.take_over(nn.Conv1d(1, 1, 1))

    def test_numbers_that_are_not_finite_stay(self) -> None:
        head, hidden, targets = example(torch.float32, bias=False)
        CrossEntropyHead.take_over(head)
        with torch.no_grad():
            hidden[37] = torch.nan
        loss = head(hidden, targets)
        loss.backward()
        assert hidden.grad is not None and head.weight.grad is not None
        assert loss.isnan() and hidden.grad[37].isnan().all() and head.weight.grad.isnan().any()


def module(family: str, loss_head_kind: str) -> TrainingModule:
    settings = ModelSettings.model_validate(
        {"config": {"model_type": family, **FAMILIES[family]}, "loss_head": loss_head_kind}
    )
    torch.manual_seed(0)
    model = build_model(settings, model_config(settings, vocabulary=VOCABULARY, sequence_length=LENGTH)).train()
    term = DispersionTerm(
        DispersionSettings(pool_sequences=2, tokens_per_sequence=6),
        layers=[1, 2], seed=3, pools_per_rank=2, pool_group=None,
    )  # fmt: skip
    return TrainingModule(model, term)


@pytest.mark.parametrize("family", FAMILIES)
class TestModule:
    ids = torch.randint(0, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    context = StepContext(step=0, targets=4 * (LENGTH - 1), shares=1, coefficient=0.7)

    def test_the_objective_is_the_same(self, family: str) -> None:
        """With the dispersion term, dropout, tied (gpt2) and untied matrices."""
        found = {}
        for kind in ("pieces", "whole"):
            one = module(family, kind)
            assert one.has_loss_head == (kind == "pieces")
            torch.manual_seed(5)
            terms = one(self.ids, torch.arange(4), self.context)
            found[kind] = [terms.total, *torch.autograd.grad(terms.total, list(one.model.parameters()))]
        for pieces, whole in zip(found["pieces"], found["whole"], strict=True):
            assert (pieces - whole).norm() <= 2e-6 * whole.norm() + 1e-9

    def test_whole_logits_are_never_held(self, family: str) -> None:
        for kind in ("pieces", "whole"):
            one = module(family, kind)
            with LargestTensor() as in_training:
                one(self.ids, torch.arange(4), self.context).total.backward()
            with torch.no_grad(), LargestTensor() as in_evaluation:
                sums = one.eval()(self.ids).cross_entropy_sums
            assert sums.shape == (4,)
            held = [mode.elements >= 4 * (LENGTH - 1) * VOCABULARY for mode in (in_training, in_evaluation)]
            assert held == [kind == "whole"] * 2


class TestFamilies:
    @staticmethod
    def config(model_type: str, **fields: Any) -> PretrainedConfig:
        return AutoConfig.for_model(model_type, **fields)

    @pytest.mark.parametrize(
        ("model_type", "fields"),
        [("gpt2", {}), ("qwen3", {}), ("llama", {}), ("gpt_neox", {}), ("opt", {}), ("gemma", {}), ("olmo2", {})],
    )
    def test_with_a_bare_head(self, model_type: str, fields: dict[str, Any]) -> None:
        state = torch.get_rng_state()
        assert has_bare_head(self.config(model_type, **fields))
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize(
        ("model_type", "fields"), [("gemma2", {}), ("granite", {"logits_scaling": 8.0}), ("cohere", {})]
    )
    def test_that_do_more_with_logits(self, model_type: str, fields: dict[str, Any]) -> None:
        assert not has_bare_head(self.config(model_type, **fields))
