"""dispersion_pretrain.condensation: against a naive float64 implementation, known cases, bad input, the file."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from dispersion_pretrain import condensation as module
from dispersion_pretrain import condensation_pictures
from dispersion_pretrain.condensation import Condensation, CosineAccumulator, causal_lm_forward, measure, require_finite

matplotlib.use("Agg")


def random_states(texts: int, tokens: int, num_states: int = 4, seed: int = 0) -> list[Tensor]:
    """Hidden states that share more of one direction the deeper they are."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(texts, tokens, 16 + layer, generator=generator) * 3.0 + 1.5 * layer for layer in range(num_states)
    ]


def naive_average(states: Tensor) -> np.ndarray:
    """cos[i, j] averaged over the texts, one pair at a time in float64."""
    vectors = states.double().numpy()
    texts, tokens, _ = vectors.shape
    average = np.zeros((tokens, tokens))
    for text in vectors:
        for i in range(tokens):
            for j in range(tokens):
                average[i, j] += text[i] @ text[j] / (np.linalg.norm(text[i]) * np.linalg.norm(text[j]))
    return average / texts


def accumulate(states: list[Tensor], batch: int, valid: Tensor | None = None) -> Condensation:
    accumulator = CosineAccumulator(len(states), states[0].shape[1], "cpu")
    for first in range(0, len(states[0]), batch):
        part = None if valid is None else valid[first : first + batch]
        accumulator.add([state[first : first + batch] for state in states], part)
    return accumulator.result()


def assert_equal(left: Condensation, right: Condensation, tolerance: float = 1e-12) -> None:
    assert left.num_texts == right.num_texts
    np.testing.assert_allclose(left.mean_cosine, right.mean_cosine, rtol=0, atol=tolerance)
    np.testing.assert_allclose(left.histogram, right.histogram, rtol=0, atol=tolerance)
    np.testing.assert_allclose(left.quantiles, right.quantiles, rtol=0, atol=tolerance)
    np.testing.assert_allclose(left.effective_rank, right.effective_rank, rtol=tolerance, atol=tolerance)


def test_equals_the_naive_definition() -> None:
    states = random_states(texts=5, tokens=9)
    result = accumulate(states, batch=2)
    averages = [naive_average(state) for state in states]
    expected = np.array([average.mean() for average in averages])
    np.testing.assert_allclose(result.mean_cosine, expected, rtol=0, atol=1e-6)
    for layer, average in enumerate(averages):
        counts, edges = np.histogram(average, bins=128, range=(-1, 1))
        np.testing.assert_allclose(result.histogram[layer], counts / counts.sum() / (2 / 128), rtol=0, atol=1e-9)
        np.testing.assert_allclose(result.bin_edges, edges)
    assert result.last_half == pytest.approx(expected[2:].mean(), abs=1e-6)
    assert result.last_k == pytest.approx([expected[3:].mean(), expected[2:].mean(), expected[1:].mean()], abs=1e-6)
    assert (result.spearman, result.kendall) == (1.0, 1.0)
    assert (result.num_texts, result.sequence_length) == (5, 9)


def test_histogram_is_of_the_averaged_matrix_not_of_single_texts() -> None:
    left, right = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    same, apart = torch.stack([left, left]), torch.stack([left, right])
    states = torch.stack([same, apart])
    result = accumulate([states, states], batch=1)
    width = 2 / 128
    occupied = {int((0.5 + 1) / width): 0.5 / width, 127: 0.5 / width}  # off the diagonal the mean of 1 and 0
    assert {int(i): result.histogram[0, i] for i in np.flatnonzero(result.histogram[0])} == pytest.approx(occupied)


def test_quantiles_are_those_of_the_averaged_matrix() -> None:
    states = random_states(texts=5, tokens=9)
    result = accumulate(states, batch=2)
    for layer, state in enumerate(states):
        expected = np.quantile(naive_average(state), [0.05, 0.25, 0.5, 0.75, 0.95])
        np.testing.assert_allclose(result.quantiles[layer], expected, rtol=0, atol=1e-6)


