"""Tokenizers of the data job: trained, loaded, taken from GGUF files; and what worker processes make of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _torchvision_guard  # noqa: F401  (before transformers)

# isort: split
import gguf
import pytest
import tokenizers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import vocabulary
from encoding import load_encoder
from prep_errors import InputError

TRAINING = [
    f"Chapter {number}: the cat's 2024 hats, 12345 of them; don't  panic!\n\n\tindented naïve façade 中文 да\n"
    for number in range(50)
]
AWKWARD = [
    "  two  spaces   and   more ",
    "tabs\t\tand\r\n\r\nlines\n\n\n",
    "12345 digits 2024, 1.5e-3",
    "don't CAN'T they'll",
    "naïve façade 中文 да \U0001f600 e\u0301 \u00a0\u2003\u200b",
    "<|endoftext|>",
    "a <|endoftext|> b<|im_end|></s><s>[UNK]",
    "\x00\x01",
    "▁underscore ▁",
    "",
    " ",
]


@pytest.fixture(autouse=True)
def processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """`use_processors` sets these for its process: they must not outlive a test."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def llama_like() -> PreTrainedTokenizerFast:
    """As SentencePiece makes them: spaces are underscores, unknown text falls back to bytes."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator(TRAINING, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", bos_token="<s>", unk_token="<unk>", model_max_length=8
    )


def cutting_and_padding() -> PreTrainedTokenizerFast:
    """A tokenizer that was saved as its last user left it."""
    tokenizer = vocabulary.train(iter(TRAINING), 320)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    return tokenizer


@pytest.mark.parametrize("make", [lambda: vocabulary.train(iter(TRAINING), 350), llama_like, cutting_and_padding])
def test_workers_encode_as_the_saved_tokenizer_does(tmp_path: Path, make: Any) -> None:
    files = vocabulary.save(make(), tmp_path / "tokenizer")
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(files)
    encoder = load_encoder(tmp_path / "tokenizer" / "tokenizer.json")
    saved = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", split_special_tokens=True)
    batch = encoder.encode_batch_fast(AWKWARD, add_special_tokens=False)
    for text, encoding in zip(AWKWARD, batch, strict=True):
        expected = saved.encode(text, add_special_tokens=False, truncation=False, padding=False)
        assert encoding.ids == expected, text
        assert saved.eos_token_id not in encoding.ids
        if make is not llama_like:
            assert encoder.decode(encoding.ids, skip_special_tokens=False) == text


def test_folder_that_disagrees_with_its_tokenizer_json_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = vocabulary.train(iter(TRAINING), 350)
    vocabulary.train(iter(TRAINING[:1]), 300).save_pretrained(tmp_path / "other")
    other = AutoTokenizer.from_pretrained(tmp_path / "other")
    monkeypatch.setattr(vocabulary.AutoTokenizer, "from_pretrained", lambda folder: other)
    with pytest.raises(InputError, match=r"tokenizer\.json alone encodes otherwise than the whole folder"):
        vocabulary.save(tokenizer, tmp_path / "tokenizer")


def test_text_cannot_forge_the_end_of_a_document(tmp_path: Path) -> None:
    tokenizer = vocabulary.train(iter(["some text " * 50]), 260)
    vocabulary.save(tokenizer, tmp_path)
    text = "before <|endoftext|> after"
    ids = load_encoder(tmp_path / "tokenizer.json").encode(text, add_special_tokens=False).ids
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_training_stops_behind_its_sample() -> None:
    taken = []

    def documents() -> Iterator[str]:
        for text in [*TRAINING, "never seen " * 1000]:
            taken.append(text)
            yield text

    size_bytes = sum(len(text.encode()) for text in TRAINING[:20])
    first = vocabulary.train(documents(), 300, sample_bytes=size_bytes)
    assert taken == TRAINING[:20]
    assert first.get_vocab() == vocabulary.train(iter(TRAINING[:20]), 300).get_vocab()
    taken.clear()
    vocabulary.train(documents(), 300, sample_bytes=size_bytes + 1)
    assert len(taken) == 21


def write_gguf(path: Path, backend: Tokenizer, pre: str, *, model: str = "gpt2", eos: str = "<|im_end|>") -> None:
    """Write the tokenizer as the converters of llama.cpp do, beside one small tensor."""
    content = json.loads(backend.to_str())
    tokens = [token for token, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1])]
    kinds = [gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL for token in tokens]
    if "<tool>" in tokens:
        kinds[tokens.index("<tool>")] = gguf.TokenType.USER_DEFINED
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in content["model"]["merges"]])
    writer.add_bos_token_id(tokens.index("<|im_start|>"))
    writer.add_eos_token_id(tokens.index(eos))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def original(pre: str) -> Tokenizer:
    """A tokenizer as the models of that kind have it, in the words of their own tokenizer.json.

    Its merges join digits, and no merges lead to the token `panicpanic`: so how words are cut, and whether a whole word
    goes before the merges, shows.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING, trainer)
    content = json.loads(backend.to_str())
    content["model"]["vocab"]["panicpanic"] = len(content["model"]["vocab"])
    content["model"]["ignore_merges"] = pre == "llama-bpe"
    backend = Tokenizer.from_str(json.dumps(content))
    if pre == "smollm":
        single = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([single, byte_level])
    elif pre != "gpt-2":
        digits = {"llama-bpe": "{1,3}", "qwen2": ""}[pre]
        words = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(words), "isolated")
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.add_tokens([tokenizers.AddedToken("<tool>", normalized=False)])
    return backend


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokenizer_of_a_gguf_file_is_the_original(tmp_path: Path, pre: str) -> None:
    backend = original(pre)
    write_gguf(tmp_path / "model.gguf", backend, pre)
    tokenizer = vocabulary.load(str(tmp_path / "model.gguf"))
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert tokenizer.get_vocab() == backend.get_vocab()
    vocabulary.save(tokenizer, tmp_path / "tokenizer")
    encoder = load_encoder(tmp_path / "tokenizer" / "tokenizer.json")
    backend.encode_special_tokens = True
    for text in [*AWKWARD, *TRAINING[:3], "a <tool> b", "panicpanic"]:
        ids = encoder.encode(text, add_special_tokens=False).ids
        assert ids == backend.encode(text, add_special_tokens=False).ids, text
        if pre != "qwen2":  # which composes accents
            assert tokenizer.decode(ids) == text


