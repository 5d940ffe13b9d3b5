"""Hugging Face datasets as a source: streamed from a hub or a folder, or memory-mapped where one was saved."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from arrow_columns import check_column, compact, cut_rows, plain_strings
from portions import Portion, Position
from prep_errors import InputError
from reading import open_saved, read_arrays, read_saved

_BATCH_ROWS = 128  # of a stream: few, as a row may be a whole book; many, as each batch has its price


def is_saved_dataset(folder: Path) -> bool:
    """Tell whether a folder was written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


class StreamedDataset:
    """A dataset of a hub, or a folder of data files that `datasets` knows, read as it comes and kept nowhere.

    To go on from a position, the shard (the file) that it lies in is read again up to there; those before are not.
    """

    def __init__(self, name: str, text_column: str, config: str | None, split: str, place: str) -> None:
        import datasets  # here: it takes a second, and files need none of it

        self._name, self._column, self._split, self._place = name, text_column, split, place
        try:
            self._builder = datasets.load_dataset_builder(name, config)
            features = self._builder.as_streaming_dataset(split=split).features
        except (OSError, ValueError, RuntimeError, ImportError, datasets.exceptions.DatasetsError) as error:
            raise InputError(
                f"{place}: no dataset that can be loaded ({_reason(error)}). Give a name on a hub that this machine "
                "reaches, or a folder; or name the configuration (--dataset-config) and split (--dataset-split)."
            ) from error
        self._columns_known = features is not None
        if self._columns_known:
            schema = features.arrow_schema
            check_column(place, text_column, dict(zip(schema.names, schema.types, strict=True)))
            if hasattr(self._builder.config, "columns"):  # of Parquet: other columns are not even fetched
                self._builder.config.columns = [text_column]

    def identity(self) -> dict[str, Any]:
        """Return name, configuration, split, and the revision: the hub's, or a hash of a folder's files."""
        identity = {
            "name": "hf",
            "dataset": self._name,
            "config": self._builder.config.name,
            "split": self._split,
            "revision": self._builder.hash,
        }
        return identity if self._column == "text" else identity | {"text_column": self._column}

    @property
    def units(self) -> int | None:
        """Rows, where the dataset's card tells."""
        splits = self._builder.info.splits
        known = splits.get(self._split) if splits else None
        return (known.num_examples or None) if known else None

    def portions(self, after: Position | None = None) -> Iterator[Portion]:
        """Yield the text column shard by shard, as Arrow memory.

        A position is a shard and a row, not the stream's own state_dict: of `datasets` 5.0.1 that one gives rows twice
        when it was taken in a run that had gone on from a state itself.
        """
        stream = self._builder.as_streaming_dataset(split=self._split).with_format("arrow")
        if self._columns_known:
            stream = stream.select_columns([self._column])
        first, row = (after["shard"], after["row"]) if after else (0, 0)
        for number in range(first, stream.num_shards):
            place = f"{self._place}, shard {number}"
            cuts = cut_rows(self._rows(stream.shard(num_shards=stream.num_shards, index=number), row, place))
            slices = next(cuts, None)
            while slices is not None:
                read = functools.partial(read_arrays, compact(slices), place, row)
                num_rows = sum(map(len, slices))
                row += num_rows
                slices = next(cuts, None)
                behind = {"shard": number + 1, "row": 0} if slices is None else {"shard": number, "row": row}
                yield Portion(read, behind, num_rows)
            row = 0

    def _rows(self, shard: Any, first_row: int, place: str) -> Iterator[pa.Array]:
        batches = shard.iter(batch_size=_BATCH_ROWS)
        row = 0
        while True:
            try:
                table = next(batches, None)
            except Exception as error:  # whatever the library of the file's format raises
                raise InputError(
                    f"{place}: cannot be read on behind row {row} ({_reason(error)}). Repair the dataset, or start "
                    "again if the hub could not be reached."
                ) from error
            if table is None:
                return
            check_column(self._place, self._column, dict(zip(table.schema.names, table.schema.types, strict=True)))
            for array in plain_strings(table.column(self._column)):
                passed = max(0, first_row - row)
                row += len(array)
                if passed < len(array):
                    yield array.slice(passed)


class SavedDataset:
    """A dataset that `save_to_disk` wrote: the main process and the workers map its files into memory.

    `split` chooses among those that were saved together; a dataset that was saved alone is taken whatever it says.
    """

    def __init__(self, folder: Path, text_column: str, split: str, place: str) -> None:
        import datasets

        self._folder, self._column, self._split = folder, text_column, split
        try:
            loaded = datasets.load_from_disk(str(folder), keep_in_memory=False)
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise InputError(
                f"{place}: a saved dataset that cannot be loaded ({_reason(error)}). Save it again."
            ) from error
        splits = loaded if isinstance(loaded, datasets.DatasetDict) else {split: loaded}
        if split not in splits:
            raise InputError(
                f"{place}: no split '{split}'. There are {', '.join(splits)}. Name one with --dataset-split."
            )
        dataset = splits[split]
        schema = dataset.features.arrow_schema
        check_column(place, text_column, dict(zip(schema.names, schema.types, strict=True)))
        self._files = [file["filename"] for file in dataset.cache_files]
        self._rows: int = dataset.num_rows

    def identity(self) -> dict[str, Any]:
        """Return folder, split, number of rows, and the fingerprint that was saved with them."""
        state = json.loads((Path(self._files[0]).parent / "state.json").read_text(encoding="utf-8"))
        identity = {
            "name": "hf-saved",
            "dataset": str(self._folder),
            "split": self._split,
            "rows": self._rows,
            "fingerprint": state["_fingerprint"],
        }
        return identity if self._column == "text" else identity | {"text_column": self._column}

    @property
    def units(self) -> int:
        """Rows."""
        return self._rows

    def portions(self, after: Position | None = None) -> Iterator[Portion]:
        """Yield file by file; a portion is no more than a range of rows."""
        number, row = (after["file"], after["row"]) if after else (0, 0)
        for index in range(number, len(self._files)):
            file = self._files[index]
            column = open_saved(file).column(self._column)
            arrays = (array for array in plain_strings(column.slice(row)) if len(array))
            for slices in cut_rows(arrays):
                num_rows = sum(map(len, slices))
                read = functools.partial(read_saved, file, self._column, row, num_rows)
                row += num_rows
                is_whole = row == len(column)
                yield Portion(read, {"file": index + is_whole, "row": 0 if is_whole else row}, num_rows)
            row = 0


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
