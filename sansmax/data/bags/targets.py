"""From the cells of a table to what a network is to predict."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sansmax.data.bags.tables import CaseRow, Table, is_missing
from sansmax.errors import InputError, listed, unknown_name

TASKS = ("classification", "multilabel", "regression", "survival")
YES = frozenset(("1", "1.0", "true", "yes", "positive", "event", "dead", "deceased", "death"))
NO = frozenset(("0", "0.0", "false", "no", "negative", "censored", "censor", "alive", "living"))
# distinct whole numbers past which a column is taken for a measurement
MOST_GRADES = 30


def guess_task(table: Table, labels: tuple[str, ...], given: Mapping[str, str | None]) -> str:
    """The task that a table is for: survival by its columns, several yes/no columns multilabel, else classes.

    Raises InputError where a single column holds measurements, or several hold anything but yes and no.
    """
    if given["time"] or given["status"]:
        return "survival"
    cells = {name: [row[name] for row in table.rows if not is_missing(row[name])] for name in labels}
    if len(labels) > 1:
        odd = [name for name in labels if any(yes_or_no(c) is None for c in cells[name])]
        if not odd:
            return "multilabel"
        raise InputError(
            f"{table.path}: several targets are either all yes or no (0 or 1), or measurements with --task "
            f"regression; {listed(odd, 10)} hold other values"
        )
    only = next(iter(labels))
    values = {number(c) for c in cells[only]}
    if None not in values and (len(values) > MOST_GRADES or any(v != round(v) for v in values if v is not None)):
        raise InputError(
            f"{table.path}: column {only!r} holds {len(values)} different numbers; say --task regression to "
            "predict them, or --task classification if each number is a class"
        )
    return "classification"


def number(cell: str) -> float | None:
    """The cell as a finite number, or None; a comma may stand for the point."""
    try:
        value = float(cell.replace(",", ".") if cell.count(",") == 1 and "." not in cell else cell)
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def yes_or_no(cell: str) -> bool | None:
    """True and False for the usual words of status (dead, event, 1 ... alive, censored, 0 ...), else None.

    A number before a colon, as in "1:DECEASED", is read past.
    """
    word = cell.strip().lower()
    head, colon, rest = word.partition(":")
    if colon and head in ("0", "1"):
        word = rest.strip()
    return True if word in YES else False if word in NO else None


def known_rows(rows: Sequence[CaseRow], task: str, labels: tuple[str, ...], notes: list[str]) -> list[CaseRow]:
    """The rows whose target is known; of several targets one suffices, of time and status both are needed."""
    if task not in TASKS:
        raise unknown_name("task", task, TASKS)
    needed = all if task == "survival" else any
    known = [r for r in rows if needed(not is_missing(r.cells[c]) for c in labels)]
    if left := len(rows) - len(known):
        names = [r.slide for r in rows if r not in known] if left <= 10 else []
        notes.append(f"{left} slides left out, their target is missing" + (f": {listed(names, 10)}" if names else ""))
    return known


@dataclass(frozen=True)
class Targets:
    """The target of each row by its slide: an integer, or a row of floats; and the names of classes or targets."""

    task: str
    classes: tuple[str, ...]
    by_slide: Mapping[str, tuple[float, ...]]

    def key(self, row: CaseRow) -> str:
        """What two slides of one patient must agree in; NaN agrees with NaN."""
        return repr(self.by_slide[row.slide])

    def shown(self, row: CaseRow) -> str:
        """The target in words."""
        values = self.by_slide[row.slide]
        return self.classes[int(values[0])] if self.task == "classification" else ", ".join(f"{v:g}" for v in values)

    def of(self, rows: Sequence[CaseRow]) -> np.ndarray:
        """The targets of these rows: `(n,)` int64 for classes, `(n, k)` float64 otherwise."""
        values = np.array([self.by_slide[r.slide] for r in rows], dtype=np.float64)
        return values[:, 0].astype(np.int64) if self.task == "classification" else values

    def counted(self, rows: Sequence[CaseRow]) -> str:
        """How many cases of each class, events among them, or how many values of each target."""
        values = self.of(rows)
        if self.task == "classification":
            counts = Counter(self.classes[v] for v in values)
            return listed([f"{counts[c]:,} {c}" for c in self.classes], 10)
        if self.task == "survival":
            return f"{int(values[:, 1].sum()):,} events"
        if self.task == "multilabel":
            return listed([f"{int(np.nansum(v)):,} {c}" for c, v in zip(self.classes, values.T, strict=True)], 10)
        spans = zip(self.classes, np.nanmin(values, axis=0), np.nanmax(values, axis=0), strict=True)
        return listed([f"{c} from {low:g} to {high:g}" for c, low, high in spans], 10)


def make_targets(
    path: Path, rows: Sequence[CaseRow], task: str, labels: tuple[str, ...], classes: Sequence[str] | None
) -> Targets:
    """The targets of rows that are all known; InputError names the line of a cell that is none."""
    if task == "classification":
        return _class_targets(path, rows, labels, classes)
    if classes is not None:
        raise InputError(f"the order of classes is for --task classification; {task} takes its names from the columns")
    if task == "survival":
        return Targets(task, ("risk",), {r.slide: _survival(path, r, labels) for r in rows})
    read = _label if task == "multilabel" else _measure
    for name in labels:
        if all(is_missing(r.cells[name]) for r in rows):
            raise InputError(f"{path}: column {name!r} has no value on any slide that is left; leave it out")
    return Targets(task, labels, {r.slide: tuple(read(path, r, c) for c in labels) for r in rows})


def _class_targets(
    path: Path, rows: Sequence[CaseRow], labels: tuple[str, ...], classes: Sequence[str] | None
) -> Targets:
    """Classes by name, whole numbers by size, or in the order given."""
    if len(labels) != 1:
        raise InputError(f"{path}: classification has one target, not {listed(labels, 10)}; say --task multilabel")
    cells = {r.slide: r.cells[labels[0]] for r in rows}
    found = set(cells.values())
    order = tuple(classes) if classes is not None else tuple(sorted(found, key=_grade_order))
    if strange := sorted(found - set(order)):
        raise InputError(f"{path}: {listed(strange, 10)} are in column {labels[0]!r} and not among the classes {order}")
    if len(found) < 2:
        raise InputError(
            f"{path}: all {len(cells)} slides are {next(iter(found), '')!r}; classification needs two classes or more"
        )
    place = {name: float(i) for i, name in enumerate(order)}
    return Targets("classification", order, {slide: (place[c],) for slide, c in cells.items()})


def _grade_order(name: str) -> tuple[int, float, str]:
    value = number(name)
    return (1, 0.0, name) if value is None else (0, value, name)


def _survival(path: Path, row: CaseRow, labels: tuple[str, ...]) -> tuple[float, ...]:
    time, status = number(row.cells[labels[0]]), yes_or_no(row.cells[labels[1]])
    if time is None or time < 0:
        raise _wrong(path, row, labels[0], "no time; a time is a number, zero or more")
    if status is None:
        words = "dead, deceased, event, yes, 1, true against alive, living, censored, no, 0, false"
        raise _wrong(path, row, labels[1], f"no status; allowed are {words}")
    return time, float(status)


def _label(path: Path, row: CaseRow, column: str) -> float:
    if is_missing(row.cells[column]):
        return float("nan")
    answer = yes_or_no(row.cells[column])
    if answer is None:
        raise _wrong(path, row, column, "no label; allowed are 1, yes, true, positive, 0, no, false, negative, NA")
    return float(answer)


def _measure(path: Path, row: CaseRow, column: str) -> float:
    if is_missing(row.cells[column]):
        return float("nan")
    value = number(row.cells[column])
    if value is None:
        raise _wrong(path, row, column, "no number; write NA where it is not known")
    return value


def _wrong(path: Path, row: CaseRow, column: str, why: str) -> InputError:
    return InputError(f"{path}, slide {row.slide!r} (line {row.line}): {row.cells[column]!r} in {column!r} is {why}")
