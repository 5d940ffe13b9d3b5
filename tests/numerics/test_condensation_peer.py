"""Our condensation figures are those of the public package embedding-condensation 2.0 on the same texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nltk
import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, PretrainedConfig

from dispersion_pretrain.condensation import Condensation, CosineAccumulator, causal_lm_forward
from dispersion_pretrain.model import load_exported
from small_models import gpt2, make_texts, qwen3, write_model
from small_run import launch_script

LENGTH, TEXTS = 48, 6


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The package's function; `make test` installs it."""
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)  # importing it would fetch data that texts of ours
    package = pytest.importorskip("embedding_condensation", reason="not installed: make test brings it")  # do not need
    function: Callable[..., Any] = package.measure_embedding_condensation
    return function


def package_cosines(peer: Callable[..., Any], folder: Path, texts: list[str]) -> np.ndarray:
    """cos[l, i, j] as the package computes it."""
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    result = peer(
        model, tokenizer, texts=texts, repetitions=len(texts), max_length=LENGTH, plot=False, save_path=None,
        show_progress=False,
    )  # fmt: skip
    cosines: np.ndarray = result.cossim_by_layer
    return cosines


@pytest.mark.parametrize("config", [gpt2(32), qwen3(32)], ids=lambda config: config.model_type)
def test_every_figure_is_the_packages(config: PretrainedConfig, peer: Callable[..., Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", config, first_token=config.model_type == "qwen3")
    texts = make_texts(TEXTS)
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    expected = package_cosines(peer, folder, texts)

    command = [str(folder), "--texts", str(tmp_path / "texts.txt"), "--max-length", str(LENGTH)]
    main = launch_script("measure_condensation").main
    assert main([*command, "--repetitions", str(TEXTS), "--out", str(tmp_path / "out")]) == 0
    (file,) = (tmp_path / "out").glob("*.npz")
    result = Condensation.load(file)
    assert (result.num_texts, result.sequence_length) == (TEXTS, LENGTH)
    means = expected.mean(axis=(1, 2))
    np.testing.assert_allclose(result.mean_cosine, means, rtol=0, atol=1e-5)
    levels = np.quantile(expected, [0.05, 0.25, 0.5, 0.75, 0.95], axis=(1, 2)).T
    np.testing.assert_allclose(result.quantiles, levels, rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.last_k, [means[-k:].mean() for k in range(1, len(means))][:5], rtol=0, atol=1e-5)
    counts = np.stack([np.histogram(matrix, 128, (-1, 1))[0] for matrix in expected])
    moved = np.abs(result.histogram * LENGTH**2 * 2 / 128 - counts).sum(1)
    assert moved.max() <= 4  # pairs that lie on an edge of a bin to seven digits


def test_every_pair_is_the_packages(peer: Callable[..., Any], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    texts = make_texts(TEXTS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(texts, truncation=True, max_length=LENGTH)["input_ids"])
    forward = causal_lm_forward(load_exported(folder))
    accumulator = CosineAccumulator(4, LENGTH, "cpu")
    with torch.no_grad():
        for batch in ids.split(4):
            accumulator.add(forward(batch))
    cosines = np.stack([accumulator.average(layer) for layer in range(4)])
    np.testing.assert_allclose(cosines, package_cosines(peer, folder, texts), rtol=0, atol=1e-5)
