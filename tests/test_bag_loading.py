"""Batches of bags by a budget of tokens: which patients, which tokens, and in what packs."""

import itertools

import numpy as np
import pytest
import torch
from bags import WIDTH, MemoryBags, bag, toy

from sansmax.data.bag_loading import BagLoader, Keep, PatientBags, Tokens, empty_cases, mixed, packs_of
from sansmax.errors import InputError


def loader(n=23, **changes):
    bags, cases = toy(n=n)
    return BagLoader(PatientBags(bags, cases.slides), **{"batch_size": 6, "pack_tokens": 50, "seed": 5, **changes})


def test_packs_are_neighbours_within_the_budget_and_miss_nothing():
    lengths = np.random.default_rng(0).integers(1, 40, 100).tolist()
    packs = packs_of(lengths, 60)
    assert [i for pack in packs for i in pack] == list(range(100))
    assert all(sum(lengths[i] for i in pack) <= 60 for pack in packs)
    # not one of them could have taken the next bag, too
    assert all(sum(lengths[i] for i in a) + lengths[b[0]] > 60 for a, b in itertools.pairwise(packs))
    assert packs_of([5, 100, 5], 60) == [[0], [1], [2]]


def test_an_epoch_shows_every_patient_once_in_steps_of_nearly_equal_size():
    steps = list(loader())
    seen = [[int(i) for pack in step for i in pack.indices] for step in steps]
    assert sorted(i for step in seen for i in step) == list(range(23))
    assert [len(step) for step in seen] == [6, 6, 6, 5]
    assert all(sum(pack.lengths) <= 50 or len(pack.lengths) == 1 for step in steps for pack in step)


def test_tokens_of_a_pack_are_those_of_its_patients_side_by_side():
    bags, cases = toy(n=7)
    (step,) = BagLoader(PatientBags(bags, cases.slides), batch_size=7, pack_tokens=70)
    assert len(step) > 1
    for pack in step:
        parts = zip(
            pack.indices.tolist(), pack.features[0].split(pack.lengths), pack.coords[0].split(pack.lengths), strict=True
        )
        for i, features, coords in parts:
            own = [bags.read(slide) for slide in cases.slides[i]]
            assert np.array_equal(features, np.concatenate([b.features for b in own]))
            # each slide from its own middle
            expected = np.concatenate([b.xy / 256 - (b.xy / 256).mean(0) for b in own])
            np.testing.assert_allclose(coords, expected, atol=1e-5)


def same(a, b):
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        for x, y in zip(one, other, strict=True):
            assert torch.equal(x.features, y.features) and x.lengths == y.lengths
            assert torch.equal(x.indices, y.indices)


def test_what_is_read_depends_on_seed_and_epoch_alone():
    keep = Keep(0.3, 0.9)
    first = loader(shuffle=True, keep=keep)
    epochs = []
    for epoch in range(2):
        first.set_epoch(epoch)
        epochs.append(list(first))
    many = loader(shuffle=True, keep=keep, workers=4)
    many.reader.keep_in_memory()
    for epoch in (1, 0, 1):
        many.set_epoch(epoch)
        same(list(many), epochs[epoch])
    many.start_at(1, 2)
    same(list(many), epochs[1][2:])
    with pytest.raises(AssertionError):
        same(epochs[0], epochs[1])
    with pytest.raises(AssertionError):
        same(list(loader(shuffle=True, keep=keep, seed=6)), epochs[0])


def test_the_budget_changes_packs_and_no_token():
    keep = Keep(0.3, 0.9)
    for a, b in zip(loader(keep=keep), loader(keep=keep, pack_tokens=1), strict=True):
        assert len(b) == sum(len(pack.lengths) for pack in a)
        assert torch.equal(torch.cat([p.features for p in a], 1), torch.cat([p.features for p in b], 1))


def test_random_subsets_keep_a_share_in_its_bounds_and_the_order_of_the_tokens():
    shares = []
    for seed in range(300):
        kept = Keep(0.25, 0.75).draw(1000, np.random.default_rng(seed))
        assert (np.diff(kept) > 0).all()
        shares.append(len(kept) / 1000)
    assert 0.25 <= min(shares) < 0.27 and 0.73 < max(shares) <= 0.75
    assert Keep(1.0, 1.0).draw(7, np.random.default_rng(0)) is None
    assert len(Keep(0.01, 0.01).draw(3, np.random.default_rng(0))) == 1
    assert len(Keep(1.0, 1.0, most=5).draw(1000, np.random.default_rng(0))) == 5
    # each token as often as any other
    counts = np.zeros(10)
    for seed in range(2000):
        counts[Keep(0.5, 0.5).draw(10, np.random.default_rng(seed))] += 1
    assert abs(counts / 1000 - 1).max() < 0.1


