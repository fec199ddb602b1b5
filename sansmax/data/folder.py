"""Lists a folder with one sub-folder of images per class, as it is or under train/, val/ and test/."""

import os
from pathlib import Path

from sansmax.data.images import IMAGE_SUFFIXES
from sansmax.data.listing import Listing, Row
from sansmax.data.table import split_word
from sansmax.errors import InputError, listed

_LAYOUT = "a folder of images has one sub-folder per class, as it is or under train/, val/ and test/"


def read_folder(folder: Path) -> Listing:
    """The images of a folder: the class is the sub-folder, the split the folder above it where there is one.

    Images may lie deeper within a class. Hidden files, files that are no images and files beside the class folders
    are passed over.
    """
    inside = _folders(folder)
    splits = {d: word for d in inside if (word := split_word(d.name))}
    if "train" in splits.values() or (splits and len(splits) == len(inside)):
        _one_folder_per_split(folder, splits)
        rows = [row for d in splits for row in _classes(folder, d, splits[d])]
        unused = [d.name for d in inside if d not in splits]
        notes = (f"not used: {listed(unused)}",) if unused else ()
        names = ", ".join(f"{d.name}/" for d in splits)
        return Listing(str(folder), rows, split_note=f"given by the folders {names}", notes=notes)
    return Listing(str(folder), _classes(folder, folder, None))


def _folders(folder: Path) -> list[Path]:
    return sorted(d for d in folder.iterdir() if d.is_dir() and not d.name.startswith((".", "__")))


def _one_folder_per_split(folder: Path, splits: dict[Path, str]) -> None:
    for word in set(splits.values()):
        same = [d.name for d, w in splits.items() if w == word]
        if len(same) > 1:
            raise InputError(f"{folder} has several folders for {word}: {', '.join(same)}; keep one")


def _classes(source: Path, folder: Path, split: str | None) -> list[Row]:
    classes = _folders(folder)
    if not classes:
        raise InputError(f"{folder} has no class folders: {_LAYOUT}{_tables_hint(source)}")
    rows: list[Row] = []
    for directory in classes:
        found = _images(directory)
        if not found:
            raise InputError(_empty(directory, source))
        rows += [
            Row(path, path.relative_to(source).as_posix(), directory.name, None, split, directory.name)
            for path in found
        ]
    return rows


def _images(directory: Path) -> list[Path]:
    found = []
    for where, folders, files in os.walk(directory):
        folders[:] = [f for f in folders if not f.startswith((".", "__"))]
        found += [Path(where, f) for f in files if not f.startswith(".") and Path(f).suffix.lower() in IMAGE_SUFFIXES]
    return sorted(found)


def _empty(directory: Path, source: Path) -> str:
    others = sorted({p.suffix for p in directory.rglob("*") if p.is_file() and not p.name.startswith(".")})
    holds = f" (it holds {listed([s or 'files without a suffix' for s in others])})" if others else ""
    return (
        f"the class folder {directory} has no image{holds}; remove it, or add images "
        f"({', '.join(sorted(IMAGE_SUFFIXES))}){_tables_hint(source)}"
    )


def _tables_hint(source: Path) -> str:
    tables = sorted(source.glob("*.csv"))
    return f"; if {tables[0]} lists the images, give that file instead" if tables else ""
