"""What a checkpoint of a run holds, and what must agree before one is loaded."""

from __future__ import annotations

import logging
import math
import shutil
import socket
import time
from typing import Any

import safetensors.torch
import torch

from dispersion_pretrain import checkpoint, distributed, metrics, provenance
from dispersion_pretrain.assembly import RunParts
from dispersion_pretrain.certificate import Certificate, Change, changes_since
from dispersion_pretrain.config import Settings
from dispersion_pretrain.evaluation_jobs import pending_evaluations
from dispersion_pretrain.export import MODEL_CONFIG_FOLDER, REFERENCE_FILE
from dispersion_pretrain.faults import Verdict
from dispersion_pretrain.saving import Description, Saves
from dispersion_pretrain.settings_file import dump_settings

_REFERENCE_TOKENS = 16

# Settings with which another value makes another run. A teacher may lie elsewhere or be divided otherwise: its weights
# are compared.
_FIXED = (
    "run.seed",
    "model.config",
    "model.pretrained",
    "model.precision",
    "training.global_batch_tokens",
    "noisy_embeddings.alpha",
    "active_forgetting.every_steps",
    "active_forgetting.last_phase",
    "distillation.weight",
    "distillation.temperature",
    "distillation.precision",
)

_log = logging.getLogger(__name__)


def open_saves(settings: Settings) -> Saves:
    """Return what makes the checkpoints of this run, as its settings say.

    Collective: world.

    Raises:
        RuntimeError: a rank cannot write into checkpoint.local_folder; on every rank.
    """
    section, local = settings.checkpoint, None
    if section.local_folder is not None:
        local = checkpoint.local_tier(section.local_folder, settings.run_folder, settings.zero.model_dump(mode="json"))
    return Saves(
        settings.run_folder,
        local=local,
        background=section.background,
        keep_last=section.keep_last,
        keep_every_tokens=section.keep_every_tokens,
        protected_steps=lambda: pending_evaluations(settings.run_folder),
    )


def save_run(parts: RunParts, certificate: Certificate, saves: Saves, tier: checkpoint.Tier, step: int) -> float:
    """Begin a checkpoint after `step` steps; return the seconds for which training stood still.

    It holds the engine's shards, each rank's random state, the model's config, and reference logits for the check of an
    export. The position in the data follows from the step and from what was passed over: order and batch are fixed.
    `saves.poll` tells what became of it.

    Collective: world.
    """
    started, settings = time.monotonic(), parts.settings
    saves.begin(tier, step)
    parts.engine.save(saves.take, whole_model=tier.leads)
    saves.take_rank_state({"random": distributed.random_state(), "objective": _objective_state(parts)})
    reference = _reference(parts)
    if distributed.is_main():
        saves.take(f"{MODEL_CONFIG_FOLDER}/config.json", parts.hub_config.to_json_string().encode())
        saves.take(REFERENCE_FILE, safetensors.torch.save(reference))
    samples = (step + parts.faults.data_offset_steps) * settings.global_batch_sequences
    saves.write(
        Description(
            step=step,
            tokens=parts.tokens(step),
            samples=samples,
            world_size=parts.layout.world_size,
            settings=settings.model_dump(mode="json"),
            versions=provenance.versions(),
            extra={
                "git_commit": provenance.git_commit() if distributed.is_main() else None,
                "data_order": parts.corpora.order.fingerprint(),
                "teacher": parts.teacher.fingerprint if parts.teacher else None,
                "certificate": certificate.promise(step, samples),
                "faults": parts.faults.state(),
            },
        )
    )
    return time.monotonic() - started


def _reference(parts: RunParts) -> dict[str, torch.Tensor]:
    """Logits of the running model on fixed tokens: input_ids (1, n) int64, logits (1, n, vocabulary) float32."""
    tokens = min(_REFERENCE_TOKENS, parts.settings.data.sequence_length)
    drawn = distributed.counter_hash(0, torch.arange(tokens))
    input_ids = (drawn.abs() % parts.corpora.plan.vocab_size)[None]
    parts.engine.train(False)
    with torch.no_grad():
        logits = parts.engine(input_ids.to(parts.device), with_logits=True).logits
    parts.engine.train()
    return {"input_ids": input_ids, "logits": logits.float().cpu().contiguous()}


def resume_run(parts: RunParts, certificate: Certificate, resume: str, local: checkpoint.Tier | None = None) -> int:
    """Load what `resume` names and return the number of steps done; 0 for a start. Prints what was changed since.

    On another number of ranks or at another ZeRO stage the state is divided anew, and dropout draws from streams that
    begin there.

    Args:
        resume: "auto", "none" or the folder of a checkpoint.
        local: the second tier, in which "auto" looks as well.

    Collective: world.

    Raises:
        ValueError: the named folder is no checkpoint.
        RuntimeError: no exact resume is possible; says what differs and what to do.
    """
    settings = parts.settings
    if resume == "none" and distributed.broadcast_object(checkpoint.committed_steps(settings.run_folder)):
        raise RuntimeError(
            f"--resume none: {settings.run_folder} has checkpoints, and a start at step 0 would replace them. A new "
            "run folder is needed. "
            "Set run.name or run.folder, or remove that folder."
        )
    found, skipped = checkpoint.resolve(settings.run_folder, resume, local)
    if distributed.is_main():
        for reason in skipped:
            _log.warning("skipped checkpoint %s", reason)
    if found is None:
        return 0
    reordered = _refuse_other_run(parts, found)
    changes = changes_since(found, parts)
    if distributed.is_main():
        print(f"resume: step {found.step} of {found.path}", *changes, sep="\nresume: ", flush=True)
        if found.world_size != parts.layout.world_size:
            print("resume: dropout streams begin anew, from seed, rank and step", flush=True)
    _load_state(parts, found, changes)
    parts.faults.restore(found.manifest["extra"].get("faults"))
    certificate.check_resumed(found, changes, reordered=reordered)
    return found.step


