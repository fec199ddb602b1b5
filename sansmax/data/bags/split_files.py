"""Splits as files: CLAM's, STAMP's, GigaPath's, Patho-Bench's and TransMIL's are read; ours, STAMP's, CLAM's written.

splits.csv      ours: a row per case, a column `fold_0` ... per split with train, val or test
splits.json     STAMP's: {"splits": [{"train_patients": [...], "test_patients": [...]}]}; `val_patients` is added
splits_0.csv    CLAM's: columns train, val, test of slide ids, one file per split
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sansmax.data.bags.case_columns import CASE, SLIDE, Columns, fold_columns
from sansmax.data.bags.fold import PARTS, Fold
from sansmax.data.bags.matching import bare_id, find_id
from sansmax.data.bags.tables import CaseRow, Table, is_missing, plain_name, read_table
from sansmax.data.table import split_word
from sansmax.errors import InputError, listed
from sansmax.files import write_text

if TYPE_CHECKING:
    from sansmax.data.bags.cases import Cases


class Parts(dict[str, list[str]]):
    """The names of each part; `slides` says that they are of slides where a slide and a patient have one name."""

    def __init__(self, parts: Mapping[str, list[str]], *, slides: bool) -> None:
        super().__init__(parts)
        self.slides = slides


def read_splits(path: str | Path, cases: "Cases", allow_missing: bool = False) -> tuple[Fold, ...]:
    """The splits of a file, or of a folder with `splits_*.csv`, `train_*.csv`, `fold*.csv` or `splits.json`.

    Names may be patients or slides, with or without suffix. Raises InputError where a name is no case (unless
    `allow_missing`), or the slides of one patient are in different parts.
    """
    path = Path(path)
    if path.is_dir():
        raw = _folder(path)
    elif path.suffix == ".json":
        raw = _stamp(path)
    else:
        raw = _table(read_table(path))
    return tuple(_fold(f"{path}, split {k}", parts, cases, allow_missing) for k, parts in enumerate(raw))


def inline_folds(path: Path, rows: Sequence[CaseRow], columns: Columns, cases: "Cases") -> tuple[Fold, ...]:
    """The splits that columns of the table itself give; a column without any word for a part is none."""
    folds = []
    for column in columns.folds:
        words = {row.cells[column] for row in rows if not is_missing(row.cells[column])}
        if not any(split_word(w) for w in words):
            continue
        where = f"{path}, column {column!r}"
        parts = _by_word(where, [(r.slide, r.cells[column]) for r in rows], slides=True)
        folds.append(_fold(where, parts, cases, False))
    return tuple(folds)


def _places(cases: "Cases", slides_first: bool) -> dict[str, str]:
    """The case that each name means: its own, and those of its slides."""
    slides = {slide: name for name, own in zip(cases.ids, cases.slides, strict=True) for slide in own}
    bare = {bare_id(slide): name for slide, name in slides.items()}
    own = {name: name for name in cases.ids}
    return {**own, **bare, **slides} if slides_first else {**bare, **slides, **own}


def _fold(where: str, parts: Parts, cases: "Cases", allow_missing: bool) -> Fold:
    """A fold of cases from names of patients or slides; refuses patients in two parts."""
    known = _places(cases, parts.slides)
    owner = _patients(cases)
    unknown: list[str] = []
    out: dict[str, dict[str, None]] = {part: {} for part in PARTS}
    for part in PARTS:
        for name in parts.get(part, []):
            case = find_id(name, known)
            own = [case] if case is not None else owner.get(name, [])
            if not own:
                unknown.append(name)
            out[part].update(dict.fromkeys(own))
    if unknown and not allow_missing:
        raise InputError(
            f"{where}: {len(unknown)} names are no case with a target and a bag: {listed(unknown, 10)}; "
            "correct the split, or leave them out with --skip-bad"
        )
    try:
        fold = Fold(*(tuple(out[part]) for part in PARTS))
        check_patients(fold, cases)
    except InputError as e:
        raise InputError(f"{where}: {e}") from None
    return fold


def _patients(cases: "Cases") -> dict[str, list[str]]:
    """The cases of each patient."""
    owner: dict[str, list[str]] = {}
    for name, patient in zip(cases.ids, cases.groups, strict=True):
        owner.setdefault(patient, []).append(name)
    return owner


def check_patients(fold: Fold, cases: "Cases") -> None:
    """Raises InputError where cases of one patient are in two parts of a split."""
    patient = dict(zip(cases.ids, cases.groups, strict=True))
    Fold(*(tuple(dict.fromkeys(patient[name] for name in getattr(fold, part))) for part in PARTS))


def _folder(folder: Path) -> list[Parts]:
    """The splits of a folder, by the number in the names of its files."""
    clam = _numbered(folder, r"(?:splits_|fold_?)(\d+)\.csv")
    if clam:
        return [_only(_table(read_table(p)), p) for p in clam]
    if (folder / "splits.json").is_file():
        return _stamp(folder / "splits.json")
    giga = _numbered(folder, r"train_(\d+)\.csv")
    if giga:
        return [_gigapath(p) for p in giga]
    if (folder / "splits.csv").is_file():
        return _table(read_table(folder / "splits.csv"))
    raise InputError(
        f"{folder} holds no splits; known are splits_0.csv (CLAM), fold0.csv (TransMIL), splits.json (STAMP), "
        "train_0.csv with test_0.csv (GigaPath), splits.csv"
    )


def _numbered(folder: Path, pattern: str) -> list[Path]:
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := re.fullmatch(pattern, p.name))]
    return [p for _, p in sorted(found)]


def _only(splits: list[Parts], path: Path) -> Parts:
    if len(splits) != 1:
        raise InputError(f"{path} is one of several files and holds {len(splits)} splits itself; keep one form")
    return splits[0]


def _gigapath(train: Path) -> Parts:
    """The three tables of slides of one split; the one of val may be missing."""
    parts: dict[str, list[str]] = {}
    for part in PARTS:
        path = train.with_name(train.name.replace("train", part, 1))
        if part != "val" or path.is_file():
            table = read_table(path)
            column = table.required("slide", "--set data.slide_column=NAME", None, (*SLIDE, *CASE))
            parts[part] = [row[column] for row in table.rows]
    return Parts(parts, slides=True)


def _stamp(path: Path) -> list[Parts]:
    """STAMP's JSON."""
    try:
        entries: Any = json.loads(path.read_text(encoding="utf-8"))["splits"]
        names = {"train": "train_patients", "val": "val_patients", "test": "test_patients"}
        splits = [{p: [str(n) for n in entry.get(key, [])] for p, key in names.items()} for entry in entries]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(
            f'{path} is no file of splits ({e!r}); it must hold {{"splits": [{{"train_patients": [...], '
            '"test_patients": [...]}]}'
        ) from None
    return [Parts(split, slides=False) for split in splits]


