"""The tokenizer inside a GGUF file: byte-level BPE, with the beginning and end of text that the file names.

Built here rather than by transformers: its converter (4.57.6) makes the beginning of text the end of a document, for
SmolLM2 <|im_start|> instead of <|im_end|>, and cuts words as GPT-2 does whatever the file says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import _transformers_without_torch  # noqa: F401  (before transformers)

# isort: split
import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prep_errors import InputError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How words are cut, by `tokenizer.ggml.pre`; the names are llama.cpp's. Another rule would be other tokens, silently.
_GPT2, _SINGLE_DIGITS, _LLAMA3, _QWEN2 = "GPT-2", "GPT-2 with single digits", "Llama 3", "Qwen 2"
_CUTTING = {
    "gpt-2": _GPT2,
    "phi-2": _GPT2,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _QWEN2,
}


def load_gguf(path: Path, place: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file; its ids are those of the model's embeddings.

    Raises:
        InputError: no GGUF file, or its tokenizer is of a kind that is not read.
    """
    try:
        fields = gguf.GGUFReader(path).fields
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{place}: cannot be read as GGUF ({error}). Copy it again.") from error

    def field(name: str) -> Any:
        found = fields.get(f"tokenizer.ggml.{name}")
        return None if found is None else found.contents()

    tokens, merges = field("tokens"), field("merges")
    if field("model") != "gpt2" or not tokens or not merges or field("pre") not in _CUTTING:
        raise InputError(
            f"{place}: its tokenizer is of the kind {field('model')!r}, words cut as {field('pre')!r}. Byte-level BPE "
            f"('gpt2') with words cut as {', '.join(_CUTTING)} is read. Give the Hugging Face folder of the same model."
        )
    kinds = field("token_type") or [gguf.TokenType.NORMAL] * len(tokens)
    ends = {name: field(f"{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
    special = {number for number in ends.values() if number is not None}
    special |= {number for number, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL}
    if len(set(tokens)) != len(kinds) or not special <= set(range(len(tokens))):
        raise InputError(f"{place}: tokens of its tokenizer are there twice or missing. Copy or convert it again.")

    backend = _byte_level(tokens, merges, _CUTTING[field("pre")])
    backend.add_special_tokens(
        [AddedToken(tokens[number], normalized=False, special=True) for number in sorted(special)]
    )
    defined = [number for number, kind in enumerate(kinds) if kind == gguf.TokenType.USER_DEFINED]
    backend.add_tokens([AddedToken(tokens[number], normalized=False) for number in defined if number not in special])
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    roles = {names[name]: tokens[number] for name, number in ends.items() if number is not None}
    inputs = ["input_ids", "attention_mask"]  # by default also token_type_ids: GPT2 adds those, embedded
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, model_input_names=inputs, **roles
    )


def _byte_level(tokens: list[str], merges: list[str], cutting: str) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=cutting == _LLAMA3))
    steps: list[Any] = []
    if cutting == _SINGLE_DIGITS:
        steps = [pre_tokenizers.Digits(individual_digits=True)]
    elif cutting in (_LLAMA3, _QWEN2):
        words = _WORDS.replace("DIGITS", r"\p{N}{1,3}" if cutting == _LLAMA3 else r"\p{N}")
        steps = [pre_tokenizers.Split(Regex(words), behavior="isolated")]
    if cutting == _QWEN2:
        backend.normalizer = normalizers.NFC()
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cutting in (_GPT2, _SINGLE_DIGITS))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*steps, bytes_of])
    backend.decoder = decoders.ByteLevel()
    return backend
