"""Batches depend on seed, epoch and index: not on workers, on memory kept, on other random numbers, or on a restart."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sansmax.data.augment import Augment
from sansmax.data.kept import KeptPixels
from sansmax.data.loading import ImageLoader, make_loader
from sansmax.data.preprocess import Preprocess
from sansmax.data.sampling import EpochSampler
from sansmax.data.sets import ArrayImages, FileImages
from sansmax.errors import InputError

RNG = np.random.default_rng(3)
N = 23
PIXELS = RNG.integers(0, 256, (N, 9, 12, 3), dtype=np.uint8)
LABELS = np.array([0] * 15 + [1] * 6 + [2] * 2)
PREPROCESS = Preprocess((8, 10), 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
AUGMENT = Augment(hflip=0.5, rotate=20, scale=(0.8, 1.2), translate=0.1, brightness=0.3, noise=0.05, erase=0.5)
AUTO = Augment(auto="rand-m9-mstd0.5-inc1", crop_scale=(0.3, 1.0))


class Counted(ArrayImages):
    """Counts how often each image is read."""

    def __init__(self, pixels=PIXELS, labels=LABELS):
        super().__init__(pixels, [str(i) for i in range(len(pixels))], labels)
        self.reads = np.zeros(len(pixels), int)

    def read(self, i):
        self.reads[i] += 1
        return super().read(i)


def loader(augment=AUGMENT, **options) -> ImageLoader:
    options = {"batch_size": 4, "seed": 5, "shuffle": True, "cache": "none", **options}
    return make_loader(Counted(), PREPROCESS, augment, **options)


def epoch(loader, number):
    loader.set_epoch(number)
    return list(loader)


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(x, y, strict=True))


# the loader


def test_a_batch_is_images_labels_and_indices():
    plain = make_loader(Counted(), PREPROCESS, batch_size=10)
    batches = list(plain)
    assert [len(b.labels) for b in batches] == [10, 10, 3]
    images, labels, indices = batches[1]
    assert (images.dtype, labels.dtype, indices.dtype) == (torch.float32, torch.int64, torch.int64)
    assert indices.tolist() == list(range(10, 20))
    assert labels.tolist() == LABELS[10:20].tolist()
    for image, i in zip(images, indices, strict=True):
        torch.testing.assert_close(image, PREPROCESS(PIXELS[i]))


@pytest.mark.parametrize("augment", [AUGMENT, AUTO])
def test_workers_change_nothing(augment):
    alone, shared = loader(augment), loader(augment, workers=2)
    for number in (0, 3):
        assert_same(epoch(alone, number), epoch(shared, number))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_taken_up_in_the_middle_sees_the_same_batches(workers):
    whole = loader()
    first, second = epoch(whole, 7), epoch(whole, 8)
    resumed = loader(workers=workers)
    resumed.start_at(7, 2)
    iterator = iter(resumed)
    resumed.set_epoch(7)
    assert len(resumed) == 5
    assert_same(list(iterator), first[2:])
    assert_same(epoch(resumed, 8), second)
    assert_same(epoch(resumed, 7), first)


def test_the_state_is_read_when_the_first_batch_is_asked_for():
    for workers in (0, 1):
        late = loader(workers=workers)
        iterator = iter(late)
        late.set_epoch(3)
        assert_same(list(iterator), epoch(loader(), 3))


def test_epochs_and_seeds_differ():
    a = epoch(loader(shuffle=False), 0)
    for other in (epoch(loader(shuffle=False), 1), epoch(loader(shuffle=False, seed=6), 0)):
        assert all(torch.equal(x.indices, y.indices) for x, y in zip(a, other, strict=True))
        assert not any(torch.equal(x.images, y.images) for x, y in zip(a, other, strict=True))
    orders = [torch.cat([b.indices for b in epoch(loader(), e)]).tolist() for e in range(3)]
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("augment", [AUGMENT, AUTO])
def test_other_random_numbers_neither_matter_nor_change(augment):
    first = epoch(loader(augment), 0)
    torch.manual_seed(123)
    random.seed(123)
    np.random.seed(123)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    assert_same(first, epoch(loader(augment), 0))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert np.array_equal(before[2], after[2])


@pytest.mark.parametrize("augment", [None, AUGMENT, AUTO])
@pytest.mark.parametrize("workers", [0, 2])
def test_kept_pixels_change_nothing(augment, workers):
    plain, kept = loader(augment), loader(augment, workers=workers, cache="auto")
    for number in range(3):
        assert_same(epoch(plain, number), epoch(kept, number))


def test_kept_pixels_are_read_once():
    images = Counted()
    kept = make_loader(images, PREPROCESS, AUGMENT, batch_size=4, shuffle=True, drop_last=False)
    # the first eight are read to judge the size
    images.reads[:] = 0
    for number in range(3):
        epoch(kept, number)
    assert images.reads.tolist() == [1] * N


def test_pixels_are_shared_by_forked_workers(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(N)]
    for path, pixels in zip(paths, PIXELS, strict=True):
        Image.fromarray(pixels).save(path)
    files = FileImages(paths, [p.name for p in paths], LABELS)
    kept = make_loader(files, PREPROCESS, batch_size=4, workers=2)
    if kept.multiprocessing_context is not None or torch.multiprocessing.get_start_method() != "fork":
        pytest.skip("workers are not forked here")
    first = epoch(kept, 0)
    for path in paths:
        Path(path).unlink()
    assert_same(first, epoch(kept, 1))
    # what the workers decoded is here, too
    assert torch.equal(kept.dataset[(0, 3)][0], first[0].images[3])


def test_too_many_pixels_are_not_kept(monkeypatch):
    from sansmax.data import loading

    monkeypatch.setattr(loading, "CACHE_LIMIT", 8 * 10 * 3 * N)
    assert loader(cache="auto").dataset.kept is None
    monkeypatch.setattr(loading, "CACHE_LIMIT", 8 * 10 * 3 * N + 1)
    assert loader(cache="auto").dataset.kept is not None
    with pytest.raises(InputError, match="unknown cache 'disk'"):
        loader(cache="disk")


def test_kept_pixels_come_back_in_every_shape():
    kept = KeptPixels(3, 24)
    arrays = [np.arange(12, dtype=np.uint16).reshape(3, 4), np.arange(24, dtype=np.uint8).reshape(2, 4, 3)]
    for i, array in enumerate(arrays):
        assert kept.get(i) is None
        kept.put(i, array)
    for i, array in enumerate(arrays):
        got = kept.get(i)
        assert got is not None
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)
    kept.put(2, np.zeros((5, 5), np.uint8))
    assert kept.get(2) is None


def test_random_parts_are_cut_from_the_picture_at_its_full_size():
    fine = (np.indices((80, 100)).sum(0) % 2 * 255).astype(np.uint8)
    images = ArrayImages(fine[None], ["fine"], [0])
    preprocess = Preprocess((8, 10), 1, (0.5,), (0.5,))
    assert next(iter(make_loader(images, preprocess, batch_size=1))).images.abs().max() < 0.1
    parts = make_loader(images, preprocess, Augment(crop_scale=(0.01, 0.01)), batch_size=1)
    assert next(iter(parts)).images.abs().max() > 0.5


# the sampler


def test_an_epoch_is_every_image_once():
    keys = [k for batch in EpochSampler(N, 4, seed=1) for k in batch]
    assert sorted(keys) == [(0, i) for i in range(N)]
    assert [k for batch in EpochSampler(N, 4, shuffle=False) for k in batch] == [(0, i) for i in range(N)]


def test_the_last_batch_is_dropped_only_from_shuffled_sets_that_fill_one():
    assert [len(loader()), len(loader(shuffle=False)), len(loader(batch_size=50))] == [5, 6, 1]
    assert [len(b) for b in EpochSampler(N, 4, drop_last=True)] == [4] * 5
    with pytest.raises(InputError, match="23 images make no full batch of 50"):
        loader(batch_size=50, drop_last=True)
    with pytest.raises(InputError, match="at least 1 image"):
        EpochSampler(0, 4)


def test_the_length_is_that_of_a_whole_epoch_wherever_it_starts():
    sampler = EpochSampler(N, 4)
    sampler.start_at(2, 4)
    assert len(sampler) == 6
    assert len(list(sampler)) == 2
    assert sampler.state_dict() == {"epoch": 2, "batch": 4}
    other = EpochSampler(N, 4)
    other.load_state_dict(sampler.state_dict())
    assert list(other) == list(sampler)
    with pytest.raises(InputError, match="an epoch has 6 batches, it cannot start at batch 7"):
        sampler.start_at(0, 7)


def test_balanced_epochs_show_every_class_equally_often():
    keys = [k for batch in EpochSampler(N, 4, labels=LABELS) for k in batch]
    assert len(keys) == N
    assert len(set(keys)) == N
    counts = np.bincount(LABELS[[k[1] for k in keys]])
    assert counts.max() - counts.min() <= 1
    times = np.bincount([k[1] for k in keys], minlength=N)
    assert set(times[15:21]) <= {1, 2}
    assert times[21:].min() >= 3
    again = epoch(loader(balanced=True), 0)
    assert_same(again, epoch(loader(balanced=True, workers=2), 0))
    # an image that comes again is changed anew
    images = torch.cat([b.images for b in again])
    indices = torch.cat([b.indices for b in again])
    twice = next(i for i in range(21, N) if (indices == i).sum() > 1)
    assert not torch.equal(*images[indices == twice][:2])


# preprocessing

WIDE = RNG.integers(0, 256, (40, 80, 3), dtype=np.uint8)


def test_pixels_of_the_right_size_are_only_scaled():
    preprocess = Preprocess((9, 12), 3, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    expected = (PIXELS[0] / 255 - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    torch.testing.assert_close(preprocess(PIXELS[0]).permute(1, 2, 0).double(), torch.from_numpy(expected))


def test_squash_fills_the_size_and_crop_keeps_the_centre():
    ramp = np.tile(np.arange(80, dtype=np.uint8), (40, 1))
    squashed = Preprocess((20, 20), 1).resize(ramp)
    assert squashed.shape == (20, 20)
    assert squashed[0, 0] < 5
    assert squashed[0, -1] > 74
    cropped = Preprocess((40, 40), 1, resize_mode="crop").resize(ramp)
    np.testing.assert_array_equal(cropped, ramp[:, 20:60])
    closer = Preprocess((20, 20), 1, resize_mode="crop", crop_pct=0.5).resize(ramp)
    np.testing.assert_array_equal(closer, ramp[10:30, 30:50])


def test_pad_keeps_the_aspect_and_fills_with_the_mean():
    preprocess = Preprocess((20, 20), 3, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2), resize_mode="pad")
    out = preprocess(WIDE)
    assert out.shape == (3, 20, 20)
    assert out[:, :5].eq(0).all()
    assert out[:, 15:].eq(0).all()
    torch.testing.assert_close(out[:, 5:15], Preprocess((10, 20), 3, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))(WIDE))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_reduction_is_antialiased_and_keeps_the_depth(interpolation, dtype):
    largest = np.iinfo(dtype).max
    stripes = np.zeros((64, 64), dtype)
    stripes[:, ::8] = largest
    small = Preprocess((8, 8), 1, interpolation=interpolation).resize(stripes)
    assert small.dtype == dtype
    assert np.abs(small[:, 2:-2] / largest - 1 / 8).max() < 0.03
    rising = np.linspace(0, largest, 64).astype(dtype)[None].repeat(64, 0)
    out = Preprocess((32, 32), 1, interpolation=interpolation).resize(rising)
    assert np.abs(out[0, 4:-4] / largest - (np.arange(4, 28) * 2 + 0.5) / 63).max() < 1 / 255 + 1e-3
    assert Preprocess((8, 8), 1).resize(np.full((9, 9), largest, dtype)).min() == largest


def test_preprocessing_is_pure_and_survives_a_dict():
    preprocess = Preprocess((16, 24), 1, (0.3,), (0.2,), 0.9, "crop", "bilinear")
    before = WIDE.copy()
    assert torch.equal(preprocess(WIDE), preprocess(WIDE))
    np.testing.assert_array_equal(WIDE, before)
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    frozen = WIDE.copy()
    frozen.setflags(write=False)
    assert torch.equal(preprocess(frozen), preprocess(WIDE[:, ::-1][:, ::-1]))
    big_endian = (WIDE.astype(">u2"), WIDE.astype("<u2"))
    assert torch.equal(preprocess(big_endian[0]), preprocess(big_endian[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resize_mode": "sqush"}, "unknown resize_mode 'sqush': did you mean 'squash'"),
        ({"interpolation": "cubic"}, "did you mean 'bicubic'"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values for 3 channels"),
        ({"std": (0.0,)}, "std must be above 0"),
        ({"image_size": (0, 4)}, r"\(0, 4\) was given"),
        ({"in_chans": 2}, "in_chans must be 1 or 3"),
        ({"image_sise": (4, 4)}, "unknown setting of Preprocess 'image_sise': did you mean 'image_size'"),
    ],
)
def test_preprocessing_mistakes(change, message):
    with pytest.raises(InputError, match=message):
        Preprocess.from_dict({"image_size": (8, 8), **change})


# augmentation

IMAGE = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0))


def test_nothing_happens_by_default():
    assert Augment().is_none
    assert not AUGMENT.is_none
    assert torch.equal(Augment()(IMAGE), IMAGE)


def test_flips_are_flips():
    assert torch.equal(Augment(hflip=1.0)(IMAGE), IMAGE.flip(-1))
    assert torch.equal(Augment(vflip=1.0)(IMAGE), IMAGE.flip(-2))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "change",
    [
        {"rotate": 30.0},
        {"translate": 0.2},
        {"scale": (0.5, 0.6)},
        {"crop_scale": (0.2, 0.4)},
        {"brightness": 0.5},
        {"contrast": 0.5},
        {"noise": 0.1},
        {"erase": 1.0},
        {"auto": "rand-m9-n3"},
        {"auto": "augmix-m3-w3"},
        {"auto": "trivial"},
    ],
    ids=str,
)
def test_every_change_changes_and_stays_an_image(change, channels):
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    image = IMAGE[:channels]
    augment = Augment(**change)
    results = [augment(image, (6, 8)) for _ in range(8)]
    size = (6, 8) if "crop_scale" in change else (12, 16)
    for out in results:
        assert out.shape == (channels, *size)
        assert out.dtype == torch.float32
        assert out.min() >= 0
        assert out.max() <= 1
    assert any(not torch.equal(out, image) for out in results)
    assert any(not torch.equal(out, results[0]) for out in results)
    assert Augment.from_dict(augment.to_dict()) == augment


def test_color_changes_colour_and_fill_comes_into_view():
    torch.manual_seed(0)
    assert not torch.equal(Augment(color=0.5)(IMAGE), IMAGE)
    grey = IMAGE[:1].expand(3, -1, -1)
    torch.testing.assert_close(Augment(color=0.5)(grey), grey, atol=1e-4, rtol=0)
    assert Augment(scale=(0.3, 0.3), fill=0.25)(IMAGE)[:, 0, 0].eq(0.25).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hflip": 1.5}, r"hflip must be in 0 \.\.\. 1, 1\.5"),
        ({"rotate": -3}, "rotate must be 0 or more"),
        ({"scale": (1.2, 0.8)}, "scale must be two numbers above 0, the smaller first"),
        ({"auto": "randm9"}, "unknown augmentation policy 'randm9': did you mean"),
        ({"flip": 1}, "unknown setting of Augment 'flip': did you mean"),
    ],
)
def test_augmentation_mistakes(change, message):
    with pytest.raises(InputError, match=message):
        Augment.from_dict(change)
