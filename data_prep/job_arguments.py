"""The command line, a recipe file beneath it, and what of both decides the bytes of a corpus."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

from job_source import SourcePair
from packing import SHARD_BYTES, ShardFormat
from places import is_remote
from portions import Source
from prep_errors import InputError
from recipes import read_recipe
from sources import open_source

FORMAT_VERSION = 1
VALIDATION_SHARE = 0.05
STORES = ("s3://", "gs://", "oci://", "azure://", "azure-dl://", "hf://datasets/", "dbfs:/")

_DEFAULTS: dict[str, Any] = {
    "validation_source": None,
    "validation_share": None,
    "text_column": "text",
    "dataset_config": None,
    "dataset_split": "train",
    "minimum_characters": 0,
    "deduplicate": False,
    "shard_bytes": SHARD_BYTES,
    "work": None,
    "overwrite": False,
}


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}. --help shows what is allowed.\n")


def _parser() -> argparse.ArgumentParser:
    # SUPPRESS: what was not given must not hide what a recipe says
    parser = _OneLineParser(
        description="Tokenize text into a corpus of MDS shards.", argument_default=argparse.SUPPRESS
    )
    parser.add_argument("--recipe", type=Path, help="YAML file with these options; what is given here counts more")
    parser.add_argument("--source", help="python-docs; a file, folder or pattern; hf:NAME[:CONFIG[:SPLIT]]")
    parser.add_argument("--tokenizer", help="train:SIZE (byte-level BPE), or a folder, file or hub name")
    parser.add_argument(
        "--seq-len", type=int, nargs="+", help="tokens in a block; for several lengths --out holds seqLENGTH folders"
    )
    parser.add_argument("--out", required=True, help="folder of the corpus, or a URL such as s3://bucket/prefix")
    validation = parser.add_mutually_exclusive_group()
    validation.add_argument("--validation-source", help="where validation documents come from, as --source")
    validation.add_argument(
        "--validation-share", type=float, help=f"of the documents, chosen by hash; default {VALIDATION_SHARE}"
    )
    parser.add_argument("--text-column", help="key or column that holds the text; default text")
    parser.add_argument("--dataset-config", help="configuration of a hub dataset")
    parser.add_argument("--dataset-split", help="split of a hub dataset; default train")
    parser.add_argument("--minimum-characters", type=int, help="leave out documents that are shorter; default 0")
    parser.add_argument(
        "--deduplicate", action=argparse.BooleanOptionalAction, help="leave out documents whose text came before"
    )
    parser.add_argument("--processes", type=int, help="processors to use; default all")
    parser.add_argument("--shard-bytes", type=int, help=f"size of a shard; default {SHARD_BYTES}")
    parser.add_argument(
        "--work", type=Path, help="folder for the state of a job whose --out is a URL; default below .tokenize_to_mds"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a corpus at --out, or an unfinished job of other arguments"
    )
    return parser


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read and check the command line and the recipe it names.

    Raises:
        InputError: a value is out of range, or the recipe is wrong.
    """
    parser = _parser()
    given = vars(parser.parse_args(argv))
    recipe: dict[str, Any] = {}
    if "recipe" in given:
        recipe = read_recipe(given["recipe"])
        if {"validation_source", "validation_share"} & set(given):
            recipe = {key: value for key, value in recipe.items() if not key.startswith("validation_")}
    values = _DEFAULTS | {"processes": _processors()} | recipe | given
    missing = [f"--{name.replace('_', '-')}" for name in ("source", "tokenizer", "seq_len") if name not in values]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    arguments = argparse.Namespace(**values)
    if isinstance(arguments.seq_len, int):
        arguments.seq_len = [arguments.seq_len]
    arguments.seq_len = sorted(arguments.seq_len)
    if arguments.validation_source is None and arguments.validation_share is None:
        arguments.validation_share = VALIDATION_SHARE
    _check(arguments)
    return arguments


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check(arguments: argparse.Namespace) -> None:
    for length in arguments.seq_len:
        if length < 2:
            raise InputError(f"--seq-len {length}: too short to predict a token. At least 2 is needed.")
        if arguments.seq_len.count(length) > 1:
            raise InputError(f"--seq-len {length}: is given twice. Each length makes one corpus. Give it once.")
        ShardFormat(length, "uint32", arguments.shard_bytes)  # checks the size; the type is not known yet
    if arguments.validation_share is not None and not 0 < arguments.validation_share < 1:
        raise InputError(
            f"--validation-share {arguments.validation_share}: leaves a split empty. A number between 0 and 1 is "
            "allowed. Give for example 0.05, or documents with --validation-source."
        )
    if arguments.processes < 1:
        raise InputError(f"--processes {arguments.processes}: nobody would work. At least 1 is needed.")
    if arguments.minimum_characters < 0:
        raise InputError(
            f"--minimum-characters {arguments.minimum_characters}: no text is so short. 0 or more is allowed. "
            "0 keeps every document."
        )
    if not is_remote(arguments.out):
        if arguments.work is not None:
            raise InputError(
                f"--work {arguments.work}: is for an --out that is a URL. The state of {arguments.out} lies beside it. "
                "Leave --work out."
            )
    elif not arguments.out.startswith(STORES):
        raise InputError(
            f"--out {arguments.out}: unknown kind of storage. {', '.join(STORES)} are written. "
            "Give one of them, or a folder."
        )


def open_job_source(arguments: argparse.Namespace) -> Source:
    """Return the documents of both splits.

    Raises:
        InputError: there is no such source.
    """
    train = open_source(
        arguments.source,
        text_column=arguments.text_column,
        dataset_config=arguments.dataset_config,
        dataset_split=arguments.dataset_split,
    )
    if arguments.validation_source is None:
        return train
    validation = open_source(
        arguments.validation_source,
        text_column=arguments.text_column,
        dataset_config=arguments.dataset_config,
        dataset_split="validation",
        option="--validation-source",
    )
    return SourcePair(train, validation)


def corpus_recipe(arguments: argparse.Namespace, source: Source) -> dict[str, Any]:
    """Return what of corpus.json follows from the command, but for the length: equal recipes make equal corpora."""
    return {
        "format_version": FORMAT_VERSION,
        "source": source.identity(),
        "tokenizer": {"name": arguments.tokenizer},
        "validation_share": arguments.validation_share,
        "minimum_characters": arguments.minimum_characters,
        "deduplicate": arguments.deduplicate,
        "shard_bytes": arguments.shard_bytes,
    }


def differences(wanted: dict[str, Any], found: dict[str, Any], prefix: str = "") -> list[str]:
    """Name what a corpus or job there was asked for otherwise; what it does not say was the default."""
    different = []
    for key, value in wanted.items():
        there = found.get(key, _DEFAULTS.get(key))
        if isinstance(value, dict) and isinstance(there, dict):
            different += differences(value, there, f"{prefix}{key}.")
        elif there != value:
            different.append(f"{prefix}{key} is {there!r} there, {value!r} is asked for")
    return different
