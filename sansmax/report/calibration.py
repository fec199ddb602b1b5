"""Whether a network is as often right as it says: confidence against accuracy.

The confidence of an answer is its probability. Answers are put into bins of equal width by it, open below and closed
above; the expected calibration error is the mean of |confidence - accuracy| over the bins, weighted by their answers
(Guo et al. 2017, https://arxiv.org/abs/1706.04599), the same as `calibration_error` of `report.scores`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sansmax.report.delong import Z95
from sansmax.report.metrics import checked
from sansmax.report.scores import BINS
from sansmax.report.style import COLOURS, MUTED, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Reliability:
    """The bins that hold answers, the least confident first, and the calibration error over all of them.

    `confidence` and `accuracy` are means over a bin's answers; `low` and `high` are the 95 % Wilson interval of the
    accuracy.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: float

    @property
    def excess(self) -> float:
        """Mean confidence less accuracy over all answers: positive for a network that is too sure."""
        return float(((self.confidence - self.accuracy) * self.counts).sum() / self.counts.sum())


def reliability(labels: np.ndarray, probabilities: np.ndarray, bins: int = BINS) -> Reliability:
    """Confidence and accuracy of the predicted classes: `labels` `(n,)`, `probabilities` `(n, k)`."""
    confidence = probabilities.max(axis=1)
    right = np.asarray(labels) == probabilities.argmax(axis=1)
    which = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    every = np.bincount(which, minlength=bins)
    held = every > 0
    counts = every[held]
    said, hits = (np.bincount(which, values, minlength=bins)[held] for values in (confidence, right.astype(float)))
    low, high = wilson(hits, counts)
    error = float(np.abs(said - hits).sum() / len(right))
    return Reliability(counts, said / counts, hits / counts, low, high, error)


def wilson(hits: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 95 % score interval of shares (Wilson 1927): it has a width for shares of 0 and 1, too."""
    share, z2 = hits / counts, Z95**2
    middle = (share + z2 / (2 * counts)) / (1 + z2 / counts)
    half = Z95 * np.sqrt(share * (1 - share) / counts + z2 / (4 * counts**2)) / (1 + z2 / counts)
    return np.maximum(middle - half, 0), np.minimum(middle + half, 1)


def calibration_curve(
    labels: Sequence[int] | np.ndarray, probabilities: np.ndarray, classes: Sequence[str], path: str | Path
) -> Path:
    """The reliability diagram, with the answers of each bin counted below it."""
    with look():
        return save(calibration_figure(labels, probabilities, classes), path)


def calibration_figure(labels: Sequence[int] | np.ndarray, probabilities: np.ndarray, classes: Sequence[str]) -> Figure:
    """The figure of `calibration_curve`."""
    y, p, _ = checked(labels, probabilities, classes)
    found = reliability(y, p)
    subtitle = f"calibration error {found.error:.3f} in {BINS} bins; bars: 95 % interval (Wilson)"
    figure = new_figure(5.9, 6.1, finding(found), subtitle)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.plot([0, 1], [0, 1], color="#b8c0c8", linewidth=1, linestyle=(0, (4, 3)), label="as right as it says")
    reach = np.stack([found.accuracy - found.low, found.high - found.accuracy]).clip(0)
    upper.errorbar(
        found.confidence,
        found.accuracy,
        yerr=reach,
        fmt="o",
        markersize=5,
        color=COLOURS[0],
        ecolor="#8fbfe0",
        elinewidth=1.4,
        label="answers of a bin",
        zorder=4,
    )
    upper.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="accuracy")
    upper.legend(loc="upper left")
    lower.bar(found.confidence, found.counts, width=0.6 / BINS, color=MUTED)
    lower.set(xlabel="confidence: probability of the predicted class", ylabel="images")
    return figure


def finding(found: Reliability) -> str:
    """Which way the confidence errs, in words."""
    if abs(found.excess) < 0.01:
        return "On the whole as right as it says"
    how = "less" if found.excess > 0 else "more"
    return f"Right {how} often than it says, by {100 * abs(found.excess):.1f} %"
