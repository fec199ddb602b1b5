"""Every reader gives the pixels of its file, white outside, and says how large they are."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from sansmax.data.images import read_image
from sansmax.data.slides.levels import physical_mpp, rgb8
from sansmax.data.slides.opening import open_slide
from sansmax.data.slides.openslide_reader import OpenSlideSlide
from sansmax.data.slides.picture_reader import ArraySlide, PictureSlide
from sansmax.data.slides.scaled import required_mpp
from sansmax.data.slides.slide import Slide
from sansmax.data.slides.tiff_reader import TiffSlide
from sansmax.data.slides.tiled import TileCache
from sansmax.errors import InputError

DATA = Path(os.environ.get("SANSMAX_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
HEIGHT, WIDTH = 211, 307


def real(name):
    """A file of the real data, or a skipped test with the reason."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there; name the folder of the real data by SANSMAX_TEST_DATA")
    return DATA / name


def picture(height=HEIGHT, width=WIDTH, seed=0):
    """Smooth in colour with sharp edges: JPEG keeps it, a shift by one pixel shows."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(seed)
    waves = [np.sin(x / a + p) + np.cos(y / b + p) for a, b, p in rng.uniform(5, 40, (3, 3))]
    pixels = np.stack([120 + 50 * w for w in waves], -1)
    pixels[40:80, 60:110] = (250, 10, 30)
    return pixels.clip(0, 255).astype(np.uint8)


def padded(pixels, x, y, width, height):
    """A window of an array that goes on in white for ever: the definition."""
    out = np.full((height, width, 3), 255, np.uint8)
    for row in range(max(y, 0), min(y + height, len(pixels))):
        left, right = max(x, 0), min(x + width, pixels.shape[1])
        if left < right:
            out[row - y, left - x : right - x] = pixels[row, left:right]
    return out


def windows(size, count=12, seed=1):
    """Random windows inside, across and outside the edges."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield (*(int(v) for v in rng.integers(-90, np.array(size) + 40)), *(int(v) for v in rng.integers(1, 130, 2)))
    yield 0, 0, *size
    yield -5, -7, size[0] + 11, size[1] + 13
    yield 10**9, 3, 4, 5


def pyramid(path, pixels, counts=3, subifds=False, **options):
    """A tiled pyramid: every level is another picture, so that a mix-up shows."""
    options = {"tile": (64, 64), "photometric": "rgb", "metadata": None, **options}
    levels = [picture(pixels.shape[0] >> k, pixels.shape[1] >> k, seed=k) if k else pixels for k in range(counts)]
    with tifffile.TiffWriter(path) as tiff:
        for k, level in enumerate(levels):
            extra = {"subifds": counts - 1} if subifds and k == 0 else {}
            tiff.write(level, subfiletype=1 if k else 0, **extra, **options)
    return levels


RGB, GREY16 = picture(), (picture()[..., 0].astype(np.uint16) * 257 + 3).clip(0, 65535).astype(np.uint16)
TIFFS = {
    "strips": {"rowsperstrip": 17},
    "packed strips": {"rowsperstrip": 17, "compression": "zlib", "predictor": True},
    "tiles": {"tile": (32, 48)},
    "packed tiles": {"tile": (64, 32), "compression": "lzw"},
    "jpeg tiles": {"tile": (64, 64), "compression": "jpeg"},
    "planes": {"planarconfig": "separate", "rowsperstrip": 20, "compression": "zlib"},
    "planes in tiles": {"planarconfig": "separate", "tile": (64, 64), "compression": "zlib"},
    "big": {"tile": (64, 64), "bigtiff": True, "compression": "zlib"},
    "big-endian": {"tile": (64, 64), "byteorder": ">"},
}


@pytest.mark.parametrize("kind", TIFFS)
@pytest.mark.parametrize("deep", [False, True])
def test_tiff_readers_give_the_decoded_picture(tmp_path, kind, deep):
    options = dict(TIFFS[kind])
    if deep and ("jpeg" in kind or "planes" in kind):
        options = {"tile": (32, 32)}
    pixels = GREY16 if deep else RGB.transpose(2, 0, 1) if "planes" in kind else RGB
    byteorder, bigtiff = options.pop("byteorder", None), options.pop("bigtiff", False)
    with tifffile.TiffWriter(tmp_path / "a.tif", byteorder=byteorder, bigtiff=bigtiff) as tiff:
        tiff.write(pixels, photometric="minisblack" if deep else "rgb", metadata=None, **options)
    whole = rgb8(read_image(tmp_path / "a.tif"))
    if not deep and kind != "jpeg tiles":
        np.testing.assert_array_equal(whole, RGB)
    with TiffSlide(tmp_path / "a.tif", "a") as slide:
        assert slide.size == (WIDTH, HEIGHT)
        for x, y, width, height in windows(slide.size):
            np.testing.assert_array_equal(slide.read((x, y), 0, (width, height)), padded(whole, x, y, width, height))


