"""Runs side by side."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sansmax.cli.app import QuietOption, app, say


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Folders of two runs or more; the others are compared with the first.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("runs/compare"),
    split: Annotated[str, typer.Option(help="Which images: test or val.")] = "test",
    quiet: QuietOption = False,
) -> None:
    """Compare runs on the same images, or on the same patients: paired differences with intervals, tests, cost."""
    from sansmax.engine.compare_bags import are_of_bags, compare_bags
    from sansmax.engine.compare_runs import compare_runs, distinct
    from sansmax.engine.progress import Reporter

    if are_of_bags(distinct(runs)):
        text = compare_bags(runs, output)
    else:
        text = compare_runs(runs, output, split=split, reporter=Reporter(quiet=quiet)).text()
    sys.stdout.write(text + "\n")
    say(f"read: {output / 'compare.md'}", quiet)
