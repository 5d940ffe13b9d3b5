"""Trains what experiments.py lists and evaluates it; what is done already is left alone.

python tests/evidence/train.py
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from dispersion_pretrain.checkpoint import committed_steps
from dispersion_pretrain.settings_file import load_settings
from evidence import experiments
from evidence.experiments import Arm
from evidence.smollm2 import fetch_smollm2

SUITE = "configs/eval/offline.yaml"
CONTEXT = 256  # tokens, as in training; SmolLM2 has 8,192 positions, too many for 2 cores


def main() -> None:
    """Prepare, train, evaluate, one run after another."""
    fetch_smollm2(experiments.SMOLLM2)
    for corpus, tokenizer in experiments.CORPORA.items():
        _run(
            "data_prep/tokenize_to_mds.py", "--source", "python-docs", "--tokenizer", tokenizer, "--seq-len", "256",
            "--validation-share", str(experiments.VALIDATION_SHARE), "--out", corpus,
        )  # fmt: skip
    arms = dict.fromkeys(arm for question in experiments.QUESTIONS for arm in question.arms)
    for arm in arms:
        if arm.teacher:
            _make_teacher(arm.teacher)
        for seed in arm.seeds:
            _train(arm, seed)
            _evaluate(str(arm.run_folder(seed)), arm.examples)
    corpus = load_settings(experiments.SMOLLM2_CONFIG).data.sources[0].path
    examples = experiments.SMOLLM2_BASELINE.examples
    _evaluate(str(experiments.SMOLLM2), examples, "--corpus", corpus, "--out", str(experiments.UNTOUCHED))


def _make_teacher(arm: Arm) -> None:
    _train(arm, arm.seeds[0])
    if not arm.model_folder.exists():
        _run("launch/export_hf.py", str(arm.run_folder(arm.seeds[0])), "--out", str(arm.model_folder))


def _train(arm: Arm, seed: int) -> None:
    folder = arm.run_folder(seed)
    if _is_finished(arm, folder):
        return
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    command = [
        "deepspeed", "--num_gpus", str(arm.processes), "--master_port", str(port), "launch/pretrain.py",
        "--config", arm.config, *arm.settings,
        f"run.seed={seed}", f"run.name={folder.name}", f"run.folder={folder}",
    ]  # fmt: skip
    threads = max(1, len(os.sched_getaffinity(0)) // arm.processes)
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    print(f"{folder}: {time.monotonic() - started:.0f} s", flush=True)


def _is_finished(arm: Arm, folder: Path) -> bool:
    """Whether the checkpoint of the last step is there."""
    return committed_steps(folder)[-1:] == [load_settings(arm.config, list(arm.settings)).num_steps]


def _evaluate(model: str, examples: int, *more: str) -> None:
    bounds = ["--limit", str(examples), "--max-length", str(CONTEXT)]
    _run("launch/evaluate_checkpoint.py", "--model", model, "--suite", SUITE, *bounds, *more)


def _run(script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, script, *arguments], check=True)


if __name__ == "__main__":
    main()
