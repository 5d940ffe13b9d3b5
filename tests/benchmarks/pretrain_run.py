"""A run of launch/pretrain.py as benchmarks start one, and its records."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

PRETRAIN = Path(__file__).resolve().parents[2] / "launch" / "pretrain.py"


def run_pretrain(folder: Path, name: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Train in a process of its own, which logs every step and neither validates nor saves on the way.

    Args:
        folder: takes the settings as NAME.yaml and the run as runs/NAME.
        settings: sections; those of a run that only trains are added.

    Returns:
        The steps' records in order.
    """
    tree = {
        **settings,
        "run": {"name": name, "folder": str(folder / "runs" / name), "seed": 0},
        "logging": {"every_steps": 1},
        "validation": None,
        "condensation": None,
    }
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = subprocess.run([sys.executable, str(PRETRAIN), "--config", str(config)], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(done.stderr[-3000:])
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "step_time_s" in record]
