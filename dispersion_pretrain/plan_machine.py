"""What a plan knows of GPUs and takes for granted of everything else.

A machine is a YAML file with the fields of `Machine`; h100, h200 and a100 are shipped under configs/machines/.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from dispersion_pretrain.config import Settings
from dispersion_pretrain.plain_values import show
from dispersion_pretrain.settings_file import parse_tree, read_yaml

_FOLDER = Path(__file__).resolve().parent.parent / "configs" / "machines"


class Machine(BaseModel):
    """A GPU, its links and its node. Bandwidths are in one direction, GB/s = 10^9 bytes a second.

    What follows `host_link_gb_s` is not on a data sheet but assumed; a plan prints it, and options replace it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str = Field(description="as torch.cuda.get_device_name says")
    bf16_tflops: float = Field(gt=0, description="dense peak of matrix products in bf16, 10^12 FLOP/s")
    float32_tflops: float = Field(gt=0, description="the same in float32, without TF32")
    memory_gib: float = Field(gt=0, description="of one GPU")
    memory_gb_s: float = Field(gt=0, description="of that memory")
    nvlink_gb_s: float = Field(gt=0, description="between the GPUs of a node, per GPU")
    internode_gb_s: float = Field(gt=0, description="between nodes, per GPU")
    host_memory_gib: float = Field(gt=0, description="of a node")
    host_memory_gb_s: float = Field(gt=0, description="of that memory, the whole node")
    host_link_gb_s: float = Field(gt=0, description="between a GPU and pinned host memory, per GPU")

    product_efficiency: float = Field(0.65, gt=0, le=1, description="share of the peak that matrix products reach")
    traffic_efficiency: float = Field(
        0.8, gt=0, le=1, description="share of memory's bandwidth that all other operations reach"
    )
    compiled_traffic: float = Field(
        0.35, gt=0, le=1, description="share of their reads and writes that torch.compile leaves"
    )
    launch_us: float = Field(5.0, ge=0, description="time in which the processor starts one operation, microseconds")
    mfu: float | None = Field(
        None, gt=0, le=1, description="model FLOPs over the peak while a micro-step computes, in place of these four"
    )
    link_efficiency: float = Field(0.8, gt=0, le=1, description="share of a link's bandwidth that collectives reach")
    hop_us: float = Field(5.0, ge=0, description="latency of one hop of a collective, microseconds")
    host_efficiency: float = Field(0.5, gt=0, le=1, description="share of the host's bandwidths that copies reach")
    pageable_gb_s: float = Field(4.0, gt=0, description="copy of a GPU's state into ordinary host memory, per GPU")
    hash_gb_s: float = Field(1.0, gt=0, description="at which one rank hashes and writes its part of a checkpoint")
    storage_gb_s: float = Field(20.0, gt=0, description="of the shared storage, all ranks together")
    reserved_gib: float = Field(2.0, ge=0, description="of a GPU: CUDA context, NCCL's buffers, workspaces of kernels")
    margin: float = Field(0.1, ge=0, lt=1, description="share of a GPU's memory that must stay free: fragmentation")
    overlaps: bool = Field(True, description="communication can run beside computation")

    def peak(self, precision: str) -> float:
        """Dense peak in FLOP/s of `float32` or `bf16`."""
        return (self.bf16_tflops if precision == "bf16" else self.float32_tflops) * 1e12

    @property
    def usable_bytes(self) -> float:
        """Of a GPU, without the margin."""
        return self.memory_gib * 2**30 * (1 - self.margin)

    def assumptions(self) -> dict[str, Any]:
        """What is assumed, by field."""
        names = set(ASSUMED) - (_RATES if self.mfu is not None else {"mfu"})
        return {name: getattr(self, name) for name in ASSUMED if name in names}


_RATES = {"product_efficiency", "traffic_efficiency", "compiled_traffic", "launch_us"}
ASSUMED = list(Machine.model_fields)[list(Machine.model_fields).index("product_efficiency") :]


def load_machine(name: str, changes: dict[str, Any] | None = None) -> Machine:
    """Read a shipped machine by name, or a YAML file of one's own; `changes` replace fields.

    Raises:
        ValueError: no such machine, or a field is missing, unknown or out of range.
    """
    shipped = {path.stem: path for path in sorted(_FOLDER.glob("*.yaml"))}
    path = shipped.get(name, Path(name))
    if not path.is_file():
        raise ValueError(
            f"gpu: {show(name)} is not known and no file. {', '.join(shipped)} or a YAML file with the fields of "
            "configs/machines/h100.yaml are allowed. Correct it."
        )
    return parse_tree(Machine, {**read_yaml(path), **(changes or {})}, str(path))


def working_bytes(settings: Settings) -> int:
    """Bytes of a number in the forward pass, in gradients and in what ranks send each other."""
    return 2 if settings.model.precision == "bf16" else 4
