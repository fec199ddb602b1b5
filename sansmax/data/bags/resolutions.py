"""A table of resolutions: micrometres per pixel, slide by slide, as TRIDENT's lists have them."""

import csv
import math
from pathlib import Path

from sansmax.errors import InputError

_SLIDE_COLUMNS = ("slide_id", "slide", "wsi", "filename", "file", "name", "id")


def read_mpp_table(path: str | Path) -> dict[str, float]:
    """Micrometres per level-0 pixel by slide id, of a CSV file with the columns slide_id (or wsi) and mpp.

    Names of slides may have their file's suffix and folder, as in TRIDENT's lists: each slide is known under all of
    them. A field without a number is a slide left out. Raises InputError for a table that cannot be read, lacks a
    column, or has something else than positive numbers, or two resolutions of one slide.
    """
    path = Path(path).expanduser()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = {name.strip().lower(): name for name in reader.fieldnames or ()}
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise InputError(f"cannot read the table {path}: {e}") from None
    slide = next((columns[name] for name in _SLIDE_COLUMNS if name in columns), None)
    if slide is None or "mpp" not in columns:
        found = ", ".join(columns) or "none"
        raise InputError(f"{path} has the columns {found}; a table of resolutions has slide_id (or wsi) and mpp")
    known: dict[str, float] = {}
    for line, row in enumerate(rows, 2):
        name, value = (row[slide] or "").strip(), (row[columns["mpp"]] or "").strip()
        if not name or not value:
            continue
        number = _positive(value, path, line)
        if known.setdefault(name, number) != number:
            raise InputError(f"{path}, line {line}: {name} has two resolutions, {known[name]:g} and {number:g}")
    return _all_spellings(known)


def _all_spellings(known: dict[str, float]) -> dict[str, float]:
    """Each slide also without folder and suffix; what then stands for two slides that differ is left out."""
    shorter: dict[str, set[float]] = {}
    for name, number in known.items():
        for spelling in (Path(name).name, _bare(name)):
            shorter.setdefault(spelling, set()).add(number)
    return {**{name: numbers.pop() for name, numbers in shorter.items() if len(numbers) == 1}, **known}


def _bare(name: str) -> str:
    """A slide's name without folder and suffix; suffixes such as .ome.tiff go as one."""
    stem = Path(name).stem
    return stem[: -len(".ome")] if stem.lower().endswith(".ome") else stem


def _positive(value: str, path: Path, line: int) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise InputError(f"{path}, line {line}: mpp is micrometres per pixel such as 0.25, got {value!r}")
    return number
