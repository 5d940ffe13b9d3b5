"""From text to a page, by the commands of README."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from integration.jobs import finish, pretrain_command, records, run_script, trajectory, write_config


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an evaluation job: ZeRO-3, bf16, activations recomputed."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_config(
        folder,
        corpus,
        zero={"stage": 3},
        model={"precision": "bf16", "activation_checkpointing": True},
        condensation={"every_steps": 6, "num_texts": 4},
        evaluation={"every": 12, "suite": "configs/eval/offline.yaml"},
    )
    finish(pretrain_command(config), folder / "log")
    return folder / "run"


def test_run_folder_holds_what_it_promises(trained: Path) -> None:
    settings = yaml.safe_load((trained / "config.yaml").read_text())
    assert settings["dispersion"]["pool_sequences"] == 4 and settings["optimizer"]["betas"] == [0.9, 0.95]
    (start,) = [json.loads(line) for line in (trained / "starts.jsonl").read_text().splitlines()]
    assert start["world_size"] == 2 and start["resumed_from_step"] == 0 and "deepspeed" in start["versions"]
    last = trajectory(trained)[12]
    assert {
        "loss/total",
        "loss/cross_entropy",
        "loss/dispersion",
        "grad_norm",
        "validation/cross_entropy",
    } <= last.keys()
    written = {key for record in records(trained) for key in record}
    assert {"tokens_per_s", "data_wait_share", "memory_gib", "checkpoint_s", "learning_rate"} <= written
    assert sorted(path.name for path in (trained / "condensation").iterdir()) == [
        f"step-{step:08d}.npz" for step in (0, 6, 12)
    ]
    events = EventAccumulator(str(trained / "tensorboard"))
    events.Reload()
    for picture in ("heatmap", "curves"):
        assert [event.step for event in events.Images(f"condensation/{picture}")] == [0, 6, 12]
    assert [event.step for event in events.Scalars("condensation/effective_rank/layer_01")] == [0, 6, 12]


def test_export_measure_evaluate_and_report(trained: Path, corpus: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    done = run_script("launch/export_hf.py", str(trained), "--out", str(exported))
    assert done.returncode == 0, done.stderr
    assert (exported / "model.safetensors").exists() and (exported / "tokenizer.json").exists()

    done = run_script("launch/measure_condensation.py", str(exported), "--corpus", str(corpus), "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "spearman" in done.stdout.lower() and list(tmp_path.glob("*.png"))

    # the training started this very job when it ended: this waits for its result, or makes it
    done = run_script(
        "launch/evaluate_checkpoint.py", "--model", f"{trained}@12", "--suite", "configs/eval/offline.yaml"
    )
    assert done.returncode == 0, done.stderr
    (results,) = (trained / "evaluations").glob("*/step-00000012/results.json")
    assert json.loads(results.read_text())["step"] == 12
    assert list((trained / "tensorboard").rglob("events.*"))

    page = tmp_path / "page.html"
    done = run_script("launch/report.py", str(trained), "--out", str(page))
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "") and "<svg" in text or "data:image" in text


def test_mid_training_goes_on_from_an_export(trained: Path, corpus: Path, tmp_path: Path) -> None:
    exported = tmp_path / "exported"
    done = run_script("launch/export_hf.py", str(trained), "--out", str(exported))
    assert done.returncode == 0, done.stderr
    config = write_config(
        tmp_path,
        corpus,
        model={"config": None, "pretrained": str(exported)},
        training={"max_tokens": 1024},
        dispersion={"warmup_tokens": 0},
    )
    finish(pretrain_command(config, launcher="torchrun"), tmp_path / "log")
    before = trajectory(trained)[12]["validation/cross_entropy"]
    assert trajectory(tmp_path / "run")[0]["validation/cross_entropy"] == pytest.approx(before, rel=2e-3)


def test_the_same_command_again_does_nothing_more(trained: Path) -> None:
    before = len(records(trained))
    finish(pretrain_command(trained.parent / "config.yaml"), trained.parent / "log")
    assert len(records(trained)) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dispersion.coeficient=1"], "Did you mean coefficient?"),
        (["training.global_batch_tokens=100"], "Use 64 or 128"),
        (["dispersion.pool_sequences=3"], "Use pool_sequences"),
        (["data.sequence_length=32"], "must agree"),
        (["data.corpus=nowhere"], "tokenize_to_mds.py"),
        (["model.config={model_type: gpt2, n_positions: 16}"], "16 positions"),
        (["model.config={model_type: gpt2, vocab_size: 9}"], "9 entries"),
        (["model.config={model_type: gpt2, n_layr: 9}"], "n_layr"),
    ],
)
def test_bad_settings_are_found_before_anything_starts(
    corpus: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    config = write_config(tmp_path, corpus)
    command = pretrain_command(config, "--dry-run", "--ranks", "2", *overrides, ranks=1, launcher="warm")
    output = finish(command, tmp_path / "log", expected=1)
    assert message in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_print_config_and_dry_run(corpus: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, corpus)
    printed = run_script(
        "launch/pretrain.py", "--config", str(config), "--print-config", "optimizer.learning_rate=2e-4"
    )
    assert yaml.safe_load(printed.stdout)["optimizer"]["learning_rate"] == 2e-4
    done = run_script("launch/pretrain.py", "--config", str(config), "--dry-run", "--ranks", "2")
    assert done.returncode == 0, done.stderr
    assert "512 tokens = 8 sequences = 2 ranks x 2 micro-batch x 2 accumulation" in done.stdout
    assert "12 steps" in done.stdout and "gathered over 2 ranks" in done.stdout
    assert not (tmp_path / "run").exists()
