"""Liger's kernels in our models change rounding only, whatever the family. In Triton's interpreter, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dispersion_pretrain.fused_kernels import FAMILIES

# Beside the environment, not in it: torch and DeepSpeed would find Triton there and take other paths.
PACKAGES = Path(sys.prefix) / "kernels"
_HERE = Path(__file__).parent
# Norms of a model of two blocks: two in each and the last; Qwen3 has one of queries and one of keys besides.
NORMS = dict.fromkeys(FAMILIES, 5) | {"qwen3": 9}


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    if not PACKAGES.exists():
        pytest.skip("liger-kernel and triton are not installed: make test brings them")
    places = [_HERE.parents[1], _HERE.parent, PACKAGES]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(map(str, places))}
    command = [sys.executable, str(_HERE / "fused_steps.py"), *FAMILIES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    parsed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return parsed


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_plain_kernels(figures: dict[str, Any], family: str) -> None:
    found = figures[family]
    assert found["loss"] < 1e-6
    name, difference = found["worst_gradient"]
    assert difference < 1e-5, name
    assert not found["bit_equal"]  # or it was the plain ones that ran


@pytest.mark.parametrize("family", FAMILIES)
def test_every_norm_mlp_and_rotary_embedding_is_fused(figures: dict[str, Any], family: str) -> None:
    found = figures[family]
    assert not found["plain"]
    assert sorted(found["fused"].values()) == [2, NORMS[family]]
    assert found["rotary"] == 3  # a block's once more, recomputed
