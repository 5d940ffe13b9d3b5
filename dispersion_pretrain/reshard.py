"""Weights and optimizer state of a checkpoint by parameter, whatever number of ranks and ZeRO stage wrote it.

DeepSpeed's own way from one layout to another, the universal checkpoint, is not used. Its conversion writes everything
to disk twice more and knows no stage 0; its loader at stage 3 takes no conversion of another stage and gives every
group of parameters the weight decay of the first. Here each rank maps the files of all ranks into memory and reads the
parts that it needs, so nothing is written and there is nothing that a kill could leave behind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dispersion_pretrain import distributed

KINDS = ("fp32", "exp_avg", "exp_avg_sq")  # the float32 weights, and Adam's two moments of them


class _Piece(NamedTuple):
    """Consecutive numbers of a parameter: where they begin in it, and the flat tensors that hold them from `offset`."""

    first: int
    numel: int
    offset: int
    tensors: Mapping[str, Tensor]


class SavedState:
    """What the ranks of a run saved, put together by parameter. `updates` is the optimizer's count of steps.

    Args:
        folder: with DeepSpeed's files.
        names: of the trainable parameters, in the optimizer's order.

    Raises:
        RuntimeError: a file lacks what is needed.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.updates = 0
        self.global_steps = 0
        self._folder = folder
        self._pieces: dict[str, list[_Piece]] = {}
        ranks = _by_rank(folder, "*zero_pp_rank_*_optim_states.pt")
        models = _by_rank(folder, "*_model_states.pt")
        try:
            model = _map(models[0])
            self._module: dict[str, Tensor] = model["module"]
            self.global_steps = int(model["global_steps"])
            for number, path in enumerate(ranks):
                optimizer = _map(path)["optimizer_state_dict"]
                if "fp32_flat_groups" in optimizer:
                    pieces = _of_stage_3(optimizer, model["param_shapes"], number, len(ranks))
                else:
                    pieces = _of_stages_1_and_2(optimizer)
                self._add(pieces)
            if not ranks:
                self._add(_of_stage_0(model, names))
        except (IndexError, KeyError) as error:
            raise RuntimeError(
                f"{folder}: {error!r} is missing in what DeepSpeed wrote. Checkpoints of ZeRO stages 0 to 3 with Adam "
                "can be read. Resume with the number of ranks and the zero settings that it was saved with."
            ) from error

    def _add(self, pieces: Iterator[tuple[str, int, int, dict[str, Any]]]) -> None:
        for name, offset, numel, state in pieces:
            known = self._pieces.setdefault(name, [])
            first = known[-1].first + known[-1].numel if known else 0  # ranks hold a parameter in their order
            known.append(_Piece(first, numel, offset, {kind: state[kind] for kind in KINDS if kind in state}))
            self.updates = max(self.updates, int(state.get("step", 0)))

    def numel(self, name: str) -> int:
        """How many numbers of a parameter were saved."""
        return sum(piece.numel for piece in self._pieces.get(name, ()))

    def read(self, kind: str, name: str, first: int, numel: int) -> Tensor:
        """Numbers `first` ... `first + numel - 1` of the flattened parameter, float32 on the CPU.

        Args:
            kind: one of `KINDS`. A moment that was never written, for want of an update, is 0.
        """
        found = torch.zeros(numel, dtype=torch.float32)
        for piece in self._pieces[name]:
            begin, end = max(first, piece.first), min(first + numel, piece.first + piece.numel)
            if begin < end and kind in piece.tensors:
                source = piece.tensors[kind].flatten().narrow(0, piece.offset + begin - piece.first, end - begin)
                found.narrow(0, begin - first, end - begin).copy_(source)
        return found

    def buffer(self, name: str) -> Tensor | None:
        """A tensor of the module that is no parameter; None where none was saved."""
        return self._module.get(name)


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """Files in the order of the ranks that wrote them."""

    def rank(path: Path) -> int:
        number = re.search(r"(?:pp|mp)_rank_(\d+)", path.name)
        return int(number[1]) if number else 0

    return sorted(folder.glob(pattern), key=rank)


def _map(path: Path) -> dict[str, Any]:
    """Open a file of torch.save; tensors are read from disk where they are touched."""
    state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return state


def _of_stages_1_and_2(optimizer: dict[str, Any]) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """A rank holds one consecutive part of all parameters of a group, laid end to end."""
    kept = optimizer["base_optimizer_state"]["state"]
    for group, places in enumerate(optimizer["param_slice_mappings"]):
        state = {"fp32": optimizer["single_partition_of_fp32_groups"][group], **kept[group]}
        for name, place in places.items():
            yield name, place.start, place.numel, state


