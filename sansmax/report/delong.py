"""Areas under ROC curves with DeLong's variance: an interval for one model, a paired test for two.

The variance is that of DeLong, DeLong and Clarke-Pearson (Biometrics 44, 1988), from midranks in n log n by Sun and Xu
(IEEE Signal Processing Letters 21, 2014). It holds for independent cases: give one prediction per patient.
"""

import math
from dataclasses import dataclass

import numpy as np

from sansmax.errors import InputError
from sansmax.report.resample import Interval

# of the normal distribution, for 95 %
Z95 = 1.959963984540054


@dataclass(frozen=True)
class DeLong:
    """Two areas on the same cases: their difference "a minus b" with 95 % interval, and the two-sided p."""

    auc_a: float
    auc_b: float
    difference: Interval
    z: float
    p: float


def auc_interval(positive: np.ndarray, scores: np.ndarray) -> Interval:
    """The area under the ROC curve with its 95 % interval, cut at 0 and 1.

    `positive` `(n,)` is true for cases of the class, `scores` `(n,)` are larger for it. Not defined without both
    kinds; without interval where one kind has a single case.
    """
    positive = np.asarray(positive, bool)
    kinds = int(positive.sum()), int((~positive).sum())
    if min(kinds) == 0:
        return Interval(float("nan"), note="needs cases with and without this class")
    area, above, below = components(positive, scores)
    if min(kinds) == 1:
        return Interval(area, note="no interval: one kind has a single case")
    half = Z95 * math.sqrt(covariance(above, above) + covariance(below, below))
    return Interval(area, max(0.0, area - half), min(1.0, area + half))


def delong_test(positive: np.ndarray, scores_a: np.ndarray, scores_b: np.ndarray) -> DeLong:
    """Compares two models on the same cases; p is 1 where they rank them alike.

    Raises InputError without two cases of each kind.
    """
    positive = np.asarray(positive, bool)
    kinds = int(positive.sum()), int((~positive).sum())
    if min(kinds) < 2:
        raise InputError(
            f"DeLong's test needs two cases of each kind; there are {kinds[0]} with and {kinds[1]} without"
        )
    area_a, above_a, below_a = components(positive, scores_a)
    area_b, above_b, below_b = components(positive, scores_b)
    # the variance of the difference is that of the differences
    above, below = above_a - above_b, below_a - below_b
    error = math.sqrt(max(0.0, covariance(above, above) + covariance(below, below)))
    difference = area_a - area_b
    # equal rankings differ by rounding only
    alike = error <= 1e-12
    z = (0.0 if abs(difference) <= 1e-12 else math.copysign(math.inf, difference)) if alike else difference / error
    interval = Interval(difference, difference - Z95 * error, difference + Z95 * error)
    return DeLong(area_a, area_b, interval, z, math.erfc(abs(z) / math.sqrt(2)))


def components(positive: np.ndarray, scores: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """The area, and its structural components: of each positive case the share of negative ones below it, of each
    negative case the share of positive ones above it; ties count one half."""
    scores = np.asarray(scores, np.float64)
    if scores.shape != positive.shape or not np.isfinite(scores).all():
        raise InputError(f"scores must be {positive.shape[0]} finite numbers, one per case, given {scores.shape}")
    x, y = scores[positive], scores[~positive]
    ranks = midranks(scores)
    above = (ranks[positive] - midranks(x)) / len(y)
    below = 1 - (ranks[~positive] - midranks(y)) / len(x)
    return float(above.mean()), above, below


def midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of theirs."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which]


def covariance(a: np.ndarray, b: np.ndarray) -> float:
    """The covariance of two means over the same cases."""
    return float(((a - a.mean()) * (b - b.mean())).sum() / (len(a) - 1) / len(a))