def test_effective_rank_is_the_mean_participation_ratio_of_the_texts() -> None:
    states = random_states(texts=5, tokens=9)
    states[1][3, 4:] = 0.0  # vectors without a direction take part in nothing
    result = accumulate(states, batch=2)
    for layer, state in enumerate(states):
        ratios = []
        for text in state.double().numpy():
            unit = np.stack([vector / np.linalg.norm(vector) for vector in text if vector.any()])
            shares = np.linalg.svd(unit, compute_uv=False) ** 2 / len(unit)
            ratios.append(1 / (shares**2).sum())
        assert result.effective_rank[layer] == pytest.approx(np.mean(ratios), rel=1e-5)


def test_effective_rank_of_known_cases() -> None:
    parallel, spread = torch.ones(2, 6, 8), torch.eye(6, 8).expand(2, 6, 8)
    plane = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(3, 1).expand(2, 6, 2)
    zero = torch.zeros(2, 6, 8)
    assert accumulate([parallel, spread, plane, zero], 2).effective_rank == pytest.approx([1, 6, 2, 0], rel=1e-5)


def test_known_cases() -> None:
    identical = torch.ones(2, 4, 8) * 7.0
    orthogonal = torch.eye(4, 8).expand(2, 4, 8) * 0.01
    opposite = torch.tensor([1.0, -1.0, 1.0, -1.0])[None, :, None] * torch.ones(2, 4, 8)
    result = accumulate([orthogonal, identical, opposite, orthogonal], batch=2)
    assert result.mean_cosine == pytest.approx([0.25, 1.0, 0.0, 0.25], abs=1e-6)
    assert result.histogram.sum(1) * 2 / 128 == pytest.approx(np.ones(4))


def test_scale_of_vectors_does_not_matter_and_zero_vectors_have_cosine_zero() -> None:
    states = random_states(2, 5)
    tiny = [state * 1e-8 for state in states]
    assert_equal(accumulate(states, 2), accumulate(tiny, 2), tolerance=1e-6)
    zero = [torch.zeros(1, 3, 4)] * 2
    assert accumulate(zero, 1).mean_cosine.tolist() == [0.0, 0.0]


def test_batches_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    states = random_states(7, 6)
    whole = accumulate(states, 7)  # a float32 product may round otherwise in a batch of another size
    assert_equal(whole, accumulate(states, 3), tolerance=1e-7)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 6 * 6 * 2)
    assert_equal(whole, accumulate(states, 7), tolerance=1e-7)
    valid = torch.tensor([True, True, True, False, True, True, False])
    assert_equal(accumulate(states, 7, valid), accumulate([state[valid] for state in states], 1), tolerance=1e-7)


def test_invalid_texts_are_left_out_whatever_they_hold() -> None:
    states = random_states(5, 6)
    valid = torch.tensor([True, False, True, True, False])
    spoiled = [state.clone() for state in states]
    for state in spoiled:
        state[~valid] = float("nan")
    assert_equal(accumulate(spoiled, 2, valid), accumulate([state[valid] for state in states], 1), 1e-7)


