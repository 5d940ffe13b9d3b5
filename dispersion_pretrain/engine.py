"""DeepSpeed: the only file that imports it; reshard.py alone knows besides how it divides its state.

`DeepSpeedEngine` is what the train step drives. Its DeepSpeed settings are derived from ours and never mirrored; keys
that we do not name pass through `zero.overrides`.
"""

from __future__ import annotations

import datetime
import functools
import logging
import os
import pickle
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig, ZeroStageEnum, get_zero_config
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_grad, safe_set_local_fp32_param, safe_set_local_optimizer_state
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.nn import functional

from dispersion_pretrain import heartbeat, zero_gradients
from dispersion_pretrain.config import Settings
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.optim import parameter_groups
from dispersion_pretrain.reshard import load_resharded, unpartitioned_master

VERSION = deepspeed.__version__
_OLDEST_VERSION = (0, 19, 6)
_LARGEST_BUCKET = 500_000_000  # numbers; DeepSpeed's own
# DeepSpeed's meter of samples a second waits for the device at both ends of every micro-step.
_NO_TIMERS = {"throughput": {"enabled": False}}
_SAVED_CLASSES = [ZeroStageEnum, fragment_address, LossScaler]  # all that DeepSpeed's files hold besides plain values
_TAG = "engine"  # the folder of DeepSpeed's own files within a checkpoint
_NOWHERE = "nowhere"  # the folder that DeepSpeed is told to save into


def start_distributed(hang_s: float | None = None) -> torch.device:
    """Join the process group that the launcher describes and pick this rank's device.

    Without a launcher (plain `python`) the world is this process. To be called before anything of streaming.

    Args:
        hang_s: faults.hang_s where a watchdog is on duty: collectives then wait longer than it does, so that it can say
            who is where. None: for the library's half an hour.

    Collective: world.

    Raises:
        RuntimeError: a DeepSpeed that scales gradients wrongly.
    """
    version = tuple(int(part) for part in VERSION.split("+")[0].split(".")[:3] if part.isdigit())
    if version < _OLDEST_VERSION:
        raise RuntimeError(
            f"deepspeed: version {VERSION} is installed. 0.18.3 to 0.19.5 give wrong gradients when an auxiliary "
            "loss and accumulation meet, "
            "so 0.19.6 or newer is needed. Install with constraints.txt."
        )
    deepspeed_logger.setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    # DeepSpeed would compile a shared-memory all-reduce at its first start on CPUs (a minute, and a kill meanwhile
    # leaves a lock that every later start waits for). Only its inference engine calls it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    patience = default_pg_timeout
    if hang_s is not None:
        patience = max(patience, datetime.timedelta(seconds=2 * heartbeat.LONG * hang_s))
    deepspeed.init_distributed(verbose=False, timeout=patience)
    return device


def deepspeed_settings(settings: Settings, layout: BatchLayout, parameters: int) -> dict[str, Any]:
    """The DeepSpeed configuration that follows from ours, for a model of so many parameters."""
    zero: dict[str, Any] = {"stage": settings.zero.stage}
    # DeepSpeed allocates a bucket in full, 1 GB in bf16 whatever the model's size.
    zero["reduce_bucket_size"] = min(_LARGEST_BUCKET, parameters)
    if settings.zero.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if settings.zero.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    derived: dict[str, Any] = {
        "train_batch_size": settings.global_batch_sequences,
        "train_micro_batch_size_per_gpu": layout.micro_batch,
        "gradient_accumulation_steps": layout.accumulation,
        "gradient_clipping": settings.optimizer.gradient_clipping,
        "steps_per_print": 2**31,
        "timers": _NO_TIMERS,
        "zero_optimization": zero,
    }
    if settings.model.precision == "bf16":
        # An overflowing step would be skipped in silence; the train step looks for non-finite numbers itself.
        derived["bf16"] = {"enabled": True, "check_grad_overflow": False}
    return _overridden(derived, settings.zero.overrides)


def zero_options(settings: Settings, layout: BatchLayout, parameters: int) -> DeepSpeedZeroConfig:
    """The options of ZeRO as DeepSpeed completes them: sizes of buckets, overlapping, thresholds of stage 3."""
    return get_zero_config(deepspeed_settings(settings, layout, parameters))