@pytest.mark.parametrize("photometric", ["miniswhite", "palette"])
def test_tiff_of_other_colours_is_what_read_image_says(tmp_path, photometric):
    grey = RGB[..., 0]
    colours = np.random.default_rng(3).integers(0, 65536, (3, 256)).astype(np.uint16)
    extra = {"colormap": colours} if photometric == "palette" else {}
    tifffile.imwrite(tmp_path / "a.tif", grey, photometric=photometric, rowsperstrip=10, metadata=None, **extra)
    with open_slide(tmp_path / "a.tif") as slide:
        np.testing.assert_array_equal(
            slide.read((30, 20), 0, (90, 80)), rgb8(read_image(tmp_path / "a.tif"))[20:100, 30:120]
        )


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "npy", "array", "turned jpg"])
def test_pictures_and_arrays_are_slides_of_one_level(tmp_path, kind):
    path = tmp_path / f"a.{kind.split()[-1]}"
    if kind == "array":
        path, whole = RGB, RGB
    elif kind == "npy":
        np.save(path, GREY16)
        whole = rgb8(GREY16)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.fromarray(RGB).save(path, **({"exif": exif} if kind == "turned jpg" else {}))
        whole = read_image(path)
    with open_slide(path) as slide:
        assert isinstance(slide, Slide) and len(slide.levels) == 1 and slide.mpp is None
        assert slide.size == whole.shape[1::-1]
        for x, y, width, height in windows(slide.size):
            np.testing.assert_array_equal(slide.read((x, y), 0, (width, height)), padded(whole, x, y, width, height))


@pytest.mark.parametrize("subifds", [False, True])
def test_levels_of_a_pyramid_are_those_of_the_file(tmp_path, subifds):
    levels = pyramid(tmp_path / "a.tif", RGB, subifds=subifds)
    with TiffSlide(tmp_path / "a.tif", "a") as slide:
        assert [level.size for level in slide.levels] == [a.shape[1::-1] for a in levels]
        for k, (size, scale) in enumerate(slide.levels):
            for x, y, width, height in windows(size, 6):
                corner = (round(x * scale), round(y * scale))
                np.testing.assert_array_equal(
                    slide.read(corner, k, (width, height)), padded(levels[k], x, y, width, height)
                )


def test_openslide_gives_the_same_and_is_taken_where_it_knows_the_file(tmp_path):
    levels = pyramid(tmp_path / "a.tif", picture(512, 768), compression="jpeg")
    with open_slide(tmp_path / "a.tif") as slide, TiffSlide(tmp_path / "a.tif", "a") as plain:
        assert isinstance(slide, OpenSlideSlide) and slide.levels == plain.levels
        assert len(slide.levels) == len(levels)
        for k in range(len(levels)):
            for x, y, width, height in windows(slide.levels[k].size, 5):
                corner = (x << k, y << k)
                np.testing.assert_array_equal(
                    slide.read(corner, k, (width, height)), plain.read(corner, k, (width, height))
                )


def test_without_openslide_tiff_is_read_all_the_same(tmp_path, monkeypatch):
    pyramid(tmp_path / "a.tif", picture(512, 768))
    monkeypatch.setitem(sys.modules, "openslide", None)
    with open_slide(tmp_path / "a.tif") as slide:
        assert isinstance(slide, TiffSlide)
    with pytest.raises(InputError, match=r"sansmax\[slides\]"):
        OpenSlideSlide(tmp_path / "a.tif", "a")


