"""The rows of a table of slides, or of STAMP's two (targets by patient, files of each patient), in one form."""

from pathlib import Path

from sansmax.data.bags.case_columns import CASE, SLIDE, Columns
from sansmax.data.bags.tables import CaseRow, Row, Table, is_missing
from sansmax.errors import InputError, listed


def join_tables(table: Table, columns: Columns, notes: list[str]) -> list[CaseRow]:
    """One row per slide; of two tables those that both have, the others in a note.

    Raises InputError where a patient or slide is unnamed, or a slide is there twice.
    """
    if columns.slides is None:
        return _unique(table.path, [_row(table.path, row, columns) for row in table.rows])
    return _unique(columns.slides.path, _join_stamp(table, columns.slides, columns, notes))


def _row(path: Path, row: Row, columns: Columns) -> CaseRow:
    slide = row[columns.slide or ""]
    case = row[columns.case] if columns.case else ""
    for kind, value in (("slide", slide), ("patient", case if columns.case else slide)):
        if is_missing(value):
            raise InputError(f"{path}, line {row.line}: the {kind} has no name; fill it in or remove the row")
    cells = {c: row[c] for c in (*columns.labels, *columns.folds)}
    return CaseRow(case, slide, cells, row[columns.site] if columns.site else None, row.line)


def _unique(path: Path, rows: list[CaseRow]) -> list[CaseRow]:
    """The rows as they are, unless a slide has two."""
    first: dict[str, int] = {}
    again = [r for r in rows if first.setdefault(r.slide, r.line) != r.line]
    twice = [f"{r.slide!r} (lines {first[r.slide]} and {r.line})" for r in again]
    if twice:
        raise InputError(f"{path}: {len(twice)} slides are there twice: {listed(twice, 10)}; keep one row of each")
    return rows


def _join_stamp(clini: Table, slides: Table, columns: Columns, notes: list[str]) -> list[CaseRow]:
    """One row per slide, the patient's target with it; a patient's rows need not be adjacent in either table.

    Patients without a slide and slides of unknown patients are left out with a note. Raises InputError for two rows
    of one patient in the clini table, and for files of a slide table that do not end in .h5 where one does.
    """
    assert columns.case is not None
    # the patient's column has one name in both tables, or a usual one in the second
    own = columns.case if columns.case in slides.columns else None
    case = slides.required("patient", "--group-column NAME", own, CASE)
    file = slides.required("file", "--set data.slide_column=NAME", None, ("filename", *SLIDE))
    people = _by_patient(clini, columns.case)
    rows: list[CaseRow] = []
    strangers: list[str] = []
    for row in slides.rows:
        if is_missing(row[file]) or is_missing(row[case]):
            raise InputError(f"{slides.path}, line {row.line}: patient or file has no name; fill it in or remove it")
        _check_suffix(slides, row.line, row[file], file)
        if row[case] not in people:
            strangers.append(row[case])
            continue
        of = people[row[case]]
        cells = {c: of[c] for c in (*columns.labels, *columns.folds)}
        rows.append(CaseRow(row[case], row[file], cells, of[columns.site] if columns.site else None, row.line))
    seen = {r.case for r in rows}
    if alone := [name for name in people if name not in seen]:
        notes.append(
            f"{len(alone)} patients of {clini.path.name} have no slide in {slides.path.name}: {listed(alone, 10)}"
        )
    if strangers := list(dict.fromkeys(strangers)):
        notes.append(
            f"{len(strangers)} patients of {slides.path.name} are not in {clini.path.name}: {listed(strangers, 10)}"
        )
    return rows


def _by_patient(clini: Table, case: str) -> dict[str, Row]:
    """The row of each patient."""
    people: dict[str, Row] = {}
    for row in clini.rows:
        name = row[case]
        if is_missing(name):
            raise InputError(f"{clini.path}, line {row.line}: the patient has no name; fill it in or remove the row")
        if name in people:
            raise InputError(
                f"{clini.path}: patient {name!r} is there twice, in lines {people[name].line} and {row.line}; keep one"
            )
        people[name] = row
    return people


def _check_suffix(slides: Table, line: int, name: str, column: str) -> None:
    """STAMP's own column holds files of features; pictures there are a mistake that STAMP refuses, too."""
    if column == "FILENAME" and not name.endswith(".h5"):
        raise InputError(
            f"{slides.path}, line {line}: FILENAME {name!r} does not end in .h5; name the file of features relative "
            "to their folder"
        )
