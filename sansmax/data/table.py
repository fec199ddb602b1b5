"""Reads a table of images: a CSV file with one row per image."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sansmax.data.images import IMAGE_SUFFIXES
from sansmax.data.listing import Listing, Row
from sansmax.data.sets import SPLITS, BadImage
from sansmax.errors import InputError, listed, nearest

_NAMES = {
    "path": (
        *("path", "image_path", "img_path", "file_path", "filepath", "relative_path", "filename", "file_name", "file"),
        *("image_file", "image", "img", "image_name", "image_id", "img_id", "name"),
    ),
    "label": (
        *("label", "labels", "class", "class_name", "class_label", "target", "diagnosis", "dx", "category", "grade"),
        *("ground_truth", "y"),
    ),
    "split": ("split", "set", "subset", "partition", "fold", "phase"),
    "group": (
        *("group", "group_id", "patient", "patient_id", "patientid", "patient_name", "case", "case_id", "caseid"),
        *("subject", "subject_id", "subjectid"),
    ),
}
_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_word(word: str) -> str | None:
    """`train`, `val` or `test` for the usual words for them."""
    return _SPLIT_WORDS.get(word.strip().lower())


@dataclass(frozen=True)
class _Table:
    path: Path
    columns: list[str]
    # (line number, fields), one per image
    rows: list[tuple[int, dict[str, str]]]

    def column(self, kind: str, given: str | None, *, required: bool) -> str | None:
        """The column of this kind: the one that was named, else the one with a usual name."""
        flag = f"--{kind}-column NAME"
        has = f"the columns are {', '.join(self.columns)}"
        if given is not None:
            if given in self.columns:
                return given
            like = nearest(given, self.columns, 1)
            hint = f"; did you mean {like[0]!r}?" if like else ""
            raise InputError(f"{self.path} has no column {given!r}: {has}; correct {flag}{hint}")
        plain = {c.strip().lower().replace(" ", "_").replace("-", "_"): c for c in self.columns}
        found = [plain[name] for name in _NAMES[kind] if name in plain]
        if len(found) > 1 and kind in ("label", "group"):
            raise InputError(f"{self.path} has several {kind} columns: {', '.join(found)}; choose one with {flag}")
        if not found and required:
            raise InputError(f"{self.path} has no {kind} column that can be recognised: {has}; name it with {flag}")
        return found[0] if found else None


def read_table(
    path: Path,
    *,
    path_column: str | None = None,
    label_column: str | None = None,
    split_column: str | None = None,
    group_column: str | None = None,
    root: Path | None = None,
    skip_bad: bool = False,
) -> Listing:
    """The images that a CSV file lists, with their labels and, where it says so, splits and groups.

    Comma, semicolon or tab; UTF-8. Columns are recognised by their usual names in any case, or named. Paths are
    absolute, or relative to the folder of the table (or `root`), also under `<split>/` and `images/` there, with or
    without a suffix.
    """
    table = _parse(path)
    kinds = {"path": path_column, "label": label_column, "split": split_column, "group": group_column}
    columns = {k: table.column(k, given, required=k in ("path", "label")) for k, given in kinds.items()}
    notes = []
    if split_column is None and columns["split"] and not any(split_word(f[columns["split"]]) for _, f in table.rows):
        values = listed(sorted({fields[columns["split"]] for _, fields in table.rows}))
        notes.append(f"column {columns['split']!r} not used, its values are {values}")
        columns["split"] = None
    folder = root or path.parent
    rows: list[Row] = []
    missing: list[tuple[int, str, str]] = []
    for line, fields in table.rows:
        value, split, row_split = _cells(table, line, fields, columns)
        found = _find(folder, value, split)
        if found is None:
            missing.append((line, value, row_split or ""))
            continue
        group = fields[columns["group"]] if columns["group"] else None
        rows.append(Row(found, _name(found, folder), fields[columns["label"] or ""], group, row_split, f"line {line}"))
    if missing and (not skip_bad or not rows):
        line, value, _ = missing[0]
        more = f" ({len(missing) - 1} further files are missing)" if len(missing) > 1 else ""
        raise InputError(
            f"{path}, line {line}: there is no file {value!r} in {folder}{more}; correct the table, give the folder "
            "of the images with --root, or pass --skip-bad"
        )
    bad = tuple(BadImage(value, f"no such file (line {line})") for line, value, _ in missing)
    origin = f"given by column {columns['split']!r}" if columns["split"] else ""
    return Listing(str(path), rows, bad=bad, split_note=origin, notes=tuple(notes))


def _cells(
    table: _Table, line: int, fields: dict[str, str], columns: dict[str, str | None]
) -> tuple[str, str | None, str | None]:
    for kind, column in columns.items():
        if column and not fields[column]:
            raise InputError(
                f"{table.path}, line {line}: the {kind} (column {column!r}) is missing; fill it in or remove the row"
            )
    split = fields[columns["split"]] if columns["split"] else None
    word = split_word(split) if split is not None else None
    if split is not None and word is None:
        raise InputError(
            f"{table.path}, line {line}: unknown split {split!r} in column {columns['split']!r}; allowed are "
            f"{', '.join(SPLITS)}, valid, validation"
        )
    return fields[columns["path"] or ""], split, word


def _find(folder: Path, value: str, split: str | None) -> Path | None:
    # tables written on Windows
    values = [value] + ([value.replace("\\", "/")] if "\\" in value else [])
    for v in values:
        places = [folder / v] + ([folder / split / v] if split else []) + [folder / "images" / v]
        for place in places:
            if place.is_file():
                return place
        # identifiers without a suffix
        for place in places:
            if place.suffix.lower() in IMAGE_SUFFIXES:
                continue
            for suffix in sorted(IMAGE_SUFFIXES):
                for ending in (suffix, suffix.upper()):
                    if (whole := place.with_name(place.name + ending)).is_file():
                        return whole
    return None


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _parse(path: Path) -> _Table:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save the table as CSV with UTF-8 encoding") from None
    header = text.partition("\n")[0]
    if not header.strip():
        raise InputError(f"{path} has no header line; its first line must name the columns")
    separator = max((",", ";", "\t"), key=lambda s: len(next(csv.reader([header], delimiter=s))))
    try:
        return _rows(path, csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    except csv.Error as e:
        raise InputError(f"{path} is no table ({e}); save it as CSV") from None


def _rows(path: Path, reader: Any) -> _Table:
    columns = [c.strip() for c in next(reader)]
    twice = [c for c in columns if c and columns.count(c) > 1]
    if twice:
        raise InputError(f"{path} has two columns {twice[0]!r}; rename one")
    rows = []
    for cells in reader:
        if not any(c.strip() for c in cells):
            continue
        rows.append((reader.line_num, _fields(path, reader.line_num, columns, cells)))
    if not rows:
        raise InputError(f"{path} has a header line and no rows; list one image per line")
    return _Table(path, columns, rows)


def _fields(path: Path, line: int, columns: Sequence[str], cells: list[str]) -> dict[str, str]:
    if len(cells) != len(columns):
        raise InputError(
            f"{path}, line {line}: {len(cells)} fields where the header has {len(columns)}; "
            "put text that holds the separator in double quotes"
        )
    return {c: cell.strip() for c, cell in zip(columns, cells, strict=True)}
