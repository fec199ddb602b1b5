"""Pictures with a class for every pixel: a folder of images and a folder of masks with the same names.

    data = MaskFolder("images", "masks", classes=["background", "nucleus"])
    image, mask = data[0]

`image` is float32 (3, h, w) from 0 to 1, `mask` int64 (h, w) with the class of each pixel; 255 marks pixels that do not
count. Masks are PNG or TIFF whose values are classes, grey or with a palette; the suffix may differ from the image's.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from sansmax.data.images import IMAGE_SUFFIXES, read_image, to_tensor
from sansmax.errors import InputError, listed

IGNORE = 255
MASK_SUFFIXES = frozenset({".png", ".tif", ".tiff", ".bmp", ".gif"})


class MaskFolder(Dataset):
    """Images and masks with equal names but for the suffix, in the order of their names.

    `classes` are the names of the values 0, 1, ..., or how many there are; without it all masks are read once to find
    the largest value. Images may lie in sub-folders, their masks then in sub-folders of the same names.

    Raises InputError for images without a mask and masks without an image, by name; when they are read, also for a mask
    of another size than its image and for values that are neither a class nor `ignore`.
    """

    def __init__(
        self, images: str | Path, masks: str | Path, classes: Sequence[str] | int | None = None, ignore: int = IGNORE
    ) -> None:
        self.ignore = ignore
        pictures, labels = _by_stem(Path(images), IMAGE_SUFFIXES), _by_stem(Path(masks), MASK_SUFFIXES)
        for these, others, what in ((pictures, labels, "no mask"), (labels, pictures, "no image")):
            if alone := sorted(str(these[stem]) for stem in these.keys() - others.keys()):
                where = masks if what == "no mask" else images
                raise InputError(f"{len(alone)} files have {what} of their name in {where}: {listed(alone)}")
        self.names = sorted(pictures)
        self.images, self.masks = [pictures[n] for n in self.names], [labels[n] for n in self.names]
        if classes is None:
            classes = self._count_classes()
        self.classes = tuple(str(i) for i in range(classes)) if isinstance(classes, int) else tuple(classes)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return to_tensor(self.read(i), 3), torch.from_numpy(self.truth(i))

    def read(self, i: int) -> np.ndarray:
        """The pixels of image i: (h, w) or (h, w, 3), uint8 or uint16."""
        return self._pair(i)[0]

    def truth(self, i: int) -> np.ndarray:
        """The class of every pixel of image i, int64 (h, w)."""
        return self._pair(i)[1]

    def _pair(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        pixels, mask = read_image(self.images[i]), read_mask(self.masks[i])
        if pixels.shape[:2] != mask.shape:
            raise InputError(
                f"{self.masks[i]} is {mask.shape[1]} x {mask.shape[0]} px, its image {self.images[i]} "
                f"{pixels.shape[1]} x {pixels.shape[0]}; a mask has a value for every pixel of its image"
            )
        wrong = np.unique(mask[(mask >= len(self.classes)) & (mask != self.ignore)])
        if len(wrong):
            raise InputError(
                f"{self.masks[i]} has the values {listed([str(v) for v in wrong])}; allowed are 0 to "
                f"{len(self.classes) - 1} and {self.ignore} for pixels that do not count"
            )
        return pixels, mask

    def _count_classes(self) -> int:
        largest = [int(mask[mask != self.ignore].max(initial=-1)) for mask in map(read_mask, self.masks)]
        if max(largest) < 0:
            raise InputError(
                f"all {len(self)} masks hold nothing but {self.ignore}, which marks pixels that do not count"
            )
        return max(largest) + 1


def read_mask(path: str | Path) -> np.ndarray:
    """The values of a mask, int64 (h, w): those in the file, and the numbers, not the colours, where it has a palette.

    Raises InputError for a file that cannot be read, and for colours.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.asarray(image)
    except (OSError, ValueError, SyntaxError) as e:
        raise InputError(f"cannot read the mask {path}: {e}") from None
    if values.ndim != 2:
        raise InputError(
            f"{path} has colours ({mode}); a mask has one channel whose values are classes. Replace each colour by the "
            "number of its class"
        )
    return values.astype(np.int64)


def _by_stem(folder: Path, suffixes: frozenset[str]) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; check the path")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and not p.name.startswith("."))
    if not paths:
        raise InputError(f"{folder} has no files {', '.join(sorted(suffixes))}")
    found: dict[str, Path] = {}
    for path in paths:
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise InputError(f"{found[stem]} and {path} have the same name but for the suffix; keep one")
        found[stem] = path
    return found
