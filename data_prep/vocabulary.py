"""The tokenizer of a corpus: trained on its own text, or one that exists already."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import _transformers_without_torch  # noqa: F401  (before transformers)

# isort: split
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from encoding import load_encoder
from gguf_tokenizers import load_gguf
from prep_errors import InputError

END_OF_DOCUMENT = "<|endoftext|>"
SAMPLE_BYTES = 2 * 2**30  # of text to train on: the merges hardly change with more, memory and time do
_PROBE = "  Two  spaces\n\n\ttabs, 12345 digits, don't, na\u00efve \u4e2d\u6587 \u0434\u0430 \U0001f600\r\n "
SMALLEST_VOCABULARY = 257  # one token for each byte, and the end of a document


def requested_size(name: str) -> int | None:
    """Return the SIZE of a `train:SIZE` name, None for the name of an existing tokenizer.

    Raises:
        InputError: SIZE is not a number, or too small for a byte-level vocabulary.
    """
    kind, _, size = name.partition(":")
    if kind != "train":
        return None
    if not size.isdecimal() or int(size) < SMALLEST_VOCABULARY:
        raise InputError(
            f"--tokenizer {name}: '{size}' is no vocabulary size that can be trained. At least "
            f"{SMALLEST_VOCABULARY} (256 bytes and {END_OF_DOCUMENT}) is needed. Give for example train:8192."
        )
    return int(size)


def train(documents: Iterator[str], vocab_size: int, sample_bytes: int = SAMPLE_BYTES) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, as GPT-2's: no text is unknown to it, decoding gives the text back.

    No document is taken any more once the text has `sample_bytes`: the same tokenizer, whatever follows.

    Raises:
        InputError: the text is too small for so many tokens.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_sample(documents, sample_bytes), trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise InputError(
            f"--tokenizer train:{vocab_size}: the training text yields only {bpe.get_vocab_size()} tokens. "
            f"As many as asked for are needed. Give train:{bpe.get_vocab_size()} or less, or more text."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_DOCUMENT,
        bos_token=END_OF_DOCUMENT,
        unk_token=END_OF_DOCUMENT,
        model_input_names=["input_ids", "attention_mask"],  # by default also token_type_ids: GPT2 adds those, embedded
        clean_up_tokenization_spaces=False,
    )


def _sample(documents: Iterator[str], sample_bytes: int) -> Iterator[str]:
    taken_bytes = 0
    for document in documents:
        yield document
        taken_bytes += len(document.encode("utf-8"))
        if taken_bytes >= sample_bytes:
            return


def load(name: str) -> PreTrainedTokenizerFast:
    """Load a tokenizer from a local Hugging Face folder, from the hub, or from a GGUF file.

    Raises:
        InputError: it cannot be loaded, has no tokenizer.json, or no end-of-document token.
    """
    tokenizer: PreTrainedTokenizerBase
    if name.endswith(".gguf") and Path(name).is_file():
        tokenizer = load_gguf(Path(name), f"--tokenizer {name}")
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except Exception as error:  # whatever transformers and tokenizers raise on a strange file
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"--tokenizer {name}: cannot be loaded ({reason}). Give train:SIZE, a local Hugging Face folder, a "
                ".gguf file, or a name on a hub that this machine reaches."
            ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(f"--tokenizer {name}: has no tokenizer.json. Give a tokenizer of the `tokenizers` library.")
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"--tokenizer {name}: has no end-of-document token. Set eos_token in its tokenizer_config.json."
        )
    return tokenizer


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, str]:
    """Write the folder that AutoTokenizer.from_pretrained loads; return the sha256 of its files by name.

    Raises:
        InputError: what is saved encodes otherwise, so that corpus and evaluation would disagree.
    """
    tokenizer.save_pretrained(folder)
    in_workers = load_encoder(folder / "tokenizer.json").encode(_PROBE, add_special_tokens=False).ids
    elsewhere = AutoTokenizer.from_pretrained(folder).encode(_PROBE, add_special_tokens=False)
    if in_workers != elsewhere:
        raise InputError(
            f"--tokenizer {tokenizer.name_or_path}: its tokenizer.json alone encodes otherwise than the whole folder. "
            "They must agree. Save it anew with save_pretrained, or take another tokenizer."
        )
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def use_processors(count: int) -> None:
    """Let the `tokenizers` library use `count` processors; to be called before its first work."""
    os.environ["RAYON_NUM_THREADS"] = str(count)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if count > 1 else "false"
