"""Digit mosaics: exact shares, scans of one split only, pixels that match the truth, and a matter of the seed."""

import hashlib
import time

import numpy as np
import pytest
from sklearn.datasets import load_digits

from sansmax.data.mosaics import CELL, DigitMosaics, reduce
from sansmax.data.open import open_data
from sansmax.errors import InputError

SCANS, SCAN_LABELS = load_digits(return_X_y=True)
SCANS = np.rint(SCANS * 255 / 16).astype(np.uint8)
LABEL_OF_SCAN = {scan.tobytes(): label for scan, label in zip(SCANS, SCAN_LABELS, strict=True)}


def tiles(pixels):
    grid = pixels.shape[0] // CELL
    return [
        np.ascontiguousarray(pixels[CELL * r : CELL * (r + 1), CELL * c : CELL * (c + 1)]).tobytes()
        for r in range(grid)
        for c in range(grid)
    ]


@pytest.mark.parametrize(("grid", "share"), [(16, 0.25), (7, 0.5), (5, 0.2), (3, 1.0)])
def test_the_label_has_exactly_its_share(grid, share):
    mosaics = DigitMosaics("train", 40, grid, share, seed=3)
    assert np.bincount(mosaics.labels, minlength=10).tolist() == [4] * 10
    for i in range(40):
        counts = np.bincount(mosaics.truth(i).ravel(), minlength=10)
        assert counts[mosaics.labels[i]] == round(share * grid * grid)


def test_the_others_are_even_and_the_places_random():
    mosaics = DigitMosaics("train", 300, 16, 0.25)
    truth = np.stack([mosaics.truth(i) for i in range(0, 300, 10)])
    others = np.bincount(truth.ravel(), minlength=10)[1:]
    expected = 30 * 192 / 9
    assert np.abs(others - expected).max() < 5 * np.sqrt(expected)
    hits = (truth == 0).mean(0)
    assert np.abs(hits.mean(0) - 0.25).max() < 0.1
    assert np.abs(hits.mean(1) - 0.25).max() < 0.1


def test_pixels_match_the_truth():
    mosaics = DigitMosaics("val", 12, 6, 0.3, seed=1)
    for i in range(12):
        pixels = mosaics.read(i)
        assert pixels.shape == (48, 48)
        assert pixels.dtype == np.uint8
        assert [LABEL_OF_SCAN[t] for t in tiles(pixels)] == mosaics.truth(i).ravel().tolist()
    assert max(int(mosaics.read(i).max()) for i in range(12)) == 255


def test_no_scan_is_in_two_splits():
    used = {}
    for split in ("train", "val", "test"):
        mosaics = DigitMosaics(split, 30, 24, 0.2)
        used[split] = {t for i in range(30) for t in tiles(mosaics.read(i))}
    assert not used["train"] & used["val"]
    assert not used["train"] & used["test"]
    assert not used["val"] & used["test"]
    # nearly all of the 60 / 20 / 20 % are shown
    assert len(used["train"]) > 0.58 * 1797
    assert len(used["val"]) > 0.18 * 1797


def test_an_image_depends_on_seed_split_and_number_alone():
    one = DigitMosaics("train", 5, 8)
    np.testing.assert_array_equal(one.read(3), one.read(3))
    np.testing.assert_array_equal(one.read(3), DigitMosaics("train", 500, 8).read(3))
    np.testing.assert_array_equal(one.read(3), one.subset([4, 3]).read(1))
    for other in (DigitMosaics("train", 5, 8, seed=1), DigitMosaics("test", 5, 8)):
        assert not np.array_equal(one.truth(3), other.truth(3))
    with pytest.raises(IndexError):
        one.read(5)


def test_another_process_or_machine_makes_the_same_image():
    made = DigitMosaics("test", 9, 12, 0.3, 7).read(8).tobytes()
    assert hashlib.sha256(made).hexdigest() == "18ae0696aa95fc022cdd98ec6b759daedfccd983d7bad16511db7adb81a6c108"


def test_mosaics_are_made_fast():
    small, large = DigitMosaics("train", 50, 16), DigitMosaics("train", 2, 512)
    small.read(0)

    def best(mosaics, times):
        took = []
        for i in range(times):
            start = time.perf_counter()
            mosaics.read(i)
            took.append(time.perf_counter() - start)
        return min(took)

    assert best(small, 50) < 0.3e-3
    assert best(large, 2) < 1.0


def test_reduction_is_the_mean_of_blocks():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16), dtype=np.uint8)
    out = reduce(pixels, 8)
    assert out.dtype == np.uint8
    for r in range(3):
        for c in range(2):
            assert abs(out[r, c] - pixels[8 * r : 8 * r + 8, 8 * c : 8 * c + 8].mean()) <= 0.5
    colour = np.dstack([pixels, 255 - pixels, pixels])
    np.testing.assert_array_equal(reduce(colour, 8)[..., 0], out)
    np.testing.assert_array_equal(reduce(pixels, 1), pixels)
    with pytest.raises(InputError, match="24 x 16 px cannot be reduced by 5"):
        reduce(pixels, 5)


def test_mosaics_open_by_name():
    data = open_data("mosaics:grid=6,share=0.3,train=30,val=0,test=10,seed=2")
    assert data.classes == tuple("0123456789")
    assert {s: len(x) for s, x in data.splits().items()} == {"train": 30, "test": 10}
    assert data.splits()["test"].names[4] == "test[4]"
    np.testing.assert_array_equal(data.splits()["test"].read(4), DigitMosaics("test", 10, 6, 0.3, 2).read(4))
    assert {s: len(x) for s, x in open_data("mosaics:").splits().items()} == {"train": 2000, "val": 500, "test": 1000}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mosaics:gird=4", "unknown setting of mosaics 'gird': did you mean 'grid'"),
        ("mosaics:grid=four", "grid must be a whole number, 'four' was given"),
        ("mosaics:share=0.05", "the label is not the most frequent digit; give a share above 0.1"),
        ("mosaics:share=1.5", "share 1.5"),
        ("mosaics:grid=0", "grid must be 1 or more"),
        ("mosaics:train=0,val=0,test=0", "has no images"),
    ],
)
def test_mistakes_in_the_name(source, message):
    with pytest.raises(InputError, match=message):
        open_data(source)
