"""The compiled sweep of the angular loss against PyTorch's, and what happens where it cannot be had."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dispersion_pretrain import angular_kernel, pair_sums
from dispersion_pretrain.dispersion import VARIANTS, dispersion_loss, pooled_dispersion
from dispersion_pretrain.pair_sums import DispersionOptions
from numerics.plain_dispersion import plain_dispersion_loss

# sets, tokens, dim: whole sets with a lower quarter to mirror and without one, ragged tiles, large sets in blocks
SHAPES = [(3, 2, 4), (2, 63, 70), (2, 64, 64), (3, 130, 140), (1, 129, 200), (2, 300, 8), (1, 1500, 16)]


def embeddings_of(shape: tuple[int, int, int], offset: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    common = offset * torch.randn(shape[-1], generator=generator)
    return torch.randn(shape, generator=generator) + common


def loss_and_gradient(z: Tensor, options: DispersionOptions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    leaf = z.clone().requires_grad_()
    terms = pooled_dispersion(leaf, group=None, options=options)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), leaf)
    return terms.loss.detach(), gradient, terms.clamped_share, terms.mean_cosine


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which ways through the sets the kernel took."""
    taken: list[str] = []

    def noted(name: str, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        taken.append(name)
        return function(*arguments)

    for name in ("_whole_sets", "_against_rest", "_against_pool"):
        monkeypatch.setattr(pair_sums, name, functools.partial(noted, name, getattr(pair_sums, name)))
    return taken


def test_the_kernel_is_there() -> None:
    assert angular_kernel.load() is not None, "this machine has a C++ compiler: the tests below would test nothing"


@pytest.mark.parametrize("cosine_clamp", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_formula_in_float64(
    shape: tuple[int, int, int], temperature: float, cosine_clamp: float, calls: list[str]
) -> None:
    options = DispersionOptions(temperature=temperature, cosine_clamp=cosine_clamp, norm_epsilon=1e-2)
    z = embeddings_of(shape)
    loss, gradient, share, cosine = loss_and_gradient(z, options)
    assert calls == ["_whole_sets" if shape[1] <= shape[2] else "_against_rest"]
    expected = loss_and_gradient(z.double(), options)
    assert loss.sub(expected[0]).abs().max() < 2e-6 * max(1.0, 1.0 / temperature)
    assert relative(gradient, expected[1]) < 1e-5
    assert torch.allclose(share.double(), expected[2], atol=1e-4)
    assert torch.allclose(cosine.double(), expected[3], atol=1e-6)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    before = torch.get_num_threads()
    try:
        results = []
        for number in (1, threads):
            torch.set_num_threads(number)
            vectors = pair_sums._prepare(pair_sums.Pool.of(embeddings_of((2, 200, 100)), 0.0), pair_of_angular())
            scale, along = vectors.scale, vectors.along
            sums = angular_kernel.AngularSums(scale, along, scale, edge=0.9, temperature=1.0)
            gram = torch.arange(2 * 200 * 200, dtype=torch.float32).sin().view(2, 200, 200).contiguous() * 50.0
            weights = torch.zeros(2, 200, 200)
            sums.add_rows_against_rest(gram, weights, first_set=0, first_row=0)
            results.append((sums.sums, sums.dots, weights))
        assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    finally:
        torch.set_num_threads(before)


def pair_of_angular() -> pair_sums.PairSum:
    pair = VARIANTS["angular"]
    assert isinstance(pair, pair_sums.PairSum)
    return pair


def test_not_a_number_stays_one() -> None:
    for value in (float("nan"), float("inf")):
        z = embeddings_of((3, 70, 80))
        z[1, 5, 3] = value
        losses = pooled_dispersion(z, group=None, options=DispersionOptions()).loss
        assert torch.isfinite(losses).tolist() == [True, False, True]


def test_without_a_compiler_pytorch_does_it_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    z = embeddings_of((2, 130, 140))
    with_kernel = loss_and_gradient(z, DispersionOptions())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler in ("no-such-compiler", "false"):  # not there; there, and fails
        monkeypatch.setenv("CXX", compiler)
        angular_kernel.load.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            without = loss_and_gradient(z, DispersionOptions())
            loss_and_gradient(z, DispersionOptions())
        assert sum("runs in PyTorch alone" in record.message for record in caplog.records) == 1
        for one, other in zip(with_kernel[:2], without[:2], strict=True):
            assert relative(one, other) < 2e-6 and not torch.equal(with_kernel[1], without[1])
    angular_kernel.load.cache_clear()


def test_no_home_folder_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    angular_kernel.load.cache_clear()
    assert angular_kernel.load() is None
    angular_kernel.load.cache_clear()


def test_another_pair_function_under_the_name_is_not_taken_for_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = pair_of_angular()._replace(
        terms=lambda cosine, options: (0 * cosine, 0 * cosine), logarithm=False, has_kernel=False
    )
    monkeypatch.setitem(VARIANTS, "angular", nothing)
    assert dispersion_loss(embeddings_of((2, 30, 40))).item() == 0


def test_a_cache_folder_that_cannot_be_written_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    angular_kernel.load.cache_clear()
    assert angular_kernel.load() is None
    assert torch.isfinite(dispersion_loss(embeddings_of((2, 30, 40))))
    angular_kernel.load.cache_clear()


@pytest.mark.slow
def test_the_elementwise_part_compiles_as_on_a_gpu() -> None:
    z = embeddings_of((2, 40, 16)).double()
    whole = pair_sums._block_terms
    compiled = pair_sums._compiled_block_terms()
    for variant, angle in [("angular", "arccos"), ("angular", "atan2"), ("decorrelation", "arccos")]:
        options = DispersionOptions(variant=variant, angle=angle)  # type: ignore[arg-type]
        expected = plain_dispersion_loss(z, variant=variant, angle=angle)
        for function in (whole, compiled):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pair_sums, "_block_terms", function)
                loss, gradient, *_ = loss_and_gradient(z, options)
            assert relative(loss, expected) < 1e-12
            if function is whole:
                reference = gradient
            assert relative(gradient, reference) < 1e-12
