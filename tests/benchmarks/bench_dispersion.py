"""Time and memory of the dispersion loss, forward and backward, beside autograd and its two matrix products alone.

Small shapes take more rounds, as one of theirs is milliseconds.

Run: python tests/benchmarks/bench_dispersion.py [--rounds N] [--threads N]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from dispersion_pretrain import angular_kernel
from dispersion_pretrain.dispersion import dispersion_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.peak_memory import peak_mib  # noqa: E402
from numerics.plain_dispersion import plain_dispersion_loss  # noqa: E402

SHAPES = {(8, 256, 768): 10, (4, 256, 1024): 10, (1, 4096, 1024): 1}  # sets, tokens, dim: times as many rounds


def plain(embeddings: Tensor) -> None:
    """The formula under autograd."""
    plain_dispersion_loss(embeddings).mean().backward()


def closed_form(embeddings: Tensor) -> None:
    """The product."""
    dispersion_loss(embeddings).backward()


def without_kernel(embeddings: Tensor) -> None:
    """The product where no C++ compiler is at hand."""
    with mock.patch.object(angular_kernel, "load", return_value=None):
        dispersion_loss(embeddings).backward()


def two_products(embeddings: Tensor) -> None:
    """What no exact method can do without: all cosines, and the weighted sum of rows."""
    rows = embeddings.detach()
    torch.bmm(torch.bmm(rows, rows.transpose(1, 2)), rows)


CONTENDERS: dict[str, Callable[[Tensor], None]] = {
    "autograd": plain,
    "closed form": closed_form,
    "in PyTorch": without_kernel,
    "two products": two_products,
}


def make_embeddings(shape: tuple[int, int, int]) -> Tensor:
    """Half-condensed vectors: pairs on both sides of the clamp."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    return (noise + 3.0 * torch.randn(shape[-1], generator=generator)).requires_grad_()


def milliseconds(shape: tuple[int, int, int], rounds: int) -> dict[str, list[float]]:
    """Of each round; the contenders take turns, so that a slow moment of the machine hits all alike."""
    embeddings = make_embeddings(shape)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for round_number in range(rounds + 2):
        for name, function in CONTENDERS.items():
            start = time.perf_counter()
            function(embeddings)
            if round_number >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
            embeddings.grad = None
    return times


def median_ratio(times: dict[str, list[float]], one: str, other: str) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times[one], times[other], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, float32; "
        "medians of interleaved rounds; memory: peak over the input"
    )
    heads = "".join(f"{name + ' ms':>16}{'MiB':>6}" for name in CONTENDERS)
    print(f"{'sets, tokens, dim':>18}{heads}{'speed-up':>10}{'/ products':>12}{'memory':>8}")
    for shape, times_as_many in SHAPES.items():
        times = milliseconds(shape, arguments.rounds * times_as_many)
        memory = {
            name: peak_mib(function, make_embeddings, ((1, 8, 16), shape), arguments.threads)
            for name, function in CONTENDERS.items()
        }
        cells = "".join(f"{statistics.median(times[name]):16.1f}{memory[name]:6.0f}" for name in CONTENDERS)
        print(
            f"{str(shape):>18}{cells}{median_ratio(times, 'autograd', 'closed form'):10.2f}"
            f"{median_ratio(times, 'closed form', 'two products'):12.2f}"
            f"{'1/' + format(memory['autograd'] / memory['closed form'], '.1f'):>8}",
            flush=True,
        )
    print("speed-up, / products: medians of ratios within a round. memory: the closed form's over autograd's.")


if __name__ == "__main__":
    main()
