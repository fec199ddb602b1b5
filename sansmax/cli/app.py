"""The application, and what all its verbs share.

Wrong input ends with one message and status 2, a run that was stopped with status 130; a traceback is shown only with
`--debug`, or where the fault is ours.
"""

import os
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sansmax.errors import InputError

app = typer.Typer(
    name="sansmax",
    help="Softmax-free vision transformers with linear-time attention, for images of any size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    """Softmax-free vision transformers with linear-time attention, for images of any size."""


def command_line() -> str:
    """What the user typed, for the record of a run."""
    return shlex.join(["sansmax", *sys.argv[1:]])


def say(text: str, quiet: bool) -> None:
    """Prints a line unless `--quiet`."""
    if not quiet:
        sys.stdout.write(text + "\n")


def main() -> None:
    """Runs the command line; the entry point of `sansmax`."""
    from sansmax.engine.place import place_of
    from sansmax.engine.processes import speaks
    from sansmax.engine.stopping import Stopped

    place = place_of()
    first = place is None or place.rank == 0
    if not first:
        # of several processes the first one tells the results
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - open until the program ends
    # people put it at the end, too
    debug = "--debug" in sys.argv[1:]
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    console = Console(stderr=True, highlight=False)
    try:
        # not standing alone, wrong options are an error like any other, and an exit a number
        status = app(arguments, prog_name="sansmax", standalone_mode=first)
        sys.exit(status if isinstance(status, int) else 0)
    except Stopped as stopped:
        if speaks():
            console.print(str(stopped), markup=False, soft_wrap=True)
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if not speaks():
            # another process of the run says why
            sys.exit(2 if isinstance(error, InputError) else 1)
        if isinstance(error, InputError):
            console.print(f"error: {error}", markup=False, soft_wrap=True, style="red")
            sys.exit(2)
        text = f"unexpected error, a fault of ours: {type(error).__name__}: {error}\nrepeat with --debug to see where"
        console.print(text, markup=False, soft_wrap=True, style="red")
        sys.exit(1)
