"""Export of a run's checkpoint as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import dispersion_pretrain  # noqa: F401  (before transformers, which imports torchvision)

# isort: split
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dispersion_pretrain import checkpoint, export
from dispersion_pretrain.engine import consolidated_state_dict
from dispersion_pretrain.export import export_run, read_record
from small_run import damage, launch_script, save_step, small_model, small_settings, write_corpus, write_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Path:
    return write_run(tmp_path / "run", small_settings(corpus), corpus / "tokenizer", steps=(10, 20))


def test_export_gives_the_models_weights_logits_and_tokenizer(run: Path, corpus: Path, tmp_path: Path) -> None:
    folder = export_run(f"{run}@10", tmp_path / "out" / "model")
    expected = small_model(small_settings(corpus), seed=10)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert AutoTokenizer.from_pretrained(folder).decode([0]) == "<|endoftext|>"
    record = read_record(folder)
    assert record is not None
    assert (record["step"], record["tokens"], record["precision"]) == (10, 320, "float32")
    assert record["logits_difference"] < 1e-5
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_without_a_step_the_newest_good_checkpoint_is_taken(run: Path, tmp_path: Path) -> None:
    assert read_record(export_run(str(run), tmp_path / "a"))["step"] == 20  # type: ignore[index]
    damage(checkpoint.step_folder(run, 20) / "engine" / "mp_rank_00_model_states.pt")
    assert read_record(export_run(str(run), tmp_path / "b"))["step"] == 10  # type: ignore[index]


def test_a_damaged_checkpoint_is_named_and_nothing_is_left(run: Path, tmp_path: Path) -> None:
    damage(checkpoint.step_folder(run, 10) / "engine" / "mp_rank_00_model_states.pt")
    with pytest.raises(RuntimeError, match="step-00000010.*damaged.*mp_rank_00_model_states.pt"):
        export_run(f"{run}@10", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_runs_and_steps_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint of step 15. Saved steps: 10, 20"):
        export_run(f"{run}@15", tmp_path / "out")
    with pytest.raises(ValueError, match="nowhere: no such run"):
        export_run("nowhere", tmp_path / "out")


def test_logits_that_differ_remove_the_export(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_wrong_weight(folder: Path, stage: int) -> dict[str, torch.Tensor]:
        state = consolidated_state_dict(folder, stage)
        state["model.transformer.h.1.mlp.c_fc.weight"][3, 4] += 0.5
        return state

    monkeypatch.setattr(export, "consolidated_state_dict", one_wrong_weight)
    with pytest.raises(RuntimeError, match=r"logits differ from the run's by \d\.\d\de[+-]\d\d .* At most 1e-04"):
        export_run(f"{run}@10", tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []
    unchecked = export_run(f"{run}@10", tmp_path / "out" / "model", check=False)
    assert read_record(unchecked)["logits_difference"] is None  # type: ignore[index]
    with pytest.raises(RuntimeError, match="logits differ"):
        export_run(f"{run}@10", unchecked)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_export_of_the_same_checkpoint_is_kept_and_nothing_else(run: Path, tmp_path: Path) -> None:
    folder = export_run(f"{run}@10", tmp_path / "out")
    weights = folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert export_run(f"{run}@10", folder) == folder
    assert weights.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="holds an export of .*run@10, float32.*allowed"):
        export_run(f"{run}@20", folder)
    with pytest.raises(ValueError, match="holds an export"):
        export_run(f"{run}@10", folder, dtype="bf16")
    (tmp_path / "mine").mkdir()
    export_run(f"{run}@10", tmp_path / "mine")  # empty: allowed
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        export_run(f"{run}@10", tmp_path / "full")
    assert (tmp_path / "full" / "precious").read_text() == "x"


def test_a_bf16_run_gives_bf16_weights(corpus: Path, tmp_path: Path) -> None:
    settings = small_settings(corpus, precision="bf16")
    run = write_run(tmp_path / "run", settings, corpus / "tokenizer")
    folder = export_run(str(run), tmp_path / "out")
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto").dtype == torch.bfloat16
    assert read_record(folder)["logits_difference"] <= export.DIFFERENCE_BOUNDS["bf16"]  # type: ignore[index]
    wide = export_run(str(run), tmp_path / "wide", dtype="float32")
    assert {tensor.dtype for tensor in load_file(wide / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("model.transformer.ln_f.bias"), "missing: transformer.ln_f.bias"),
        (lambda state: state.update({"model.extra": torch.zeros(1)}), "unknown: extra"),
        (lambda state: state.update({"model.transformer.ln_f.bias": torch.zeros(3)}), "of another shape: transformer"),
    ],
)
def test_weights_of_another_model_are_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: object, message: str
) -> None:
    def changed(folder: Path, stage: int) -> dict[str, torch.Tensor]:
        state = consolidated_state_dict(folder, stage)
        change(state)  # type: ignore[operator]
        return state

    monkeypatch.setattr(export, "consolidated_state_dict", changed)
    with pytest.raises(RuntimeError, match=message):
        export_run(f"{run}@10", tmp_path / "out", check=False)
    assert not (tmp_path / "out").exists()


def test_a_tied_weight_may_be_given_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_head(folder: Path, stage: int) -> dict[str, torch.Tensor]:
        state = consolidated_state_dict(folder, stage)
        del state["model.lm_head.weight"]
        return state

    monkeypatch.setattr(export, "consolidated_state_dict", without_head)
    export_run(f"{run}@10", tmp_path / "out")


def test_a_checkpoint_without_reference_says_what_to_do(corpus: Path, tmp_path: Path) -> None:
    settings = small_settings(corpus)
    run = write_run(tmp_path / "run", settings, corpus / "tokenizer", steps=())
    folder = save_step(run, settings, 5, small_model(settings, seed=5))
    source = export.locate(f"{run}@5")
    (folder / export.REFERENCE_FILE).unlink()
    with pytest.raises(RuntimeError, match="--no-check"):
        export.export_checkpoint(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [run]


def test_the_command_prints_folder_and_difference(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = launch_script("export_hf")
    assert command.main([str(run), "--step", "10", "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "out") in printed and "differ by" in printed and "step 10" in printed
    assert command.main([str(run), "--step", "11", "--out", str(tmp_path / "other")]) == 1
    assert "Saved steps: 10, 20" in capsys.readouterr().err
