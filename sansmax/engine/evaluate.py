"""The probabilities of a network over labelled images, and how good they are."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.loading import make_loader
from sansmax.data.open import open_data
from sansmax.data.sets import ImageSet, LabelledImages
from sansmax.engine.predict import Predictor
from sansmax.engine.progress import Reporter
from sansmax.engine.run import Run, write_json
from sansmax.errors import InputError
from sansmax.report.confusion import confusion_matrix
from sansmax.report.metrics import Metrics, measure
from sansmax.report.roc import roc_curves
from sansmax.report.summary import score_text
from sansmax.report.tables import write_predictions

SPLITS = ("train", "val", "test", "all")


def probabilities_of(
    predictor: Predictor,
    images: ImageSet,
    *,
    batch_size: int = 32,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Probabilities `(n, classes)` in float64, in the order of the set."""
    loader = make_loader(images, predictor.preprocess, batch_size=batch_size, workers=workers, cache="none")
    parts = []
    done = 0
    for batch in loader:
        parts.append(predictor.probabilities(batch.images))
        done += len(batch.labels)
        if progress is not None:
            progress(done, len(images))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured, on which images, and where it is written."""

    metrics: Metrics
    about: str
    folder: Path

    def text(self) -> str:
        """The figures as lines."""
        lines = [self.about]
        lines += [f"{name.replace('_', ' '):20} {score_text(name, value)}" for name, value in self.metrics.items()]
        return "\n".join([*lines, *self.metrics.notes, f"written to {self.folder}"])


def evaluate(
    run: str | Path | Run,
    data: str | Path,
    *,
    output: str | Path | None = None,
    split: str = "test",
    skip_bad: bool = False,
    reporter: Reporter | None = None,
    **columns: Any,
) -> Evaluation:
    """Measures a run on labelled images and writes metrics.json, predictions.csv, roc.png and confusion.png.

    A source with splits of its own is measured on `split` ("all": on every image). One without is measured as a whole,
    unless it holds images that the run was trained with: then on the images that the run kept apart as `split`.
    `columns` are those of `open_data`.

    Raises InputError for classes that the run does not have and for a split without images.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    reporter = reporter or Reporter(quiet=True)
    if split not in SPLITS:
        raise InputError(f"--split must be one of {', '.join(SPLITS)}, got {split!r}")
    opened = _open(run, data, skip_bad, reporter, columns)
    images, about = _choose(run, opened, split)
    predictor = Predictor.of(run, run.config.device)
    with reporter.bar("evaluating") as bar:
        probabilities = probabilities_of(
            predictor,
            images,
            batch_size=run.config.batch_size,
            workers=run.config.data.workers,
            progress=bar,
        )
    metrics = measure(images.labels, probabilities, run.classes, groups=images.groups, ordered=opened.ordered)
    name = Path(str(data).replace(":", "-").replace("=", "").replace(",", "-")).stem or "data"
    folder = Path(output) if output is not None else run.folder / f"evaluate-{name}-{split}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", {"data": str(data), "images": about, **metrics.to_dict()})
    write_predictions(folder / "predictions.csv", images.names, images.labels, probabilities, run.classes)
    if np.unique(images.labels).size > 1:
        curves = {run.config.model.name: (images.labels, probabilities)}
        roc_curves(curves, run.classes, folder / "roc.png", groups=images.groups)
    confusion_matrix(images.labels, probabilities, run.classes, folder / "confusion.png")
    return Evaluation(metrics, about, folder)


def _open(run: Run, data: str | Path, skip_bad: bool, reporter: Reporter, columns: dict[str, Any]) -> LabelledImages:
    same = str(data) == run.config.data.source
    names = ("path_column", "label_column", "split_column", "group_column", "root")
    # the columns of the very table the run was trained from need not be given again
    chosen: dict[str, Any] = {n: columns.get(n) or (getattr(run.config.data, n) if same else None) for n in names}
    with reporter.bar("reading images") as bar:
        return open_data(
            data,
            **chosen,
            classes=run.classes,
            val_fraction=0.0,
            test_fraction=1.0,
            check=True,
            skip_bad=skip_bad,
            progress=bar,
        )


def _choose(run: Run, opened: LabelledImages, split: str) -> tuple[ImageSet, str]:
    sets = opened.splits()
    if opened.explicit_split and split != "all":
        if split not in sets:
            raise InputError(f"{opened.source} has no {split} images; it has {', '.join(sets)}. Choose with --split")
        return sets[split], f"{len(sets[split]):,} {split} images of {opened.source}"
    if len(sets) != 1:
        raise InputError(f"{opened.source} has the splits {', '.join(sets)}; choose one with --split")
    (images,) = sets.values()
    known = _splits_of_run(run)
    if split == "all" or not any(known.get(name) == "train" for name in images.names):
        return images, f"all {len(images):,} images of {opened.source}"
    mine = [i for i, name in enumerate(images.names) if known.get(name) == split]
    if not mine:
        raise InputError(f"the run kept no images of {opened.source} apart as {split}; choose another --split")
    return images.subset(mine), (
        f"{len(mine):,} images of {opened.source} that the run kept apart as {split} (it was trained on others of it)"
    )


def _splits_of_run(run: Run) -> dict[str, str]:
    with (run.folder / "splits.csv").open(encoding="utf-8", newline="") as file:
        return {row["name"]: row["split"] for row in csv.DictReader(file)}
