"""Heat maps of pictures as files: the scores of all tokens as a picture, an overlay and an array."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from sansmax.data.tokens import open_pixels
from sansmax.engine.predict import NATIVE, Prediction, Predictor, shown_picture
from sansmax.engine.predict_many import pictures_in
from sansmax.engine.progress import Reporter
from sansmax.engine.run import Run
from sansmax.errors import InputError
from sansmax.files import replacing
from sansmax.report.heatmap import heatmap, heatmap_overlay

OVERLAY_LIMIT = 4096


def heatmaps(
    run: str | Path | Run,
    paths: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    class_name: str | None = None,
    image_size: int | str | None = None,
    reporter: Reporter | None = None,
) -> Iterator[Path]:
    """Writes NAME_heatmap.png, NAME_overlay.png and NAME_scores.npz for each picture and gives their paths.

    The array file holds `scores` (rows, columns), `xy_level0` (rows, columns, 2), `score_class`, `score_method`,
    `classes` and `probabilities`. A score is the effect of a token on the log-odds of the class: by the gradient of
    the mask, or by painting squares over for networks that have no weight per token.
    """
    reporter = reporter or Reporter(quiet=True)
    run = run if isinstance(run, Run) else Run.open(run)
    predictor = Predictor.of(run)
    explained = True if class_name is None else predictor.class_index(class_name)
    folder = Path(output) if output is not None else run.folder / "heatmaps"
    pictures = list(pictures_in(paths))
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file; give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for picture, stem in zip(pictures, stems(pictures), strict=True):
        pixels = open_pixels(picture)
        with reporter.bar(f"explaining {picture.name}") as bar:
            result = predictor(pixels, image_size=image_size, scores=explained, progress=bar, name=picture.name)
        shown = pixels if image_size == NATIVE else shown_picture(pixels, predictor.preprocess)
        yield from _write(result, shown, folder / stem)


def stems(pictures: Sequence[Path]) -> list[str]:
    """What the files of each picture are called: its stem, with the folders and the suffix where stems repeat."""
    names = [p.stem for p in pictures]
    if len(set(names)) == len(names):
        return names
    above = os.path.commonpath([p.resolve().parent for p in pictures])
    return ["-".join(p.resolve().relative_to(above).parts).replace(".", "-") for p in pictures]


def _write(result: Prediction, shown: np.ndarray, stem: Path) -> Iterator[Path]:
    assert result.scores is not None and result.xy_level0 is not None and result.score_class is not None
    share = result.probabilities[result.classes.index(result.score_class)]
    yield heatmap(
        shown,
        result.scores,
        stem.with_name(stem.name + "_heatmap.png"),
        title=f"{result.name}: {result.score_class} ({100 * share:.0f} %)",
        class_name=result.score_class,
        note="" if result.score_method == "mask gradient" else f"scores by {result.score_method}",
    )
    if max(shown.shape[:2]) <= OVERLAY_LIMIT:
        yield heatmap_overlay(shown, result.scores, stem.with_name(stem.name + "_overlay.png"))
    arrays = stem.with_name(stem.name + "_scores.npz")
    with replacing(arrays) as partial:
        np.savez_compressed(
            partial,
            scores=result.scores.astype(np.float32),
            xy_level0=result.xy_level0.reshape(*result.scores.shape, 2),
            score_class=result.score_class,
            score_method=str(result.score_method),
            classes=np.array(result.classes),
            probabilities=result.probabilities,
        )
    yield arrays
