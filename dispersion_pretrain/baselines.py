"""The baselines that the dispersion loss is compared with: noisy embeddings, active forgetting, distillation.

What is random in them is drawn by counter: switching one on leaves weights, data order and dropout of a run alone, and
recompute, resume or another layout draw the same. All of it is off where its section of the settings is null.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from dispersion_pretrain.config import (
    ActiveForgettingSettings,
    DistillationSettings,
    NoisyEmbeddingsSettings,
    Settings,
)
from dispersion_pretrain.distributed import counter_hash
from dispersion_pretrain.model import VOCABULARY_PADDING, refuse_own_code, short

# Counters of what is drawn, so that no two uses of (seed, step) ever share a stream.
_NOISE = int.from_bytes(b"noise", "big")
_FORGETTING = int.from_bytes(b"forget", "big")

_DIVERGENCE_BLOCK = 2**22  # logits that the divergence turns into float32 distributions at a time: they fit caches
_FINGERPRINT_BYTES = 2**20  # of either end of a weight file
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")


# ---- noisy embeddings


class NoisyEmbeddings:
    """Uniform noise on the output of the input embedding, in training only.

    Source: Jain et al., "NEFTune", arXiv 2310.05914, algorithm 1. There it is for instruction data; here every sequence
    is full, so that its length is the sequence length.
    """

    def __init__(self, settings: NoisyEmbeddingsSettings, *, seed: int) -> None:
        self.alpha = settings.alpha
        self.seed = seed

    def added(self, embeddings: Tensor, sample_index: Tensor, step: int) -> Tensor:
        """`embeddings` (micro_batch, length, width) with noise, in their own type; differentiable.

        Args:
            sample_index: (micro_batch,) position of each sequence in the global stream.
        """
        _, length, width = embeddings.shape
        noise = embedding_noise(self.seed, step, sample_index, length=length, width=width, alpha=self.alpha)
        return embeddings + noise.to(embeddings.dtype)


def embedding_noise(seed: int, step: int, sample_index: Tensor, *, length: int, width: int, alpha: float) -> Tensor:
    """Draw uniform noise in +-alpha / sqrt(length x width), by counter.

    A function of (seed, step, sample) alone, with the same bits on every device; no generator is touched, and nothing
    waits for the device (a seed for a generator would have to be read back from it).

    Args:
        sample_index: (samples,) int64 global positions in the stream.

    Returns:
        (samples, length, width) float32.
    """
    numbers = length * width
    words = torch.arange(-(-numbers // 2), device=sample_index.device)  # 64 bits make two numbers
    bits = counter_hash(seed, _NOISE, step, sample_index[:, None], words).view(torch.int32)[:, :numbers]
    bound = alpha / math.sqrt(numbers)
    return (bits.float() * (bound / 2**31)).reshape(-1, length, width)


# ---- active forgetting


def forgets_at(section: ActiveForgettingSettings | None, step: int, num_steps: int) -> bool:
    """Whether the input embeddings are re-initialised before the 0-based `step`.

    A function of the step's number: a run that stops and resumes just there resets once, after loading.
    """
    if section is None or step < 1 or step % section.every_steps:
        return False
    return step <= _last_reset_step(section, num_steps)


def count_resets(section: ActiveForgettingSettings, steps_done: int, num_steps: int) -> int:
    """Resets within the first `steps_done` steps."""
    return max(0, min(steps_done - 1, _last_reset_step(section, num_steps))) // section.every_steps


def _last_reset_step(section: ActiveForgettingSettings, num_steps: int) -> int:
    """The last step that may begin with a reset: those of the last phase may not."""
    last_phase = math.floor(section.last_phase * num_steps + 1e-9)  # 0.1 x 30 steps is 3.0000000000000004
    return num_steps - last_phase - 1


def fresh_embeddings(embedding: nn.Embedding, *, standard_deviation: float, seed: int, step: int) -> Tensor:
    """Draw a new matrix for `embedding` from a normal distribution around 0; the padding row, if any, is 0.

    Drawn on the CPU from a generator of its own, so that all ranks and kinds of devices have the same.

    Returns:
        (num_embeddings, embedding_dim) float32 on the CPU.

    Source: Chen et al., "Improving Language Plasticity via Pretraining with Active Forgetting", arXiv 2307.01163,
    section 3. There the embeddings have an optimizer and a learning-rate schedule of their own, which start anew at
    each reset; here the moments are cleared, and the one schedule goes on.
    """
    generator = torch.Generator().manual_seed(int(counter_hash(seed, _FORGETTING, step).item()))
    matrix = torch.randn(embedding.num_embeddings, embedding.embedding_dim, generator=generator) * standard_deviation
    if embedding.padding_idx is not None:
        matrix[embedding.padding_idx] = 0
    return matrix


def initial_deviation(config: PretrainedConfig) -> float:
    """Standard deviation of a model's initial embeddings.

    Raises:
        ValueError: its config does not say.
    """
    deviation = getattr(config, "initializer_range", None)
    if not isinstance(deviation, int | float):
        raise ValueError(
            f"active_forgetting: a config of {config.model_type} has no initializer_range. Embeddings are drawn anew "
            "with that standard deviation, so it is needed. Choose another model type or remove the section."
        )
    return float(deviation)


# ---- distillation


class Distillation:
    """A teacher, and the divergence of the student's predictions from its.

    Deliberately no nn.Module: as an attribute of the student's module it adds no parameter to the optimizer, to
    checkpoints or to exports, and `train()` does not reach it.

    Source: Hinton, Vinyals, Dean, arXiv 1503.02531, section 2, with the weight of the cross-entropy kept at 1.
    """

    def __init__(self, settings: DistillationSettings, teacher: Callable[..., Any], *, vocabulary: int) -> None:
        """`teacher` returns an output with logits; `vocabulary` is the number of entries of the corpus' tokenizer."""
        self.weight = settings.weight
        self.temperature = settings.temperature
        self.vocabulary = vocabulary
        self._teacher = teacher

    @torch.no_grad()
    def teacher_logits(self, input_ids: Tensor) -> Tensor:
        """(micro_batch, length, teacher's vocabulary) for `input_ids` (micro_batch, length).

        Collective: world, where the teacher is sharded.
        """
        logits: Tensor = self._teacher(input_ids=input_ids, use_cache=False).logits
        return logits

    def divergence(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """T^2 KL(teacher || student) in nats, summed over predicted positions: a scalar, float32.

        Over the whole vocabulary where both have one size; else (padding for speed differs) over the entries of the
        corpus' tokenizer, both distributions being normalised over these.

        Args:
            student_logits, teacher_logits: (micro_batch, length, vocabulary). The last position predicts nothing.
        """
        if student_logits.shape[-1] != teacher_logits.shape[-1]:
            student_logits = student_logits[..., : self.vocabulary]
            teacher_logits = teacher_logits[..., : self.vocabulary]
        student, teacher = (logits[:, :-1].flatten(0, 1) for logits in (student_logits, teacher_logits))
        loss: Tensor = _Divergence.apply(student, teacher, self.temperature)
        return loss


class _Divergence(torch.autograd.Function):
    """Forward KL with its gradient T (softmax(student / T) - softmax(teacher / T)) computed at once, in blocks of rows.

    Autograd would keep four float32 tensors of the size of the logits; here one is kept, in the logits' own type.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        rows = max(1, _DIVERGENCE_BLOCK // student.shape[-1])
        loss = student.new_zeros((), dtype=torch.float32)
        gradient = torch.empty_like(student)
        for first in range(0, student.shape[0], rows):
            block = slice(first, first + rows)
            log_student = torch.log_softmax(student[block].float() / temperature, dim=-1)
            log_teacher = torch.log_softmax(teacher[block].float() / temperature, dim=-1)
            probability = log_teacher.exp()
            loss += log_teacher.sub_(log_student).mul_(probability).sum() * temperature**2
            gradient[block] = log_student.exp_().sub_(probability).mul_(temperature)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient.dtype), None, None


@dataclass(frozen=True)
class TeacherPlan:
    """What is known of a teacher before its weights are read."""

    config: PretrainedConfig
    parameters: int
    compared: str  # how it was found to speak the corpus' language
    fingerprint: str  # of its weights: a resume goes on with the same


def plan_teacher(
    section: DistillationSettings, *, vocabulary: int, sequence_length: int, tokenizer: Path | None
) -> TeacherPlan:
    """Check a teacher against the corpus; reads no weights.

    Args:
        vocabulary: entries of the corpus' tokenizer.
        tokenizer: local folder of it; None: the corpus is not read, and only sizes are compared.

    Raises:
        ValueError: no such model, too few positions, or another tokenizer.
    """
    name = section.teacher
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(config).num_parameters()
        vocabulary_of_teacher = config.get_text_config().vocab_size
    except Exception as error:  # whatever the files of one of transformers' many classes lead to
        refuse_own_code(f"distillation.teacher: {name!r}", error)
        raise ValueError(
            f"distillation.teacher: {name!r} cannot be loaded ({short(error)}). A local Hugging "
            "Face folder of a causal language model, such as launch/export_hf.py writes, or a name where the hub can "
            "be reached, is needed. Correct it, or export the teacher first."
        ) from None
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < sequence_length:
        raise ValueError(
            f"distillation.teacher: {name!r} has {positions} positions, data.sequence_length is {sequence_length}. The "
            "teacher reads the same sequences, so it needs as many. Choose another teacher or a corpus of shorter "
            "sequences."
        )
    compared = _compare_tokenizers(name, vocabulary_of_teacher, vocabulary=vocabulary, tokenizer=tokenizer)
    return TeacherPlan(config, parameters, compared, _fingerprint(name, config))


def _fingerprint(name: str, config: PretrainedConfig) -> str:
    """Tell teachers apart without reading gigabytes: the hub's commit, or size and both ends of each weight file."""
    folder = Path(name)
    if not folder.is_dir():
        return str(getattr(config, "_commit_hash", None))
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, size - _FINGERPRINT_BYTES))
            digest.update(file.read())
    return digest.hexdigest()


