"""DeepSpeed: the only file that knows it.

`DeepSpeedEngine` is what the train step drives. Its DeepSpeed settings are derived from ours and never mirrored; keys
that we do not name pass through `zero.overrides`.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_grad
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from dispersion_pretrain.config import Settings
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.optim import parameter_groups

VERSION = deepspeed.__version__
_OLDEST_VERSION = (0, 19, 6)
_TAG = "engine"  # the folder of DeepSpeed's own files within a checkpoint


def start_distributed() -> torch.device:
    """Join the process group that the launcher describes and pick this rank's device.

    Without a launcher (plain `python`) the world is this process. To be called before anything of streaming.

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
    deepspeed.init_distributed(verbose=False)
    return device


def deepspeed_settings(settings: Settings, layout: BatchLayout) -> dict[str, Any]:
    """The DeepSpeed configuration that follows from ours."""
    zero: dict[str, Any] = {"stage": settings.zero.stage}
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
        "zero_optimization": zero,
    }
    if settings.model.precision == "bf16":
        # An overflowing step would be skipped in silence; the train step stops on non-finite numbers itself.
        derived["bf16"] = {"enabled": True, "check_grad_overflow": False}
    return _overridden(derived, settings.zero.overrides)


def _overridden(derived: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(derived)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = _overridden(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


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
    return torch.optim.AdamW(groups, fused=torch.cuda.is_available(), **options)


class DeepSpeedEngine:
    """A module, its optimizer and ZeRO. Collective: every method but the setters, on all ranks alike."""

    def __init__(self, module: nn.Module, settings: Settings, layout: BatchLayout) -> None:
        if settings.model.compile:
            module.get_submodule("model").compile()
        self._engine, _, _, _ = deepspeed.initialize(
            model=module, optimizer=_optimizer(module, settings), config=deepspeed_settings(settings, layout)
        )
        self.module: nn.Module = self._engine.module
        # Without ZeRO and in float32 DeepSpeed clips but keeps no norm; every rank holds the averaged gradients then.
        self._records_norm = settings.zero.stage > 0 or settings.model.precision != "float32"
        self._own_norm: Tensor | None = None

    def __call__(self, *arguments: Any) -> Any:
        """Forward pass of the wrapped module."""
        return self._engine(*arguments)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of one micro-step; divides by the accumulation count."""
        self._engine.backward(loss)

    def step(self) -> None:
        """End a micro-step; the last one of the accumulation clips and updates."""
        if not self._records_norm and self.ends_step():
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._own_norm = torch.nn.utils.get_total_norm(gradients)
        self._engine.step()

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

    def gradient_norm(self) -> float:
        """Global gradient norm of the last update, before clipping."""
        norm = self._engine.get_global_grad_norm() if self._records_norm else self._own_norm
        return float("nan") if norm is None else float(norm)

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

    def save(self, folder: Path) -> None:
        """Write weights and optimizer state, each rank its part, under `folder`."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Load what `save` wrote, at the same world size and ZeRO stage.

        Raises:
            RuntimeError: DeepSpeed found nothing to load.
        """
        path, _ = self._engine.load_checkpoint(str(folder), tag=_TAG, load_lr_scheduler_states=False)
        if path is None:
            raise RuntimeError(
                f"{folder}: DeepSpeed loaded nothing. A checkpoint of this run is needed. Choose another with --resume."
            )


def consolidated_state_dict(checkpoint: Path, zero_stage: int) -> dict[str, Tensor]:
    """The full float32 weights of a checkpoint, from all ranks' shards, by their names in the wrapped module.

    Runs in one process; takes host memory for the whole model.
    """
    if zero_stage == 0:
        states = torch.load(checkpoint / _TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {name: tensor.float() for name, tensor in states["module"].items()}
    return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=_TAG)
