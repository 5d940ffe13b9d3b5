"""The runs of the GPU benchmark, planned where there is no GPU: what it asks for fits its corpora and models."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks.bench_gpu import CASES, TERM, Case, settings, write_corpus
from dispersion_pretrain.assembly import Plan
from dispersion_pretrain.settings_file import load_settings


@pytest.mark.parametrize("tiny", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model)
def test_each_run_can_be_planned(case: Case, tiny: bool, tmp_path: Path) -> None:
    case = case._replace(length=256, sequences=2) if tiny else case
    write_corpus(case, tmp_path, steps=2)
    for way in case.ways:
        tree = settings(case, tmp_path, 2, tiny=tiny, way=way) | {"dispersion": TERM, "validation": None}
        tree |= {"run": {"name": "run", "folder": str(tmp_path / "run"), "seed": 0}}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
        checked = load_settings(tmp_path / "run.yaml")
        plan = Plan.make(checked, 1)
        assert plan.describe(checked) and plan.size.vocabulary > 2**15
