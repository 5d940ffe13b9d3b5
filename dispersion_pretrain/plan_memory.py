"""Memory of one rank in training, as our engine and DeepSpeed 0.19 take it.

States by ZeRO stage are sums over the real parameters, with DeepSpeed's padding; activations, logits and what the
dispersion term keeps come from the trace of the training module (plan_trace.py). Every point of the micro-step, the
reduction of gradients and the update compete for the peak.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dispersion_pretrain.config import Settings
from dispersion_pretrain.engine import zero_options
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.plan_machine import working_bytes
from dispersion_pretrain.plan_trace import MicroStep, Parameter

_MASTER, _MOMENTS = 4, 8  # bytes a number: float32, and Adam's two
_ALIGNMENT = 2  # DeepSpeed's nccl_start_alignment_factor: flat groups of stages 1 and 2 are multiples of this x ranks
_UNSHARDED_BUCKET = 500_000_000  # numbers that DeepSpeed all-reduces at a time without ZeRO


@dataclass(frozen=True)
class Peak:
    """Bytes of one rank at one moment, beside what lasts."""

    at: str
    gradients: float = 0.0
    buckets: float = 0.0  # of ZeRO, with their copies while they are reduced
    activations: float = 0.0
    logits: float = 0.0  # with all copies and gradients of them
    pool: float = 0.0  # embeddings of other ranks
    update: float = 0.0  # copies that the update makes

    @property
    def total(self) -> float:
        """Sum of all."""
        return self.gradients + self.buckets + self.activations + self.logits + self.pool + self.update


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: what lasts, and the highest moment of a step."""

    parameters: float  # that stay with this rank between steps
    masters: float  # float32 copies that the optimizer updates
    moments: float  # Adam's
    gathered: float  # stage 3: parameters of other ranks that are whole here, at most
    teacher: float
    peak: Peak
    host: float  # in host memory: what is offloaded, and the copy from which a checkpoint is written

    @property
    def total(self) -> float:
        """What all tensors on the device take at the peak."""
        return self.parameters + self.masters + self.moments + self.gathered + self.teacher + self.peak.total


@dataclass(frozen=True)
class Shards:
    """Numbers (not bytes) that one rank holds."""

    whole: int  # of the model
    own: int  # of the optimizer's part, padding included; the whole model at stage 0
    working: int  # of parameters that stay with this rank between steps
    largest: int  # of the largest parameter


