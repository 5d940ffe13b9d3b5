"""Time and memory of a language model's head with its cross-entropy, forward and backward: in pieces, and whole.

Run: python tests/benchmarks/bench_loss_head.py [--tokens N] [--rounds N] [--threads N]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from dispersion_pretrain.loss_head import CrossEntropyHead

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.peak_memory import peak_mib  # noqa: E402

WIDTH, VOCABULARY = 1024, 151_936  # Qwen3-0.6B


class Case(NamedTuple):
    """A head before its forward pass."""

    head: nn.Linear
    hidden: Tensor
    targets: Tensor


def make(size: tuple[int, int, int]) -> Case:
    """A head and hidden states of (tokens, width, vocabulary)."""
    tokens, width, vocabulary = size
    torch.manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False)
    return Case(head, torch.randn(tokens, width, requires_grad=True), torch.randint(0, vocabulary, (tokens,)))


def whole(case: Case) -> float:
    """All logits at once, as transformers does it."""
    loss = functional.cross_entropy(case.head(case.hidden).float(), case.targets, reduction="sum")
    loss.backward()
    return loss.item()


def pieces(case: Case) -> float:
    """The product."""
    CrossEntropyHead.take_over(case.head)
    loss = case.head(case.hidden, case.targets)
    loss.backward()
    return float(loss.item())


CONTENDERS: dict[str, Callable[[Case], float]] = {"whole": whole, "pieces": pieces}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4 * 2048, help="for the memory")
    parser.add_argument("--timed-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"head of {VOCABULARY:,} x {WIDTH:,}, float32, {arguments.threads} threads", flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    losses: dict[str, float] = {}
    gradients: dict[str, list[Tensor]] = {}
    for _ in range(arguments.rounds):
        for name, function in CONTENDERS.items():
            case = make((arguments.timed_tokens, WIDTH, VOCABULARY))
            start_s = time.perf_counter()
            losses[name] = function(case)
            seconds[name].append(time.perf_counter() - start_s)
            gradients[name] = [tensor.grad for tensor in (case.hidden, case.head.weight) if tensor.grad is not None]
    for name, times in seconds.items():
        print(f"{name:8}{statistics.median(times):8.2f} s at {arguments.timed_tokens:,} tokens")
    ratio = statistics.median(a / b for a, b in zip(seconds["pieces"], seconds["whole"], strict=True))
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(gradients["pieces"], gradients["whole"], strict=True)]
    print(f"pieces / whole: {ratio:.2f} of the time; loss {losses['pieces'] / losses['whole'] - 1:+.1e}, "
          f"gradients {apart[0]:.1e} (hidden states) and {apart[1]:.1e} (matrix) apart", flush=True)  # fmt: skip
    gradients.clear()
    sizes = ((8, 16, 32), (arguments.tokens, WIDTH, VOCABULARY))
    memory = {name: peak_mib(function, make, sizes, arguments.threads) for name, function in CONTENDERS.items()}
    for name, mib in memory.items():
        print(f"{name:8}{mib:8,.0f} MiB over the inputs at {arguments.tokens:,} tokens, the gradients included")
    print(f"pieces / whole: 1/{memory['whole'] / memory['pieces']:.1f} of the memory")


if __name__ == "__main__":
    main()
