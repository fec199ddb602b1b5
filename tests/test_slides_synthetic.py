"""A synthetic slide holds what it says, in every level, without ever being in memory."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sansmax.data.slides.opening import open_slide
from sansmax.data.slides.openslide_reader import OpenSlideSlide
from sansmax.data.slides.scaled import read_scaled
from sansmax.data.slides.synthetic import read_planted, truth_path, write_synthetic_slide
from sansmax.data.slides.tiff_reader import TiffSlide
from sansmax.data.slides.tissue import find_tissue
from sansmax.errors import InputError


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A slide of 5,000 x 3,900 pixels, which is no multiple of its tiles, and what was planted."""
    path = tmp_path_factory.mktemp("synthetic") / "s.tif"
    return path, write_synthetic_slide(path, (5000, 3900), planted=4, planted_share=0.05, seed=3, quality=95)


def test_openslide_opens_it_with_its_levels_and_resolution(written):
    with open_slide(written[0]) as slide:
        assert isinstance(slide, OpenSlideSlide)
        assert slide.mpp == pytest.approx(0.5, rel=1e-6)
        assert [level.size for level in slide.levels] == [(5000 >> k, 3900 >> k) for k in range(4)]


def test_planted_boxes_are_where_the_truth_says(written):
    path, truth = written
    assert read_planted(path) == truth and len(truth.boxes) == 4 and truth.size == (5000, 3900)
    assert 0.03 < truth.planted_share < 0.09 and truth.tissue_share == pytest.approx(0.6, abs=0.01)
    with open_slide(path) as slide:
        green = {True: [], False: []}
        inside = np.zeros((3900, 5000), bool)
        for x, y, width, height in truth.boxes:
            inside[y : y + height, x : x + width] = True
        for y in range(0, 3840, 256):
            for x in range(0, 4864, 256):
                tile = slide.read((x, y), 0, (256, 256))[..., 1].mean()
                planted = inside[y : y + 256, x : x + 256]
                assert planted.all() or not planted.any()
                if tile < 230:
                    green[bool(planted.any())].append(tile)
        assert len(green[True]) == inside[:3840, :4864].sum() / 256**2
        # planted tiles are all darker than every other tile of tissue
        assert max(green[True]) < min(green[False]) - 10


def test_shares_inside_boxes_are_areas(written):
    truth = written[1]
    inside = np.zeros((3900 + 300, 5000 + 300))
    for x, y, width, height in truth.boxes:
        inside[y : y + height, x : x + width] = 1
    xy = np.random.default_rng(0).integers(0, (5000, 3900), (200, 2))
    wanted = [inside[y : y + 300, x : x + 300].mean() for x, y in xy]
    np.testing.assert_allclose(truth.inside(xy, 300), wanted, atol=1e-12)


def test_levels_are_area_means_of_level_0(written):
    with TiffSlide(written[0], "s") as slide:
        for level in range(1, 4):
            size = 320 >> level
            for x, y in [(0, 0), (1024, 512), (2048, 2816)]:
                fine = slide.read((x, y), 0, (320, 320)).astype(float)
                fine = fine.reshape(size, 1 << level, size, 1 << level, 3).mean((1, 3))
                coarse = slide.read((x, y), level, (size, size))
                # JPEG's noise, of both levels
                assert abs(coarse - fine).mean() < 3.5, (level, x, y)
                assert abs(coarse.mean((0, 1)) - fine.mean((0, 1))).max() < 1.5


def test_the_tissue_is_found(written):
    path, truth = written
    with open_slide(path) as slide:
        tissue = find_tissue(slide, max_hole_um2=0)
        assert tissue.share == pytest.approx(truth.tissue_share, abs=0.05)
        corners = np.array([box[:2] for box in truth.boxes])
        assert tissue.covered(corners + 40, 150).min() > 0.99


def test_the_same_seed_gives_the_same_slide(tmp_path):
    names = {"a": 1, "b": 1, "c": 2}
    for name, seed in names.items():
        write_synthetic_slide(tmp_path / f"{name}.tif", (1100, 900), seed=seed, levels=2, tile=64)
    data = {name: (tmp_path / f"{name}.tif").read_bytes() for name in names}
    assert data["a"] == data["b"] != data["c"]


def test_without_resolution_there_is_none(tmp_path):
    write_synthetic_slide(tmp_path / "a.tif", (600, 600), mpp=None, tile=64)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.mpp is None


def test_no_tissue_and_all_tissue(tmp_path):
    for share in (0.0, 1.0):
        truth = write_synthetic_slide(tmp_path / "a.tif", (1024, 1024), tissue_share=share, planted=0, tile=64)
        assert truth.boxes == () and truth.planted_share == 0
        with open_slide(tmp_path / "a.tif") as slide:
            assert find_tissue(slide).share == share


def test_progress_counts_every_tile(tmp_path):
    seen = []
    write_synthetic_slide(tmp_path / "a.tif", (1030, 1030), levels=2, tile=64, progress=lambda *at: seen.append(at))
    assert seen[-1] == (17**2 + 9**2, 17**2 + 9**2) and [s[0] for s in seen] == sorted({s[0] for s in seen})


def test_arguments_that_make_no_slide_are_refused(tmp_path):
    for wrong in ({"tile": 100}, {"tissue_share": 1.2}, {"planted": -1}):
        with pytest.raises(InputError, match=r"asked for|were given"):
            write_synthetic_slide(tmp_path / "a.tif", (600, 600), **wrong)
    with pytest.raises(InputError, match="at least one"):
        write_synthetic_slide(tmp_path / "a.tif", (100, 600))
    with pytest.raises(InputError, match=r"a\.planted\.json"):
        read_planted(tmp_path / "a.tif")
    assert list(tmp_path.iterdir()) == []


WRITE = """
import resource, sys
from sansmax.data.slides.synthetic import write_synthetic_slide
write_synthetic_slide(sys.argv[1] + "/a.tif", (1024, 1024))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
write_synthetic_slide(sys.argv[1] + "/b.tif", (12000, 12000))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
write_synthetic_slide(sys.argv[1] + "/c.tif", (60000, 60000))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_picture_and_a_killed_writer_leaves_no_slide(tmp_path):
    with subprocess.Popen([sys.executable, "-c", WRITE, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        # the picture has 412 MiB
        assert int(process.stdout.readline()) < 100 * 1024
        while not [p for p in tmp_path.glob(".c.*") if p.stat().st_size > 100_000]:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "c.tif").exists() and not truth_path(tmp_path / "c.tif").exists()
    assert (tmp_path / "b.tif").exists() and json.loads(truth_path(tmp_path / "b.tif").read_text())["seed"] == 0


def test_a_region_at_another_resolution_agrees_with_level_0(written):
    with open_slide(written[0]) as slide:
        coarse = read_scaled(slide, (1000, 700), 4, (100, 100)).astype(float)
        fine = slide.read((1000, 700), 0, (400, 400)).reshape(100, 4, 100, 4, 3).mean((1, 3))
        assert abs(coarse - fine).mean() < 3
