"""Many pictures through one run: what `sansmax predict` prints and writes."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sansmax.data.images import IMAGE_SUFFIXES
from sansmax.engine.predict import Prediction, Predictor
from sansmax.engine.predict_slide import SlideOptions
from sansmax.engine.progress import Reporter
from sansmax.engine.run import Run
from sansmax.engine.sources import SCANNER_SUFFIXES
from sansmax.errors import InputError
from sansmax.report.tables import write_predictions


@dataclass(frozen=True)
class Predictions:
    """Predictions in the order of the pictures, and pictures that could not be read with the reason."""

    classes: tuple[str, ...]
    items: list[Prediction]
    bad: list[tuple[str, str]]

    def csv(self) -> str:
        """A line per picture: name, predicted class, a probability per class."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["name", "predicted", *(f"probability_{c}" for c in self.classes)])
        for p in self.items:
            writer.writerow([p.name, p.predicted, *(f"{v:.6f}" for v in p.probabilities)])
        return text.getvalue()

    def json(self) -> str:
        """The same as JSON."""
        plain = {"classes": list(self.classes), "predictions": [p.to_dict() for p in self.items]}
        return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def predict_many(
    run: str | Path | Run,
    paths: Sequence[str | Path],
    *,
    output: str | Path | None = None,
    image_size: int | str | None = None,
    slide: SlideOptions | None = None,
    skip_bad: bool = False,
    reporter: Reporter | None = None,
) -> Predictions:
    """The answers for pictures, slides and folders of them; CSV to `output` and JSON beside it where one is given.

    `image_size` and `slide` are those of `Predictor.__call__`.

    A picture that cannot be read ends the work with an InputError that names it; with `skip_bad` it is left out and
    said.
    """
    reporter = reporter or Reporter(quiet=True)
    predictor = Predictor.of(run)
    pictures = list(pictures_in(paths))
    if output is not None:
        _check_output(Path(output))
    items: list[Prediction] = []
    bad: list[tuple[str, str]] = []
    with reporter.bar("predicting") as bar:
        for i, picture in enumerate(pictures):
            try:
                items.append(predictor(picture, image_size=image_size, slide=slide))
            except InputError as error:
                if not skip_bad:
                    raise
                bad.append((str(picture), str(error)))
                bar.say(f"left out: {error}")
            bar.update(i + 1, len(pictures))
    if not items:
        raise InputError(f"none of the {len(pictures)} pictures can be read; the first: {bad[0][1]}")
    if output is not None:
        probabilities = np.stack([p.probabilities for p in items])
        write_predictions(output, [p.name for p in items], None, probabilities, predictor.classes)
    return Predictions(predictor.classes, items, bad)


def _check_output(path: Path) -> None:
    if path.suffix.lower() != ".csv":
        raise InputError(f"--output {path} must end in .csv (JSON is written beside it)")
    if not path.parent.is_dir():
        raise InputError(f"the folder of --output {path} does not exist; make it first")


def pictures_in(paths: Sequence[str | Path]) -> Iterator[Path]:
    """Every picture named, and every picture in a folder named (sub-folders too), sorted."""
    for path in map(Path, paths):
        if path.is_dir():
            suffixes = IMAGE_SUFFIXES | SCANNER_SUFFIXES
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes and p.is_file())
            if not inside:
                raise InputError(f"the folder {path} holds no pictures ({', '.join(sorted(suffixes))})")
            yield from inside
        elif path.exists():
            yield path
        else:
            raise InputError(f"the picture {path} does not exist")
