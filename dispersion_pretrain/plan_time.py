"""Time of a step: computation at assumed rates, what ranks send each other, the update, checkpoints.

Computation is that of the traced training module: its matrix products at a share of the peak, and the reads and writes
of all other operations at a share of memory's bandwidth, one after the other; or, where a utilisation was measured,
model FLOPs at that.
Volumes are those of ZeRO's paper (arXiv 1910.02054, section 7) with one difference: DeepSpeed 0.19 all-reduces
gradients at stages 1 and 2 where the paper scatters them, so a rank sends 3 x the parameters a step instead of 2 x, and
at stage 2 it does so in every micro-step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dispersion_pretrain import metrics
from dispersion_pretrain.config import Settings
from dispersion_pretrain.engine import zero_options
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.model import ModelSize
from dispersion_pretrain.plan_machine import Machine, working_bytes
from dispersion_pretrain.plan_memory import Shards, checkpoint_bytes
from dispersion_pretrain.plan_trace import MicroStep

_BACKWARD_SHARE = 2 / 3  # of a micro-step's computation
# Bytes that an update reads and writes for each number, besides the working weight and the gradient in its own type:
# the master twice, both moments twice, the float32 gradient once.
_UPDATE_BYTES = 28
# Passes over all gradients, each read and written, before they are reduced: into .grad, into ZeRO's bucket, out of it.
_GRADIENT_COPIES = 3


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one optimizer step."""

    reduction: float  # of gradients
    parameters: float  # gathered
    pool: float  # embeddings

    @property
    def zero(self) -> float:
        """All of ZeRO's."""
        return self.reduction + self.parameters


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step; communication as far as nothing hides it."""

    compute: float
    term: float  # computation of the dispersion term
    zero: float  # ZeRO's communication
    pool: float  # the pool's
    update: float  # the optimizer's, and ZeRO's copies of gradients on the way there
    checkpoint: float  # stall of a save, spread over the steps between saves
    hidden: float  # communication that runs beside computation, no part of the total

    @property
    def total(self) -> float:
        """Sum of all that is not hidden."""
        return self.compute + self.term + self.zero + self.pool + self.update + self.checkpoint


@dataclass(frozen=True)
class CheckpointTime:
    """Of one checkpoint."""

    num_bytes: float
    stall_s: float  # training waits for a copy into host memory, or for the whole of it
    write_s: float  # in the background, or within the stall
    every_steps: float  # infinity: only after the last step


def traffic(settings: Settings, layout: BatchLayout, part: Shards, *, layers: int, width: int) -> Traffic:
    """What one rank sends in a step.

    Args:
        layers: of the dispersion term; 0 without one.
        width: of the hidden states.
    """
    stage, size, ranks = settings.zero.stage, working_bytes(settings), layout.world_size
    options = zero_options(settings, layout, part.whole)
    once = size * part.whole * (ranks - 1) / ranks
    if stage == 3:
        # What stays whole until the backward pass needs it again is not fetched twice.
        twice = min(1.0, max(0.0, 1.0 - options.max_reuse_distance / part.whole))
        reduction, parameters = once * layout.accumulation, once * (1 + twice) * layout.accumulation
    else:
        scatters = stage > 0 and options.reduce_scatter and not options.use_multi_rank_bucket_allreduce
        reduction = once * (1 if scatters else 2) * (layout.accumulation if stage == 2 else 1)
        parameters = once if stage else 0.0
    pool = 0.0
    if settings.dispersion is not None and layout.pool_ranks > 1:
        own = layers * layout.micro_batch * settings.dispersion.tokens_per_sequence * width * size
        pool = float(own * (layout.pool_ranks - 1) * layout.accumulation)
    return Traffic(reduction, parameters, pool)


def step_time(
    settings: Settings,
    layout: BatchLayout,
    size: ModelSize,
    part: Shards,
    trace: MicroStep,
    machine: Machine,
    *,
    gpus_per_node: int,
    layers: int,
    teacher_parameters: int = 0,
) -> StepTime:
    """The time of one optimizer step on `layout.world_size` GPUs.

    Args:
        part: what this layout leaves to a rank.
        layers: of the dispersion term; 0 without one.
        teacher_parameters: of distillation; 0 without one.
    """
    micro_steps = layout.accumulation
    compute = _compute_s(settings, layout, size, trace, machine, teacher_parameters) * micro_steps
    term = _term_s(settings, layout, machine, layers=layers, width=size.width) * micro_steps
    sent = traffic(settings, layout, part, layers=layers, width=size.width)
    links = _Links(machine, layout.world_size, gpus_per_node)
    options = zero_options(settings, layout, part.whole)
    rounds = micro_steps if settings.zero.stage >= 2 else 1
    reduction = links.seconds(sent.reduction, rounds * math.ceil(part.whole / options.reduce_bucket_size))
    fetches = 2  # one for each group of parameters
    if settings.zero.stage == 3:
        per_pass = max(size.layers, math.ceil(part.whole / max(1, options.prefetch_bucket_size)))
        fetches = math.ceil(per_pass * sent.parameters / max(1.0, sent.reduction)) * micro_steps
    fetching = links.seconds(sent.parameters, fetches)
    if settings.zero.offload_parameters:
        host_link = machine.host_link_gb_s * 1e9 * machine.host_efficiency
        fetching += sent.parameters / max(1, layout.world_size - 1) / host_link
    exposed = reduction + fetching
    if machine.overlaps and options.overlap_comm:
        hideable = compute if settings.zero.stage == 3 else _BACKWARD_SHARE * compute
        beside = exposed if settings.zero.stage == 3 else reduction
        exposed -= min(beside, hideable)
    pool_links = _Links(machine, layout.pool_ranks, gpus_per_node)
    pool = pool_links.seconds(sent.pool, 2 * micro_steps)  # the all-reduce is a matter of latency
    saving = checkpoint_time(settings, layout, part, machine)
    stepping = compute + term + exposed + pool
    update = _update_s(settings, layout, part, machine, gpus_per_node)
    every = saving.every_steps
    if settings.checkpoint.every_minutes is not None:
        every = min(every, max(1.0, settings.checkpoint.every_minutes * 60 / (stepping + update)))
    return StepTime(compute, term, exposed, pool, update, saving.stall_s / every, reduction + fetching - exposed)


def checkpoint_time(settings: Settings, layout: BatchLayout, part: Shards, machine: Machine) -> CheckpointTime:
    """Size of a checkpoint, how long training waits for it and how long it is written."""
    total, most = checkpoint_bytes(settings, layout, part)
    write = max(total / machine.storage_gb_s, most / machine.hash_gb_s) / 1e9
    copy = most / machine.pageable_gb_s / 1e9
    every = settings.checkpoint.every_steps
    return CheckpointTime(
        total, copy if settings.checkpoint.background else write, write, math.inf if every is None else float(every)
    )


def _compute_s(
    settings: Settings,
    layout: BatchLayout,
    size: ModelSize,
    trace: MicroStep,
    machine: Machine,
    teacher_parameters: int,
) -> float:
    """Of a micro-step; recompute adds a forward pass, a teacher its own."""
    tokens = layout.micro_batch * settings.data.sequence_length
    model_flops = tokens * metrics.model_flops_per_token(
        size.matmul_parameters, size.layers, size.attention_width, settings.data.sequence_length
    )
    with_teacher = 1 + 2 * teacher_parameters * tokens / model_flops
    peak = machine.peak(settings.model.precision)
    if machine.mfu is not None:
        every = int(settings.model.activation_checkpointing)
        recomputing = 1 + 1 / (3 * every) if every else 1.0
        return model_flops * (recomputing + with_teacher - 1) / (peak * machine.mfu)
    work = trace.work(layout.micro_batch)
    traffic_share = machine.compiled_traffic if settings.model.compile else 1.0
    products = work.product_flops / (peak * machine.product_efficiency)
    moving = traffic_share * work.moved_bytes / (machine.memory_gb_s * 1e9 * machine.traffic_efficiency)
    launches = traffic_share * work.operations * machine.launch_us * 1e-6
    return max(products + moving, launches) * with_teacher


def _term_s(settings: Settings, layout: BatchLayout, machine: Machine, *, layers: int, width: int) -> float:
    """Of a micro-step: two float32 products a pair and layer, and 16 bytes read and written for its elementwise part.

    A layer's hidden states get a gradient of their full size besides.
    """
    term = settings.dispersion
    if term is None or not layers:
        return 0.0
    own = layout.micro_batch * term.tokens_per_sequence
    pairs = layers * own * term.pool_sequences * term.tokens_per_sequence
    products = 4 * pairs * width / (machine.peak("float32") * (machine.mfu or machine.product_efficiency))
    states = layers * layout.micro_batch * settings.data.sequence_length * width * working_bytes(settings)
    return products + (16 * pairs + 3 * states) / (machine.memory_gb_s * 1e9)


def _update_s(settings: Settings, layout: BatchLayout, part: Shards, machine: Machine, gpus_per_node: int) -> float:
    """Gradients into ZeRO's buffers, and one pass over this rank's optimizer state, in the GPU's memory or in the
    host's, with the way there and back.
    """
    size, memory = working_bytes(settings), machine.memory_gb_s * 1e9
    copying = 0.0
    if layout.world_size > 1 or settings.zero.stage > 0:
        rounds = layout.accumulation if settings.zero.stage >= 2 else 1
        copied = 2 * _GRADIENT_COPIES * size * part.whole * rounds
        copying = copied / (memory * (machine.traffic_efficiency if machine.mfu is None else 1.0))
    num_bytes = part.own * (_UPDATE_BYTES + 2 * size)
    if not settings.zero.offload_optimizer:
        return copying + num_bytes / memory
    on_node = min(gpus_per_node, layout.world_size)
    host = machine.host_memory_gb_s * 1e9 * machine.host_efficiency / on_node
    link = machine.host_link_gb_s * 1e9 * machine.host_efficiency
    gradients = part.own * size * (layout.accumulation if settings.zero.stage >= 2 else 1)
    return copying + num_bytes / host + (gradients + part.own * size) / link


@dataclass(frozen=True)
class _Links:
    """What connects some ranks that fill nodes one after the other."""

    machine: Machine
    ranks: int
    gpus_per_node: int

    def seconds(self, num_bytes: float, rounds: int) -> float:
        """Time in which a rank sends so many bytes in so many ring collectives.

        Rings leave a node through all its adapters, so between nodes a rank has the bandwidth of all of them, but no
        more than within the node.
        """
        if self.ranks == 1:
            return 0.0
        bandwidth = self.machine.nvlink_gb_s
        if self.ranks > self.gpus_per_node:
            bandwidth = min(bandwidth, self.machine.internode_gb_s * self.gpus_per_node)
        latency = rounds * (self.ranks - 1) * self.machine.hop_us * 1e-6
        return num_bytes / (bandwidth * 1e9 * self.machine.link_efficiency) + latency
