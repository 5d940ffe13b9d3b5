"""A training run of ours beside transformers' Trainer with the dispersion loss under autograd, the authors' way.

Each is a whole process on one rank: the same model (GPT2-small's shape with 4 layers), the same initial weights, the
same sequences of 512 tokens in the same order, AdamW, a clipped gradient, 4 sequences a step. In bf16 ours has working
weights in bf16 beside its masters, where the Trainer casts float32 weights at each use. The Trainer asks the model for
all hidden states and differentiates the loss of 256 positions of each sequence and layer. Ours is launch/pretrain.py
with its defaults, pools of one sequence. Processes take turns; seconds are medians of steps, the first three left out,
then of rounds; memory is the peak of the process.

Run: python tests/benchmarks/bench_trainer.py [--rounds N] [--steps N] [--precision bf16]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dispersion_pretrain  # noqa: F401  (before transformers, which imports torchvision)

# isort: split
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, Trainer, TrainerCallback, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.pretrain_run import run_pretrain  # noqa: E402
from numerics.plain_dispersion import plain_dispersion_loss  # noqa: E402
from token_corpus import write_token_corpus  # noqa: E402

LENGTH, SEQUENCES, VOCABULARY, TOKENS, COEFFICIENT = 512, 4, 50257, 256, 0.1
GPT2 = {
    "model_type": "gpt2", "n_layer": 4, "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
CONTENDERS = ("Trainer", "Trainer, no dispersion", "ours", "ours, no dispersion")


def blocks(steps: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Tokens in runs, so that there is something to learn."""
    numbers = np.random.default_rng(0).integers(0, VOCABULARY, (steps * SEQUENCES, LENGTH // 4), dtype=np.uint16)
    return np.repeat(numbers, 4, axis=1)


def run_ours(folder: Path, name: str, steps: int, coefficient: float, precision: str) -> dict[str, float]:
    """One run of launch/pretrain.py."""
    settings: dict[str, Any] = {
        "model": {"config": GPT2, "precision": precision},
        "data": {"corpus": str(folder / "corpus"), "sequence_length": LENGTH, "shuffle": "none"},
        "training": {"global_batch_tokens": SEQUENCES * LENGTH, "max_tokens": steps * SEQUENCES * LENGTH},
        "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.1},
        "schedule": {"kind": "constant"},
        "zero": {"stage": 0},
    }
    if coefficient:
        settings["dispersion"] = {
            "coefficient": coefficient, "pool_sequences": 1, "tokens_per_sequence": TOKENS, "norm_epsilon": 1e-2,
        }  # fmt: skip
    records = run_pretrain(folder, name, settings)
    return {
        "seconds": statistics.median(record["step_time_s"] for record in records[3:]),
        "loss": records[-1]["loss/cross_entropy"],
    }


class DispersionTrainer(Trainer):
    """As the authors train: hidden states of all layers, 256 positions of each sequence, autograd."""

    coefficient = 0.0
    cross_entropy = float("nan")

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        outputs = model(**inputs, output_hidden_states=self.coefficient > 0)
        loss: Tensor = outputs.loss
        self.cross_entropy = loss.item()
        if self.coefficient:
            positions = torch.randperm(LENGTH)[:TOKENS]
            values = [
                plain_dispersion_loss(states[:, positions].float(), norm_epsilon=1e-2).mean()
                for states in outputs.hidden_states[1:]
            ]
            loss = loss + self.coefficient * torch.stack(values).mean()
        return loss


class StepTimes(TrainerCallback):
    """When steps ended."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.moments.append(time.perf_counter())


def run_trainer(folder: Path, steps: int, coefficient: float, precision: str) -> dict[str, float]:
    """One run of the Trainer, in this process."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(**GPT2))
    data = [{"input_ids": ids, "labels": ids} for ids in torch.from_numpy(blocks(steps).astype(np.int64))]
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"), per_device_train_batch_size=SEQUENCES, max_steps=steps, use_cpu=True,
        learning_rate=1e-4, weight_decay=0.1, lr_scheduler_type="constant", max_grad_norm=1.0, adam_beta2=0.95,
        logging_strategy="steps", logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
        bf16=precision == "bf16",
    )  # fmt: skip
    times = StepTimes()
    trainer = DispersionTrainer(model=model, args=arguments, train_dataset=data, callbacks=[times])
    trainer.coefficient = coefficient
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(data)
    trainer.train()
    steps_s = [later - earlier for earlier, later in zip(times.moments[2:], times.moments[3:], strict=False)]
    return {"seconds": statistics.median(steps_s), "loss": trainer.cross_entropy}


def child(contender: str, folder: Path, name: str, steps: int, precision: str) -> None:
    """Run one contender and print what it took."""
    coefficient = 0.0 if "no dispersion" in contender else COEFFICIENT
    if contender.startswith("Trainer"):
        result = run_trainer(folder, steps, coefficient, precision)
        usage = resource.getrusage(resource.RUSAGE_SELF)
    else:
        result = run_ours(folder, name, steps, coefficient, precision)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    sys.stdout.write("\n" + json.dumps({**result, "gib": usage.ru_maxrss / 2**20}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        contender, folder, name = arguments.child
        return child(contender, Path(folder), name, arguments.steps, arguments.precision)
    results: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        sequences = blocks(arguments.steps)
        corpus = Path(folder) / "corpus"
        write_token_corpus(corpus, {"train": sequences, "validation": sequences}, vocabulary=VOCABULARY)
        for round_number in range(arguments.rounds):
            for place, contender in enumerate(CONTENDERS):
                options = ["--steps", str(arguments.steps), "--precision", arguments.precision]
                command = [sys.executable, __file__, *options, "--child", contender, folder]
                environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
                done = subprocess.run(
                    [*command, f"run{round_number}{place}"], env=environment, check=True, capture_output=True, text=True
                )
                results[contender].append(json.loads(done.stdout.splitlines()[-1]))
    base = [result["seconds"] for result in results[CONTENDERS[0]]]
    print(f"{'':<26}{'s a step':>10}{'tokens/s':>10}{'speed':>8}{'GiB':>8}{'last cross-entropy':>20}")
    for contender, rounds in results.items():
        seconds = statistics.median(result["seconds"] for result in rounds)
        speed = statistics.median(other / result["seconds"] for other, result in zip(base, rounds, strict=True))
        print(
            f"{contender:<26}{seconds:>10.3f}{SEQUENCES * LENGTH / seconds:>10.0f}{speed:>8.2f}"
            f"{max(result['gib'] for result in rounds):>8.2f}{rounds[-1]['loss']:>20.6f}"
        )
    print(f"speed: against the first line, medians of {arguments.rounds} rounds; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
