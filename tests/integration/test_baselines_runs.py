"""Whole runs with all baselines on: one curve in every layout, exact resume, and nothing else of a run is moved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dispersion_pretrain import distributed
from dispersion_pretrain.assembly import RunParts, assemble
from dispersion_pretrain.engine import start_distributed
from dispersion_pretrain.settings_file import load_settings
from dispersion_pretrain.train import train_step
from integration.jobs import TINY_MODEL, Job, finish, pretrain_command, records, write_config
from spawn import run_ranks

NO_DROPOUT = {**TINY_MODEL, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
STEPS = 8
# ranks, micro-batch, accumulation, teacher in shards
LAYOUTS = [(1, 8, 1, False), (2, 2, 2, True), (2, 4, 1, False)]


@pytest.fixture(scope="module")
def teacher(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of another family with the corpus' tokenizer, far from uniform."""
    folder = tmp_path_factory.mktemp("teacher")
    vocabulary = json.loads((corpus / "corpus.json").read_text())["vocab_size"]
    config = AutoConfig.for_model(
        "llama", hidden_size=48, intermediate_size=2400, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, vocab_size=vocabulary, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(9)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    shutil.copytree(corpus / "tokenizer", folder, dirs_exist_ok=True)
    return str(folder)


def baselines(teacher: str, *, sharded: bool = False) -> dict[str, Any]:
    return {
        "noisy_embeddings": {"alpha": 10.0},
        "active_forgetting": {"every_steps": 2, "last_phase": 0.25},  # before steps 2 and 4 of 8
        "distillation": {"teacher": teacher, "weight": 0.5, "temperature": 2.0, "sharded": sharded},
    }


def curve(run: Path) -> dict[int, dict[str, float]]:
    """Losses and gradient norm by step; of a step written twice, the last record."""
    steps: dict[int, dict[str, float]] = {}
    for record in records(run):
        if "loss/total" in record:
            kept = ("loss/", "grad_norm", "active_forgetting/")
            steps[record["step"]] = {key: value for key, value in record.items() if key.startswith(kept)}
    return steps


def write_run(folder: Path, corpus: Path, sections: dict[str, Any], steps: int = STEPS, **others: Any) -> Path:
    return write_config(
        folder, corpus, validation=None, training={"max_tokens": steps * 512, "micro_batch": 2},
        dispersion={"coefficient": 1.0}, **sections, **others,
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_one_loss_curve_in_every_layout(corpus: Path, teacher: str, tmp_path: Path) -> None:
    jobs = []
    for ranks, micro_batch, accumulation, sharded in LAYOUTS:
        folder = tmp_path / f"{ranks}x{micro_batch}x{accumulation}"
        config = write_run(
            folder, corpus, baselines(teacher, sharded=sharded), model={"config": NO_DROPOUT},
            checkpoint={"every_steps": None}, optimizer={"learning_rate": 1e-3},
        )  # fmt: skip
        micro = f"training.micro_batch={micro_batch}"
        jobs.append(Job(pretrain_command(config, micro, ranks=ranks, launcher="warm"), folder / "log"))
    for job in jobs:  # all at once: most of their time is starting
        assert job.wait() == 0, job.output()
    curves = [curve(job.log.parent / "run") for job in jobs]
    first, *others = curves
    assert sorted(first) == list(range(1, STEPS + 1))
    assert [first[step]["active_forgetting/resets"] for step in first] == [0, 0, 1, 1, 2, 2, 2, 2]
    worst = 0.0
    for other in others:
        for step, figures in first.items():
            assert {"loss/total", "loss/cross_entropy", "loss/dispersion", "loss/distillation"} <= figures.keys()
            for key, value in figures.items():
                worst = max(worst, abs(other[step][key] - value) / (abs(value) or 1.0))
    print(f"largest relative difference over {STEPS} steps and {len(LAYOUTS)} layouts: {worst:.1e}")
    assert worst < 1e-4


@pytest.mark.timeout(300)
def test_sigkill_and_resume_right_before_a_reset(corpus: Path, teacher: str, tmp_path: Path) -> None:
    """With dropout; every checkpoint lies right before a reset. For several ranks see test_baselines_zero.py."""
    sections = baselines(teacher) | {"active_forgetting": {"every_steps": 4, "last_phase": 0.25}}
    commands, jobs = [], []
    for name in ("whole", "killed"):
        config = write_run(tmp_path / name, corpus, sections, steps=12, checkpoint={"every_steps": 4})
        commands.append(pretrain_command(config, "training.micro_batch=4", ranks=1, launcher="warm"))
        jobs.append(Job(commands[-1], tmp_path / name / "log"))
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    jobs[1].wait_for((killed / "checkpoints" / "step-00000004" / "COMMITTED").exists)
    jobs[1].kill()
    finish(commands[1], tmp_path / "killed" / "log")
    assert jobs[0].wait() == 0, jobs[0].output()
    starts = [json.loads(line)["resumed_from_step"] for line in (killed / "starts.jsonl").read_text().splitlines()]
    assert starts in ([0, 4], [0, 8])
    assert curve(killed) == curve(whole)
    assert [figures["active_forgetting/resets"] for _, figures in sorted(curve(whole).items())] == [
        *[0, 0, 0, 0], *[1, 1, 1, 1], *[2, 2, 2, 2]
    ]  # fmt: skip
    other = shutil.copytree(teacher, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    refused = finish([*commands[0], f"distillation.teacher={other}"], tmp_path / "log", expected=1)
    assert "the weights in distillation.teacher are not those of the checkpoint" in refused


VARIANTS = ("", "noisy_embeddings", "active_forgetting", "distillation")


def first_steps(path: str) -> dict[str, dict[str, Any]]:
    """Assemble a run with one baseline or none, and take two steps, in one process."""
    device = start_distributed()
    found: dict[str, dict[str, Any]] = {}
    # Distillation reads whole logits: with a loss head in pieces the others would differ from it in rounding.
    settings = load_settings(path, ["model.loss_head=whole"])
    for name in VARIANTS:
        off = {other: None for other in VARIANTS if other not in ("", name)}
        parts: RunParts = assemble(settings.model_copy(update={**off, "dispersion": None}), device)
        weights = {key: tensor.clone() for key, tensor in parts.engine.module.state_dict().items()}
        streams = [distributed.random_state()]
        batches = parts.batches(0)
        seen: list[Any] = []
        entropies = []

        def watched(batches: Any = batches, seen: list[Any] = seen) -> Any:
            for batch in batches:
                seen.append(batch.sample_index.tolist())
                yield batch

        for step in range(3):
            parts.forget_embeddings(step)
            train_step(parts.engine, watched(), parts.context(step), parts.totals, device)
            streams.append(distributed.random_state())
            entropies.append(parts.totals.reduce()["cross_entropy"])
        batches.close()
        found[name] = {"weights": weights, "streams": streams, "seen": seen, "entropies": entropies,
                       "order": parts.corpora.order.fingerprint()}  # fmt: skip
    return found


def test_a_baseline_moves_nothing_else_of_a_run(corpus: Path, teacher: str, tmp_path: Path) -> None:
    path = write_run(tmp_path, corpus, baselines(teacher))
    (found,) = run_ranks(first_steps, 1, str(path))
    plain = found[""]
    for name in VARIANTS[1:]:
        other = found[name]
        assert other["weights"].keys() == plain["weights"].keys(), name
        assert all(torch.equal(other["weights"][key], tensor) for key, tensor in plain["weights"].items()), name
        assert (other["seen"], other["order"]) == (plain["seen"], plain["order"]), name
        for one, two in zip(other["streams"], plain["streams"], strict=True):
            assert all(torch.equal(one[key], two[key]) for key in one), f"{name}: random numbers"
    entropies = {name: found[name]["entropies"] for name in VARIANTS}
    assert entropies["distillation"][0] == entropies[""][0], "the same masks and weights"
    assert entropies["active_forgetting"][:2] == entropies[""][:2]
    assert entropies["active_forgetting"][2] != entropies[""][2]
    assert entropies["noisy_embeddings"][0] != entropies[""][0]
    assert entropies["distillation"][1] != entropies[""][1]
