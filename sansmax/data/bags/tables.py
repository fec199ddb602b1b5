"""Tables of patients and slides as text: CSV, TSV or a sheet of Excel, every cell as it was typed.

Cells stay strings, so zero-padded identifiers keep their zeros.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sansmax.errors import InputError, nearest
from sansmax.optional import need

EXCEL = (".xlsx", ".xlsm")
# the spellings of a missing value that the field's tables use
MISSING = frozenset(("", "na", "nan", "none", "n/a", "null", "?", "-", "--", "#n/a", "=#value!", "#value!", "<na>"))


def is_missing(cell: str) -> bool:
    """Whether a cell says that its value is not known: empty, NA, NaN, None, N/A, NULL, ?, -, --, #N/A, =#VALUE!."""
    return cell.strip().lower() in MISSING


@dataclass(frozen=True)
class Row:
    """One line of a table: its number in the file, and its cells by column."""

    line: int
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]


@dataclass(frozen=True)
class Table:
    """A table that was read: where it is, the names of its columns, its rows."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def column(self, kind: str, flag: str, given: str | None, usual: Iterable[str] = ()) -> str | None:
        """The column that was named, else the first with a `usual` name in any case; None where there is none.

        Raises InputError for a name that is no column.
        """
        if given is not None:
            if given in self.columns:
                return given
            like = nearest(given, self.columns, 1)
            hint = f"; did you mean {like[0]!r}?" if like else ""
            raise InputError(
                f"{self.path} has no column {given!r} for the {kind}; its columns are {', '.join(self.columns)}; "
                f"correct {flag}{hint}"
            )
        plain = {plain_name(c): c for c in reversed(self.columns)}
        return next((plain[name] for name in usual if name in plain), None)

    def required(self, kind: str, flag: str, given: str | None, usual: Iterable[str]) -> str:
        """The same, but a column that is not there is an InputError that names the flag."""
        found = self.column(kind, flag, given, usual)
        if found is None:
            raise InputError(
                f"{self.path} has no column for the {kind} that can be recognised; its columns are "
                f"{', '.join(self.columns)}; name one with {flag}"
            )
        return found


@dataclass(frozen=True)
class CaseRow:
    """One slide of a table: its patient, its own id as written, its cells of targets and parts, where it stands.

    The patient is empty where the table has none, and each slide stands for itself.
    """

    case: str
    slide: str
    cells: Mapping[str, str]
    site: str | None
    line: int


def plain_name(column: str) -> str:
    """A column's name in lower case, with underscores."""
    return column.strip().lower().replace(" ", "_").replace("-", "_")


def read_table(path: str | Path) -> Table:
    """The rows of a CSV, TSV or Excel file (its first sheet); empty lines are left out.

    Comma, semicolon or tab, whichever makes the most columns of the header; UTF-8. An unnamed column is called
    "column 1" and so on. Raises InputError for a file that is missing, no table, without rows, or with two columns
    of one name.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no table {path}; give a CSV, TSV or XLSX file")
    lines = _excel_lines(path) if path.suffix.lower() in EXCEL else _text_lines(path)
    if not lines or not any(lines[0][1]):
        raise InputError(f"{path} has no header line; its first line must name the columns")
    columns = tuple(name or f"column {i}" for i, name in enumerate(lines[0][1], start=1))
    twice = [c for c in columns if columns.count(c) > 1]
    if twice:
        raise InputError(f"{path} has two columns {twice[0]!r}; rename one")
    rows = tuple(_row(path, columns, line, cells) for line, cells in lines[1:] if any(cells))
    if not rows:
        raise InputError(f"{path} has a header line and no rows")
    return Table(path, columns, rows)


def _row(path: Path, columns: Sequence[str], line: int, cells: list[str]) -> Row:
    if len(cells) != len(columns):
        raise InputError(
            f"{path}, line {line}: {len(cells)} cells where the header has {len(columns)}; put text that holds the "
            "separator in double quotes"
        )
    return Row(line, dict(zip(columns, cells, strict=True)))


def _text_lines(path: Path) -> list[tuple[int, list[str]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text; save the table as CSV with UTF-8 encoding, or as XLSX") from None
    header = text.partition("\n")[0]
    separator = max((",", ";", "\t"), key=lambda s: len(next(csv.reader([header], delimiter=s), [])))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        return [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if cells]
    except csv.Error as e:
        raise InputError(f"{path} is no table ({e}); save it as CSV or XLSX") from None


def _excel_lines(path: Path) -> list[tuple[int, list[str]]]:
    openpyxl = need("openpyxl", "slides")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as e:  # a torn file raises whatever its archive or its XML raises
        raise InputError(f"{path} cannot be read as an Excel file ({e}); save it again, or as CSV") from None
    try:
        rows = [[excel_cell(v) for v in row] for row in book.worksheets[0].iter_rows(values_only=True)]
    finally:
        book.close()
    width = max((i + 1 for row in rows for i, cell in enumerate(row) if cell), default=0)
    return [(n, (row + [""] * width)[:width]) for n, row in enumerate(rows, start=1)]


def excel_cell(value: object) -> str:
    """A cell as it looks: whole numbers without the point that Excel's floats would give them."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()
