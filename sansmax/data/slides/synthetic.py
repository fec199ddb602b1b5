"""Synthetic slides of any size: stained tissue with planted regions, as pyramidal tiled BigTIFF.

Tiles are drawn from a small pool and put together at every level by area means, so the picture is never in memory and
levels agree with each other. What was planted is known to the pixel.
"""

import itertools
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.slides.stains import tile_pool
from sansmax.errors import InputError
from sansmax.files import replacing, write_text

# Tissue tiles and planted tiles of the pool; the first one of all is glass
_PLAIN, _PLANTED = 48, 16
_ENCODED = 4096


@dataclass(frozen=True)
class Planted:
    """What a synthetic slide holds: boxes (x, y, width, height) in level-0 pixels, and how it was made."""

    boxes: tuple[tuple[int, int, int, int], ...]
    size: tuple[int, int]
    mpp: float
    tile: int
    tissue_share: float
    planted_share: float
    seed: int

    def inside(self, xy: np.ndarray, side: float) -> np.ndarray:
        """The share of squares (corners (n, 2), side in level-0 pixels) that lies in planted boxes; (n,) float64."""
        x, y = np.asarray(xy, dtype=np.float64).reshape(-1, 2).T
        share = np.zeros(len(x))
        for left, top, width, height in self.boxes:
            wide = np.minimum(x + side, left + width) - np.maximum(x, left)
            high = np.minimum(y + side, top + height) - np.maximum(y, top)
            share += wide.clip(0) * high.clip(0) / side**2
        return share


def write_synthetic_slide(
    path: str | Path,
    size: tuple[int, int],
    *,
    mpp: float | None = 0.5,
    seed: int = 0,
    tissue_share: float = 0.6,
    planted: int = 6,
    planted_share: float = 0.02,
    tile: int = 256,
    levels: int | None = None,
    quality: int = 75,
    progress: Callable[[int, int], None] | None = None,
) -> Planted:
    """Writes a slide of `size` (width, height) and, beside it as JSON, what was planted; gives the latter.

    `tissue_share` of its tiles are tissue; `planted` boxes of whole tiles hold tissue of another kind (large, dark,
    crowded nuclei), `planted_share` of the tissue together. `mpp` goes into the resolution tags; None leaves them out.
    Each level halves the one before, down to a side of at most 1,024 pixels unless `levels` says how many. `progress`
    is called with tiles written and tiles in all. The file appears whole or not at all.
    """
    _check(size, tile, tissue_share, planted, planted_share)
    path = Path(path)
    kinds, boxes = _layout(size, tile, seed, tissue_share, planted, planted_share)
    rng = np.random.default_rng([seed, 1])
    ids = np.where(kinds == 1, rng.integers(1, 1 + _PLAIN, kinds.shape), 0)
    ids = np.where(kinds == 2, rng.integers(1 + _PLAIN, 1 + _PLAIN + _PLANTED, kinds.shape), ids).astype(np.uint8)
    count = levels or _level_count(size, tile)
    truth = Planted(
        tuple(tuple(int(v) for v in box) for box in boxes),  # type: ignore[misc]
        (int(size[0]), int(size[1])),
        mpp or 0.0,
        tile,
        float((kinds > 0).mean()),
        float((kinds == 2).sum() / max(1, (kinds > 0).sum())),
        seed,
    )
    with replacing(path) as temporary:
        _write(temporary, _Mosaic(ids, tile_pool(tile, seed, _PLAIN, _PLANTED), quality), size, mpp, count, progress)
        write_text(truth_path(path), json.dumps(asdict(truth), indent=1) + "\n")
    return truth


def read_planted(path: str | Path) -> Planted:
    """What was planted in a synthetic slide, from the JSON file beside it."""
    place = truth_path(path)
    try:
        said = json.loads(place.read_text(encoding="utf-8"))
        said["boxes"], said["size"] = tuple(tuple(box) for box in said["boxes"]), tuple(said["size"])
        return Planted(**said)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"cannot read {place}, which says what was planted ({e}); write the slide again") from None


def truth_path(path: str | Path) -> Path:
    """The JSON file beside a synthetic slide."""
    return Path(path).with_suffix(".planted.json")


class _Mosaic:
    """Tiles of every level from the pool, as JPEG; those encoded last are kept."""

    def __init__(self, ids: np.ndarray, pool: np.ndarray, quality: int):
        self.ids, self.quality, self.tile = ids, quality, pool.shape[1]
        self._pools = {0: pool}
        self._encoded: OrderedDict[bytes, bytes] = OrderedDict()

    def tiles(self, level: int, across: int, down: int) -> Iterator[bytes]:
        """The encoded tiles of a level, in reading order."""
        block = 2**level
        for row, column in itertools.product(range(down), range(across)):
            ids = self.ids[row * block : (row + 1) * block, column * block : (column + 1) * block]
            if ids.shape != (block, block):
                ids = np.pad(ids, ((0, block - ids.shape[0]), (0, block - ids.shape[1])))
            yield self._jpeg(level, ids)

    def _jpeg(self, level: int, ids: np.ndarray) -> bytes:
        import imagecodecs

        key = bytes([level]) + ids.tobytes()
        data = self._encoded.pop(key, None)
        if data is None:
            parts = self._pool(level)[ids]
            picture = parts.transpose(0, 2, 1, 3, 4).reshape(self.tile, self.tile, 3)
            data = bytes(
                imagecodecs.jpeg8_encode(
                    picture, self.quality, colorspace="rgb", outcolorspace="ycbcr", subsampling="420"
                )
            )
        self._encoded[key] = data
        if len(self._encoded) > _ENCODED:
            self._encoded.popitem(last=False)
        return data

    def _pool(self, level: int) -> np.ndarray:
        """The pool at a level: area means of its tiles, rounded once."""
        if level not in self._pools:
            side, block = self.tile >> level, 2**level
            parts = self._pools[0].reshape(-1, side, block, side, block, 3)
            self._pools[level] = np.rint(parts.mean((2, 4), dtype=np.float32)).astype(np.uint8)
        return self._pools[level]


