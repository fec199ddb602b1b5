"""Digits of several sizes scattered over a dim background, with a box, a class and a mask for each of them.

The scans are those of `sansmax.data.mosaics`, enlarged; no scan is in two splits. The sets can be written in the format
of COCO and as folders of images and masks, to be read again like any other set.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from sansmax.data.coco import encode_rle
from sansmax.data.mosaics import DigitMosaics
from sansmax.data.sets import SPLITS
from sansmax.errors import InputError, unknown_name
from sansmax.files import write_text

# a pixel of the enlarged scan belongs to the digit from this value on
INK = 110
SCANS = 4000
TRIES = 50


class DenseMosaics:
    """`count` pictures of `size` x `size` px, each with `digits` (fewest, most) digits `heights` px high.

    Picture i depends on (seed, split, i) alone. Digits do not overlap; one that finds no place is left out.

    Raises InputError for a split that does not exist, and for digits that are no digits or do not fit.
    """

    classes = tuple("0123456789")

    def __init__(
        self,
        split: str,
        count: int,
        size: int = 160,
        digits: tuple[int, int] = (3, 8),
        heights: tuple[int, int] = (18, 52),
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise unknown_name("split", split, SPLITS)
        if not (1 <= digits[0] <= digits[1] and 8 <= heights[0] <= heights[1] <= size and count >= 0 and seed >= 0):
            raise InputError(
                f"digits must be (fewest, most) from 1 on, heights (least, most) from 8 to the size, count and seed 0 "
                f"or more; got {digits=}, {heights=}, {size=}, {count=}, {seed=}"
            )
        self.split, self.count, self.seed = split, count, seed
        self.size, self.digits, self.heights = size, digits, heights
        # mosaics of a single cell: numbers d, d + 10, ... are scans of the digit d
        self._scans = DigitMosaics(split, SCANS, grid=1, share=1.0, seed=seed)
        self.names = [f"{split}_{i:05}" for i in range(count)]

    def __len__(self) -> int:
        return self.count

    def read(self, i: int) -> np.ndarray:
        """The picture, uint8 (size, size)."""
        return self._draw(i)[0]

    def truth(self, i: int) -> dict[str, np.ndarray]:
        """Its objects: boxes (n, 4) as x0, y0, x1, y1, labels (n,) from 1 on for "0", masks (n, size, size) bool."""
        _, labels, masks = self._draw(i)
        return {"boxes": _boxes(masks), "labels": labels, "masks": masks}

    def semantic(self, i: int) -> np.ndarray:
        """The class of every pixel, uint8 (size, size): 0 for the background, 1 + d for a digit d."""
        _, labels, masks = self._draw(i)
        return (labels[:, None, None] * masks).sum(0).astype(np.uint8)

    def _draw(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), i, self.size])
        picture = _background(rng, self.size)
        labels, masks, taken = [], [], []
        for _ in range(rng.integers(self.digits[0], self.digits[1] + 1)):
            scan = int(rng.integers(SCANS))
            height = int(rng.integers(self.heights[0], self.heights[1] + 1))
            width = min(self.size, round(height * rng.uniform(0.8, 1.1)))
            place = self._place(rng, height, width, taken)
            if place is None:
                continue
            taken.append(place)
            ink = np.zeros((self.size, self.size), np.float32)
            ink[place[0] : place[2], place[1] : place[3]] = _enlarged(self._scans.read(scan), height, width)
            picture = np.maximum(picture, ink * rng.uniform(0.65, 1.0))
            labels.append(scan % 10 + 1)
            masks.append(ink >= INK)
        picture = picture + rng.normal(0, 6, picture.shape)
        return picture.clip(0, 255).astype(np.uint8), np.array(labels, np.int64), np.stack(masks)

    def _place(self, rng: np.random.Generator, height: int, width: int, taken: list) -> tuple | None:
        for _ in range(TRIES):
            top, left = (int(rng.integers(self.size - n + 1)) for n in (height, width))
            here = (top, left, top + height, left + width)
            if all(here[2] <= t[0] or t[2] <= here[0] or here[3] <= t[1] or t[3] <= here[1] for t in taken):
                return here
        return None


def write_coco(mosaics: DenseMosaics, folder: str | Path) -> tuple[Path, Path]:
    """Writes the pictures and their objects in the format of COCO: the folder of images and the annotations file."""
    images = _write_images(mosaics, Path(folder) / "images")
    listing, annotations = [], []
    for i, name in enumerate(mosaics.names):
        listing.append({"id": i + 1, "file_name": f"{name}.png", "height": mosaics.size, "width": mosaics.size})
        truth = mosaics.truth(i)
        for box, label, mask in zip(truth["boxes"].tolist(), truth["labels"].tolist(), truth["masks"], strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": label,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": int(mask.sum()),
                    "segmentation": {"counts": encode_rle(mask), "size": list(mask.shape)},
                    "iscrowd": 0,
                }
            )
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(mosaics.classes)]
    content = {"images": listing, "annotations": annotations, "categories": categories}
    return images, write_text(Path(folder) / "annotations.json", json.dumps(content))


def write_masks(mosaics: DenseMosaics, folder: str | Path) -> tuple[Path, Path]:
    """Writes the pictures and the class of each of their pixels: a folder of images, a folder of masks."""
    images, masks = _write_images(mosaics, Path(folder) / "images"), Path(folder) / "masks"
    masks.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(mosaics.names):
        Image.fromarray(mosaics.semantic(i)).save(masks / f"{name}.png")
    return images, masks


def _write_images(mosaics: DenseMosaics, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(mosaics.names):
        Image.fromarray(mosaics.read(i)).save(folder / f"{name}.png")
    return folder


def _boxes(masks: np.ndarray) -> np.ndarray:
    # from the first to one past the last pixel, along x and y
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        (columns,), (rows,) = np.nonzero(mask.any(0)), np.nonzero(mask.any(1))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    # soft clouds, so that brightness alone does not tell a digit
    cells = Image.fromarray(rng.uniform(10, 90, (6, 6)).astype(np.float32))
    return np.asarray(cells.resize((size, size), Image.Resampling.BICUBIC))


def _enlarged(scan: np.ndarray, height: int, width: int) -> np.ndarray:
    large = Image.fromarray(scan.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(large).clip(0, 255)
