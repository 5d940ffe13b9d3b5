"""The causal language model: any of transformers', from a config or from pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.activations import AccurateGELUActivation, FastGELUActivation, GELUTanh, NewGELUActivation
from transformers.modeling_layers import GradientCheckpointingLayer

from dispersion_pretrain.config import ModelSettings
from dispersion_pretrain.fused_kernels import refuse_unknown_family, use_fused_kernels
from dispersion_pretrain.loss_head import CrossEntropyHead

# A model may hold a few more entries than its tokenizer (rounding up for speed); past this it is another tokenizer's.
VOCABULARY_PADDING = 1024
# One function, written as up to eight operations that each read and write the widest tensor of a block.
_TANH_GELUS = (AccurateGELUActivation, FastGELUActivation, NewGELUActivation)


@dataclass(frozen=True)
class ModelSize:
    """Figures of a model for logs and planning."""

    parameters: int  # tied matrices once
    matmul_parameters: int  # without look-up tables: what a token is multiplied with
    layers: int
    width: int
    attention_width: int  # heads x their width: not the model's in Qwen3
    vocabulary: int


def model_config(settings: ModelSettings, *, vocabulary: int | None, sequence_length: int) -> PretrainedConfig:
    """The Hugging Face config of `settings`, checked against corpus and sequence length. Reads no weights.

    A from-scratch config without vocab_size takes the corpus' vocabulary. `vocabulary` None: the corpus is not known.

    Raises:
        ValueError: unknown model type or field, too few positions, a vocabulary that is not the corpus', or no fused
            kernels for it where they are asked for.
    """
    if settings.config is not None:
        if vocabulary is None and "vocab_size" not in settings.config:
            raise ValueError(
                "model.config: vocab_size is missing, and the corpus, whose vocabulary it would be, is not read. One "
                "of the two must say it. Add model.config.vocab_size, or have the corpus read."
            )
        fields = {"vocab_size": vocabulary, **settings.config}
        model_type = fields.pop("model_type")
        try:
            config = AutoConfig.for_model(model_type, **fields)
        except Exception as error:  # whatever the fields of one of its many classes lead to
            raise ValueError(
                f"model.config: transformers refuses it ({short(error)}). A causal language model's config "
                "fields are needed. Correct them."
            ) from None
        known = set(type(config)().to_dict()) | set(getattr(config, "attribute_map", {}))
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(
                f"model.config: {', '.join(unknown)} is no field of {model_type}. Known: {', '.join(sorted(known))}. "
                "Correct the name."
            )
        _refuse_text_for_numbers(fields, type(config)())
    else:
        assert settings.pretrained is not None
        try:
            config = AutoConfig.from_pretrained(settings.pretrained, trust_remote_code=False)
        except Exception as error:  # whatever the files of one of its many classes lead to
            refuse_own_code(f"model.pretrained: {settings.pretrained!r}", error)
            raise ValueError(
                f"model.pretrained: {settings.pretrained!r} cannot be loaded ({short(error)}). A "
                "local Hugging Face folder, or a "
                "name where the hub can be reached, is needed. Correct the path."
            ) from None
    _check_fit(config, vocabulary=vocabulary, sequence_length=sequence_length)
    if settings.kernels == "liger":
        refuse_unknown_family(config)
    return config


def refuse_own_code(place: str, error: Exception) -> None:
    """Raise ValueError with words of ours if transformers says that a model brings Python code; else do nothing."""
    if "trust_remote_code" in str(error):
        raise ValueError(
            f"{place} brings Python code of its own, which is never run here (transformers' trust_remote_code is off). "
            "A model that the installed transformers knows is allowed. Choose one, or a newer transformers that knows "
            "this one."
        ) from None


def short(error: Exception) -> str:
    """What an exception of a library says, in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _refuse_text_for_numbers(fields: dict[str, Any], defaults: PretrainedConfig) -> None:
    """Raise ValueError for what a model would stumble over in its first forward pass only."""
    for name, value in fields.items():
        default = getattr(defaults, name, None)
        if isinstance(default, int | float) and isinstance(value, str | dict):
            raise ValueError(
                f"model.config: {name} is {value!r}. A number is needed (the default is {default!r}). Correct it, or "
                "leave it out."
            )


