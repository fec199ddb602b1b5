"""Pictures with boxes, classes and masks in the format of COCO: a folder of images and one annotations file (JSON).

    data = CocoImages("train2017", "annotations/instances_train2017.json", masks=True)
    image, target = data[0]

`image` is float32 (3, h, w) from 0 to 1, `target` what torchvision's detectors are trained with: `boxes` (n, 4) as
x0, y0, x1, y1 in pixels, `labels` (n,) from 1 on (0 is the background), with `masks=True` also `masks` (n, h, w) uint8,
and `image_id`, `area`, `iscrowd`. Format: https://cocodataset.org/#format-data.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from sansmax.data.images import read_image, to_tensor
from sansmax.errors import InputError, listed

LISTS = ("images", "annotations", "categories")


class CocoImages(Dataset):
    """The images of one annotations file, each with its objects.

    `classes[label - 1]` is the name of a label and `category_ids[label - 1]` the number the file gives it: labels have
    no gaps, in the order of those numbers. Regions marked as crowds (`iscrowd`) are left out, as are boxes that have
    no area inside their image: `crowds` and `degenerate` count them. Images without objects stay (`empty` counts
    them); `drop_empty=True` leaves them out.

    Raises InputError for a file that is no such annotations file, for images that are missing, and for annotations of
    images or categories that the file does not list; when an image is read, also for one of another size than listed.
    """

    def __init__(
        self, images: str | Path, annotations: str | Path, masks: bool = False, drop_empty: bool = False
    ) -> None:
        self.folder, self.file, self.masks = Path(images), Path(annotations), masks
        content = _read_json(self.file)
        categories = sorted(content["categories"], key=lambda c: c["id"])
        self.category_ids = tuple(c["id"] for c in categories)
        self.classes = tuple(str(c["name"]) for c in categories)
        self._label = {number: i + 1 for i, number in enumerate(self.category_ids)}
        listed_images = _by_id(content["images"], "images", self.file)
        _by_id(content["categories"], "categories", self.file)
        self._objects: dict[Any, list[dict]] = {number: [] for number in listed_images}
        self.crowds = self.degenerate = 0
        for annotation in content["annotations"]:
            self._add(annotation, listed_images)
        self.empty = sum(not objects for objects in self._objects.values())
        self._images = [im for number, im in listed_images.items() if self._objects[number] or not drop_empty]
        self.names = [str(im["file_name"]) for im in self._images]
        self._check_files()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        image = to_tensor(self.read(i), 3)
        target = {name: torch.as_tensor(value) for name, value in self.truth(i).items()}
        if self.masks:
            target["masks"] = target["masks"].to(torch.uint8)
        target["iscrowd"] = torch.zeros(len(target["labels"]), dtype=torch.int64)
        return image, target

    def read(self, i: int) -> np.ndarray:
        """The pixels of image i: (h, w) or (h, w, 3), uint8 or uint16."""
        path, listing = self.folder / self.names[i], self._images[i]
        pixels = read_image(path)
        size = (listing["height"], listing["width"])
        if pixels.shape[:2] != size:
            raise InputError(
                f"{path} is {pixels.shape[1]} x {pixels.shape[0]} px, but {self.file} lists it with "
                f"{size[1]} x {size[0]}: its boxes would not fit; replace the one or the other"
            )
        return pixels

    def truth(self, i: int) -> dict[str, np.ndarray]:
        """The objects of image i as arrays: boxes, labels, area, image_id, and with `masks=True` masks (bool)."""
        listing = self._images[i]
        objects = self._objects[listing["id"]]
        boxes = np.array([_corners(o, listing) for o in objects], np.float32).reshape(-1, 4)
        found = {
            "boxes": boxes,
            "labels": np.array([self._label[o["category_id"]] for o in objects], np.int64),
            "area": np.array([o.get("area", o["bbox"][2] * o["bbox"][3]) for o in objects], np.float32),
            "image_id": np.int64(listing["id"]) if isinstance(listing["id"], int) else np.int64(i),
        }
        if self.masks:
            shape = (len(objects), listing["height"], listing["width"])
            found["masks"] = np.zeros(shape, bool)
            for mask, annotation in zip(found["masks"], objects, strict=True):
                mask[:] = self._mask(annotation, *shape[1:])
        return found

    def describe(self) -> str:
        """How many images, objects and classes there are, and what was left out."""
        objects = sum(len(self._objects[im["id"]]) for im in self._images)
        kept_empty = sum(not self._objects[im["id"]] for im in self._images)
        parts = [f"{self.file}: {len(self)} images, {objects} objects of {len(self.classes)} classes"]
        notes = {
            f"{kept_empty} images without objects": kept_empty,
            f"left out: {self.empty - kept_empty} images without objects": self.empty - kept_empty,
            f"left out: {self.crowds} crowd regions": self.crowds,
            f"left out: {self.degenerate} boxes without area": self.degenerate,
        }
        return "; ".join(parts + [note for note, count in notes.items() if count])

    def _add(self, annotation: dict, images: Mapping[Any, dict]) -> None:
        what = f"annotation {annotation.get('id', '?')} in {self.file}"
        if missing := [key for key in ("image_id", "category_id", "bbox") if key not in annotation]:
            raise InputError(f"{what} has no {' and no '.join(missing)}; an object needs all three")
        if annotation["image_id"] not in images:
            raise InputError(f"{what} is of image {annotation['image_id']}, which the file does not list; remove it")
        if annotation["category_id"] not in self._label:
            raise InputError(
                f"{what} is of category {annotation['category_id']}; the file lists "
                f"{listed([str(number) for number in self.category_ids])}"
            )
        if not _are_numbers(annotation["bbox"], 4):
            raise InputError(f"{what} has the bbox {annotation['bbox']}; four numbers are needed: x, y, width, height")
        if annotation.get("iscrowd"):
            self.crowds += 1
            return
        x0, y0, x1, y1 = _corners(annotation, images[annotation["image_id"]])
        if not (x1 > x0 and y1 > y0):
            self.degenerate += 1
            return
        if self.masks and not annotation.get("segmentation"):
            raise InputError(f"{what} has no segmentation; open the set with masks=False, or remove the annotation")
        self._objects[annotation["image_id"]].append(annotation)

    def _mask(self, annotation: dict, height: int, width: int) -> np.ndarray:
        shape = annotation["segmentation"]
        try:
            if isinstance(shape, Mapping):
                return decode_rle(shape["counts"], height, width)
            masks = [polygon_mask(np.reshape(polygon, (-1, 2)), height, width) for polygon in shape]
            return np.logical_or.reduce(masks)
        except (KeyError, TypeError, ValueError) as e:
            what = f"the segmentation of annotation {annotation.get('id', '?')} in {self.file}"
            raise InputError(f"{what} is neither polygons (x, y, x, y, ...) nor run lengths: {e}") from None

    def _check_files(self) -> None:
        if not self.folder.is_dir():
            raise InputError(f"there is no folder of images {self.folder}; check the path")
        missing = [name for name in self.names if not (self.folder / name).is_file()]
        if missing:
            raise InputError(
                f"{len(missing)} of the {len(self)} images that {self.file} lists are not in {self.folder}: "
                f"{listed(missing)}"
            )


def collate(batch: Iterable[tuple]) -> tuple[tuple, ...]:
    """Images and targets of a batch as two tuples, since the images differ in size: `collate_fn` of a DataLoader."""
    return tuple(zip(*batch, strict=True))


def _read_json(file: Path) -> dict[str, list[dict]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"cannot read the annotations {file}: {e.strerror}; check the path") from None
    except ValueError as e:
        raise InputError(f"the annotations {file} are no JSON: {e}") from None
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in LISTS):
        raise InputError(f"{file} is not in the format of COCO; it needs the lists {', '.join(LISTS)}")
    for key, needed in (("images", ("id", "file_name", "height", "width")), ("categories", ("id", "name"))):
        for entry in content[key]:
            if missing := [name for name in needed if name not in entry]:
                raise InputError(f"an entry of {key} in {file} has no {' and no '.join(missing)}: {entry}")
    if not content["images"] or not content["categories"]:
        raise InputError(f"{file} lists {len(content['images'])} images and {len(content['categories'])} categories")
    return content


def _by_id(entries: Sequence[dict], what: str, file: Path) -> dict[Any, dict]:
    found = {entry["id"]: entry for entry in entries}
    if len(found) < len(entries):
        raise InputError(f"several {what} in {file} have the same id; give each its own")
    return found


def _are_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(isinstance(v, (int, float)) for v in values)


def _corners(annotation: dict, image: dict) -> tuple[float, float, float, float]:
    # x, y, width, height, of which what lies outside the image is cut off
    x, y, w, h = annotation["bbox"]
    width, height = float(image["width"]), float(image["height"])
    x0, x1 = (min(max(value, 0.0), width) for value in (x, x + w))
    y0, y1 = (min(max(value, 0.0), height) for value in (y, y + h))
    return x0, y0, x1, y1


# Shapes of objects


def polygon_mask(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """The pixels whose centre lies in the polygon `points` (n, 2), x and y in pixels: bool (height, width).

    Where the outline crosses itself the even-odd rule decides.
    """
    x0, y0 = np.asarray(points, np.float64).T
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    centres = np.arange(height) + 0.5
    # an edge crosses the line through a row's centres where its ends lie on two sides of it
    edge, row = np.nonzero((y0[:, None] <= centres) != (y1[:, None] <= centres))
    at = x0[edge] + (centres[row] - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    # every crossing turns all pixels to its right inside out
    column = np.clip(np.ceil(at - 0.5), 0, width).astype(np.int64)
    crossings = np.zeros((height, width + 1), np.int64)
    np.add.at(crossings, (row, column), 1)
    return crossings[:, :width].cumsum(axis=1) % 2 == 1


def decode_rle(counts: Sequence[int] | str | bytes, height: int, width: int) -> np.ndarray:
    """The mask of run lengths, bool (height, width): 0s, 1s, 0s, ... down the columns, the first run of 0s.

    `counts` are numbers, or the text into which COCO's tools pack them. Raises ValueError for runs that do not fill the
    image.
    """
    runs = np.array(_unpacked(counts) if isinstance(counts, (str, bytes)) else counts, np.int64)
    if (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"run lengths of {runs.sum()} pixels, the image has {height} x {width} = {height * width}")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def encode_rle(mask: np.ndarray) -> list[int]:
    """Run lengths of a mask (height, width), which `decode_rle` reads."""
    flat = np.asarray(mask, bool).T.ravel()
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], ends, [flat.size]])).tolist()
    return [0, *runs] if flat.size and flat[0] else runs


def _unpacked(text: str | bytes) -> list[int]:
    # five bits per character from the lowest on, the sixth says that more follow; from the fourth run on, the number
    # is the difference to the run before the last
    data = text.encode("ascii") if isinstance(text, str) else text
    runs: list[int] = []
    value = shift = 0
    for byte in data:
        bits = byte - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs
