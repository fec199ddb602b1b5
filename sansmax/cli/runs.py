"""Training a network on pictures, and using it."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sansmax.cli.app import QuietOption, app, command_line, say
from sansmax.cli.options import (
    DATA_HELP,
    AllPatchesOption,
    ConvertOption,
    DevicesOption,
    GroupColumn,
    InitialCheckpointOption,
    LabelColumn,
    MLflowOption,
    MppOption,
    OverwriteOption,
    PathColumn,
    RootOption,
    RunArgument,
    SequenceOption,
    SetOption,
    SizeOption,
    SkipOption,
    SlideMppOption,
    SplitColumn,
    StoreOption,
    TensorBoardOption,
    WandbOption,
    changes,
    parse_size,
    run_first,
    size_or_native,
    slide_options,
    trackers,
)
from sansmax.cli.training_bags import (
    BagsOption,
    FoldsOption,
    TaskOption,
    evaluate_on_bags,
    is_of_bags,
    predict_on_bags,
    train_on_bags,
)
from sansmax.errors import InputError


@app.command()
def train(
    data: Annotated[str | None, typer.Argument(help=DATA_HELP)] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Any model of timm's registry.")] = None,
    image_size: Annotated[str | None, typer.Option(help="Pixels, S or HxW, to which images are resized.")] = None,
    initial_checkpoint: InitialCheckpointOption = None,
    convert: ConvertOption = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", "-b", help="Images per step.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    devices: DevicesOption = None,
    sequence_parallel: SequenceOption = None,
    path_column: PathColumn = None,
    label_column: LabelColumn = None,
    split_column: SplitColumn = None,
    group_column: GroupColumn = None,
    root: RootOption = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Configuration as YAML.")] = None,
    set_: SetOption = None,
    skip_bad: SkipOption = False,
    bags: BagsOption = None,
    task: TaskOption = None,
    folds: FoldsOption = None,
    tensorboard: TensorBoardOption = False,
    wandb: WandbOption = False,
    mlflow: MLflowOption = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --output.")] = False,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a network on labelled images, or on bags of features; evaluate it; write a run folder with a report."""
    from sansmax.engine.config import load_config
    from sansmax.engine.progress import Reporter
    from sansmax.engine.train import train as train_run

    if output is None:
        raise InputError("give the folder of the run: --output RUN")
    of_both = {
        "model.name": model,
        "model.initial_checkpoint": initial_checkpoint,
        "model.convert": convert,
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "parallel.devices": devices,
        "parallel.sequence_parallel": sequence_parallel,
        "track.loggers": trackers(tensorboard=tensorboard, wandb=wandb, mlflow=mlflow),
    }
    if is_of_bags(bags, output):
        train_on_bags(
            output,
            {
                "data.labels": data,
                "data.bags": None if bags is None else str(bags),
                "data.task": task,
                "data.folds": folds,
                "data.label": label_column,
                "data.case_column": group_column,
                "data.allow_missing": skip_bad or None,
                **of_both,
            },
            {"--image-size": image_size, "--path-column": path_column, "--split-column": split_column, "--root": root},
            config=config,
            set_=set_,
            resume=resume,
            overwrite=overwrite,
            quiet=quiet,
        )
        return
    if task is not None or folds is not None:
        raise InputError("--task and --folds are for bags of features; give their folder with --bags")
    given: dict[str, Any] = {
        "data.source": data,
        "data.image_size": None if image_size is None else parse_size(image_size),
        "data.path_column": path_column,
        "data.label_column": label_column,
        "data.split_column": split_column,
        "data.group_column": group_column,
        "data.root": None if root is None else str(root),
        "data.skip_bad": skip_bad or None,
        **of_both,
    }
    if resume and config is None and (output / "config.yaml").exists():
        # what is not given stays as the run has it; what is given has to agree with it
        config = output / "config.yaml"
    chosen = load_config(config, changes(given, set_))
    if not chosen.data.source and not resume:
        raise InputError(f"give DATA to train on: {DATA_HELP[0].lower()}{DATA_HELP[1:]}")
    run = train_run(
        chosen, output, overwrite=overwrite, resume=resume, command=command_line(), reporter=Reporter(quiet=quiet)
    )
    say(f"run: {run.folder}\nread: {run.folder / 'summary.md'}", quiet)


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
    bags: BagsOption = None,
    quiet: QuietOption = False,
) -> None:
    """Measure a run on labelled images, or on bags of features, with intervals."""
    if bags is not None:
        columns = {"label": label_column, "case_column": group_column, "allow_missing": skip_bad}
        evaluate_on_bags(run, data, bags, output=output, quiet=quiet, **columns)
        return
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
    say(done.text(), False)


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a run, before or after what it reads.", metavar="RUN")],
    paths: Annotated[list[Path], typer.Argument(help="Pictures, slides, bags of features, or folders of them.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write CSV here, and JSON beside it.")] = None,
    image_size: SizeOption = None,
    mpp: MppOption = None,
    slide_mpp: SlideMppOption = None,
    all_patches: AllPatchesOption = False,
    store: StoreOption = "memory",
    skip_bad: SkipOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Classify pictures, slides at their own resolution, or bags of features; print or write the probabilities."""
    from sansmax.engine.predict_many import predict_many
    from sansmax.engine.progress import Reporter

    run, paths = run_first(run, paths)
    if is_of_bags(None, run):
        predict_on_bags(run, paths, output=output, skip_bad=skip_bad, as_json=as_json, quiet=quiet)
        return
    size = size_or_native(image_size)
    slide = slide_options(mpp, slide_mpp, all_patches, store)
    how = {"output": output, "skip_bad": skip_bad, "reporter": Reporter(quiet=quiet)}
    done = predict_many(run, paths, image_size=size, slide=slide, **how)
    sys.stdout.write(done.json() if as_json else done.csv())


@app.command()
def heatmap(
    run: RunArgument,
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Pictures, slides, bags of features; or slide ids with --bags.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the heat maps [RUN/heatmaps].")
    ] = None,
    class_: Annotated[str | None, typer.Option("--class", help="Class to explain [the predicted one].")] = None,
    formats: Annotated[
        str | None,
        typer.Option("--format", help="Files to write, with commas: png, h5, tiff, geojson [of slides: png,h5]."),
    ] = None,
    bags: Annotated[Path | None, typer.Option("--bags", help="Folder of bags, for a run on bags.")] = None,
    slide: Annotated[
        Path | None, typer.Option("--slide", help="Of bags: their slide, or the folder of their slides, to draw on.")
    ] = None,
    thumbnail: Annotated[
        Path | None, typer.Option("--thumbnail", help="Of one bag: a picture of its whole slide, to draw on.")
    ] = None,
    downsample: Annotated[
        float | None, typer.Option(help="Of the TIFF: level-0 pixels per pixel [tokens of whole pixels].")
    ] = None,
    transparent: Annotated[bool, typer.Option("--transparent", help="Of the TIFF: no background.")] = False,
    faithfulness: Annotated[
        bool, typer.Option("--faithfulness", help="Of bags: add a page that removes tokens for real.")
    ] = False,
    image_size: SizeOption = None,
    mpp: MppOption = None,
    slide_mpp: SlideMppOption = None,
    all_patches: AllPatchesOption = False,
    store: StoreOption = "memory",
    quiet: QuietOption = False,
) -> None:
    """Draw which parts of a picture, slide or bag speak for a class and against it; also as an array."""
    from sansmax.engine.progress import Reporter
    from sansmax.engine.run_heatmaps import Wanted, run_heatmaps

    wanted = Wanted(
        formats=None if formats is None else tuple(formats.replace(" ", "").split(",")),
        class_name=class_,
        image_size=size_or_native(image_size),
        bags=bags,
        slide=slide,
        thumbnail=thumbnail,
        downsample=downsample,
        transparent=transparent,
        faithfulness=faithfulness,
        options=slide_options(mpp, slide_mpp, all_patches, store),
    )
    for path in run_heatmaps(run, paths or [], wanted, output=output, reporter=Reporter(quiet=quiet)):
        say(str(path), False)
