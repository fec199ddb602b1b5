"""Drawn splits: disjoint, in proportion, groups whole, and a matter of the seed and not of file order."""

import numpy as np
import pytest

from sansmax.data.splits import draw_parts
from sansmax.errors import InputError

RNG = np.random.default_rng(1)
N = 997
NAMES = [f"{i:05}.png" for i in range(N)]
LABELS = RNG.choice(4, N, p=[0.55, 0.3, 0.1, 0.05])
GROUPS = [f"p{g}" for g in RNG.integers(0, 180, N)]


def draw(names=NAMES, labels=LABELS, groups=None, val=0.15, test=0.2, seed=0):
    return draw_parts(names, np.asarray(labels), groups, val_fraction=val, test_fraction=test, seed=seed)


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_every_image_is_in_exactly_one_part(groups):
    parts = draw(groups=groups)
    assert sorted(np.concatenate(parts).tolist()) == list(range(N))
    assert all((np.diff(part) > 0).all() for part in parts)


@pytest.mark.parametrize(("groups", "tolerance"), [(None, 0.5), (GROUPS, 6)])
def test_every_class_gives_its_share(groups, tolerance):
    parts = draw(groups=groups)
    for part, share in zip(parts, (0.65, 0.15, 0.2), strict=True):
        counts = np.bincount(LABELS[part], minlength=4)
        # without groups: rounding, of val and of test
        allowed = tolerance * (2 if share == 0.65 else 1)
        assert np.abs(counts - share * np.bincount(LABELS)).max() <= allowed


def test_groups_stay_whole():
    parts = draw(groups=GROUPS)
    seen = [{GROUPS[i] for i in part} for part in parts]
    assert not seen[0] & seen[1]
    assert not seen[0] & seen[2]
    assert not seen[1] & seen[2]


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_the_draw_does_not_depend_on_the_order_of_files(groups):
    order = RNG.permutation(N)
    first = draw(groups=groups)
    shuffled = [groups[i] for i in order] if groups else None
    second = draw([NAMES[i] for i in order], LABELS[order], shuffled)
    for a, b in zip(first, second, strict=True):
        assert {NAMES[i] for i in a} == {NAMES[order[i]] for i in b}


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_the_seed_decides(groups):
    assert all(np.array_equal(a, b) for a, b in zip(draw(groups=groups), draw(groups=groups), strict=True))
    assert not np.array_equal(draw(groups=groups).test, draw(groups=groups, seed=1).test)


def test_small_classes_keep_a_training_image():
    labels = [0] * 40 + [1] * 3 + [2] * 2 + [3]
    for seed in range(20):
        parts = draw([str(i) for i in range(46)], labels, seed=seed)
        train, val, test = (np.bincount(np.array(labels)[p], minlength=4).tolist() for p in parts)
        assert (train[1], val[1], test[1]) == (1, 1, 1)
        assert (train[2], val[2], test[2]) == (1, 0, 1)
        assert (train[3], val[3], test[3]) == (1, 0, 0)


def test_grouped_classes_keep_a_training_image():
    labels = np.array([0, 1] * 30 + [2, 2, 2])
    groups = [str(i // 4) for i in range(60)] + ["rare a", "rare b", "rare b"]
    for seed in range(20):
        parts = draw([str(i) for i in range(63)], labels, groups, seed=seed)
        assert set(labels[parts.train]) == {0, 1, 2}
        # the class of a single group, also where train is the smallest part
        alone = groups[:60] + ["rare"] * 3
        parts = draw([str(i) for i in range(63)], labels, alone, val=0.2, test=0.6, seed=seed)
        assert set(labels[parts.train]) == {0, 1, 2}


def test_a_fraction_of_zero_or_one_is_taken_at_its_word():
    assert len(draw(val=0, test=0.2).val) == 0
    everything = draw(val=0, test=1)
    assert len(everything.test) == N
    halves = draw(val=0.5, test=0.5)
    assert len(halves.train) == 0
    assert abs(len(halves.val) - N / 2) <= 4
    assert len(draw(groups=GROUPS, val=0, test=1).test) == N


def test_too_few_images_or_groups_are_refused():
    with pytest.raises(InputError, match="2 images are too few to draw a part for val"):
        draw(["a", "b"], [0, 1])
    with pytest.raises(InputError, match=r"2 groups are too few to draw a part for .*_fraction to 0"):
        draw([str(i) for i in range(20)], [0, 1] * 10, ["a", "b"] * 10)
