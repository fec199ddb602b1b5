"""The bootstrap: which images a resample holds, and the interval its values span.

A resample is a column of weights, how often each image was drawn. Scores that accept weights then need no loop
over resamples. With groups (patients), whole groups are drawn, so images of one patient stay together.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sansmax.errors import InputError

LOW, HIGH = 2.5, 97.5


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; NaN where it is not defined, and then `note` says why."""

    value: float
    low: float = float("nan")
    high: float = float("nan")
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, which has no NaN: None stands for it."""
        out: dict[str, Any] = {k: none_for_nan(getattr(self, k)) for k in ("value", "low", "high")}
        return out | ({"note": self.note} if self.note else {})

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Interval":
        """The inverse of `to_dict`."""
        numbers = (float("nan") if plain[k] is None else float(plain[k]) for k in ("value", "low", "high"))
        return cls(*numbers, note=plain.get("note", ""))


def none_for_nan(number: float) -> float | None:
    """The number, or None where it is NaN."""
    return None if np.isnan(number) else float(number)


def group_codes(groups: Sequence[Hashable] | np.ndarray | None, images: int) -> np.ndarray:
    """One integer per image, equal for images of the same group; each image is its own group when there are none."""
    if groups is None:
        return np.arange(images)
    names = [str(g) for g in np.asarray(groups).tolist()]
    if len(names) != images:
        raise InputError(f"groups name the patient of each image: {images} are needed, {len(names)} were given")
    unknown = sum(name in ("", "None", "nan") for name in names)
    if unknown:
        raise InputError(
            f"the group (patient) of {unknown} of {images} images is empty; name it, since images without "
            "a patient cannot be resampled by patient, or pass groups=None to resample single images"
        )
    # by first appearance: other names for the same patients give the same resamples
    seen: dict[str, int] = {}
    return np.array([seen.setdefault(name, len(seen)) for name in names])


def draw_weights(codes: np.ndarray, resamples: int, seed: int, batch: int) -> Iterator[np.ndarray]:
    """Yields `(images, up to batch)` weights, one column per resample, `resamples` columns in all.

    Each resample draws as many groups as there are, with replacement; the same seed draws the same groups.
    """
    rng = np.random.default_rng(seed)
    units = int(codes.max()) + 1
    for start in range(0, resamples, batch):
        columns = min(batch, resamples - start)
        drawn = rng.integers(0, units, size=(columns, units))
        cells = (drawn * columns + np.arange(columns)[:, None]).ravel()
        counts = np.bincount(cells, minlength=units * columns).reshape(units, columns)
        yield counts[codes].astype(np.float64)


def percentile_interval(samples: np.ndarray, units: int, undefined: str = "not defined") -> Interval:
    """The interval of one score: `samples[0]` is its value on the data, the others are its resamples.

    `units` is the number of images (or groups) drawn from; `undefined` says why the value may be NaN.
    """
    value, drawn = float(samples[0]), samples[1:]
    if np.isnan(value):
        return Interval(value, note=undefined)
    if units < 2:
        return Interval(value, note="no interval from a single image or group")
    defined = drawn[np.isfinite(drawn)]
    if 2 * len(defined) < len(drawn) or not len(defined):
        return Interval(value, note="no interval: not defined on most resamples, the data are too few")
    low, high = np.percentile(defined, (LOW, HIGH))
    lost = 1 - len(defined) / len(drawn)
    note = f"{lost:.1%} of the resamples were left out, where it is not defined" if lost else ""
    return Interval(value, float(low), float(high), note)
