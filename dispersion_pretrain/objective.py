"""The training objective: cross-entropy plus the dispersion of sampled, gathered hidden states, and its baselines.

`TrainingModule` is what the engine wraps: in training it returns `LossTerms`, of which one scalar is differentiable;
in evaluation mode it returns what validation and the condensation measurement read.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dispersion_pretrain.baselines import Distillation, NoisyEmbeddings
from dispersion_pretrain.config import DispersionSettings
from dispersion_pretrain.dispersion import checked_variant, pooled_dispersion
from dispersion_pretrain.distributed import all_reduce_sum, counter_hash
from dispersion_pretrain.loss_head import CrossEntropyHead
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
    layer_dispersion: Tensor  # (chosen layers,) the same layer by layer
    mean_cosine: Tensor  # (chosen layers,) unclamped mean cosine within the pools
    clamped_share: Tensor  # (chosen layers,) share of pairs beyond the clamp
    distillation: Tensor  # scalar: this rank's share, as cross_entropy, and without its weight; 0 without a teacher


class EvaluationOutputs(NamedTuple):
    """What one batch yields in evaluation mode."""

    cross_entropy_sums: Tensor  # (micro_batch,) summed over each sequence's targets
    logits: Tensor | None  # (micro_batch, sequence_length, vocabulary) where they were asked for
    hidden_states: tuple[Tensor, ...]  # L + 1 of (micro_batch, sequence_length, dim); the last is after the final norm


class _Predicted(NamedTuple):
    """What a forward pass of the model yields."""

    losses: Tensor  # cross-entropy of each predicted token in order, or their sum
    logits: Tensor | None
    hidden_states: Any


class StepContext(NamedTuple):
    """What a micro-step must know besides its batch."""

    step: int  # 0-based optimizer step
    targets: float | Tensor  # predicted tokens of the whole global batch; a tensor stays on the device
    shares: int  # world size x accumulation: the engine averages this many contributions
    coefficient: float  # of the dispersion term at this step; 0 skips it on all ranks alike
    layers: tuple[int, ...] = ()  # that the dispersion term looks at, for messages


class GradientRatioCap:
    """Bounds the norm of the dispersion gradient by a multiple of the other terms', both at the last hidden state.

    The other terms are cross-entropy, and distillation with its weight where there is a teacher: what the term competes
    with. Taking the two apart would need a backward pass of the head for each.

    Both are known only when a step's backward passes are over, so a step is bounded by what the step before showed; the
    first step is not. The term's gradient is proportional to its coefficient, so the bound is one on the coefficient.
    """

    def __init__(self, cap: float) -> None:
        """`cap`: largest allowed ratio of the two norms, > 0."""
        self.cap = cap
        self.bound = math.inf  # of the next step's coefficient; part of a checkpoint
        self.ratio = math.nan  # that the last step had
        self._squares: Tensor | None = None  # of this step's gradients on this rank: (dispersion, the rest)

    def watch(self, tensor: Tensor, place: int) -> None:
        """Add the square of the gradient that reaches `tensor` to that of the dispersion term (0) or of the rest (1).

        The term is watched at what it draws from the last hidden state, the rest at what the head reads: at ZeRO stage
        3 these are two tensors, since DeepSpeed passes every output of a module through a function of its own.
        """
        if not tensor.requires_grad:
            return
        if self._squares is None:
            self._squares = torch.zeros(2, device=tensor.device)
        squares = self._squares

        def note(gradient: Tensor) -> None:
            squares[place] += gradient.float().square().sum()

        tensor.register_hook(note)  # type: ignore[no-untyped-call]

    def end_step(self, coefficient: float) -> None:
        """Take the ratio of a step that had this coefficient, and bound the next step's.

        Collective: world, one all-reduce of two numbers.

        Raises:
            RuntimeError: no gradient of the other terms has been seen; on every rank.
        """
        if self._squares is None:  # the term was off
            return
        of_dispersion, of_rest = all_reduce_sum(self._squares).sqrt().tolist()
        self._squares = None
        if of_rest == 0:
            raise RuntimeError(
                "dispersion.gradient_ratio_cap: no gradient of cross-entropy reached the last hidden state, so the "
                "ratio is not known. A model whose output embeddings read that state is needed. Remove the cap."
            )
        self.ratio = of_dispersion / of_rest
        if math.isfinite(self.ratio) and self.ratio > 0:
            self.bound = self.cap * coefficient / self.ratio


class DispersionTerm(nn.Module):
    """Samples positions, gathers embeddings over the pool's ranks, and averages the loss over pools and layers."""

    layer_numbers: Tensor  # (chosen layers,)

    def __init__(
        self,
        settings: DispersionSettings,
        *,
        layers: list[int],
        seed: int,
        pools_per_rank: int,
        pool_group: dist.ProcessGroup | None,
    ) -> None:
        """Set up the term of this rank.

        Args:
            layers: the chosen hidden states, 1 ... num_layers, ascending.
            pools_per_rank: whole pools in this rank's micro-batch; 1 where ranks share a pool.
            pool_group: the ranks that share a pool; None where this rank holds whole pools.

        Raises:
            ValueError: an unknown variant or an option that does not fit it.
        """
        super().__init__()
        self.settings = settings
        self.options = options_of(settings)
        self.layers = layers
        # On the device from the start: copied there in a step, the host would wait for all of the model's blocks.
        self.register_buffer("layer_numbers", torch.tensor(layers), persistent=False)
        self.seed = seed
        self.pools_per_rank = pools_per_rank
        self.pool_group = pool_group
        self.cap = None if settings.gradient_ratio_cap is None else GradientRatioCap(settings.gradient_ratio_cap)
        checked_variant(self.options)

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
            loss: (chosen layers,), mean over this rank's pools;
            mean_cosine, clamped_share: (chosen layers,), detached.

        Collective: one all-gather and one all-reduce over the pool's group, for all layers together, when ranks share a
        pool; none in the backward pass.

        Raises:
            ValueError: the chosen layers differ in width.
        """
        widths = {layer: hidden_states[layer].shape[-1] for layer in self.layers}
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"dispersion.layers: the chosen layers have widths {widths}. They must have one width, since their "
                "embeddings travel together. Choose layers of one width."
            )
        length, dim = hidden_states[self.layers[0]].shape[1:]
        num_tokens = self.settings.tokens_per_sequence
        positions = sample_positions(
            self.seed, step, sample_index, self.layer_numbers, num_tokens=num_tokens, sequence_length=length
        )
        sampled = [
            hidden_states[layer].gather(1, positions[place].unsqueeze(-1).expand(-1, -1, dim))
            for place, layer in enumerate(self.layers)
        ]  # of (micro_batch, m, dim)
        if self.cap is not None:
            self.cap.watch(sampled[-1], 0)
        sets = torch.stack(sampled).reshape(len(self.layers) * self.pools_per_rank, -1, dim)
        terms = pooled_dispersion(sets, group=self.pool_group, options=self.options)
        by_layer = [part.view(len(self.layers), -1).mean(1) for part in terms]
        return by_layer[0], by_layer[1], by_layer[2]


class TrainingModule(nn.Module):
    """A causal language model together with its objective."""

    def __init__(
        self,
        model: nn.Module,
        dispersion: DispersionTerm | None,
        *,
        noise: NoisyEmbeddings | None = None,
        distillation: Distillation | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.dispersion = dispersion
        self.noise = noise
        self.distillation = distillation
        whole: Any = model
        self.has_loss_head = isinstance(whole.get_output_embeddings(), CrossEntropyHead)
        self._cap: GradientRatioCap | None = None  # while a step is measured
        if dispersion is not None and dispersion.cap is not None:
            whole.get_output_embeddings().register_forward_pre_hook(self._watch_head)

    def _watch_head(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._cap is not None:
            self._cap.watch(inputs[0], 1)

    def forward(
        self,
        input_ids: Tensor,
        sample_index: Tensor | None = None,
        context: StepContext | None = None,
        with_logits: bool = False,
    ) -> LossTerms | EvaluationOutputs:
        """One micro-batch: `LossTerms` with a context, `EvaluationOutputs` without.

        Args:
            input_ids: (micro_batch, sequence_length) int64. Token t is the target of tokens before it.
            sample_index: (micro_batch,) int64, needed with a context.
            with_logits: of `EvaluationOutputs`: with those of the whole micro-batch.

        Collective: as `DispersionTerm`, when the coefficient is not 0; as the teacher, where it is sharded.
        """
        if context is None:
            self._cap = None
            predicted = self._predict(input_ids, {"input_ids": input_ids}, hidden_states=True, logits=with_logits)
            sums = predicted.losses.view(input_ids.shape[0], -1).sum(1)
            return EvaluationOutputs(sums, predicted.logits, predicted.hidden_states)
        # First, so that what the teacher needs besides its logits is free again when the student fills the memory.
        teacher_logits = self.distillation.teacher_logits(input_ids) if self.distillation is not None else None
        term = self.dispersion if context.coefficient > 0 else None
        self._cap = term.cap if term is not None else None
        predicted = self._predict(
            input_ids,
            self._inputs(input_ids, sample_index, context),
            hidden_states=term is not None,
            logits=teacher_logits is not None,
        )
        share = context.shares / context.targets
        cross_entropy = predicted.losses.sum() * share
        total, divergence = cross_entropy, cross_entropy.new_zeros(())
        if self.distillation is not None and teacher_logits is not None and predicted.logits is not None:
            divergence = self.distillation.divergence(predicted.logits, teacher_logits) * share
            total = total + self.distillation.weight * divergence
        dispersion = cross_entropy.new_zeros(())
        by_layer = mean_cosine = clamped_share = cross_entropy.new_zeros(0)
        if term is not None:
            by_layer, mean_cosine, clamped_share = term(predicted.hidden_states, sample_index, context.step)
            dispersion = by_layer.mean()
            total = total + context.coefficient * dispersion
        return LossTerms(
            total=total,
            cross_entropy=cross_entropy.detach(),
            dispersion=dispersion.detach(),
            layer_dispersion=by_layer.detach(),
            mean_cosine=mean_cosine,
            clamped_share=clamped_share,
            distillation=divergence.detach(),
        )

    def _predict(
        self, input_ids: Tensor, inputs: dict[str, Tensor], *, hidden_states: bool, logits: bool
    ) -> _Predicted:
        """Run the model; its logits stay pieces within the head wherever nothing else reads them."""
        model: Any = self.model
        options = {"use_cache": False, "output_hidden_states": hidden_states}
        if logits or not self.has_loss_head:
            outputs = model(**inputs, **options)
            losses = token_cross_entropy(outputs.logits, input_ids)
            return _Predicted(losses, outputs.logits if logits else None, outputs.hidden_states)
        outputs = model.base_model(**inputs, **options)
        read = outputs.last_hidden_state[:, :-1].flatten(0, 1)
        losses = model.get_output_embeddings()(read, input_ids[:, 1:].flatten())
        return _Predicted(losses, None, outputs.hidden_states)

    def _inputs(self, input_ids: Tensor, sample_index: Tensor | None, context: StepContext) -> dict[str, Tensor]:
        if self.noise is None or sample_index is None or not self.training:
            return {"input_ids": input_ids}
        model: Any = self.model
        embeddings = model.get_input_embeddings()(input_ids)
        return {"inputs_embeds": self.noise.added(embeddings, sample_index, context.step)}


def options_of(settings: DispersionSettings) -> DispersionOptions:
    """What of the settings concerns the loss of a set."""
    return DispersionOptions(**{key: getattr(settings, key) for key in DispersionOptions._fields})


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
