"""The texts on which condensation is measured: a corpus of tokens, a file of texts, or a data set of the paper.

Every source gives one model's texts one after another, so that memory does not grow with their number. A corpus was
tokenized with one tokenizer, which must be the model's; the other sources are tokenized with each model's own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dispersion_pretrain.condensation import TEXT_TOKENS
from dispersion_pretrain.corpus import TokenCorpus, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LEAST_WORDS = 1024  # of a text from a data set, as in the package embedding-condensation


class _Dataset(NamedTuple):
    hub_name: str
    config: str | None
    column: str


DATASETS = {  # and their columns as in embedding-condensation 2.0, there called wikipedia, pubmed, imdb and squad
    "wikitext": _Dataset("Salesforce/wikitext", "wikitext-103-v1", "text"),
    "pubmed_qa": _Dataset("qiaojin/PubMedQA", "pqa_labeled", "long_answer"),
    "imdb": _Dataset("stanfordnlp/imdb", None, "text"),
    "squad": _Dataset("rajpurkar/squad", None, "context"),
}


@dataclass(frozen=True)
class Subject:
    """A model that is to be measured, with the name that errors give it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None  # None: it came without one

    @property
    def vocabulary(self) -> int:
        """Rows of its embedding matrix: its token ids are less."""
        embeddings: Any = self.model.get_input_embeddings()
        return int(embeddings.weight.shape[0])


class Texts(Protocol):
    """A source of texts."""

    name: str
    length: int  # tokens of a text; what follows is cut off

    def token_ids(self, subject: Subject) -> Iterator[Sequence[int]]:
        """The ids of one text after another, at most `length` of each. Raises ValueError where they do not fit."""


class CorpusTexts:
    """The validation sequences of a corpus that data_prep wrote."""

    def __init__(self, location: str, cache: Path | None, length: int | None) -> None:
        """Open it; `length` None: 512, or the corpus' own where that is less.

        Raises:
            ValueError: there is no such corpus, or its sequences are shorter than `length`.
        """
        self.name = location
        self._manifest = read_manifest(location)
        longest = self._manifest.sequence_length
        self.length = length or min(TEXT_TOKENS, longest)
        if self.length > longest:
            raise ValueError(
                f"--max-length: {self.length}, but the texts of {location} have {longest} tokens. At most that many "
                "are allowed. Lower it, or make a corpus of longer sequences."
            )
        self._corpus = TokenCorpus(self._manifest, "validation", cache)

    def token_ids(self, subject: Subject) -> Iterator[Sequence[int]]:
        """The first tokens of one sequence after another."""
        self._check_fit(subject)
        for index in range(len(self._corpus)):
            yield self._corpus[index][: self.length].tolist()

    def _check_fit(self, subject: Subject) -> None:
        manifest = self._manifest
        corpus = f"{manifest.location} ({manifest.tokenizer.name})"
        if manifest.vocab_size > subject.vocabulary:
            raise ValueError(
                f"{subject.name}: its vocabulary has {subject.vocabulary} tokens, that of the corpus {corpus} has "
                f"{manifest.vocab_size}. The model's must hold the corpus'. Use a corpus made with the model's "
                "tokenizer."
            )
        corpus_tokenizer = load_tokenizer(f"{manifest.location}/{manifest.tokenizer.folder}")
        if subject.tokenizer is None or corpus_tokenizer is None:
            return
        ids, corpus_ids = subject.tokenizer.get_vocab(), corpus_tokenizer.get_vocab()
        foreign = sorted(token for token, index in corpus_ids.items() if ids.get(token) != index)
        if foreign:
            raise ValueError(
                f"{subject.name}: its tokenizer ({len(ids)} tokens) is not that of the corpus {corpus}, of "
                f"{len(corpus_ids)}: {len(foreign)} tokens, such as {foreign[0]!r}, have another id or none. The same "
                "ids are needed. Use a corpus made with the model's tokenizer."
            )


class FileTexts:
    """One text a line of a plain file, or in the key `text` of each line of a .jsonl file; blank lines are skipped."""

    def __init__(self, path: Path, num_texts: int, length: int | None) -> None:
        """Check the first `num_texts` texts, before any model is loaded.

        Raises:
            ValueError: the file is missing, holds no text, or a line of it is not as it must be.
        """
        self.name = str(path)
        self.length = length or TEXT_TOKENS
        self._path = path
        if not path.is_file():
            raise ValueError(f"{path}: is no file. One with a text a line, or a .jsonl file, is needed. Correct it.")
        if not sum(1 for _ in itertools.islice(self._strings(), num_texts)):
            raise ValueError(f"{path}: holds no text. At least 1 is needed, one a line. Give another file.")

    def token_ids(self, subject: Subject) -> Iterator[Sequence[int]]:
        """The first tokens of one line after another."""
        return _tokenize(self._strings(), subject, self.length)

    def _strings(self) -> Iterator[str]:
        with self._path.open("rb") as file:
            for number, line in enumerate(file, 1):
                place = f"{self._path}, line {number}"
                try:
                    text = line.decode("utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{place}: is not UTF-8 ({error.reason}). It must be. Convert the file.") from None
                if text.strip():
                    yield _text_of(text, place) if self._path.suffix == ".jsonl" else text