def _overridden(derived: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = _overridden(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def compile_blocks(model: Any, backend: str = "inductor") -> None:
    """Compile all of a model but its head in place, at its first call; blocks may be recomputed as well."""
    # Dynamo would have to repeat what a recomputed block does outside of itself, and breaks the graph instead: in some
    # families transformers fills its list of hidden states within a block. It is full after the forward pass.
    torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
    model.base_model.compile(backend=backend)


def _optimizer(module: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    options: dict[str, Any] = {
        "lr": settings.optimizer.learning_rate,
        "betas": settings.optimizer.betas,
        "eps": settings.optimizer.epsilon,
    }
    groups = parameter_groups(module, settings.optimizer)
    if settings.zero.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles an operator: only where it is used

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


class _Collector(TorchCheckpointEngine):
    """Takes the place of DeepSpeed's writer of checkpoint files: hands their states on and touches no disk.

    So no rank can fail within `save_checkpoint`, where the others would wait for it in a barrier.
    """

    def __init__(self) -> None:
        super().__init__()
        self.take: Callable[[str, Any], object] | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        assert self.take is not None
        self.take(Path(path).relative_to(_NOWHERE).as_posix(), state_dict)


class DeepSpeedEngine:
    """A module, its optimizer and ZeRO. Collective: every method but the setters, on all ranks alike."""

    def __init__(self, module: nn.Module, settings: Settings, layout: BatchLayout) -> None:
        if settings.model.compile:
            compile_blocks(module.get_submodule("model"))
        optimizer = _optimizer(module, settings)
        names = {parameter: name for name, parameter in module.named_parameters()}
        self._names = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        self._options = [
            {key: group[key] for key in ("betas", "eps", "weight_decay")} for group in optimizer.param_groups
        ]
        self._gradient_clipping = settings.optimizer.gradient_clipping
        config = deepspeed_settings(settings, layout, sum(parameter.numel() for parameter in names))
        self._engine, _, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        if layout.world_size == 1 and settings.zero.stage == 0:
            self._engine.enable_backward_allreduce = False  # DeepSpeed would copy all gradients to and fro for nobody
        self.module: nn.Module = self._engine.module
        if self._engine.zero_nvme_offload_optimizer():
            raise ValueError(
                "zero.overrides: the optimizer state is offloaded to NVMe, from where it cannot be saved. cpu is "
                "allowed. Set zero.offload_optimizer instead."
            )
        self._collector = self._engine.checkpoint_engine = _Collector()
        # DeepSpeed would copy a script beside each checkpoint, on rank 0 alone; launch/export_hf.py does its work.
        self._engine._copy_recovery_script = lambda _: None
        # Without ZeRO and in float32 DeepSpeed clips but keeps no norm; every rank holds the averaged gradients then.
        self._records_norm = settings.zero.stage > 0 or settings.model.precision != "float32"
        self._own_norm: Tensor | None = None

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Forward pass of the wrapped module."""
        return self._engine(*arguments, **options)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of one micro-step; divides by the accumulation count."""
        self._engine.backward(loss)

    def step(self) -> None:
        """End a micro-step; the last one of the accumulation clips and updates.

        Raises:
            RuntimeError: DeepSpeed made no update, by a check of its own; on every rank.
        """
        ends = self.ends_step()
        self._engine.step()
        if ends and not self._engine.was_step_applied():
            raise RuntimeError(
                "engine: DeepSpeed left an update out, in silence. The train step decides that, before it. Remove "
                "what zero.overrides sets of overflow checks."
            )

    def skip_step(self) -> None:
        """End the last micro-step of the accumulation without an update, and drop the gradients.

        Weights, masters, moments and Adam's count of steps keep every bit. No collective.
        """
        optimizer: Any = self._engine.optimizer
        optimizer.step = lambda: zero_gradients.drop(optimizer)  # DeepSpeed's own counters go on as with an update
        try:
            self._engine.step()
        finally:
            del optimizer.step

    def gradient_square(self) -> Tensor:
        """This rank's part of the square of the gradient norm before clipping: float64 scalar, summed over ranks whole.

        To be called between the last backward pass of a step and its end, once. No collective.
        """
        parameters = self.module.parameters()
        own = zero_gradients.square_of_own(self._engine.optimizer, parameters, self._engine.dp_world_size)
        if not self._records_norm:
            self._own_norm = (own * self._engine.dp_world_size).sqrt()
        return own

    def gradient_accumulation_steps(self) -> int:
        return int(self._engine.gradient_accumulation_steps())

    def ends_step(self) -> bool:
        """Whether the micro-step at hand is the last of the accumulation. No collective."""
        return bool(self._engine.is_gradient_accumulation_boundary())

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole gradients as ZeRO holds them before clipping and update, by parameter name; float32 copies.

        To be called between the last backward pass of a step and its `step`. A parameter without a gradient has zeros.
        """
        gradients = {}
        for name, parameter in self.module.named_parameters():
            gradient = safe_get_full_grad(parameter)
            shape = getattr(parameter, "ds_shape", parameter.shape)
            gradients[name] = (
                torch.zeros(shape, device=parameter.device)
                if gradient is None
                else gradient.detach().to(torch.float32, copy=True).view(shape)
            )
        return gradients

    def non_finite_gradients(self) -> list[str]:
        """Names of the parameters whose gradient is not finite, at the time of `full_gradients`.

        One whole gradient after another is in memory.
        """
        found = []
        for name, parameter in self.module.named_parameters():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None and not bool(torch.isfinite(gradient).all()):
                found.append(name)
        return found

    def gradient_norm(self) -> float:
        """Global gradient norm of the last update, before clipping."""
        norm = self._engine.get_global_grad_norm() if self._records_norm else self._own_norm
        return float("nan") if norm is None else float(norm)

    def replicated_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What every rank should hold with the same bits, by name.

        Working weights and buffers; at stage 0 masters and moments as well; at stage 3 of the weights only those that
        ZeRO leaves whole. No collective.
        """
        base = self._engine.basic_optimizer
        parameter: Any
        for name, parameter in self.module.named_parameters():
            if hasattr(parameter, "ds_id"):
                if parameter.ds_persist and parameter.numel() == parameter.ds_numel:
                    yield name, parameter
                continue
            yield name, parameter
            if not hasattr(parameter, "_hp_mapping"):
                master = unpartitioned_master(self._engine.optimizer, parameter)
                if master is not parameter:
                    yield f"the master of {name}", master
                yield from ((f"a moment of {name}", moment) for moment in _moments(base, master))
        yield from self.module.named_buffers()

    def set_learning_rate(self, value: float) -> None:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = value

    def train(self, mode: bool = True) -> None:
        self._engine.train(mode)

    def close(self) -> None:
        """Take DeepSpeed's hold off the module, so that its memory is freed with the last reference. No use after."""
        self._engine.destroy()
        # ZeRO-3 leaves the model in two places of the library: a stack of root modules and the cache of a method.
        roots = getattr(parameter_offload, "FWD_MODULE_STACK", [])
        roots[:] = [root for root in roots if root is not self.module]
        method = getattr(PartitionedParameterCoordinator, "_PartitionedParameterCoordinator__params_to_release", None)
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):
                cell.cell_contents.cache_clear()

    @torch.no_grad()
    def reset_parameter(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Replace a parameter of the wrapped module in every copy, and clear its moments in the optimizer.

        The next forward pass reads the new values, and the next update starts from them: they go into the working
        weights and into the float32 masters, wherever ZeRO keeps them. Adam's count of steps stays, since ZeRO has one
        for a whole flat partition: the moments grow from 0 again, but late in a run nothing corrects for that any more.
        The first update is (1 - beta1) / sqrt(1 - beta2) of the usual length, 0.45 with the default betas. To be called
        between two optimizer steps.

        Args:
            value: float32 of the parameter's full shape, on any device, the same on all ranks.

        Collective: world, at stage 3.
        """
        if hasattr(parameter, "ds_id"):  # stage 3
            self._reset_partitioned(parameter, value)
            return
        parameter.copy_(value)  # at stages 1 and 2 every rank has all of the working weights
        base = self._engine.basic_optimizer
        if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2: this rank has a part of the masters, or nothing
            part = parameter._hp_mapping
            if part is not None:
                own, there = part.lp_fragment_address, part.hp_fragment_address
                part.hp_fragment.copy_(value.flatten().narrow(0, own.start, own.numel))
                flat = base.param_groups[part.param_group_index]["params"][0]
                # Not through DeepSpeed's setter: its view of the moments is made by an update, and is not there yet
                # when a run resumes.
                for moment in _moments(base, flat):
                    moment.narrow(0, there.start, there.numel).zero_()
            return
        master = unpartitioned_master(self._engine.optimizer, parameter)
        if master is not parameter:
            master.copy_(value)
        for moment in _moments(base, master):
            moment.zero_()

    def _reset_partitioned(self, parameter: Any, value: Tensor) -> None:
        # Not through DeepSpeed's setter of full values: it takes no parameter that the ranks do not divide evenly.
        group, shard = parameter.ds_process_group, parameter.ds_tensor.numel()
        padding = shard * dist.get_world_size(group) - value.numel()
        own = functional.pad(value.flatten(), (0, padding)).narrow(0, shard * dist.get_rank(group), shard)
        safe_set_local_fp32_param(parameter, own)
        for key in ("exp_avg", "exp_avg_sq"):
            safe_set_local_optimizer_state(parameter, torch.zeros_like(own), key)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)

    def save(self, take: Callable[[str, Any], object], *, whole_model: bool | None = None) -> None:
        """Hand weights and optimizer state, each rank its part, to `take`: the name of a file and what it is to hold.

        That is the running state, which the next step changes. `whole_model` is whether this rank gives the weights
        that it has in common with others, as rank 0 does by default; at stage 3 each gives what is its own.
        """
        if self._engine.zero_optimization_stage() < 3:
            self._engine.save_non_zero_checkpoint = dist.get_rank() == 0 if whole_model is None else whole_model
        self._collector.take = take
        self._engine.save_checkpoint(_NOWHERE, tag=_TAG, save_latest=False)

    def load(self, folder: Path, *, resharded: bool = False) -> None:
        """Load what `save` wrote; the optimizer's options stay those of the settings at hand.

        Args:
            resharded: the number of ranks or the ZeRO settings are others than at the save.

        Raises:
            RuntimeError: DeepSpeed found nothing to load, or not what this model needs, or a file holds more than
                tensors and plain values.
        """
        with _running_no_code(folder):
            if resharded:
                load_resharded(self._engine, folder / _TAG, self._names)
            else:
                path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, load_lr_scheduler_states=False)
                if path is None:
                    raise RuntimeError(
                        f"{folder}: DeepSpeed loaded nothing. A checkpoint of this run is needed. Choose another with "
                        "--resume."
                    )
        # DeepSpeed restores them as well, and what was changed in the settings would be lost in silence.
        for group, options in zip(self._engine.basic_optimizer.param_groups, self._options, strict=True):
            group.update(options)
        if hasattr(self._engine.optimizer, "clip_grad"):
            self._engine.optimizer.clip_grad = self._gradient_clipping


@contextmanager
def _running_no_code(place: Path) -> Iterator[None]:
    """Let DeepSpeed's reading of checkpoints build nothing but tensors, plain values and three classes of its own.

    Its files are pickles, which it reads with weights_only=False: whoever can write one could have code run.

    Raises:
        RuntimeError: a file holds something else.
    """

    @functools.wraps(torch.load)
    def load(*arguments: Any, **options: Any) -> Any:
        return original(*arguments, **{**options, "weights_only": True})

    original, torch.load = torch.load, load
    try:
        with torch.serialization.safe_globals(_SAVED_CLASSES):
            yield
    except pickle.UnpicklingError as error:
        raise RuntimeError(
            f"{place}: a file holds more than tensors and plain values ({str(error).splitlines()[0][:300]}). What "
            "would run code is never loaded. Take a checkpoint that this program wrote."
        ) from None
    finally:
        torch.load = original


def _moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """What the optimizer keeps of each number of a parameter; its count of steps is none of it."""
    state = optimizer.state.get(parameter, {})
    return [kept for kept in state.values() if isinstance(kept, Tensor) and kept.shape == parameter.shape]


def sharded_for_inference(module: nn.Module) -> nn.Module:
    """Divide a module's parameters over all ranks, as ZeRO-3 does, for forward passes without gradients.

    A rank holds its share of each larger matrix, and the whole of one layer's while that runs. Every rank first has the
    whole module in host memory; the device never does.

    Args:
        module: on the CPU, all parameters of one type, float32 or bfloat16.

    Collective: world; so is every call of what is returned.
    """
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 2**31,
        "timers": _NO_TIMERS,
        "bf16": {"enabled": next(module.parameters()).dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3},
    }
    deepspeed.zero.Init(module=module, config_dict_or_path=settings, dtype=next(module.parameters()).dtype)
    engine, _, _, _ = deepspeed.initialize(model=module, config=settings)
    engine.eval()
    return cast(nn.Module, engine)


def consolidated_state_dict(checkpoint: Path, zero_stage: int) -> dict[str, Tensor]:
    """The full float32 weights of a checkpoint, from all ranks' shards, by their names in the wrapped module.

    Runs in one process; takes host memory for the whole model.
    """
    if zero_stage == 0:
        with _running_no_code(checkpoint):
            states = torch.load(checkpoint / _TAG / "mp_rank_00_model_states.pt", map_location="cpu")
        return {name: tensor.float() for name, tensor in states["module"].items()}
    with _running_no_code(checkpoint):
        return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=_TAG)
