"""configs/paper: the paper's recipe, arms that differ in one section, and the make targets that run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dispersion_pretrain.config import Settings
from dispersion_pretrain.settings_file import load_settings
from small_run import launch_script

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "configs" / "paper"
RUNS = sorted(PAPER.glob("*.yaml"))
METHODS = {"dispersion", "noisy_embeddings", "active_forgetting", "distillation"}
# In place of weights that only the hub has; a teacher too has to be there for a dry run.
OFFLINE = {"gpt2": "gpt2_small", "qwen3": "qwen3_0.6b"}


def family(path: Path) -> str:
    return path.stem.partition("_")[0]


def changed(settings: Settings, reference: Settings) -> set[str]:
    mine, other = settings.model_dump(), reference.model_dump()
    return {section for section in mine if mine[section] != other[section]}


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_a_run_differs_from_its_control_in_one_section(path: Path) -> None:
    control = PAPER / ("width_4x.yaml" if family(path) == "width" else f"{family(path)}_ce.yaml")
    settings = load_settings(path)
    assert settings.run.name == path.stem
    difference = changed(settings, load_settings(control)) - {"run"}
    if path == control:
        assert all(getattr(settings, method) is None for method in METHODS)
    elif family(path) == "width":
        assert difference == {"model"}
    else:
        assert len(difference) == 1 and difference <= METHODS


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_mid_training_has_the_papers_recipe(name: str) -> None:
    settings = load_settings(PAPER / f"{name}_dispersion.yaml")
    optimizer, training, term = settings.optimizer, settings.training, settings.dispersion
    assert (optimizer.learning_rate, optimizer.betas, optimizer.weight_decay) == (5e-5, (0.9, 0.95), 0.1)
    assert (optimizer.gradient_clipping, settings.model.precision, settings.schedule.kind) == (1.0, "bf16", "cosine")
    assert training.global_batch_tokens == 32 * 4 * settings.data.sequence_length == 128 * 1024
    assert training.max_tokens == 200_000_000 == 5 * settings.schedule.warmup_tokens
    assert term is not None and term.layers == "all" and term.variant == "angular"
    assert (term.coefficient, term.temperature, term.cosine_clamp, term.norm_epsilon) == (0.1, 1.0, 0.1, 1e-2)
    assert (term.pool_sequences, term.tokens_per_sequence) == (1, 256)
    forgetting = load_settings(PAPER / f"{name}_active_forgetting.yaml").active_forgetting
    assert forgetting is not None and forgetting.every_steps == 1000


def test_widths_differ_in_the_mlp_alone() -> None:
    configs = [dict(load_settings(path).model.config or {}) for path in RUNS if family(path) == "width"]
    widths = sorted(config.pop("n_inner") for config in configs)
    assert widths == [768 // 4, 768, 4 * 768, 16 * 768]
    assert all(config == configs[0] for config in configs)


@pytest.mark.parametrize("path", [path for path in RUNS if family(path) != "qwen3"], ids=lambda path: path.stem)
def test_a_run_passes_a_dry_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks = {"c4": 640, "width": 8}.get(family(path), 1)
    command = ["pretrain.py", "--config", str(path), "--dry-run", "--no-corpus", "--ranks", str(ranks)]
    if family(path) in OFFLINE:
        command += ["model.pretrained=null", f"model.config={OFFLINE[family(path)]}"]
    if path.stem.endswith("distillation"):
        command.append("distillation=null")
    monkeypatch.setattr(sys, "argv", command)
    assert launch_script("pretrain").main() == 0
    assert f"= {ranks} ranks x " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "arms"),
    [("gpt2", ["ce", "dispersion"]), ("qwen3", ["noisy_embeddings"]), ("width", ["0.25x", "16x"])],
)
def test_a_target_runs_each_arm_with_each_seed(target: str, arms: list[str]) -> None:
    # `make test` runs this very test: what a make passes on to the makes below it would show in the commands.
    outside = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}

    def commands(*more: str) -> str:
        make = ["make", "-n", f"paper-{target}", *more]
        return subprocess.run(make, cwd=ROOT, env=outside, capture_output=True, text=True, check=True).stdout

    everything = commands()
    assert "--recipe configs/data/" in everything
    listed = re.findall(r"for arm in (.*?);", everything)[0].split()
    assert listed == [path.stem.partition("_")[2] for path in RUNS if family(path) == target]
    assert "for seed in 0 1 2;" in everything
    some = commands(f"ARMS={' '.join(arms)}", "SEEDS=5")
    assert f"for arm in {' '.join(arms)}; do for seed in 5;" in some
    script, config = re.findall(r"deepspeed (\S+) --config (\S+)", some)[0]
    assert (ROOT / script).is_file()
    for arm in arms:
        assert (ROOT / config.replace("$arm", arm)).is_file(), config


def test_an_arm_that_fails_keeps_no_other_from_running(tmp_path: Path) -> None:
    """The targets' own recipes, with commands that only write down their arguments, one of each kind failing."""
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    shutil.copy(ROOT / "Makefile", tmp_path)
    stamps = [".venv/.installed", "data/wikitext103-gpt2/corpus.json"]
    stub = '#!/bin/bash\necho "$(basename "$0") $*" >> "$CALLS"\n[[ "$*" != *"$FAILS"* ]]\n'
    for name in ("python", "deepspeed"):
        path = tmp_path / ".venv" / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(stub)
        path.chmod(0o755)
    for stamp in stamps:
        (tmp_path / stamp).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / stamp).touch()

    def calls(target: str, fails: str, *more: str) -> tuple[int, list[str], str]:
        log = tmp_path / "calls"
        log.unlink(missing_ok=True)
        outside = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
        path = f"{tmp_path}/.venv/bin:{outside['PATH']}"
        command = ["make", "-o", "setup", *(word for stamp in stamps for word in ("-o", stamp)), target, *more]
        done = subprocess.run(
            command, cwd=tmp_path, env={**outside, "PATH": path, "CALLS": str(log), "FAILS": fails},
            capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, log.read_text().splitlines(), done.stderr

    arms, words = ("ARMS=ce dispersion", "SEEDS=0 1"), ("EVAL=--datasets mirror",)
    code, made, said = calls("paper-gpt2", "run.name=gpt2_ce-s0", *arms, *words)
    assert code and "failed: gpt2_ce-s0:training; the same command tries again" in said, said
    assert [line.split("run.name=")[1].split()[0] for line in made if line.startswith("deepspeed")] == [
        "gpt2_ce-s0", "gpt2_ce-s1", "gpt2_dispersion-s0", "gpt2_dispersion-s1"
    ]  # fmt: skip
    evaluated = [line for line in made if "evaluate_checkpoint" in line]
    assert len(evaluated) == 4 and all(line.endswith("--datasets mirror") for line in evaluated)
    assert "--model openai-community/gpt2" in evaluated[-1] and "report.py" in made[-1]
    code, made, said = calls("paper-gpt2", "--model runs/paper/gpt2_ce-s0", *arms)
    assert code and "failed: gpt2_ce-s0:evaluation;" in said and "report.py" in made[-1]
    code, made, said = calls("paper-gpt2", "--model openai-community/gpt2", *arms)
    assert code and "failed: openai-community/gpt2:evaluation;" in said and "report.py" in made[-1]
    code, made, _ = calls("paper-gpt2", "nothing fails", *arms)
    assert code == 0 and "report.py" in made[-1]
    code, made, said = calls("paper-families", "families_gpt2")
    assert code and "families_gpt2" in said
    assert len(made) == len(list(PAPER.glob("families_*.txt")))


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("gpt2_ce", {"34.95", "34.35"}),
        ("gpt2_noisy_embeddings", {"35.15", "34.35"}),
        ("gpt2_active_forgetting", {"35.36", "34.35"}),
        ("gpt2_dispersion", {"35.5", "34.35", "1.01"}),
        ("c4_dispersion", {"1.17"}),
    ],
)
def test_a_header_has_the_papers_figures(name: str, figures: set[str]) -> None:
    """Averages of ten benchmarks and the ratio of times in arXiv 2602.00217."""
    header = (PAPER / f"{name}.yaml").read_text().partition("\nrun:")[0]
    assert figures <= set(re.findall(r"\d+\.\d+", header))
