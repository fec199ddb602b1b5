"""Keeps decoded pixels in memory that all workers of a loader share: files are decoded once, not every epoch."""

import mmap

import numpy as np

_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16))


class KeptPixels:
    """Room for `n` arrays (h, w) or (h, w, 3) of uint8 or uint16, of at most `slot` bytes each, filled as they come.

    The memory is anonymous and shared: processes that are forked see what any of them has put in. A process that
    gets a pickled copy starts with an empty one of its own. An array that does not fit is not kept.
    """

    def __init__(self, n: int, slot: int):
        self.n, self.slot = n, slot
        self._pixels = np.frombuffer(mmap.mmap(-1, max(1, n * slot)), np.uint8)
        # height, width, channels (0: no such axis), dtype + 1 (0: nothing kept yet, written last)
        self._shapes = np.frombuffer(mmap.mmap(-1, max(1, n * 32)), np.int64).reshape(-1, 4)

    def __reduce__(self):
        return KeptPixels, (self.n, self.slot)

    def get(self, i: int) -> np.ndarray | None:
        """What was put for image i."""
        height, width, channels, kind = self._shapes[i].tolist()
        if kind == 0:
            return None
        dtype = _DTYPES[kind - 1]
        shape = (height, width, channels) if channels else (height, width)
        size = int(np.prod(shape)) * dtype.itemsize
        start = i * self.slot
        return self._pixels[start : start + size].view(dtype).reshape(shape)

    def put(self, i: int, pixels: np.ndarray) -> None:
        """Keeps the pixels of image i where they fit."""
        if pixels.nbytes > self.slot or pixels.dtype not in _DTYPES:
            return
        start = i * self.slot
        self._pixels[start : start + pixels.nbytes] = np.ascontiguousarray(pixels).reshape(-1).view(np.uint8)
        channels = pixels.shape[2] if pixels.ndim == 3 else 0
        self._shapes[i, :3] = (*pixels.shape[:2], channels)
        self._shapes[i, 3] = _DTYPES.index(pixels.dtype) + 1
