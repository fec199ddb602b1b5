"""Tables on the disk: the rows of a training run, and the predictions of a model.

`metrics.csv` is rewritten whole for each row, so a run that is killed leaves the table before or after the row, never
half a line. Its columns and their order never change within a file.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.errors import InputError, unknown_name
from sansmax.files import write_text

COLUMNS = (
    "epoch",
    "step",
    "seconds",
    "lr",
    "train_loss",
    "val_loss",
    "val_accuracy",
    "val_auc",
    "images_per_second",
)


def append_row(path: str | Path, row: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> Path:
    """Adds a row to the table, which is made with `columns` where there is none; a missing cell is empty."""
    path = Path(path)
    header, rows = read_table(path) if path.exists() else (list(columns), [])
    for name in row:
        if name not in header:
            raise unknown_name(f"column of {path.name}", name, header)
    return write_rows(path, header, [*rows, row])


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a table, oldest first: integers and floats as numbers, an empty cell as None."""
    return read_table(path)[1]


def truncate_rows(path: str | Path, step: int) -> list[dict[str, Any]]:
    """Drops the rows after `step` (training resumes there) and returns those that stay; without a table, none."""
    if not Path(path).exists():
        return []
    header, rows = read_table(path)
    if "step" not in header:
        raise InputError(f"{path} has no column 'step' to be cut by; its columns are {', '.join(header)}")
    kept = [row for row in rows if row["step"] is not None and row["step"] <= step]
    if len(kept) < len(rows):
        write_rows(path, header, kept)
    return kept


def read_table(path: str | Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Header and rows of a table."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    if not lines:
        raise InputError(f"{path} is empty, it has not even a header; remove it to start again")
    header = lines[0]
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise InputError(
                f"{path}, line {number}: {len(line)} cells, the header has {len(header)}; mend or remove it"
            )
    return header, [{name: parsed(cell) for name, cell in zip(header, line, strict=True)} for line in lines[1:]]


def parsed(cell: str) -> int | float | str | None:
    """A cell as what it looks like."""
    if cell == "":
        return None
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def written(value: Any) -> str:
    """A value as a cell: None and NaN are empty, floats keep every digit."""
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return ""
    return repr(float(value)) if isinstance(value, float | np.floating) else str(value)


def write_rows(path: str | Path, header: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes a whole table, or leaves the old one."""
    return write_text(path, as_csv([list(header), *([written(row.get(name)) for name in header] for row in rows)]))


def as_csv(lines: Sequence[Sequence[str]]) -> str:
    """Cells as CSV text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def write_predictions(
    path: str | Path,
    names: Sequence[str],
    labels: Sequence[int | None] | np.ndarray | None,
    probabilities: np.ndarray,
    classes: Sequence[str],
) -> tuple[Path, Path]:
    """Writes the predictions as CSV to `path` and as JSON beside it; returns both paths.

    Columns: `name`, `label` (class name, empty where unknown), `predicted`, `probability_CLASS` for each class.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    truth = [None] * len(names) if labels is None else list(labels)
    if p.shape != (len(names), len(classes)) or len(truth) != len(names):
        raise InputError(
            f"predictions of {len(names)} names and {len(classes)} classes need probabilities of shape "
            f"({len(names)}, {len(classes)}) and as many labels as names, given {p.shape} and {len(truth)} labels"
        )
    rows = [
        {
            "name": str(name),
            "label": None if label is None else str(classes[int(label)]),
            "predicted": str(classes[int(row.argmax())]),
            "probabilities": {str(c): float(v) for c, v in zip(classes, row, strict=True)},
        }
        for name, label, row in zip(names, truth, p, strict=True)
    ]
    header = ["name", "label", "predicted", *(f"probability_{c}" for c in classes)]
    lines = [[r["name"], r["label"] or "", r["predicted"], *map(repr, r["probabilities"].values())] for r in rows]
    table = write_text(path, as_csv([header, *lines]))
    plain = {"classes": [str(c) for c in classes], "predictions": rows}
    text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
    return table, write_text(Path(path).with_suffix(".json"), text + "\n")
