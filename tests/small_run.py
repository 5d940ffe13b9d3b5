"""A run folder with a corpus, a tokenizer and checkpoints of a tiny model, without training."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import dispersion_pretrain  # noqa: F401  (before streaming, which imports torchvision)

# isort: split
import numpy as np
import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from dispersion_pretrain import checkpoint
from dispersion_pretrain.config import Settings
from dispersion_pretrain.objective import TrainingModule
from dispersion_pretrain.saving import Description, Saves
from dispersion_pretrain.settings_file import dump_settings, parse_settings
from token_corpus import write_token_corpus

VOCABULARY = 300
SEQUENCE_LENGTH = 32
TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 4,
    "[1, 2]",
    "Größe und Maß: 5 €.\nA second line, with  two spaces.\n",
    "Sphinx of black quartz, judge my vow! " * 3 + "End of it.",
    " ".join("abcdefghij"[number**2 // 7 % 10] for number in range(150)),  # long enough to ask how it goes on, with
    " ".join("klmnopqrst"[number**2 // 9 % 10] for number in range(150)),  # words so short that a context holds some
]


def write_corpus(folder: Path, texts: list[str] | None = None) -> Path:
    """Write both splits of `texts` in the form that data_prep writes, with a byte-level tokenizer trained on them."""
    texts = TEXTS if texts is None else texts
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(
        folder / "tokenizer"
    )
    stream = [token for text in texts for token in [*tokenizer.encode(text).ids, 0]]
    stream += [0] * (-len(stream) % SEQUENCE_LENGTH)
    sequences = np.array(stream, np.uint16).reshape(-1, SEQUENCE_LENGTH)
    num_bytes = sum(len(text.encode()) for text in texts)
    return write_token_corpus(
        folder,
        {"train": sequences, "validation": sequences},
        vocabulary=VOCABULARY,
        counts={"documents": len(texts), "bytes": num_bytes},
    )


def small_settings(corpus: Path, *, precision: str = "float32") -> Settings:
    """Settings of a tiny GPT2 with more positions than its training uses, saved at ZeRO stage 0."""
    fields = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 2 * SEQUENCE_LENGTH, "vocab_size": VOCABULARY}
    tree = {
        "model": {"config": {"model_type": "gpt2", **fields}, "precision": precision},
        "data": {"corpus": str(corpus), "sequence_length": SEQUENCE_LENGTH},
        "training": {"global_batch_tokens": SEQUENCE_LENGTH, "max_tokens": 100 * SEQUENCE_LENGTH},
        "zero": {"stage": 0},
    }
    return parse_settings(tree, "test")


def small_model(settings: Settings, seed: int) -> PreTrainedModel:
    """Build the model of `settings` with weights so large that its predictions differ much from each other."""
    assert settings.model.config is not None
    fields = dict(settings.model.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def write_run(folder: Path, settings: Settings, tokenizer: Path, steps: tuple[int, ...] = (10,)) -> Path:
    """Write a run folder whose checkpoint of step n holds `small_model(settings, seed=n)`, as training writes it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_settings(settings))
    (folder / "tokenizer").symlink_to(tokenizer, target_is_directory=True)
    for step in steps:
        save_step(folder, settings, step, small_model(settings, seed=step))
    return folder


def save_step(folder: Path, settings: Settings, step: int, model: PreTrainedModel) -> Path:
    """Commit a checkpoint with weights, model config and reference logits."""
    running = model.bfloat16() if settings.model.precision == "bf16" else model
    input_ids = torch.arange(16)[None] * 7 % VOCABULARY
    with torch.no_grad():
        logits = running(input_ids=input_ids).logits.float()
    saves = Saves(folder, background=False, keep_last=10**6)
    saves.begin(saves.shared, step)
    saves.take("engine/mp_rank_00_model_states.pt", {"module": TrainingModule(running, None).state_dict()})
    saves.take("model_config/config.json", running.config.to_json_string().encode())
    saves.take("reference.safetensors", safetensors.torch.save({"input_ids": input_ids, "logits": logits}))
    description = Description(step, step * SEQUENCE_LENGTH, step, 1, settings=settings.model_dump(mode="json"))
    saves.write(description)
    saves.require_saved()
    return checkpoint.step_folder(folder, step)


def damage(path: Path) -> None:
    """Flip the bits of one byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def launch_script(name: str) -> ModuleType:
    """Import a script of launch/, whose `main` takes arguments."""
    path = Path(__file__).resolve().parents[1] / "launch" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
