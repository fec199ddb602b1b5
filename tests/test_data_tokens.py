"""Token sources: bands put together are the whole, from arrays, maps and files alike."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from sansmax.data.images import to_tensor
from sansmax.data.tokens import PixelSource, TokenSource, open_pixels
from sansmax.errors import InputError

RNG = np.random.default_rng(4)
RGB = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (37, 53), dtype=np.uint16)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


@pytest.mark.parametrize("rows", [1, 2, 3, 100])
@pytest.mark.parametrize("patch", [8, (5, 7), (37, 53)])
@pytest.mark.parametrize("pixels", [RGB, GREY16], ids=["colour", "grey"])
def test_bands_put_together_are_the_whole(pixels, patch, rows):
    source = PixelSource(pixels, patch, mean=MEAN, std=STD)
    ph, pw = source.patch
    whole = source.read(0, source.grid[0])
    assert whole.shape == (1, 3, source.grid[0] * ph, source.grid[1] * pw)
    bands = list(source.bands(rows))
    assert all(band.shape[2] <= rows * ph for band in bands)
    assert torch.equal(torch.cat(bands, 2), whole)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    assert torch.equal(whole[0, :, :37, :53], (to_tensor(pixels, 3) - mean) / std)


def test_the_edge_is_repeated_to_whole_patches():
    source = PixelSource(RGB, 8, mean=(0.0,), std=(1.0,))
    assert source.grid == (5, 7)
    whole = source.read(0, 5)[0]
    assert torch.equal(whole[:, 37:], whole[:, 36:37].expand(-1, 3, -1))
    assert torch.equal(whole[:, :, 53:], whole[:, :, 52:53].expand(-1, -1, 3))
    assert torch.equal(whole[:, 39, 55], whole[:, 36, 52])


def test_one_channel_is_luminance():
    out = PixelSource(RGB, 8, in_chans=1, mean=(0.0,), std=(1.0,)).read(1, 2)
    torch.testing.assert_close(out[0, :, :, :53], to_tensor(RGB, 1)[:, 8:16])


def test_a_source_keeps_to_the_protocol_and_to_its_pixels():
    frozen = RGB.copy()
    frozen.setflags(write=False)
    source = PixelSource(frozen, 8)
    assert isinstance(source, TokenSource)
    source.read(0, 2)
    np.testing.assert_array_equal(frozen, RGB)
    turned = np.ascontiguousarray(RGB[::-1, ::-1])[::-1, ::-1]
    assert torch.equal(PixelSource(turned, 8).read(0, 5), source.read(0, 5))


def test_mistakes():
    for pixels in (RGB[..., :2], RGB / 255, RGB[None], RGB[:0]):
        with pytest.raises(InputError, match=r"allowed are \(H, W\) and \(H, W, 3\) of uint8 or uint16"):
            PixelSource(pixels, 8)
    with pytest.raises(InputError, match="patches must be at least 1 px"):
        PixelSource(RGB, 0)
    with pytest.raises(InputError, match="mean has 2 values for 3 channels"):
        PixelSource(RGB, 8, mean=(0.5, 0.5))
    for rows in ((0, 6), (2, 2), (-1, 2)):
        with pytest.raises(InputError, match="the picture has 5"):
            PixelSource(RGB, 8).read(*rows)
    with pytest.raises(InputError, match="at least 1 row"):
        list(PixelSource(RGB, 8).bands(0))


@pytest.mark.parametrize(
    ("name", "write", "mapped"),
    [
        ("a.npy", np.save, True),
        ("a.tif", tifffile.imwrite, True),
        ("big endian.tif", lambda p, x: tifffile.imwrite(p, x, byteorder=">"), True),
        ("packed.tif", lambda p, x: tifffile.imwrite(p, x, compression="zlib"), False),
        ("tiles.tif", lambda p, x: tifffile.imwrite(p, x, tile=(16, 16)), False),
        ("turned.tif", lambda p, x: tifffile.imwrite(p, x[::-1], extratags=[(0x0112, 3, 1, 4, True)]), False),
    ],
)
@pytest.mark.parametrize("pixels", [RGB, GREY16], ids=["colour", "grey"])
def test_files_open_as_their_pixels(tmp_path, name, write, mapped, pixels):
    write(tmp_path / name, pixels)
    opened = open_pixels(tmp_path / name)
    np.testing.assert_array_equal(opened, pixels)
    assert isinstance(opened, np.memmap) == mapped
    assert torch.equal(PixelSource(opened, 8).read(0, 5), PixelSource(pixels, 8).read(0, 5))


def test_other_pictures_are_decoded(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    np.testing.assert_array_equal(open_pixels(tmp_path / "a.png"), RGB)
    tifffile.imwrite(tmp_path / "white.tif", GREY16, photometric="miniswhite")
    np.testing.assert_array_equal(open_pixels(tmp_path / "white.tif"), 65535 - GREY16)


def test_files_that_are_no_picture_are_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 4)))
    with pytest.raises(InputError, match=r"a\.npy: float64 \(4, 4\); allowed are"):
        open_pixels(tmp_path / "a.npy")
    (tmp_path / "b.npy").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"cannot read .*b\.npy"):
        open_pixels(tmp_path / "b.npy")
    tifffile.imwrite(tmp_path / "c.tif", RGB)
    whole = (tmp_path / "c.tif").read_bytes()
    (tmp_path / "c.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"c\.tif"):
        open_pixels(tmp_path / "c.tif")
    with pytest.raises(InputError, match="no such file"):
        open_pixels(tmp_path / "d.tif")