def _write(
    path: Path, mosaic: _Mosaic, size: tuple[int, int], mpp: float | None, levels: int, progress: Callable | None
) -> None:
    import tifffile

    tile = mosaic.tile
    sizes = [(max(1, size[0] >> k), max(1, size[1] >> k)) for k in range(levels)]
    total = sum(-(-w // tile) * -(-h // tile) for w, h in sizes)
    done = itertools.count(1)

    def counted(tiles: Iterator[bytes]) -> Iterator[bytes]:
        for data in tiles:
            number = next(done)
            if progress is not None and (number % 256 == 0 or number == total):
                progress(number, total)
            yield data

    options: dict[str, Any] = {"photometric": "ycbcr", "compression": "jpeg", "subsampling": (2, 2), "dtype": np.uint8}
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level, (width, height) in enumerate(sizes):
            scale = {} if mpp is None else {"resolution": (1e4 / (mpp * 2**level),) * 2, "resolutionunit": "CENTIMETER"}
            tiff.write(
                counted(mosaic.tiles(level, -(-width // tile), -(-height // tile))),
                shape=(height, width, 3),
                tile=(tile, tile),
                subfiletype=1 if level else 0,
                software="sansmax",
                metadata=None,
                **scale,
                **options,
            )


def _check(size: tuple[int, int], tile: int, tissue: float, planted: int, share: float) -> None:
    if min(size) < tile or tile < 64 or tile & (tile - 1):
        raise InputError(
            f"a synthetic slide of {size[0]} x {size[1]} px with tiles of {tile} px was asked for; tiles are a power "
            "of two from 64 on, and the slide has at least one"
        )
    if not 0 <= tissue <= 1 or not 0 <= share < 1 or planted < 0:
        raise InputError(
            f"shares are from 0 to 1 and counts at least 0; tissue_share={tissue}, planted_share={share} and "
            f"planted={planted} were given"
        )


def _level_count(size: tuple[int, int], tile: int) -> int:
    count = 1
    while max(size) >> (count - 1) > 1024 and tile >> count >= 1:
        count += 1
    return count


def _layout(
    size: tuple[int, int], tile: int, seed: int, tissue: float, planted: int, share: float
) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
    """What every tile is (0 glass, 1 tissue, 2 planted), and the planted boxes."""
    across, down = -(-size[0] // tile), -(-size[1] // tile)
    rng = np.random.default_rng([seed, 0])
    kinds = _tissue(rng, down, across, tissue).astype(np.uint8)
    wanted = share * kinds.sum()
    side = max(1, round((wanted / max(1, planted)) ** 0.5))
    boxes: list[tuple[int, int, int, int]] = []
    for _ in range(planted if wanted >= 1 else 0):
        place = _free_square(rng, kinds, side)
        if place is None:
            break
        row, column = place
        kinds[row : row + side, column : column + side] = 2
        wide, high = (
            min((start + side) * tile, end) - start * tile for start, end in ((column, size[0]), (row, size[1]))
        )
        boxes.append((column * tile, row * tile, wide, high))
    return kinds, boxes


def _tissue(rng: np.random.Generator, down: int, across: int, share: float) -> np.ndarray:
    """The highest `share` of a smooth random landscape that falls off towards the border."""
    y, x = np.linspace(-1, 1, down)[:, None], np.linspace(-1, 1, across)[None]
    height = -1.5 * np.maximum(np.abs(y), np.abs(x)) ** 4 * np.ones((down, across))
    for octave in range(1, 5):
        for _ in range(4):
            fy, fx = rng.normal(0, 1.2 * octave, 2)
            height += np.cos(np.pi * (fy * y + fx * x) + rng.uniform(0, 2 * np.pi)) * rng.normal() / octave**1.2 / 2
    count = round(share * height.size)
    mask = np.zeros(height.size, bool)
    mask[np.argsort(height, axis=None)[height.size - count :]] = True
    return mask.reshape(down, across)


def _free_square(rng: np.random.Generator, kinds: np.ndarray, side: int) -> tuple[int, int] | None:
    """A square of plain tissue, with plain tissue or glass around it, so that boxes stay apart."""
    if side > min(kinds.shape):
        return None
    sums = np.pad(np.cumsum(np.cumsum(kinds == 1, 0), 1), ((1, 0), (1, 0)))
    full = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side] == side**2
    near = np.pad(kinds == 2, 1)
    taken = np.pad(np.cumsum(np.cumsum(near, 0), 1), ((1, 0), (1, 0)))
    wide = side + 2
    apart = taken[wide:, wide:] - taken[:-wide, wide:] - taken[wide:, :-wide] + taken[:-wide, :-wide] == 0
    places = np.argwhere(full & apart)
    return None if len(places) == 0 else tuple(int(v) for v in places[rng.integers(len(places))])  # type: ignore[return-value]
