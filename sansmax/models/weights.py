"""Loads published and own weights into a network, whole or not at all, with a report like a diff.

    report = load_checkpoint(model, "sima_small_12_p16.pth")
    print(report)

What a file calls its tensors is in `layouts`, how it is read without running it in `opening`, and what may be changed
to make weights fit in `fitting`.
"""

import fnmatch
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sansmax.errors import InputError
from sansmax.models.fitting import Fitted, Grid, Wishes, fit
from sansmax.models.layouts import recognise, rename, unwrap
from sansmax.models.opening import read_checkpoint

__all__ = ["LoadReport", "load_checkpoint"]

LINES = 20


@dataclass(frozen=True)
class LoadReport:
    """What was loaded: how the file was laid out, how many of its tensors, and what was changed to fit."""

    source: str
    layout: str
    unwrapped: tuple[str, ...]
    num_tensors: int
    resized: tuple[str, ...]
    adapted: tuple[str, ...]
    left: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        inside = f", inside {', '.join(self.unwrapped)}" if self.unwrapped else ""
        lines = [f"{self.num_tensors} tensors from {self.source}: {self.layout}{inside}"]
        lines += [f"  resized {text}" for text in self.resized]
        lines += [f"  adapted {text}" for text in self.adapted]
        lines += [f"  kept as the model had it: {name}" for name in self.left]
        lines += [f"  not used: {name}" for name in self.unused]
        return "\n".join(lines)


def load_checkpoint(
    model: nn.Module,
    source: str | Path | Mapping[str, Any],
    *,
    use_ema: bool = False,
    resize_pos_embed: bool = False,
    adapt_classifier: bool = False,
    adapt_in_chans: bool = False,
    file_image_size: tuple[int, int] | None = None,
    ignore: Sequence[str] = (),
) -> LoadReport:
    """Loads weights into `model` and says what was loaded; the model is changed only if everything fits.

    `source` is a file (.safetensors, .pth, .pth.tar, .pt, .bin, .ckpt), a folder of `sansmax train` or in the layout
    of the Hugging Face hub, or a dictionary. Files of SOFT, SimA, XCiT, DeiT, timm and of this package are recognised
    by their names; wrappers (`model`, `state_dict`) and prefixes (`module.`) are taken off. `use_ema` takes the moving
    average of the weights instead.

    Every name and shape must agree, unless it is asked for:

    * `resize_pos_embed` resamples tables of positions to the model's grid, bicubic with antialiasing.
      `file_image_size` (height, width) tells the old grid where it is not square and no `config.json` tells it.
    * `adapt_classifier` keeps the model's own classifier where the file has another number of classes, or none.
    * `adapt_in_chans` shares the first convolution out over another number of channels.
    * `ignore` are names of the file, or patterns like "head_dist.*", that may be surplus.

    Files are never unpickled: one that asks for more than tensors is refused, with the way to convert it. Numbers take
    the types that the model's parameters have.

    Raises ValueError for what is no file of weights, and with a list of missing (-), surplus (+) and differing (!)
    names where the weights do not fit; `sansmax.errors.InputError`, to be precise.
    """
    network = network_inside(model)
    own = network.state_dict()
    if any(x.is_meta for x in own.values()):
        raise InputError(
            'the model is on the device "meta" and has no memory; model.to_empty(device="cpu") gives it some'
        )
    if isinstance(source, Mapping):
        checkpoint, name = source, "a dictionary"
    else:
        checkpoint, file = read_checkpoint(source)
        name = str(file)
        file_image_size = file_image_size or image_size_beside(file)
    state, unwrapped = unwrap(checkpoint, own, use_ema)
    layout = recognise(state, own)
    renamed = rename(state, network, own)
    wishes = Wishes(resize_pos_embed, adapt_classifier, adapt_in_chans, file_image_size)
    fitted = fit(renamed.state, network, own, wishes)
    patterns = (ignore,) if isinstance(ignore, str) else ignore
    surplus = (*(n for n in fitted.state if n not in own), *renamed.dropped)
    ignored = [n for n in surplus if any(fnmatch.fnmatchcase(n, pattern) for pattern in patterns)]
    problem = difference(own, fitted, [n for n in surplus if n not in ignored])
    if problem:
        raise InputError(_message(name, layout, problem, own, fitted, renamed.trouble))
    state = {n: fitted.state[n] for n in own if n in fitted.state}
    network.load_state_dict(state, strict=False)
    return LoadReport(
        source=name,
        layout=layout,
        unwrapped=unwrapped,
        num_tensors=len(state),
        resized=tuple(fitted.resized),
        adapted=tuple(fitted.adapted),
        left=tuple(fitted.left),
        unused=(*fitted.unused, *ignored),
    )


