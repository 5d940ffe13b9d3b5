"""What must agree before a checkpoint is loaded: the order of the data."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dispersion_pretrain.checkpoint import CheckpointInfo
from dispersion_pretrain.resume import _refuse_other_run
from small_run import small_settings

SAVED = {"data.shuffle": "windows", "run.seed": 0, "content of data.corpora[0] (index.json)": "ab"}


def resume(tmp_path: Path, current: dict[str, Any], *, allow_change: bool = False, seed: int = 0) -> bool:
    settings = small_settings(tmp_path)
    found = CheckpointInfo(
        path=tmp_path, step=7, tokens=1, samples=9, world_size=3,  # another number of ranks is no other run
        manifest={"settings": settings.model_dump(mode="json"), "extra": {"data_order": SAVED}},
    )  # fmt: skip
    settings = settings.model_copy(
        update={
            "data": settings.data.model_copy(update={"allow_change": allow_change}),
            "run": settings.run.model_copy(update={"seed": seed}),
        }
    )
    parts: Any = SimpleNamespace(
        settings=settings,
        layout=SimpleNamespace(world_size=1),
        corpora=SimpleNamespace(order=SimpleNamespace(fingerprint=lambda: current)),
        teacher=None,
    )
    return _refuse_other_run(parts, found)


def test_the_same_order_goes_on(tmp_path: Path) -> None:
    assert not resume(tmp_path, dict(SAVED))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.shuffle": "none"}, r"data\.shuffle was 'windows' and is 'none'\. .*data\.allow_change=true"),
        ({"content of data.corpora[0] (index.json)": "cd"}, r"content of data\.corpora\[0\] .* was 'ab' and is 'cd'"),
        ({"share of data.corpora[1]": "3 of 4"}, r"share of data\.corpora\[1\] was None and is '3 of 4'"),
    ],
)
def test_another_order_is_refused_by_name_unless_allowed(
    tmp_path: Path, change: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(RuntimeError, match=message):
        resume(tmp_path, SAVED | change)
    with caplog.at_level(logging.WARNING):
        assert resume(tmp_path, SAVED | change, allow_change=True)
    assert next(iter(change)) in caplog.text and "goes on in the new order, at sample 9" in caplog.text


def test_another_seed_is_never_allowed_and_named_once(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"run\.seed was 0 and is 1") as caught:
        resume(tmp_path, SAVED | {"run.seed": 1}, allow_change=True, seed=1)
    assert str(caught.value).count("run.seed was") == 1
    assert "allow_change" not in str(caught.value)
