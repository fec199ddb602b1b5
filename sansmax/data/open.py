"""Opens labelled images, whatever they are named by: a folder, a table, an npz file, or the name of a data set."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sansmax.data.assemble import Split
from sansmax.data.sets import LabelledImages, require_fractions
from sansmax.errors import InputError, nearest

_ALLOWED = (
    "a folder with one sub-folder per class (also under train/, val/, test/), a .csv table, a .npz file, "
    "medmnist:NAME or medmnist:NAME:SIZE, torchvision:NAME, torch/NAME, hfds/NAME, tfds/NAME, or mosaics:"
)


def open_data(
    source: str | Path,
    *,
    path_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    classes: Sequence[str] | None = None,
    val_fraction: float = 0.15,
    test_fraction: float = 0.15,
    seed: int = 0,
    root: str | Path | None = None,
    check: bool = True,
    skip_bad: bool = False,
    workers: int = 2,
    progress: Callable[[int, int], object] | None = None,
) -> LabelledImages:
    """Labelled images with their splits.

    Splits of the source are kept. Without a validation split, `val_fraction` of train is drawn; without any split
    train, val and test are drawn by class, groups whole, by `seed`; `test_fraction=1, val_fraction=0` makes all of
    it test. `classes` are those of a finished run: labels are mapped to them, and the source may lack some.
    `root` is the folder of a table's images, or of the files of a named set. With `check` every image file is
    decoded once by `workers` threads; `skip_bad` leaves out those that fail. `progress(done, total)` is called with
    images checked, or with bytes while a set is downloaded.
    """
    require_fractions(val_fraction, test_fraction)
    split = Split(val_fraction, test_fraction, seed)
    columns = {
        "path_column": path_column,
        "label_column": label_column,
        "split_column": split_column,
        "group_column": group_column,
    }
    path = Path(source).expanduser()
    where = None if root is None else Path(root).expanduser()
    if where is not None and not where.is_dir() and not _named(source):
        raise InputError(f"the folder --root {where} does not exist")
    is_table = path.suffix.lower() in (".csv", ".tsv") and path.is_file()
    if not is_table and (named := [c for c, value in columns.items() if value is not None]):
        flag = "--" + named[0].replace("_", "-")
        raise InputError(f"{flag} is for tables (.csv), {source} is none; leave it away")
    if path.is_dir() or is_table:
        from sansmax.data.folder import read_folder
        from sansmax.data.listing import open_listing
        from sansmax.data.table import read_table

        listing = read_table(path, **columns, root=where, skip_bad=skip_bad) if is_table else read_folder(path)
        return open_listing(
            listing, classes=classes, split=split, check=check, skip_bad=skip_bad, workers=workers, progress=progress
        )
    if path.suffix.lower() == ".npz" and path.is_file():
        from sansmax.data.medmnist import official_labels
        from sansmax.data.npz import open_npz

        return open_npz(path, classes=classes, split=split, label_names=official_labels(path))
    if _named(source):
        return _open_named(str(source), classes, split, where, progress)
    raise _unrecognised(source, path)


def _named(source: str | Path) -> bool:
    text = str(source).lower()
    return text.startswith(("medmnist:", "torchvision:", "torch/", "hfds/", "tfds/", "mosaics:")) or text == "mosaics"


def _open_named(
    source: str,
    classes: Sequence[str] | None,
    split: Split,
    root: Path | None,
    progress: Callable[[int, int], object] | None,
) -> LabelledImages:
    kind = source.lower()
    if kind.startswith("mosaics"):
        from sansmax.data.mosaics import open_mosaics

        return open_mosaics(source, classes)
    if kind.startswith("medmnist:"):
        from sansmax.data.medmnist import open_medmnist

        return open_medmnist(source, classes=classes, split=split, root=root, progress=progress)
    from sansmax.data.named import open_timm, open_torchvision

    opener = open_torchvision if kind.startswith("torchvision:") else open_timm
    return opener(source, classes=classes, split=split, root=root)


def _unrecognised(source: str | Path, path: Path) -> InputError:
    if path.is_file():
        return InputError(f"{source} is a file of a kind that holds no data set; allowed are {_ALLOWED}")
    parent = path.parent
    hint = ""
    if parent.is_dir():
        like = nearest(path.name, [p.name for p in parent.iterdir()])
        hint = f"; did you mean {' or '.join(repr(str(parent / name)) for name in like)}?" if like else ""
    elif str(source) != path.name:
        hint = f"; the folder {parent} does not exist either"
    return InputError(f"there is no {str(source)!r}{hint} Allowed are {_ALLOWED}")
