"""Every kind of image file comes back with the pixels that went in; every bad file is named with what to do."""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from sansmax.data.images import read_image, to_tensor
from sansmax.errors import InputError

RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (13, 17), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (13, 17), dtype=np.uint16)
RGB8 = RNG.integers(0, 256, (13, 17, 3), dtype=np.uint8)
RGB16 = RNG.integers(0, 65536, (13, 17, 3), dtype=np.uint16)
BITS = GREY8 > 127


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(raw, width, height, depth, colour, interlaced=0):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def adam7(pixels):
    """The seven passes of an interlaced PNG, unfiltered."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    big = pixels.astype(pixels.dtype.newbyteorder(">"))
    rows = (row for y, x, dy, dx in passes for row in big[y::dy, x::dx] if row.size)
    return b"".join(b"\0" + np.ascontiguousarray(row).tobytes() for row in rows)


def with_pillow(pixels, **options):
    def write(path):
        Image.fromarray(pixels).save(path, **options)

    return write


def with_codecs(pixels):
    return lambda path: path.write_bytes(imagecodecs.png_encode(pixels))


def with_tifffile(pixels, **options):
    return lambda path: tifffile.imwrite(path, pixels, **options)


def palette_of(grey):
    image = Image.fromarray(grey)
    image = Image.frombytes("P", image.size, grey.tobytes())
    image.putpalette(np.arange(768, dtype=np.uint16).astype(np.uint8).tobytes())
    return image


PALETTE = np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(256, 3)

LOSSLESS = {
    "grey 8 bit.png": (with_pillow(GREY8), GREY8),
    "grey 16 bit.png": (with_codecs(GREY16), GREY16),
    "rgb 8 bit.png": (with_pillow(RGB8), RGB8),
    "rgb 16 bit.png": (with_codecs(RGB16), RGB16),
    "opaque rgba.png": (with_pillow(np.dstack([RGB8, np.full((13, 17), 255, np.uint8)])), RGB8),
    "opaque rgba 16 bit.png": (with_codecs(np.dstack([RGB16, np.full((13, 17), 65535, np.uint16)])), RGB16),
    "opaque grey alpha.png": (with_pillow(np.dstack([GREY8, np.full((13, 17), 255, np.uint8)])), GREY8),
    "palette.png": (lambda path: palette_of(GREY8).save(path), PALETTE[GREY8]),
    "1 bit.png": (with_pillow(BITS), BITS * np.uint8(255)),
    "interlaced.png": (lambda p: p.write_bytes(png_of(adam7(RGB8), 17, 13, 8, 2, 1)), RGB8),
    "interlaced 16 bit.png": (lambda p: p.write_bytes(png_of(adam7(RGB16), 17, 13, 16, 2, 1)), RGB16),
    "grey.bmp": (with_pillow(GREY8), GREY8),
    "rgb.bmp": (with_pillow(RGB8), RGB8),
    "lossless.webp": (with_pillow(RGB8, lossless=True), RGB8),
    "16 bit.pgm": (lambda p: p.write_bytes(b"P5 17 13 65535\n" + GREY16.astype(">u2").tobytes()), GREY16),
    "grey 8 bit.tif": (with_tifffile(GREY8), GREY8),
    "grey 16 bit.tif": (with_tifffile(GREY16), GREY16),
    "big endian.tif": (with_tifffile(GREY16, byteorder=">"), GREY16),
    "rgb 8 bit.tif": (with_tifffile(RGB8, photometric="rgb"), RGB8),
    "rgb 16 bit.tif": (with_tifffile(RGB16, photometric="rgb"), RGB16),
    "planes apart.tif": (
        with_tifffile(np.moveaxis(RGB8, -1, 0), photometric="rgb", planarconfig="separate"),
        RGB8,
    ),
    "deflate.tif": (with_tifffile(RGB16, photometric="rgb", compression="zlib", predictor=True), RGB16),
    "lzw.tif": (with_tifffile(GREY16, compression="lzw"), GREY16),
    "zstd tiles.tif": (with_tifffile(GREY8, compression="zstd", tile=(16, 16)), GREY8),
    "white is zero.tif": (with_tifffile(GREY8, photometric="miniswhite"), 255 - GREY8),
    "white is zero 16 bit.tif": (with_tifffile(GREY16, photometric="miniswhite"), 65535 - GREY16),
    "white is zero, opaque.tif": (
        with_tifffile(np.dstack([GREY8, GREY8 | 255]), photometric="miniswhite", extrasamples=["unassalpha"]),
        255 - GREY8,
    ),
    "1 bit.tif": (with_pillow(BITS), BITS * np.uint8(255)),
    "palette.tif": (lambda path: palette_of(GREY8).save(path), PALETTE[GREY8]),
    "unmarked extra channel.tif": (
        with_tifffile(np.dstack([RGB8, GREY8]), photometric="rgb", extrasamples=["unspecified"]),
        RGB8,
    ),
    "png in disguise.jpg": (lambda p: p.write_bytes(imagecodecs.png_encode(RGB16)), RGB16),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_file_comes_back_exactly(tmp_path, name):
    write, expected = LOSSLESS[name]
    write(tmp_path / name)
    pixels = read_image(tmp_path / name)
    assert pixels.dtype == expected.dtype
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.flags.c_contiguous


def smooth(*channels):
    y, x = np.mgrid[:64, :48]
    planes = [(c + y * 1.5 + x).clip(0, 255) for c in channels]
    return np.stack(planes, -1).astype(np.uint8)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_comes_back_within_its_losses(tmp_path, mode):
    pixels = smooth(10, 60, 90)
    image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "a.jpg", quality=95)
    expected = np.asarray(image if mode == "L" else image.convert("RGB")).astype(int)
    got = read_image(tmp_path / "a.jpg")
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).mean() < 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_the_noted_orientation_is_applied(tmp_path, orientation, suffix):
    from PIL import ImageOps

    pixels = smooth(5)[..., 0]
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(pixels)
    if suffix == "tif":
        tifffile.imwrite(path, pixels, extratags=[(0x0112, 3, 1, orientation, True)])
    else:
        image.save(path, exif=exif, quality=100)
    tagged = io.BytesIO()
    image.save(tagged, "png", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(tagged)))
    got = read_image(path)
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= (3 if suffix == "jpg" else 0)


@pytest.mark.parametrize("kind", ["png8", "png16", "tif", "premultiplied", "palette"])
def test_transparent_parts_are_laid_over_white(tmp_path, kind):
    colour, alpha = np.array([200, 100, 0]), np.array([255, 128, 0])
    expected = [colour * a / 255 + 255 - a for a in alpha]
    rgba = np.array([[[*colour, a] for a in alpha]], dtype=np.uint8)
    path = tmp_path / ("a.png" if "png" in kind or kind == "palette" else "a.tif")
    if kind == "png8":
        Image.fromarray(rgba).save(path)
    elif kind == "png16":
        path.write_bytes(imagecodecs.png_encode(rgba.astype(np.uint16) * 257))
    elif kind == "tif":
        tifffile.imwrite(path, rgba, photometric="rgb", extrasamples=["unassalpha"])
    elif kind == "premultiplied":
        front = np.rint(rgba[..., :3] * (rgba[..., 3:] / 255)).astype(np.uint8)
        tifffile.imwrite(path, np.dstack([front, rgba[..., 3]]), photometric="rgb", extrasamples=["assocalpha"])
    else:
        image = Image.frombytes("P", (3, 1), bytes([0, 1, 2]))
        image.putpalette(bytes([*colour.tolist()] * 3))
        image.save(path, transparency=bytes(alpha.tolist()))
    pixels = read_image(path)
    if kind == "png16":
        assert pixels.dtype == np.uint16
        pixels = pixels / 257
    np.testing.assert_allclose(pixels[0], expected, atol=1)


def test_a_picture_beyond_the_limit_of_pillow_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    for name in ("a.png", "a.bmp", "a.webp"):
        Image.fromarray(RGB8).save(tmp_path / name, lossless=True)
        np.testing.assert_array_equal(read_image(tmp_path / name), RGB8)
    assert Image.MAX_IMAGE_PIXELS == 50


def truncated(write, keep):
    def damage(path):
        write(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * keep)])

    return damage


BIG = RNG.integers(0, 256, (80, 90, 3), dtype=np.uint8)
BAD = {
    "empty.png": (lambda p: p.write_bytes(b""), "empty.png: the file is empty"),
    "text.jpg": (lambda p: p.write_text("hello, this is no image at all"), "text.jpg: it is no image"),
    "cut.png": (truncated(with_pillow(BIG), 0.5), "cut.png: the file is damaged or cut short"),
    "cut16.png": (truncated(with_codecs(BIG.astype(np.uint16) * 200), 0.5), "cut16.png: the file is damaged"),
    "cut.jpg": (truncated(with_pillow(BIG), 0.5), "cut.jpg: the file is damaged or cut short"),
    "cut.bmp": (truncated(with_pillow(BIG), 0.5), "cut.bmp: the file is damaged or cut short"),
    "cut.webp": (truncated(with_pillow(BIG), 0.5), "cut.webp: "),
    "cut.tif": (truncated(with_tifffile(BIG, photometric="rgb"), 0.5), "cut.tif: the file is damaged"),
    "cut zlib.tif": (
        truncated(with_tifffile(BIG, photometric="rgb", compression="zlib"), 0.5),
        "cut zlib.tif: the file is damaged",
    ),
    "header only.png": (truncated(with_pillow(BIG), 0.002), "header only.png: "),
    "pages.tif": (with_tifffile(np.stack([GREY8] * 3), photometric="minisblack"), "holds 3 pages, one is allowed"),
    "float.tif": (with_tifffile(GREY8.astype(np.float32)), "its values are float32, allowed are 8 and 16 bit"),
    "signed.tif": (with_tifffile(GREY8.astype(np.int16)), "its values are int16"),
    "channels.tif": (
        with_tifffile(RNG.integers(0, 9, (13, 17, 6), np.uint8), photometric="minisblack", planarconfig="contig"),
        r"its shape is \(13, 17, 6\)",
    ),
    "film.gif": (
        lambda p: Image.fromarray(GREY8).save(p, save_all=True, append_images=[Image.fromarray(255 - GREY8)]),
        "holds 2 frames, one is allowed",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_the_reason(tmp_path, name):
    write, message = BAD[name]
    write(tmp_path / name)
    with pytest.raises(InputError, match=message):
        read_image(tmp_path / name)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.png: no such file.*--skip-bad"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="it is a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize(("pixels", "largest"), [(RGB8, 255), (RGB16, 65535)])
def test_colour_becomes_a_tensor(pixels, largest):
    exact = torch.from_numpy(pixels.astype(np.float64) / largest).permute(2, 0, 1)
    torch.testing.assert_close(to_tensor(pixels, 3), exact.float())
    grey = 0.299 * exact[0] + 0.587 * exact[1] + 0.114 * exact[2]
    torch.testing.assert_close(to_tensor(pixels, 1), grey[None].float())


@pytest.mark.parametrize("pixels", [GREY8, GREY16])
def test_grey_is_repeated(pixels):
    one, three = to_tensor(pixels, 1), to_tensor(pixels, 3)
    assert one.shape == (1, 13, 17)
    assert three.shape == (3, 13, 17)
    assert all(torch.equal(plane, one[0]) for plane in three)


def test_white_is_one_and_the_source_is_left_alone():
    white = np.full((2, 3, 3), 255, np.uint8)
    white.setflags(write=False)
    assert to_tensor(white, 3).eq(1).all()
    assert to_tensor(white, 1).max() <= 1
    assert (white == 255).all()


def test_other_channels_and_types_are_refused():
    with pytest.raises(InputError, match="in_chans=4 was given"):
        to_tensor(RGB8, 4)
    with pytest.raises(InputError, match="these are float64"):
        to_tensor(RGB8 / 255, 3)
    with pytest.raises(InputError, match=r"these are \(13, 17, 2\)"):
        to_tensor(RGB8[..., :2], 3)
