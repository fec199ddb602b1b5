"""PneumoniaMNIST by recipes/pneumoniamnist.yaml: AUC and accuracy of the test images, for several seeds.

    python -m benchmarks.pneumonia

Trains a run per seed under runs/pneumonia (finished ones are taken as they are, stopped ones go on), evaluates it with
and without averaging over the mirror image, and writes pneumonia.csv and pneumonia.md. `--twin` trains the same network
with softmax attention beside it.
"""

import argparse
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from benchmarks.machine import do_it_again
from benchmarks.trained import trained
from sansmax.engine.config import TrainConfig, load_config
from sansmax.engine.evaluate import evaluate
from sansmax.engine.progress import Reporter
from sansmax.engine.run import Run
from sansmax.report.metrics import Metrics
from sansmax.report.summary import interval_text, table, write_summary
from sansmax.report.tables import read_rows, write_rows

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "pneumoniamnist.yaml"
SCORES = ("auc", "accuracy")
COLUMNS = (
    "attention",
    "seed",
    "mirrored",
    *(f"{score}{end}" for score in SCORES for end in ("", "_low", "_high")),
    "epochs",
    "seconds",
    "run",
)
# what this line and all below it hold is written by hand and stays
NOTE = "## How the recipe was chosen"
PUBLISHED = [("ResNet-18, 28 px", 0.944, 0.854), ("ResNet-18, 224 px", 0.956, 0.864)]
SOURCE = (
    "The figures of ResNet-18 are those that the MedMNIST v2 paper publishes (https://arxiv.org/abs/2110.14795), for "
    "the same official splits. Brackets: 95 % interval over resamples of the test images; it tells how much another "
    "test set would vary, not another training. Seconds are the training's alone."
)


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="medmnist:pneumoniamnist", help="the set, or the path of its .npz file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--twin", action="store_true", help="train the softmax twin, too")
    parser.add_argument("--epochs", type=int, default=None, help="epochs [as in the recipe]")
    parser.add_argument("--runs", type=Path, default=Path("runs/pneumonia"), help="folder of the run folders")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def config_of(arguments: argparse.Namespace, attention: str, seed: int) -> TrainConfig:
    """The recipe for one seed."""
    changes: dict[str, Any] = {"data.source": arguments.data, "seed": seed}
    if attention != "seqnorm":
        changes["model.options.attention"] = attention
    if arguments.epochs is not None:
        changes["epochs"] = arguments.epochs
    return load_config(RECIPE, changes)


def command_of(config: TrainConfig, folder: Path) -> str:
    """What a person types to train the same."""
    command = f"sansmax train {config.data.source} --config recipes/{RECIPE.name} --output {folder}"
    options = config.model.options.get("attention")
    command += f" --seed {config.seed}" + (f" --set model.options.attention={options}" if options else "")
    return command + (f" --epochs {config.epochs}" if config.epochs != load_config(RECIPE).epochs else "")


def measured(run: Run, mirrored: bool, reporter: Reporter) -> Metrics:
    """Scores of the test images, with or without averaging over the mirror image."""
    shown = dataclasses.replace(run, config=run.config.model_copy(update={"tta_hflip": mirrored}))
    folder = run.folder / ("evaluate-mirrored" if mirrored else "evaluate-plain")
    return evaluate(shown, run.config.data.source, output=folder, reporter=reporter).metrics


def row_of(run: Run, attention: str, mirrored: bool, metrics: Metrics) -> dict[str, Any]:
    """One line of pneumonia.csv."""
    last = read_rows(run.folder / "metrics.csv")[-1]
    row: dict[str, Any] = {"attention": attention, "seed": run.config.seed, "mirrored": mirrored}
    for score in SCORES:
        interval = metrics[score]
        row |= {score: interval.value, f"{score}_low": interval.low, f"{score}_high": interval.high}
    return {**row, "epochs": last["epoch"], "seconds": last["seconds"], "run": run.folder.as_posix()}


def medians(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """A line per network and way of evaluation, and the published ones."""
    kinds = dict.fromkeys((row["attention"], row["mirrored"]) for row in rows)
    lines: list[list[Any]] = []
    for attention, mirrored in kinds:
        own = [row for row in rows if (row["attention"], row["mirrored"]) == (attention, mirrored)]
        auc, accuracy, seconds = (statistics.median(row[key] for row in own) for key in (*SCORES, "seconds"))
        name = f"{attention}, {'with' if mirrored else 'without'} the mirror image"
        lines.append([name, f"{auc:.3f}", f"{accuracy:.3f}", f"{seconds:.0f} s", f"median of {len(own)}"])
    return lines + [[name, f"{auc:.3f}", f"{accuracy:.3f}", "", "published"] for name, auc, accuracy in PUBLISHED]


def write_page(path: Path, rows: list[dict[str, Any]], every: list[list[Any]], environment: dict[str, Any]) -> None:
    """pneumonia.md; what was written there by hand stays."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    note = old[old.index(NOTE) :].split("\n", 1)[-1] if NOTE in old else ""
    write_summary(
        path,
        "PneumoniaMNIST",
        [
            ("", table(["network", "test AUC", "test accuracy", "training", ""], medians(rows)) + "\n\n" + SOURCE),
            ("Each seed", table(["attention", "seed", "mirrored", "test AUC", "test accuracy", "training"], every)),
            ("Do it again", do_it_again("benchmarks.pneumonia", environment)),
            (NOTE.removeprefix("## "), note),
        ],
    )


def main() -> None:
    """Trains, evaluates, prints and writes."""
    arguments, reporter = parse(), Reporter()
    rows: list[dict[str, Any]] = []
    every: list[list[Any]] = []
    environment: dict[str, Any] = {}
    for attention in ("seqnorm", "softmax") if arguments.twin else ("seqnorm",):
        for seed in arguments.seeds:
            folder = arguments.runs / f"{attention}-seed{seed}"
            reporter.say(f"{attention}, seed {seed}", style="bold")
            config = config_of(arguments, attention, seed)
            run = trained(config, folder, command_of(config, folder), reporter)
            environment = run.info["environment"]
            for mirrored in (True, False):
                metrics = measured(run, mirrored, reporter)
                row = row_of(run, attention, mirrored, metrics)
                rows.append(row)
                auc, accuracy = (interval_text(metrics[score], percent=False) for score in SCORES)
                every.append([attention, str(seed), mirrored, auc, accuracy, f"{row['seconds']:.0f} s"])
    write_rows(arguments.output / "pneumonia.csv", COLUMNS, rows)
    write_page(arguments.output / "pneumonia.md", rows, every, environment)
    print(table(["network", "test AUC", "test accuracy", "training", ""], medians(rows)))
    print(f"\nwritten: {arguments.output / 'pneumonia.md'}")


if __name__ == "__main__":
    main()
