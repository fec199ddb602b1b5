"""The report of a finished run: figures of its test images with intervals, pictures, and the page that shows them."""

from pathlib import Path

import numpy as np

from sansmax.data.sets import ImageSet, LabelledImages
from sansmax.engine.build import num_parameters, takes_mask
from sansmax.engine.config import dump_config
from sansmax.engine.evaluate import probabilities_of
from sansmax.engine.predict import Predictor, shown_picture
from sansmax.engine.progress import Reporter
from sansmax.engine.run import METRICS, Run, write_json
from sansmax.engine.run_facts import (
    cost_of,
    counts_of,
    error_cases,
    in_words,
    model_of,
    settings_of,
    worst_errors,
)
from sansmax.engine.watching import send_results
from sansmax.report.calibration import calibration_curve
from sansmax.report.confusion import confusion_matrix
from sansmax.report.curves import learning_curves
from sansmax.report.grid import sample_grid
from sansmax.report.heatmap import heatmap
from sansmax.report.metrics import Metrics, measure
from sansmax.report.roc import roc_curves
from sansmax.report.run_page import RunFacts, write_run_page
from sansmax.report.summary import run_summary, score_text
from sansmax.report.tables import read_rows, write_predictions

__all__ = ["cost_of", "report_run"]


def report_run(run: Run, data: LabelledImages, reporter: Reporter) -> dict[str, Metrics]:
    """Measures the best weights on validation and test images; writes predictions, pictures, summary.md, report.html.

    The test images are looked at here and nowhere else. Without any, the validation images stand in and the page says
    so.
    """
    predictor = Predictor.of(run, run.config.device)
    measured = {}
    results: dict[str, np.ndarray] = {}
    for split in ("val", "test"):
        images = getattr(data, split)
        if images is None:
            continue
        results[split], measured[split] = measure_set(run, predictor, images, split, reporter, data.ordered)
    write_json(run.folder / "metrics.json", {split: m.to_dict() for split, m in measured.items()})
    split = "test" if "test" in measured else "val"
    images: ImageSet = getattr(data, split)
    reporter.say("drawing pictures and writing summary.md and report.html")
    figures = draw(run, predictor, images, results[split], split)
    write_pages(run, data, predictor, measured[split], split, results[split], figures)
    pictures = {Path(name).stem: run.folder / name for _, name in figures}
    send_results(run.folder, run.config, measured, pictures, reporter.say)
    reporter.say(headline(split, measured[split]))
    return measured


def write_pages(
    run: Run,
    data: LabelledImages,
    predictor: Predictor,
    metrics: Metrics,
    split: str,
    probabilities: np.ndarray,
    figures: list[tuple[str, str]],
) -> None:
    """Writes summary.md and report.html on the images of one split."""
    images: ImageSet = getattr(data, split)
    title = f"{run.config.model.name} on {Path(data.source).name or data.source}"
    command = run.info["command"] or "sansmax train --config config.yaml --output RUN"
    about = [*data.describe().splitlines(), f"The figures {{}} are of the {split} images."]
    model, settings, cost = model_of(run, predictor), settings_of(run.config), cost_of(run)
    notes, environment, name = notes_on(data, split), run.info["environment"], run.config.model.name
    parameters = num_parameters(predictor.network)
    run_summary(
        run.folder / "summary.md",
        title=title,
        command=command,
        data_lines=[line.format("below") for line in about],
        model_name=name,
        parameters=parameters,
        cost=cost,
        metrics=metrics,
        others={},
        figures=figures,
        notes=notes,
        environment=environment,
        model=model,
        settings=settings,
    )
    # these pictures are of the gallery, which shows more of them
    shown = [(caption, run.folder / file) for caption, file in figures if file != "worst.png"]
    worst = error_cases(predictor, images, probabilities, run.classes)
    configuration = dump_config(run.config)
    facts = RunFacts(
        title,
        name,
        parameters,
        metrics,
        split,
        counts_of(data),
        [line.format("above") for line in about],
        model,
        settings,
        configuration,
        cost,
        shown,
        worst,
        notes,
        command,
        environment,
    )
    write_run_page(run.folder / "report.html", facts)


def notes_on(data: LabelledImages, split: str) -> list[str]:
    """What a reader has to know of the images."""
    notes = []
    if split == "val":
        notes.append(
            "There are no test images: the figures are those of the validation images, by which the epoch was chosen."
        )
    if data.bad:
        notes.append(f"{len(data.bad)} images could not be read and were left out; bad_images.csv names them.")
    return notes


