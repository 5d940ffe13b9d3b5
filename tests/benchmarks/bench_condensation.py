"""Time and memory of the condensation measurement beside the forward passes alone and embedding-condensation 2.0.

GPT2-small's shape on random weights, texts of 512 tokens, no logits. Contenders take turns on the same texts; figures
are medians over the rounds of processor time, which others on the machine disturb least. The package copies all that it
holds for each further text, so its time is quadratic in their number: give as many as are of interest.

Run: python tests/benchmarks/bench_condensation.py [--texts N] [--rounds N] [--threads N]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import dispersion_pretrain  # noqa: F401  (before transformers, which imports torchvision)

# isort: split
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2Model

from dispersion_pretrain.condensation import causal_lm_forward, measure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.peak_memory import peak_mib  # noqa: E402

LENGTH = 512


class Case(NamedTuple):
    """A model, and texts as token ids (texts, 512)."""

    model: GPT2Model
    texts: Tensor


def make(texts: int) -> Case:
    torch.manual_seed(0)
    config = GPT2Config()
    return Case(GPT2Model(config).eval(), torch.randint(0, config.vocab_size, (texts, LENGTH)))


def forwards(case: Case) -> None:
    """The model alone, without its hidden states."""
    with torch.no_grad():
        for text in case.texts.split(1):
            case.model(input_ids=text, use_cache=False)


def ours(case: Case) -> None:
    """The product, batches of one text, statistics included."""
    measure(causal_lm_forward(case.model), _one_by_one(case.texts))


def _one_by_one(texts: Tensor) -> Iterator[Tensor]:
    yield from texts.split(1)


def package(case: Case) -> None:
    """embedding-condensation 2.0 on the same ids, without its picture."""
    import nltk

    with mock.patch.object(nltk, "download"):  # its import fetches data that only its own data sets need
        from embedding_condensation import measure_embedding_condensation

    def tokenizer(text: str, **_: Any) -> dict[str, Tensor]:
        return {"input_ids": case.texts[int(text)][None]}

    numbers = [str(number) for number in range(len(case.texts))]
    measure_embedding_condensation(
        case.model, tokenizer, texts=numbers, repetitions=len(numbers), plot=False, save_path=None, show_progress=False
    )


CONTENDERS: dict[str, Callable[[Case], None]] = {"forwards": forwards, "ours": ours, "package": package}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=60, help="of a measurement")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="with more, those that wait count as well")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"GPT2-small's shape, {arguments.texts} texts of {LENGTH} tokens, {arguments.threads} thread(s)", flush=True)
    case, warm = make(arguments.texts), make(2)
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for function in CONTENDERS.values():
        function(warm)
    for _ in range(arguments.rounds):
        for name, function in CONTENDERS.items():
            start_s = time.process_time()
            function(case)
            seconds[name].append(time.process_time() - start_s)
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["forwards"], strict=True))
        print(f"{name:9}{statistics.median(times):7.1f} s{ratio:6.2f} x the forwards", flush=True)
    few, many = arguments.texts // 2, arguments.texts  # with fewer, what allocators keep at first would count
    for name, function in CONTENDERS.items():
        peaks = [peak_mib(function, make, (2, texts), arguments.threads) for texts in (few, many)]
        print(f"{name:9}{(peaks[1] - peaks[0]) / (many - few):7.1f} MiB more for each text", flush=True)


if __name__ == "__main__":
    main()
