"""Cross-entropy of a linear head without ever holding all its logits.

The logits of one micro-batch are often the largest tensors of a step: with 151,936 entries and 8,192 tokens each copy
takes 5 GB, and autograd keeps three. Here a few rows at a time become logits, loss and, at once, gradient; what is kept
for the backward pass has the sizes of the hidden states and of the head's matrix. The three matrix products are
autograd's own, so this costs no time; nothing is computed twice. What lies between them runs on a processor in parts
that fit its cache, and on a GPU in one compiled function: passes over memory would else take as long as the products in
bf16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_FEWEST_ROWS = 256
# Of a float32 temporary on a processor: 2 MiB. Half and double of it are within 5 % at 50,257 entries.
_NUMBERS_IN_CACHE = 512 * 1024


class CrossEntropyHead(nn.Linear):
    """A model's output head that also turns hidden states and targets into a loss.

    Called with targets as a module, so that ZeRO-3's hooks have its matrix whole around the call.
    """

    @classmethod
    def take_over(cls, head: nn.Module) -> None:
        """Make a plain linear head one of this class, in place: its parameters, their names and ties stay."""
        if type(head) is not nn.Linear:
            raise TypeError(f"head: {type(head).__name__} is no plain nn.Linear. Use the whole logits.")
        head.__class__ = cls

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits without targets; else the cross-entropy in nats.

        Args:
            hidden: (..., dim); with targets (tokens, dim).
            targets: (tokens,) int64.

        Returns:
            (..., vocabulary) logits; with targets, where gradients are wanted, a scalar: the sum over tokens,
            differentiable once; else (tokens,), that of each token. Losses are float32 (float64 stays).
        """
        if targets is None:
            return super().forward(hidden)
        if torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad):
            summed: Tensor = _SummedCrossEntropy.apply(hidden, self.weight, self.bias, targets)
            return summed
        with torch.no_grad():
            parts = [
                functional.cross_entropy(
                    _in_full(super(CrossEntropyHead, self).forward(rows)), wanted, reduction="none"
                )
                for rows, wanted in _pieces(hidden, targets)
            ]
        return torch.cat(parts)


def rows_at_once(dim: int) -> int:
    """As many rows as the model is wide: their logits then take no more memory than the gradient of the matrix, and
    adding to that gradient is no more traffic than the product itself.
    """
    return max(_FEWEST_ROWS, dim)


def _pieces(hidden: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    rows = rows_at_once(hidden.shape[1])
    return list(zip(hidden.split(rows), targets.split(rows), strict=True))


class _SummedCrossEntropy(torch.autograd.Function):
    """Loss and gradients in forward; backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """Sum over tokens of -log softmax(hidden weight^T + bias)[target]."""
        with torch.autocast(hidden.device.type, enabled=False):
            of_tokens = _sums_like(hidden[:, 0])
            of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            of_weight = _sums_like(weight) if ctx.needs_input_grad[1] else None
            of_bias = _sums_like(bias).zero_() if bias is not None and ctx.needs_input_grad[2] else None
            memory = hidden.new_empty(min(len(hidden), rows_at_once(hidden.shape[1])), len(weight))
            first = 0
            for rows, wanted in _pieces(hidden, targets):
                piece = slice(first, first + len(rows))
                logits = memory[: len(rows)]
                if bias is None:
                    torch.mm(rows, weight.t(), out=logits)
                else:
                    torch.addmm(bias, rows, weight.t(), out=logits)
                of_tokens[piece] = _turned_into_gradient(logits, wanted)
                if of_bias is not None:
                    of_bias += logits.sum(0, dtype=of_bias.dtype)
                if of_hidden is not None:
                    torch.mm(logits, weight, out=of_hidden[piece])
                if of_weight is not None:
                    _add_product(of_weight, logits, rows, is_first=first == 0)
                first = piece.stop
        ctx.gradients = of_hidden, of_weight, of_bias
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return of_tokens.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what forward left, in place: a second backward pass would find nothing."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("loss head: a second backward pass. One is possible. Run the forward pass again.")
        scaled = [
            None if gradient is None else gradient.mul_(grad_loss.to(gradient.dtype)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None


def _turned_into_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy (rows,) of logits (rows, vocabulary), which become its gradient in place."""
    if logits.is_cuda:
        return _compiled()(logits, targets)
    rows_at_a_time = _fitting_cache(logits, logits.shape[1])
    losses = []
    for part, wanted in zip(logits.split(rows_at_a_time), targets.split(rows_at_a_time), strict=True):
        full = _in_full(part)
        of_targets, largest = full.gather(1, wanted[:, None]), full.amax(1, keepdim=True)
        sums = full.sub_(largest).exp_().sum(1, keepdim=True)  # in place, as all that follows
        losses.append((sums.log() + largest - of_targets).squeeze(1))
        full.div_(sums)  # the probabilities, and from here on the gradient of the logits
        full.scatter_add_(1, wanted[:, None], torch.full_like(sums, -1.0))
        if full is not part:
            part.copy_(full)
    return torch.cat(losses)


@functools.cache
def _compiled() -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(_turned_at_once, dynamic=False)


def _turned_at_once(logits: Tensor, targets: Tensor) -> Tensor:
    """`_turned_into_gradient` for a compiler, which makes reductions and one more pass of it."""
    full = _in_full(logits)
    largest = full.amax(1, keepdim=True)
    powers = (full - largest).exp()
    sums = powers.sum(1, keepdim=True)
    losses = (sums.log() + largest - full.gather(1, targets[:, None])).squeeze(1)
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    logits.copy_(powers / sums - is_target.to(full.dtype))
    return losses


def _add_product(total: Tensor, gradient: Tensor, rows: Tensor, *, is_first: bool) -> None:
    """Add gradient^T rows to the total (vocabulary, dim), which holds nothing yet if `is_first`."""
    if total.dtype == rows.dtype:
        total.addmm_(gradient.t(), rows, beta=0.0 if is_first else 1.0)
        return
    entries_at_a_time = _fitting_cache(total, total.shape[1])
    for part, columns in zip(total.split(entries_at_a_time), gradient.split(entries_at_a_time, dim=1), strict=True):
        product = columns.t() @ rows
        if is_first:
            part.copy_(product)
        else:
            part.add_(product)


def _fitting_cache(tensor: Tensor, width: int) -> int:
    """Rows of a width to be worked on at a time: all on a GPU, whose kernels want much at once."""
    if tensor.untyped_storage().device.type != "cpu":  # that of a tensor that is only a shape is not
        return max(1, len(tensor))
    return max(1, _NUMBERS_IN_CACHE // width)


def _in_full(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sums_like(tensor: Tensor) -> Tensor:
    """Room for sums in float32, or float64: pieces are added up, which bf16 would round away."""
    return torch.empty_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