@pytest.mark.real_data
def test_both_readers_agree_on_a_whole_section():
    path = real("wsi/cptac_C3L-00601-26_pyramid_derived.tif")
    with open_slide(path) as slide, TiffSlide(path, slide.name) as plain:
        assert isinstance(slide, OpenSlideSlide) and slide.mpp is None and plain.mpp is None
        assert [lv.size for lv in slide.levels] == [lv.size for lv in plain.levels]
        rng = np.random.default_rng(5)
        for k, (size, scale) in enumerate(slide.levels):
            for x, y in rng.integers(-30, np.array(size) - 100, (4, 2)):
                corner = (round(x * scale), round(y * scale))
                one, other = (s.read(corner, k, (200, 170)).astype(int) for s in (slide, plain))
                if k == 0:
                    np.testing.assert_array_equal(one, other)
                # below level 0 OpenSlide interpolates by the fraction of a pixel that whole level-0 pixels leave
                shifted = abs(one[:, 1:] - other[:, :-1]).mean()
                assert abs(one - other).mean() <= 0.35 * shifted + 0.1, (k, x, y)


@pytest.mark.real_data
def test_an_aperio_slide_says_its_resolution_to_both_readers():
    path = real("wsi/CMU-1-Small-Region.svs")
    with open_slide(path) as slide, TiffSlide(path, slide.name) as plain:
        assert slide.size == plain.size == (2220, 2967)
        assert slide.mpp == plain.mpp == 0.499 and "aperio" in slide.kind
        for x, y, width, height in windows(slide.size, 8):
            np.testing.assert_array_equal(
                slide.read((x, y), 0, (width, height)), plain.read((x, y), 0, (width, height))
            )


def test_only_tiles_that_are_touched_are_decoded_and_few_are_kept(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "a.tif", picture(640, 640), tile=(64, 64), compression="zlib", metadata=None)
    decoded = []
    with TiffSlide(tmp_path / "a.tif", "a") as slide:
        slide.cache = TileCache(capacity=3 * 64 * 64 * 3)
        true = TiffSlide.tile
        monkeypatch.setattr(TiffSlide, "tile", lambda self, *at: decoded.append(at) or true(self, *at))
        slide.read((70, 70), 0, (50, 50))
        slide.read((66, 66), 0, (10, 10))
        assert decoded == [(0, 1, 1)]
        slide.read((0, 0), 0, (640, 640))
        # the one from before was let go of when its turn came
        assert len(decoded) == 101
        assert slide.cache.held == 3 * 64 * 64 * 3


def test_pixels_without_compression_stay_in_the_file(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RGB, photometric="rgb", metadata=None)
    with TiffSlide(tmp_path / "a.tif", "a") as slide:
        assert isinstance(slide._mapped[0], np.memmap)
    np.save(tmp_path / "a.npy", RGB)
    with open_slide(tmp_path / "a.npy") as slide:
        assert isinstance(slide._pixels, np.memmap)


def test_a_tile_that_the_file_leaves_out_is_white(tmp_path):
    tiles = iter([b"", *[picture(64, 64, k).tobytes() for k in range(1, 4)]])
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        tiff.write(tiles, shape=(128, 128, 3), dtype=np.uint8, tile=(64, 64), photometric="rgb", metadata=None)
    with TiffSlide(tmp_path / "a.tif", "a") as slide:
        assert (slide.read((0, 0), 0, (64, 64)) == 255).all()
        np.testing.assert_array_equal(slide.read((64, 64), 0, (64, 64)), picture(64, 64, 3))


def ome(size):
    return {
        "axes": "YXS",
        "PhysicalSizeX": size,
        "PhysicalSizeXUnit": "nm",
        "PhysicalSizeY": size,
        "PhysicalSizeYUnit": "nm",
    }


