"""The patches of a slide that lie on tissue, read block by block at a chosen resolution.

A patch is `patch` x `patch` pixels of `downsample` level-0 pixels each. Patches without tissue are no tokens at all, so
they cost nothing and need no mask. Blocks are squares of patches that are read in one piece; tokens are in reading
order of blocks, and of patches inside a block, so that a file is read once from its beginning to its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sansmax.data.images import to_tensor
from sansmax.data.slides.scaled import read_scaled, required_mpp
from sansmax.errors import InputError

if TYPE_CHECKING:
    from sansmax.data.slides.slide import Slide
    from sansmax.data.slides.tissue import Tissue

# patches along a block's side: 4,096 tokens at most, a region of 1,024 px for patches of 16
BLOCK = 64


class Block(NamedTuple):
    """Patches [row, row + rows) x [column, column + columns); those with tissue are tokens start ... stop - 1."""

    row: int
    column: int
    rows: int
    columns: int
    start: int
    stop: int


class SlideTokens:
    """The tokens of a slide.

    `mpp` is the resolution of the pixels that the network sees, in micrometres; None is level 0 as it is. `min_tissue`
    is the share of a patch that has to be tissue; without `tissue` every patch is a token. `mean` and `std` are in
    units of [0, 1].

    Raises InputError for a slide without resolution where `mpp` asks for one (naming --slide-mpp), and where no patch
    has tissue.
    """

    def __init__(
        self,
        slide: Slide,
        patch_size: int | tuple[int, int],
        *,
        tissue: Tissue | None = None,
        mpp: float | None = None,
        min_tissue: float = 0.5,
        in_chans: int = 3,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        block: int = BLOCK,
    ) -> None:
        ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
        if ph != pw:
            raise InputError(f"patches of slides are squares, the network's are {ph} x {pw}")
        self.slide, self.patch, self.in_chans = slide, int(ph), in_chans
        self.downsample = 1.0 if mpp is None else mpp / required_mpp(slide, "--slide-mpp")
        self.side = self.patch * self.downsample
        width, height = slide.size
        self.grid = (max(1, round(height / self.side)), max(1, round(width / self.side)))
        self._mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(std, dtype=torch.float32)[:, None, None]
        rows, columns = self.grid
        flat = _tissue_patches(self.grid, self.side, tissue, min_tissue)
        if not flat.any():
            raise InputError(
                f"{slide.name} has no tissue: none of its {rows * columns:,} patches of {self.side:.0f} px is covered "
                f"by {100 * min_tissue:.0f} % or more, so there is nothing to classify. Give an edited outline, a "
                "lower share, or read every patch (tissue=False, --all-patches)"
            )
        self._present = flat
        self.blocks = _blocks(flat, block)
        self.index = np.concatenate([self._places(b) for b in self.blocks])

    @property
    def count(self) -> int:
        """How many tokens there are."""
        return len(self.index)

    @property
    def xy(self) -> np.ndarray:
        """Upper left corners (x, y) of the tokens in level-0 pixels, int64 (N, 2)."""
        return np.round(self.index[:, ::-1] * self.side).astype(np.int64)

    def _places(self, block: Block) -> np.ndarray:
        inside = self._present[block.row : block.row + block.rows, block.column : block.column + block.columns]
        return (np.argwhere(inside) + (block.row, block.column)).astype(np.int32)

    def inside(self, block: Block) -> np.ndarray:
        """Which patches of a block are tokens, as positions in its reading order."""
        row, column = (self.index[block.start : block.stop] - (block.row, block.column)).T
        return row.astype(np.int64) * block.columns + column

    def read(self, block: Block) -> Float[Tensor, "1 c h w"]:
        """A block's pixels, normalised, its patches without tissue included."""
        return self._tensor(self.pixels(block))

    def pixels(self, block: Block) -> np.ndarray:
        """A block's pixels (h, w, 3) as they are in the slide."""
        corner = (round(block.column * self.side), round(block.row * self.side))
        size = (block.columns * self.patch, block.rows * self.patch)
        return read_scaled(self.slide, corner, self.downsample, size)

    def _tensor(self, pixels: np.ndarray) -> Tensor:
        return to_tensor(pixels, self.in_chans).sub_(self._mean).div_(self._std)[None]


def _tissue_patches(grid: tuple[int, int], side: float, tissue: Tissue | None, min_tissue: float) -> np.ndarray:
    if tissue is None:
        return np.ones(grid, bool)
    rows, columns = grid
    xs, ys = np.arange(columns) * side, np.arange(rows) * side
    # a band at a time: shares of all patches of a large slide would be gigabytes
    bands = np.array_split(ys, -(-rows * columns // 2**20))
    return np.concatenate([tissue.covered_grid(xs, some, side) >= min_tissue for some in bands])


def _blocks(present: np.ndarray, size: int) -> list[Block]:
    blocks, start = [], 0
    for row in range(0, present.shape[0], size):
        for column in range(0, present.shape[1], size):
            inside = present[row : row + size, column : column + size]
            if count := int(inside.sum()):
                # no larger than its tokens: what has no tissue at the edges is not read
                ys, xs = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
                shape = (int(ys[-1] - ys[0]) + 1, int(xs[-1] - xs[0]) + 1)
                blocks.append(Block(row + int(ys[0]), column + int(xs[0]), *shape, start, start + count))
                start += count
    return blocks


def read_ahead(source: SlideTokens, pool: Any) -> Any:
    """A function that gives a block's pixels and has the next one's read meanwhile by `pool` (an executor)."""
    following = dict(zip(source.blocks[:-1], source.blocks[1:], strict=True))
    waiting: dict[Block, Any] = {}

    def read(block: Block) -> Tensor:
        ready = waiting.pop(block, None)
        waiting.clear()
        if block in following:
            waiting[following[block]] = pool.submit(source.pixels, following[block])
        return source._tensor(source.pixels(block) if ready is None else ready.result())

    return read
