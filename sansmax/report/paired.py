"""Two or more classifiers on the same images: differences with intervals, and how likely chance makes them.

Everything is paired: both models err on the same hard images, and what they share cancels. Differences are "a model
minus the first one"; their intervals are paired bootstrap intervals over images, or over patients where they are known
(`report.metrics.compare_paired`). Areas under ROC curves are tested after DeLong, accuracies after McNemar (exactly);
both hold for independent images, so they are left out where a patient has several. Holm's correction keeps the chance
of any false finding among several comparisons at the level of one.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sansmax.errors import InputError
from sansmax.report.delong import DeLong, delong_test
from sansmax.report.metrics import RESAMPLES, compare_paired
from sansmax.report.resample import Interval

CLUSTERED = "no DeLong and McNemar tests: patients have several images, and these tests are for independent ones"


@dataclass(frozen=True)
class McNemar:
    """Images that only a, or only b, classifies rightly, and the exact two-sided p of so uneven a share."""

    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True)
class Pair:
    """A model against the first one: "model minus first" of every score, and the tests.

    `delong` holds a test of each class (of two the last). Adjusted p are Holm's: of McNemar's test over the models
    compared, of DeLong's over models and classes.
    """

    differences: Mapping[str, Interval]
    mcnemar: McNemar | None = None
    delong: Mapping[str, DeLong] = field(default_factory=dict)
    mcnemar_adjusted: float | None = None
    delong_adjusted: Mapping[str, float] = field(default_factory=dict)


def mcnemar_test(right_a: np.ndarray, right_b: np.ndarray) -> McNemar:
    """McNemar's exact test: under chance, each image that only one of them has right is either's with one half.

    p = P(X <= min) + P(X >= max) for X of Binomial(only a + only b, 1/2); 1 where they are right on the same images.
    """
    right_a, right_b = np.asarray(right_a, bool), np.asarray(right_b, bool)
    if right_a.shape != right_b.shape:
        raise InputError(f"McNemar's test needs the same images: {right_a.shape} and {right_b.shape} were given")
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    if only_a == only_b:
        return McNemar(only_a, only_b, 1.0)
    from scipy.stats import binomtest

    return McNemar(only_a, only_b, float(binomtest(only_a, only_a + only_b, 0.5).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """p adjusted for their number (Holm 1979): the smallest times m, the next times m - 1, ..., never falling."""
    p = np.asarray(p_values, dtype=np.float64)
    if not len(p):
        return []
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    out = np.empty_like(stepped)
    out[order] = stepped
    return out.tolist()


def compare_models(
    labels: np.ndarray,
    probabilities: Sequence[np.ndarray],
    classes: Sequence[str],
    groups: Sequence[Hashable] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    ordered: bool | None = None,
) -> tuple[list[Pair], list[str]]:
    """Each model after the first against the first one, and notes on tests that could not be made.

    `labels` `(n,)`, each of `probabilities` `(n, k)`; `groups` names the patient of each image,
    `ordered` says that the classes are grades.
    """
    first, *others = probabilities
    how: dict[str, Any] = {"resamples": resamples, "seed": seed, "ordered": ordered}
    gaps = [compare_paired(labels, p, first, classes, groups, **how) for p in others]
    if groups is not None and len(set(groups)) < len(groups):
        return [Pair(gap) for gap in gaps], [CLUSTERED]
    notes: list[str] = []
    tests = [delong_tests(labels, p, first, classes, notes) for p in others]
    right = first.argmax(axis=1) == labels
    shares = [mcnemar_test(p.argmax(axis=1) == labels, right) for p in others]
    share_p = holm([test.p for test in shares])
    # one family: every class of every model
    area_p = iter(holm([test.p for of in tests for test in of.values()]))
    pairs = [
        Pair(gap, share, of, p, {name: next(area_p) for name in of})
        for gap, share, of, p in zip(gaps, shares, tests, share_p, strict=True)
    ]
    return pairs, list(dict.fromkeys(notes))


def delong_tests(
    labels: np.ndarray, a: np.ndarray, b: np.ndarray, classes: Sequence[str], notes: list[str]
) -> dict[str, DeLong]:
    """DeLong's test of each class against the rest, of two classes the last; why there is none goes to `notes`."""
    chosen = list(enumerate(classes))
    out = {}
    for i, name in chosen[1:] if len(chosen) == 2 else chosen:
        try:
            out[name] = delong_test(np.asarray(labels) == i, a[:, i], b[:, i])
        except InputError as error:
            notes.append(f"{name}: {error}")
    return out