@pytest.mark.parametrize(
    ("options", "mpp"),
    [
        ({"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}, 0.5),
        ({"resolution": (101_600, 101_600), "resolutionunit": "INCH"}, 0.25),
        ({"resolution": (20_000, 20_000), "resolutionunit": "NONE"}, None),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),
        ({"resolution": (20_000, 10_000), "resolutionunit": "CENTIMETER"}, None),
        ({"description": "Aperio |AppMag = 20|MPP = 0.4990"}, 0.499),
        ({"ome": True, "metadata": ome(252.0)}, 0.252),
    ],
)
def test_resolution_is_read_where_it_is_physical(tmp_path, options, mpp):
    with tifffile.TiffWriter(tmp_path / "a.tif", ome=options.pop("ome", False)) as tiff:
        tiff.write(RGB, photometric="rgb", **{"metadata": None, **options})
    with TiffSlide(tmp_path / "a.tif", "a") as slide:
        assert slide.mpp == (None if mpp is None else pytest.approx(mpp))


def test_missing_resolution_is_an_error_that_names_the_flag(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png", dpi=(96, 96))
    with open_slide(tmp_path / "a.png") as slide:
        assert slide.mpp is None
        with pytest.raises(InputError, match=r"a\.png does not say .* pass --mpp"):
            required_mpp(slide)
        with pytest.raises(InputError, match="pass --slide-mpp"):
            required_mpp(slide, "--slide-mpp")
    with open_slide(tmp_path / "a.png", mpp=0.25) as slide:
        assert required_mpp(slide) == 0.25
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="positive number"):
            open_slide(tmp_path / "a.png", mpp=wrong)


def test_a_resolution_that_is_given_goes_before_with_a_warning(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", RGB, resolution=(20_000, 20_000), resolutionunit="CENTIMETER", metadata=None)
    with pytest.warns(UserWarning, match=r"a\.tif says 0\.5 .* the 0\.25 that was given"):
        slide = open_slide(tmp_path / "a.tif", mpp=0.25)
    with slide:
        assert slide.mpp == 0.25
    # near enough to be the same
    with open_slide(tmp_path / "a.tif", mpp=0.502) as slide:
        assert slide.mpp == 0.502


def test_one_number_for_the_resolution_or_none():
    assert physical_mpp(0.25, 0.252) == pytest.approx(0.251)
    assert [physical_mpp(*v) for v in ((None, 1.0), (0.0, 0.0), (0.25, 0.5), (84.7, 84.7), (float("nan"), 1.0))] == [
        None
    ] * 5


def test_pages_of_one_size_are_frames(tmp_path):
    stack = np.stack([picture(seed=k)[..., 0] for k in range(3)])
    tifffile.imwrite(tmp_path / "a.tif", stack, photometric="minisblack", metadata=None)
    with pytest.raises(InputError, match=r"3 pages .* frame 0 to 2"):
        open_slide(tmp_path / "a.tif")
    with pytest.raises(InputError, match="frame 3 of"):
        open_slide(tmp_path / "a.tif", frame=3)
    for k in range(3):
        with open_slide(tmp_path / "a.tif", frame=k) as slide:
            np.testing.assert_array_equal(slide.read((0, 0), 0, slide.size)[..., 1], stack[k])


def test_thumbnails_are_area_means_within_the_side(tmp_path):
    pixels = picture(600, 800)
    thumb = ArraySlide(pixels).thumbnail(200)
    np.testing.assert_allclose(thumb, pixels.reshape(150, 4, 200, 4, 3).mean((1, 3)), atol=0.5 + 1e-3)
    assert ArraySlide(pixels[:, :31]).thumbnail(200).shape == (200, 10, 3)
    assert ArraySlide(pixels[:9, :7]).thumbnail(200).shape == (9, 7, 3)


def test_a_thumbnail_of_jpeg_is_drafted_not_decoded(tmp_path, monkeypatch):
    Image.fromarray(picture(1200, 1600)).save(tmp_path / "a.jpg", quality=95)
    with open_slide(tmp_path / "a.jpg") as slide:
        monkeypatch.setattr(PictureSlide, "_decode", lambda self: pytest.fail("decoded whole"))
        thumb = slide.thumbnail(200).astype(float)
    whole = ArraySlide(read_image(tmp_path / "a.jpg")).thumbnail(200)
    assert thumb.shape == (150, 200, 3)
    assert abs(thumb - whole).mean() < 2


def test_a_picture_beyond_memory_says_how_to_store_it(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr("sansmax.data.slides.picture_reader._memory", lambda: 1000)
    with open_slide(tmp_path / "a.png") as slide, pytest.raises(InputError, match="vips tiffsave"):
        slide.read((0, 0), 0, (5, 5))


def test_pictures_past_the_limit_of_pillow_are_read(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with open_slide(tmp_path / "a.png") as slide:
        np.testing.assert_array_equal(slide.read((0, 0), 0, slide.size), RGB)


def test_an_open_slide_survives_what_is_asked_wrongly():
    slide = ArraySlide(RGB)
    for level in (-1, 1):
        with pytest.raises(InputError, match="levels 0 to 0"):
            slide.read((0, 0), level, (3, 3))
    with pytest.raises(InputError, match="1 x 1"):
        slide.read((0, 0), 0, (0, 3))
    with pytest.raises(InputError, match="uint8 or uint16"):
        open_slide(RGB.astype(np.float32))
    assert "307 x 211" in repr(slide)
    np.testing.assert_array_equal(slide.read((0, 0), 0, (2, 2)), RGB[:2, :2])
