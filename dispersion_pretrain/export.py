"""Checkpoint of a run -> Hugging Face folder, checked against logits that the running model computed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from dispersion_pretrain import checkpoint
from dispersion_pretrain.checkpoint import CheckpointInfo
from dispersion_pretrain.config import Settings
from dispersion_pretrain.engine import consolidated_state_dict
from dispersion_pretrain.model import load_exported
from dispersion_pretrain.settings_file import load_settings

Precision = Literal["float32", "bf16"]

RECORD = "export.json"
REFERENCE_FILE = "reference.safetensors"  # in a checkpoint: input_ids (1, n) and logits (1, n, vocabulary), float32
MODEL_CONFIG_FOLDER = "model_config"  # in a checkpoint

# Largest difference of a logit over the largest logit. float32 on other hardware, in other kernels: about 1e-6.
# bf16 keeps 8 bits, and a difference grows through the layers: sdpa against eager attention gave 0.013 to 0.056 on
# 12 to 28 layers of gpt2 and qwen3 (plain and trebled initial weights); weights that are not the run's give about 1.
DIFFERENCE_BOUNDS: dict[Precision, float] = {"float32": 1e-4, "bf16": 0.1}
_DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bf16": torch.bfloat16}
_PREFIX = "model."  # of the language model within the wrapped module

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunCheckpoint:
    """A verified checkpoint and the run that it belongs to."""

    run: Path
    info: CheckpointInfo
    settings: Settings

    @property
    def manifest_sha256(self) -> str:
        """Identifies the content, wherever the run lies."""
        return checkpoint_hash(self.info.path)


def checkpoint_hash(folder: Path) -> str:
    """Hash of a committed checkpoint's manifest, which holds the hashes of all its files.

    Raises:
        RuntimeError: there is no committed checkpoint.
    """
    try:
        return hashlib.sha256((folder / checkpoint.MANIFEST).read_bytes()).hexdigest()
    except OSError as error:
        raise RuntimeError(
            f"{folder}: no manifest can be read ({error}). A committed checkpoint is needed. Choose another step."
        ) from None


def split_run(run: str) -> tuple[Path, int | None] | None:
    """Read "RUN_FOLDER" or "RUN_FOLDER@STEP"; None where that is no run, but a model's folder or name."""
    folder, separator, step = run.rpartition("@")
    if separator and step.isdigit() and (Path(folder) / "config.yaml").is_file():
        return Path(folder), int(step)
    return (Path(run), None) if (Path(run) / "config.yaml").is_file() else None


def locate(run: str) -> RunCheckpoint:
    """Find and verify the checkpoint that "RUN_FOLDER" (its newest good one) or "RUN_FOLDER@STEP" names.

    Raises:
        ValueError: no such run or step.
        RuntimeError: the checkpoint is damaged, or the run has none that is whole.
    """
    parts = split_run(run)
    if parts is None:
        raise ValueError(f"{run}: no such run. RUN_FOLDER or RUN_FOLDER@STEP is allowed. Correct the path.")
    folder, step = parts
    info: CheckpointInfo | None
    if step is None:
        info, skipped = checkpoint.find_newest_good(folder)
        for reason in skipped:
            _log.warning("skipped checkpoint %s", reason)
        if info is None:
            raise RuntimeError(
                f"{folder}: no checkpoint is whole ({'; '.join(skipped) or 'there is none'}). One is needed. "
                "Wait for the first save, or restore one from a copy."
            )
    else:
        steps = checkpoint.committed_steps(folder)
        if step not in steps:
            known = ", ".join(map(str, steps)) or "(none)"
            raise ValueError(f"{run}: has no checkpoint of step {step}. Saved steps: {known}. Choose one of them.")
        info = _verified(checkpoint.step_folder(folder, step))
    return RunCheckpoint(folder.resolve(), info, load_settings(folder / "config.yaml"))


def _verified(path: Path) -> CheckpointInfo:
    problems = checkpoint.verify(path)
    if problems:
        raise RuntimeError(
            f"{path}: the checkpoint is damaged: {'; '.join(problems)}. A whole one is needed. "
            "Choose another step, or restore it from a copy."
        )
    manifest = json.loads((path / checkpoint.MANIFEST).read_bytes())
    counts = {key: int(manifest[key]) for key in ("step", "tokens", "samples", "world_size")}
    return CheckpointInfo(path=path, manifest=manifest, **counts)


def export_run(run: str, destination: Path, *, check: bool = True, dtype: Precision | None = None) -> Path:
    """Write a checkpoint as a folder that transformers' `from_pretrained` loads: model, tokenizer and `export.json`.

    The folder appears whole or not at all. One that holds this very checkpoint in this precision is kept as it is.

    Args:
        run: "RUN_FOLDER" (newest good checkpoint) or "RUN_FOLDER@STEP".
        destination: does not exist, is empty, or holds an export of this checkpoint.
        check: load the folder again and compare its logits with those of the running model.
        dtype: of the weights; None: the run's precision.

    Returns:
        `destination`.

    Raises:
        ValueError: no such run or step, or `destination` holds something else.
        RuntimeError: the checkpoint is damaged or of another model, or the logits differ (the export is removed).
    """
    return export_checkpoint(locate(run), destination, check=check, dtype=dtype)


