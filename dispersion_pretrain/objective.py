"""The training objective: cross-entropy plus the dispersion of sampled, gathered hidden states.

`TrainingModule` is what the engine wraps: in training it returns `LossTerms`, of which one scalar is differentiable;
in evaluation mode it returns what validation and the condensation measurement read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dispersion_pretrain.config import DispersionSettings
from dispersion_pretrain.dispersion import pooled_dispersion
from dispersion_pretrain.distributed import counter_hash
from dispersion_pretrain.pair_sums import DispersionOptions


class LossTerms(NamedTuple):
    """What one micro-step yields on one rank. `total` is differentiable, the rest is detached and stays on the
    device.
    """

    total: Tensor  # scalar; averaged over ranks and accumulation micro-steps it is the step's objective
    cross_entropy: (
        Tensor  # scalar: this rank's share of the step's mean, so summed over ranks and micro-steps / their number
    )
    dispersion: Tensor  # scalar: mean over this rank's pools and the chosen layers; 0 where the term is off
    mean_cosine: Tensor  # (chosen layers,) unclamped mean cosine within the pools
    clamped_share: Tensor  # (chosen layers,) share of pairs beyond the clamp


class EvaluationOutputs(NamedTuple):
    """What one batch yields in evaluation mode."""

    cross_entropy_sums: Tensor  # (micro_batch,) summed over each sequence's targets
    logits: Tensor  # (micro_batch, sequence_length, vocabulary)
    hidden_states: tuple[Tensor, ...]  # L + 1 of (micro_batch, sequence_length, dim); the last is after the final norm


class StepContext(NamedTuple):
    """What a micro-step must know besides its batch."""

    step: int  # 0-based optimizer step
    targets: float | Tensor  # predicted tokens of the whole global batch; a tensor stays on the device
    shares: int  # world size x accumulation: the engine averages this many contributions
    coefficient: float  # of the dispersion term at this step; 0 skips it on all ranks alike


class DispersionTerm(nn.Module):
    """Samples positions, gathers embeddings over the pool's ranks, and averages the loss over pools and layers."""

    def __init__(
        self,
        settings: DispersionSettings,
        *,
        layers: list[int],
        seed: int,
        pools_per_rank: int,
        pool_group: dist.ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.options = DispersionOptions(**{key: getattr(settings, key) for key in DispersionOptions._fields})
        self.layers = layers
        self.seed = seed
        self.pools_per_rank = pools_per_rank
        self.pool_group = pool_group

    # Collectives with host-side group objects: the compiled model stops here, at one boundary behind the last block.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self, hidden_states: tuple[Tensor, ...], sample_index: Tensor, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Term of this micro-step.

        Args:
            hidden_states: L + 1 of (micro_batch, sequence_length, dim), as transformers returns them.
            sample_index: (micro_batch,) position of each sequence in the global stream.

        Returns:
            loss: scalar, mean over this rank's pools and the chosen layers;
            mean_cosine, clamped_share: (chosen layers,), detached.

        Collective: one all-gather and one all-reduce over the pool's group, for all layers together, when ranks share a
        pool; none in the backward pass.
        """
        settings = self.settings
        micro_batch, length, dim = hidden_states[0].shape
        layers = torch.tensor(self.layers, device=sample_index.device)
        positions = sample_positions(
            self.seed, step, sample_index, layers, num_tokens=settings.tokens_per_sequence, sequence_length=length
        )
        sampled = torch.stack(
            [
                hidden_states[layer].gather(1, positions[i].unsqueeze(-1).expand(-1, -1, dim))
                for i, layer in enumerate(self.layers)
            ]
        )  # (layers, micro_batch, m, dim)
        sets = sampled.reshape(len(self.layers) * self.pools_per_rank, -1, dim)
        terms = pooled_dispersion(sets, group=self.pool_group, options=self.options)
        mean_cosine = terms.mean_cosine.view(len(self.layers), -1).mean(1)
        clamped_share = terms.clamped_share.view(len(self.layers), -1).mean(1)
        return terms.loss.mean(), mean_cosine, clamped_share


class TrainingModule(nn.Module):
    """A causal language model together with its objective."""

    def __init__(self, model: nn.Module, dispersion: DispersionTerm | None) -> None:
        super().__init__()
        self.model = model
        self.dispersion = dispersion

    def forward(
        self, input_ids: Tensor, sample_index: Tensor | None = None, context: StepContext | None = None
    ) -> LossTerms | EvaluationOutputs:
        """One micro-batch: `LossTerms` with a context, `EvaluationOutputs` without.

        Args:
            input_ids: (micro_batch, sequence_length) int64. Token t is the target of tokens before it.
            sample_index: (micro_batch,) int64, needed with a context.

        Collective: as `DispersionTerm`, when the coefficient is not 0.
        """
        term = self.dispersion if context is not None and context.coefficient > 0 else None
        outputs = self.model(
            input_ids=input_ids, use_cache=False, output_hidden_states=context is None or term is not None
        )
        if context is None:
            sums = token_cross_entropy(outputs.logits, input_ids).view(input_ids.shape[0], -1).sum(1)
            return EvaluationOutputs(sums, outputs.logits, outputs.hidden_states)
        cross_entropy = token_cross_entropy(outputs.logits, input_ids).sum() * (context.shares / context.targets)
        empty = cross_entropy.new_zeros(0)
        if term is None:
            zero = cross_entropy.new_zeros(())
            return LossTerms(cross_entropy, cross_entropy.detach(), zero, empty, empty)
        dispersion, mean_cosine, clamped_share = term(outputs.hidden_states, sample_index, context.step)
        total = cross_entropy + context.coefficient * dispersion
        return LossTerms(total, cross_entropy.detach(), dispersion.detach(), mean_cosine, clamped_share)


def token_cross_entropy(logits: Tensor, input_ids: Tensor) -> Tensor:
    """Cross-entropy in nats of each predicted token, float32.

    Args:
        logits: (batch, length, vocabulary) of any float type.
        input_ids: (batch, length).

    Returns:
        (batch * (length - 1),), in order.
    """
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), reduction="none")


def sample_positions(
    seed: int, step: int, sample_index: Tensor, layers: Tensor, *, num_tokens: int, sequence_length: int
) -> Tensor:
    """Draw token positions of each sequence, uniformly and without replacement, by counter.

    The draw is a function of (seed, step, sample, layer) alone: no generator is touched, recompute and resume draw the
    same, and how samples lie on ranks does not matter.

    Args:
        sample_index: (samples,) int64 global positions in the stream.
        layers: (layers,) int64.
        num_tokens: positions a sequence, at most `sequence_length`.

    Returns:
        (layers, samples, num_tokens) int64 positions, in no particular order.
    """
    token = torch.arange(sequence_length, device=sample_index.device)
    bits = counter_hash(seed, step, sample_index[None, :, None], layers[:, None, None], token)
    low_bits = (sequence_length - 1).bit_length()
    keys = ((bits >> low_bits) << low_bits) | token  # all keys differ, so the order is the same on every device
    return keys.topk(num_tokens, dim=-1, sorted=False).indices
