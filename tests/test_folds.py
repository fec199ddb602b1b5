"""Drawn folds: each case tested once, strata as even as whole numbers allow, patients and sites never apart."""

from collections import Counter

import numpy as np
import pytest

from sansmax.data.bags.cases import Cases
from sansmax.data.bags.fold import Fold
from sansmax.data.bags.folds import complete_folds, draw_folds, fold_notes, inner_folds, strata
from sansmax.errors import InputError

NAMES = ("a", "b", "c")


def classes(counts, seed=0, **more):
    """Cases of so many patients per class, shuffled."""
    y = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    ids = tuple(f"p{i:03d}" for i in range(len(y)))
    return Cases("classification", ids, tuple((f"{n}_s",) for n in ids), y, NAMES[: len(counts)], **more)


def survival(n, seed=0):
    rng = np.random.default_rng(seed)
    ids = tuple(f"p{i}" for i in range(n))
    y = np.stack([rng.exponential(10, n), rng.random(n) < 0.3], axis=1).astype(float)
    return Cases("survival", ids, tuple((n,) for n in ids), y, ("risk",), target=("t", "e"))


@pytest.mark.parametrize("folds", [2, 3, 5, 10])
@pytest.mark.parametrize("counts", [(31, 40), (7, 53, 20), (10, 10, 83)])
def test_every_case_is_tested_once_and_every_class_dealt_evenly(folds, counts):
    cases = classes(counts)
    drawn = draw_folds(cases, folds, seed=3)
    assert sorted(name for f in drawn for name in f.test) == sorted(cases.ids)
    for f in drawn:
        assert set(f.train) | set(f.val) | set(f.test) == set(cases.ids)
    sizes = [len(f.test) for f in drawn]
    assert max(sizes) - min(sizes) <= 1
    for c in range(len(counts)):
        own = [int((cases.take(f.test).targets == c).sum()) for f in drawn]
        assert max(own) - min(own) <= 1, (c, own)


