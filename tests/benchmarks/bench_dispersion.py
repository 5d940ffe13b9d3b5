"""Time and memory of the dispersion loss, forward and backward, beside autograd and beside its two matrix products.

Run: python tests/benchmarks/bench_dispersion.py [--rounds N] [--threads N]
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dispersion_pretrain.dispersion import dispersion_loss

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from numerics.plain_dispersion import plain_dispersion_loss  # noqa: E402

SHAPES = [(8, 256, 768), (4, 256, 1024), (1, 4096, 1024)]  # sets, tokens, dim


def plain(embeddings: Tensor) -> None:
    """The formula under autograd."""
    plain_dispersion_loss(embeddings).mean().backward()


def closed_form(embeddings: Tensor) -> None:
    """The product."""
    dispersion_loss(embeddings).backward()


def two_products(embeddings: Tensor) -> None:
    """What no exact method can do without: all cosines, and the weighted sum of rows."""
    rows = embeddings.detach()
    torch.bmm(torch.bmm(rows, rows.transpose(1, 2)), rows)


CONTENDERS: dict[str, Callable[[Tensor], None]] = {
    "autograd": plain,
    "closed form": closed_form,
    "two products": two_products,
}


def make_embeddings(shape: tuple[int, int, int]) -> Tensor:
    """Half-condensed vectors: pairs on both sides of the clamp."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    return (noise + 3.0 * torch.randn(shape[-1], generator=generator)).requires_grad_()


def milliseconds(shape: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Medians; the contenders take turns, so that a slow moment of the machine hits all alike."""
    embeddings = make_embeddings(shape)
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for round_number in range(rounds + 2):
        for name, function in CONTENDERS.items():
            start = time.perf_counter()
            function(embeddings)
            if round_number >= 2:
                times[name].append(1e3 * (time.perf_counter() - start))
            embeddings.grad = None
    return {name: statistics.median(values) for name, values in times.items()}


def memory_of(field: str) -> float:
    """A field of this process' memory figures, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


def measure_memory(name: str, shape: tuple[int, int, int], threads: int, result: multiprocessing.SimpleQueue) -> None:
    """In a process of its own: peak over what was there before, MiB, the gradient itself included."""
    torch.set_num_threads(threads)
    CONTENDERS[name](make_embeddings((1, 8, 16)))  # libraries load their parts on first use
    embeddings = make_embeddings(shape)
    before = memory_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    CONTENDERS[name](embeddings)
    result.put(memory_of("VmHWM") - before)


def peak_mib(name: str, shape: tuple[int, int, int], threads: int) -> float:
    context = multiprocessing.get_context("spawn")
    result = context.SimpleQueue()
    process = context.Process(target=measure_memory, args=(name, shape, threads, result))
    process.start()
    process.join()
    return float(result.get()) if process.exitcode == 0 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, float32; "
        f"medians of {arguments.rounds} interleaved rounds; memory: peak over the input"
    )
    print(
        f"{'sets, tokens, dim':>20}"
        + "".join(f"{name + ' ms':>18}{'MiB':>8}" for name in CONTENDERS)
        + f"{'speed-up':>10}"
    )
    for shape in SHAPES:
        times = milliseconds(shape, arguments.rounds)
        cells = "".join(f"{times[name]:18.1f}{peak_mib(name, shape, arguments.threads):8.0f}" for name in CONTENDERS)
        print(f"{str(shape):>20}{cells}{times['autograd'] / times['closed form']:10.2f}", flush=True)


if __name__ == "__main__":
    main()
