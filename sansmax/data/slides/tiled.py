"""A slide stored in tiles: only those that a window touches are decoded, and the last ones are kept."""

import threading
from collections import OrderedDict

import numpy as np

from sansmax.data.slides.levels import LevelSlide

_CACHE_BYTES = 64 * 2**20


class TileCache:
    """The decoded tiles that were used last, up to a number of bytes; one tile is kept whatever its size."""

    def __init__(self, capacity: int = _CACHE_BYTES):
        self.capacity, self.held = capacity, 0
        self._tiles: OrderedDict[tuple, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple) -> np.ndarray | None:
        """The tile, or None where it is not held."""
        with self._lock:
            tile = self._tiles.get(key)
            if tile is not None:
                self._tiles.move_to_end(key)
            return tile

    def put(self, key: tuple, tile: np.ndarray) -> None:
        """Keeps a tile and lets go of the oldest ones."""
        with self._lock:
            if key not in self._tiles:
                self.held += tile.nbytes
            self._tiles[key] = tile
            while self.held > self.capacity and len(self._tiles) > 1:
                self.held -= self._tiles.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Lets go of all."""
        with self._lock:
            self._tiles.clear()
            self.held = 0


class TiledSlide(LevelSlide):
    """A `LevelSlide` whose subclasses decode tiles: `tile_size` and `tile`."""

    cache: TileCache

    def tile_size(self, level: int) -> tuple[int, int]:
        """Width and height of the tiles of a level."""
        raise NotImplementedError

    def tile(self, level: int, row: int, column: int) -> np.ndarray:
        """One tile as (h, w, 3) uint8 RGB; tiles at the lower and right edge may be smaller."""
        raise NotImplementedError

    def window(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB of a window inside the level."""
        wide, high = self.tile_size(level)
        out = np.full((height, width, 3), 255, np.uint8)
        for row in range(y // high, (y + height - 1) // high + 1):
            for column in range(x // wide, (x + width - 1) // wide + 1):
                tile = self._kept(level, row, column)
                left, top = column * wide, row * high
                x0, y0 = max(x, left), max(y, top)
                x1, y1 = min(x + width, left + tile.shape[1]), min(y + height, top + tile.shape[0])
                if x0 < x1 and y0 < y1:
                    out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[y0 - top : y1 - top, x0 - left : x1 - left]
        return out

    def _kept(self, level: int, row: int, column: int) -> np.ndarray:
        key = (level, row, column)
        tile = self.cache.get(key)
        if tile is None:
            tile = self.tile(level, row, column)
            self.cache.put(key, tile)
        return tile
