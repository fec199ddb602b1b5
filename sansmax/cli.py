"""The command line: each verb is a thin wrapper of one library function.

Wrong input ends with one message and status 2, a run that was stopped with status 130; a traceback is shown only with
`--debug`, or where the fault is ours.
"""

import json
import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sansmax.errors import InputError

if TYPE_CHECKING:
    from sansmax.engine.doctor import Finding

app = typer.Typer(
    name="sansmax",
    help="Softmax-free vision transformers with linear-time attention, for images of any size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DATA_HELP = (
    "A folder with one sub-folder per class (optionally under train/, val/, test/), a .csv table, a MedMNIST-style "
    ".npz, medmnist:NAME or medmnist:NAME:SIZE, torchvision:NAME, torch/NAME, hfds/NAME, tfds/NAME, or mosaics:"
)
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the configuration; may be given many times."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]


PathColumn = Annotated[str | None, typer.Option(help="Column of a table that holds the image's path.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of a table that holds the class.")]
SplitColumn = Annotated[str | None, typer.Option(help="Column of a table that holds train, val or test.")]
GroupColumn = Annotated[str | None, typer.Option(help="Column that holds the patient; groups are never split.")]
RootOption = Annotated[Path | None, typer.Option(help="Folder of a table's images, or of the files of a named set.")]
SizeOption = Annotated[
    str | None,
    typer.Option("--image-size", help='Pixels [as in training], or "native": the picture at its own resolution.'),
]
SkipOption = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and list them.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")]
RunArgument = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    """Softmax-free vision transformers with linear-time attention, for images of any size."""


