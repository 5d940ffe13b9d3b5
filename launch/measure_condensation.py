#!/usr/bin/env python3
"""Measure how far the hidden states of models condense, layer by layer, on the validation split of a corpus.

python launch/measure_condensation.py runs/demo runs/demo@100 --corpus data/python-docs --out condensation
python launch/measure_condensation.py gpt2 gpt2-xl --corpus data/wikitext-gpt2 --max-length 512
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dispersion_pretrain.condensation import Condensation, causal_lm_forward, measure, plot_curves, plot_heatmap
from dispersion_pretrain.corpus import CorpusManifest, TokenCorpus, read_manifest
from dispersion_pretrain.model import load_exported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 with one line of explanation when something does not fit."""
    options = parse_arguments(arguments)
    try:
        results = measure_models(options)
        print_tables(results)
        if options.out is not None:
            write_files(results, options.out)
    except (ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run folder, RUN@STEP, Hugging Face folder or name")
    parser.add_argument("--corpus", required=True, help="folder or URL that data_prep wrote")
    parser.add_argument("--cache", type=Path, help="local folder for the shards of a remote corpus")
    parser.add_argument("--num-texts", type=int, default=100, help="validation sequences to average (default: 100)")
    parser.add_argument("--max-length", type=int, help="use the first N tokens of each (default: all)")
    parser.add_argument("--batch-size", type=int, default=4, help="texts in one forward pass (default: 4)")
    parser.add_argument("--precision", choices=tuple(_DTYPES), default="float32", help="of the forward pass")
    parser.add_argument("--out", type=Path, help="folder for the heatmaps (PNG) and measurements (npz)")
    options = parser.parse_args(arguments)
    for name, minimum in (("num_texts", 1), ("max_length", 2), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < minimum:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag}: {value} is not allowed. At least {minimum} is. Raise it.")
    return options


def measure_models(options: argparse.Namespace) -> dict[str, Condensation]:
    """Measure the models one after another, on the same texts."""
    manifest = read_manifest(options.corpus)
    length = options.max_length or manifest.sequence_length
    if length > manifest.sequence_length:
        raise ValueError(
            f"--max-length: {length}, but the texts of {options.corpus} have {manifest.sequence_length} tokens. "
            "At most that many are allowed. Lower it, or make a corpus of longer sequences."
        )
    corpus = TokenCorpus(manifest, "validation", options.cache)
    num_texts = min(options.num_texts, len(corpus))
    if num_texts < options.num_texts:
        print(f"--num-texts: {options.num_texts}, but {options.corpus} has {num_texts}; they are used", file=sys.stderr)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results: dict[str, Condensation] = {}
    for name in dict.fromkeys(options.models):
        model, tokens = load_model(name, _DTYPES[options.precision])
        check_fit(name, model, tokens, manifest, length)
        forward = causal_lm_forward(model.to(device))  # type: ignore[arg-type]  # transformers' wrapper hides `self`
        results[name] = measure(forward, text_batches(corpus, num_texts, length, options.batch_size))
        del model, forward  # before the next one is loaded
    return results


def load_model(name: str, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, int] | None]:
    """Load a run's checkpoint (exported to a folder that is removed again), a Hugging Face folder or name.

    Returns:
        the model; the ids of its tokenizer's tokens, None where it comes without a tokenizer.
    """
    run_folder = Path(name.partition("@")[0])
    if (run_folder / "config.yaml").is_file() or (run_folder / "checkpoints").is_dir():
        from dispersion_pretrain.export import export_run  # brings DeepSpeed, which the other models do not need

        with tempfile.TemporaryDirectory() as scratch:
            folder = export_run(name, Path(scratch, "model"), check=False)
            return load_exported(folder, dtype=dtype), _token_ids(str(folder))
    try:
        model = load_exported(name, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"{name}: is no run folder and no causal language model that transformers can load ({reason}). "
            "A run, RUN@STEP, a Hugging Face folder or name is allowed. Correct the name."
        ) from error
    return model, _token_ids(name)


def _token_ids(name: str) -> dict[str, int] | None:
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        ids: dict[str, int] = AutoTokenizer.from_pretrained(name, trust_remote_code=False).get_vocab()
    except (OSError, ValueError):
        return None
    return ids