def _compare_tokenizers(name: str, teacher_vocabulary: int, *, vocabulary: int, tokenizer: Path | None) -> str:
    """Say what was compared; raise ValueError where the teacher's numbers do not mean the corpus' tokens."""
    cure = (
        "The divergence compares two distributions number by number. Choose a teacher with the corpus' tokenizer, or "
        f"prepare the corpus with the teacher's (--tokenizer {name})."
    )
    if teacher_vocabulary < vocabulary:
        raise ValueError(
            f"distillation.teacher: {name!r} has {teacher_vocabulary} vocabulary entries, the corpus {vocabulary}. At "
            f"least as many are needed. {cure}"
        )
    if tokenizer is None:
        return f"tokenizers not compared, vocabulary sizes are {teacher_vocabulary:,} and {vocabulary:,}"
    theirs = _tokens_by_number(name)
    if theirs is None:
        if teacher_vocabulary > vocabulary + VOCABULARY_PADDING:
            raise ValueError(
                f"distillation.teacher: {name!r} has no tokenizer and {teacher_vocabulary} vocabulary entries, the "
                f"corpus {vocabulary}. Up to {VOCABULARY_PADDING} more are taken for padding. {cure}"
            )
        return f"no tokenizer there, only vocabulary sizes compared: {teacher_vocabulary:,} and {vocabulary:,}"
    ours = _tokens_by_number(str(tokenizer))
    assert ours is not None, f"{tokenizer}: the corpus' tokenizer was checked file by file"
    different = [number for number in sorted(ours) if theirs.get(number) != ours[number]]
    if different:
        first = different[0]
        raise ValueError(
            f"distillation.teacher: the tokenizer of {name!r} is not the corpus': {len(different)} of {len(ours)} "
            f"entries differ, the first is {first}, {theirs.get(first)!r} there and {ours[first]!r} in the corpus. "
            f"All must agree. {cure}"
        )
    return f"tokenizers compared, all {len(ours):,} entries agree"


