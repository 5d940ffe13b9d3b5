"""Whether a difference between two arms is more than chance: intervals, ranks and tests. Numbers in, numbers out.

An arm is what several seeds share; its scores are means over seeds. A difference is estimated in pairs: the same seeds
and the same examples on both sides, so that what moves both sides alike drops out.

The standard error comes from a bootstrap that draws examples and seeds anew; the interval is the estimate plus or minus
Student's t times it. Percentiles of the draws would do for hundreds of examples, but of three seeds they reach from the
least to the greatest at most, which holds the truth in three of four cases. Examples and seeds are crossed, for which
no exact bootstrap exists; drawing both counts what is peculiar to an example under a seed up to three times, so
intervals are rather too wide than too narrow (Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy.stats
from numpy.typing import NDArray

CONFIDENCE = 0.95
DRAWS = 2000  # the standard error is then right to 1.6 %
MINIMUM_PAIRS = 6  # of examples or tasks. Five that all point one way have p = 2 / 2^5 = 0.06
_CHUNK = 2**22  # examples drawn at once
_SAME = 12  # decimals beyond which means over seeds differ by rounding only

Array = NDArray[np.float64]


class Difference(NamedTuple):
    """An arm minus the reference, with what its interval is made of; NaN: nothing to judge chance by."""

    estimate: float
    standard_error: float = math.nan
    degrees: float = math.nan  # of freedom, of Student's t

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval."""
        if math.isnan(self.standard_error) or math.isnan(self.degrees):
            return None
        if self.standard_error == 0 and self.estimate != 0 and self.degrees < MINIMUM_PAIRS - 1:
            return None  # a few differences that happen to be equal are no proof that all are
        reach = float(scipy.stats.t.ppf((1 + CONFIDENCE) / 2, self.degrees)) * self.standard_error
        return self.estimate - reach, self.estimate + reach

    @property
    def p(self) -> float | None:
        """Two-sided p value, below 0.05 just where the interval leaves out 0."""
        if self.interval is None:
            return None
        if self.standard_error == 0:
            return 1.0 if self.estimate == 0 else 2.0**-self.degrees  # of a sign test, all pairs pointing one way
        return float(2 * scipy.stats.t.sf(abs(self.estimate) / self.standard_error, self.degrees))

    @property
    def is_significant(self) -> bool:
        """Whether there is an interval, and 0 is not in it."""
        return self.interval is not None and not self.interval[0] <= 0 <= self.interval[1]


def over_seeds(differences: Array) -> Difference:
    """The mean of (seeds,) differences with Student's interval for pairs; none of a single seed."""
    num_seeds = len(differences)
    if num_seeds < 2:
        return Difference(float(np.mean(differences)))
    return Difference(float(np.mean(differences)), math.sqrt(_seed_variance(differences)), num_seeds - 1)


def over_examples_and_seeds(differences: Array, resampled: Array, num_examples: int) -> Difference:
    """Judge a difference by a bootstrap over examples and seeds, or over examples alone if there is one seed.

    Args:
        differences: (seeds,) arm minus reference on all examples.
        resampled: (seeds, DRAWS) the same on examples drawn anew, the same examples for all seeds.
        num_examples: how many there are; of fewer than `MINIMUM_PAIRS` there is no interval.
    """
    estimate = float(differences.mean())
    if num_examples < MINIMUM_PAIRS:
        return Difference(estimate)
    by_seeds, by_examples = _seed_variance(differences), float(resampled.mean(axis=0).var())
    drawn = (_seed_shares(len(differences)) * resampled).sum(axis=0)
    degrees = _degrees(by_seeds, len(differences), by_examples, num_examples)
    return Difference(estimate, float(drawn.std()), degrees)


def from_standard_errors(differences: Array, errors: Array, num_examples: int) -> Difference:
    """Judge a difference without its examples, from the (seeds,) standard errors of the two sides as if unpaired.

    The seeds share their examples, so that what these contribute does not fall with the number of seeds.
    """
    by_seeds, by_examples = _seed_variance(differences), float((errors**2).mean())
    degrees = _degrees(by_seeds, len(differences), by_examples, num_examples)
    return Difference(float(differences.mean()), math.sqrt(by_seeds + by_examples), degrees)