def _of_stage_3(
    optimizer: dict[str, Any], shapes: list[dict[str, torch.Size]], rank: int, num_ranks: int
) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """A rank holds an equal part of every parameter, the last one padded."""
    kept = optimizer["optimizer_state_dict"]["state"]
    for group, shapes_of_group in enumerate(shapes):
        state, offset = {"fp32": optimizer["fp32_flat_groups"][group], **kept[group]}, 0
        for name, shape in shapes_of_group.items():
            numel = shape.numel()
            part = -(-numel // num_ranks)
            yield name, offset, max(0, min(part, numel - rank * part)), state
            offset += part


def _of_stage_0(model: dict[str, Any], names: Sequence[str]) -> Iterator[tuple[str, int, int, dict[str, Any]]]:
    """Every rank holds everything, and rank 0 wrote it."""
    optimizer = model["optimizer"]
    masters = [model["module"][name] for name in names]
    if "fp32_groups" in optimizer:  # bf16: the module's weights are rounded
        masters = [master for group in optimizer["fp32_groups"] for master in group]
        optimizer = optimizer["optimizer_state_dict"]
    for number, (name, master) in enumerate(zip(names, masters, strict=True)):
        yield name, 0, master.numel(), {"fp32": master, **optimizer["state"].get(number, {})}


# ---- loading


class _Place(NamedTuple):
    """Consecutive numbers of a parameter, and where they lie in a flat tensor of this rank."""

    name: str
    first: int  # in the flattened parameter
    offset: int  # in the flat tensor
    numel: int


@torch.no_grad()
def load_resharded(engine: Any, folder: Path, names: Sequence[str]) -> None:
    """Fill a DeepSpeed engine that has made no step: weights, their float32 masters, and the optimizer's state.

    Args:
        folder: with what DeepSpeed wrote.
        names: of the trainable parameters, in the optimizer's order.

    Collective: world.

    Raises:
        RuntimeError: what was saved is not this model's, or cannot be read; on every rank.
    """
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()  # stage 3: small parameters are whole on all ranks between steps
    with distributed.failing_together(f"{folder}: cannot be divided anew"):
        _fill(engine, SavedState(folder, names), names)
    _copy_masters_to_weights(engine)
    if hasattr(engine.optimizer, "checkpoint_event_epilogue"):
        engine.optimizer.checkpoint_event_epilogue()


def _fill(engine: Any, saved: SavedState, names: Sequence[str]) -> None:
    """Copy all but the working weights. No collective."""
    parameters = dict(engine.module.named_parameters())
    for name in names:
        numel = getattr(parameters[name], "ds_numel", parameters[name].numel())
        if saved.numel(name) != numel:
            raise RuntimeError(
                f"{name}: the checkpoint holds {saved.numel(name)} numbers of it, and the model has {numel}. A "
                "checkpoint of this model is needed. Choose another with --resume."
            )
    for name, buffer in engine.module.named_buffers():
        kept = saved.buffer(name)
        if kept is not None:
            buffer.copy_(kept)
    for flat, places in masters(engine, names):
        values = {kind: torch.zeros(flat.numel()) for kind in KINDS}  # 0 as well in what pads a flat tensor
        for kind, value in values.items():
            for name, first, offset, numel in places:
                value.narrow(0, offset, numel).copy_(saved.read(kind, name, first, numel))
        flat.copy_(values["fp32"].view_as(flat))
        state = engine.basic_optimizer.state[flat]
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = values[moment].view_as(flat).to(flat.device)
        state["step"] = _count(engine.basic_optimizer, saved.updates, flat.device)
    engine.global_steps = saved.global_steps
    engine.global_samples = saved.global_steps * engine.train_batch_size()


def masters(engine: Any, names: Sequence[str]) -> Iterator[tuple[Tensor, list[_Place]]]:
    """Every float32 tensor that this rank's optimizer updates, and what lies where in it."""
    parameters: dict[str, Any] = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() == 3:
        names_of = {parameter: name for name, parameter in parameters.items()}
        optimizer = engine.optimizer
        for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            places, offset = [], 0
            for parameter in group:
                part = parameter.ds_tensor.numel()
                first = part * dist.get_rank(parameter.ds_process_group)
                numel = max(0, min(part, parameter.ds_numel - first))  # the last rank's part is padded
                places.append(_Place(names_of[parameter], first, offset, numel))
                offset += part
            yield flat, places
    elif engine.zero_optimization_stage() > 0:
        parts = {name: parameters[name]._hp_mapping for name in names}  # None: none of it is on this rank
        for number, group in enumerate(engine.basic_optimizer.param_groups):
            places = []
            for name, part in parts.items():
                if part is not None and part.param_group_index == number:
                    own, there = part.lp_fragment_address, part.hp_fragment_address
                    places.append(_Place(name, own.start, there.start, own.numel))
            yield group["params"][0], places
    else:
        for name in names:
            master = unpartitioned_master(engine.optimizer, parameters[name])
            yield master, [_Place(name, 0, 0, master.numel())]


def unpartitioned_master(optimizer: Any, parameter: nn.Parameter) -> Tensor:
    """The float32 copy of a parameter at stage 0; the parameter itself where it is float32."""
    for working, full in zip(getattr(optimizer, "fp16_groups", []), getattr(optimizer, "fp32_groups", []), strict=True):
        for low, master in zip(working, full, strict=True):
            if low is parameter:
                return cast(Tensor, master)
    return parameter


def _count(optimizer: torch.optim.Optimizer, updates: int, device: torch.device) -> Tensor | int:
    """The optimizer's count of steps in the form in which it keeps one."""
    if not isinstance(optimizer, torch.optim.AdamW):
        return updates  # DeepSpeed's own Adam
    return torch.tensor(float(updates), device=device if optimizer.defaults["fused"] else "cpu")


def _copy_masters_to_weights(engine: Any) -> None:
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        for flat, group in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
            parts = flat.split([parameter.ds_tensor.numel() for parameter in group])
            for parameter, part in zip(group, parts, strict=True):
                parameter.ds_tensor.copy_(part)
    elif engine.zero_optimization_stage() > 0:
        optimizer.update_lp_params()
    else:
        for parameter in engine.module.parameters():
            parameter.copy_(unpartitioned_master(optimizer, parameter))