def test_autocast_does_not_touch_the_cosines() -> None:
    states = random_states(2, 6)
    plain = accumulate(states, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(plain, accumulate(states, 2))


def test_bfloat16_states_are_measured_in_float32() -> None:
    states = [state.bfloat16() for state in random_states(2, 6)]
    assert_equal(accumulate(states, 2), accumulate([state.float() for state in states], 2))


def test_correlations_with_depth_and_their_undefined_case() -> None:
    states = random_states(3, 6)
    falling = accumulate(states[::-1], 3)
    assert (falling.spearman, falling.kendall) == (-1.0, -1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        constant = accumulate([torch.eye(4)[None]] * 3, 1)
    assert math.isnan(constant.spearman) and math.isnan(constant.kendall)


@pytest.mark.parametrize(("num_blocks", "first"), [(1, 1), (2, 2), (3, 2), (6, 4)])
def test_last_half_is_that_of_the_block_outputs(num_blocks: int, first: int) -> None:
    result = accumulate(random_states(1, 4, num_states=num_blocks + 1), 1)
    assert result.last_half == pytest.approx(result.mean_cosine[first:].mean(), abs=1e-12)
    assert len(result.last_k) == min(5, num_blocks)


def test_scalars_are_the_metric_keys() -> None:
    result = accumulate(random_states(1, 4), 1)
    keys = {f"condensation/cosine/layer_0{layer}" for layer in range(4)}
    keys |= {f"condensation/effective_rank/layer_0{layer}" for layer in range(4)}
    keys |= {f"condensation/cosine/last_blocks_{k}" for k in (1, 2, 3)}
    keys |= {"condensation/cosine_last_half", "condensation/spearman", "condensation/kendall"}
    assert set(result.scalars()) == keys
    assert all(type(value) is float for value in result.scalars().values())


def test_not_finite_states_name_their_layers() -> None:
    for value in (float("nan"), float("inf")):
        states = random_states(2, 4)
        states[2][1, 3, 0] = value
        with pytest.raises(RuntimeError, match=r"layer\(s\) 2 of 0 \.\.\. 3"):
            accumulate(states, 2)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="1 token"):
        CosineAccumulator(3, 1, "cpu")
    with pytest.raises(ValueError, match="output_hidden_states"):
        CosineAccumulator(1, 4, "cpu")
    accumulator = CosineAccumulator(4, 6, "cpu")
    with pytest.raises(ValueError, match=r"\(2, 5, 16\).*equal length"):
        accumulator.add(random_states(2, 5))
    with pytest.raises(ValueError, match="3 of them, but 4"):
        accumulator.add(random_states(2, 6, num_states=3))
    with pytest.raises(ValueError, match="One flag a text"):
        accumulator.add(random_states(2, 6), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="0 were measured"):
        accumulator.result()
    with pytest.raises(ValueError, match="none were given"):
        measure(lambda input_ids: [], [])


def test_texts_of_unequal_length_are_an_error() -> None:
    def forward(input_ids: Tensor) -> list[Tensor]:
        return [torch.randn(*input_ids.shape, 4), torch.randn(*input_ids.shape, 4)]

    with pytest.raises(ValueError, match="equal length"):
        measure(forward, [torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 9, dtype=torch.int64)])


def test_file_round_trip(tmp_path: Path) -> None:
    accumulator = CosineAccumulator(4, 6, "cpu")
    accumulator.add(random_states(2, 6))
    result = accumulator.result(step=7, tokens=700)
    path = tmp_path / "condensation" / "step-00000007.npz"
    result.save(path)
    loaded = Condensation.load(path)
    assert_equal(result, loaded, tolerance=0.0)
    for name in ("spearman", "kendall", "last_half", "num_texts", "sequence_length", "step", "tokens"):
        assert getattr(loaded, name) == getattr(result, name)
        assert type(getattr(loaded, name)) is type(getattr(result, name))
    with np.load(path, allow_pickle=False) as archive:
        assert archive["mean_cosine"].dtype == archive["histogram"].dtype == np.float64
        assert (archive["histogram"].shape, archive["bin_edges"].shape) == ((4, 128), (129,))


