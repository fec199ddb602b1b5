"""The page of precisions: digits, verdicts and time of each attention in each type, as Markdown and CSV."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sansmax.report.summary import table, write_summary
from sansmax.report.tables import write_rows

Row = Mapping[str, Any]
COLUMNS = (
    "mechanism",
    "precision",
    "inputs",
    "tokens",
    "state",
    "output",
    "output_rounding",
    "gradient",
    "gradient_rounding",
    "finite",
    "scale",
    "time_ratio",
)
WORST = ("PASS", "WARN", "FAIL")
TEXT = (
    "Errors are the largest difference from float64 over the largest entry, of gradients the worst of the input and "
    "all parameters; beside them, in brackets, what rounding the tokens, the weights and what enters and leaves the "
    "projections costs by itself. PASS: no more than some 8 times that, and 10 % at most. WARN: more than 10 %, though "
    "the arithmetic adds little: these tokens need more digits than the type has. FAIL: not finite, or the arithmetic "
    "loses much more than it must. Gradients of float16 are those of a scaled loss."
)


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """The rows by their verdict, those that fail first, and of one verdict the largest error first."""
    return sorted(rows, key=lambda r: (-WORST.index(r["state"]), -max(_size(r["output"]), _size(r["gradient"]))))


def _size(error: float) -> float:
    return float("inf") if error != error else error


def errors_text(row: Row) -> str:
    """Errors of output and gradient, what rounding costs in brackets."""
    if not row["finite"]:
        return "not finite"
    pairs = ((row["output"], row["output_rounding"]), (row["gradient"], row["gradient_rounding"]))
    return " / ".join(f"{error:.0e} ({rounding:.0e})" for error, rounding in pairs)


def grouped(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by the values of some of their columns, in their order."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def write_numerics(
    folder: str | Path, rows: Sequence[Row], inputs: Mapping[str, str], again: str, stem: str = "numerics"
) -> list[Path]:
    """Writes the table and the page; `inputs` says in words what each kind of tokens is, `again` how to redo it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections = [("", TEXT)]
    for (kind,), some in grouped(rows, "inputs").items():
        sections.append((f"{kind}: {inputs[kind]}", _errors(some)))
    sections += [("Time forward and backward over that of float32", _times(rows)), ("Do it again", again)]
    page = write_summary(folder / f"{stem}.md", "Precision", sections)
    return [write_rows(folder / f"{stem}.csv", COLUMNS, rows), page]


def _errors(rows: Sequence[Row]) -> str:
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    lines = []
    for (mechanism, n), some in grouped(rows, "mechanism", "tokens").items():
        by = {row["precision"]: row for row in some}
        cells = [f"{by[p]['state']} {errors_text(by[p])}" if p in by else "" for p in precisions]
        lines.append([mechanism, n, *cells])
    return table(["attention", "tokens", *(f"{p}: output / gradient" for p in precisions)], lines)


def _times(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if row["time_ratio"] is not None]
    if not timed:
        return ""
    precisions = [p for p in dict.fromkeys(row["precision"] for row in timed) if p != "float32"]
    lines = []
    for (mechanism, n), some in grouped(timed, "mechanism", "tokens").items():
        by = {row["precision"]: row["time_ratio"] for row in some}
        lines.append([mechanism, n, *(f"{by[p]:.2f}" for p in precisions)])
    return table(["attention", "tokens", *precisions], lines)
