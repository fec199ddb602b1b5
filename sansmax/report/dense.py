"""Detection and segmentation beside the truth: the figures, and the picture.

Objects of an image are a mapping of arrays: `boxes` (n, 4) as x0, y0, x1, y1 in pixels, `labels` (n,) from 1 on, for
what was found also `scores` (n,), and `masks` (n, h, w) where there are any. The class of a label is
`classes[label - 1]`. A segmentation is an array (h, w) of classes from 0 on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sansmax.errors import InputError
from sansmax.report.pictures import as_rgb
from sansmax.report.style import COLOURS, MUTED, bare, look, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Objects = Mapping[str, Any]
PANEL = 2.35
# COCO's rules: the 100 best of a class and image count, precision is read at 101 recalls
MOST = 100
RECALLS = np.linspace(0, 1, 101)
# boxes that overlap by more are drawn as one
SAME = 0.7


# Figures


def average_precision(found: Sequence[Objects], truth: Sequence[Objects], iou: float = 0.5) -> dict[int, float]:
    """Average precision of every label that the truth has, by COCO's rules at one overlap.

    A found object is right if its box overlaps one of its class that no better scored one has taken, by `iou`
    (intersection over union) at least. The mean of the values is "mAP@0.5" (or another overlap).

    https://cocodataset.org/#detection-eval
    """
    if len(found) != len(truth):
        raise InputError(f"found objects of {len(found)} images and true ones of {len(truth)}; give one per image")
    labels = np.unique(np.concatenate([np.asarray(t["labels"], np.int64) for t in truth])) if truth else []
    return {int(label): _average_precision(found, truth, int(label), iou) for label in labels}


def _average_precision(found: Sequence[Objects], truth: Sequence[Objects], label: int, iou: float) -> float:
    scores, right, total = [], [], 0
    for f, t in zip(found, truth, strict=True):
        mine, true = np.asarray(f["labels"]) == label, np.asarray(t["labels"]) == label
        score = np.asarray(f["scores"], np.float64)[mine]
        order = np.argsort(-score, kind="stable")[:MOST]
        taken = matches(np.asarray(f["boxes"])[mine][order], np.asarray(t["boxes"])[true], iou)
        scores.append(score[order])
        right.append(taken >= 0)
        total += int(true.sum())
    hits = np.concatenate(right)[np.argsort(-np.concatenate(scores), kind="stable")]
    recall = hits.cumsum() / total
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    # the best precision at this recall or a higher one
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, RECALLS, side="left")
    return float(np.append(precision, 0.0)[at].mean())


def matches(boxes: np.ndarray, true: np.ndarray, iou: float = 0.5) -> np.ndarray:
    """For each box, best first, the free true one that it overlaps most and by `iou` at least, or -1."""
    overlaps = box_iou(boxes, true)
    taken = np.full(len(overlaps), -1)
    for i, row in enumerate(overlaps):
        if row.size and row.max() >= iou:
            taken[i] = row.argmax()
            overlaps[:, taken[i]] = -1
    return taken


def box_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (n, 4) and (m, 4): (n, m)."""
    a, b = (np.asarray(x, np.float64).reshape(-1, 4) for x in (a, b))
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    inside = (high - low).clip(0).prod(-1)
    area_a, area_b = ((x[:, 2:] - x[:, :2]).prod(-1) for x in (a, b))
    return inside / np.maximum(area_a[:, None] + area_b - inside, 1e-12)


def class_iou(found: Sequence[np.ndarray], truth: Sequence[np.ndarray], classes: int, ignore: int = 255) -> np.ndarray:
    """Intersection over union of every class over all pixels of all images, NaN for classes that appear nowhere.

    Pixels whose truth is `ignore` do not count. The mean without NaN is "mIoU".
    """
    counts = np.zeros((classes, classes), np.int64)
    for f, t in zip(found, truth, strict=True):
        f, t = np.asarray(f), np.asarray(t)
        if f.shape != t.shape:
            raise InputError(f"a segmentation of {f.shape} pixels for a truth of {t.shape}; bring it to the same size")
        seen = t != ignore
        pairs = t[seen].astype(np.int64) * classes + f[seen].astype(np.int64)
        counts += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    inside = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - inside
    return np.where(union > 0, inside / np.maximum(union, 1), np.nan)


