"""Tiny Hugging Face folders, each with a tokenizer of its own, and texts for them."""

from __future__ import annotations

from pathlib import Path

import dispersion_pretrain  # noqa: F401  (before transformers, which imports torchvision)

# isort: split
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, PreTrainedTokenizerFast, Qwen3Config

WORDS = "token vectors point in ever more similar directions with depth and condense into a narrow cone".split()


def make_texts(count: int, words: int = 60, seed: int = 0) -> list[str]:
    """Texts of different beginnings; each word is at least one token."""
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, words)) for _ in range(count)]


def write_tokenizer(folder: Path, vocabulary: int = 300, *, first_token: bool = False) -> None:
    """A byte-level tokenizer trained on `make_texts`; `first_token`: it puts <s> before each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(make_texts(20), trainer)
    if first_token:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<s>", model_input_names=["input_ids", "attention_mask"]
    )
    wrapped.save_pretrained(folder)


def gpt2(width: int = 16, **fields: int) -> PretrainedConfig:
    return GPT2Config(**({"vocab_size": 300, "n_layer": 3, "n_head": 2, "n_embd": width, "n_positions": 64} | fields))


def qwen3(width: int = 16) -> PretrainedConfig:
    return Qwen3Config(
        vocab_size=300, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, hidden_size=width,
        intermediate_size=48, head_dim=8,
    )  # fmt: skip


def write_model(
    folder: Path, config: PretrainedConfig | None = None, *, seed: int = 0, vocabulary: int = 300, **tokenizer: bool
) -> Path:
    """A model with random weights and a tokenizer of so many tokens; 0: without one."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config or gpt2()).save_pretrained(folder)
    if vocabulary:
        write_tokenizer(folder, vocabulary, **tokenizer)
    return folder
