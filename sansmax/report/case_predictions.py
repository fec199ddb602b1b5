"""Predictions of cases as a table that STAMP's statistics read, and back.

classification   PATIENT, <target>, pred, <target>_<class> ..., loss
multilabel       PATIENT, and for each label <label>, pred_<label>, <label>_1; loss
regression       PATIENT, <target>, pred, loss; of several targets <target>, pred_<target> each
survival         PATIENT, <time>, <status>, pred_score (a larger risk means an earlier event)

`fold` is added as the last column, `SLIDE` as the second where each slide is a case.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sansmax.errors import InputError
from sansmax.files import write_text
from sansmax.report.tables import as_csv, written

SMALLEST = np.finfo(np.float64).eps


@dataclass(frozen=True)
class CasePredictions:
    """What was predicted of each case, and what is true.

    targets as in `Cases.targets`; predictions `(n, outputs)` float64: probabilities, values or risks; `folds` `(n,)`
    is the split whose network predicted a case; `target` the columns that the targets come from; `patients` of the
    cases, None where cases are patients.
    """

    task: str
    target: tuple[str, ...]
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    targets: np.ndarray
    predictions: np.ndarray
    folds: np.ndarray
    patients: tuple[str, ...] | None = None

    @property
    def groups(self) -> tuple[str, ...]:
        """The patient of each case."""
        return self.patients if self.patients is not None else self.ids

    def pick(self, rows: np.ndarray) -> "CasePredictions":
        """The cases with these numbers."""
        return replace(
            self,
            ids=tuple(self.ids[i] for i in rows),
            targets=self.targets[rows],
            predictions=self.predictions[rows],
            folds=self.folds[rows],
            patients=None if self.patients is None else tuple(self.patients[i] for i in rows),
        )

    def in_fold(self, fold: int) -> "CasePredictions":
        """The cases that one split tested."""
        return self.pick(np.flatnonzero(self.folds == fold))

    @classmethod
    def joined(cls, parts: Sequence["CasePredictions"]) -> "CasePredictions":
        """The cases of several splits, one after the other."""
        first = parts[0]
        patients = None if first.patients is None else tuple(g for part in parts for g in part.groups)
        return replace(
            first,
            ids=tuple(name for part in parts for name in part.ids),
            targets=np.concatenate([part.targets for part in parts]),
            predictions=np.concatenate([part.predictions for part in parts]),
            folds=np.concatenate([part.folds for part in parts]),
            patients=patients,
        )


def write_case_predictions(path: str | Path, preds: CasePredictions) -> Path:
    """Writes the table, whole or not at all; floats keep every digit."""
    columns = _columns(preds)
    first: dict[str, Sequence[object]] = {"PATIENT": preds.groups}
    if preds.patients is not None:
        first["SLIDE"] = preds.ids
    every = {**first, **columns, "fold": preds.folds.tolist()}
    lines = [[written(v) for v in row] for row in zip(*every.values(), strict=True)]
    return write_text(path, as_csv([list(every), *lines]))


def _columns(preds: CasePredictions) -> dict[str, Sequence[object]]:
    """Truth, prediction and loss by the name of the column."""
    y, p, target = preds.targets, preds.predictions, preds.target
    if preds.task == "classification":
        named = {f"{target[0]}_{c}": p[:, i].tolist() for i, c in enumerate(preds.classes)}
        loss = -np.log(np.clip(p[np.arange(len(y)), y], SMALLEST, 1))
        truth, best = [preds.classes[i] for i in y], [preds.classes[i] for i in p.argmax(axis=1)]
        return {target[0]: truth, "pred": best, **named, "loss": loss.tolist()}
    if preds.task == "survival":
        return {target[0]: y[:, 0].tolist(), target[1]: _whole(y[:, 1]), "pred_score": p[:, 0].tolist()}
    out: dict[str, Sequence[object]] = {}
    for i, name in enumerate(target):
        out[name] = _whole(y[:, i]) if preds.task == "multilabel" else y[:, i].tolist()
        pred = f"pred_{name}" if preds.task == "multilabel" or len(target) > 1 else "pred"
        out[pred] = (p[:, i] > 0.5).astype(int).tolist() if preds.task == "multilabel" else p[:, i].tolist()
        if preds.task == "multilabel":
            out[f"{name}_1"] = p[:, i].tolist()
    each = (y - p) ** 2
    if preds.task == "multilabel":
        each = -np.log(np.clip(np.where(y == 1, p, 1 - p), SMALLEST, 1))
    each = np.where(np.isnan(y), 0, each).sum(axis=1) / np.maximum((~np.isnan(y)).sum(axis=1), 1)
    return {**out, "loss": each.tolist()}


def _whole(values: np.ndarray) -> list[int | None]:
    return [None if np.isnan(v) else int(v) for v in values]


def read_case_predictions(
    path: str | Path, task: str, target: Sequence[str], classes: Sequence[str]
) -> CasePredictions:
    """The table that `write_case_predictions` wrote; InputError where a column is missing or a cell is none."""
    import csv

    path = Path(path)
    if not path.is_file():
        raise InputError(
            f"there is no {path}; the cross-validation has not come to its end: run it again with --resume"
        )
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return _parsed(rows, task, tuple(target), tuple(classes))
    except (KeyError, ValueError, TypeError) as e:
        raise InputError(f"{path} is no table of predictions for {task} of {', '.join(target)} ({e!r})") from None


def _parsed(
    rows: list[dict[str, str]], task: str, target: tuple[str, ...], classes: tuple[str, ...]
) -> CasePredictions:
    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) if row[name] else np.nan for row in rows], dtype=np.float64)

    if task == "classification":
        y = np.array([classes.index(row[target[0]]) for row in rows], dtype=np.int64)
        names = [f"{target[0]}_{c}" for c in classes]
    else:
        y = np.stack([column(name) for name in target], axis=1)
        names = {
            "survival": ["pred_score"],
            "multilabel": [f"{name}_1" for name in target],
            "regression": ["pred"] if len(target) == 1 else [f"pred_{name}" for name in target],
        }[task]
    by_slide = bool(rows) and "SLIDE" in rows[0]
    return CasePredictions(
        task,
        target,
        classes,
        tuple(row["SLIDE" if by_slide else "PATIENT"] for row in rows),
        y,
        np.stack([column(name) for name in names], axis=1),
        np.array([int(row["fold"]) for row in rows], dtype=np.int64),
        tuple(row["PATIENT"] for row in rows) if by_slide else None,
    )
