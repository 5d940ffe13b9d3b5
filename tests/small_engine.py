"""What tests of the engine share: a model of odd sizes, samples dealt to ranks, a place for what it saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dispersion_pretrain.data import Batch
from dispersion_pretrain.layout import BatchLayout
from dispersion_pretrain.saving import write_file


def odd_llama(length: int, *, tied: bool) -> dict[str, Any]:
    """The config of a model whose matrices no number of ranks divides evenly."""
    return {
        "model_type": "llama", "hidden_size": 15, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": length,
        "tie_word_embeddings": tied, "pad_token_id": 2, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip


def deal(step: int, layout: BatchLayout, rank: int, *, sequences: int, length: int, vocabulary: int) -> list[Batch]:
    """A rank's share of a step's random samples, dealt as data.BatchStream deals them."""
    samples = torch.randint(0, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(step))
    size = layout.micro_batch
    batches = []
    for micro_step in range(layout.accumulation):
        first = (micro_step * layout.world_size + rank) * size
        index = torch.arange(first, first + size)
        batches.append(Batch(samples[index], index + step * sequences, torch.ones(size, dtype=torch.bool)))
    return batches


def into(folder: Path) -> Callable[[str, Any], object]:
    """What writes the states that an engine hands out into a folder."""
    return lambda name, state: write_file(folder / name, state)