def check_fit(
    name: str, model: PreTrainedModel, tokens: dict[str, int] | None, manifest: CorpusManifest, length: int
) -> None:
    """Raise ValueError where the corpus' token ids mean nothing to the model, or its texts are too long for it."""
    vocabulary = int(model.config.vocab_size)
    corpus = f"{manifest.location} ({manifest.tokenizer.name})"
    if manifest.vocab_size > vocabulary:
        raise ValueError(
            f"{name}: its vocabulary has {vocabulary} tokens, that of the corpus {corpus} has {manifest.vocab_size}. "
            "The model's must hold the corpus'. Use a corpus made with the model's tokenizer."
        )
    corpus_tokens = _token_ids(f"{manifest.location}/{manifest.tokenizer.folder}")
    if tokens is not None and corpus_tokens is not None:
        foreign = sorted(token for token, index in corpus_tokens.items() if tokens.get(token) != index)
        if foreign:
            raise ValueError(
                f"{name}: its tokenizer ({len(tokens)} tokens) is not that of the corpus {corpus}, of "
                f"{len(corpus_tokens)}: {len(foreign)} tokens, such as {foreign[0]!r}, have another id or none. The "
                "same ids are needed. Use a corpus made with the model's tokenizer."
            )
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"{name}: has {positions} positions, the texts {length} tokens. At most {positions} are allowed. "
            f"Use --max-length {positions}."
        )


def text_batches(corpus: TokenCorpus, num_texts: int, length: int, batch_size: int) -> Iterator[torch.Tensor]:
    """Yield the first `num_texts` texts as (up to batch_size, length) int64."""
    for first in range(0, num_texts, batch_size):
        texts = [corpus[index][:length] for index in range(first, min(first + batch_size, num_texts))]
        yield torch.from_numpy(np.stack(texts).astype(np.int64))


def print_tables(results: dict[str, Condensation]) -> None:
    """Print the summary, then the mean cosine of each layer."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    first = next(iter(results.values()))
    summary = Table(
        title=f"Embedding condensation: {first.num_texts} texts of {first.sequence_length} tokens", title_justify="left"
    )
    summary.add_column("model", overflow="fold")
    for heading in ("blocks", "Spearman rho", "Kendall tau", "last half", "last block"):
        summary.add_column(heading, justify="right")
    for name, result in results.items():
        numbers = (result.spearman, result.kendall, result.last_half, result.last_k[0])
        cells = (f"{number:.3f}" for number in numbers)
        summary.add_row(Text(name), str(len(result.mean_cosine) - 1), *cells)
    console.print(summary)
    layers = Table(title="Mean cosine by layer", title_justify="left")
    layers.add_column("layer", justify="right")
    for name in results:
        layers.add_column(Text(name), justify="right", overflow="fold")
    for layer in range(max(len(result.mean_cosine) for result in results.values())):
        means = [result.mean_cosine[layer : layer + 1] for result in results.values()]
        layers.add_row(str(layer), *(f"{mean[0]:.4f}" if len(mean) else "" for mean in means))
    console.print(layers)


def write_files(results: dict[str, Condensation], folder: Path) -> None:
    """Write one npz a model, heatmap.png with a panel a model, and curves.png."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, result in results.items():
        path = folder / f"{_file_name(name)}.npz"
        result.save(path)
        written.append(path)
    figure, grid = pyplot.subplots(
        1, len(results), figsize=(1.2 + 3.4 * len(results), 3.4), squeeze=False, sharey=True, layout="constrained"
    )
    labels = {name: name.replace("$", r"\$") for name in results}
    for axes, (name, result) in zip(grid[0], results.items(), strict=True):
        image = plot_heatmap(result, axes, labels[name])
        axes.label_outer()
    figure.colorbar(image, ax=grid[0].tolist(), label="probability density")
    curves, axes = pyplot.subplots(figsize=(5.4, 3.4), layout="constrained")
    plot_curves({labels[name]: result for name, result in results.items()}, axes)
    axes.legend(frameon=False)
    for name, drawing in (("heatmap.png", figure), ("curves.png", curves)):
        drawing.savefig(folder / name, dpi=200)
        pyplot.close(drawing)
        written.append(folder / name)
    for path in written:
        print(path)


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._@-]+", "_", name).strip("_.") or "model"


if __name__ == "__main__":
    sys.exit(main())