def network_inside(model: nn.Module) -> nn.Module:
    """The network inside torch.compile, DistributedDataParallel, or timm's wrapper for feature maps."""
    from timm.models._features import FeatureGetterNet

    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(model, FeatureGetterNet):
            model = model.model  # pyright: ignore[reportAssignmentType]
        else:
            return model


def image_size_beside(file: Path) -> Grid | None:
    """Height and width of the images that the weights were made for, by the files beside them.

    These are `config.json` of the hub's layout and `run.json` of a training run.
    """
    try:
        if (file.parent / "run.json").is_file():
            size = json.loads((file.parent / "run.json").read_text(encoding="utf-8"))["preprocess"]["image_size"]
        else:
            config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
            size = config.get("model_args", {}).get("img_size") or config["pretrained_cfg"]["input_size"][-2:]
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None


# The diff


def difference(own: Mapping[str, Tensor], fitted: Fitted, surplus: Collection[str]) -> list[str]:
    """Lines of what does not fit: missing names (-), surplus names (+) and differing tensors (!)."""
    missing = [f"- {name}" for name in own if name not in fitted.state and name not in fitted.left]
    changed = [
        f"! {name}: {found}" for name, x in fitted.state.items() if name in own and (found := _unlike(x, own[name]))
    ]
    changed += [
        f"! {name}: {hint}" for name, hint in fitted.hints.items() if name in own and _same_shape(name, own, fitted)
    ]
    return [line for lines in (missing, [f"+ {name}" for name in surplus], changed) for line in _shortened(lines)]


def _same_shape(name: str, own: Mapping[str, Tensor], fitted: Fitted) -> bool:
    # as many positions, on another grid
    return name.rsplit(".", 1)[-1].startswith("pos_embed") and fitted.state[name].shape == own[name].shape


def _unlike(file: Tensor, model: Tensor) -> str:
    if file.shape != model.shape:
        return f"file {tuple(file.shape)}, model {tuple(model.shape)}"
    if file.is_floating_point() != model.is_floating_point() or file.is_complex() != model.is_complex():
        return f"file {file.dtype}, model {model.dtype}"
    return ""


def _shortened(lines: list[str]) -> list[str]:
    more = len(lines) - LINES
    return lines if more <= 0 else [*lines[:LINES], f"{lines[0][0]} ... and {more} more"]


def _message(
    name: str, layout: str, problem: list[str], own: Mapping[str, Tensor], fitted: Fitted, trouble: str
) -> str:
    shared = sum(n in own for n in fitted.state)
    lines = [
        f"the weights of {name} ({layout}) do not fit the model; missing (-), surplus (+) and differing (!), where "
        f"{shared} of {len(own)} names agree:",
        *(f"  {line}" for line in problem),
    ]
    lines += [f"{hint} ({names})" for hint, names in _hints(fitted.hints).items()]
    if any(line.startswith("+") for line in problem):
        lines.append('ignore=["NAME", ...] leaves surplus names out; patterns with * are understood')
    if not shared:
        lines.append("no name agrees: the file is of another architecture")
    if trouble:
        lines.append(f"names were taken as they are, since {trouble}")
    return "\n".join(lines)


def _hints(hints: Mapping[str, str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, hint in hints.items():
        found[hint] = f"{found[hint]}, {name}" if hint in found else name
    return found
