"""Several runs on the same images, side by side: scores, paired differences and tests, cost.

    compare_runs(["runs/a", "runs/b"], "runs/compare")

The runs may be of any networks, trained by any recipe, as long as they were measured on the same images. Runs on bags
of features and cross-validations are compared case by case.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.engine.build import num_parameters
from sansmax.engine.progress import Reporter
from sansmax.engine.run import METRICS, Run, read_json
from sansmax.engine.run_facts import cost_of
from sansmax.errors import InputError, listed
from sansmax.report.compare_page import RunsFacts, write_comparison
from sansmax.report.metrics import RESAMPLES, measure
from sansmax.report.paired import compare_models
from sansmax.report.tables import read_rows

SPLITS = ("test", "val")
START = "probability_"


@dataclass(frozen=True)
class Answers:
    """What a run said of images: `labels` `(n,)` index its `classes`, probabilities `(n, k)`."""

    names: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    classes: tuple[str, ...]

    def pick(self, rows: Sequence[int]) -> "Answers":
        """The images with these numbers."""
        chosen = np.asarray(rows, dtype=np.int64)
        names = tuple(self.names[i] for i in rows)
        return Answers(names, self.labels[chosen], self.probabilities[chosen], self.classes)


def compare_runs(
    runs: Sequence[str | Path],
    output: str | Path,
    *,
    split: str = "test",
    resamples: int = RESAMPLES,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> RunsFacts:
    """Compares runs with the first of them and writes compare.md, compare.html, compare.csv and two pictures.

    `split` is "test" or "val". The order of the images in a run's files changes nothing.

    Raises InputError for fewer than two runs, runs that were not measured on the split, and runs of other images,
    labels or classes.
    """
    reporter = reporter or Reporter(quiet=True)
    opened = named([Run.open(run) for run in distinct(runs)])
    if split not in SPLITS:
        raise InputError(f"--split must be {' or '.join(SPLITS)}, got {split!r}")
    answers = {name: read_answers(run.folder / f"predictions_{split}.csv") for name, run in opened.items()}
    first_name, first = next(iter(answers.items()))
    first = first.pick(np.argsort(np.array(first.names), kind="stable").tolist())
    matched = {name: match(first, found, first_name, name) for name, found in answers.items()}
    groups = patients(next(iter(opened.values())), first.names)
    reporter.say(f"comparing {len(opened)} runs on {len(first.names):,} {split} images")
    how: dict[str, Any] = {"resamples": resamples, "seed": seed, "ordered": ordered(next(iter(opened.values())), split)}
    metrics = {name: measure(first.labels, p, first.classes, groups, **how) for name, p in matched.items()}
    pairs, notes = compare_models(first.labels, list(matched.values()), first.classes, groups, **how)
    facts = RunsFacts(
        split=split,
        images=len(first.names),
        patients=None if groups is None else len(set(groups)),
        metrics=metrics,
        pairs=dict(zip(list(matched)[1:], pairs, strict=True)),
        cost={name: cost_side(run) for name, run in opened.items()},
        rows={name: read_rows(run.folder / METRICS) for name, run in opened.items()},
        notes=notes,
    )
    write_comparison(output, facts)
    return facts


def distinct(runs: Sequence[str | Path]) -> list[Path]:
    """The folders; InputError unless there are two or more, each given once."""
    folders = [Path(run) for run in runs]
    if len(folders) < 2:
        raise InputError("a comparison needs two runs or more: sansmax compare RUN RUN")
    places = [folder.resolve() for folder in folders]
    if twice := sorted({str(f) for f, place in zip(folders, places, strict=True) if places.count(place) > 1}):
        raise InputError(f"each run is to be given once; more than once: {listed(twice)}")
    return folders


def named(runs: Sequence[Run]) -> dict[str, Run]:
    """The runs by the shortest ends of their paths that tell them apart."""
    parts = [run.folder.resolve().parts for run in runs]
    depth = next(d for d in range(1, 100) if len({p[-d:] for p in parts}) == len(parts))
    return {"/".join(p[-depth:]): run for p, run in zip(parts, runs, strict=True)}


def read_answers(path: Path) -> Answers:
    """The table that a run wrote of its predictions; InputError where it is missing or damaged."""
    if not path.is_file():
        raise InputError(f"{path} is not there: the run is not finished, or has no such images; see --split")
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = list(csv.reader(file)) or [[]]
    classes = tuple(name.removeprefix(START) for name in header if name.startswith(START))
    at = len(header) - len(classes)
    if header[:3] != ["name", "label", "predicted"] or at != 3:
        raise InputError(f"{path} is no table of predictions: its columns are {listed(header)}")
    try:
        labels = np.array([classes.index(line[1]) for line in lines], dtype=np.int64)
        probabilities = np.array([[float(cell) for cell in line[at:]] for line in lines]).reshape(-1, len(classes))
    except (ValueError, IndexError) as error:
        raise InputError(f"{path} is damaged ({error}); finish the run again with --resume") from None
    names = tuple(line[0] for line in lines)
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InputError(f"{path} has images of one name, which cannot be told apart: {listed(twice)}")
    return Answers(names, labels, probabilities, classes)


def match(first: Answers, other: Answers, first_name: str, name: str) -> np.ndarray:
    """The probabilities of `other` in the order of the images and classes of `first`."""
    if set(first.classes) != set(other.classes):
        raise InputError(
            f"the runs have different classes: {listed(first.classes)} in {first_name}, {listed(other.classes)} in "
            f"{name}; compare runs of the same labels"
        )
    place = {image: i for i, image in enumerate(other.names)}
    alone = [n for n in first.names if n not in place], sorted(set(other.names) - set(first.names))
    if any(alone):
        raise InputError(
            f"the runs were not measured on the same images: {len(alone[0])} are in {first_name} alone "
            f"({listed(alone[0], 3) or 'none'}), {len(alone[1])} in {name} alone ({listed(alone[1], 3) or 'none'}). "
            "Train them on the same data with the same seed, or with a table that has a column of splits"
        )
    other = other.pick([place[image] for image in first.names])
    columns = [other.classes.index(c) for c in first.classes]
    differ = [
        image
        for image, a, b in zip(first.names, first.labels, other.labels, strict=True)
        if first.classes[a] != other.classes[b]
    ]
    if differ:
        raise InputError(f"{len(differ)} images have another label in {name} than in {first_name}: {listed(differ)}")
    return other.probabilities[:, columns]


def ordered(run: Run, split: str) -> bool | None:
    """Whether the classes are grades, as the run's own figures have it; None where it has none."""
    path = run.folder / "metrics.json"
    return "kappa" in read_json(path).get(split, {}).get("scores", {}) if path.is_file() else None


def patients(run: Run, names: Sequence[str]) -> list[str] | None:
    """The patient of each image by the run's splits.csv; None where they are not known."""
    path = run.folder / "splits.csv"
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", newline="") as file:
        of = {row["name"]: row.get("group") or "" for row in csv.DictReader(file)}
    groups = [of.get(name, "") for name in names]
    return groups if all(groups) else None


def cost_side(run: Run) -> Mapping[str, Any]:
    """What a run is and what it took."""
    model = {"network": run.config.model.name, "parameters": f"{num_parameters(run.load_model()):,}"}
    return {**model, **cost_of(run)}