def measure_set(
    run: Run, predictor: Predictor, images: ImageSet, split: str, reporter: Reporter, ordered: bool | None
) -> tuple[np.ndarray, Metrics]:
    """Probabilities and metrics of one set, with the predictions written to the run."""
    with reporter.bar(f"evaluating {split}") as bar:
        probabilities = probabilities_of(
            predictor,
            images,
            batch_size=run.config.batch_size,
            workers=run.config.data.workers,
            progress=bar,
        )
    write_predictions(run.folder / f"predictions_{split}.csv", images.names, images.labels, probabilities, run.classes)
    return probabilities, measure(images.labels, probabilities, run.classes, groups=images.groups, ordered=ordered)


def headline(split: str, metrics: Metrics) -> str:
    """The main figures in one line."""
    shown = [name for name in ("auc", "accuracy", "balanced_accuracy") if name in metrics]
    words = {"auc": "AUC", "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy"}
    figures = ", ".join(f"{words[n]} {score_text(n, metrics[n])}" for n in shown)
    return f"{split}: {figures} on {metrics.images:,} images"


def draw(
    run: Run, predictor: Predictor, images: ImageSet, probabilities: np.ndarray, split: str
) -> list[tuple[str, str]]:
    """Writes the pictures of a run and returns caption and file name of each."""
    folder, classes = run.folder, run.classes
    figures = []
    rows = read_rows(folder / METRICS)
    if rows:
        learning_curves(rows, folder / "curves.png", monitor=run.config.monitor)
        figures.append(("Learning curves", "curves.png"))
    roc_curves(
        {run.config.model.name: (images.labels, probabilities)}, classes, folder / "roc.png", groups=images.groups
    )
    figures.append((f"ROC curve of the {split} images", "roc.png"))
    confusion_matrix(images.labels, probabilities, classes, folder / "confusion.png")
    figures.append((f"True against predicted class of the {split} images", "confusion.png"))
    calibration_curve(images.labels, probabilities, classes, folder / "calibration.png")
    figures.append((f"Confidence against accuracy on the {split} images", "calibration.png"))
    if (worst := worst_errors(images.labels, probabilities)).size:
        draw_worst(images, probabilities, worst, classes, folder / "worst.png")
        figures.append(("The errors made with the most confidence", "worst.png"))
    if takes_mask(predictor.network):
        for i in confident_examples(images, probabilities):
            name = f"heatmap_{classes[images.labels[i]]}.png".replace("/", "-")
            draw_heatmap(predictor, images.read(i), folder / name, title=images.names[i])
            figures.append((f"What speaks for {classes[images.labels[i]]}, and against it: {images.names[i]}", name))
    return figures


def draw_worst(
    images: ImageSet, probabilities: np.ndarray, worst: np.ndarray, classes: tuple[str, ...], path: Path
) -> None:
    """The worst errors as a grid of pictures."""
    titles = [f"{images.names[i]}\n{in_words(int(images.labels[i]), probabilities[i], classes)}" for i in worst]
    sample_grid([images.read(int(i)) for i in worst], titles, path, title="Errors made with the most confidence")


def confident_examples(images: ImageSet, probabilities: np.ndarray, most: int = 2) -> list[int]:
    """One rightly classified image of each of the last classes: of median confidence, so neither best nor worst."""
    chosen = []
    for label in reversed(range(probabilities.shape[1])):
        right = np.flatnonzero((images.labels == label) & (probabilities.argmax(1) == label))
        if right.size and len(chosen) < most:
            order = right[np.argsort(probabilities[right, label], kind="stable")]
            chosen.append(int(order[len(order) // 2]))
    return chosen


def draw_heatmap(
    predictor: Predictor, pixels: np.ndarray, path: Path, *, title: str, truth: np.ndarray | None = None
) -> None:
    """The scores of a picture's tokens for its predicted class, beside the picture."""
    prediction = predictor(pixels, scores=True, name=title)
    assert prediction.scores is not None and prediction.score_class is not None
    share = prediction.probabilities.max()
    heatmap(
        shown_picture(pixels, predictor.preprocess),
        prediction.scores,
        path,
        truth,
        title=f"{title}: {prediction.predicted} ({100 * share:.0f} %)",
        class_name=prediction.score_class,
    )
