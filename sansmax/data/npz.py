"""Opens an .npz file laid out as those of MedMNIST: {train,val,test}_images and _labels."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sansmax.data.assemble import Split, assemble
from sansmax.data.sets import SPLITS, ArrayImages, ImageSet, LabelledImages
from sansmax.errors import InputError, listed

_LAYOUT = (
    "allowed are train_images, train_labels (and val_, test_) with images (n, H, W) or (n, H, W, 3) of uint8 or "
    "uint16 and one whole-number label per image, (n,) or (n, 1)"
)


def open_npz(
    path: Path,
    *,
    classes: Sequence[str] | None,
    split: Split,
    label_names: Sequence[str] | None = None,
    source: str | None = None,
) -> LabelledImages:
    """The splits of an npz file.

    `label_names[k]` is what label k means; without them classes are the labels as text. `classes`, those of a
    finished run, are matched by name, and by position where labels have no names.
    """
    arrays = _arrays(path)
    values = np.unique(np.concatenate([labels for _, labels in arrays.values()])).tolist()
    if label_names is None and classes is not None and not {str(v) for v in values} <= set(classes):
        label_names = classes
    of_label = {v: _class_of(path, v, label_names) for v in values}
    names = tuple(classes) if classes is not None else tuple(label_names or of_label.values())
    unknown = [name for name in of_label.values() if name not in names]
    if unknown:
        raise InputError(
            f"{path} has labels that are none of the classes: {listed(unknown)}; the classes are {listed(names, 20)}"
        )
    index = {v: names.index(name) for v, name in of_label.items()}
    given: dict[str, ImageSet] = {}
    for word, (images, labels) in arrays.items():
        called = [f"{word}[{i}]" for i in range(len(images))]
        given[word] = ArrayImages(images, called, [index[v] for v in labels.tolist()])
    colour = any(images.ndim == 4 for images, _ in arrays.values())
    return assemble(
        source or str(path),
        names,
        given,
        split,
        origin="given by the file",
        known_classes=classes is not None,
        colour=colour,
    )


def _class_of(path: Path, value: int, label_names: Sequence[str] | None) -> str:
    if label_names is None:
        return str(value)
    if not 0 <= value < len(label_names):
        raise InputError(f"{path} has the label {value}, the classes are 0 ... {len(label_names) - 1}")
    return label_names[value]


def _arrays(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    found = {}
    try:
        # np.load leaves a file that it opened itself open where it is damaged
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            keys = list(file.files)
            for word in SPLITS:
                if f"{word}_images" in keys and f"{word}_labels" in keys:
                    images = _mapped(path, f"{word}_images.npy")
                    found[word] = (file[f"{word}_images"] if images is None else images, file[f"{word}_labels"])
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as e:
        raise InputError(f"cannot read {path}: it is damaged, or no npz file ({e}); copy it again") from None
    if not found:
        raise InputError(f"{path} has the arrays {listed(keys, 20) or 'none'}; {_LAYOUT}")
    return {word: _checked(path, word, *pair) for word, pair in found.items()}


def _mapped(path: Path, member: str) -> np.ndarray | None:
    """The array where it lies in the file, for members that are stored and not compressed: they can be huge."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        info = archive.getinfo(member)
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        # the local header repeats the lengths of name and extra field, which may differ from the directory's
        file.seek(info.header_offset + 26)
        file.seek(int.from_bytes(file.read(2), "little") + int.from_bytes(file.read(2), "little"), 1)
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            return None
        if dtype.hasobject or 0 in shape:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")


def _checked(path: Path, word: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    what = f"{path}: {word}_images is {images.dtype} {images.shape} and {word}_labels {labels.dtype} {labels.shape}"
    if labels.ndim == 2 and labels.shape[1] > 1:
        raise InputError(f"{what}; several labels per image are not supported: {_LAYOUT}")
    volumes = images.ndim == 4 and images.shape[3] not in (1, 3)
    if volumes or images.ndim > 4:
        raise InputError(f"{what}; these are volumes, only pictures are supported: {_LAYOUT}")
    if images.ndim < 3 or images.dtype not in (np.uint8, np.uint16) or labels.ndim not in (1, 2):
        raise InputError(f"{what}; {_LAYOUT}")
    if len(images) != len(labels) or labels.dtype.kind not in "iub":
        raise InputError(f"{what}; {_LAYOUT}")
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    return images, labels.reshape(-1).astype(np.int64)