def _load_state(parts: RunParts, found: checkpoint.CheckpointInfo, changes: list[Change]) -> None:
    """Weights, optimizer, random state and objective of a checkpoint of this run. Collective: world."""
    parts.engine.load(found.path, resharded=any(change.what.startswith(("world size", "zero.")) for change in changes))
    same_ranks = found.world_size == parts.layout.world_size
    state = checkpoint.load_rank_state(found.path, None if same_ranks else 0)
    if same_ranks:
        distributed.restore_random_state(state["random"])
    else:
        distributed.seed_everything(parts.settings.run.seed)
        distributed.seed_dropout(parts.settings.run.seed, found.step)
    if parts.gradient_cap is not None:
        parts.gradient_cap.bound = state.get("objective", {}).get("coefficient_bound", math.inf)


def roll_back_run(parts: RunParts, step: int, verdict: Verdict, local: checkpoint.Tier | None) -> tuple[int, Verdict]:
    """Go back to the newest good checkpoint and pass over the samples since; return its step and what to tell.

    The run is then where a resume from that checkpoint would be, but for its place in the data: behind the global batch
    of the step that went wrong.

    Args:
        step: 1-based number of that step.
        verdict: says what was wrong.
        local: the second tier. No save may be under way on any.

    Collective: world.

    Raises:
        RuntimeError: there is no checkpoint yet, or the run has gone back too often; on every rank.
    """
    parts.faults.refuse_more_rollbacks(verdict.message)
    found, skipped = checkpoint.find_newest_good(parts.settings.run_folder, local)
    if found is None:
        raise RuntimeError(
            f"{verdict.message} There is no whole checkpoint to go back to{': ' * bool(skipped)}{'; '.join(skipped)}. "
            "One is needed. Lower optimizer.learning_rate or checkpoint.every_steps and start again."
        )
    _load_state(parts, found, changes_since(found, parts))
    parts.totals = metrics.StepTotals()
    passed = parts.faults.go_back(step, found.step, found.manifest["extra"].get("faults"))
    return found.step, passed._replace(message=f"{verdict.message} {passed.message}")


def _objective_state(parts: RunParts) -> dict[str, float]:
    """What the objective carries from step to step."""
    return {} if parts.gradient_cap is None else {"coefficient_bound": parts.gradient_cap.bound}


def _refuse_other_run(parts: RunParts, found: checkpoint.CheckpointInfo) -> bool:
    """Raise if the checkpoint and the settings at hand cannot give one trajectory. The same decision on every rank.

    Returns:
        Whether the order of the data was changed, as the settings allow.
    """
    saved = Settings.model_validate(found.manifest["settings"])
    differences = [
        f"{key} was {_value(saved, key)!r} and is {_value(parts.settings, key)!r}"
        for key in _FIXED
        if _value(saved, key) != _value(parts.settings, key)
    ]
    reordered = _order_changes(found.manifest["extra"]["data_order"], parts.corpora.order.fingerprint())
    if not parts.settings.data.allow_change:
        differences += reordered
    teacher = found.manifest["extra"].get("teacher")
    if parts.teacher is not None and teacher not in (None, parts.teacher.fingerprint):
        differences.append("the weights in distillation.teacher are not those of the checkpoint")
    if differences:
        also = "" if len(differences) > len(reordered) else " Or let data.allow_change=true go on in the new order."
        raise RuntimeError(
            f"{found.path}: {'; '.join(differences)}. An exact resume needs them equal. Restore them, or start "
            f"another run with run.name.{also}"
        )
    if reordered and distributed.is_main():
        _log.warning(
            "%s: %s. The data goes on in the new order, at sample %d.",
            found.path, "; ".join(reordered), found.samples,
        )  # fmt: skip
    return bool(reordered)


def _order_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints of the order, in words; what has a message of its own is left out."""
    return [
        f"{field} was {saved.get(field)!r} and is {current.get(field)!r}"
        for field in {**saved, **current}
        if saved.get(field) != current.get(field) and field not in _FIXED
    ]


def _value(settings: Settings, key: str) -> Any:
    """What `key` is set to; None where its section is off."""
    value: Any = settings
    for part in key.split("."):
        value = None if value is None else getattr(value, part)
    return value


def prepare_run_folder(parts: RunParts, first_step: int) -> None:
    """Write settings, tokenizer and a line about this start into the run folder. Collective: world; rank 0 writes.

    Raises:
        RuntimeError: the folder cannot be written; on every rank.
    """
    folder = parts.settings.run_folder
    with distributed.failing_together(f"{folder}: cannot prepare the run folder"):
        if not distributed.is_main():
            return
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml.tmp").write_text(dump_settings(parts.settings), encoding="utf-8")
        (folder / "config.yaml.tmp").replace(folder / "config.yaml")
        if not (folder / "tokenizer").exists():
            shutil.copytree(parts.corpora.plan.tokenizer(), folder / "tokenizer.tmp", dirs_exist_ok=True)
            (folder / "tokenizer.tmp").replace(folder / "tokenizer")
        metrics.append_start(
            folder,
            {
                "world_size": parts.layout.world_size,
                "micro_batch": parts.layout.micro_batch,
                "accumulation": parts.layout.accumulation,
                "device": parts.device_name,
                "hostname": socket.gethostname(),
                "resumed_from_step": first_step,
                "metrics_bytes": metrics.size_of_records(folder),
                "parameters": parts.size.parameters,
                "versions": provenance.versions(),
                "git_commit": provenance.git_commit(),
            },
        )
