"""Distillation in one process, and what a plan says of teachers and of the other baselines."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig

from dispersion_pretrain import baselines
from dispersion_pretrain.assembly import Plan
from dispersion_pretrain.baselines import Distillation, load_teacher, plan_teacher
from dispersion_pretrain.checkpoint import CheckpointInfo
from dispersion_pretrain.config import DispersionSettings, DistillationSettings, Settings
from dispersion_pretrain.objective import DispersionTerm, LossTerms, TrainingModule
from dispersion_pretrain.resume import _refuse_other_run
from dispersion_pretrain.settings_file import dump_settings, parse_settings
from small_run import SEQUENCE_LENGTH, VOCABULARY, small_settings, write_corpus
from unit.test_baselines import ENTRIES, LENGTH, batch, context, student


class Teacher:
    """Returns the logits it is given."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, **_: Any) -> Teacher:
        return self


def distillation(teacher: Any = None, *, vocabulary: int = ENTRIES, **settings: Any) -> Distillation:
    return Distillation(DistillationSettings(teacher="x", **settings), teacher, vocabulary=vocabulary)


def random_logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def naive(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """The formula in float64, position by position."""
    total = torch.zeros((), dtype=torch.float64)
    for row in range(student_logits.shape[0]):
        for place in range(student_logits.shape[1] - 1):
            q = torch.softmax(student_logits[row, place].double() / temperature, 0)
            p = torch.softmax(teacher_logits[row, place].double() / temperature, 0)
            total = total + temperature**2 * (p * (p / q).log()).sum()
    return total


class TestDivergence:
    @pytest.fixture(params=[2**24, 25, 1], ids=["one block", "blocks", "rows"])
    def block(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        monkeypatch.setattr(baselines, "_DIVERGENCE_BLOCK", request.param)
        yield

    @pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
    def test_value_and_gradient(self, temperature: float, block: None) -> None:
        teacher = random_logits(1, 2, 5, 11)
        logits = random_logits(0, 2, 5, 11).requires_grad_()
        loss = distillation(temperature=temperature).divergence(logits, teacher)
        (gradient,) = torch.autograd.grad(loss * 0.7, logits)
        reference = logits.detach().double().requires_grad_()
        expected = naive(reference, teacher, temperature)
        (expected_gradient,) = torch.autograd.grad(expected * 0.7, reference)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6)
        assert (gradient[:, -1] == 0).all(), "the last position predicts nothing"

    def test_is_forward_not_reverse(self) -> None:
        one, other = random_logits(0, 1, 3, 11), random_logits(1, 1, 3, 11)
        forward = distillation().divergence(one, other)
        assert forward.item() != pytest.approx(distillation().divergence(other, one).item(), rel=0.01)
        expected = functional.kl_div(
            one[0, :-1].log_softmax(-1), other[0, :-1].log_softmax(-1), log_target=True, reduction="sum"
        )
        assert forward.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_zero_for_the_same_predictions(self) -> None:
        logits = random_logits(0, 2, 5, 11).requires_grad_()
        loss = distillation().divergence(logits, logits.detach() + 3)
        loss.backward()
        assert loss.item() == pytest.approx(0, abs=1e-5)
        assert logits.grad is not None and logits.grad.abs().max() < 1e-6

    @pytest.mark.parametrize(("ours", "theirs"), [(13, 11), (11, 16), (12, 16)])
    def test_other_padding_compares_the_corpus_entries(self, ours: int, theirs: int) -> None:
        student_logits = random_logits(0, 2, 5, ours).requires_grad_()
        teacher_logits = random_logits(1, 2, 5, theirs)
        loss = distillation(vocabulary=11).divergence(student_logits, teacher_logits)
        loss.backward()
        expected = naive(student_logits.detach()[..., :11], teacher_logits[..., :11], 1.0)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert student_logits.grad is not None and (student_logits.grad[..., 11:] == 0).all()

    def test_equal_sizes_compare_everything(self) -> None:
        one, other = random_logits(0, 2, 5, 16), random_logits(1, 2, 5, 16)
        loss = distillation(vocabulary=11).divergence(one, other)
        assert loss.item() == pytest.approx(naive(one, other, 1.0).item(), rel=1e-5)

    def test_bf16_logits_are_compared_in_float32(self) -> None:
        one, other = random_logits(0, 2, 5, 11).bfloat16(), random_logits(1, 2, 5, 11).bfloat16()
        loss = distillation().divergence(one.requires_grad_(), other)
        loss.backward()
        assert loss.dtype == torch.float32 and one.grad is not None and one.grad.dtype == torch.bfloat16
        assert loss.item() == pytest.approx(naive(one.detach(), other, 1.0).item(), rel=1e-5)


class TestDistillingModule:
    def test_total_normalisation_and_what_is_differentiable(self) -> None:
        teacher = Teacher(random_logits(1, 4, LENGTH, ENTRIES))
        module = TrainingModule(student(), None, distillation=distillation(teacher, weight=0.3, temperature=2.0)).eval()
        terms = module(batch(), torch.arange(4), context())
        logits = module(batch(), with_logits=True).logits
        expected = naive(logits, teacher.logits, 2.0) / (4 * (LENGTH - 1))
        assert terms.distillation.item() == pytest.approx(expected.item(), rel=1e-5)
        assert terms.total.item() == pytest.approx(terms.cross_entropy.item() + 0.3 * expected.item(), rel=1e-6)
        assert terms.total.requires_grad and not any(part.requires_grad for part in terms[1:])

    def test_micro_batches_add_up(self) -> None:
        teacher_logits = random_logits(1, 4, LENGTH, ENTRIES)
        module = TrainingModule(student(), None, distillation=distillation(Teacher(teacher_logits))).eval()
        whole = module(batch(), torch.arange(4), context()).distillation
        parts = []
        for rows in (slice(0, 1), slice(1, 4)):
            module.distillation = distillation(Teacher(teacher_logits[rows]))
            parts.append(module(batch()[rows], torch.arange(4)[rows], context(shares=2)).distillation)
        assert torch.stack(parts).mean().item() == pytest.approx(whole.item(), rel=1e-6)

    def test_off_is_bit_equal_and_zero(self) -> None:
        terms = TrainingModule(student(), None)(batch(), torch.arange(4), context())
        assert isinstance(terms, LossTerms)
        assert terms.distillation == 0 and torch.equal(terms.total, terms.cross_entropy)

    def test_the_ratio_of_gradients_counts_it_with_cross_entropy(self) -> None:
        """Of the term's to all the rest, at the last hidden state: as autograd has it."""
        teacher = Teacher(random_logits(1, 4, LENGTH, ENTRIES))
        settings = DispersionSettings(
            layers="last", pool_sequences=2, tokens_per_sequence=6, gradient_ratio_cap=0.5, coefficient=1.0
        )
        term = DispersionTerm(settings, layers=[2], seed=3, pools_per_rank=2, pool_group=None)
        model = student().eval()
        norms = {}
        for weight in (1.0, 50.0):
            module = TrainingModule(model, term, distillation=distillation(teacher, weight=weight))
            module.train().model.eval()
            module(batch(), torch.arange(4), context()._replace(coefficient=1.0)).total.backward()
            assert term.cap is not None and term.cap._squares is not None
            norms[weight] = term.cap._squares.sqrt().tolist()
            term.cap.end_step(1.0)
            assert term.cap.ratio == pytest.approx(norms[weight][0] / norms[weight][1])
        assert norms[1.0][0] == pytest.approx(norms[50.0][0]), "the term's own does not change"
        assert norms[50.0][1] > 5 * norms[1.0][1]

    def test_the_teacher_is_no_part_of_the_module(self, tmp_path: Path) -> None:
        teacher = student("llama").eval().requires_grad_(False)
        module = TrainingModule(student(), None, distillation=distillation(teacher))
        names = {name for name, _ in module.named_parameters()}
        assert names == {f"model.{name}" for name, _ in student().named_parameters()} == set(names)
        assert set(module.state_dict()) == set(TrainingModule(student(), None).state_dict())
        module.train()
        assert not teacher.training
        before = torch.get_rng_state()
        module.eval()(batch(), torch.arange(4), context()).total.backward()
        assert torch.equal(torch.get_rng_state(), before)
        assert all(parameter.grad is None for parameter in teacher.parameters())


# ---- teachers on disk


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def write_teacher(folder: Path, tokenizer: Path | None, **fields: Any) -> str:
    shape = {"n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": SEQUENCE_LENGTH, "vocab_size": VOCABULARY}
    student("gpt2", **{**shape, **fields}).save_pretrained(folder)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    return str(folder)


def settings_with(corpus: Path, **sections: Any) -> Settings:
    return parse_settings({**yaml.safe_load(dump_settings(small_settings(corpus))), **sections}, "test")


def describe(corpus: Path, **sections: Any) -> str:
    settings = settings_with(corpus, **sections)
    return Plan.make(settings, 1).describe(settings)


class TestPlan:
    def test_each_baseline_has_a_line(self, corpus: Path, tmp_path: Path) -> None:
        teacher = write_teacher(tmp_path / "teacher", corpus / "tokenizer")
        text = describe(
            corpus,
            noisy_embeddings={"alpha": 5.0},
            active_forgetting={"every_steps": 10, "last_phase": 0.2},
            distillation={"teacher": teacher, "weight": 0.5, "temperature": 2.0},
        )
        assert "noise        uniform in +-0.16 on the input embeddings" in text
        assert "forgetting   of the input embeddings every 10 steps, 7 times" in text
        assert "gpt2, 3,5" in text and "0.5 x the divergence at temperature 2" in text
        assert f"tokenizers compared, all {VOCABULARY} entries agree" in text
        assert "loss head    whole logits in training: the divergence from the teacher reads them" in text

    def test_a_family_whose_logits_stay_whole_has_a_line(self, corpus: Path) -> None:
        sizes = {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "max_position_embeddings": SEQUENCE_LENGTH,
        }  # fmt: skip
        for fields, is_told in (
            ({"model_type": "granite", "logits_scaling": 8.0}, True),
            ({"model_type": "llama"}, False),
        ):
            text = describe(corpus, model={"config": {**fields, **sizes}})
            assert ("loss head    whole logits: granite does more with them" in text) == is_told

    def test_none_of_it_without_the_sections(self, corpus: Path) -> None:
        assert not {"noise", "forgetting", "teacher", "loss"} & {
            line.split()[0] for line in describe(corpus).splitlines()
        }

    def test_resets_that_would_never_come(self, corpus: Path) -> None:
        with pytest.raises(ValueError, match=r"^active_forgetting\.every_steps: 80, but the run has 100 steps, .* 20%"):
            describe(corpus, active_forgetting={"every_steps": 80, "last_phase": 0.2})
        assert "every 79 steps, 1 times" in describe(corpus, active_forgetting={"every_steps": 79, "last_phase": 0.2})

    def test_missing_teacher(self, corpus: Path, tmp_path: Path) -> None:
        missing = str(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"^distillation\.teacher: '.*nowhere' cannot be loaded .* export the"):
            describe(corpus, distillation={"teacher": missing})

    def test_too_few_positions(self, corpus: Path, tmp_path: Path) -> None:
        teacher = write_teacher(tmp_path, corpus / "tokenizer", n_positions=SEQUENCE_LENGTH - 1)
        with pytest.raises(ValueError, match=r"^distillation\.teacher: .* has 31 positions, .*_length is 32"):
            describe(corpus, distillation={"teacher": teacher})

    def test_another_tokenizer_of_the_same_size(self, corpus: Path, tmp_path: Path) -> None:
        other = write_corpus(tmp_path / "other", ["Completely other words, zyx wvu tsr qpo. " * 9] * 3)
        teacher = write_teacher(tmp_path / "teacher", other / "tokenizer")
        with pytest.raises(ValueError, match=r"^distillation\.teacher: the tokenizer of .* is not the corpus': \d+ of"):
            describe(corpus, distillation={"teacher": teacher})

    def test_fewer_entries_than_the_corpus(self, corpus: Path, tmp_path: Path) -> None:
        teacher = write_teacher(tmp_path, corpus / "tokenizer", vocab_size=VOCABULARY - 1)
        with pytest.raises(ValueError, match=r"^distillation\.teacher: .* has 299 vocabulary entries, the corpus 300"):
            describe(corpus, distillation={"teacher": teacher})

    def test_padded_vocabulary_with_the_tokenizer(self, corpus: Path, tmp_path: Path) -> None:
        teacher = write_teacher(tmp_path, corpus / "tokenizer", vocab_size=5000)
        assert "tokenizers compared" in describe(corpus, distillation={"teacher": teacher})

    def test_a_tokenizer_that_does_not_load(self, corpus: Path, tmp_path: Path) -> None:
        teacher = write_teacher(tmp_path, corpus / "tokenizer")
        (tmp_path / "tokenizer.json").unlink()
        with pytest.raises(ValueError, match=r"^distillation\.teacher: the tokenizer in .* does not load"):
            describe(corpus, distillation={"teacher": teacher})

    def test_without_a_tokenizer_the_sizes_are_compared(self, corpus: Path, tmp_path: Path) -> None:
        teacher = write_teacher(tmp_path / "padded", None, vocab_size=VOCABULARY + 20)
        text = describe(corpus, distillation={"teacher": teacher})
        assert "no tokenizer there, only vocabulary sizes compared: 320 and 300" in text
        teacher = write_teacher(tmp_path / "other", None, vocab_size=5000)
        with pytest.raises(ValueError, match=r"has no tokenizer and 5000 vocabulary entries, the corpus 300"):
            describe(corpus, distillation={"teacher": teacher})


RESUMES = [
    ({"noisy_embeddings": {"alpha": 5.0}}, {}, "noisy_embeddings.alpha was 5.0 and is None"),
    ({}, {"active_forgetting": {"every_steps": 7}}, "active_forgetting.every_steps was None and is 7"),
    (
        {"distillation": {"teacher": "a", "weight": 1.0}},
        {"distillation": {"teacher": "a", "weight": 2.0}},
        "distillation.weight was 1.0 and is 2.0",
    ),
    ({"distillation": {"teacher": "a"}}, {"distillation": {"teacher": "b", "sharded": True}}, ""),
]


@pytest.mark.parametrize(("saved", "wanted", "message"), RESUMES, ids=["noise", "forgetting", "weight", "place"])
def test_a_resume_keeps_the_baselines(
    corpus: Path, tmp_path: Path, saved: dict[str, Any], wanted: dict[str, Any], message: str
) -> None:
    of_saved = settings_with(corpus, **saved).model_dump(mode="json")
    found = CheckpointInfo(
        path=tmp_path, step=1, tokens=1, samples=1, world_size=1,
        manifest={"settings": of_saved, "extra": {"data_order": {}}},
    )  # fmt: skip
    corpora = SimpleNamespace(order=SimpleNamespace(fingerprint=dict))
    settings = settings_with(corpus, **wanted)
    layout = SimpleNamespace(world_size=1)
    parts: Any = SimpleNamespace(settings=settings, layout=layout, corpora=corpora, teacher=None)
    if not message:
        _refuse_other_run(parts, found)
        return
    with pytest.raises(RuntimeError, match=re.escape(message)):
        _refuse_other_run(parts, found)


class TestLoading:
    @pytest.mark.parametrize(("precision", "dtype"), [(None, torch.float32), ("bf16", torch.bfloat16)])
    def test_frozen_in_its_precision(self, corpus: Path, tmp_path: Path, precision: str | None, dtype: Any) -> None:
        teacher = write_teacher(tmp_path, None)
        settings = settings_with(corpus, distillation={"teacher": teacher, "precision": precision})
        assert settings.distillation is not None
        plan = plan_teacher(settings.distillation, vocabulary=VOCABULARY, sequence_length=8, tokenizer=tmp_path)
        loaded = load_teacher(settings, plan.config)
        assert not loaded.training
        assert all(p.dtype == dtype and not p.requires_grad for p in loaded.parameters())

    @pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "of another width"])
    def test_weights_that_are_damaged(self, corpus: Path, tmp_path: Path, damage: str) -> None:
        teacher = write_teacher(tmp_path, None)
        settings, weights = settings_with(corpus, distillation={"teacher": teacher}), tmp_path / "model.safetensors"
        config = AutoConfig.from_pretrained(tmp_path)
        whole = weights.read_bytes()
        if damage == "of another width":
            config.n_embd *= 2
        else:
            weights.write_bytes({"truncated": whole[:-100], "empty": b"", "garbage": b"\xff" * 5000}[damage])
        with pytest.raises(ValueError, match=r"^distillation\.teacher: the weights of .* do not load \(\w+: "):
            load_teacher(settings, config)

    @pytest.mark.parametrize(
        "fields", [[], {"n_head": 0}, {"activation_function": "none"}, {"n_embd": "wide"}, {"dtype": "float7"}]
    )
    def test_a_config_that_makes_no_model(self, corpus: Path, tmp_path: Path, fields: Any) -> None:
        teacher = write_teacher(tmp_path, corpus / "tokenizer")
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields if isinstance(fields, dict) else fields))
        with pytest.raises(ValueError, match=r"^distillation\.teacher: '.*' cannot be loaded \(\w+"):
            describe(corpus, distillation={"teacher": teacher})

    def test_weights_that_are_missing(self, corpus: Path, tmp_path: Path) -> None:
        student("llama", vocab_size=VOCABULARY).model.save_pretrained(tmp_path)  # without the head
        settings = settings_with(corpus, distillation={"teacher": str(tmp_path)})
        config = AutoConfig.from_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"^distillation\.teacher: .* lacks 1 weights .* lm_head\.weight"):
            load_teacher(settings, config)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"^distillation\.teacher: the weights of .* do not load"):
            load_teacher(settings, config)