def _check_fit(config: PretrainedConfig, *, vocabulary: int | None, sequence_length: int) -> None:
    positions = getattr(config, "max_position_embeddings", None)
    for name, value in (
        ("max_position_embeddings", 1 if positions is None else positions),
        ("vocab_size", getattr(config, "vocab_size", None)),
    ):
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"model.config: {name} is {value!r}. A whole number from 1 on is needed. Correct it, or leave it out."
            )
    if positions is not None and sequence_length > positions:
        raise ValueError(
            f"data.sequence_length: {sequence_length} is longer than the model's {positions} positions (model.config: "
            f"max_position_embeddings). At most {positions} are allowed. Shorten the sequences or give the model more "
            "positions."
        )
    if vocabulary is not None and not vocabulary <= config.vocab_size <= vocabulary + VOCABULARY_PADDING:
        raise ValueError(
            f"model vocabulary: the model has {config.vocab_size} entries, the corpus {vocabulary}. The model needs "
            "as many, or up to "
            f"{VOCABULARY_PADDING} more as padding. Prepare the corpus with the model's tokenizer, or leave "
            "model.config.vocab_size out."
        )


def build_model(settings: ModelSettings, config: PretrainedConfig) -> PreTrainedModel:
    """Build the model on the CPU in float32 (the engine moves and casts it), from the global generator's state.

    Every rank that seeds alike builds the same weights, whatever the ZeRO stage.

    Raises:
        ValueError: pretrained weights that do not load, or blocks that cannot be recomputed or fused as asked.
    """
    options: dict[str, Any] = {"attn_implementation": settings.attention}
    if settings.pretrained is not None:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                settings.pretrained, config=config, dtype=torch.float32, trust_remote_code=False, **options
            )
        except Exception as error:  # whatever transformers and the readers of its files make of damaged ones
            raise ValueError(
                f"model.pretrained: {settings.pretrained!r} does not load ({short(error)}). Whole weights that fit its "
                "config are needed. Correct the folder or name."
            ) from None
    else:
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **options)
        except (ValueError, ImportError) as error:
            raise ValueError(
                f"model: transformers cannot build it ({str(error)[:300]}). eager runs everywhere, sdpa in most "
                "families. Change model.attention or model.config."
            ) from None
    if settings.activation_checkpointing:
        _recompute_every(int(settings.activation_checkpointing), model)
    if settings.loss_head == "pieces" and has_bare_head(config):
        CrossEntropyHead.take_over(model.get_output_embeddings())
    _fuse_activations(model)
    if settings.kernels == "liger":
        use_fused_kernels(model)
    return model


def _recompute_every(k: int, model: PreTrainedModel) -> None:
    """Let the backward pass recompute the first block and every k-th from there.

    Raises:
        ValueError: transformers cannot recompute blocks of this family, or has fewer than k of them.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not model.supports_gradient_checkpointing or (k > 1 and k > len(blocks)):
        raise ValueError(
            f"model.activation_checkpointing: {k} does not fit. Blocks of {model.config.model_type} that can be "
            f"recomputed: {len(blocks)}; true, or a number up to that, is allowed. Change it, or set false."
        )
    # The reentrant kind runs blocks without gradients first: hidden states would come out detached.
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for place, block in enumerate(blocks):
        block.gradient_checkpointing = place % k == 0


def _fuse_activations(model: nn.Module) -> None:
    """Let PyTorch's one kernel compute GELU's tanh approximation; the config, and so exports, stay as they are."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, _TANH_GELUS):
                setattr(module, name, GELUTanh())