def test_gguf_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for options, reason in (
        ({"pre": "tekken"}, "of the kind 'gpt2', words cut as 'tekken'. Byte-level BPE"),
        ({"pre": "gpt-2", "model": "llama"}, "of the kind 'llama'"),
    ):
        write_gguf(path, original("gpt-2"), **options)
        with pytest.raises(InputError) as caught:
            vocabulary.load(str(path))
        assert str(caught.value).startswith(f"--tokenizer {path}: its tokenizer is ") and reason in str(caught.value)
    for content in (b"", path.read_bytes()[:200], b"not a GGUF file" * 10):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"model\.gguf: cannot be read as GGUF \("):
            vocabulary.load(str(path))


def test_names_that_are_no_tokenizer_are_one_line(tmp_path: Path) -> None:
    for folder in ("empty", "damaged"):
        (tmp_path / folder).mkdir()
    (tmp_path / "damaged" / "tokenizer.json").write_text('{"version": "1.0"}')
    for name in (str(tmp_path / "empty"), str(tmp_path / "damaged"), str(tmp_path / "no.gguf"), "owner/neverland"):
        with pytest.raises(InputError) as caught:
            vocabulary.load(name)
        assert str(caught.value).startswith(f"--tokenizer {name}: cannot be loaded (")
        assert "\n" not in str(caught.value)
