"""TIFF of any size by tifffile: tiles and strips decoded on demand, pixels without compression left in the file."""

import re
import threading
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.images import tiff_colours
from sansmax.data.slides.levels import physical_mpp, rgb8
from sansmax.data.slides.slide import SlideError
from sansmax.data.slides.tiled import TileCache, TiledSlide
from sansmax.errors import InputError

# What tifffile and the decoders raise on damaged bytes
_DAMAGE = (OSError, ValueError, RuntimeError, IndexError, KeyError, TypeError, AttributeError, ZeroDivisionError)
# A strip or tile larger than this cannot be decoded in bounded memory
_LARGEST_SEGMENT = 2 * 2**30
_UNIT_MICROMETRES = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6}


class TiffSlide(TiledSlide):
    """A TIFF file, pyramidal or not; `frame` chooses one of several pages of the same size.

    Tiles and strips are decoded when a window touches them; at most 64 MiB of them are kept. Raises `SlideError` for
    files that are damaged, cut short, or hold pixels that are no picture.
    """

    def __init__(self, path: str | Path, name: str, mpp: float | None = None, frame: int | None = None):
        import tifffile

        path = Path(path)
        self._lock, self.cache = threading.Lock(), TileCache()
        try:
            self._tiff = tifffile.TiffFile(path)
        except (tifffile.TiffFileError, *_DAMAGE) as e:
            raise SlideError(f"cannot open {path}: it is damaged or cut short ({e}); copy or export it again") from e
        try:
            self._pages = _pyramid(self._tiff, path, frame)
            check_whole(self._pages[0], path)
            self._mapped = [_mapped(page, path) for page in self._pages]
            found = mpp or tiff_mpp(self._tiff, self._pages[0])
        except BaseException:
            self._tiff.close()
            raise
        stored = "tiled" if self._pages[0].is_tiled else "in strips"
        sizes = [(page.imagewidth, page.imagelength) for page in self._pages]
        super().__init__(name, path, f"TIFF, {stored} (tifffile)", sizes, found)

    def tile_size(self, level: int) -> tuple[int, int]:
        """Width and height of the tiles, or strips, of a level."""
        page = self._pages[level]
        if page.is_tiled:
            return page.tilewidth, page.tilelength
        return page.imagewidth, max(1, min(page.rowsperstrip, page.imagelength))

    def tile(self, level: int, row: int, column: int) -> np.ndarray:
        """One tile or strip as (h, w, 3) uint8 RGB."""
        page, (wide, high) = self._pages[level], self.tile_size(level)
        across, down = -(-page.imagewidth // wide), -(-page.imagelength // high)
        index = row * across + column
        planes = page.samplesperpixel if page.planarconfig == 2 else 1
        parts = [self._segment(level, plane * across * down + index) for plane in range(planes)]
        if any(part is None for part in parts):
            # a tile of no bytes is how sparse files leave out the background
            return np.full((high, wide, 3), 255, np.uint8)
        pixels = np.concatenate([part for part in parts if part is not None], -1)
        return self._colours(page, pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

    def window(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB of a window inside the level."""
        mapped = self._mapped[level]
        if mapped is None:
            return super().window(level, x, y, width, height)
        return self._colours(self._pages[level], np.asarray(mapped[y : y + height, x : x + width]))

    def close(self) -> None:
        """Closes the file; reading afterwards is an error."""
        super().close()
        self._mapped = [None] * len(self._mapped)
        self.cache.clear()
        self._tiff.close()

    def _colours(self, page: Any, pixels: np.ndarray) -> np.ndarray:
        try:
            return rgb8(tiff_colours(page, pixels))
        except InputError as e:
            raise SlideError(f"cannot read {self.path}: {e}") from e

    def _segment(self, level: int, index: int) -> np.ndarray | None:
        """(h, w, samples) of one tile or strip as decoded; None where it has no bytes."""
        page = self._pages[level]
        try:
            offset, count = page.dataoffsets[index], page.databytecounts[index]
            if count == 0:
                return None
            with self._lock:
                self._tiff.filehandle.seek(offset)
                data = self._tiff.filehandle.read(count)
            if len(data) != count:
                raise ValueError(f"{count} bytes are noted, {len(data)} are there")
            segment = page.decode(data, index, jpegtables=page.jpegtables)[0]
            if segment is None:
                raise ValueError("it decodes to nothing")
            return segment[0]
        except _DAMAGE as e:
            raise SlideError(
                f"cannot read level {level} of {self.path}: tile {index} does not decode ({e}); replace the file"
            ) from e


def check_whole(page: Any, path: Path) -> None:
    """Refuses a page whose pixels lie beyond the end of the file: it was cut short."""
    ends = [o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True) if n]
    size = path.stat().st_size
    if ends and max(ends) > size:
        missing = sum(end > size for end in ends)
        raise SlideError(
            f"cannot read {path}: it is cut short, {missing:,} of {len(ends):,} tiles of level 0 lie beyond its end; "
            "copy or download it again"
        )


def tiff_mpp(tiff: Any, page: Any) -> float | None:
    """Micrometres per pixel from OME metadata, an Aperio description or the resolution tags; None without."""
    ome = _ome_mpp(tiff.ome_metadata) if tiff.is_ome else None
    if ome is not None:
        return ome
    described = re.search(r"\bMPP\s*=\s*([\d.]+)", str(page.description or ""))
    if described:
        return physical_mpp(float(described[1]), float(described[1]))
    unit = {2: 25_400.0, 3: 10_000.0}.get(int(page.tags.valueof("ResolutionUnit", 1)))
    per_unit = [page.tags.valueof(name) for name in ("XResolution", "YResolution")]
    if unit is None or not all(isinstance(v, tuple) and v[0] > 0 and v[1] > 0 for v in per_unit):
        return None
    x, y = (unit * v[1] / v[0] for v in per_unit)
    return physical_mpp(x, y)


def _ome_mpp(text: str | None) -> float | None:
    try:
        root = ElementTree.fromstring(text or "")
    except ElementTree.ParseError:
        return None
    pixels = next((e for e in root.iter() if e.tag.endswith("}Pixels") or e.tag == "Pixels"), None)
    if pixels is None:
        return None
    sides = []
    for axis in "XY":
        value, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
        sides.append(float(value) * _UNIT_MICROMETRES[unit] if value and unit in _UNIT_MICROMETRES else None)
    return physical_mpp(sides[0], sides[1])


def _pyramid(tiff: Any, path: Path, frame: int | None) -> list[Any]:
    """The pages of one picture, the finest first."""
    try:
        levels = list(tiff.series[0].levels)
        pages = [p for p in levels[0].pages if p is not None]
    except _DAMAGE as e:
        raise SlideError(f"cannot open {path}: its directory is damaged ({e}); copy or export it again") from e
    if len(pages) > 1 and frame is None:
        raise SlideError(
            f"{path} holds {len(pages)} pages of the same size, one is a slide; choose frame 0 to {len(pages) - 1}"
        )
    if frame is not None and not 0 <= frame < len(pages):
        raise SlideError(f"frame {frame} of {path} was asked for, it has frames 0 to {len(pages) - 1}")
    chosen = [level.pages[frame or 0].aspage() for level in levels]
    if len(levels) == 1 and len(pages) == 1:
        chosen += _smaller(tiff, chosen[0])
    for page in chosen:
        _check_page(page, path)
    return chosen


def _smaller(tiff: Any, full: Any) -> list[Any]:
    """Tiled pages of the same proportions that are not marked as levels, the larger first."""
    found = [s.pages[0].aspage() for s in tiff.series[1:] if len(s.pages) == 1 and s.pages[0] is not None]
    proportion = full.imagewidth / full.imagelength
    found = [p for p in found if full.is_tiled and p.is_tiled and p.imagewidth < full.imagewidth]
    found = [p for p in found if abs(p.imagewidth / p.imagelength / proportion - 1) < 0.02]
    return sorted(found, key=lambda p: -p.imagewidth)


def _check_page(page: Any, path: Path) -> None:
    readable = page.dtype is not None and page.dtype.kind in "ub" and page.dtype.itemsize <= 2
    if page.imagedepth != 1 or page.samplesperpixel > 4 or not readable:
        raise SlideError(
            f"cannot read {path}: its pixels are {page.shape} of {page.dtype}, allowed are grey and colour, "
            "8 or 16 bit; export one plane"
        )
    if int(page.tags.valueof("Orientation", 1)) != 1:
        raise SlideError(f"cannot read {path}: it is stored turned or mirrored; export it upright")
    segment = int(np.prod(page.chunks)) * page.bitspersample // 8
    if segment > _LARGEST_SEGMENT and not page.is_memmappable:
        raise SlideError(
            f"cannot read {path}: it is stored in one piece of {segment / 2**30:.1f} GiB, which has to be decoded "
            "whole; store it in tiles, with libvips: vips tiffsave IN OUT.tif --tile --pyramid --compression jpeg"
        )


def _mapped(page: Any, path: Path) -> np.ndarray | None:
    """The samples where they lie in the file; None where they have to be decoded."""
    plain = page.is_memmappable and len(page.shape) in (2, 3) and page.planarconfig != 2
    if not plain or page.dataoffsets[0] + page.nbytes > path.stat().st_size:
        return None
    dtype = page.dtype.newbyteorder(page.parent.byteorder)
    return np.memmap(path, dtype, "r", page.dataoffsets[0], page.shape)
