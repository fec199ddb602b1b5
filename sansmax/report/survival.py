"""How well risks order survival: Harrell's c-index; and the curves of groups: Kaplan-Meier, log-rank.

These are sums over sorted times of a few lines each, written here rather than taken from lifelines, which would bring
seven packages along; the tests hold them to lifelines. Targets are `(n, 2)`: time, and 1 for an event, 0 censored.
"""

from dataclasses import dataclass

import numpy as np

from sansmax.report.delong import Z95
from sansmax.report.scores import divide

# rows of the table of pairs that are there at once
BLOCK = 512


def concordance(
    weights: np.ndarray, targets: np.ndarray, risks: np.ndarray, strata: np.ndarray | None = None
) -> np.ndarray:
    """Harrell's c-index under each weighting `(n, r)` of the cases: `(r,)`; NaN where no pair can be compared.

    A pair can be compared where the one with the shorter time had the event, or at equal times where only one had it.
    It counts 1 where that one has the larger risk, 1/2 where risks are equal (Harrell et al., JAMA 247, 1982).
    `strata` `(n,)` are networks or folds whose risks are on scales of their own: only pairs inside one are compared.
    """
    time, event = targets[:, 0], targets[:, 1] > 0
    codes = np.zeros(len(time), int) if strata is None else np.asarray(strata)
    w = weights.astype(np.float32)
    right, pairs = np.zeros(weights.shape[1]), np.zeros(weights.shape[1])
    for start in range(0, len(time), BLOCK):
        rows = slice(start, start + BLOCK)
        t, e = time[rows, None], event[rows, None]
        first = e & ((t < time) | ((t == time) & ~event)) & (codes[rows, None] == codes)
        higher = (risks[rows, None] > risks) + 0.5 * (risks[rows, None] == risks)
        # counts of pairs stay below 2**24, so that float32 holds them exactly, halves too
        pairs += np.einsum("nr,nr->r", w[rows], first.astype(np.float32) @ w, dtype=np.float64)
        right += np.einsum("nr,nr->r", w[rows], (first * higher).astype(np.float32) @ w, dtype=np.float64)
    return divide(right, pairs)


@dataclass(frozen=True)
class KaplanMeier:
    """The share that survives after each time of `times`, which start at 0, with its 95 % band; who is at risk then."""

    times: np.ndarray
    survival: np.ndarray
    low: np.ndarray
    high: np.ndarray
    at_risk: np.ndarray

    def median(self) -> float:
        """The first time at which half or fewer survive; infinite where it never comes to that."""
        below = np.flatnonzero(self.survival <= 0.5)
        return float(self.times[below[0]]) if below.size else float("inf")


def kaplan_meier(targets: np.ndarray) -> KaplanMeier:
    """The product-limit estimate of survival, with Greenwood's variance on the scale log(-log)."""
    times, deaths, at_risk = life_table(targets)
    survival = np.cumprod(1 - deaths / at_risk)
    variance = np.cumsum(divide(deaths, at_risk * (at_risk - deaths)))
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(survival)
        spread = Z95 * np.sqrt(variance) / np.abs(log)
        low, high = survival ** np.exp(spread), survival ** np.exp(-spread)
    # at 1 there was no event yet, at 0 there is nobody left: neither has a band
    sharp = (survival == 1) | (survival == 0)
    low, high = np.where(sharp, survival, low), np.where(sharp, survival, high)
    start = np.ones(1)
    return KaplanMeier(
        np.append(0.0, times),
        np.append(start, survival),
        np.append(start, low),
        np.append(start, high),
        np.append(len(targets), at_risk),
    )


def life_table(targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct times, the events at each, and how many are at risk just before it."""
    times, which = np.unique(targets[:, 0], return_inverse=True)
    deaths = np.bincount(which, weights=targets[:, 1], minlength=len(times))
    leaving = np.bincount(which, minlength=len(times))
    return times, deaths, len(targets) - np.append(0, np.cumsum(leaving)[:-1])


def log_rank(targets: np.ndarray, groups: np.ndarray, strata: np.ndarray | None = None) -> tuple[float, float]:
    """Chi-square and p of the log-rank test that the groups survive alike; NaN where that cannot be told.

    With `strata` observed and expected events are summed over them (stratified test).
    """
    from scipy.special import chdtrc

    names = np.unique(groups)
    codes = np.zeros(len(groups), int) if strata is None else np.asarray(strata)
    gap = np.zeros(len(names))
    variance = np.zeros((len(names), len(names)))
    for code in np.unique(codes):
        own = codes == code
        more_gap, more_variance = _observed_minus_expected(targets[own], groups[own], names)
        gap, variance = gap + more_gap, variance + more_variance
    if len(names) < 2 or not variance.any():
        return float("nan"), float("nan")
    gap, variance = gap[:-1], variance[:-1, :-1]
    statistic = float(gap @ np.linalg.pinv(variance) @ gap)
    return statistic, float(chdtrc(len(names) - 1, statistic))


def _observed_minus_expected(
    targets: np.ndarray, groups: np.ndarray, names: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Events of each group beyond those expected, and their covariance (hypergeometric)."""
    times, deaths, at_risk = life_table(targets)
    own = groups == names[:, None]
    place = np.searchsorted(times, targets[:, 0])
    died = np.stack([np.bincount(place[g], targets[g, 1], minlength=len(times)) for g in own])
    left = np.stack([np.bincount(place[g], minlength=len(times)) for g in own])
    risk = own.sum(axis=1, keepdims=True) - np.concatenate([np.zeros((len(names), 1)), left.cumsum(axis=1)[:, :-1]], 1)
    share = risk / at_risk
    scale = deaths * divide(at_risk - deaths, at_risk - 1.0)
    # a single one at risk has no variance
    scale = np.where(at_risk > 1, scale, 0)
    variance = np.diag((share * scale).sum(axis=1)) - (share * scale) @ share.T
    return (died - share * deaths).sum(axis=1), variance


def risk_groups(risks: np.ndarray, strata: np.ndarray | None = None, groups: int = 2) -> np.ndarray:
    """The group of each case from low to high risk, cut into equal parts of the ranking, inside each stratum.

    Cutting test cases at their own quantiles uses no outcome. Equal risks stay together.
    """
    codes = np.zeros(len(risks), int) if strata is None else np.asarray(strata)
    out = np.zeros(len(risks), int)
    for code in np.unique(codes):
        own = codes == code
        edges = np.quantile(risks[own], np.arange(1, groups) / groups)
        out[own] = np.searchsorted(edges, risks[own], side="left")
    return out