# Pictures


def detection_picture(
    pictures: Sequence[np.ndarray],
    found: Sequence[Objects],
    truth: Sequence[Objects],
    path: str | Path,
    *,
    classes: Sequence[str],
    title: str = "",
    note: str = "",
    least: float = 0.5,
) -> Path:
    """Pictures in a row, their true objects above and those found with a score of `least` or more below.

    Boxes that match no true one of their class by half (intersection over union) are dashed. Of boxes in the same
    place, as detectors give them for two classes, the best alone is drawn; figures count them all.
    """
    with look():
        figure, axes = _sheet(pictures, 2, ["Truth", "Found"], title, note)
        for column, (picture, f, t) in enumerate(zip(pictures, found, truth, strict=True)):
            kept = _best(f, least)
            draw_objects(axes[0][column], picture, t, classes)
            draw_objects(axes[1][column], picture, kept, classes, _right(kept, t))
        return save(figure, path)


def segmentation_picture(
    pictures: Sequence[np.ndarray],
    found: Sequence[np.ndarray],
    truth: Sequence[np.ndarray],
    path: str | Path,
    *,
    classes: Sequence[str],
    title: str = "",
    note: str = "",
    ignore: int = 255,
) -> Path:
    """Pictures in a row, below them the true class of every pixel, and the class found; class 0 has no colour."""
    from matplotlib.patches import Patch

    with look():
        figure, axes = _sheet(pictures, 3, ["Picture", "Truth", "Found"], title, note, legend=len(classes) - 1)
        for column, (picture, f, t) in enumerate(zip(pictures, found, truth, strict=True)):
            rgb = as_rgb(picture)
            axes[0][column].imshow(rgb)
            for row, values in ((1, np.asarray(t)), (2, np.asarray(f))):
                axes[row][column].imshow(_coloured(rgb, values, np.asarray(t) == ignore))
        seen = np.unique(np.concatenate([np.unique(x) for x in (*map(np.asarray, truth), *map(np.asarray, found))]))
        handles = [Patch(color=colour_of(k), label=classes[k]) for k in seen if 0 < k < len(classes) and k != ignore]
        if handles:
            figure.legend(handles=handles, loc="lower center", ncols=min(len(handles), 10), handlelength=1.0)
        return save(figure, path)


def draw_objects(
    axes: Axes, picture: np.ndarray, objects: Objects, classes: Sequence[str], right: np.ndarray | None = None
) -> None:
    """The picture with boxes, masks and class names; where `right` is False the box is dashed."""
    from matplotlib.patches import Rectangle

    shown = as_rgb(picture)
    boxes, labels = np.asarray(objects["boxes"], np.float64), np.asarray(objects["labels"], np.int64)
    for mask, label in zip(np.asarray(objects.get("masks", ())), labels, strict=False):
        cover = 0.55 * np.asarray(mask).reshape(shown.shape[:2]).astype(np.float32)[..., None]
        shown = (1 - cover) * shown + cover * np.array(colour_of(int(label)), np.float32)
    axes.imshow(shown, interpolation="antialiased")
    scores = objects.get("scores")
    for i, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        colour, style = colour_of(int(label)), "-" if right is None or right[i] else (0, (3, 2))
        corner, size = box[:2] - 0.5, box[2:] - box[:2]
        axes.add_patch(Rectangle(tuple(corner), *size, fill=False, edgecolor=colour, linewidth=1.5, linestyle=style))
        text = f"{classes[label - 1]}" + (f" {float(scores[i]):.2f}" if scores is not None else "")
        _write_label(axes, text, corner, size, shown.shape[:2], colour)


