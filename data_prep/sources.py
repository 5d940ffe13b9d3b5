"""Which source a name means: python-docs, text files on this machine, or a Hugging Face dataset."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from hub_datasets import SavedDataset, StreamedDataset, is_saved_dataset
from portions import Source
from prep_errors import InputError
from python_docs import PythonDocs
from text_files import SUFFIXES, TextFiles

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_NOTHING_THERE = "neither a known source nor an existing path"
_WHAT_THERE_IS = (
    f"Known: python-docs. Or give a file, a folder or a quoted pattern of {', '.join(SUFFIXES)} files, or "
    "hf:NAME[:CONFIG[:SPLIT]]."
)


def open_source(
    name: str,
    *,
    text_column: str = "text",
    dataset_config: str | None = None,
    dataset_split: str = "train",
    option: str = "--source",
) -> Source:
    """Return python-docs, the text files at a place, or a Hugging Face dataset.

    `hf:NAME[:CONFIG[:SPLIT]]` is a dataset of a hub or in a folder; what it says goes before `dataset_config` and
    `dataset_split`. A saved dataset needs no `hf:`, nor does a hub's name that is no path here. `option` is what errors
    name.

    Raises:
        InputError: nothing of that kind is there, or it has no such column.
    """
    if name == "python-docs":
        return PythonDocs()
    if name.startswith("hf:"):
        dataset = name.removeprefix("hf:")
        if not dataset or not Path(dataset).exists():
            dataset, *suffix = dataset.split(":")
            dataset_config = suffix[0] if suffix and suffix[0] else dataset_config
            dataset_split = suffix[1] if len(suffix) > 1 else dataset_split
            if not dataset or len(suffix) > 2:
                raise InputError(f"{option} {name}: not understood. hf:NAME[:CONFIG[:SPLIT]] is. Write it so.")
    elif Path(name).exists() or glob.has_magic(name):
        if not is_saved_dataset(Path(name)):
            return TextFiles(name, text_column, option)
        dataset = name
    elif _HUB_NAME.fullmatch(name) and not name.endswith(SUFFIXES):
        dataset = name
    else:
        raise InputError(f"{option} {name}: {_NOTHING_THERE}. {_WHAT_THERE_IS}")
    if is_saved_dataset(Path(dataset)):
        return SavedDataset(Path(dataset), text_column, dataset_split, f"{option} {name}")
    try:
        return StreamedDataset(dataset, text_column, dataset_config, dataset_split, f"{option} {name}")
    except InputError as error:
        if name.startswith("hf:"):
            raise
        reason = str(error).removeprefix(f"{option} {name}: ")
        raise InputError(f"{option} {name}: {_NOTHING_THERE}, and {reason} {_WHAT_THERE_IS}") from error
