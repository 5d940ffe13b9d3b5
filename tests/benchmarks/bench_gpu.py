"""Training on one GPU: tokens a second, model FLOPs utilisation, peak memory, and what the dispersion term adds.

GPT2-small at 1,024 tokens and Qwen3-0.6B at 2,048 in bf16, eager, compiled and (where it has kernels) with liger-kernel
of the extra gpu, without and with the term (pools of one sequence, 256 tokens, all layers). Each is a run of
launch/pretrain.py; the two of a pair take turns, and figures are medians of the steps of the second half. A way that
does not run here is said to fail, and the others go on. Without a GPU nothing is measured. --tiny makes models of two
narrow layers, to try the path on CPUs.

To stand beside: llm-foundry reports 44.8 % for 125M on an A100 and 41.8 % for 1B on an H100, torchtitan 33 to 39 % for
8B on H100s; the paper finds its term to cost 1.01.

Run: python tests/benchmarks/bench_gpu.py [--rounds N] [--steps N] [--tiny]
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import dispersion_pretrain  # noqa: F401  (before streaming, which imports torchvision)

# isort: split
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.pretrain_run import run_pretrain  # noqa: E402
from token_corpus import write_token_corpus  # noqa: E402

TERM = {"coefficient": 0.1, "pool_sequences": 1, "tokens_per_sequence": 256, "norm_epsilon": 1e-2}
TINY = {
    "gpt2_small": {"model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 2},
    "qwen3_0.6b": {
        "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip
VOCABULARIES = {"gpt2_small": 50257, "qwen3_0.6b": 151936}


class Case(NamedTuple):
    """A model and its batch."""

    model: str
    length: int
    sequences: int  # of a micro-batch, of which a step has one
    ways: tuple[str, ...]


WAYS: dict[str, dict[str, Any]] = {"eager": {}, "compiled": {"compile": True}, "liger": {"kernels": "liger"}}
CASES = [
    Case("gpt2_small", 1024, 32, ("eager", "compiled")), Case("qwen3_0.6b", 2048, 8, ("eager", "compiled", "liger")),
]  # fmt: skip


def settings(case: Case, folder: Path, steps: int, *, tiny: bool, way: str) -> dict[str, Any]:
    """All but the dispersion section."""
    model: Any = TINY[case.model] | {"vocab_size": VOCABULARIES[case.model]} if tiny else case.model
    tokens = case.sequences * case.length
    return {
        "model": {"config": model, "precision": "bf16", **WAYS[way]},
        "data": {"corpus": str(folder / case.model), "sequence_length": case.length},
        "training": {"global_batch_tokens": tokens, "max_tokens": steps * tokens, "micro_batch": case.sequences},
        "optimizer": {"learning_rate": 3e-4},
        "schedule": {"kind": "constant"},
        "zero": {"stage": 1},
    }


def measured(records: list[dict[str, Any]]) -> dict[str, float]:
    """Medians of the second half of the steps."""
    late = records[len(records) // 2 :]
    return {
        name: statistics.median(record.get(name, float("nan")) for record in late)
        for name in ("step_time_s", "tokens_per_s", "mfu", "memory_gib")
    }


def write_corpus(case: Case, folder: Path, steps: int) -> None:
    """Random tokens, four of each in a row, so that there is something to learn."""
    shape = (case.sequences * steps, case.length // 4)
    vocabulary = VOCABULARIES[case.model]
    ids = np.random.default_rng(0).integers(0, vocabulary, shape).astype(np.uint16 if vocabulary < 2**16 else np.uint32)
    sequences = np.repeat(ids, 4, axis=1)
    splits = {"train": sequences, "validation": sequences[:8]}
    write_token_corpus(folder / case.model, splits, vocabulary=vocabulary)


def compare(case: Case, folder: Path, arguments: argparse.Namespace, way: str) -> None:
    """Print the two rows of a model."""
    rows: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for round_number in range(arguments.rounds):
        for name, results in rows.items():
            tree = settings(case, folder, arguments.steps, tiny=arguments.tiny, way=way)
            if name == "with":
                tree["dispersion"] = TERM
            run = f"{case.model}_{way}_{name}_{round_number}"
            results.append(measured(run_pretrain(folder, run, tree)))
            shutil.rmtree(folder / "runs" / run)  # its checkpoint has gigabytes
    for name, results in rows.items():
        overhead = statistics.median(
            one["step_time_s"] / base["step_time_s"] for one, base in zip(results, rows["without"], strict=True)
        )
        middle = {key: statistics.median(result[key] for result in results) for key in results[0]}
        print(
            f"{case.model:<14}{way:<10}{name:<10}{middle['step_time_s'] * 1e3:>10.1f}"
            f"{middle['tokens_per_s']:>12,.0f}{middle['mfu']:>8.1%}{middle['memory_gib']:>8.1f}{overhead:>10.3f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--tiny", action="store_true", help="narrow models of two layers, eager only")
    arguments = parser.parse_args()
    if not (torch.cuda.is_available() or arguments.tiny):
        print("no GPU here: nothing is measured")
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    cases = [case._replace(length=256, sequences=2) for case in CASES] if arguments.tiny else CASES
    print(f"{device}, torch {torch.__version__}, bf16; medians of {arguments.rounds} rounds", flush=True)
    print(f"{'model':<14}{'':<10}{'term':<10}{'ms a step':>10}{'tokens/s':>12}{'MFU':>8}{'GiB':>8}{'overhead':>10}")
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case in cases:
            write_corpus(case, folder, arguments.steps)
            for way in case.ways[: 1 if arguments.tiny else None]:
                try:
                    compare(case, folder, arguments, way)
                except SystemExit as error:
                    failed.append(f"{case.model} {way}")
                    print(f"{case.model:<14}{way:<10}failed: {str(error).strip().splitlines()[-1]}", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
