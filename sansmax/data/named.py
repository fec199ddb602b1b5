"""Opens data sets that torchvision and timm know by name: `torchvision:CIFAR10`, `torch/cifar10`, `hfds/NAME`."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.assemble import Split, assemble
from sansmax.data.sets import ArrayImages, ImageSet, LabelledImages, WrappedImages, looks_coloured, pixels_of
from sansmax.errors import InputError, listed, unknown_name

TIMM_PREFIXES = ("torch/", "hfds/", "tfds/")
# How the data sets call their splits, the first that exists is taken
_SPLIT_NAMES = {
    "train": ("train", "trainval", "train-standard"),
    "val": ("val", "valid", "validation"),
    "test": ("test",),
}


def open_torchvision(
    source: str, *, classes: Sequence[str] | None, split: Split, root: Path | None = None
) -> LabelledImages:
    """The set `torchvision:NAME`, downloaded into `root` where the files are not there."""
    from torchvision import datasets

    name = source.partition(":")[2]
    known = {n.lower(): n for n in datasets.__all__ if inspect.isclass(getattr(datasets, n))}
    if name.lower() not in known:
        raise unknown_name("torchvision data set", name, known.values())
    make = getattr(datasets, known[name.lower()])
    parameters = inspect.signature(make.__init__).parameters
    if "train" in parameters and not _required(parameters):
        wrapped = {w: _make(source, make, root, parameters, train=w == "train") for w in ("train", "test")}
    elif "split" in parameters and not _required(parameters):
        wrapped = {}
        for word, names in _SPLIT_NAMES.items():
            for candidate in names:
                with contextlib.suppress(_NoSuchSplit):
                    wrapped[word] = _make(source, make, root, parameters, split=candidate)
                    break
    elif not _required(parameters) and "download" in parameters:
        wrapped = {"all": _make(source, make, root, parameters)}
    else:
        needed = [*_required(parameters), "no train= and no split="][0]
        raise InputError(f"{source} cannot be opened by its name alone ({needed}); save it as one folder per class")
    return _labelled(source, wrapped, classes, split)


def open_timm(source: str, *, classes: Sequence[str] | None, split: Split, root: Path | None = None) -> LabelledImages:
    """The set that `timm.data.create_dataset` gives for a name with the prefix `torch/`, `hfds/` or `tfds/`.

    Sets of TensorFlow come as a stream and are decoded into memory.
    """
    prefix = source.partition("/")[0].lower()
    wrapped = {}
    for word, names in {"train": ("train",), "val": ("validation", "val"), "test": ("test",)}.items():
        if prefix == "torch" and word == "val":
            # for timm validation and test are the same images of these sets
            continue
        for candidate in names:
            with contextlib.suppress(_NoSuchSplit):
                wrapped[word] = _make_timm(source, candidate, root)
                break
    return _labelled(source, wrapped, classes, split)


class _NoSuchSplit(Exception):
    """The data set does not know this split."""


def _required(parameters: Any) -> list[str]:
    skipped = ("self", "root", "args", "kwargs")
    return [n for n, p in parameters.items() if p.default is p.empty and n not in skipped]


def _make(source: str, make: Callable[..., Any], root: Path | None, parameters: Any, **which: Any) -> Any:
    """One split of a torchvision set; downloads only where the files are not there."""
    if root is None and "root" in parameters:
        raise InputError(f"{source} needs a folder for its files; name it with --root FOLDER")
    place = {"root": str(root)} if "root" in parameters else {}
    try:
        try:
            return make(**place, **which)
        except (RuntimeError, FileNotFoundError):
            if "download" not in parameters:
                raise
            return make(**place, **which, download=True)
    except ValueError as e:
        if "split" in which and "split" in str(e):
            raise _NoSuchSplit from None
        raise InputError(f"torchvision cannot open {source} in {root}: {e}") from e
    except ImportError as e:
        raise InputError(f"{source} needs a further package: {e}") from None
    except (RuntimeError, OSError) as e:
        raise InputError(f"torchvision cannot open or fetch {source} in {root}: {e}") from e


def _make_timm(source: str, word: str, root: Path | None) -> Any:
    if root is None and not source.lower().startswith("hfds/"):
        raise InputError(f"{source} needs a folder for its files; name it with --root FOLDER")

    def make(download: bool) -> Any:
        from timm.data import create_dataset  # type: ignore[attr-defined]

        folder = None if root is None else str(root)
        return create_dataset(source, root=folder, split=word, download=download)

    try:
        try:
            return make(False)
        except (RuntimeError, FileNotFoundError):
            return make(True)
    except ImportError as e:
        package = {"hfds": "datasets", "tfds": "tensorflow-datasets"}.get(source.partition("/")[0].lower())
        raise InputError(f"{source} needs a further package ({e}); pip install {package}") from None
    except AssertionError as e:
        raise InputError(f"timm does not know the data set {source}: {e}") from None
    except ValueError as e:
        if "split" in str(e).lower():
            raise _NoSuchSplit from None
        raise InputError(f"timm cannot open {source}: {e}") from e
    except (RuntimeError, OSError) as e:
        raise InputError(f"timm cannot open or fetch {source}: {e}") from e


def _labelled(source: str, wrapped: dict[str, Any], classes: Sequence[str] | None, split: Split) -> LabelledImages:
    if not wrapped:
        raise InputError(f"{source} has none of the splits train, val and test; save it as one folder per class")
    given: dict[str, ImageSet] = {}
    for word, dataset in wrapped.items():
        given[word] = _as_set(source, word, dataset)
    own = _own_classes(next(iter(wrapped.values())), given)
    names = own
    if classes is not None:
        unknown = [c for c in own if c not in classes]
        if unknown:
            raise InputError(
                f"{source} has labels that are none of the classes: {listed(unknown)}; the classes are "
                f"{listed(classes, 20)}"
            )
        names = tuple(classes)
        index = np.array([names.index(c) for c in own])
        for images in given.values():
            images.labels = index[images.labels]
    return assemble(
        source,
        names,
        given,
        split,
        origin="given by the data set",
        known_classes=classes is not None,
        colour=looks_coloured(given),
    )


def _as_set(source: str, word: str, dataset: Any) -> ImageSet:
    if not hasattr(dataset, "__getitem__") or not hasattr(type(dataset), "__getitem__"):
        pairs = [(pixels_of(image), label) for image, label in dataset]
        labels, called = [label for _, label in pairs], [f"{word}[{i}]" for i in range(len(pairs))]
        return ArrayImages([pixels for pixels, _ in pairs], called, _whole(source, labels))
    called = [f"{word}[{i}]" for i in range(len(dataset))]
    return WrappedImages(dataset, called, _whole(source, _labels(dataset)))


def _labels(dataset: Any) -> Any:
    """All labels, from where the data set keeps them; else from its items, which decodes every image."""
    reader: Any = getattr(dataset, "reader", None)
    if hasattr(reader, "label_key"):
        return reader.dataset[reader.label_key]
    for keeper in ("targets", "labels", "_labels", "y"):
        labels = getattr(dataset, keeper, None)
        if labels is not None and len(labels) == len(dataset) and np.ndim(labels) == 1:
            return labels
    for keeper in ("_samples", "samples"):
        pairs = getattr(dataset, keeper, None)
        if isinstance(pairs, list) and len(pairs) == len(dataset) and all(len(p) == 2 for p in pairs):
            return [label for _, label in pairs]
    return [dataset[i][1] for i in range(len(dataset))]


def _whole(source: str, labels: Any) -> np.ndarray:
    try:
        found = np.asarray(labels)
    except ValueError:
        found = np.empty((0, 0))
    if found.ndim != 1 or found.dtype.kind not in "iub":
        raise InputError(
            f"{source} does not have one whole-number label per image (labels are {found.dtype}, shape {found.shape}); "
            "only one class per image is supported"
        )
    return found.astype(np.int64)


def _own_classes(dataset: Any, given: dict[str, ImageSet]) -> tuple[str, ...]:
    largest = max(int(images.labels.max()) for images in given.values() if len(images)) + 1
    names = getattr(dataset, "classes", None)
    to_index = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    if names is None and to_index:
        names = sorted(to_index, key=to_index.__getitem__)
    if names is None or len(names) < largest:
        return tuple(str(k) for k in range(largest))
    # ImageNet gives several words per class
    return tuple(n if isinstance(n, str) else n[0] if isinstance(n, Sequence) else str(n) for n in names)