@app.command()
def train(
    data: Annotated[str | None, typer.Argument(help=DATA_HELP)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Any model of timm's registry.")] = None,
    image_size: Annotated[str | None, typer.Option(help="Pixels, S or HxW, to which images are resized.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "-b", help="Images per step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    path_column: PathColumn = None,
    label_column: LabelColumn = None,
    split_column: SplitColumn = None,
    group_column: GroupColumn = None,
    root: RootOption = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration as YAML.")] = None,
    set_: SetOption = None,
    skip_bad: SkipOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a network on labelled images; evaluate it; write a run folder with a report."""
    from sansmax.engine.config import load_config
    from sansmax.engine.progress import Reporter
    from sansmax.engine.train import train as train_run

    if output is None:
        raise InputError("give the folder of the run: --output RUN")
    given: dict[str, Any] = {
        "data.source": data,
        "model.name": model,
        "data.image_size": None if image_size is None else parse_size(image_size),
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "data.path_column": path_column,
        "data.label_column": label_column,
        "data.split_column": split_column,
        "data.group_column": group_column,
        "data.root": None if root is None else str(root),
        "data.skip_bad": skip_bad or None,
    }
    changes = [f"{key}={_yaml(value)}" for key, value in given.items() if value is not None] + (set_ or [])
    if resume and config is None and (output / "config.yaml").exists():
        # what is not given stays as the run has it; what is given has to agree with it
        config = output / "config.yaml"
    chosen = load_config(config, changes)
    if not chosen.data.source and not resume:
        raise InputError(f"give DATA to train on: {DATA_HELP[0].lower()}{DATA_HELP[1:]}")
    run = train_run(
        chosen, output, overwrite=overwrite, resume=resume, command=_command_line(), reporter=Reporter(quiet=quiet)
    )
    _say(f"run: {run.folder}\nread: {run.folder / 'summary.md'}", quiet)


@app.command()
def evaluate(
    run: RunArgument,
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of the results [RUN/evaluate-NAME].")
    ] = None,
    split: Annotated[str, typer.Option(help="Which images: test, val, train, or all.")] = "test",
    path_column: PathColumn = None,
    label_column: LabelColumn = None,
    split_column: SplitColumn = None,
    group_column: GroupColumn = None,
    root: RootOption = None,
    skip_bad: SkipOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure a run on labelled images, with intervals."""
    from sansmax.engine.evaluate import evaluate as evaluate_run
    from sansmax.engine.progress import Reporter

    columns = {
        "path_column": path_column,
        "label_column": label_column,
        "split_column": split_column,
        "group_column": group_column,
        "root": root,
    }
    done = evaluate_run(
        run, data, output=output, split=split, skip_bad=skip_bad, reporter=Reporter(quiet=quiet), **columns
    )
    _say(done.text(), False)


@app.command()
def predict(
    run: RunArgument,
    paths: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write CSV here, and JSON beside it.")] = None,
    image_size: SizeOption = None,
    skip_bad: SkipOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Classify pictures; print or write the probabilities."""
    from sansmax.engine.predict_many import predict_many
    from sansmax.engine.progress import Reporter

    size = _size_or_native(image_size)
    done = predict_many(run, paths, output=output, image_size=size, skip_bad=skip_bad, reporter=Reporter(quiet=quiet))
    sys.stdout.write(done.json() if as_json else done.csv())


@app.command()
def heatmap(
    run: RunArgument,
    paths: Annotated[list[Path], typer.Argument(help="Pictures.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the heat maps [RUN/heatmaps].")
    ] = None,
    class_: Annotated[str | None, typer.Option("--class", help="Class to explain [the predicted one].")] = None,
    image_size: SizeOption = None,
    quiet: QuietOption = False,
) -> None:
    """Draw which parts of a picture speak for a class and against it; also as an array (.npz)."""
    from sansmax.engine.heatmaps import heatmaps
    from sansmax.engine.progress import Reporter

    size = _size_or_native(image_size)
    for path in heatmaps(run, paths, output=output, class_name=class_, image_size=size, reporter=Reporter(quiet=quiet)):
        _say(str(path), False)


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
def doctor() -> None:
    """Check this installation and machine: PASS, WARN or FAIL, each with the mend."""
    from sansmax.engine.doctor import examine

    findings = examine()
    console = Console()
    if not console.is_terminal:
        # a line each, for logs and reports of faults
        lines = [f"{f.state}  {f.what}: {f.detail}" + (f"; mend: {f.fix}" if f.fix else "") for f in findings]
        _say("\n".join(lines), False)
    else:
        _draw_findings(console, findings)
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
    _say(f"run: {folder}\nread: {folder / 'summary.md'}", quiet)


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
    again = do_again(_command_line(), versions(setup))
    done = run_benchmark(suite, output, cases, limits, again=again, reporter=Reporter(quiet=quiet))
    if not quiet:
        draw(Console(), done.rows)
    _say("written: " + ", ".join(map(str, done.files)) if done.files else "nothing was measured", quiet)
    if not done.complete:
        raise typer.Exit(130)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    names = _names(text)
    if names is None or all(name.isdigit() for name in names):
        return None if names is None else tuple(map(int, names))
    raise InputError(f"{option} is whole numbers with commas between them, such as 196,1024, got {text!r}")


def parse_size(text: str) -> int | tuple[int, int]:
    """An image size from "224" or "384x512" (height x width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.strip().isdigit() for p in parts):
        raise InputError(f"--image-size is a number of pixels such as 224, or HxW such as 384x512, got {text!r}")
    sides = tuple(int(p) for p in parts)
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _size_or_native(text: str | None) -> int | str | None:
    if text is None or text == "native":
        return text
    size = parse_size(text)
    if isinstance(size, tuple):
        raise InputError(f'--image-size is one number of pixels here, or "native", got {text!r}')
    return size


def _yaml(value: Any) -> str:
    return json.dumps(value)


def _command_line() -> str:
    return shlex.join(["sansmax", *sys.argv[1:]])


def _say(text: str, quiet: bool) -> None:
    if not quiet:
        sys.stdout.write(text + "\n")


def main() -> None:
    """Runs the command line; the entry point of `sansmax`."""
    from sansmax.engine.stopping import Stopped

    # people put it at the end, too
    debug = "--debug" in sys.argv[1:]
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    console = Console(stderr=True, highlight=False)
    try:
        app(arguments, prog_name="sansmax")
    except Stopped as stopped:
        console.print(str(stopped), markup=False, soft_wrap=True)
        sys.exit(130)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, InputError):
            console.print(f"error: {error}", markup=False, soft_wrap=True, style="red")
            sys.exit(2)
        text = f"unexpected error, a fault of ours: {type(error).__name__}: {error}\nrepeat with --debug to see where"
        console.print(text, markup=False, soft_wrap=True, style="red")
        sys.exit(1)