def export_checkpoint(
    source: RunCheckpoint, destination: Path, *, check: bool = True, dtype: Precision | None = None
) -> Path:
    """As `export_run`, for a checkpoint that `locate` found."""
    precision: Precision = dtype or source.settings.model.precision
    record: dict[str, Any] = {
        "run": str(source.run),
        "step": source.info.step,
        "tokens": source.info.tokens,
        "manifest_sha256": source.manifest_sha256,
        "precision": precision,
        "logits_difference": None,
    }
    if destination.exists() and any(destination.iterdir()):
        record = _refuse_other(destination, record)
        if not check or record["logits_difference"] is not None:
            return destination
        record["logits_difference"] = _checked(destination, source, precision)
        _write_record(destination, record)
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    staging = destination.parent / f".{destination.name}.exporting-{os.getpid()}"
    shutil.rmtree(staging, ignore_errors=True)
    try:
        _write_model(source, staging, _DTYPES[precision])
        if check:
            record["logits_difference"] = _checked(staging, source, precision)
        _write_record(staging, record)
        os.rename(staging, destination)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return destination


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `export.json` of a folder says: run, step, tokens, manifest_sha256, precision, logits_difference."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def _refuse_other(destination: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the record of an export of the wanted checkpoint; raise for anything else."""
    found = read_record(destination)
    keys = ("manifest_sha256", "precision")
    if found is not None and all(found.get(key) == wanted[key] for key in keys):
        return found
    what = f"an export of {found.get('run')}@{found.get('step')}, {found.get('precision')}" if found else "other files"
    raise ValueError(
        f"{destination}: exists and holds {what}. A new or empty folder, or an export of the same checkpoint is "
        "allowed. Choose another folder or remove this one."
    )


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    temporary = folder / f"{RECORD}.tmp"
    temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    temporary.replace(folder / RECORD)


def _write_model(source: RunCheckpoint, folder: Path, dtype: torch.dtype) -> None:
    config = AutoConfig.from_pretrained(source.info.path / MODEL_CONFIG_FOLDER, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = consolidated_state_dict(source.info.path, source.settings.zero.stage)
    _load_strictly(model, state, place=source.info.path)
    tokenizer = source.run / "tokenizer"
    if not tokenizer.is_dir():
        raise RuntimeError(
            f"{tokenizer}: is missing. An export needs the tokenizer of the run's corpus. Copy it from the corpus."
        )
    shutil.copytree(tokenizer, folder)  # first, so that no file of it takes the place of the model's
    model.to(dtype=dtype).save_pretrained(folder, safe_serialization=True)


def _load_strictly(model: nn.Module, state: dict[str, Tensor], *, place: Path) -> None:
    """Load names of the wrapped module; every one must fit. A tied tensor may be given under one of its names."""
    weights = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    own = model.state_dict()
    given = {own[name].data_ptr() for name in weights if name in own}
    missing = [name for name, tensor in own.items() if name not in weights and tensor.data_ptr() not in given]
    unknown = [name for name in weights if name not in own]
    shapes = [name for name in weights if name in own and weights[name].shape != own[name].shape]
    problems = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    if any(problems.values()):
        text = "; ".join(f"{what}: {', '.join(names[:5])}" for what, names in problems.items() if names)
        raise RuntimeError(
            f"{place}: its weights do not fit the model of its {MODEL_CONFIG_FOLDER} ({text}). They must agree name by "
            "name. Export with the versions of transformers and of this package that trained it."
        )
    model.load_state_dict(weights, strict=False)  # what may be missing was checked above


def _checked(folder: Path, source: RunCheckpoint, precision: Precision) -> float:
    """Return the difference of logits; beyond the coarser precision's bound remove `folder` and raise."""
    coarse: Precision = "bf16" if "bf16" in (precision, source.settings.model.precision) else "float32"
    bound = DIFFERENCE_BOUNDS[coarse]
    difference = logits_difference(folder, source.info.path, _DTYPES[precision])
    if not difference <= bound:  # also when it is not a number
        shutil.rmtree(folder)
        raise RuntimeError(
            f"{source.info.path}: the export's logits differ from the run's by {difference:.2e} of the largest. "
            f"At most {bound:.0e} is allowed for {coarse}. The export was removed. Export with the versions of "
            "transformers and torch that trained it (manifest.json names them)."
        )
    return difference


def logits_difference(folder: Path, checkpoint_folder: Path, dtype: torch.dtype) -> float:
    """Largest difference between the folder's logits and those in the checkpoint, over the largest logit.

    Raises:
        RuntimeError: the checkpoint has no reference logits.
    """
    path = checkpoint_folder / REFERENCE_FILE
    if not path.is_file():
        raise RuntimeError(
            f"{path}: is missing, so the export cannot be checked. Checkpoints hold the logits of the running model. "
            "Export without the check (--no-check)."
        )
    reference = load_file(path)
    with torch.no_grad():
        logits = load_exported(folder, dtype=dtype)(input_ids=reference["input_ids"], use_cache=False).logits.float()
    if logits.shape != reference["logits"].shape:
        return float("inf")
    return float((logits - reference["logits"]).abs().max() / reference["logits"].abs().max())
