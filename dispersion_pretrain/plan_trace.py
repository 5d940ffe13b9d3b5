"""How much memory a micro-step takes, from the training module itself, run on tensors that are only shapes.

Forward and backward pass run as in training, recompute and dispersion term included, and every storage that an
operation makes is counted from its birth to its end. So no formula for any architecture is needed, and what is easily
forgotten is in: float32 copies within norms, the logits' float32 copy, its log-softmax and their gradients.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from dispersion_pretrain.baselines import NoisyEmbeddings
from dispersion_pretrain.config import Settings
from dispersion_pretrain.loss_head import CrossEntropyHead, rows_at_once
from dispersion_pretrain.model import build_model, has_bare_head
from dispersion_pretrain.objective import DispersionTerm, StepContext, TrainingModule
from dispersion_pretrain.plan_work import Work, WorkCounter

Phase = Literal["forward", "term", "backward"]


class Moment(NamedTuple):
    """The highest point of a stretch of a micro-step; in the backward pass a stretch ends with a gradient."""

    phase: Phase
    num_bytes: float  # alive, without parameters and without gradients that are complete
    logits_bytes: float  # of these: the logits, and all copies and gradients of them
    gradients: int  # numbers of the gradients that were complete before


class Parameter(NamedTuple):
    """One trainable parameter."""

    name: str
    shape: tuple[int, ...]


class MicroStep:
    """A training module that can be traced.

    From some micro-batch on every moment, and the work, grow linearly, so that two traces tell all larger ones.
    Micro-batches of whole pools grow a pool at a time.
    """

    def __init__(
        self,
        parameters: tuple[Parameter, ...],
        vocabulary: int,
        linear_from: int,
        pool_sequences: int,
        trace: Callable[[int], list[Moment]],
        count: Callable[[int], Work],
    ) -> None:
        """`trace` and `count` take a micro-batch; what they give grows linearly from one of `linear_from` on."""
        self.parameters, self.vocabulary = parameters, vocabulary
        self._linear_from, self._pool_sequences = linear_from, pool_sequences
        self._trace, self._count = functools.cache(trace), functools.cache(count)

    def at(self, micro_batch: int) -> list[Moment]:
        """The moments of a micro-batch of so many sequences; seconds, when two new sizes have to be traced."""
        unit = self._pool_sequences if micro_batch % self._pool_sequences == 0 else 1
        first = -(-self._linear_from // unit) * unit
        if micro_batch <= first + unit:
            return self._trace(micro_batch)
        units = (micro_batch - first) // unit
        return [
            Moment(
                small.phase,
                _extended(small.num_bytes, large.num_bytes, units),
                _extended(small.logits_bytes, large.logits_bytes, units),
                small.gradients,
            )
            for small, large in zip(self._trace(first), self._trace(first + unit), strict=True)
        ]

    def work(self, micro_batch: int) -> Work:
        """What a micro-batch of so many sequences computes."""
        first = self._linear_from
        if micro_batch <= first + 1:
            return self._count(micro_batch)
        pairs = zip(self._count(first), self._count(first + 1), strict=True)
        return Work(*(_extended(small, large, micro_batch - first) for small, large in pairs))

    @property
    def num_parameters(self) -> int:
        """Numbers of all parameters; tied ones once."""
        return sum(torch.Size(parameter.shape).numel() for parameter in self.parameters)


def _extended(small: float, large: float, units: int) -> float:
    return small + units * (large - small)


def trace_micro_step(settings: Settings, hub_config: PretrainedConfig, layers: list[int]) -> MicroStep:
    """Make the training module of shapes alone, which takes no memory, to be traced at any micro-batch.

    The dispersion term is traced with this rank's own embeddings as the pool. What others send, and the teacher of
    distillation, is left to the caller. A compiled model is traced as if it were not: compiling saves a part.

    Args:
        layers: hidden states of the dispersion term; empty without one.

    Raises:
        ValueError: transformers cannot build the model.
    """
    # Shapes alone do not tell what a head computes. The teacher's divergence reads whole logits.
    in_pieces = settings.model.loss_head == "pieces" and settings.distillation is None and has_bare_head(hub_config)
    linear_from = 2  # the last position of a single sequence is cut off without a copy
    if in_pieces:  # and with fewer than two pieces of the loss head these are smaller
        rows = rows_at_once(hub_config.hidden_size)
        linear_from = max(linear_from, -(-2 * rows // (settings.data.sequence_length - 1)))
    pool_sequences = 1 if settings.dispersion is None else settings.dispersion.pool_sequences
    mode = FakeTensorMode()
    with mode:
        module = _module(settings, hub_config, layers, in_pieces=in_pieces)
        parameters = tuple(
            Parameter(name, tuple(parameter.shape))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        )

    def trace(micro_batch: int) -> list[Moment]:
        if module.dispersion is not None:
            module.dispersion.pools_per_rank = max(1, micro_batch // pool_sequences)
        with mode:
            return _moments(module, settings, micro_batch, hub_config.vocab_size)

    def count(micro_batch: int) -> Work:
        with mode:
            return _work(module, settings, micro_batch)

    return MicroStep(parameters, hub_config.vocab_size, linear_from, pool_sequences, trace, count)


def _module(settings: Settings, hub_config: PretrainedConfig, layers: list[int], *, in_pieces: bool) -> TrainingModule:
    """The training module as the engine has it, without a weight and without other ranks."""
    # liger's kernels keep fewer tensors than torch's, and there may be no GPU here.
    attention = "eager" if settings.model.attention == "eager" else "sdpa"  # the fused kinds keep the same tensors
    changes = {"pretrained": None, "attention": attention, "loss_head": "whole", "kernels": "torch"}
    model: Any = build_model(settings.model.model_copy(update=changes), hub_config)
    if in_pieces:
        CrossEntropyHead.take_over(model.get_output_embeddings())
    term = None
    if settings.dispersion is not None and settings.dispersion.coefficient > 0:
        term = DispersionTerm(
            settings.dispersion, layers=layers, seed=settings.run.seed, pools_per_rank=1, pool_group=None
        )
    noise = None
    if settings.noisy_embeddings is not None:
        noise = NoisyEmbeddings(settings.noisy_embeddings, seed=settings.run.seed)
    module = TrainingModule(model, term, noise=noise).train()
    if settings.model.precision == "bf16":
        _cast_to_bfloat16(module)
    return module


def _cast_to_bfloat16(module: nn.Module) -> None:
    """`module.bfloat16()`, which cannot exchange tensors that are only shapes; tied parameters stay tied."""
    cast: dict[nn.Parameter, nn.Parameter] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter not in cast:
                cast[parameter] = nn.Parameter(parameter.detach().bfloat16(), requires_grad=parameter.requires_grad)
            setattr(owner, name, cast[parameter])
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point():
                setattr(owner, name, buffer.bfloat16())


def _moments(module: TrainingModule, settings: Settings, micro_batch: int, vocabulary: int) -> list[Moment]:
    counter = LiveBytes([*module.parameters(), *module.buffers()], vocabulary)
    moments: list[Moment] = []
    gradients = 0

    def end(phase: Phase) -> None:
        moments.append(Moment(phase, *counter.take_peak(), gradients))

    def drop(parameter: Tensor) -> None:
        nonlocal gradients
        end("backward")
        gradients += parameter.numel()
        parameter.grad = None

    hooks: list[Any] = [
        parameter.register_post_accumulate_grad_hook(drop)
        for parameter in module.parameters()
        if parameter.requires_grad
    ]
    if module.dispersion is not None:
        hooks.append(module.dispersion.register_forward_pre_hook(lambda *_: end("forward")))
        hooks.append(module.dispersion.register_forward_hook(lambda *_: end("term")))
    coefficient = settings.dispersion.coefficient if settings.dispersion is not None else 0.0
    with _fused_attention(None), counter:
        total = _loss(module, settings, micro_batch, coefficient)
        end("forward")
        total.backward()
        end("backward")
    for hook in hooks:
        hook.remove()
    return moments


def _loss(module: TrainingModule, settings: Settings, micro_batch: int, coefficient: float) -> Tensor:
    length = settings.data.sequence_length
    context = StepContext(step=0, targets=float(micro_batch * (length - 1)), shares=1, coefficient=coefficient)
    input_ids = torch.zeros(micro_batch, length, dtype=torch.int64)
    return module(input_ids, torch.arange(micro_batch), context).total


def _work(module: TrainingModule, settings: Settings, micro_batch: int) -> Work:
    """Of a micro-step without the term, whose cost depends on the ranks of its pool."""
    counter = WorkCounter()
    with _fused_attention(counter), counter:
        _loss(module, settings, micro_batch, 0.0).backward()
    module.zero_grad()
    return counter.work


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, while they live."""

    def __init__(self, known: list[Tensor], vocabulary: int) -> None:
        """`known` tensors are not counted; a tensor (rows, vocabulary) counts as logits, or as a copy of them."""
        super().__init__()
        self._vocabulary = vocabulary
        self._alive = {True: 0, False: 0}  # logits, others
        self._peak = (0, 0)  # all, logits
        self._seen: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        for tensor in known:
            self._seen[tensor.untyped_storage()] = True

    def take_peak(self) -> tuple[float, float]:
        """The highest count since the last call, and the logits' part in it."""
        (total, logits), self._peak = self._peak, (sum(self._alive.values()), self._alive[True])
        return float(total), float(logits)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = function(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, Tensor):
                self._count(output)
        return outputs

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = True
        is_logits = tensor.dim() > 1 and tensor.shape[-1] == self._vocabulary
        self._alive[is_logits] += storage.nbytes()
        self._peak = max(self._peak, (sum(self._alive.values()), self._alive[True]))
        weakref.finalize(storage, self._end, is_logits, storage.nbytes())

    def _end(self, is_logits: bool, num_bytes: int) -> None:
        self._alive[is_logits] -= num_bytes


class _FusedAttention(torch.autograd.Function):
    """What fused attention keeps: its inputs, its output and a float32 number a row; no matrix of scores."""

    @staticmethod
    def forward(ctx: Any, counter: WorkCounter | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Make the tensors of the forward pass."""
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        row_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, row_sums)
        ctx.counter = counter
        if counter is not None:
            counter.attention(query, key, value, backward=False)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Make the three gradients."""
        query, key, value, _, _ = ctx.saved_tensors
        if ctx.counter is not None:
            ctx.counter.attention(query, key, value, backward=True)
        return None, torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@contextmanager
def _fused_attention(counter: WorkCounter | None) -> Iterator[None]:
    """Let models call that instead of PyTorch's, which has no fused kind for tensors that are only shapes."""
    original = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = lambda query, key, value, *_, **__: _FusedAttention.apply(
        counter, query, key, value
    )
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original