def _tokens_by_number(place: str) -> dict[int, str] | None:
    """A tokenizer's entries; None where a model has no tokenizer. Raises ValueError for one that does not load."""
    is_folder = Path(place).is_dir()
    if is_folder and not any(Path(place, name).exists() for name in _TOKENIZER_FILES):
        return None  # some versions of transformers would make an empty one from the model's type
    try:
        vocabulary = AutoTokenizer.from_pretrained(place, trust_remote_code=False).get_vocab()
    except Exception as error:  # transformers raises whatever a missing file leads to
        if not is_folder and isinstance(error, OSError | ValueError):
            return None
        raise ValueError(
            f"distillation.teacher: the tokenizer in {place!r} does not load ({str(error)[:300]}). It is compared with "
            "the corpus'. Export the teacher again, or remove the tokenizer's files to have only vocabulary sizes "
            "compared."
        ) from None
    return {number: token for token, number in vocabulary.items()}


def load_teacher(settings: Settings, config: PretrainedConfig) -> nn.Module:
    """Read the teacher's weights on the CPU: in evaluation mode, without gradients, in `distillation.precision`.

    Raises:
        ValueError: they do not load, or some are missing.
    """
    section = settings.distillation
    assert section is not None
    dtype = torch.bfloat16 if (section.precision or settings.model.precision) == "bf16" else torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            section.teacher, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # whatever transformers and the readers of its files make of damaged ones
        raise ValueError(
            f"distillation.teacher: the weights of {section.teacher!r} do not load ({short(error)}). Whole weights "
            "that fit its config are needed. Correct the folder or name, or export the teacher again."
        ) from None
    model, report = loaded
    if report["missing_keys"]:  # transformers would draw them at random, with a warning
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"distillation.teacher: {section.teacher!r} lacks {len(missing)} weights of a causal language model, "
            f"such as {missing[0]}. All are needed. Choose a whole one."
        )
    teacher: nn.Module = model.eval().requires_grad_(False)
    return teacher
