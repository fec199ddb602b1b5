"""Options that several verbs have."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from sansmax.errors import InputError

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
SkipOption = Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read, and list them.")]
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
