"""What a run comes to on a cluster, before there is one: memory, time, communication, checkpoints, cost.

Memory is derived (plan_memory.py); time rests on assumptions that stand in the machine's file (plan_machine.py).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

from dispersion_pretrain import metrics
from dispersion_pretrain.assembly import Plan
from dispersion_pretrain.config import Settings
from dispersion_pretrain.layout import BatchLayout, legal_micro_batches
from dispersion_pretrain.plan_machine import Machine
from dispersion_pretrain.plan_memory import Memory, memory, rank_shards
from dispersion_pretrain.plan_time import CheckpointTime, StepTime, Traffic, checkpoint_time, step_time, traffic
from dispersion_pretrain.plan_trace import MicroStep, trace_micro_step

SCALES = (8, 16, 32, 64, 128, 256, 512, 1024)  # GPUs of the table of scaling
_DAY_S = 86_400.0


@dataclass(frozen=True)
class Estimate:
    """A run on one number of GPUs with one micro-batch."""

    layout: BatchLayout
    memory: Memory
    fits: bool  # on the device and in the node's memory
    time: StepTime
    traffic: Traffic
    checkpoint: CheckpointTime
    tokens_per_s: float  # of the whole cluster
    mfu: float  # model FLOPs over all peaks, communication, update and stalls included
    days: float  # of the whole run, without failures, validation and waiting

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.days * 24 * self.layout.world_size


class Planner:
    """Plans a run for a machine. Nothing runs on a device, and no weight is in memory."""

    def __init__(self, settings: Settings, machine: Machine, *, nodes: int, gpus_per_node: int) -> None:
        """Check the settings for `nodes` x `gpus_per_node` ranks, as `--dry-run` does.

        A micro-batch of `auto` becomes the largest that fits by this plan. The corpora are read only where the model
        does not say its vocabulary.

        Raises:
            ValueError: as `Plan.make`.
        """
        says_vocabulary = settings.model.config is None or "vocab_size" in settings.model.config
        self.settings, self.machine = settings, machine
        self.nodes, self.gpus_per_node, self.world_size = nodes, gpus_per_node, nodes * gpus_per_node
        self.plan = Plan.make(settings, self.world_size, read_corpora=not says_vocabulary)
        term = settings.dispersion
        self._layers = len(self.plan.layers) if term is not None and term.coefficient > 0 else 0
        if settings.training.micro_batch == "auto":
            self.settings = self._with_micro_batch(self.largest_that_fits() or self.plan.layout.micro_batch)
            layout = BatchLayout.derive(self.settings, self.world_size)
            self.plan = dataclasses.replace(self.plan, layout=layout)

    @cached_property
    def trace(self) -> MicroStep:
        """The micro-step, to be traced."""
        return trace_micro_step(self.settings, self.plan.hub_config, self.plan.layers)

    @cached_property
    def chosen(self) -> Estimate:
        """The run as the settings have it."""
        return self.estimate(self.plan.layout)

    def estimate(self, layout: BatchLayout, settings: Settings | None = None) -> Estimate:
        """Memory and time of one layout; `settings` replace those of the run."""
        settings = settings or self.settings
        machine, size, teacher = self.machine, self.plan.size, self.plan.teacher
        teacher_parameters = teacher.parameters if teacher is not None else 0
        part = rank_shards(settings, layout, self.trace)
        needed = memory(
            settings,
            layout,
            self.trace,
            layers=self._layers,
            width=size.width,
            teacher_parameters=teacher_parameters,
            fused_update=machine.overlaps,
        )
        time = step_time(
            settings,
            layout,
            size,
            part,
            self.trace,
            machine,
            gpus_per_node=self.gpus_per_node,
            layers=self._layers,
            teacher_parameters=teacher_parameters,
        )
        tokens = settings.training.global_batch_tokens
        flops = tokens * metrics.model_flops_per_token(
            size.matmul_parameters, size.layers, size.attention_width, settings.data.sequence_length
        )
        return Estimate(
            layout=layout,
            memory=needed,
            fits=self.device_bytes(needed) <= machine.usable_bytes and self._host_bytes(needed, layout) <= self._host,
            time=time,
            traffic=traffic(settings, layout, part, layers=self._layers, width=size.width),
            checkpoint=checkpoint_time(settings, layout, part, machine),
            tokens_per_s=tokens / time.total,
            mfu=flops / time.total / layout.world_size / machine.peak(settings.model.precision),
            days=settings.num_steps * time.total / _DAY_S,
        )

    def device_bytes(self, needed: Memory) -> float:
        """What a GPU must have: tensors, and what is not PyTorch's."""
        return needed.total + self.machine.reserved_gib * 2**30

    @property
    def _host(self) -> float:
        return self.machine.host_memory_gib * 2**30

    def _host_bytes(self, needed: Memory, layout: BatchLayout) -> float:
        """Of a node: every rank builds the whole model in float32 first; later it has states and copies there."""
        building = 4 * self.trace.num_parameters
        return min(self.gpus_per_node, layout.world_size) * max(building, needed.host)

    def host_gib(self, estimate: Estimate) -> float:
        """Host memory that a node needs, in GiB."""
        return self._host_bytes(estimate.memory, estimate.layout) / 2**30

    def by_stage(self) -> dict[int, Estimate]:
        """The chosen micro-batch at every ZeRO stage; offloading as far as a stage can."""
        estimates = {}
        for stage in (0, 1, 2, 3):
            zero = self.settings.zero.model_copy(
                update={
                    "stage": stage,
                    "offload_optimizer": self.settings.zero.offload_optimizer and stage > 0,
                    "offload_parameters": self.settings.zero.offload_parameters and stage == 3,
                }
            )
            estimates[stage] = self.estimate(self.plan.layout, self.settings.model_copy(update={"zero": zero}))
        return estimates

    def grids(self, world_size: int | None = None) -> list[Estimate]:
        """Every legal micro-batch on so many GPUs, the smallest first; none where the batch does not divide."""
        ranks = world_size or self.world_size
        return [
            self.estimate(BatchLayout.derive(self._with_micro_batch(micro_batch), ranks))
            for micro_batch in legal_micro_batches(self.settings, ranks)
        ]

    def _with_micro_batch(self, micro_batch: int) -> Settings:
        training = self.settings.training.model_copy(update={"micro_batch": micro_batch})
        return self.settings.model_copy(update={"training": training})

    def largest_that_fits(self) -> int | None:
        """The largest legal micro-batch that fits; None: not even the smallest does."""
        return max((grid.layout.micro_batch for grid in self.grids() if grid.fits), default=None)

    def scaling(self) -> list[tuple[int, Estimate | str]]:
        """From 8 to 1,024 GPUs, and the number at hand: an estimate, or why there is none.

        With the run's micro-batch, or the next smaller one that is legal and fits.
        """
        rows: list[tuple[int, Estimate | str]] = []
        for gpus in sorted({*SCALES, self.world_size}):
            if gpus == self.world_size:
                rows.append((gpus, self.chosen))
                continue
            grids = self.grids(gpus)
            fitting = [g for g in grids if g.fits and g.layout.micro_batch <= self.plan.layout.micro_batch]
            if fitting:
                rows.append((gpus, fitting[-1]))
            else:
                rows.append((gpus, self._why_not(gpus, grids)))
        return rows

    def _why_not(self, gpus: int, grids: list[Estimate]) -> str:
        sequences = self.settings.global_batch_sequences
        if sequences % gpus:
            return f"{sequences:,} sequences a step do not divide"
        if not grids:
            return "pools fit no micro-batch"
        smallest = grids[0]
        if smallest.layout.micro_batch > self.plan.layout.micro_batch:
            return f"the smallest legal micro-batch is {smallest.layout.micro_batch}"
        device = self.device_bytes(smallest.memory)
        if device > self.machine.usable_bytes:
            return f"takes {device / 2**30:.0f} GiB a GPU"
        return f"takes {self.host_gib(smallest):.0f} GiB of host memory a node"


def steps_between_saves(estimate: Estimate) -> str:
    """For people."""
    every = estimate.checkpoint.every_steps
    return "only after the last step" if math.isinf(every) else f"every {every:,.0f} steps"
