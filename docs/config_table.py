"""Writes the table of guide/configuration.md from `sansmax.engine.config`; a test checks that it is up to date.

python docs/config_table.py
"""

import ast
import inspect
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from sansmax.engine import config
from sansmax.files import write_text

PAGE = Path(__file__).parent / "guide" / "configuration.md"
START, END = "<!-- table: written by docs/config_table.py -->\n", "<!-- end of the table -->\n"
# what the code leaves to the name, in words
WORDS = {
    "data.source": "What to read: the DATA of the command line.",
    "data.root": "Folder of a table's images, or of the files of a named set; null: beside the table, or the cache.",
    "data.path_column": "Column of a table with the path of the picture; null: found by its name.",
    "data.label_column": "Column of a table with the class; null: found by its name.",
    "data.split_column": "Column of a table with train, val or test; null: found by its name, if there is one.",
    "data.group_column": "Column of a table with the patient; null: found by its name, if there is one.",
    "data.val_fraction": "Share of the images to validate with, where the source has no such split.",
    "data.test_fraction": "Share of the images to test with, where the source has no split at all.",
    "data.skip_bad": "Leave out images that cannot be read, and list them in bad_images.csv.",
    "data.resize_mode": "Squash both sides, crop the centre, or pad with the mean.",
    "data.std": "Per channel, as `data.mean`.",
    "model.name": "Any model of timm's registry, ours included.",
    "augment.vflip": "Probability of a vertical flip.",
    "augment.crop_ratio": "Narrowest and widest aspect ratio of the random resized crop.",
    "augment.brightness": "Largest relative change of brightness.",
    "augment.contrast": "Largest relative change of contrast.",
    "augment.color": "Largest relative change of the saturation.",
    "optim.opt": "Optimiser, by timm's name.",
    "optim.lr": "Largest learning rate.",
    "optim.weight_decay": "Decay of weights; gains and biases have none.",
    "optim.sched": "Learning rate after the warm-up: falling to `min_lr` by a cosine, or constant.",
    "optim.warmup_epochs": "Epochs in which the learning rate rises.",
    "optim.warmup_lr": "Learning rate at the start of the warm-up.",
    "optim.min_lr": "Learning rate at the end of the cosine.",
    "optim.layer_decay": "Factor of the learning rate from a layer to the one before it (timm).",
    "optim.mixup": "Alpha of mixup; 0: no mixup.",
    "optim.cutmix": "Alpha of CutMix; 0: no CutMix.",
    "epochs": "Passes over the training images.",
    "batch_size": "Images per step.",
    "seed": "Seed of everything random.",
    "device": "Where to compute; auto: the first of cuda, mps, cpu that is there.",
    "precision": "Bits of the arithmetic in training: 32, or 16 mixed with 32.",
}


def docstrings(section: type[BaseModel]) -> dict[str, str]:
    """The text below each field of a section."""
    (body,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            value = text.value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found[field.target.id] = " ".join(value.value.split())
    return found


def shown(value: Any) -> str:
    """A default as it is written in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(f'{v:.4g}' for v in value)}]"
    return '""' if value == "" else str(value)


def allowed(info: Any) -> str:
    """The kind of a value and its bounds."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f"{s} {getattr(m, name):g}" for m in info.metadata for name, s in signs.items() if hasattr(m, name)]
    return "; ".join(part for part in (kind_of(info.annotation), ", ".join(bounds)) if part)


def kind_of(annotation: Any) -> str:
    """A type in words of YAML."""
    if annotation is type(None):
        return "null"
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is tuple:
        return f"[{', '.join('...' if a is ... else kind_of(a) for a in arguments)}]"
    if origin is dict:
        return "keys and values"
    if arguments:
        return " or ".join(map(kind_of, arguments))
    return {int: "whole number", float: "number", bool: "true, false", str: "text"}[annotation]


def rows(section: type[BaseModel] = config.TrainConfig, prefix: str = "") -> list[list[str]]:
    """Key, default, what is allowed, and the meaning, for every key."""
    texts = docstrings(section)
    lines = []
    for name, info in section.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += rows(kind, f"{prefix}{name}.")
            continue
        key = prefix + name
        meaning = (WORDS.get(key) or texts[name]).replace("none: ", "null: ")
        lines.append([f"`{key}`", f"`{shown(info.default)}`", allowed(info), meaning])
    # keys of the whole run before those of the sections
    return sorted(lines, key=lambda line: "." in line[0])


def table() -> str:
    """The table of all keys in Markdown."""
    lines = [["key", "default", "allowed", "meaning"], ["---"] * 4, *rows()]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def with_table(page: str) -> str:
    """The page with the table of today."""
    before, rest = page.split(START)
    _, after = rest.split(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    write_text(PAGE, with_table(PAGE.read_text(encoding="utf-8")))
