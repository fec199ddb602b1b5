"""Softmax, SimA, SeqNorm and SOFT at one size, trained alike on real images: AUC, accuracy, and what they cost.

    python -m benchmarks.accuracy --medmnist FOLDER --idrid FOLDER

MedMNIST sets by their recipes, and chest X-rays and fundus photographs at growing size; three seeds each. The arms of
a study differ in `model.options.attention` alone: same data, order of batches, augmentation, epochs and learning rate.
Runs go to runs/accuracy (finished ones are taken as they are, stopped ones go on). `python -m benchmarks.accuracy_cost`
measures time and memory of an epoch, side by side; this module then writes accuracy.csv, accuracy.md and accuracy.png.
`--idrid` is a folder with train/, test/ and labels.csv (columns split, file, retinopathy_grade), `--medmnist` one with
the .npz files; without it they are downloaded.
"""

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy_page import write_page
from benchmarks.trained import trained
from sansmax.engine.config import TrainConfig, load_config
from sansmax.engine.progress import Reporter
from sansmax.engine.run import Run, read_json
from sansmax.errors import InputError
from sansmax.report.tables import as_csv, read_rows, write_rows

ARMS = ("softmax", "sima", "seqnorm", "soft")
SCORES = ("auc", "accuracy")
COLUMNS = (
    *("study", "image_size", "attention", "seed"),
    *(f"{score}{end}" for score in SCORES for end in ("", "_low", "_high")),
    *("epochs", "seconds", "run"),
)
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


@dataclass(frozen=True)
class Study:
    """A set, its recipe, the sides of the images in pixels, and the epochs where the recipe has others."""

    recipe: str
    data: str
    sizes: tuple[int, ...]
    epochs: int | None = None


STUDIES = {
    "pneumoniamnist": Study("pneumoniamnist.yaml", "pneumoniamnist", (28,), epochs=6),
    "breastmnist": Study("breastmnist.yaml", "breastmnist", (28,)),
    "retinamnist": Study("retinamnist.yaml", "retinamnist", (28,)),
    "idrid": Study("idrid_referable.yaml", "idrid", (64, 128, 256, 512, 768)),
    "chest": Study("chest_xray_sizes.yaml", "pneumoniamnist", (64, 128, 256, 512, 768)),
}


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", default=list(STUDIES), choices=list(STUDIES))
    parser.add_argument("--sizes", type=int, nargs="+", default=None, help="of those that grow [all]")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--medmnist", type=Path, default=None, help="folder of .npz files [downloaded]")
    parser.add_argument("--idrid", type=Path, default=None, help="folder of IDRiD's pictures and labels.csv")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"), help="folder of the run folders")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--page", action="store_true", help="train nothing: the table and page of the runs there are")
    return parser.parse_args()


def config_of(
    arguments: argparse.Namespace, study: Study, size: int, attention: str, seed: int, patch_size: int | None = None
) -> TrainConfig:
    """The recipe of a study for one size, attention and seed, and another side of the patches where one is given."""
    changes: dict[str, Any] = {"seed": seed, "model.options.attention": attention, "data.image_size": size}
    if patch_size is not None:
        changes["model.options.patch_size"] = patch_size
    if study.epochs is not None:
        changes["epochs"] = study.epochs
    if study.data == "idrid":
        if arguments.idrid is None:
            raise InputError("give the folder of IDRiD's pictures with --idrid, or leave the study out by --studies")
        table = idrid_table(arguments.idrid, arguments.runs)
        changes |= {"data.source": str(table), "data.root": str(arguments.idrid), "data.path_column": "path"}
        changes |= {"data.label_column": "referable", "data.split_column": "split"}
    elif arguments.medmnist is None:
        changes["data.source"] = f"medmnist:{study.data}"
    else:
        changes["data.source"] = str(arguments.medmnist / f"{study.data}.npz")
    return load_config(RECIPES / study.recipe, changes)


def idrid_table(folder: Path, runs: Path) -> Path:
    """The table of IDRiD's pictures by referable retinopathy, grade 2 or more, in the official split."""
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = [
            [f"{row['split']}/{row['file']}", "yes" if int(row["retinopathy_grade"]) >= 2 else "no", row["split"]]
            for row in csv.DictReader(file)
        ]
    runs.mkdir(parents=True, exist_ok=True)
    table = runs / "idrid.csv"
    table.write_text(as_csv([["path", "referable", "split"], *rows]), encoding="utf-8")
    return table


def row_of(folder: Path, study: str, size: int, attention: str, seed: int) -> dict[str, Any]:
    """One line of accuracy.csv, from the files of a finished run."""
    scores = read_json(folder / "metrics.json")["test"]["scores"]
    last = read_rows(folder / "metrics.csv")[-1]
    row: dict[str, Any] = {"study": study, "image_size": size, "attention": attention, "seed": seed}
    for score in SCORES:
        row |= {f"{score}{end}": scores[score][key] for end, key in (("", "value"), ("_low", "low"), ("_high", "high"))}
    return {**row, "epochs": last["epoch"], "seconds": last["seconds"], "run": folder.as_posix()}


def predictions(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels and probabilities of a run's test images."""
    rows = read_rows(folder / "predictions_test.csv")
    names = [name.removeprefix("probability_") for name in rows[0] if name.startswith("probability_")]
    labels = np.array([names.index(str(row["label"])) for row in rows])
    return labels, np.array([[float(row[f"probability_{name}"]) for name in names] for row in rows])


def main() -> None:
    """Trains what is not there yet, and writes the page."""
    arguments, reporter = parse(), Reporter()
    rows: list[dict[str, Any]] = []
    environment: dict[str, Any] = {}
    for name in arguments.studies:
        study = STUDIES[name]
        sizes = [s for s in study.sizes if len(study.sizes) == 1 or arguments.sizes is None or s in arguments.sizes]
        for size, seed, attention in ((s, e, a) for s in sizes for e in arguments.seeds for a in arguments.arms):
            folder = arguments.runs / f"{name}-{size}-{attention}-seed{seed}"
            if not arguments.page:
                reporter.say(f"{name}, {size} px, {attention}, seed {seed}", style="bold")
                config = config_of(arguments, study, size, attention, seed)
                trained(config, folder, "python -m benchmarks.accuracy", reporter)
            if (folder / "metrics.json").exists():
                rows.append(row_of(folder, name, size, attention, seed))
                environment = Run.open(folder).info["environment"]
    if not rows:
        raise InputError(f"there are no finished runs in {arguments.runs}; leave out --page to train them")
    write_rows(arguments.output / "accuracy.csv", COLUMNS, rows)
    print(write_page(arguments.output, rows, predictions, environment))


if __name__ == "__main__":
    main()
