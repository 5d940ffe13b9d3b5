"""dispersion_pretrain.comparison against SciPy, closed forms and its promise that 95 in 100 intervals hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from dispersion_pretrain import comparison
from dispersion_pretrain.comparison import Difference, over_examples_and_seeds, over_seeds, resampled_scores

Array = NDArray[np.float64]


def judge(arm: Array, reference: Array, metric: str = "acc", weights: Array | None = None, seed: int = 0) -> Difference:
    """Compare (seeds, examples) values, as `outcomes` does."""
    seeds, num_examples = arm.shape
    values = np.concatenate([arm, reference])
    units = num_examples if weights is None else weights.sum()
    plain = comparison.score(metric, values.sum(axis=1), units)
    drawn = resampled_scores(metric, values, weights, seed)
    return over_examples_and_seeds(plain[:seeds] - plain[seeds:], drawn[:seeds] - drawn[seeds:], num_examples)


def crossed(generator: np.random.Generator, by_seed: float, by_example: float, by_both: float) -> Array:
    """(3, 200) differences whose mean is 0 in the long run, with the standard deviations of their three parts."""
    seeds = generator.normal(scale=by_seed, size=(3, 1))
    examples = generator.normal(scale=by_example, size=(1, 200))
    return np.asarray(seeds + examples + generator.normal(scale=by_both, size=(3, 200)))


# ---- the bootstrap


def test_one_seed_agrees_with_scipy() -> None:
    generator = np.random.default_rng(1)
    reference = generator.random((1, 400)) < 0.4
    arm = np.where(generator.random((1, 400)) < 0.8, reference, generator.random((1, 400)) < 0.6)
    ours = judge(arm.astype(float), reference.astype(float))
    theirs = scipy.stats.bootstrap(
        (arm[0].astype(float), reference[0].astype(float)),
        lambda x, y, axis: x.mean(axis=axis) - y.mean(axis=axis),
        paired=True,
        n_resamples=5000,
        method="percentile",
        rng=np.random.default_rng(2),
    )
    assert ours.estimate == pytest.approx(arm.mean() - reference.mean())
    assert ours.standard_error == pytest.approx(theirs.standard_error, rel=0.06)
    assert ours.interval == pytest.approx(theirs.confidence_interval, abs=0.15 * ours.standard_error)


def test_perplexity_agrees_with_scipy() -> None:
    generator = np.random.default_rng(3)
    words = generator.integers(20, 400, size=80).astype(float)
    reference = -words * generator.normal(4.0, 0.3, size=80)
    arm = reference + words * generator.normal(0.05, 0.05, size=80)
    ours = judge(arm[None], reference[None], "word_perplexity", words)

    def difference(x: Array, y: Array, w: Array, axis: int) -> Array:
        return np.asarray(np.exp(-x.sum(axis) / w.sum(axis)) - np.exp(-y.sum(axis) / w.sum(axis)))

    theirs = scipy.stats.bootstrap(
        (arm, reference, words), difference, paired=True, n_resamples=5000, method="percentile", rng=generator
    )
    assert ours.estimate == pytest.approx(difference(arm, reference, words, 0))
    assert ours.standard_error == pytest.approx(theirs.standard_error, rel=0.06)
    assert ours.is_significant and ours.estimate < 0


def test_seeds_alone_are_students_paired_test() -> None:
    arm, reference = np.array([3.1, 3.4, 3.0, 3.3]), np.array([3.2, 3.6, 3.15, 3.3])
    ours, theirs = over_seeds(arm - reference), scipy.stats.ttest_rel(arm, reference)
    assert ours.p == pytest.approx(theirs.pvalue)
    assert ours.interval == pytest.approx(theirs.confidence_interval(0.95))
    assert over_seeds(np.array([0.3])).interval is None and not over_seeds(np.array([0.3])).is_significant
    # The bootstrap comes to the same where examples do not matter.
    same = over_examples_and_seeds(arm - reference, np.repeat((arm - reference)[:, None], comparison.DRAWS, 1), 500)
    assert same.standard_error == pytest.approx(ours.standard_error, rel=0.05)
    assert same.degrees == pytest.approx(3)


@pytest.mark.parametrize(
    ("by_seed", "by_example", "by_both", "lowest", "highest"),
    [
        (0.0, 1.0, 0.1, 0.92, 0.98),
        (1.0, 0.0, 1.0, 0.92, 0.98),  # of three seeds, whose percentiles hold the truth in three of four cases
        (0.1, 1.0, 0.3, 0.92, 0.99),
        (0.0, 0.0, 1.0, 0.97, 1.0),  # the known price of drawing both: too wide
    ],
    ids=["examples", "seeds", "both", "neither"],
)
def test_intervals_hold_the_truth(
    by_seed: float, by_example: float, by_both: float, lowest: float, highest: float
) -> None:
    generator = np.random.default_rng(4)
    held = []
    for number in range(300):
        differences = crossed(generator, by_seed, by_example, by_both)
        interval = judge(differences, np.zeros_like(differences), seed=number).interval
        assert interval is not None
        held.append(interval[0] <= 0 <= interval[1])
    assert lowest <= np.mean(held) <= highest


def test_pairs_matter() -> None:
    """Arms that differ by little and in the same direction, on examples and under seeds that differ by much."""
    generator = np.random.default_rng(5)
    reference = generator.normal(size=(3, 1)) + generator.normal(size=(1, 300))
    arm = reference + 0.05 + generator.normal(scale=0.1, size=(3, 300))
    assert judge(arm, reference).is_significant
    assert not judge(arm[:, ::-1], reference).is_significant  # examples out of their pairs
    assert not judge(arm[[1, 2, 0]], reference).is_significant  # seeds out of theirs


def test_no_effect_is_not_significant_and_an_effect_is() -> None:
    generator = np.random.default_rng(6)
    hardness = generator.random((1, 500))
    for effect, is_significant in ((0.0, False), (0.15, True)):
        levels = (0.4 + effect, 0.4)
        arm, reference = ((hardness + generator.normal(scale=0.1, size=(3, 500)) < level) * 1.0 for level in levels)
        found = judge(arm, reference)
        assert found.is_significant is is_significant
        assert found.p is not None and (found.p < 0.05) is is_significant


def test_identical_scores_are_not_significant() -> None:
    same = np.ones((2, 50))
    assert judge(same, same).interval == (0.0, 0.0)
    assert judge(same, same).p == 1.0 and not judge(same, same).is_significant


def test_few_examples_prove_nothing() -> None:
    few = judge(np.ones((1, 5)), np.zeros((1, 5)))
    assert few.interval is None and few.p is None and not few.is_significant
    six = judge(np.ones((1, 6)), np.zeros((1, 6)))
    assert six.is_significant and six.p == pytest.approx(2 / 2**6)  # a sign test's
    assert over_seeds(np.array([0.1, 0.1])).interval is None  # two equal differences are no proof of more


def test_draws_are_the_same_for_all_columns_and_each_time() -> None:
    values = np.random.default_rng(7).normal(size=(1, 90))
    drawn = resampled_scores("acc", np.concatenate([values, values + 1]), None, 3)
    np.testing.assert_allclose(drawn[1] - drawn[0], 1.0)
    np.testing.assert_allclose(drawn[:1], resampled_scores("acc", values, None, 3), atol=1e-12)
    assert np.abs(drawn[0] - resampled_scores("acc", values, None, 4)[0]).max() > 0


def test_many_examples_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(8).normal(size=(2, 70))
    whole = resampled_scores("acc", values, None, 1)
    monkeypatch.setattr(comparison, "_CHUNK", 1000)
    pieces = resampled_scores("acc", values, None, 1)
    np.testing.assert_allclose(pieces, whole)
    assert pieces.shape == (2, comparison.DRAWS)


# ---- standard errors, scores, ranks, tests


def test_standard_errors_are_combined_as_if_unpaired() -> None:
    one = comparison.from_standard_errors(np.array([0.1]), np.array([math.hypot(0.03, 0.04)]), 500)
    assert one.standard_error == pytest.approx(0.05)
    assert one.interval == pytest.approx((0.1 - 1.965 * 0.05, 0.1 + 1.965 * 0.05), abs=1e-4)
    several = comparison.from_standard_errors(np.array([0.1, 0.1, 0.1]), np.full(3, 0.05), 500)
    assert several.standard_error == pytest.approx(0.05)  # the same examples three times are not three times as many


def test_scores_follow_from_log_likelihoods() -> None:
    totals, words = np.array([-30.0, -60.0]), 10.0
    np.testing.assert_allclose(comparison.score("word_perplexity", totals, words), np.exp([3.0, 6.0]))
    np.testing.assert_allclose(comparison.score("bits_per_byte", totals, words), np.array([3.0, 6.0]) / math.log(2))
    np.testing.assert_allclose(comparison.score("acc", -totals, words), [3.0, 6.0])
    lower = {"word_perplexity", "byte_perplexity", "perplexity", "bits_per_byte"}
    assert {name for name in (*lower, "acc", "acc_norm", "exact_match") if comparison.lower_is_better(name)} == lower


def test_ranks_share_ties_and_heed_the_direction() -> None:
    scores = np.array([[0.5, 0.6, 0.6], [9.0, 8.0, 7.0]])
    ranks = comparison.average_ranks(scores, np.array([False, True]))
    np.testing.assert_allclose(ranks, [(3 + 3) / 2, (1.5 + 2) / 2, (1.5 + 1) / 2])
    assert comparison.average_ranks(np.array([[0.3, 0.1 + 0.2]]), np.array([False])).tolist() == [1.5, 1.5]


def test_wilcoxon_by_hand_and_by_scipy() -> None:
    # Ranks 1 ... 6, and of them 2 is negative: of 64 ways to set signs, 3 have a sum of negative ranks of at most 2.
    differences = np.array([0.01, -0.02, 0.05, 0.07, 0.11, 0.13])
    test = comparison.wilcoxon(differences)
    assert test.num_tasks == 6 and test.p == pytest.approx(2 * 3 / 64)
    assert test.p == pytest.approx(scipy.stats.wilcoxon(differences).pvalue)
    assert comparison.wilcoxon(np.abs(differences)).p == pytest.approx(2 / 64)
    assert comparison.wilcoxon(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == (5, None)
    rounding = 0.1 + 0.2 - 0.3
    assert rounding != 0
    assert comparison.wilcoxon(np.array([0.1, 0.2, 0.3, 0.4, 0.5, rounding])) == (5, None)  # 0 tells nothing


def test_a_ratio_from_logarithms() -> None:
    value, interval = comparison.ratio(over_seeds(np.log([1.01, 1.02, 1.03])))
    assert value == pytest.approx((1.01 * 1.02 * 1.03) ** (1 / 3))
    assert interval is not None and interval[0] < value < interval[1]
    assert comparison.ratio(over_seeds(np.log([1.01])))[1] is None
