"""Arrays, `.npy` files and ordinary pictures (PNG, JPEG, ...) as slides of one level."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.images import check_pixels, open_pillow, read_image
from sansmax.data.slides.levels import LevelSlide, physical_mpp, rgb8
from sansmax.data.slides.slide import SlideError
from sansmax.errors import InputError

_EXIF_ORIENTATION = 0x0112


class ArraySlide(LevelSlide):
    """Pixels (H, W) or (H, W, 3), uint8 or uint16, in memory or memory-mapped; only windows are copied."""

    def __init__(
        self,
        pixels: np.ndarray,
        name: str = "array",
        mpp: float | None = None,
        path: Path | None = None,
        kind: str = "array",
    ):
        check_pixels(pixels)
        self._pixels: np.ndarray | None = pixels
        super().__init__(name, path, kind, [(pixels.shape[1], pixels.shape[0])], mpp)

    def window(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB of a window."""
        assert self._pixels is not None
        part = np.asarray(self._pixels[y : y + height, x : x + width])
        return rgb8(part.astype(part.dtype.newbyteorder("="), copy=False))

    def close(self) -> None:
        """Lets go of the pixels; reading afterwards is an error."""
        super().close()
        self._pixels = None


class PictureSlide(LevelSlide):
    """A PNG, JPEG, WebP, ... file. Opening reads its header; the first window decodes the whole picture.

    These formats cannot be read in part: the decoded picture, 3 bytes a pixel, has to fit in memory, or it is a
    `SlideError` that says how to store it in tiles. Thumbnails of JPEG are decoded at a fraction of the size.
    """

    def __init__(self, path: str | Path, name: str, mpp: float | None = None):
        path = Path(path)
        with _header(path) as image:
            turned = int(image.getexif().get(_EXIF_ORIENTATION, 1)) >= 5
            size = image.size[::-1] if turned else image.size
            dpi = image.info.get("dpi")
            kind = str(image.format)
            self._draft = kind == "JPEG" and int(image.getexif().get(_EXIF_ORIENTATION, 1)) == 1
        found = physical_mpp(*(25_400 / float(v) if v else None for v in dpi[:2])) if dpi else None
        self._pixels: np.ndarray | None = None
        super().__init__(name, path, f"{kind} picture", [size], mpp or found)

    def window(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB of a window."""
        if self._pixels is None:
            self._pixels = self._decode()
        return rgb8(self._pixels[y : y + height, x : x + width])

    def thumbnail(self, max_side: int = 1024) -> np.ndarray:
        """The whole picture as (h, w, 3) uint8 RGB, the longer side `max_side` pixels at most."""
        if self._draft and self._pixels is None and not self._closed and max(self.size) >= 2 * max_side > 0:
            return self._drafted(max_side)
        return super().thumbnail(max_side)

    def close(self) -> None:
        """Lets go of the pixels; reading afterwards is an error."""
        super().close()
        self._pixels = None

    def _decode(self) -> np.ndarray:
        needed = 3 * self.size[0] * self.size[1]
        memory = _memory()
        if memory is not None and needed > memory:
            raise SlideError(
                f"cannot read {self.path}: decoded it has {needed / 2**30:.1f} GiB, this machine has "
                f"{memory / 2**30:.1f} GiB; store it in tiles, with libvips: "
                "vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg --bigtiff"
            )
        assert self.path is not None
        try:
            return read_image(self.path)
        except InputError as e:
            raise SlideError(str(e)) from e

    def _drafted(self, max_side: int) -> np.ndarray:
        assert self.path is not None
        with _header(self.path) as image:
            # libjpeg decodes at 1/2, 1/4 or 1/8 of the size, never smaller than asked for
            image.draft("RGB", (max_side, max_side))
            try:
                small = np.asarray(image.convert("RGB"))
            except (OSError, SyntaxError) as e:
                raise SlideError(f"cannot read {self.path}: the file is damaged or cut short ({e})") from e
        return ArraySlide(small).thumbnail(max_side)


def open_npy(path: str | Path, name: str, mpp: float | None = None) -> ArraySlide:
    """The pixels of a `.npy` file as a slide, memory-mapped."""
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        check_pixels(pixels)
    except (OSError, ValueError, EOFError) as e:
        raise SlideError(f"cannot read {path}: {e}") from e
    return ArraySlide(pixels, name, mpp, Path(path), "array in a .npy file")


def _header(path: Path) -> Any:
    """The picture as Pillow opens it, not decoded yet; its limit on the number of pixels is lifted."""
    from PIL import Image

    try:
        return open_pillow(path.read_bytes())
    except InputError as e:
        raise SlideError(f"cannot read {path}: {e}") from e
    except Image.DecompressionBombError as e:
        raise SlideError(f"cannot read {path}: {e}; convert it to tiled TIFF") from e
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError) as e:
        raise SlideError(f"cannot read {path}: the file is damaged or cut short ({e}); replace it") from e


def _memory() -> int | None:
    """Bytes of memory that this machine has; None where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
