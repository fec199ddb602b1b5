"""Labelled images of one split, whatever they lie in, and the splits of one source together."""

import csv
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sansmax.data.images import check_pixels, read_image
from sansmax.errors import InputError
from sansmax.files import replacing

SPLITS = ("train", "val", "test")


class BadImage(NamedTuple):
    """An image that was left out, and why."""

    name: str
    reason: str


class ImageSet(ABC):
    """Labelled images of one split.

    `names[i]` is what a person calls image i: its path relative to the source, or `test[17]`; `labels[i]` is an
    index into the classes of the source; `groups[i]`, where known, is the patient it is of.
    """

    names: list[str]
    labels: np.ndarray
    groups: list[str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, i: int) -> np.ndarray:
        """The pixels of image i: (H, W) or (H, W, 3), uint8 or uint16."""

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """The images at `indices`, in that order, still read from this set."""
        return _Subset(self, np.asarray(indices, dtype=np.int64))

    def _describe_images(self, names: Sequence[str], labels: Any, groups: Sequence[str] | None) -> None:
        self.names = list(names)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.groups = None if groups is None else list(groups)
        assert self.labels.shape == (len(self.names),)
        assert self.groups is None or len(self.groups) == len(self.names)


class _Subset(ImageSet):
    def __init__(self, base: ImageSet, indices: np.ndarray):
        if isinstance(base, _Subset):
            base, indices = base.base, base.indices[indices]
        self.base, self.indices = base, indices
        groups = None if base.groups is None else [base.groups[i] for i in indices]
        self._describe_images([base.names[i] for i in indices], base.labels[indices], groups)

    def read(self, i: int) -> np.ndarray:
        return self.base.read(int(self.indices[i]))


class FileImages(ImageSet):
    """Image files on disk, decoded each time they are read."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str], labels: Any, groups: Sequence[str] | None = None):
        self.paths = list(paths)
        self._describe_images(names, labels, groups)

    def read(self, i: int) -> np.ndarray:
        """Decodes file i."""
        return read_image(self.paths[i])


class ArrayImages(ImageSet):
    """Images in memory (or memory-mapped): an array (n, H, W) or (n, H, W, 3), or a list of arrays of any size."""

    def __init__(self, images: Any, names: Sequence[str], labels: Any, groups: Sequence[str] | None = None):
        self.images = images
        self._describe_images(names, labels, groups)

    def read(self, i: int) -> np.ndarray:
        """The pixels of image i."""
        return np.asarray(self.images[i])


class WrappedImages(ImageSet):
    """A map-style dataset of (PIL image or array, label) pairs: those of torchvision and timm."""

    def __init__(self, dataset: Any, names: Sequence[str], labels: Any):
        self.dataset = dataset
        self._describe_images(names, labels, None)

    def read(self, i: int) -> np.ndarray:
        """The pixels of item i."""
        pixels = pixels_of(self.dataset[i][0])
        check_pixels(pixels)
        return pixels


def pixels_of(image: Any) -> np.ndarray:
    """The pixels of a PIL image or array, grey or colour."""
    mode = getattr(image, "mode", None)
    if mode is not None and mode not in ("L", "RGB", "I;16"):
        image = image.convert("L" if mode in ("1", "LA") else "RGB")
    return np.asarray(image)


@dataclass(frozen=True)
class LabelledImages:
    """The splits of one source; `classes[label]` is the name of a label.

    A split that the source does not have is None. `explicit_split`: train and test come from the source and were
    not drawn. `bad`: images that were left out. `split_note`: how the split was made, in words. `ordered`: the classes
    are grades, or are not, or (None) are if their names are whole numbers.
    """

    source: str
    classes: tuple[str, ...]
    train: ImageSet | None
    val: ImageSet | None
    test: ImageSet | None
    colour: bool
    explicit_split: bool
    bad: tuple[BadImage, ...] = ()
    split_note: str = ""
    ordered: bool | None = None

    def splits(self) -> dict[str, ImageSet]:
        """The splits that exist, by name."""
        return {s: images for s in SPLITS if (images := getattr(self, s)) is not None}

    def counts(self) -> dict[str, np.ndarray]:
        """Images per class of every split that exists."""
        return {s: np.bincount(x.labels, minlength=len(self.classes)) for s, x in self.splits().items()}

    def describe(self) -> str:
        """One line per split with the count of every class, and how the split was made."""
        kind = "colour" if self.colour else "grey"
        lines = [f"{self.source}: {len(self.classes)} classes, {kind} images"]
        for split, images in self.splits().items():
            counts = self.counts()[split]
            parts = ", ".join(f"{name} {n}" for name, n in zip(self.classes, counts, strict=True))
            patients = "" if images.groups is None else f" of {len(set(images.groups))} groups"
            lines.append(f"{split + ':':6} {len(images)} images{patients} ({parts})")
        if self.split_note:
            lines.append(f"split: {self.split_note}")
        if self.bad:
            lines.append(f"left out: {len(self.bad)} images that cannot be read")
        return "\n".join(lines)

    def write_splits(self, path: str | Path) -> None:
        """Writes which image is in which split: CSV with the columns name, label, group, split."""
        with replacing(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            out = csv.writer(file)
            out.writerow(["name", "label", "group", "split"])
            for split, images in self.splits().items():
                groups = images.groups or [""] * len(images)
                for name, label, group in zip(images.names, images.labels, groups, strict=True):
                    out.writerow([name, self.classes[label], group, split])


def looks_coloured(sets: dict[str, ImageSet], sample: int = 32) -> bool:
    """Whether any of the first `sample` images has three channels."""
    for images in sets.values():
        for i in range(min(sample, len(images))):
            sample -= 1
            if images.read(i).ndim == 3:
                return True
    return False


def class_order(labels: set[str]) -> tuple[str, ...]:
    """Class names sorted as numbers where all are whole numbers, else as text."""

    def number(label: str) -> int | None:
        try:
            return int(label)
        except ValueError:
            return None

    if all(number(label) is not None for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def require_fractions(val_fraction: float, test_fraction: float) -> None:
    """Refuses shares of validation and test images that make no split."""
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction > 1:
        raise InputError(
            f"val_fraction and test_fraction must be at least 0 and add up to at most 1, "
            f"{val_fraction} and {test_fraction} were given"
        )