def test_a_failed_save_leaves_the_old_file_and_no_rubbish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step-00000000.npz"
    result = accumulate(random_states(1, 4), 1)
    result.save(path)
    before = path.read_bytes()

    def full_disk(file: object, **arrays: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="No space"):
        result.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [None, b"", b"no zip", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "step-00000000.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="step-00000000.npz: is no condensation measurement"):
        Condensation.load(path)


def test_a_file_of_an_older_version_is_read(tmp_path: Path) -> None:
    path = tmp_path / "step-00000000.npz"
    result = accumulate(random_states(1, 4), 1)
    result.save(path)
    with np.load(path) as archive:
        old = {name: archive[name] for name in archive if name not in ("quantiles", "effective_rank")}
    np.savez(path, **old)
    loaded = Condensation.load(path)
    np.testing.assert_array_equal(loaded.mean_cosine, result.mean_cosine)
    assert (loaded.quantiles.shape, loaded.effective_rank.shape) == ((0, 5), (0,))
    assert set(loaded.scalars()) < set(result.scalars())


def test_a_file_without_a_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    np.savez(path, mean_cosine=np.zeros(3))
    with pytest.raises(ValueError, match="histogram"):
        Condensation.load(path)


_TINY = {"vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16}


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=64, n_layer=3, n_head=2, n_embd=16, n_positions=32),
        LlamaConfig(**_TINY, num_key_value_heads=2, intermediate_size=32),
        Qwen3Config(**_TINY, num_key_value_heads=2, intermediate_size=32, head_dim=8),
    ],
    ids=lambda config: config.model_type,
)
def test_measures_a_hugging_face_model_in_evaluation_mode(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.train()  # GPT2 has dropout: two measurements would differ
    texts = torch.randint(0, 64, (4, 12))
    result = measure(causal_lm_forward(model), texts.split(2), step=3, tokens=30)
    assert (len(result.mean_cosine), result.num_texts, result.step, result.tokens) == (4, 4, 3, 30)
    with torch.no_grad():
        states = model.eval()(input_ids=texts, output_hidden_states=True).hidden_states
    expected = [naive_average(state).mean() for state in states]
    np.testing.assert_allclose(result.mean_cosine, expected, rtol=0, atol=1e-6)


def test_memory_does_not_grow_with_the_number_of_texts() -> None:
    """What this process holds after 20 and after 220 texts; their matrices would be 600 MiB, as float64 twice that."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_layer=2, n_head=1, n_embd=8, n_positions=512)
    resident_mib = {}

    def batches() -> Iterator[Tensor]:
        for text in range(221):
            if text in (20, 220):
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                resident_mib[text] = pages * os.sysconf("SC_PAGESIZE") / 2**20
            yield torch.randint(0, 64, (1, 512))

    measure(causal_lm_forward(AutoModelForCausalLM.from_config(config)), batches())
    assert resident_mib[220] - resident_mib[20] < 60


def test_a_model_is_tried_on_two_tokens() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=64, n_layer=2, n_head=1, n_embd=8, n_positions=32))
    require_finite(model)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.bias[3] = float("inf")
    with pytest.raises(RuntimeError, match="hidden state 2: NaN or infinity"):
        require_finite(model)


def test_training_pictures_show_the_measurement() -> None:
    low = accumulate([torch.eye(6)[None].repeat(2, 1, 1)] * 4, 2)
    high = accumulate([torch.ones(2, 6, 6)] * 4, 2)
    pictures = {
        name: condensation_pictures.training_pictures(result) for name, result in (("low", low), ("high", high))
    }
    for tag in ("condensation/heatmap", "condensation/curves"):
        first, second = pictures["low"][tag], pictures["high"][tag]
        assert first.dtype == np.uint8 and first.shape == second.shape == (320, 400, 3)
        assert (first != second).any()


def test_plots_show_fractions_and_the_fixed_colour_scale() -> None:
    import matplotlib.pyplot as plt

    result = accumulate(random_states(2, 6, num_states=5), 2)
    figure, (left, right) = plt.subplots(1, 2)
    image = condensation_pictures.plot_heatmap(result, left, "a title")
    condensation_pictures.plot_curves({"one": result}, right)
    assert image.get_clim() == (0.0, 10.0)
    shape = image.get_array()
    assert shape is not None and shape.shape == (128, 5)
    assert left.get_title() == "a title"
    assert image.get_extent() == pytest.approx([-0.125, 1.125, -1, 1])  # columns centred on the fractions below
    assert image.origin == "lower"
    drawn = np.asarray(right.lines[0].get_xydata())
    np.testing.assert_allclose(drawn[:, 0], [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(drawn[:, 1], result.mean_cosine)
    plt.close(figure)


def test_import_does_not_need_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; import dispersion_pretrain.condensation"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
