"""Draws train, validation and test images: in proportion by class, and never two parts of one group apart.

The draw depends on the seed and on the names (or groups), not on the order in which files were found.

Small classes: a class with three images or more has at least one in every part; with two, one in train and one in
test (or val, where no test is drawn); a single one stays in train. With groups the same holds for train only.
"""

from typing import NamedTuple

import numpy as np

from sansmax.errors import InputError


class Parts(NamedTuple):
    """Indices of the images of each part, ascending."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray


def draw_parts(
    names: list[str],
    labels: np.ndarray,
    groups: list[str] | None = None,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> Parts:
    """Splits images into train, val and test, stratified by class.

    Without groups every class gives its share, rounded. With groups whole groups are dealt, the largest first, each
    to the part where the counts of its classes lack most; shares are then as near as the groups allow.
    A part with a positive fraction that would stay empty is an `InputError`.
    """
    fractions = np.array([1 - val_fraction - test_fraction, val_fraction, test_fraction])
    fractions[np.abs(fractions) < 1e-9] = 0
    if groups is None:
        part = _deal_images(names, np.asarray(labels), fractions, seed)
    else:
        part = _deal_groups(np.asarray(labels), np.asarray(groups), fractions, seed)
    parts = Parts(*(np.flatnonzero(part == k) for k in range(3)))
    for name, indices, fraction in zip(Parts._fields, parts, fractions, strict=True):
        if fraction > 0 and len(indices) == 0:
            what = f"{len(names)} images" if groups is None else f"{len(set(groups))} groups"
            raise InputError(
                f"{what} are too few to draw a part for {name} (share {fraction:g}); give more images, "
                f"or set {name}_fraction to 0"
            )
    return parts


def _deal_images(names: list[str], labels: np.ndarray, fractions: np.ndarray, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    by_name = np.array(sorted(range(len(names)), key=names.__getitem__), dtype=np.int64)
    part = np.zeros(len(names), dtype=np.int64)
    for label in np.unique(labels):
        mine = rng.permutation(by_name[labels[by_name] == label])
        n_val, n_test = _shares(len(mine), fractions)
        part[mine[:n_test]] = 2
        part[mine[n_test : n_test + n_val]] = 1
    return part


def _shares(n: int, fractions: np.ndarray) -> tuple[int, int]:
    """How many of n images of one class go to val and to test."""
    train, val, test = fractions
    n_test = max(round(n * test), int(test > 0))
    n_val = max(round(n * val), int(val > 0))
    room = n - int(train > 0)
    while n_val + n_test > room:
        if n_val >= n_test and n_val > 0:
            n_val -= 1
        else:
            n_test -= 1
    if train == 0:
        # all that rounding leaves over
        n_test, n_val = (n - n_val, n_val) if test > 0 else (0, n)
    return n_val, n_test


def _deal_groups(labels: np.ndarray, groups: np.ndarray, fractions: np.ndarray, seed: int) -> np.ndarray:
    group_names, group_of = np.unique(groups, return_inverse=True)
    n_classes = int(labels.max()) + 1 if len(labels) else 0
    counts = np.zeros((len(group_names), n_classes))
    np.add.at(counts, (group_of, labels), 1)
    total = np.maximum(counts.sum(0), 1)
    open_parts = np.flatnonzero(fractions > 0)
    share = fractions[open_parts, None]
    # chi-square of the counts against their targets: what one more group adds to it in each part
    filled = np.zeros((len(open_parts), n_classes))
    order = np.random.default_rng(seed).permutation(len(group_names))
    order = order[np.argsort(-counts[order].sum(1), kind="stable")]
    part_of_group = np.zeros(len(group_names), dtype=np.int64)
    for g in order:
        added = (counts[g] * (2 * (filled - share * total) + counts[g]) / (share * total**2)).sum(1)
        best = int(np.argmin(added))
        filled[best] += counts[g]
        part_of_group[g] = open_parts[best]
    if fractions[0] > 0:
        _every_class_in_train(counts, part_of_group)
    return part_of_group[group_of]


def _every_class_in_train(counts: np.ndarray, part_of_group: np.ndarray) -> None:
    for label in range(counts.shape[1]):
        has = np.flatnonzero(counts[:, label] > 0)
        if len(has) and (part_of_group[has] != 0).all():
            part_of_group[has[np.argmin(counts[has].sum(1))]] = 0
