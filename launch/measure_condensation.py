#!/usr/bin/env python3
"""Measure how far the hidden states of models condense, layer by layer, and how that changes with their size.

python launch/measure_condensation.py gpt2 gpt2-medium gpt2-large gpt2-xl --dataset wikitext --out condensation
python launch/measure_condensation.py gpt2 Qwen/Qwen3-0.6B --texts texts.jsonl --repetitions 100 --max-length 512
python launch/measure_condensation.py runs/demo runs/demo@100 --corpus data/python-docs --out condensation

Texts are one a line of FILE, or the key "text" of each line of a .jsonl file, tokenized with each model's own
tokenizer; or drawn from a data set of the paper, as the package embedding-condensation does it; or the validation split
of a corpus that data_prep wrote. Texts of fewer than --max-length tokens are passed over. A model that fails stops no
other; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dispersion_pretrain.condensation import causal_lm_forward, measure, require_finite
from dispersion_pretrain.condensation_family import Member, print_tables, write_files
from dispersion_pretrain.condensation_texts import (
    DATASETS,
    CorpusTexts,
    DatasetTexts,
    FileTexts,
    Subject,
    TextBatches,
    Texts,
    load_tokenizer,
)
from dispersion_pretrain.model import load_exported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 where a model could not be measured, with a line of explanation for each."""
    options = parse_arguments(arguments)
    try:
        texts = open_texts(options)
        members = measure_models(options, texts)
        if members:
            print_tables(members)
            if options.out is not None:
                print(*write_files(members, options.out), sep="\n")
    except (ValueError, RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0 if len(members) == len(set(options.models)) else 1


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="run folder, RUN@STEP, Hugging Face folder or name")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--texts", type=Path, metavar="FILE", help="a text a line, or .jsonl with the key text")
    texts.add_argument("--corpus", metavar="DIR", help="folder or URL that data_prep wrote")
    texts.add_argument("--dataset", choices=tuple(DATASETS), help="default where no texts are named: wikitext")
    parser.add_argument("--datasets", type=Path, metavar="DIR", help="mirror of the data sets in local files")
    parser.add_argument("--cache", type=Path, help="local folder for the shards of a remote corpus")
    parser.add_argument("--repetitions", type=int, default=100, help="texts to average (default: 100)")
    parser.add_argument("--max-length", type=int, help="tokens of each text (default: 512, or all of a corpus' fewer)")
    parser.add_argument("--batch-size", type=int, default=4, help="texts in one forward pass (default: 4)")
    parser.add_argument("--precision", choices=tuple(_DTYPES), default="float32", help="of the forward pass")
    parser.add_argument("--out", type=Path, help="folder for tables (CSV), pictures (PNG) and measurements (npz)")
    options = parser.parse_args(arguments)
    for name, minimum in (("repetitions", 1), ("max_length", 2), ("batch_size", 1)):
        value = getattr(options, name)
        if value is not None and value < minimum:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag}: {value} is not allowed. At least {minimum} is. Raise it.")
    if options.out is not None and options.out.exists() and not options.out.is_dir():
        parser.error(f"--out: {options.out} is a file. A folder is needed. Name another.")
    for flag, given, source in (
        ("--datasets", options.datasets, "--texts" if options.texts else options.corpus and "--corpus"),
        ("--cache", options.cache, None if options.corpus else "texts that are no corpus"),
    ):
        if given is not None and source is not None:
            parser.error(f"{flag}: {given} has no meaning beside {source}. Leave it out.")
    return options


def open_texts(options: argparse.Namespace) -> Texts:
    """The texts that the command line names."""
    if options.corpus is not None:
        return CorpusTexts(options.corpus, options.cache, options.max_length)
    if options.texts is not None:
        return FileTexts(options.texts, options.repetitions, options.max_length)
    return DatasetTexts(options.dataset or "wikitext", options.datasets, options.repetitions, options.max_length)


def measure_models(options: argparse.Namespace, texts: Texts) -> list[Member]:
    """Measure the models one after another; what goes wrong with one is printed, and the next one follows."""
    members = []
    for name in dict.fromkeys(options.models):
        try:
            members.append(measure_model(name, options, texts))
        except Exception as error:  # a model folder is not ours: its libraries raise whatever they like
            known = isinstance(error, ValueError | RuntimeError | OSError)
            message = str(error) if known else f"{type(error).__name__}: {error}"
            print(message if message.startswith(f"{name}: ") else f"{name}: {message}", file=sys.stderr)
    return members


def measure_model(name: str, options: argparse.Namespace, texts: Texts) -> Member:
    """Measure one model, which is gone from memory afterwards."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = load_subject(name, _DTYPES[options.precision])
    check_positions(subject, texts.length)
    model: PreTrainedModel = subject.model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides `self`
    require_finite(model)
    batches = TextBatches(texts, subject, options.repetitions, options.batch_size)
    result = measure(causal_lm_forward(model), batches)
    print(f"{name}: {result.num_texts} texts of {result.sequence_length} tokens of {texts.name}, "
          f"{batches.num_short} shorter ones passed over", flush=True)  # fmt: skip
    if result.num_texts < options.repetitions:
        print(f"{name}: --repetitions: {options.repetitions}, but {texts.name} has {result.num_texts} texts that are "
              "long enough; they are used", file=sys.stderr)  # fmt: skip
    return Member(name, model.num_parameters(), result)


def load_subject(name: str, dtype: torch.dtype) -> Subject:
    """Load a run's checkpoint (exported to a folder that is removed again), a Hugging Face folder or name.

    Raises:
        ValueError: it is none of these.
    """
    run_folder = Path(name.partition("@")[0])
    if (run_folder / "config.yaml").is_file() or (run_folder / "checkpoints").is_dir():
        from dispersion_pretrain.export import export_run  # brings DeepSpeed, which the other models do not need

        with tempfile.TemporaryDirectory() as scratch:
            folder = export_run(name, Path(scratch, "model"), check=False)
            return Subject(name, load_exported(folder, dtype=dtype), load_tokenizer(str(folder)))
    try:
        model = load_exported(name, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise ValueError(
            f"{name}: is no run folder and no causal language model that transformers can load ({reason}). "
            "A run, RUN@STEP, a Hugging Face folder or name is allowed. Correct the name."
        ) from error
    return Subject(name, model, load_tokenizer(name))


def check_positions(subject: Subject, length: int) -> None:
    """Raise ValueError where texts are too long for a model."""
    positions = getattr(subject.model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(
            f"{subject.name}: has {positions} positions, the texts {length} tokens. At most {positions} are allowed. "
            f"Use --max-length {positions}."
        )


if __name__ == "__main__":
    sys.exit(main())