def resampled_scores(metric: str, values: Array, weights: Array | None, seed: int) -> Array:
    """Scores on examples drawn anew with replacement.

    Args:
        metric: what the values make, see `score`.
        values: (columns, examples) of runs that answered the same examples; all get the same draws.
        weights: (examples,) words or bytes, or None.
        seed: the same seed draws the same.

    Returns:
        (columns, DRAWS)
    """
    generator = np.random.default_rng([1, seed])  # other numbers than those for seeds
    num_examples = values.shape[1]
    chunk = max(1, _CHUNK // num_examples)
    scores = []
    for first in range(0, DRAWS, chunk):
        size = min(chunk, DRAWS - first)
        drawn = generator.integers(num_examples, size=(size, num_examples)) + num_examples * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_examples).reshape(size, num_examples).astype(float)
        units = counts.sum(axis=1) if weights is None else counts @ weights
        scores.append(score(metric, values @ counts.T, units))
    return np.concatenate(scores, axis=1)


def score(metric: str, totals: Array, units: Array | float) -> Array:
    """A metric from the sum of its examples' values and the sum of their weights (or their number).

    Of perplexities and bits per byte the values are log-likelihoods in nats, and the weights words or bytes.
    """
    means = totals / units
    if metric.endswith("perplexity"):
        return np.asarray(np.exp(-means))
    if metric == "bits_per_byte":
        return np.asarray(-means / math.log(2))
    return np.asarray(means)


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of a metric is the better one."""
    return metric.endswith("perplexity") or metric == "bits_per_byte"


def average_ranks(scores: Array, is_lower_better: NDArray[np.bool_]) -> Array:
    """The mean rank of each arm over tasks, 1 being the best; equal scores share their ranks.

    Args:
        scores: (tasks, arms), at least one task.
        is_lower_better: (tasks,)
    """
    signed = np.where(is_lower_better[:, None], scores, -scores).round(_SAME)
    return np.asarray(scipy.stats.rankdata(signed, axis=1).mean(axis=0))


class Wilcoxon(NamedTuple):
    """A signed-rank test over tasks."""

    num_tasks: int  # with a difference that is not 0; of others the test knows nothing
    p: float | None  # two-sided; None: too few tasks for any outcome to be significant


def wilcoxon(differences: Array) -> Wilcoxon:
    """Test whether (tasks,) differences lie symmetrically around 0: exact for few tasks without ties."""
    differences = differences.round(_SAME)
    nonzero = differences[differences != 0]
    if len(nonzero) < MINIMUM_PAIRS:
        return Wilcoxon(len(nonzero), None)
    return Wilcoxon(len(nonzero), float(scipy.stats.wilcoxon(nonzero).pvalue))


def ratio(logarithms: Difference) -> tuple[float, tuple[float, float] | None]:
    """A ratio and its interval from the difference of logarithms."""
    interval = logarithms.interval
    both = None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
    return math.exp(logarithms.estimate), both


def _seed_variance(differences: Array) -> float:
    """The variance of their mean that comes from the choice of seeds; 0 of one seed, which says nothing about it."""
    return float(differences.var(ddof=1)) / len(differences) if len(differences) > 1 else 0.0


def _seed_shares(num_seeds: int) -> Array:
    """(seeds, DRAWS) share of each seed in each draw.

    One seed fewer is drawn than there are: the means then vary as the mean of all seeds does. Drawing as many would
    give two thirds of that for three seeds.
    """
    if num_seeds == 1:
        return np.ones((1, DRAWS))
    drawn = np.random.default_rng(0).integers(num_seeds, size=(num_seeds - 1, DRAWS))
    return np.stack([(drawn == seed).mean(axis=0) for seed in range(num_seeds)])


def _degrees(by_seeds: float, num_seeds: int, by_examples: float, num_examples: int) -> float:
    """Degrees of freedom of the sum of two variances, nearest to those of the larger (Satterthwaite)."""
    if by_seeds + by_examples == 0:
        return float(num_examples - 1)
    parts = by_examples**2 / (num_examples - 1) + (by_seeds**2 / (num_seeds - 1) if num_seeds > 1 else 0.0)
    return (by_seeds + by_examples) ** 2 / parts
