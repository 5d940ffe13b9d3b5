"""What a job asks of a cluster: a site's defaults from a YAML file, and the command line over them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dispersion_pretrain import slurm
from dispersion_pretrain.plain_values import refuse_odd_values
from dispersion_pretrain.settings_file import parse_tree, read_yaml

_VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ContainerSettings(_Section):
    image: str | None = Field(None, min_length=1, description="image in which the ranks run; null: none")
    runtime: Literal["pyxis", "apptainer"] = Field(
        "pyxis", description="srun --container-image (NVIDIA's plugin of Slurm), or `apptainer exec` in each task"
    )
    mounts: list[Annotated[str, Field(pattern=r"^[^,]+$")]] = Field(
        [], description="PATH or PATH:PATH_INSIDE for data; the working folder and run folders are there anyway"
    )
    code: str = Field("/opt/dispersion-pretrain", description="where the image has this repository")


class ClusterSettings(_Section):
    """Sizes, limits and names of a site; every key is optional in a cluster file."""

    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0, description="a rank is started for each; 0: train on CPUs")
    ranks_per_node: int | None = Field(None, ge=1, description="only without GPUs; null: 1")
    cpus_per_task: int = Field(4, ge=1, description="a task is a rank")
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = Field(
        None, description="limit, as sbatch takes it; in quotes, for YAML takes 24:00:00 for a number"
    )
    constraint: str | None = None
    reservation: str | None = None
    sbatch: dict[str, str] = Field({}, description="other long options: {mem: '0', exclusive: ''}")
    notice_s: int = Field(120, ge=1, description="stop and save so long before the time limit")
    max_requeues: int = Field(50, ge=0, description="restarts of a job before it is left alone")
    export: dict[_VariableName, Annotated[str, Field(coerce_numbers_to_str=True)]] = Field(
        {}, description="variables of the ranks, such as NCCL_SOCKET_IFNAME; values are taken as they are"
    )
    shell_setup: str = Field("", description="lines of shell that run first on the first node: module load cuda")
    container: ContainerSettings = ContainerSettings()
    evaluation: dict[str, str] = Field(
        {}, description="options of sbatch for evaluation jobs (evaluation.sbatch of runs that have none)"
    )

    @model_validator(mode="after")
    def _one_rank_a_gpu(self) -> ClusterSettings:
        if self.gpus_per_node and self.ranks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"ranks_per_node: {self.ranks_per_node} with {self.gpus_per_node} GPUs a node. "
                "One rank a GPU is allowed. Leave it out."
            )
        for name, value in self.options.items():
            slurm.option(name, value, taken=slurm.OF_TRAININGS)
        for name, value in self.evaluation.items():
            slurm.option(name, value)
        return self

    @property
    def options(self) -> dict[str, str]:
        """Options of sbatch by name that go into the script as they are."""
        named = {name: getattr(self, name) for name in slurm.VALUES if name != "job-name"}
        return {name: value for name, value in named.items() if value is not None} | self.sbatch

    @property
    def tasks_per_node(self) -> int:
        return self.gpus_per_node or self.ranks_per_node or 1

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node


def load_cluster(path: Path | None, given: dict[str, Any]) -> ClusterSettings:
    """A site's file, and what the command line gave over it: mappings are merged, None means not given.

    Raises:
        ValueError: any fault, naming the file or the command line, the key, the value, the rule and the cure.
    """
    tree = {} if path is None else read_yaml(path)
    if path is not None:
        parse_tree(ClusterSettings, tree, str(path))  # a fault of the file is told as one
    for name, value in given.items():
        if isinstance(value, dict):
            tree[name] = {**(tree.get(name) or {}), **value}
        elif value is not None:
            tree[name] = value
    refuse_odd_values(tree, "command line")
    return parse_tree(ClusterSettings, tree, "command line")
