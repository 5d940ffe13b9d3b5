"""launch/measure_condensation.py: each source of texts, a family by size, models that fail, bad arguments."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from dispersion_pretrain.condensation import Condensation
from small_models import gpt2, make_texts, qwen3, write_model
from small_run import launch_script, write_corpus
from unit.test_condensation_texts import write_mirror

LENGTH = "24"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.txt"
    path.write_text("\n".join(make_texts(4)))
    return path


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three models, the largest first."""
    folder = tmp_path_factory.mktemp("family")
    return [str(write_model(folder / name, gpt2(width))) for name, width in (("l", 64), ("s", 16), ("m", 32))]


def measure(*arguments: object) -> int:
    code: int = launch_script("measure_condensation").main([str(argument) for argument in arguments])
    return code


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def spoil(folder: Path, tensor: str, row: int) -> Path:
    """Put a NaN into a model's weights."""
    weights = load_file(folder / "model.safetensors")
    weights[tensor][row] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_family_is_sorted_by_size_with_a_trend(family: list[str], texts: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    assert measure(*family, "--texts", texts, "--repetitions", 4, "--max-length", LENGTH, "--out", tmp_path) == 0
    large, small, medium = family
    table = rows(tmp_path / "table.csv")
    assert [row["model"] for row in table] == [small, medium, large]
    sizes = [int(row["parameters"]) for row in table]
    assert sizes == sorted(sizes) and sizes[0] == 300 * 16 + 64 * 16 + 3 * (12 * 16**2 + 13 * 16) + 2 * 16
    measured = [Condensation.load(path) for path in tmp_path.glob("*.npz")]
    by_mean = {f"{result.last_half:.9f}": result for result in measured}
    for row in table:
        result = by_mean[f"{float(row['last_half']):.9f}"]
        assert (row["texts"], row["tokens_per_text"], row["blocks"], row["last_4"]) == ("4", LENGTH, "3", "")
        assert [float(row[f"last_{k}"]) for k in (1, 2, 3)] == pytest.approx(result.last_k)
        assert float(row["effective_rank"]) == pytest.approx(result.effective_rank[-1])
        layers = [layer for layer in rows(tmp_path / "layers.csv") if layer["model"] == row["model"]]
        assert [float(layer["mean_cosine"]) for layer in layers] == pytest.approx(result.mean_cosine)
        assert [float(layer["quantile_95"]) for layer in layers] == pytest.approx(result.quantiles[:, 4])
        assert [float(layer["effective_rank"]) for layer in layers] == pytest.approx(result.effective_rank)
    last_half = [float(row["last_half"]) for row in table]
    order = np.argsort(np.argsort(last_half))
    rho = 1 - 6 * ((order - np.arange(3)) ** 2).sum() / 24
    printed = capsys.readouterr().out
    assert f"Spearman rho {rho:.2f} of last half and size, 3 models" in printed
    assert f"{small}: 4 texts of 24 tokens of {texts}, 0 shorter ones passed over" in printed
    for name in ("heatmap", "curves", "trend"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_two_models_have_no_trend(family: list[str], texts: Path, tmp_path: Path,
                                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    # the same one under two names: as many models as of a trend, but two sizes only
    same = str(write_model(tmp_path / "m", gpt2(32), seed=1))
    command = [*family[1:], same, "--texts", texts, "--max-length", LENGTH, "--out", tmp_path / "out"]
    assert measure(*command) == 0
    out = capsys.readouterr()
    assert "Spearman" in out.out and "of last half and size" not in out.out
    assert "--repetitions: 100, but" in out.err
    assert not (tmp_path / "out" / "trend.png").exists()
    assert len(list((tmp_path / "out").glob("*.npz"))) == 3


def test_a_corpus_and_a_data_set_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    model = write_model(tmp_path / "model", vocabulary=0)
    for file in (corpus / "tokenizer").iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    assert measure(model, "--corpus", corpus, "--repetitions", 3) == 0
    assert f"3 texts of 32 tokens of {corpus}" in capsys.readouterr().out
    mirror = write_mirror(tmp_path / "mirror", "wikitext", make_texts(60))
    assert measure(model, "--datasets", mirror, "--repetitions", 3, "--max-length", LENGTH) == 0
    assert "3 texts of 24 tokens of wikitext" in capsys.readouterr().out  # what is measured where no texts are named
    assert measure(model, "--dataset", "imdb", "--datasets", mirror) == 1
    assert "stanfordnlp/imdb/default/train.parquet" in capsys.readouterr().err


def test_models_that_fail_are_named_and_stop_no_other(texts: Path, tmp_path: Path,
                                                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    good = write_model(tmp_path / "good", qwen3())
    bad = {
        "absent": (tmp_path / "absent", "is no run folder and no causal language model"),
        "cut": (write_model(tmp_path / "cut"), "SafetensorError"),
        "foreign": (write_model(tmp_path / "foreign", gpt2(vocab_size=100)), "token id 299, .* 100 rows"),
        "short": (write_model(tmp_path / "short", gpt2(n_positions=8)), "has 8 positions, the texts 24 tokens"),
        "head": (spoil(write_model(tmp_path / "head", gpt2(tie_word_embeddings=False)), "lm_head.weight", 7), "logits"),
        "weights": (spoil(write_model(tmp_path / "weights"), "transformer.h.1.ln_1.weight", 0), "hidden state 2: NaN"),
        "deep": (spoil(write_model(tmp_path / "deep"), "transformer.wpe.weight", 20), r"layer\(s\) 0, 1, 2, 3 of"),
    }
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    names = [str(path) for path, _ in bad.values()]
    command = [*names[:4], good, *names[4:], "--texts", texts, "--max-length", LENGTH, "--out", tmp_path / "out"]
    assert measure(*command) == 1
    printed = capsys.readouterr()
    for path, message in bad.values():
        (line,) = [line for line in printed.err.splitlines() if line.startswith(f"{path}: ")]
        assert re.search(message, line), line
    assert [row["model"] for row in rows(tmp_path / "out" / "table.csv")] == [str(good)]
    assert measure(names[0], "--texts", texts) == 1  # nothing is left to show


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--texts", "a", "--corpus", "b"], "not allowed with argument"),
        (["--dataset", "c4"], "invalid choice: 'c4'"),
        (["--repetitions", "0"], "--repetitions: 0 is not allowed"),
        (["--max-length", "1"], "--max-length: 1 is not allowed"),
        (["--texts", "a", "--datasets", "b"], "--datasets: b has no meaning beside --texts"),
        (["--corpus", "a", "--datasets", "b"], "--datasets: b has no meaning beside --corpus"),
        (["--texts", "a", "--cache", "b"], "--cache: b has no meaning"),
        (["--out", __file__], "is a file"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        measure("model", *arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
