"""The tiles of a slide in batches, read ahead by processes of their own.

Every process opens the slide for itself and reads its batches in the order of the file. What it cannot read comes back
as a reason and not as an error, so that one slide ends and not the work.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sansmax.data.slides.opening import open_slide
from sansmax.data.slides.scaled import read_scaled
from sansmax.data.slides.slide import Slide
from sansmax.data.slides.tiles import Tiles
from sansmax.engine.stopping import leave_signals_to_training
from sansmax.errors import InputError


class TileBatch(NamedTuple):
    """Consecutive tiles of a slide, ready for the encoder; `first` is the number of the first one."""

    first: int
    tiles: UInt8[Tensor, "b 3 h w"]
    warnings: tuple[str, ...]


class Unreadable(NamedTuple):
    """Why a batch of tiles could not be read."""

    reason: str


class TileBatches(Dataset[TileBatch | Unreadable]):
    """Item i is the i-th batch of tiles of a slide.

    `to_input` turns a tile, (h, w, 3) of uint8, into a tensor of a fixed size.
    """

    def __init__(
        self,
        path: Path,
        tiles: Tiles,
        to_input: Callable[[np.ndarray], Tensor],
        batch_size: int,
        *,
        mpp: float | None = None,
    ) -> None:
        self.path, self.tiles, self.to_input, self.batch_size, self.mpp = path, tiles, to_input, batch_size, mpp
        self._opened: tuple[int, Slide] | None = None

    def __len__(self) -> int:
        return -(-len(self.tiles) // self.batch_size)

    def __getitem__(self, index: int) -> TileBatch | Unreadable:
        first = index * self.batch_size
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                read = [self._read(xy) for xy in self.tiles.xy[first : first + self.batch_size].tolist()]
        except (InputError, OSError) as error:
            return Unreadable(str(error))
        return TileBatch(first, torch.stack(read), tuple(dict.fromkeys(str(w.message) for w in said)))

    def __getstate__(self) -> dict[str, Any]:
        # an open file does not travel
        return {**self.__dict__, "_opened": None}

    def close(self) -> None:
        """Closes the slide that this process opened."""
        if self._opened is not None and self._opened[0] == os.getpid():
            self._opened[1].close()
        self._opened = None

    def _read(self, xy: list[int]) -> Tensor:
        size = (self.tiles.px, self.tiles.px)
        return self.to_input(read_scaled(self._slide(), (xy[0], xy[1]), self.tiles.downsample, size))

    def _slide(self) -> Slide:
        # a handle that came over by fork shares its place in the file with the process it came from
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_slide(self.path, mpp=self.mpp)
        return self._opened[1]


@contextmanager
def reading(batches: TileBatches, workers: int) -> Iterator[Iterator[TileBatch | Unreadable]]:
    """The batches in their order, read ahead by up to `workers` processes, which end with the block.

    Without workers they are read by this process, when they are asked for.
    """
    loader: DataLoader[Any] = DataLoader(
        batches,
        batch_size=None,
        num_workers=min(workers, len(batches)),
        worker_init_fn=leave_signals_to_training,
        generator=torch.Generator(),
    )
    iterator: Any = iter(loader)
    try:
        yield iterator
    finally:
        if workers and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        batches.close()