class DatasetTexts:
    """Texts of one of the paper's data sets, drawn as embedding-condensation 2.0 draws them.

    Text r begins at row default_rng(r).integers(0.95 x rows) of the train split and joins rows until it has 1,024
    words, or twice the length, so that what is cut to a length of up to about 1,000 tokens is what the package
    measures. (It counts words with nltk, which finds a few more.)
    """

    def __init__(self, dataset: str, folder: Path | None, num_texts: int, length: int | None) -> None:
        """Open the data set: of the Hugging Face hub, into its cache, or of `folder`, a mirror in local files.

        A data set of a mirror is FOLDER/<name on the hub>/<config or "default">/train.parquet.

        Raises:
            ValueError: it cannot be loaded, or is not what its name says.
        """
        import datasets  # here: it takes a second, and the other sources need none of it

        source = DATASETS[dataset]
        self.name = dataset
        self._num_texts = num_texts
        self.length = length or TEXT_TOKENS
        where = f"{source.hub_name} of the Hugging Face hub"
        try:
            if folder is None:
                rows = datasets.load_dataset(source.hub_name, source.config, split="train")
            else:
                path = folder / source.hub_name / (source.config or "default") / "train.parquet"
                where = str(path)
                rows = datasets.load_dataset("parquet", data_files=str(path), split="train")
            self._column = rows.select_columns([source.column])
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"--dataset {dataset}: cannot read the column {source.column!r} of {where} ({type(error).__name__}: "
                f"{reason}). The train split is needed. Without a way to the hub, make a mirror with "
                "launch/mirror_datasets.py and name its folder with --datasets."
            ) from error
        self._key = source.column
        if not len(self._column):
            raise ValueError(f"--dataset {dataset}: {where} has no rows. At least 1 is needed. Load it again.")

    def token_ids(self, subject: Subject) -> Iterator[Sequence[int]]:
        """The first tokens of one drawn text after another."""
        return _tokenize(map(self.text, range(self._num_texts)), subject, self.length)

    def text(self, repetition: int) -> str:
        """The text that is drawn in one repetition."""
        num_rows = len(self._column)
        first = int(np.random.default_rng(repetition).integers(0, max(1, int(num_rows * 0.95))))
        parts: list[str] = []
        words = 0
        while words < max(_LEAST_WORDS, 2 * self.length) and first + len(parts) < num_rows:
            parts.append(self._column[first + len(parts)][self._key])
            words += len(parts[-1].split())
        return "".join(parts)


class TextBatches:
    """The first `num_texts` texts of a source that are long enough, in batches for one model; iterate it once.

    Afterwards `num_short` tells how many were passed over.
    """

    def __init__(self, texts: Texts, subject: Subject, num_texts: int, batch_size: int) -> None:
        self._texts, self._subject = texts, subject
        self._num_texts, self._batch_size = num_texts, batch_size
        self.num_short = 0

    def __iter__(self) -> Iterator[Tensor]:
        """Yield (up to batch_size, length) int64.

        Raises:
            ValueError: an id has no row in the model's embedding, or no text is long enough.
        """
        long_enough = itertools.islice(self._long_enough(), self._num_texts)
        while batch := list(itertools.islice(long_enough, self._batch_size)):
            yield torch.tensor(batch, dtype=torch.int64)

    def _long_enough(self) -> Iterator[Sequence[int]]:
        longest, found, subject = 0, False, self._subject
        for ids in self._texts.token_ids(subject):
            if len(ids) < self._texts.length:
                longest = max(longest, len(ids))
                self.num_short += 1
                continue
            if max(ids) >= subject.vocabulary:
                raise _no_such_id(subject, max(ids))
            found = True
            yield ids
        if not found:
            raise ValueError(
                f"{subject.name}: none of {self.num_short} texts of {self._texts.name} has {self._texts.length} tokens "
                f"or more; the longest has {longest}. Texts of one length are averaged, so shorter ones are passed "
                f"over. Use --max-length {max(2, longest)} or longer texts (a file has one a line; --corpus takes "
                "running text that data_prep divided)."
            )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a Hugging Face folder or name; None where it has none that transformers can load."""
    from transformers import AutoTokenizer

    folder = Path(name)
    files = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        return None
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    return tokenizer


def _tokenize(strings: Iterator[str], subject: Subject, length: int) -> Iterator[Sequence[int]]:
    """Token ids of each text, special tokens included, as the tokenizer sets them."""
    tokenizer = subject.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"{subject.name}: comes without a tokenizer that can be loaded. One is needed for texts. Put its files "
            "into the model's folder, or use --corpus with a corpus of the model's tokens."
        )
    if tokenizer.vocab_size > subject.vocabulary:
        raise _no_such_id(subject, tokenizer.vocab_size - 1)
    return (tokenizer(text, truncation=True, max_length=length)["input_ids"] for text in strings)


def _no_such_id(subject: Subject, token_id: int) -> ValueError:
    return ValueError(
        f"{subject.name}: its tokenizer gives the token id {token_id}, but its embedding has {subject.vocabulary} "
        "rows. Every id needs a row. Use the tokenizer with which the model was trained."
    )


def _text_of(line: str, place: str) -> str:
    """The text in a line of JSON."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f'{place}: is no JSON ({error}). {{"text": "..."}} is needed. Correct the line.') from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{place}: has no text. An object {{"text": "..."}} is needed. Correct the line.')
    if not text.strip():
        raise ValueError(f"{place}: the text is empty. Every text needs tokens. Remove the line.")
    return text
