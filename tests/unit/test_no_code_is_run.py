"""Checkpoints and models are data: whatever lies in their files, loading them runs none of it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dispersion_pretrain import checkpoint
from dispersion_pretrain.baselines import plan_teacher
from dispersion_pretrain.config import DistillationSettings, ModelSettings
from dispersion_pretrain.engine import _running_no_code, consolidated_state_dict
from dispersion_pretrain.model import load_exported, model_config
from small_run import VOCABULARY, small_settings, write_corpus, write_run


class Trap:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def sprung(tmp_path: Path) -> Path:
    """What a trap makes; absent at the end."""
    return tmp_path / "sprung"


def test_the_trap_works(tmp_path: Path, sprung: Path) -> None:
    torch.save({"module": Trap(sprung)}, tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert sprung.is_dir()


def test_deepspeeds_files(tmp_path: Path, sprung: Path) -> None:
    run = write_run(tmp_path / "run", small_settings(write_corpus(tmp_path / "corpus")), tmp_path / "corpus/tokenizer")
    folder = checkpoint.step_folder(run, 10)
    assert consolidated_state_dict(folder, 0)
    torch.save({"module": Trap(sprung)}, folder / "engine" / "mp_rank_00_model_states.pt")
    with pytest.raises(RuntimeError, match=r"step-00000010: a file holds more than tensors and plain values"):
        consolidated_state_dict(folder, 0)
    for stage in (1, 2, 3):
        torch.save(
            {"optimizer_state_dict": Trap(sprung)}, folder / "engine" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
        )
        with pytest.raises(RuntimeError, match="a file holds more than tensors and plain values"):
            consolidated_state_dict(folder, stage)
    assert not sprung.exists()


def test_deepspeeds_own_load_reads_as_strictly_and_only_meanwhile(tmp_path: Path, sprung: Path) -> None:
    path, original = tmp_path / "states.pt", torch.load
    torch.save({"module": Trap(sprung)}, path)
    with pytest.raises(RuntimeError, match="a file holds more than"), _running_no_code(tmp_path):
        torch.load(path, weights_only=False)  # as DeepSpeed's engine does
    assert torch.load is original and not sprung.exists()


def test_state_of_a_rank(tmp_path: Path, sprung: Path) -> None:
    torch.save({"random": Trap(sprung)}, tmp_path / "rank_00000.pt")
    with pytest.raises(RuntimeError, match=r"rank_00000\.pt: cannot load the state of this rank"):
        checkpoint.load_rank_state(tmp_path)
    assert not sprung.exists()


@pytest.fixture
def own_code(tmp_path: Path, sprung: Path) -> Path:
    """A Hugging Face folder with a model of its own kind, whose code makes `sprung` as soon as it is imported."""
    folder = tmp_path / "own"
    folder.mkdir()
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    return folder


def test_models_and_teachers_with_code_of_their_own(own_code: Path, tmp_path: Path, sprung: Path) -> None:
    with pytest.raises(
        ValueError, match=r"model\.pretrained: '.*own' brings Python code of its own.*trust_remote_code"
    ):
        model_config(ModelSettings(pretrained=str(own_code)), vocabulary=VOCABULARY, sequence_length=8)
    with pytest.raises(ValueError, match=r"distillation\.teacher: '.*own' brings Python code of its own"):
        plan_teacher(
            DistillationSettings(teacher=str(own_code)), vocabulary=VOCABULARY, sequence_length=8, tokenizer=tmp_path
        )
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_exported(own_code)
    assert not sprung.exists()


def test_a_known_model_with_code_beside_it_is_read_without_it(own_code: Path, sprung: Path) -> None:
    fields = json.loads((own_code / "config.json").read_text())
    (own_code / "config.json").write_text(json.dumps(fields | {"model_type": "gpt2", "vocab_size": VOCABULARY}))
    config = model_config(ModelSettings(pretrained=str(own_code)), vocabulary=VOCABULARY, sequence_length=8)
    assert config.model_type == "gpt2" and not sprung.exists()