def test_validation_is_its_share_of_each_class():
    cases = classes((30, 60))
    for f in draw_folds(cases, 3, val_share=0.25, seed=1):
        rest = Counter(cases.take((*f.train, *f.val)).targets.tolist())
        val = Counter(cases.take(f.val).targets.tolist())
        assert val == {c: n // 4 for c, n in rest.items()}


def test_a_draw_depends_on_seed_and_names_alone():
    cases = classes((20, 30))
    turned = cases.take(cases.ids[::-1])
    first, again, other = draw_folds(cases, 4, seed=1), draw_folds(turned, 4, seed=1), draw_folds(cases, 4, seed=2)
    assert [(set(f.train), set(f.val), set(f.test)) for f in first] == [
        (set(f.train), set(f.val), set(f.test)) for f in again
    ]
    assert [set(f.test) for f in first] != [set(f.test) for f in other]


def test_slides_of_one_patient_stay_together():
    rng = np.random.default_rng(0)
    owners = tuple(f"q{i}" for i in rng.integers(0, 25, 100))
    base = classes((40, 60))
    cases = Cases(base.task, base.ids, base.slides, base.targets, base.classes, patients=owners)
    owner = dict(zip(cases.ids, owners, strict=True))
    for f in (*draw_folds(cases, 5, seed=2), *inner_folds(cases, draw_folds(cases, 5)[0], 4)):
        parts = [{owner[name] for name in part} for part in (f.train, f.val, f.test)]
        assert not parts[0] & parts[1]
        assert not parts[0] & parts[2]
        assert not parts[1] & parts[2]


def test_sites_stay_together_only_where_asked():
    sites = tuple(f"site{i % 7}" for i in range(70))
    cases = classes((30, 40), sites=sites)
    site = dict(zip(cases.ids, sites, strict=True))
    for f in draw_folds(cases, 3, by_site=True):
        parts = [{site[name] for name in part} for part in (f.train, f.val, f.test)]
        assert not parts[0] & parts[1]
        assert not (parts[0] | parts[1]) & parts[2]
    assert any({site[n] for n in f.test} & {site[n] for n in f.train} for f in draw_folds(cases, 3))
    with pytest.raises(InputError, match="8 folds of 7 sites; between 2 and 7"):
        draw_folds(cases, 8, by_site=True)
    with pytest.raises(InputError, match=r"--set data\.site_column=NAME"):
        draw_folds(classes((5, 5)), 2, by_site=True)


def test_events_of_survival_are_dealt_evenly():
    cases = survival(83)
    events = [int(cases.take(f.test).targets[:, 1].sum()) for f in draw_folds(cases, 5)]
    assert max(events) - min(events) <= 1


def test_rare_labels_reach_every_fold():
    rng = np.random.default_rng(1)
    y = (rng.random((200, 3)) < [0.05, 0.3, 0.6]).astype(float)
    y[rng.random(y.shape) < 0.1] = np.nan
    ids = tuple(map(str, range(200)))
    cases = Cases("multilabel", ids, tuple((n,) for n in ids), y, NAMES, target=NAMES)
    found = np.array([np.nansum(cases.take(f.test).targets, axis=0) for f in draw_folds(cases, 5)])
    even = np.nansum(y, axis=0) / 5
    assert np.abs(found[:, 0] - even[0]).max() < 1
    assert np.abs(found - even).max() <= 2


def test_measurements_are_dealt_by_quarters():
    rng = np.random.default_rng(2)
    ids = tuple(map(str, range(101)))
    cases = Cases("regression", ids, tuple((n,) for n in ids), rng.exponential(1, (101, 1)), ("v",), target=("v",))
    quarters = strata(cases)
    assert quarters.sum(axis=0).tolist() == [26, 25, 25, 25]
    place = {name: i for i, name in enumerate(ids)}
    own = np.array([quarters[[place[n] for n in f.test]].sum(axis=0) for f in draw_folds(cases, 4)])
    assert (own.max(axis=0) - own.min(axis=0) <= 1).all()


def test_inner_folds_never_hold_a_test_case_and_validate_each_other_case_once():
    cases = classes((20, 25))
    outer = draw_folds(cases, 5)[2]
    inner = inner_folds(cases, outer, 3, seed=9)
    assert not {n for f in inner for n in (*f.train, *f.val)} & set(outer.test)
    assert sorted(n for f in inner for n in f.val) == sorted((*outer.train, *outer.val))
    assert all(not f.test for f in inner)


def test_given_splits_stay_and_only_lack_of_validation_is_filled():
    cases = classes((10, 10))
    names = cases.ids
    given = (Fold(names[:10], names[10:14], names[14:]), Fold(names[5:], (), names[:5]))
    first, second = complete_folds(cases, given, val_share=0.2, seed=0)
    assert first == given[0]
    assert second.test == names[:5]
    assert sorted((*second.train, *second.val)) == sorted(names[5:])
    assert len(second.val) == 3
    assert complete_folds(cases, given, val_share=0)[1] == given[1]


def test_given_splits_that_part_a_patient_are_refused():
    base = classes((3, 3))
    cases = Cases(base.task, base.ids, base.slides, base.targets, base.classes, patients=tuple("xxyyzz"))
    with pytest.raises(InputError, match="1 patients are both in train and in test: x"):
        complete_folds(cases, [Fold(cases.ids[1:], (), cases.ids[:1])])


def test_what_a_split_lacks_is_said():
    cases = classes((1, 12))
    notes = fold_notes(cases, draw_folds(cases, 3))
    assert len(notes) == 1
    assert "tests a without training on it" in notes[0]
    notes = fold_notes(cases, [Fold(cases.ids[2:], (), cases.ids[:1]), Fold(cases.ids[2:], (), cases.ids[:2])])
    assert "11 of 13 cases are in no test part" in notes
    assert "1 cases are in several test parts" in notes


@pytest.mark.parametrize("folds", [1, 0, 12])
def test_folds_that_cannot_be_drawn_are_refused(folds):
    with pytest.raises(InputError, match=f"{folds} folds of 11 patients; between 2 and 11 are possible"):
        draw_folds(classes((5, 6)), folds)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_of_validation_that_is_none_is_refused(share):
    with pytest.raises(InputError, match="share of validation"):
        draw_folds(classes((5, 6)), 2, val_share=share)