def shards(parameters: tuple[Parameter, ...], stage: int, world_size: int, persistence_threshold: int) -> Shards:
    """How ZeRO divides the parameters.

    Stages 1 and 2 flatten a group (matrices; vectors) and pad it; stage 3 divides each parameter by itself, and those
    with fewer numbers than the threshold are whole on every rank besides, unless a rank's part is all of them.
    """
    sizes = [math.prod(parameter.shape) for parameter in parameters]
    whole, largest = sum(sizes), max(sizes)
    if stage == 0:
        return Shards(whole, whole, whole, largest)
    if stage < 3:
        unit = _ALIGNMENT * world_size
        groups = {True: 0, False: 0}
        for size, parameter in zip(sizes, parameters, strict=True):
            groups[len(parameter.shape) >= 2] += size
        padded = sum(-(-group // unit) * unit for group in groups.values())
        return Shards(whole, padded // world_size, padded, largest)
    own = sum(-(-size // world_size) for size in sizes)
    persistent = sum(size for size in sizes if size < persistence_threshold and world_size > 1)
    return Shards(whole, own, own + persistent, largest)


def rank_shards(settings: Settings, layout: BatchLayout, trace: MicroStep) -> Shards:
    """`shards` of a run."""
    parameters = sum(math.prod(parameter.shape) for parameter in trace.parameters)
    threshold = zero_options(settings, layout, parameters).param_persistence_threshold
    return shards(trace.parameters, settings.zero.stage, layout.world_size, threshold)


def memory(
    settings: Settings,
    layout: BatchLayout,
    trace: MicroStep,
    *,
    layers: int,
    width: int,
    teacher_parameters: int = 0,
    fused_update: bool = True,
) -> Memory:
    """The memory of one rank.

    Args:
        layers: of the dispersion term; 0 without one.
        width: of the hidden states.
        teacher_parameters: of distillation; 0 without one.
        fused_update: Adam makes no copies, as on GPUs.
    """
    stage, size, offload = settings.zero.stage, working_bytes(settings), settings.zero
    part = rank_shards(settings, layout, trace)
    options = zero_options(settings, layout, part.whole)
    masters = float(_MASTER * part.own) if stage > 0 or size == 2 else 0.0
    moments = float(_MOMENTS * part.own)
    parameters, gathered = float(size * part.working), 0.0
    host = checkpoint_bytes(settings, layout, part)[1]
    if offload.offload_optimizer:
        host += masters + moments + (_MASTER + size) * part.own  # and gradients, in both types
        masters = moments = 0.0
    if offload.offload_parameters:
        host += size * part.own
        parameters -= size * part.own
    if stage == 3 and (layout.world_size > 1 or offload.offload_parameters):
        # A parameter stays whole until the next use is further away than so many numbers.
        gathered = float(size * min(part.whole, options.max_reuse_distance + part.largest))
    pool = pool_bytes(settings, layout, layers=layers, width=width)
    peaks = [*_micro_step(settings, layout, trace, part, pool), *_update(settings, part, fused_update)]
    teacher, teacher_logits = _teacher(settings, layout, trace, teacher_parameters)
    peaks = [replace(peak, logits=peak.logits + teacher_logits) if peak.logits else peak for peak in peaks]
    return Memory(parameters, masters, moments, gathered, teacher, max(peaks, key=lambda peak: peak.total), host)


def _micro_step(settings: Settings, layout: BatchLayout, trace: MicroStep, part: Shards, pool: float) -> Iterator[Peak]:
    """The moments of the last micro-step of an accumulation, which finds the gradients of those before."""
    names = {"forward": "forward pass", "term": "dispersion term", "backward": "backward pass"}
    stage, size = settings.zero.stage, working_bytes(settings)
    options, offloads = zero_options(settings, layout, part.whole), settings.zero.offload_optimizer
    accumulates = layout.accumulation > 1
    bucket = options.reduce_bucket_size * size * (2 if options.overlap_comm and stage < 3 else 1)
    if stage == 0:
        bucket = 0
    # A bucket is copied into one piece before it is sent.
    copy = size * min(part.whole, options.reduce_bucket_size if stage else _UNSHARDED_BUCKET)
    own = 0 if offloads else size * part.own
    staging = size * part.largest if offloads and stage in (1, 2) else 0

    def gradients(complete: int) -> float:
        if stage == 3:
            return own
        if stage == 2:
            has_begun = complete >= min(part.whole, options.reduce_bucket_size)
            return own * (accumulates + has_begun)
        return size * (part.whole if accumulates else complete)

    for moment in trace.at(layout.micro_batch):
        in_backward = moment.phase == "backward"
        reduces = in_backward and stage >= 2 and moment.gradients >= options.reduce_bucket_size
        yield Peak(
            names[moment.phase],
            gradients=gradients(moment.gradients) + staging,
            buckets=(bucket if in_backward or stage == 3 else 0) + (copy if reduces else 0),
            activations=moment.num_bytes - moment.logits_bytes,
            logits=moment.logits_bytes,
            pool=pool if moment.phase == "term" else 0.0,
        )
    held = gradients(part.whole) + staging
    if stage == 1:  # a bucket takes the gradients in, and those of this rank are copied out
        held += own - size * min(part.whole, options.reduce_bucket_size)
    yield Peak("reduction of gradients", gradients=held, buckets=bucket + copy)


def _update(settings: Settings, part: Shards, fused: bool) -> Iterator[Peak]:
    """The moment at which the optimizer has its gradients in float32."""
    stage, size = settings.zero.stage, working_bytes(settings)
    if settings.zero.offload_optimizer:
        return
    copies = 0
    if stage in (1, 2):
        copies += size * part.own  # flattened
    if size == 2:
        copies += _MASTER * part.own
    if not fused:
        copies += 2 * _MASTER * part.own
    yield Peak("update", gradients=float(size * part.own), update=float(copies))


def pool_bytes(settings: Settings, layout: BatchLayout, *, layers: int, width: int) -> float:
    """Embeddings that other ranks of a pool send, at their peak: as they came, in order, and in float32.

    0 where a rank holds whole pools: its own embeddings are part of the trace.
    """
    term, size = settings.dispersion, working_bytes(settings)
    if term is None or layout.pool_ranks == 1:
        return 0.0
    others = (term.pool_sequences - layout.micro_batch) * term.tokens_per_sequence
    in_order_and_in_float32 = size + 4 if size == 2 else 2 * size
    vectors_of_its_own = (
        8 if term.angle == "atan2" or term.variant in ("infonce_l2", "l2_repel", "decorrelation") else 4
    )
    return float(layers * others * width * max(in_order_and_in_float32, vectors_of_its_own))


def _teacher(settings: Settings, layout: BatchLayout, trace: MicroStep, parameters: int) -> tuple[float, float]:
    """Bytes of the teacher's weights, and of its logits with the divergence's gradient, of the student's size."""
    section = settings.distillation
    if section is None:
        return 0.0, 0.0
    size = 2 if (section.precision or settings.model.precision) == "bf16" else 4
    share = layout.world_size if section.sharded else 1
    one = layout.micro_batch * settings.data.sequence_length * trace.vocabulary
    return float(size * parameters / share), float(one * (size + working_bytes(settings)))


def checkpoint_bytes(settings: Settings, layout: BatchLayout, part: Shards) -> tuple[float, float]:
    """Bytes of a checkpoint: all of it, and the part of the rank that has most to copy and write.

    At stage 3 the masters stand for the weights; at the others rank 0 writes the working weights besides.
    """
    stage, size = settings.zero.stage, working_bytes(settings)
    state = float((_MOMENTS + (_MASTER if stage > 0 or size == 2 else 0)) * part.own)
    weights = 0.0 if stage == 3 else float(size * part.whole)
    return (layout.world_size if stage else 1) * state + weights, weights + state
