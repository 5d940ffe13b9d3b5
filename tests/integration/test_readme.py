"""README's commands work as they stand there; long runs are cut short by overrides, nothing else is changed."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from integration.jobs import ROOT, environment, free_port

# Run by others: make test is this very run, make demo and the container take minutes.
ELSEWHERE = ("make", "docker", "tensorboard")
# Run with data sets of its own by test_dataset_mirror.py: the hub's cannot be had everywhere.
NEEDS_HUB = "launch/mirror_datasets.py"
SHORT = [
    "training.max_tokens=16384", "schedule.warmup_tokens=0", "checkpoint.every_steps=4", "evaluation.every=null",
    "validation.sequences=4", "condensation.num_texts=2",
]  # fmt: skip
# A run folder for each launcher: the second would else find the run of the first at its end.
RUN_FOLDERS = {"deepspeed": "runs/demo", "torchrun": "runs/by_torchrun"}
# What README's comparison needs besides, and `make demo` makes.
BASELINE = "deepspeed launch/pretrain.py --config configs/demo_baseline.yaml run.folder=runs/demo_baseline"


def commands() -> list[str]:
    """Every line of a bash block, then every command in a table, comments cut off."""
    text = (ROOT / "README.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]
    cells = re.findall(
        r"`((?:python|docker|deepspeed|torchrun|tensorboard) [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)
    )
    return [" ".join(shlex.split(line, comments=True)) for line in lines + cells if line.strip()]


def scripts() -> dict[str, str]:
    """Python blocks whose first line is `# name.py: command`, by name; the command is added to the others."""
    blocks = re.findall(r"```python\n(# (\S+\.py): .*?)```", (ROOT / "README.md").read_text(), re.S)
    return {name: text for text, name in blocks}


def test_commands_are_found() -> None:
    found = commands()
    assert len(found) >= 12
    for start in ("make demo", "deepspeed launch/pretrain.py", "python launch/export_hf.py", "python launch/report.py"):
        assert any(command.startswith(start) for command in found), start


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_commands_run(tmp_path: Path) -> None:
    project = tmp_path / "project"
    for name in ("launch", "configs", "data_prep", "dispersion_pretrain"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    binaries = Path(sys.executable).parent
    variables = {**environment(), "PATH": f"{binaries}:{environment()['PATH']}", "PYTHONPATH": str(project)}
    for name, text in scripts().items():
        (project / name).write_text(text)
    own = [text.splitlines()[0].partition(": ")[2] + f" run.name={Path(name).stem}" for name, text in scripts().items()]
    assert own
    for command in [*commands(), *own]:
        if "runs/demo_baseline" in command:
            run_words(shortened(shlex.split(BASELINE)), project, variables)
        if shlex.split(command)[0] not in ELSEWHERE and NEEDS_HUB not in command:
            run_words(shortened(shlex.split(command)), project, variables)


def shortened(words: list[str]) -> list[str]:
    """The same command; a training run gets few steps, and a port and folder of its own."""
    if words[0] not in RUN_FOLDERS:
        return words
    words = [words[0], "--master_port", str(free_port()), *words[1:]]
    if {"--dry-run", "--print-config", "launch/doctor.py"} & set(words):
        return words
    named = any(word.startswith("run.") for word in words)
    return [*words, *SHORT, *([] if named else [f"run.folder={RUN_FOLDERS[words[0]]}"])]


def run_words(words: list[str], folder: Path, variables: dict[str, str]) -> None:
    done = subprocess.run(words, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