def _table(table: Table) -> list[Parts]:
    """The splits of one table: columns train, val, test of names; or a row per name and a column per split."""
    by_part = {plain_name(c): c for c in table.columns if plain_name(c) in PARTS}
    if "train" in by_part and "test" in by_part:
        names = {p: [r[c] for r in table.rows if not is_missing(r[c])] for p, c in by_part.items()}
        return [Parts(names, slides=True)]
    folds = fold_columns(table)
    usual = (*SLIDE, *CASE) if set(map(plain_name, table.columns)) & set(SLIDE) else CASE
    name = table.column("case", "--group-column NAME", None, usual)
    if not folds or name is None:
        raise InputError(
            f"{table.path} holds no splits; it needs columns train, val and test of ids, or ids with columns fold_0, "
            f"fold_1 ... of train, val and test; its columns are {', '.join(table.columns)}"
        )
    slides = plain_name(name) in SLIDE
    return [
        _by_word(f"{table.path}, column {f!r}", [(r[name], r[f]) for r in table.rows], slides=slides) for f in folds
    ]


def _by_word(where: str, named: Iterable[tuple[str, str]], *, slides: bool) -> Parts:
    """Names by the part that a word beside them says; a missing word leaves a name out."""
    parts = Parts({part: [] for part in PARTS}, slides=slides)
    for name, word in named:
        if is_missing(word):
            continue
        part = split_word(word)
        if part is None:
            raise InputError(
                f"{where}: {word!r} (of {name!r}) is no part; allowed are train, val, test, and NA for none"
            )
        parts[part].append(name)
    return parts


def write_splits(folds: Sequence[Fold], cases: "Cases", folder: str | Path) -> None:
    """Writes the splits as splits.csv, as STAMP's splits.json and as CLAM's splits_0.csv, splits_1.csv ..."""
    folder = Path(folder)
    header = ["case_id", *(f"fold_{k}" for k in range(len(folds)))]
    words = [{name: part for part in PARTS for name in getattr(fold, part)} for fold in folds]
    rows = [[name, *(w.get(name, "") for w in words)] for name in cases.ids]
    _write_csv(folder / "splits.csv", [header, *rows])
    entries = [{f"{part}_patients": list(getattr(fold, part)) for part in PARTS} for fold in folds]
    write_text(folder / "splits.json", json.dumps({"splits": entries}, indent=1, ensure_ascii=False) + "\n")
    slides = dict(zip(cases.ids, cases.slides, strict=True))
    for k, fold in enumerate(folds):
        columns = [[slide for name in getattr(fold, part) for slide in slides[name]] for part in PARTS]
        most = max(map(len, columns))
        padded = [column + [""] * (most - len(column)) for column in columns]
        lines = [[str(i), *cells] for i, cells in enumerate(zip(*padded, strict=True))]
        _write_csv(folder / f"splits_{k}.csv", [["", *PARTS], *lines])


def _write_csv(path: Path, lines: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    write_text(path, text.getvalue())
