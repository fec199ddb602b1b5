"""How good the probabilities of a model are, with 95 % bootstrap intervals.

    metrics = measure(labels, probabilities, classes, groups=patients)
    metrics["auc"].value, metrics["auc"].low, metrics["auc"].high

Intervals are percentiles over resamples of whole patients (of images where no groups are given). They tell how much
another test set of this kind and size would vary, not how much another training run would.
"""

import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np

from sansmax.errors import InputError
from sansmax.report.resample import Interval, draw_weights, group_codes, percentile_interval
from sansmax.report.scores import all_scores

__all__ = ["TITLES", "ClassScores", "Interval", "Metrics", "compare_paired", "measure"]

TITLES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "kappa": "quadratic kappa",
    "log_loss": "log loss",
    "calibration_error": "calibration error",
}
RESAMPLES = 2000
# images x classes x resamples past which resamples are saved, but never below FEWEST: about a minute of ranking
WORK, FEWEST = 5e9, 200
# numbers per batch of weights: a few of such arrays stay in the processor's cache
BATCH = 2**18


@dataclass(frozen=True)
class ClassScores:
    """One class against the rest; `recall` is the sensitivity."""

    name: str
    images: int
    predicted: int
    auc: Interval
    average_precision: Interval
    recall: Interval
    specificity: Interval
    precision: Interval
    f1: Interval

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        raw = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v.to_dict() if isinstance(v, Interval) else v for k, v in raw.items()}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "ClassScores":
        """The inverse of `to_dict`."""
        scores: dict[str, Any] = {k: Interval.from_dict(v) for k, v in plain.items() if isinstance(v, Mapping)}
        return cls(plain["name"], plain["images"], plain["predicted"], **scores)