def model_size(settings: ModelSettings, config: PretrainedConfig) -> ModelSize:
    """Count parameters on the meta device: no memory is taken.

    Raises:
        ValueError: transformers cannot build the model, or cannot recompute its blocks as asked.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=settings.attention)
        layers, width = int(config.num_hidden_layers), int(config.hidden_size)
        if min(layers, width) < 1:
            raise ValueError(f"{layers} layers of width {width}; at least 1 of each is needed")
    except Exception as error:  # whatever the fields of one of transformers' many classes lead to
        raise ValueError(
            f"model: transformers cannot build it ({short(error)}). The fields of a working model are needed. Correct "
            "model.config or model.attention."
        ) from None
    if settings.activation_checkpointing:
        _recompute_every(int(settings.activation_checkpointing), model)
    head = model.get_output_embeddings()
    look_up = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight)
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelSize(
        parameters=parameters,
        matmul_parameters=parameters - look_up,
        layers=layers,
        width=width,
        attention_width=_attention_width(config),
        vocabulary=int(config.vocab_size),
    )


def _attention_width(config: PretrainedConfig) -> int:
    """Heads x width of a head; the model's own width where the config does not say otherwise."""
    heads, of_head = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
    return heads * of_head if isinstance(heads, int) and isinstance(of_head, int) else int(config.hidden_size)


def load_exported(folder: str | Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a Hugging Face folder or name for measuring, in evaluation mode on the CPU."""
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, trust_remote_code=False).eval()


# Sizes of `tiny_fields`, by transformers' own names; each family maps them to its names or has no such field.
TINY_VOCABULARY, TINY_LAYERS = 64, 2
_TINY_SIZES: dict[str, Any] = {
    "num_hidden_layers": TINY_LAYERS, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64, "vocab_size": TINY_VOCABULARY,
    # what some families have beside these: GPT-J, OPT, GPT-Neo, mixtures of experts
    "rotary_dim": 4, "ffn_dim": 48, "word_embed_proj_dim": 32, "attention_types": [[["global", "local"], 1]],
    "moe_intermediate_size": 48, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
    "shared_expert_intermediate_size": 48,
}  # fmt: skip


def tiny_fields(config: PretrainedConfig) -> dict[str, Any]:
    """Fields for `model.config` of a model of the same family with some 20,000 to 60,000 parameters and no dropout.

    2 layers of width 32, vocabulary 64, 64 positions; all else is the family's default, but tied embeddings stay as
    they are: an engine treats them differently.
    """
    family = type(config)()
    names = family.to_dict()
    fields: dict[str, Any] = {"model_type": config.model_type, "tie_word_embeddings": config.tie_word_embeddings}
    for name, value in _TINY_SIZES.items():
        if family.attribute_map.get(name, name) in names:
            fields[family.attribute_map.get(name, name)] = value
    fields |= {name: 0.0 for name in names if "dropout" in name or name.endswith("pdrop")}
    # Special tokens lie beyond a vocabulary of 64.
    return fields | {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in names}


def has_bare_head(config: PretrainedConfig) -> bool:
    """Whether logits are the head's matrix times the last hidden state, and nothing is scaled, capped or masked after.

    Seen by trying a model with these settings and tiny sizes; False where there can be none.
    """
    sizes = {config.attribute_map.get(name, name): value for name, value in _TINY_SIZES.items()}
    fields = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "dtype")}
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == config.num_hidden_layers:
            fields[name] = value[:TINY_LAYERS]
    fields |= {name: value for name, value in sizes.items() if name in fields}
    fields |= {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in fields}
    ids = torch.arange(8)[None]
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model: Any = AutoModelForCausalLM.from_config(type(config)(**fields), attn_implementation="eager").eval()
            head = model.get_output_embeddings()
            if type(head) is not nn.Linear:
                return False
            head.weight.mul_(100.0)  # a cap bends large logits, and leaves small ones nearly as they are
            last = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            return torch.equal(model(input_ids=ids, use_cache=False).logits, head(last))
    except Exception:  # whatever one of transformers' many classes makes of such sizes
        return False
