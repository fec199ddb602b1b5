"""Slides that are damaged, cut short, or no slides at all."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from sansmax.data.slides.opening import open_slide
from sansmax.data.slides.openslide_reader import OpenSlideSlide
from sansmax.data.slides.scaled import read_scaled
from sansmax.data.slides.slide import SlideError
from sansmax.data.slides.tiff_reader import TiffSlide


def textured(side):
    return np.random.default_rng(side).integers(100, 156, (side, side, 3)).astype(np.uint8)


@pytest.fixture
def slide_file(tmp_path):
    """A tiled pyramid of 512, 256 and 128 pixels with JPEG tiles."""
    path = tmp_path / "a.tif"
    whole = textured(512)
    with tifffile.TiffWriter(path) as tiff:
        for k in range(3):
            level = whole.reshape(512 >> k, 1 << k, 512 >> k, 1 << k, 3).mean((1, 3)).astype(np.uint8)
            tiff.write(
                level, tile=(64, 64), compression="jpeg", photometric="rgb", subfiletype=int(k > 0), metadata=None
            )
    return path


def spoil(path, level):
    """Overwrites the tiles of a level with noise."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    with path.open("rb+") as file:
        for offset, count in places:
            file.seek(offset)
            file.write(b"\x17" * count)


READERS = {
    "OpenSlide": lambda path: OpenSlideSlide(path, "a"),
    "tifffile": lambda path: TiffSlide(path, "a"),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_level_that_does_not_decode_is_replaced_by_a_finer_one(slide_file, reader):
    with READERS[reader](slide_file) as slide:
        good = read_scaled(slide, (0, 0), 4, (128, 128)).astype(int)
    spoil(slide_file, 2)
    with READERS[reader](slide_file) as slide:
        with pytest.warns(UserWarning, match=r"a\.tif: level 2 cannot be read, level 1 is read in its place"):
            replaced = read_scaled(slide, (0, 0), 4, (128, 128)).astype(int)
        assert abs(replaced - good).mean() < 3
        # the handle is still good for the levels that are
        assert slide.read((0, 0), 1, (50, 50)).std() > 1
        with pytest.raises(SlideError, match="level 2"):
            slide.read((0, 0), 2, (50, 50))


@pytest.mark.parametrize("reader", READERS)
def test_two_levels_that_do_not_decode_are_both_named(slide_file, reader):
    spoil(slide_file, 2)
    spoil(slide_file, 1)
    with READERS[reader](slide_file) as slide, pytest.warns(UserWarning) as said:
        read_scaled(slide, (0, 0), 4, (128, 128))
    assert [str(w.message).split("level ")[1][0] for w in said] == ["2", "1"]


@pytest.mark.parametrize("reader", READERS)
def test_level_0_that_does_not_decode_is_an_error(slide_file, reader):
    spoil(slide_file, 0)
    with READERS[reader](slide_file) as slide, pytest.raises(SlideError, match=r"level 0 of .*a\.tif"):
        read_scaled(slide, (0, 0), 1, (128, 128))


@pytest.mark.parametrize("keep", [0.03, 0.3, 0.6])
def test_a_slide_cut_short_is_refused_when_it_is_opened(slide_file, keep):
    data = slide_file.read_bytes()
    slide_file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(SlideError, match=r"a\.tif"):
        open_slide(slide_file)


def test_the_error_of_a_slide_cut_short_counts_its_tiles(slide_file):
    with tifffile.TiffFile(slide_file) as tiff:
        page = tiff.pages[0]
        cut = page.dataoffsets[40] + 3
    slide_file.write_bytes(slide_file.read_bytes()[:cut])
    with pytest.raises(SlideError, match="cut short, 24 of 64 tiles"):
        open_slide(slide_file)
    with pytest.raises(SlideError, match="cut short, 24 of 64 tiles"):
        TiffSlide(slide_file, "a")


def test_a_cut_that_openslide_does_not_notice_is_refused(slide_file):
    # the coarse levels lie before the end of the file, some tiles of level 0 would lie behind it
    with tifffile.TiffFile(slide_file, mode="r+") as tiff:
        offsets = list(tiff.pages[0].dataoffsets)
        offsets[-5:] = [slide_file.stat().st_size + k for k in range(5)]
        tiff.pages[0].tags["TileOffsets"].overwrite(offsets)
    OpenSlideSlide(slide_file, "a").close()
    with pytest.raises(SlideError, match="cut short, 5 of 64 tiles"):
        open_slide(slide_file)


def test_a_cut_that_costs_a_coarse_level_only_is_survived(slide_file):
    with tifffile.TiffFile(slide_file) as tiff:
        cut = tiff.pages[2].dataoffsets[1] + 3
    with TiffSlide(slide_file, "a") as slide:
        good = read_scaled(slide, (0, 0), 4, (128, 128)).astype(int)
    slide_file.write_bytes(slide_file.read_bytes()[:cut])
    with open_slide(slide_file) as slide, pytest.warns(UserWarning, match="level 2 cannot be read"):
        assert abs(read_scaled(slide, (0, 0), 4, (128, 128)) - good).mean() < 3


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.svs", b"", "empty"),
        ("a.svs", b"these are no pixels\n" * 50, "cannot read .*a.svs"),
        ("a.tif", b"II*\0" + b"\xff" * 600, "cannot open .*a.tif"),
        ("a.nii", b"\0" * 344 + b"n+1\0" + b"\0" * 100, "cannot read .*a.nii"),
        ("a.nii.gz", b"\x1f\x8b" + b"\0" * 600, "cannot read .*a.nii.gz"),
        ("a.dcm", b"\0" * 128 + b"DICM" + b"\xff" * 400, "cannot read .*a.dcm"),
        ("a.npy", b"\x93NUMPY" + b"\0" * 400, "cannot read .*a.npy"),
        ("a.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 400, "cannot read .*a.png"),
    ],
)
def test_a_file_that_is_no_slide_is_an_error_that_names_it(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideError, match=said):
        open_slide(tmp_path / name)