@dataclass(frozen=True)
class Metrics(Mapping[str, Interval]):
    """The scores by name, the number of images and patients behind them, and the same for each class.

    `notes` says what was left out or could not be computed, and why.
    """

    values_by_name: Mapping[str, Interval]
    images: int
    patients: int | None
    classes: tuple[ClassScores, ...]
    notes: tuple[str, ...] = ()
    resamples: int = RESAMPLES
    seed: int = 0

    def __getitem__(self, name: str) -> Interval:
        return self.values_by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "images": self.images,
            "patients": self.patients,
            "scores": {name: interval.to_dict() for name, interval in self.items()},
            "classes": [c.to_dict() for c in self.classes],
            "notes": list(self.notes),
            "resamples": self.resamples,
            "seed": self.seed,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Metrics":
        """The inverse of `to_dict`."""
        return cls(
            {name: Interval.from_dict(v) for name, v in plain["scores"].items()},
            plain["images"],
            plain["patients"],
            tuple(ClassScores.from_dict(c) for c in plain["classes"]),
            tuple(plain["notes"]),
            plain["resamples"],
            plain["seed"],
        )

    def to_json(self) -> str:
        """`to_dict` as text; strict JSON, without NaN."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)


def measure(
    labels: Sequence[int] | np.ndarray,
    probabilities: np.ndarray,
    classes: Sequence[str],
    groups: Sequence[Hashable] | np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    ordered: bool | None = None,
) -> Metrics:
    """Scores of `probabilities` `(n, k)` against `labels` `(n,)`, with 95 % bootstrap intervals.

    AUC and average precision are those of the last class where there are two classes, and means over the classes,
    each against the rest, where there are more. `groups` names the patient of each image. `ordered` says that the
    classes are grades, which adds the quadratic-weighted kappa; by default they are when all names are integers.
    """
    y, p, names = checked(labels, probabilities, classes)
    codes = group_codes(groups, len(y))
    units = int(codes.max()) + 1
    used = affordable(resamples, p.size)
    overall, by_class = sample_scores(y, p, class_values(names, ordered), codes, used, seed)
    undefined = reasons(y, names)
    scores = {name: percentile_interval(v, units, undefined.get(name, "not defined")) for name, v in overall.items()}
    per_class = tuple(class_row(c, name, by_class, units) for c, name in enumerate(names))
    notes = what_to_know(y, names, scores, units if groups is not None else None)
    if used < resamples:
        notes.append(f"{used} instead of {resamples} resamples, for the many images and classes")
    patients = None if groups is None else units
    return Metrics(scores, len(y), patients, per_class, tuple(notes), used, seed)


def compare_paired(
    labels: Sequence[int] | np.ndarray,
    probabilities_a: np.ndarray,
    probabilities_b: np.ndarray,
    classes: Sequence[str],
    groups: Sequence[Hashable] | np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    ordered: bool | None = None,
) -> dict[str, Interval]:
    """The difference "a minus b" of every score, with its 95 % interval, on the same images and resamples.

    An interval without zero says that the models differ on images of this kind. Two overlapping intervals of
    `measure` say little, since both models err on the same hard images.
    """
    y, a, names = checked(labels, probabilities_a, classes)
    _, b, _ = checked(labels, probabilities_b, classes)
    codes = group_codes(groups, len(y))
    used = affordable(resamples, a.size)
    values = class_values(names, ordered)
    first, second = (sample_scores(y, p, values, codes, used, seed)[0] for p in (a, b))
    undefined = reasons(y, names)
    units = int(codes.max()) + 1
    return {
        name: percentile_interval(first[name] - second[name], units, undefined.get(name, "not defined"))
        for name in first
    }


def sample_scores(
    labels: np.ndarray,
    probabilities: np.ndarray,
    values: np.ndarray | None,
    codes: np.ndarray,
    resamples: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Overall and class scores, last axis: the data themselves, then the resamples."""
    weightings = chain([np.ones((len(labels), 1))], draw_weights(codes, resamples, seed, max(1, BATCH // len(labels))))
    parts = [all_scores(weights, labels, probabilities, values) for weights in weightings]
    return joined([overall for overall, _ in parts]), joined([by_class for _, by_class in parts])


def joined(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The batches of every score put one after the other."""
    return {name: np.concatenate([part[name] for part in parts], axis=-1) for name in parts[0]}


def affordable(resamples: int, cells: int) -> int:
    """The resamples there is time for with `cells` probabilities."""
    return min(resamples, max(FEWEST, int(WORK / cells)))


def checked(
    labels: Sequence[int] | np.ndarray, probabilities: np.ndarray, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The same as arrays of int64 and float64, or an error that says what does not fit."""
    y, p, names = np.asarray(labels), np.asarray(probabilities, dtype=np.float64), [str(c) for c in classes]
    if p.ndim != 2 or p.shape[1] != len(names) or len(names) < 2:
        raise InputError(f"probabilities must be (images, classes) for {len(names)} >= 2 classes, not {p.shape}")
    if y.shape != p.shape[:1] or not len(y):
        raise InputError(f"labels must be one integer per image: {p.shape[0]} images, labels of shape {y.shape}")
    if not np.issubdtype(y.dtype, np.integer) or y.min() < 0 or y.max() >= len(names):
        raise InputError(f"labels must be integers from 0 to {len(names) - 1}, given {y.dtype} {y.min()} to {y.max()}")
    wrong = ~(np.isfinite(p).all(axis=1) & (p >= 0).all(axis=1) & (np.abs(p.sum(axis=1) - 1) < 1e-2))
    if wrong.any():
        i = int(wrong.argmax())
        raise InputError(
            f"each row must be probabilities, none negative, with the sum 1: {int(wrong.sum())} of {len(p)} rows "
            f"are not, first row {i}: {np.array2string(p[i], precision=3, threshold=8)}; apply a softmax to logits"
        )
    return y.astype(np.int64), p, names


def class_values(names: Sequence[str], ordered: bool | None) -> np.ndarray | None:
    """Where each class lies on the scale of grades: its number, or its place; None where classes have no order."""
    try:
        values = [int(name) for name in names]
    except ValueError:
        return np.arange(len(names)) if ordered else None
    return None if ordered is False else np.array(values)


def reasons(labels: np.ndarray, names: Sequence[str]) -> dict[str, str]:
    """Why an overall score may not be defined."""
    alone = f"all {len(labels)} labels are {names[labels[0]]!r}: there is nothing to rank against"
    return {"auc": alone, "average_precision": alone, "kappa": "labels and predictions are all one class"}


def class_row(c: int, name: str, by_class: dict[str, np.ndarray], units: int) -> ClassScores:
    """The line of class number `c` in the table of classes."""
    one_kind = "needs images with and without this class"
    why = {
        "auc": one_kind,
        "average_precision": one_kind,
        "recall": "no image has this class",
        "specificity": "every image has this class",
        "precision": "never predicted",
        "f1": "neither present nor predicted",
    }
    intervals = {key: percentile_interval(by_class[key][c], units, reason) for key, reason in why.items()}
    return ClassScores(name, int(by_class["support"][c, 0]), int(by_class["predicted"][c, 0]), **intervals)


def what_to_know(
    labels: np.ndarray, names: Sequence[str], scores: Mapping[str, Interval], patients: int | None
) -> list[str]:
    """What a reader of the scores has to know about classes and intervals."""
    absent = [name for c, name in enumerate(names) if not (labels == c).any()]
    notes = []
    if absent:
        notes.append(f"no image of {', '.join(map(repr, absent))}: left out of the means over classes")
    notes += [f"{TITLES[name]}: {interval.note}" for name, interval in scores.items() if interval.note]
    units, kind = (len(labels), "images") if patients is None else (patients, "patients")
    if scores["accuracy"].value == 1 and units > 1:
        notes.append(
            f"no error among {units} {kind}, so the bootstrap interval has no width; by the rule of three "
            f"the error rate may be up to {min(1, 3 / units):.1%}"
        )
    return notes
