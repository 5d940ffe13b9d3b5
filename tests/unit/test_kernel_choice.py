"""Where fused kernels cannot be used, building the model says so; where tensors are on the CPU, nothing changes."""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from dispersion_pretrain import fused_kernels
from dispersion_pretrain.config import ModelSettings
from dispersion_pretrain.fused_kernels import FAMILIES, use_fused_kernels
from dispersion_pretrain.model import build_model, model_config, tiny_fields


def build(family: str, *, kernels: str = "liger", **fields: Any) -> Any:
    tree = {"config": {**tiny_fields(AutoConfig.for_model(family)), **fields}, "kernels": kernels}
    settings = ModelSettings.model_validate(tree)
    torch.manual_seed(0)
    return build_model(settings, model_config(settings, vocabulary=None, sequence_length=16))


def test_another_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.kernels: liger has none for gpt2 here\. llama, .* Set model\."):
        build("gpt2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.kernels: liger is for GPUs, and there is none\. Set .* torch\."):
        build("qwen3")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ValueError, match=re.escape("pip install -c constraints.txt -e '.[gpu]', or set model.kernels")):
        build("qwen3")


def test_another_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has SwiGLU \(hidden_act silu\), and this model's hidden_act is 'gelu'"):
        build("llama", hidden_act="gelu")


def test_compiling_as_well_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kernels: compile fuses these operations itself\. Set kernels: torch or"):
        ModelSettings.model_validate({"pretrained": "x", "kernels": "liger", "compile": True})


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has a GPU and the package, and tensors on the CPU."""
    monkeypatch.setattr(fused_kernels, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for family in FAMILIES:  # a function of theirs is replaced: put back what is there now
        functions = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        monkeypatch.setattr(functions, "apply_rotary_pos_emb", functions.apply_rotary_pos_emb)
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, type(sys)(name))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_cpu_computes_and_names_of_parameters_stay(family: str) -> None:
    plain = build(family, kernels="torch")
    ids = torch.arange(32).reshape(2, 16)
    expected = plain(ids).logits
    fused = build(family, kernels="torch")
    use_fused_kernels(fused)
    use_fused_kernels(fused)  # a second time changes nothing
    assert torch.equal(fused(ids).logits, expected)
    assert list(fused.state_dict()) == list(plain.state_dict())
    kinds = {type(module).__name__ for module in fused.modules()}
    assert sum(name.startswith("Fused") for name in kinds) == 2
    assert not any(name.startswith("FusedFused") for name in kinds)
