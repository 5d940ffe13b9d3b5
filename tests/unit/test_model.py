"""Building causal language models from settings, checking them against the corpus, and counting their parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from dispersion_pretrain.config import ModelSettings
from dispersion_pretrain.model import build_model, load_exported, model_config, model_size

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "models").glob("*.yaml"))
CORPUS_VOCABULARY = 8192  # of the shipped corpus; models without a vocabulary of their own take it

GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 16}
LLAMA = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
}  # fmt: skip

# Published sizes; tiny models have none.
PUBLISHED = {
    "gpt2_small": 124e6, "gpt2_medium": 355e6, "gpt2_large": 774e6, "gpt2_xl": 1558e6,
    "qwen3_0.6b": 0.6e9, "qwen3_1.7b": 1.7e9, "qwen3_4b": 4.0e9, "qwen3_8b": 8.2e9,
    "qwen3_14b": 14.8e9, "qwen3_32b": 32.8e9,
}  # fmt: skip


def settings_of(fields: dict[str, Any], **others: Any) -> ModelSettings:
    return ModelSettings(config=fields, **others)


def shipped(path: Path) -> ModelSettings:
    return settings_of(yaml.safe_load(path.read_text()))


class TestConfig:
    def test_vocabulary_and_fields(self) -> None:
        config = model_config(settings_of(GPT2), vocabulary=100, sequence_length=16)
        assert (config.vocab_size, config.n_layer, config.hidden_size) == (100, 2, 8)
        padded = model_config(settings_of(GPT2 | {"vocab_size": 128}), vocabulary=100, sequence_length=16)
        assert padded.vocab_size == 128

    @pytest.mark.parametrize("vocab_size", [99, 100 + 1025])
    def test_another_vocabulary_is_refused(self, vocab_size: int) -> None:
        with pytest.raises(
            ValueError, match=rf"^model vocabulary: the model has {vocab_size} entries, the corpus 100\."
        ):
            model_config(settings_of(GPT2 | {"vocab_size": vocab_size}), vocabulary=100, sequence_length=16)

    @pytest.mark.parametrize("fields", [GPT2, LLAMA], ids=["gpt2", "llama"])
    def test_too_few_positions_are_refused(self, fields: dict[str, Any]) -> None:
        model_config(settings_of(fields), vocabulary=100, sequence_length=16)
        with pytest.raises(ValueError, match=r"^data\.sequence_length: 17 is longer than the model's 16 positions"):
            model_config(settings_of(fields), vocabulary=100, sequence_length=17)

    def test_fields_that_the_type_does_not_know_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^model\.config: n_layers is no field of gpt2\. Known: .*n_layer"):
            model_config(settings_of(GPT2 | {"n_layers": 2}), vocabulary=100, sequence_length=16)
        both_names = GPT2 | {"num_hidden_layers": 2, "hidden_size": 8}
        assert model_config(settings_of(both_names), vocabulary=100, sequence_length=16).n_embd == 8

    def test_types_that_transformers_does_not_know_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"^model\.config: transformers refuses it .*gpt9"):
            model_config(settings_of({"model_type": "gpt9"}), vocabulary=100, sequence_length=16)

    def test_types_that_are_no_language_model_are_refused(self) -> None:
        settings = settings_of({"model_type": "vit"})
        with pytest.raises(ValueError, match=r"^model"):
            build_model(settings, model_config(settings, vocabulary=100, sequence_length=16))

    def test_no_pretrained_weights_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"^model\.pretrained: .*cannot be loaded"):
            model_config(ModelSettings(pretrained=str(tmp_path)), vocabulary=100, sequence_length=16)


class TestBuild:
    @pytest.mark.parametrize("fields", [GPT2, LLAMA], ids=["gpt2", "llama"])
    def test_the_same_seed_builds_the_same_weights(self, fields: dict[str, Any]) -> None:
        settings = settings_of(fields)
        config = model_config(settings, vocabulary=100, sequence_length=16)
        states = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            states.append(build_model(settings, config).state_dict())
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])
        assert {tensor.dtype for tensor in states[0].values()} == {torch.float32}

    def test_recompute_keeps_hidden_states_in_the_graph(self) -> None:
        """The reentrant kind would detach them, and a loss on them would be silently without effect."""
        settings = settings_of(LLAMA, activation_checkpointing=True)
        model = build_model(settings, model_config(settings, vocabulary=100, sequence_length=16)).train()
        assert model.is_gradient_checkpointing
        hidden = model(input_ids=torch.arange(16)[None], output_hidden_states=True, use_cache=False).hidden_states
        (gradient,) = torch.autograd.grad(hidden[2].square().sum(), model.model.layers[0].mlp.up_proj.weight)
        assert gradient.abs().max() > 0

    def test_every_second_block_is_recomputed(self) -> None:
        def forward_passes(recompute: bool | int) -> list[int]:
            settings = settings_of(LLAMA, activation_checkpointing=recompute)
            model = build_model(settings, model_config(settings, vocabulary=100, sequence_length=16)).train()
            passes = [0] * 3
            for place, block in enumerate(model.model.layers):
                block.mlp.register_forward_pre_hook(lambda *_, p=place: passes.__setitem__(p, passes[p] + 1))
            ids = torch.arange(16)[None]
            model(input_ids=ids, labels=ids).loss.backward()
            return passes

        assert forward_passes(False) == [1, 1, 1]
        assert forward_passes(True) == forward_passes(1) == [2, 2, 2]
        assert forward_passes(2) == [2, 1, 2]

    def test_more_blocks_than_there_are_cannot_be_passed_over(self) -> None:
        settings = settings_of(LLAMA, activation_checkpointing=4)
        config = model_config(settings, vocabulary=100, sequence_length=16)
        for build in (model_size, build_model):  # the first is what a dry run does
            with pytest.raises(ValueError, match=r"activation_checkpointing: 4 does not fit.*llama.*recomputed: 3;"):
                build(settings, config)

    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_attention_is_the_chosen_one(self, attention: str) -> None:
        settings = settings_of(LLAMA, attention=attention)
        model = build_model(settings, model_config(settings, vocabulary=100, sequence_length=16))
        assert model.config._attn_implementation == attention

    @pytest.mark.parametrize("activation", ["gelu_new", "gelu_fast", "gelu_accurate"])
    def test_the_tanh_gelu_is_one_operation_with_the_same_result(self, activation: str) -> None:
        settings = settings_of({**GPT2, "activation_function": activation, "n_embd": 64, "n_head": 4})
        config = model_config(settings, vocabulary=96, sequence_length=16)
        torch.manual_seed(0)
        fused = build_model(settings, config)
        torch.manual_seed(0)
        plain = AutoModelForCausalLM.from_config(config)
        ids = torch.arange(32).reshape(2, 16)
        kernels, gradients = [], []
        for model in (fused.eval(), plain.eval()):  # no dropout
            with torch.profiler.profile() as profile:
                model(input_ids=ids, labels=ids).loss.backward()
            kernels.append({event.name for event in profile.events()})
            gradients.append([parameter.grad for parameter in model.parameters()])
        assert "aten::tanh" not in kernels[0] and "aten::tanh" in kernels[1]
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert fused.config.activation_function == activation

    def test_pretrained_weights_come_back(self, tmp_path: Path) -> None:
        settings = settings_of(GPT2)
        model = build_model(settings, model_config(settings, vocabulary=100, sequence_length=16)).eval()
        model.save_pretrained(tmp_path)
        pretrained = ModelSettings(pretrained=str(tmp_path))
        again = build_model(pretrained, model_config(pretrained, vocabulary=100, sequence_length=16)).eval()
        ids = torch.arange(16)[None]
        assert torch.equal(model(ids).logits, again(ids).logits)
        assert torch.equal(model(ids).logits, load_exported(tmp_path)(ids).logits)
        assert load_exported(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"^model vocabulary: "):
            model_config(pretrained, vocabulary=101, sequence_length=16)

    def test_pretrained_weights_that_are_cut_off(self, tmp_path: Path) -> None:
        settings = settings_of(GPT2)
        build_model(settings, model_config(settings, vocabulary=100, sequence_length=16)).save_pretrained(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        pretrained = ModelSettings(pretrained=str(tmp_path))
        with pytest.raises(ValueError, match=r"^model\.pretrained: .*does not load"):
            build_model(pretrained, model_config(pretrained, vocabulary=100, sequence_length=16))


class TestSize:
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("fields", [GPT2, LLAMA], ids=["gpt2", "llama"])
    def test_counts(self, fields: dict[str, Any], tied: bool) -> None:
        settings = settings_of(fields | {"tie_word_embeddings": tied})
        config = model_config(settings, vocabulary=100, sequence_length=16)
        model, size = build_model(settings, config), model_size(settings, config)
        unique = {id(parameter): parameter.numel() for parameter in model.parameters()}
        assert size.parameters == sum(unique.values())
        look_up = 0 if tied else 100 * 8  # a tied table is the output matrix as well, with which tokens are multiplied
        look_up += 16 * 8 if fields is GPT2 else 0  # of positions
        assert size.matmul_parameters == size.parameters - look_up
        assert (size.layers, size.width, size.vocabulary) == (config.num_hidden_layers, 8, 100)

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_shipped_models_are_as_large_as_their_name(self, path: Path) -> None:
        settings = shipped(path)
        config = model_config(settings, vocabulary=(settings.config or {}).get("vocab_size", CORPUS_VOCABULARY),
                              sequence_length=256)  # fmt: skip
        size = model_size(settings, config)
        if path.stem.endswith("tiny"):
            assert 1e6 < size.parameters < 6e6
        else:
            assert size.parameters == pytest.approx(PUBLISHED[path.stem], rel=0.04)

    @pytest.mark.parametrize(("name", "attention_width"), [("gpt2_small", 768), ("qwen3_0.6b", 16 * 128)])
    def test_attention_is_as_wide_as_its_heads_together(self, name: str, attention_width: int) -> None:
        settings = shipped(next(path for path in SHIPPED if path.stem == name))
        vocabulary = (settings.config or {}).get("vocab_size", CORPUS_VOCABULARY)
        config = model_config(settings, vocabulary=vocabulary, sequence_length=256)
        assert model_size(settings, config).attention_width == attention_width

    @pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
    def test_the_comment_of_a_shipped_model_says_its_size(self, path: Path) -> None:
        settings = shipped(path)
        stated = re.search(r"([\d.]+)([MB]) parameters( outside the token embeddings?)?", path.read_text())
        assert stated
        config = model_config(settings, vocabulary=(settings.config or {}).get("vocab_size", CORPUS_VOCABULARY),
                              sequence_length=256)  # fmt: skip
        count = model_size(settings, config).parameters
        if stated[3]:
            tables = 1 if config.tie_word_embeddings else 2
            count -= tables * config.vocab_size * config.hidden_size
        assert count == pytest.approx(float(stated[1]) * {"M": 1e6, "B": 1e9}[stated[2]], rel=0.05)

    def test_meta_device_takes_no_memory_and_leaves_the_generator(self) -> None:
        settings = settings_of(GPT2)
        config = model_config(settings, vocabulary=100, sequence_length=16)
        before = torch.get_rng_state()
        model_size(settings, config)
        assert torch.equal(torch.get_rng_state(), before)

    def test_shipped_tiny_models_run(self) -> None:
        for path in SHIPPED:
            if path.stem.endswith("tiny"):
                settings = shipped(path)
                config = model_config(settings, vocabulary=64, sequence_length=32)
                model = build_model(settings, config)
                assert isinstance(model, type(AutoModelForCausalLM.from_config(config)))
                outputs = model(input_ids=torch.arange(32)[None], output_hidden_states=True)
                assert outputs.logits.shape == (1, 32, 64)
                assert len(outputs.hidden_states) == config.num_hidden_layers + 1
