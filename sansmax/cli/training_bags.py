"""Training and measuring slide classifiers on bags of features: what `train` and `evaluate` do with --bags."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sansmax.cli.app import command_line, say
from sansmax.cli.options import changes
from sansmax.errors import InputError

BagsOption = Annotated[
    Path | None, typer.Option("--bags", help="Folder of bags of features; DATA is then a table of labels.")
]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", help="Of bags: classification, multilabel, regression or survival [by the table]."),
]
FoldsOption = Annotated[int | None, typer.Option("--folds", help="Of bags: cross-validation with so many folds.")]


def is_of_bags(bags: Path | None, output: Path) -> bool:
    """Whether bags were given, or the folder to go on in holds a run on bags."""
    if bags is not None or (output / "cross_validation.json").is_file():
        return True
    record = output / "run.json"
    return record.is_file() and '"kind": "bags"' in record.read_text(encoding="utf-8")


def train_on_bags(
    output: Path,
    given: dict[str, Any],
    images_only: dict[str, Any],
    *,
    config: Path | None,
    set_: list[str] | None,
    resume: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Trains on bags; `given` are keys of the configuration, `images_only` options that have no meaning here."""
    from sansmax.engine.bag_config import load_bag_config, with_changes
    from sansmax.engine.bag_experiment import stored_config, train_bags
    from sansmax.engine.progress import Reporter

    if wrong := [name for name, value in images_only.items() if value]:
        raise InputError(f"{', '.join(wrong)} is for images; leave it out with --bags")
    wanted = changes(given, set_)
    stored = stored_config(output) if resume and config is None else None
    # what is not given stays as the run has it; what is given has to agree with it
    chosen = load_bag_config(config, wanted) if stored is None else with_changes(stored, wanted)
    how = {"resume": resume, "overwrite": overwrite, "reporter": Reporter(quiet=quiet)}
    done = train_bags(chosen, output, command=command_line(), **how)
    say(f"run: {done.folder}\nread: {done.folder / 'summary.md'}", quiet)


def evaluate_on_bags(run: Path, labels: str, bags: Path, *, output: Path | None, quiet: bool, **columns: Any) -> None:
    """Measures a run on other bags with labels."""
    from sansmax.engine.bag_experiment import evaluate_bags
    from sansmax.engine.progress import Reporter
    from sansmax.report.case_page import headline

    metrics = evaluate_bags(run, labels, bags, output=output, reporter=Reporter(quiet=quiet), **columns)
    say(headline(metrics, "test").replace("*", ""), False)


def predict_on_bags(
    run: Path, paths: list[Path], *, output: Path | None, skip_bad: bool, as_json: bool, quiet: bool
) -> None:
    """Prints what a run says of bags: files, or folders of them."""
    from sansmax.engine.bag_predict import predict_folder
    from sansmax.engine.progress import Reporter

    if len(paths) > 1:
        raise InputError(f"a run on bags reads one folder of bags, or one file; {len(paths)} were given")
    found = predict_folder(run, paths[0], output=output, skip_bad=skip_bad, reporter=Reporter(quiet=quiet))
    sys.stdout.write(found.json() if as_json else found.csv())