def colour_of(label: int) -> tuple[float, float, float]:
    """The colour of a label from 1 on: those of the house, then the same in pale, then again."""
    turn, k = divmod(label - 1, len(COLOURS))
    colour = np.array([int(COLOURS[k][i : i + 2], 16) / 255 for i in (1, 3, 5)])
    r, g, b = (colour if turn % 2 == 0 else 0.45 * colour + 0.55).tolist()
    return r, g, b


def _write_label(
    axes: Axes, text: str, corner: np.ndarray, size: np.ndarray, shape: tuple[int, ...], colour: tuple
) -> None:
    # above the box, or below it where it touches the upper edge of the picture
    above = corner[1] > 0.07 * shape[0]
    bright = float(np.dot(colour, (0.299, 0.587, 0.114))) > 0.62
    axes.annotate(
        text,
        (corner[0], corner[1] if above else corner[1] + size[1]),
        xytext=(-0.6, 1.6 if above else -1.6),
        textcoords="offset points",
        va="bottom" if above else "top",
        ha="left" if corner[0] < 0.85 * shape[1] else "center",
        fontsize=6.6,
        color="black" if bright else "white",
        bbox={"boxstyle": "square,pad=0.12", "facecolor": colour, "edgecolor": "none"},
        annotation_clip=False,
    )


def _best(objects: Objects, least: float) -> dict[str, np.ndarray]:
    order = np.argsort(-np.asarray(objects["scores"], np.float64), kind="stable")
    boxes, kept = np.asarray(objects["boxes"]), []
    for i in order:
        others = box_iou(boxes[i], boxes[kept])
        if float(objects["scores"][i]) >= least and not (others > SAME).any():
            kept.append(i)
    names = [name for name in ("boxes", "labels", "scores", "masks") if name in objects]
    return {name: np.asarray(objects[name])[kept] for name in names}


def _right(found: Objects, truth: Objects) -> np.ndarray:
    right = np.zeros(len(found["labels"]), bool)
    for label in np.unique(found["labels"]):
        mine = found["labels"] == label
        true = np.asarray(truth["boxes"])[np.asarray(truth["labels"]) == label]
        right[mine] = matches(found["boxes"][mine], true) >= 0
    return right


def _coloured(rgb: np.ndarray, values: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    # over a dim grey picture, so that the colours are those of the legend
    grey = np.repeat(0.75 * (rgb @ np.array([0.299, 0.587, 0.114], np.float32))[..., None], 3, axis=2)
    shown = grey
    for label in np.unique(values[(values > 0) & ~ignored]):
        cover = np.where(values == label, 0.85, 0.0).astype(np.float32)[..., None]
        shown = (1 - cover) * shown + cover * np.array(colour_of(int(label)), np.float32)
    return np.where(ignored[..., None], np.float32(0.93), shown)


def _sheet(
    pictures: Sequence[np.ndarray], rows: int, names: Sequence[str], title: str, note: str, legend: int = 0
) -> tuple[Figure, Any]:
    if not len(pictures):
        raise InputError("there is no picture to show; give at least one")
    ratio = float(np.clip(np.median([p.shape[0] / p.shape[1] for p in pictures]), 0.4, 1.8))
    head = 0.12 + 0.25 * bool(title) + 0.19 * (note.count("\n") + 1 if note else 0)
    foot = 0.3 * -(-legend // 10)
    width = len(pictures) * (PANEL + 0.1) + 0.4
    figure = new_figure(max(width, 5.5), rows * (PANEL * ratio + 0.14) + head + foot, title, note)
    engine: Any = figure.get_layout_engine()
    height = figure.get_size_inches()[1]
    engine.set(rect=(0, foot / height, 1, 1 - (head + foot) / height), h_pad=0.04, w_pad=0.04, hspace=0, wspace=0)
    axes = figure.subplots(rows, len(pictures), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        for ax in row:
            bare(ax)
        row[0].set_ylabel(name, fontsize=9.5, color=MUTED)
    return figure, axes
