"""Opens the official MedMNIST sets by name: `medmnist:breastmnist`, `medmnist:pathmnist:64`.

The files come from their publisher, https://zenodo.org/records/10519652, or from a folder given as `root`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from sansmax.data.assemble import Split
from sansmax.data.download import cache_folder, download, md5_of
from sansmax.data.medmnist_facts import OFFICIAL, SIZES, file_name
from sansmax.data.npz import open_npz
from sansmax.data.sets import LabelledImages
from sansmax.errors import InputError, unknown_name

URL = "https://zenodo.org/records/10519652/files/{file}?download=1"


def open_medmnist(
    source: str,
    *,
    classes: Sequence[str] | None,
    split: Split,
    root: Path | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> LabelledImages:
    """The set that `medmnist:NAME` or `medmnist:NAME:SIZE` names, with its official splits and class names."""
    name, size = _parse(source)
    path = medmnist_file(name, size, root=root, progress=progress)
    return open_npz(path, classes=classes, split=split, label_names=OFFICIAL[name].classes, source=source)


def medmnist_file(
    name: str, size: int, *, root: Path | None = None, progress: Callable[[int, int], object] | None = None
) -> Path:
    """The file of an official set: from `root` without network, else from the cache or its publisher."""
    file = file_name(name, size)
    md5 = OFFICIAL[name].md5[SIZES.index(size)]
    url = URL.format(file=file)
    if root is None:
        path = cache_folder() / "medmnist" / file
        if not path.exists():
            # checked as it arrives
            return download(url, path, md5, progress)
    else:
        path = root / file
        if not path.is_file():
            raise InputError(f"there is no {file} in {root}; fetch {url} and save it there, or leave --root away")
    got = md5_of(path)
    if got != md5:
        raise InputError(
            f"{path} has the MD5 sum {got}, the official file has {md5}; fetch {url} in its place, or give the file "
            "itself as the source to use it as it is"
        )
    return path


def official_labels(path: Path) -> tuple[str, ...] | None:
    """The class names for a local file that bears the name of an official set."""
    name, _, size = path.stem.partition("_")
    known = name in OFFICIAL and (not size or size in map(str, SIZES))
    return OFFICIAL[name].classes if known else None


def _parse(source: str) -> tuple[str, int]:
    _, _, rest = source.partition(":")
    name, _, size = rest.partition(":")
    name = name.lower()
    if name.endswith("3d"):
        raise InputError(f"{source} is a set of volumes, only pictures are supported: {', '.join(_single_label())}")
    if name not in OFFICIAL:
        raise unknown_name("MedMNIST set", name, _single_label())
    if OFFICIAL[name].multi_label:
        raise InputError(
            f"{source} has several labels per image, which is not supported; allowed are {', '.join(_single_label())}"
        )
    if size and size not in map(str, SIZES):
        raise InputError(f"{source}: there is no size {size!r}; allowed are {', '.join(map(str, SIZES))}")
    return name, int(size or 28)


def _single_label() -> list[str]:
    return [name for name, facts in OFFICIAL.items() if not facts.multi_label]