def test_balanced_steps_show_classes_equally_often():
    bags, cases = toy(n=20)
    labels = np.array([0] * 16 + [1] * 4)
    steps = BagLoader(
        PatientBags(bags, cases.slides), batch_size=20, pack_tokens=10**6, shuffle=True, labels=labels, seed=1
    )
    ((pack,),) = list(steps)
    assert np.bincount(labels[pack.indices.numpy()]).tolist() == [10, 10]


def test_reading_ahead_ends_with_the_iteration():
    import threading

    before = threading.active_count()
    for _ in loader():
        break
    steps = iter(loader())
    next(steps)
    steps.close()
    assert threading.active_count() == before


def test_bags_that_cannot_be_read_as_they_should_are_refused():
    bags = MemoryBags({"wide": bag("wide", np.ones((3, 5), np.float32)), "nan": bag("nan", np.ones((3, WIDTH)))})
    bags.read("nan").features[1, 2] = np.nan
    with pytest.raises(InputError, match=r"slide wide: features of width 5, the network reads 12.*another encoder"):
        PatientBags(bags, [("wide",)], width=WIDTH).read(0)
    with pytest.raises(InputError, match="slide nan: features hold NaN or infinity"):
        list(BagLoader(PatientBags(bags, [("nan",)]), batch_size=1, pack_tokens=10))
    bare = MemoryBags({"bare": bag("bare", np.ones((3, WIDTH), np.float32), tile_level0=None)})
    assert PatientBags(bare, [("bare",)]).read(0).coords is None
    with pytest.raises(InputError, match=r"slide bare: the bag has no coordinates.*pos_embed=none"):
        PatientBags(bare, [("bare",)], needs_coords=True).read(0)


def test_an_empty_slide_adds_nothing_and_an_empty_patient_is_found():
    empty = bag("empty", np.zeros((0, WIDTH), np.float32))
    bags = MemoryBags({"empty": empty, "full": bag("full", np.ones((3, WIDTH), np.float32))})
    slides = [("empty", "full"), ("empty",), ("full",)]
    assert empty_cases(bags, slides) == [1]
    reader = PatientBags(bags, slides)
    assert len(reader.read(0).features) == 3 and len(reader.read(1).features) == 0


def test_bags_are_read_once_where_they_fit_into_memory():
    bags, cases = toy(n=9)
    reads = []
    original = bags.read
    bags.read = lambda name: reads.append(name) or original(name)
    reader = PatientBags(bags, cases.slides, width=WIDTH)
    steps = BagLoader(reader, batch_size=3, pack_tokens=100)
    assert not reader.keep_in_memory(limit=100)
    list(steps), list(steps)
    assert len(reads) == 2 * len(bags.ids)
    assert reader.keep_in_memory()
    list(steps), list(steps)
    assert len(reads) == 3 * len(bags.ids)


def test_a_mixed_bag_has_tokens_of_both_in_the_share_that_it_says():
    own, other = (Tokens(np.full((40, 3), v, np.float32), np.full((40, 2), v, np.float32)) for v in (1, 2))
    shares = []
    for seed in range(200):
        tokens, share = mixed(own, other, np.random.default_rng(seed))
        assert len(tokens.features) == 40
        assert (tokens.features[:, 0] == 1).mean() == pytest.approx(share)
        np.testing.assert_array_equal(tokens.features[:, :2], tokens.coords)
        shares.append(share)
    assert np.histogram(shares, 4, (0, 1))[0].min() > 30


def test_a_smaller_partner_gives_what_it_has_and_no_token_is_there_twice():
    own, other = (Tokens(v + np.arange(n, dtype=np.float32)[:, None], None) for v, n in ((0, 50), (100, 5)))
    for seed in range(30):
        tokens, share = mixed(own, other, np.random.default_rng(seed))
        values = tokens.features[:, 0]
        assert len(set(values.tolist())) == len(values)
        assert (values < 100).mean() == pytest.approx(share)


def test_mixing_depends_on_seed_and_epoch_alone_and_leaves_the_subsets_as_they_are():
    bags, cases = toy(n=60)
    reader = PatientBags(bags, cases.slides)
    how = {"batch_size": 6, "pack_tokens": 10**6, "seed": 5, "shuffle": True, "keep": Keep(0.3, 0.9)}
    plain, *twice = (list(BagLoader(reader, **how, mix=m, workers=w)) for m, w in ((0.0, 1), (0.5, 1), (0.5, 3)))
    assert all(p.shares is None for (p,) in plain)
    mixed_bags = 0
    for (a,), (b,), (c,) in zip(*twice, plain, strict=True):
        assert torch.equal(a.features, b.features) and torch.equal(a.shares, b.shares)
        assert torch.equal(a.partners, b.partners) and torch.equal(a.indices, c.indices)
        own = a.partners == a.indices
        assert (a.shares[own] == 1).all()
        mixed_bags += int((~own).sum())
        for x, y, alone in zip(a.features[0].split(a.lengths), c.features[0].split(c.lengths), own, strict=True):
            assert not alone or torch.equal(x, y)
    assert 0.2 < mixed_bags / len(cases.ids) < 0.8
