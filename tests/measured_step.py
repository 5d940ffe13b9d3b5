"""What a real engine takes: bytes of its tensors by kind, the peak of a step, what ranks send, seconds."""

from __future__ import annotations

import gc
import inspect
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.comm import comm as deepspeed_comm
from torch import Tensor

from dispersion_pretrain import distributed
from dispersion_pretrain.assembly import dispersion_term
from dispersion_pretrain.config import Settings
from dispersion_pretrain.engine import DeepSpeedEngine
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.model import build_model, model_config
from dispersion_pretrain.objective import StepContext, TrainingModule
from dispersion_pretrain.plan_trace import LiveBytes
from small_engine import deal


class Measured(NamedTuple):
    """Of one rank; bytes, and seconds."""

    parameters: int
    masters: int
    moments: int
    tensors: int  # most that was alive in a step, without what was alive before it
    resident: int  # the same of the process, as the kernel counts it; needs MALLOC_MMAP_THRESHOLD_ to be small
    checkpoint: int  # what this rank hands out for a checkpoint
    reduced: float  # sent in a step: gradients
    gathered: float  # parameters
    pooled: float  # embeddings
    seconds: float  # of a step, the fastest: other work on the machine can only slow one


class Step:
    """A run's engine on this rank, without corpora: samples are random."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.layout = BatchLayout.derive(settings, distributed.world_size())
        hub_config = model_config(settings.model, vocabulary=None, sequence_length=settings.data.sequence_length)
        self.vocabulary, term = hub_config.vocab_size, settings.dispersion
        self.layers = term.layer_indices(hub_config.num_hidden_layers) if term is not None else []
        distributed.seed_everything(0)
        module = TrainingModule(
            build_model(settings.model, hub_config), dispersion_term(settings, self.layout, self.layers)
        )
        self.engine = DeepSpeedEngine(module, settings, self.layout)
        self.engine.train()

    def __call__(self, step: int) -> None:
        """Make one optimizer step."""
        settings, length = self.settings, self.settings.data.sequence_length
        sequences = settings.global_batch_sequences
        context = StepContext(
            step,
            sequences * (length - 1),
            self.layout.world_size * self.layout.accumulation,
            settings.dispersion.coefficient if settings.dispersion is not None else 0.0,
            tuple(self.layers),
        )
        rank = distributed.rank()
        for batch in deal(step, self.layout, rank, sequences=sequences, length=length, vocabulary=self.vocabulary):
            terms = self.engine(batch.input_ids, batch.sample_index, context)
            self.engine.backward(terms.total)
            self.engine.step()


def measure(settings: Settings, *, timed_steps: int = 0) -> Measured:
    """Measure on this rank, in the process group at hand. Collective: world."""
    step = Step(settings)
    for number in range(2):
        step(number)
    parameters, masters, moments = _states(step)
    taken: list[int] = []
    step.engine.save(lambda _, state: taken.append(_storages(_tensors(state))))
    with _counted_traffic(step) as sent:
        step(2)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step(3)
    resident = _status("VmHWM") - before
    known = [thing for thing in gc.get_objects() if isinstance(thing, Tensor) and thing.layout is torch.strided]
    counter = LiveBytes(known, step.vocabulary)
    del known
    with counter:
        step(4)
    tensors = int(counter.take_peak()[0])
    seconds = []
    for number in range(timed_steps):
        dist.barrier()
        begin = time.perf_counter()
        step(5 + number)
        seconds.append(time.perf_counter() - begin)
    step.engine.close()
    return Measured(
        parameters, masters, moments, tensors, resident, sum(taken), sent["reduced"], sent["gathered"], sent["pooled"],
        min(seconds, default=float("nan")),
    )  # fmt: skip


def _states(step: Step) -> tuple[int, int, int]:
    """Bytes of working parameters, masters and moments."""
    engine: Any = step.engine._engine
    every: list[Any] = list(step.engine.module.parameters())
    stage, optimizer = step.settings.zero.stage, engine.basic_optimizer
    working = [getattr(parameter, "ds_tensor", parameter) for parameter in every]
    if stage == 3:
        masters = list(engine.optimizer.fp32_partitioned_groups_flat)
        working += [parameter for parameter in every if parameter.numel() == parameter.ds_numel]
    else:
        masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = [kept for master in masters for kept in optimizer.state[master].values() if kept.numel() > 1]
    own = {parameter.data_ptr() for parameter in working}
    return _storages(working), _storages(m for m in masters if m.data_ptr() not in own), _storages(moments)


def _storages(tensors: Iterable[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Tensors of more than one number in a tree."""
    if isinstance(tree, Tensor):
        if tree.numel() > 1:
            yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


@contextmanager
def _counted_traffic(step: Step) -> Iterator[dict[str, float]]:
    """Count what a rank sends: a ring sends all but one part of the whole, an all-reduce does so twice."""
    sent = dict.fromkeys(("reduced", "gathered", "pooled"), 0.0)
    term: Any = step.engine.module.dispersion
    within: list[bool] = []  # the dispersion term, whose collectives are the pool's
    hooks = []
    if term is not None:
        hooks = [
            term.register_forward_pre_hook(lambda *_: within.append(True)),
            term.register_forward_hook(lambda *_: within.clear()),
        ]

    def counting(function: Callable[..., Any], kind: str, factor: int, whole: str) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def call(*arguments: Any, **options: Any) -> Any:
            given = signature.bind(*arguments, **options).arguments
            tensors = given[whole] if isinstance(given[whole], list) else [given[whole]]
            num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            group = given.get("group")
            ranks = dist.get_world_size(group)
            place = "pooled" if within else kind
            if num_bytes >= 1024:  # flags and norms are no traffic
                sent[place] += factor * num_bytes * (ranks - 1) / ranks
            return function(*arguments, **options)

        return call

    kinds = {  # function: what it moves, how often, the argument that is whole
        "all_reduce": ("reduced", 2, "tensor"),
        "reduce_scatter_tensor": ("reduced", 1, "input"),
        "all_gather_into_tensor": ("gathered", 1, "output_tensor"),
        "all_gather": ("gathered", 1, "tensor_list"),
    }
    places: list[tuple[Any, str, str]] = [(dist, name, name) for name in kinds]
    # DeepSpeed has noted these two when it started.
    places.append((deepspeed_comm.cdb, "all_gather_function", "all_gather_into_tensor"))
    places.append((deepspeed_comm.cdb, "reduce_scatter_function", "reduce_scatter_tensor"))
    originals = [getattr(holder, name) for holder, name, _ in places]
    for (holder, name, known_as), function in zip(places, originals, strict=True):
        setattr(holder, name, counting(function, *kinds[known_as]))
    try:
        yield sent
    finally:
        for (holder, name, _), function in zip(places, originals, strict=True):
            setattr(holder, name, function)
        for hook in hooks:
            hook.remove()
