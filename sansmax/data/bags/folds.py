"""Draws folds of patients: stratified by target, patients (or whole sites) never apart.

    folds = draw_folds(cases, 5, seed=0)

A draw depends on the seed and the names of the patients, not on the order of the table. Strata are the classes, events
of survival, each label of several, and quarters of a measurement.
"""

from collections.abc import Sequence

import numpy as np

from sansmax.data.bags.cases import Cases
from sansmax.data.bags.fold import Fold
from sansmax.data.bags.split_files import check_patients
from sansmax.errors import InputError, listed

# what the number of cases counts beside the strata: it decides where they do not
SIZE_WEIGHT = 1e-3
BINS = 4


def draw_folds(
    cases: Cases, folds: int, *, val_share: float = 0.2, seed: int = 0, by_site: bool = False
) -> tuple[Fold, ...]:
    """`folds` splits whose test parts are each case once; the rest is parted into train and val.

    `val_share` of what is not test validates (0: nothing does). `by_site` keeps the cases of a site together, so that
    a network is tested on sites it never saw. Raises InputError where there are fewer patients or sites than folds.
    """
    units, kind = _units(cases, by_site)
    there = len(set(units))
    if not 2 <= folds <= there:
        raise InputError(f"{folds} folds of {there} {kind}; between 2 and {there} are possible: change --folds")
    part = deal(strata(cases), units, [1 / folds] * folds, seed)
    return tuple(
        draw_val(cases, _names(cases, part != k), _names(cases, part == k), val_share, seed + 1 + k, by_site)
        for k in range(folds)
    )


def draw_val(
    cases: Cases,
    rest: Sequence[str],
    test: Sequence[str],
    val_share: float,
    seed: int,
    by_site: bool = False,
) -> Fold:
    """A fold with the given test cases, and `val_share` of the rest to validate."""
    if not 0 <= val_share < 1:
        raise InputError(f"the share of validation is {val_share:g}; give 0 or more, and less than 1")
    inside = cases.take(rest)
    if val_share == 0:
        return Fold(tuple(rest), (), tuple(test))
    units, kind = _units(inside, by_site)
    if len(set(units)) < 2:
        raise InputError(f"{len(set(units))} {kind} cannot be parted into train and val; give more, or no validation")
    part = deal(strata(inside), units, [1 - val_share, val_share], seed)
    if not (part == 1).any():
        raise InputError(
            f"{len(set(units))} {kind} are too few for a validation share of {val_share:g}; raise it, or give 0"
        )
    return Fold(_names(inside, part == 0), _names(inside, part == 1), tuple(test))


def inner_folds(cases: Cases, fold: Fold, folds: int, *, seed: int = 0, by_site: bool = False) -> tuple[Fold, ...]:
    """The training and validation cases of a fold parted `folds` times anew, each validating once; no test part.

    The test cases of the outer fold are in none of them.
    """
    inside = cases.take((*fold.train, *fold.val))
    outer = draw_folds(inside, folds, val_share=0, seed=seed, by_site=by_site)
    return tuple(Fold(f.train, f.test) for f in outer)


def complete_folds(
    cases: Cases, given: Sequence[Fold], *, val_share: float = 0.2, seed: int = 0, by_site: bool = False
) -> tuple[Fold, ...]:
    """Given splits as they are; where one has no validation part it is drawn from its training cases.

    Raises InputError where a patient has cases in two parts.
    """
    for fold in given:
        check_patients(fold, cases)
    return tuple(
        fold if fold.val or val_share == 0 else draw_val(cases, fold.train, fold.test, val_share, seed + 1 + k, by_site)
        for k, fold in enumerate(given)
    )


def fold_notes(cases: Cases, folds: Sequence[Fold]) -> list[str]:
    """What to know of the splits: cases in no test part or in several, classes that a part lacks."""
    notes = []
    tested = [name for fold in folds for name in fold.test]
    if never := len(set(cases.ids) - set(tested)):
        notes.append(f"{never:,} of {len(cases):,} cases are in no test part")
    if len(set(tested)) < len(tested):
        notes.append(f"{len(tested) - len(set(tested)):,} cases are in several test parts")
    if cases.task == "classification":
        for k, fold in enumerate(folds):
            trained = set(cases.take(fold.train).targets.tolist())
            if lost := sorted(set(cases.take(fold.test).targets.tolist()) - trained):
                notes.append(f"split {k} tests {listed([cases.classes[c] for c in lost], 10)} without training on it")
    return notes


def strata(cases: Cases) -> np.ndarray:
    """`(n, s)` zeros and ones: which strata each case belongs to."""
    y = cases.targets
    if cases.task == "classification":
        return (y[:, None] == np.arange(len(cases.classes))).astype(float)
    if cases.task == "survival":
        return np.stack([y[:, 1] == 1, y[:, 1] == 0], axis=1).astype(float)
    if cases.task == "multilabel":
        return np.concatenate([y == 1, y == 0], axis=1).astype(float)
    return np.concatenate([_quarters(column) for column in y.T], axis=1)


def _quarters(values: np.ndarray) -> np.ndarray:
    """`(n, 4)`: in which quarter of the known values each one lies; a row of zeros where it is not known."""
    known = np.isfinite(values)
    edges = np.quantile(values[known], np.linspace(0, 1, BINS + 1)[1:-1]) if known.any() else np.zeros(BINS - 1)
    which = np.searchsorted(edges, values, side="left")
    return ((which[:, None] == np.arange(BINS)) & known[:, None]).astype(float)


def deal(strata: np.ndarray, units: Sequence[str], shares: Sequence[float], seed: int) -> np.ndarray:
    """The part of each case: units (patients, sites) are dealt whole, each to the part whose strata lack most.

    "Lack" is the chi-square distance of what the parts hold from their `shares`. Large units come first, then one
    stratum after the other, so that without large units every stratum is dealt as evenly as whole numbers allow.
    """
    # the order of names decides, not that of the table
    names, which = np.unique(np.asarray(units, dtype=np.str_), return_inverse=True)
    counts = np.zeros((len(names), strata.shape[1] + 1))
    np.add.at(counts, which, np.concatenate([strata, np.ones((len(strata), 1))], axis=1))
    total = np.maximum(counts.sum(axis=0), 1)
    weight = np.append(np.ones(strata.shape[1]), SIZE_WEIGHT)
    share = np.asarray(shares)[:, None]
    order = np.random.default_rng(seed).permutation(len(names))
    rarest = np.where(counts[:, :-1] > 0, total[:-1], np.inf)
    first = rarest.argmin(axis=1)
    order = order[np.lexsort((first[order], rarest.min(axis=1)[order], -counts[order, -1]))]
    filled = np.zeros((len(shares), counts.shape[1]))
    part = np.zeros(len(names), dtype=np.int64)
    for unit in order:
        own = counts[unit]
        added = (weight * own * (2 * (filled - share * total) + own) / (share * total)).sum(axis=1)
        part[unit] = int(np.argmin(added))
        filled[part[unit]] += own
    return part[which]


def _units(cases: Cases, by_site: bool) -> tuple[tuple[str, ...], str]:
    """What is dealt whole: sites or patients."""
    if not by_site:
        return cases.groups, "patients"
    if cases.sites is None:
        raise InputError("keeping sites together needs their column; name it with --set data.site_column=NAME")
    return cases.sites, "sites"


def _names(cases: Cases, chosen: np.ndarray) -> tuple[str, ...]:
    return tuple(cases.ids[i] for i in np.flatnonzero(chosen))
