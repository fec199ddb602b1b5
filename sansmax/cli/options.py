"""Options that several verbs have."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sansmax.errors import InputError

if TYPE_CHECKING:
    from sansmax.engine.predict_slide import SlideOptions

DATA_HELP = (
    "A folder with one sub-folder per class (optionally under train/, val/, test/), a .csv table, a MedMNIST-style "
    ".npz, medmnist:NAME or medmnist:NAME:SIZE, torchvision:NAME, torch/NAME, hfds/NAME, tfds/NAME, or mosaics:"
)
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the configuration; may be given many times."),
]
PathColumn = Annotated[str | None, typer.Option(help="Column of a table that holds the image's path.")]
LabelColumn = Annotated[str | None, typer.Option(help="Column of a table that holds the class.")]
SplitColumn = Annotated[str | None, typer.Option(help="Column of a table that holds train, val or test.")]
GroupColumn = Annotated[str | None, typer.Option(help="Column that holds the patient; groups are never split.")]
RootOption = Annotated[Path | None, typer.Option(help="Folder of a table's images, or of the files of a named set.")]
SizeOption = Annotated[
    str | None,
    typer.Option("--image-size", help='Pixels [as in training], or "native": the picture at its own resolution.'),
]
MppOption = Annotated[
    float | None,
    typer.Option("--mpp", help="Of slides: micrometres per pixel that the network sees [level 0 as it is]."),
]
SlideMppOption = Annotated[
    float | None, typer.Option("--slide-mpp", help="Micrometres per pixel at level 0, where a slide does not say.")
]
AllPatchesOption = Annotated[
    bool, typer.Option("--all-patches", help="Of slides: read every patch, not only those with tissue.")
]
StoreOption = Annotated[
    str, typer.Option("--store", help="Where a slide's tokens live between layers: memory, disk or recompute.")
]
SkipOption = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and list them.")]
TensorBoardOption = Annotated[bool, typer.Option("--tensorboard", help="Also log to TensorBoard, in the run's folder.")]
WandbOption = Annotated[bool, typer.Option("--wandb", help="Also log to Weights & Biases.")]
MLflowOption = Annotated[bool, typer.Option("--mlflow", help="Also log to MLflow.")]
InitialCheckpointOption = Annotated[
    str | None,
    typer.Option("--initial-checkpoint", help="Weights to start from: a file, or a run. Another head is made anew."),
]
ConvertOption = Annotated[
    str | None,
    typer.Option("--convert", help="Swap the attention for this one, once the weights are there: seqnorm, sima, ..."),
]
DevicesOption = Annotated[
    int | None, typer.Option("--devices", help="Processes of this machine that train together, a device each.")
]
SequenceOption = Annotated[
    int | None, typer.Option("--sequence-parallel", help="Processes that share the tokens of one image or bag.")
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")]
RunArgument = Annotated[Path, typer.Argument(help="Folder of a run.", metavar="RUN")]


def parse_size(text: str) -> int | tuple[int, int]:
    """An image size from "224" or "384x512" (height x width)."""
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(p.strip().isdigit() for p in parts):
        raise InputError(f"--image-size is a number of pixels such as 224, or HxW such as 384x512, got {text!r}")
    sides = tuple(int(p) for p in parts)
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def size_or_native(text: str | None) -> int | str | None:
    """An image size for a picture: a number of pixels, "native", or what training used (None)."""
    if text is None or text == "native":
        return text
    size = parse_size(text)
    if isinstance(size, tuple):
        raise InputError(f'--image-size is one number of pixels here, or "native", got {text!r}')
    return size


def as_yaml(value: Any) -> str:
    """A value as the configuration reads it."""
    return json.dumps(value)


def changes(given: dict[str, Any], set_: list[str] | None) -> list[str]:
    """Changes of a configuration as `key=value`: options that were given, then what --set says."""
    return [f"{key}={as_yaml(value)}" for key, value in given.items() if value is not None] + (set_ or [])


def trackers(**chosen: bool) -> list[str] | None:
    """The names of those that were chosen; None where the configuration has the word."""
    return [name for name, wanted in chosen.items() if wanted] or None


def run_first(run: Path, paths: list[Path]) -> tuple[Path, list[Path]]:
    """The run and what it reads, in whichever order they were given."""
    if not (run / "run.json").is_file() and (paths[-1] / "run.json").is_file():
        return paths[-1], [run, *paths[:-1]]
    return run, paths


def slide_options(mpp: float | None, slide_mpp: float | None, all_patches: bool, store: str) -> "SlideOptions | None":
    """How slides are read; None where nothing was said, so that pictures stay pictures."""
    from sansmax.engine.predict_slide import SlideOptions

    if mpp is None and slide_mpp is None and not all_patches and store == "memory":
        return None
    for name, value in (("--mpp", mpp), ("--slide-mpp", slide_mpp)):
        if value is not None and value <= 0:
            raise InputError(f"{name} is a number of micrometres per pixel above 0, got {value}")
    return SlideOptions(mpp=mpp, slide_mpp=slide_mpp, tissue=not all_patches, store=store)
