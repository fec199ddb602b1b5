"""Digit mosaics: a picture of many small handwritten digits, of which one digit has the largest share.

Real scans of handwritten digits (8 x 8 px, from scikit-learn) fill a grid; the label is the digit that fills `share`
of the cells, the other cells hold the nine other digits at random. Every cell has to be read and counted, so a model
must see small detail and the whole picture at once; `reduce` shows what is lost at low resolution.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from sansmax.data.sets import SPLITS, ImageSet, LabelledImages
from sansmax.data.splits import draw_parts
from sansmax.errors import InputError, unknown_name

CELL = 8


class DigitMosaics(ImageSet):
    """`count` mosaics of `grid` x `grid` digits; image i depends on (seed, split, i) alone.

    Exactly round(share * grid * grid) cells show the label, which runs through 0 ... 9 in turn. The scans are dealt
    to the splits 60 / 20 / 20 by the seed, so no scan is in two of them. Pixels are the 17 grey levels of the scans
    spread over 0 ... 255.
    """

    def __init__(self, split: str, count: int, grid: int = 16, share: float = 0.25, seed: int = 0):
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        if grid < 1 or count < 0 or seed < 0:
            raise InputError(f"grid must be 1 or more, count and seed 0 or more; got {grid=}, {count=}, {seed=}")
        cells = grid * grid
        self.label_cells = round(share * cells)
        if not 0 < share <= 1 or self.label_cells * 9 <= cells - self.label_cells:
            raise InputError(
                f"with share {share:g} of {cells} cells the label is not the most frequent digit; "
                "give a share above 0.1, up to 1"
            )
        self.split, self.grid, self.share, self.seed = split, grid, share, seed
        self._describe_images([f"{split}[{i}]" for i in range(count)], np.arange(count) % 10, None)

    def read(self, i: int) -> np.ndarray:
        """The picture, uint8 (8 * grid, 8 * grid)."""
        digits, rng = self._draw(i)
        pool = _pools(self.seed)[self.split]
        scan = pool.start[digits] + (rng.random(digits.size) * pool.count[digits]).astype(np.int64)
        tiles = pool.pixels[scan].reshape(self.grid, self.grid, CELL, CELL)
        return tiles.transpose(0, 2, 1, 3).reshape(self.grid * CELL, self.grid * CELL)

    def truth(self, i: int) -> np.ndarray:
        """The digit in every cell, (grid, grid)."""
        return self._draw(i)[0].reshape(self.grid, self.grid)

    def _draw(self, i: int) -> tuple[np.ndarray, np.random.Generator]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), i])
        label = int(self.labels[i])
        digits = np.full(self.grid * self.grid, label)
        others = rng.integers(1, 10, digits.size - self.label_cells)
        digits[self.label_cells :] = (label + others) % 10
        rng.shuffle(digits)
        return digits, rng


def reduce(pixels: np.ndarray, factor: int) -> np.ndarray:
    """The picture at 1 / `factor` of its size, each pixel the mean of the `factor` x `factor` it covers."""
    height, width = pixels.shape[:2]
    if factor < 1 or height % factor or width % factor:
        raise InputError(f"a picture of {height} x {width} px cannot be reduced by {factor}; give a divisor of both")
    blocks = pixels.reshape(height // factor, factor, width // factor, factor, *pixels.shape[2:])
    mean = blocks.mean((1, 3), dtype=np.float64)
    return np.rint(mean).astype(pixels.dtype) if pixels.dtype.kind == "u" else mean.astype(pixels.dtype)


@dataclass(frozen=True)
class _Settings:
    grid: int = 16
    share: float = 0.25
    train: int = 2000
    val: int = 500
    test: int = 1000
    seed: int = 0


def open_mosaics(source: str, classes: Sequence[str] | None = None) -> LabelledImages:
    """The splits that `mosaics:grid=16,share=0.25,train=2000,val=500,test=1000,seed=0` names, every part optional."""
    if classes is not None and tuple(classes) != tuple("0123456789"):
        raise InputError(f"mosaics have the classes 0 ... 9, the run has {', '.join(classes)}")
    s = _settings(source)
    counts = {word: getattr(s, word) for word in SPLITS}
    sets = {word: DigitMosaics(word, n, s.grid, s.share, s.seed) if n else None for word, n in counts.items()}
    if not any(counts.values()):
        raise InputError(f"{source} has no images; give train=, val= or test= a count")
    return LabelledImages(
        source,
        tuple("0123456789"),
        sets["train"],
        sets["val"],
        sets["test"],
        colour=False,
        explicit_split=True,
        split_note=f"digits drawn apart 60% / 20% / 20%, seed {s.seed}",
        ordered=False,
    )


def _settings(source: str) -> _Settings:
    kinds = {f.name: type(f.default) for f in fields(_Settings)}
    values = {}
    for part in filter(None, source.partition(":")[2].split(",")):
        key, _, value = (text.strip() for text in part.partition("="))
        if key not in kinds:
            raise unknown_name("setting of mosaics", key, kinds)
        try:
            values[key] = kinds[key](value)
        except ValueError:
            what = "a whole number" if kinds[key] is int else "a number"
            raise InputError(f"{source}: {key} must be {what}, {value!r} was given") from None
    return _Settings(**values)


@dataclass(frozen=True)
class _Pool:
    # pixels (n, 8, 8) sorted by digit; those of digit d are count[d] from start[d] on
    pixels: np.ndarray
    start: np.ndarray
    count: np.ndarray


@functools.lru_cache(maxsize=4)
def _pools(seed: int) -> dict[str, _Pool]:
    from sklearn.datasets import load_digits

    digits: Any = load_digits(return_X_y=True)
    images, labels = digits
    images = np.rint(images.reshape(-1, CELL, CELL) * (255 / 16)).astype(np.uint8)
    names = [f"{i:04}" for i in range(len(labels))]
    parts = draw_parts(names, labels, val_fraction=0.2, test_fraction=0.2, seed=seed)
    pools = {}
    for split, indices in parts._asdict().items():
        mine = indices[np.argsort(labels[indices], kind="stable")]
        count = np.bincount(labels[mine], minlength=10)
        pools[split] = _Pool(images[mine], np.cumsum(count) - count, count)
    return pools
