"""Scores of a classifier under many weightings of the images at once.

`weights` is `(n, r)`: column j says how often image i counts in weighting j (ones for the data as they are). Each
function returns one value per column, exactly what the score would be on the repeated images; NaN where it is not
defined. Shapes: n images, k classes, r weightings.
"""

import numpy as np

BINS = 15
# what separates an impossible true class from an infinite loss; the value scikit-learn uses
SMALLEST_PROBABILITY = np.finfo(np.float64).eps


def divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """`above / below`, NaN where `below` is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below == 0, np.nan, above / below)


def mean_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is not NaN; NaN where nothing is."""
    return divide(np.nansum(values, axis=0), np.isfinite(values).sum(axis=0))


def totals(values: np.ndarray, codes: np.ndarray, k: int) -> np.ndarray:
    """Sums the rows of `values` `(n, r)` that share a code, `(k, r)`."""
    order = np.argsort(codes, kind="stable")
    present, starts = np.unique(codes[order], return_index=True)
    out = np.zeros((k, values.shape[1]))
    out[present] = np.add.reduceat(values[order], starts, axis=0)
    return out


def ranking(weights: np.ndarray, scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area under the ROC curve and average precision of `scores` for the images marked `positive`.

    Both read one pass down the ranking. Images with equal scores enter together: the curve crosses them in a
    straight line. Not defined unless both kinds have weight.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.diff(scores[order], append=-np.inf))
    drawn = weights[order]
    seen = np.cumsum(drawn, axis=0)[ends]
    drawn[~positive[order]] = 0
    hits = np.cumsum(drawn, axis=0)[ends]
    misses = seen - hits
    gained = np.diff(hits, axis=0, prepend=0)
    area = np.einsum("nr,nr->r", np.diff(misses, axis=0, prepend=0), hits - gained / 2)
    # where nothing was seen yet, nothing was gained either
    precision = np.einsum("nr,nr->r", gained, hits / np.maximum(seen, 1e-300))
    both = hits[-1] * misses[-1]
    return divide(area, both), np.where(both == 0, np.nan, divide(precision, hits[-1]))


def class_scores(weights: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """One-against-rest scores of each class, `(k, r)` each, and the weights they come from.

    `support` is the weight of a class in the labels, `predicted` in the predictions, `hits` in both.
    """
    k = probabilities.shape[1]
    predicted = probabilities.argmax(axis=1)
    support, named = totals(weights, labels, k), totals(weights, predicted, k)
    right = labels == predicted
    hits = totals(weights[right], labels[right], k) if right.any() else np.zeros_like(support)
    rest = weights.sum(axis=0) - support
    return {
        "recall": divide(hits, support),
        "specificity": divide(rest - (named - hits), rest),
        "precision": divide(hits, named),
        "f1": divide(2 * hits, support + named),
        "support": support,
        "predicted": named,
        "hits": hits,
    }


def class_rankings(weights: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """Area under the ROC curve and average precision of each class against the rest, `(k, r)` each."""
    pairs = [ranking(weights, column, labels == c) for c, column in enumerate(probabilities.T)]
    return {"auc": np.stack([a for a, _ in pairs]), "average_precision": np.stack([p for _, p in pairs])}


def quadratic_kappa(
    weights: np.ndarray, labels: np.ndarray, predicted: np.ndarray, values: np.ndarray, k: int
) -> np.ndarray:
    """Cohen's kappa with squared distances between the class `values`: 1 - observed / expected by chance."""
    apart = (values[:, None] - values[None, :]) ** 2
    total = weights.sum(axis=0)
    observed = apart[labels, predicted] @ weights
    expected = np.einsum("ir,ij,jr->r", totals(weights, labels, k), apart, totals(weights, predicted, k), optimize=True)
    return 1 - divide(observed * total, expected)


def log_loss(weights: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Mean of -log(probability of the true class), in nats."""
    true = np.take_along_axis(probabilities, labels[:, None], axis=1)[:, 0]
    return -np.log(np.clip(true, SMALLEST_PROBABILITY, 1)) @ weights / weights.sum(axis=0)


def calibration_error(weights: np.ndarray, labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Expected calibration error: |confidence - accuracy| in 15 equal bins of the confidence, weighted by images.

    The confidence is the largest probability; bins are open below and closed above. A perfect model has a positive
    value on few images, and resampling raises it further: read it beside its interval.
    """
    confidence = probabilities.max(axis=1)
    right = labels == probabilities.argmax(axis=1)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = totals(weights * (confidence - right)[:, None], bins, BINS)
    return np.abs(gaps).sum(axis=0) / weights.sum(axis=0)


def all_scores(
    weights: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, values: np.ndarray | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every overall score, `(r,)` each, and every score of a class, `(k, r)` each.

    With two classes the last is the positive one and the ranking scores are its own; with more they are means over
    the classes. `values` are the places of ordered classes, or None: kappa is for ordered classes only.
    """
    k = probabilities.shape[1]
    by_class = class_scores(weights, labels, probabilities) | class_rankings(weights, labels, probabilities)
    overall = {name: by_class[name][-1] if k == 2 else mean_defined(by_class[name]) for name in RANKINGS}
    overall["accuracy"] = by_class["hits"].sum(axis=0) / weights.sum(axis=0)
    overall["balanced_accuracy"] = mean_defined(by_class["recall"])
    overall["macro_f1"] = mean_defined(by_class["f1"])
    if values is not None:
        overall["kappa"] = quadratic_kappa(weights, labels, probabilities.argmax(axis=1), values, k)
    overall["log_loss"] = log_loss(weights, labels, probabilities)
    overall["calibration_error"] = calibration_error(weights, labels, probabilities)
    return overall, by_class


RANKINGS = ("auc", "average_precision")
