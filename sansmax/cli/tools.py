"""What is here, whether it works, and how fast: models, doctor, demo, benchmark."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sansmax.cli.app import QuietOption, app, command_line, say
from sansmax.cli.options import OverwriteOption
from sansmax.errors import InputError

if TYPE_CHECKING:
    from sansmax.engine.doctor import Finding


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="Names to list; * stands for anything.")] = "",
) -> None:
    """List models: those of this package, or all of timm's that match a pattern."""
    import timm

    from sansmax.models import list_models

    names = list_models() if not pattern else timm.list_models(pattern)
    if not names:
        raise InputError(f"no model matches {pattern!r}; try 'sansmax models \"*{pattern.strip('*')}*\"'")
    sys.stdout.write("\n".join(names) + "\n")


@app.command()
def doctor(
    numerics: Annotated[
        bool, typer.Option("--numerics", help="Measure what each attention loses in 16 bit, and its time: minutes.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Of --numerics: folder for numerics.csv and numerics.md.")
    ] = None,
    quiet: QuietOption = False,
) -> None:
    """Check this installation and machine: PASS, WARN or FAIL, each with the mend."""
    from sansmax.engine.doctor import examine, examine_numerics
    from sansmax.engine.progress import Reporter

    if output is not None and not numerics:
        raise InputError("--output is the folder for the table of precisions; give --numerics too")
    findings = examine()
    if numerics:
        with Reporter(quiet=quiet).bar("precisions") as bar:
            findings += examine_numerics(output, command_line(), bar)
    console = Console()
    if not console.is_terminal:
        # a line each, for logs and reports of faults
        lines = [f"{f.state}  {f.what}: {f.detail}" + (f"; mend: {f.fix}" if f.fix else "") for f in findings]
        say("\n".join(lines), quiet)
    elif not quiet:
        _draw_findings(console, findings)
    if output is not None:
        say(f"written: {output / 'numerics.csv'}, {output / 'numerics.md'}", quiet)
    if any(f.state == "FAIL" for f in findings):
        raise typer.Exit(1)


def _draw_findings(console: Console, findings: "list[Finding]") -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "what", "found", "mend"):
        table.add_column(column)
    colours = {"PASS": "green", "WARN": "yellow", "FAIL": "red"}
    for f in findings:
        table.add_row(f"[{colours[f.state]}]{f.state}[/]", escape(f.what), escape(f.detail), escape(f.fix))
    console.print(table)


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Every step in short: done soon, too short to be good.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the demo in --output.")] = False,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """The main job on digit mosaics: train, evaluate, a 4096 px picture, heat maps, what softmax costs."""
    from sansmax.engine.demo import run_demo
    from sansmax.engine.progress import Reporter
    from sansmax.engine.stopping import Stopped

    how = {"seed": seed, "quick": quick, "overwrite": overwrite, "resume": resume}
    try:
        folder = run_demo(output, **how, reporter=Reporter(quiet=quiet))
    except Stopped as stopped:
        flags = " --quick" if quick else ""
        raise Stopped(stopped.what, output, f"demo --seed {seed}{flags}") from None
    say(f"run: {folder}\nread: {folder / 'summary.md'}", quiet)


@app.command()
def benchmark(
    suite: Annotated[str, typer.Argument(help="attention, orders or targets.")] = "attention",
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("runs/benchmark"),
    case: Annotated[str, typer.Option(help="Of attention: layer, encoder, or both with a comma.")] = "layer,encoder",
    contestants: Annotated[
        str | None, typer.Option(help="Names with commas, NAME:ORDER for a forced order [all there are].")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Sizes with commas [those of the suite].")] = None,
    dim: Annotated[int | None, typer.Option(help="Channels [those of each case].")] = None,
    heads: Annotated[int | None, typer.Option(help="Heads [those of each case].")] = None,
    batch: Annotated[int | None, typer.Option(help="Inputs at a time [those of each case].")] = None,
    direction: Annotated[str | None, typer.Option(help="forward, forward+backward, or both with a comma.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, float64, with commas.")] = "float32",
    threads: Annotated[str, typer.Option(help="Numbers of threads with commas: each is measured.")] = "1",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    budget: Annotated[
        float | None, typer.Option(help="Seconds that one pass may take [10; 2 for orders, 120 for targets].")
    ] = None,
    memory: Annotated[float, typer.Option(help="GiB that one pass may take [0: half of what is free].")] = 0.0,
    repeats: Annotated[
        int | None, typer.Option(help="Times that are taken of each [7; 15 for orders, 5 for targets].")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes, the package alone: about a minute.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Measure time and memory of attention, contestants side by side; write a table, a page and pictures."""
    from sansmax.engine.benchmark import Limits, versions
    from sansmax.engine.benchmark import benchmark as run_benchmark
    from sansmax.engine.cases import Setup
    from sansmax.engine.progress import Reporter
    from sansmax.engine.suites import cases_of
    from sansmax.report.benchmark import do_again, draw

    setup = Setup(
        tokens=_numbers("--tokens", tokens),
        dim=dim,
        heads=heads,
        batch=batch,
        directions=_names(direction),
        dtypes=_names(dtype) or (),
        threads=_numbers("--threads", threads) or (),
        device=device,
        quick=quick,
    )
    cases = cases_of(suite, setup, kinds=_names(case) or (), contestants=_names(contestants))
    limits = Limits.of(suite, quick=quick, budget=budget, memory_mib=1024 * memory, repeats=repeats)
    again = do_again(command_line(), versions(setup))
    done = run_benchmark(suite, output, cases, limits, again=again, reporter=Reporter(quiet=quiet))
    if not quiet:
        draw(Console(), done.rows)
    say("written: " + ", ".join(map(str, done.files)) if done.files else "nothing was measured", quiet)
    if not done.complete:
        raise typer.Exit(130)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    names = _names(text)
    if names is None or all(name.isdigit() for name in names):
        return None if names is None else tuple(map(int, names))
    raise InputError(f"{option} is whole numbers with commas between them, such as 196,1024, got {text!r}")