def test_folders_and_missing_files_are_named(tmp_path):
    with pytest.raises(SlideError, match="folder"):
        open_slide(tmp_path)
    with pytest.raises(SlideError, match="no such file"):
        open_slide(tmp_path / "gone.svs")


def test_the_content_counts_not_the_suffix(tmp_path):
    pixels = textured(64)
    Image.fromarray(pixels).save(tmp_path / "really.png")
    (tmp_path / "really.png").rename(tmp_path / "named.svs")
    with open_slide(tmp_path / "named.svs") as slide:
        np.testing.assert_array_equal(slide.read((0, 0), 0, (64, 64)), pixels)
        assert slide.name == "named"


def test_a_picture_cut_short_is_an_error_at_the_first_window(tmp_path):
    Image.fromarray(textured(256)).save(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) // 2])
    with open_slide(tmp_path / "a.jpg") as slide:
        with pytest.raises(SlideError, match="damaged or cut short"):
            slide.read((0, 0), 0, (5, 5))
        with pytest.raises(SlideError, match="damaged or cut short"):
            slide.thumbnail(64)


def test_one_strip_too_large_for_memory_says_how_to_store_it(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", textured(128), compression="zlib", rowsperstrip=128, metadata=None)
    monkeypatch.setattr("sansmax.data.slides.tiff_reader._LARGEST_SEGMENT", 1000)
    with pytest.raises(SlideError, match="vips tiffsave"):
        open_slide(tmp_path / "a.tif")


def test_pixels_that_are_no_picture_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((64, 64), np.float32), metadata=None)
    with pytest.raises(SlideError, match=r"float32|32"), open_slide(tmp_path / "a.tif") as slide:
        slide.read((0, 0), 0, (5, 5))
