"""Weights made for other images or classes, made to fit: positions resampled, input channels shared out, a new head.

Each is done only where it is asked for, and says what it did.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

Grid = tuple[int, int]


@dataclass(frozen=True)
class Wishes:
    """What may be changed to make weights fit; `image_size` is that of the images the file was made for."""

    resize_pos_embed: bool = False
    adapt_classifier: bool = False
    adapt_in_chans: bool = False
    image_size: Grid | None = None


@dataclass
class Fitted:
    """Tensors as the model has them where that was asked for, what was changed, and what would have to be.

    `left` are names of the model that keep the values it has, `unused` names of the file that are left out, `hints`
    what to ask for, by the name of the tensor that does not fit.
    """

    state: dict[str, Tensor]
    resized: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    hints: dict[str, str] = field(default_factory=dict)


def fit(state: dict[str, Tensor], model: nn.Module, own: dict[str, Tensor], wishes: Wishes) -> Fitted:
    """The tensors `state`, changed as the wishes say to the shapes of the model's own tensors."""
    fitted = Fitted(dict(state))
    _fit_classifier(fitted, model, own, wishes)
    _fit_input(fitted, model, own, wishes)
    for name, x in list(fitted.state.items()):
        if name in own and is_positions(name, own[name]) and is_positions(name, x):
            _fit_positions(fitted, name, model, own[name], wishes)
    return fitted


# The classifier


def classifier_names(model: nn.Module, names: Collection[str]) -> list[str]:
    """Names that belong to the classifier, of the model or of a file for it."""
    given = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    prefixes = tuple(f"{name}." for name in ((given,) if isinstance(given, str) else given))
    return [name for name in names if name.startswith(prefixes)]


def _fit_classifier(fitted: Fitted, model: nn.Module, own: dict[str, Tensor], wishes: Wishes) -> None:
    ours, theirs = (classifier_names(model, names) for names in (own, fitted.state))
    shapes = {name: fitted.state[name].shape for name in theirs}
    if shapes == {name: own[name].shape for name in ours}:
        return
    if not wishes.adapt_classifier:
        fitted.hints |= dict.fromkeys((*ours, *theirs), "adapt_classifier=True keeps the model's own classifier")
        return
    for name in theirs:
        del fitted.state[name]
    fitted.left, fitted.unused = ours, theirs


# Input channels


def adapt_channels(weight: Float[Tensor, "o i h w"], in_chans: int) -> Float[Tensor, "o in_chans h w"]:
    """Weights of a first convolution for another number of channels.

    One channel gets the sum over the old ones, so that a grey picture is answered as the same picture in colours;
    several get the old ones in turn, times the old over the new number.
    """
    old = weight.shape[1]
    if in_chans == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat(1, math.ceil(in_chans / old), 1, 1)[:, :in_chans] * (old / in_chans)


def _fit_input(fitted: Fitted, model: nn.Module, own: dict[str, Tensor], wishes: Wishes) -> None:
    given = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    for part in (given,) if isinstance(given, str) else given:
        name = f"{part}.weight"
        x, mine = fitted.state.get(name), own.get(name)
        if x is None or mine is None or x.ndim != 4 or x.shape[1] == mine.shape[1]:
            continue
        if (x.shape[0], *x.shape[2:]) != (mine.shape[0], *mine.shape[2:]):
            continue
        if not wishes.adapt_in_chans:
            fitted.hints[name] = "adapt_in_chans=True shares the weights out over the channels"
            continue
        fitted.state[name] = adapt_channels(x, mine.shape[1])
        fitted.adapted.append(f"{name}: {x.shape[1]} to {mine.shape[1]} channels")


# Positions


def is_positions(name: str, x: Tensor) -> bool:
    """Whether this is a table of positions, one row a token: `pos_embed`, `stages.2.pos_embed`, `pos_embed1`, ..."""
    return name.rsplit(".", 1)[-1].startswith("pos_embed") and x.ndim == 3 and x.shape[0] == 1


def own_grid(model: nn.Module, name: str, tokens: int) -> tuple[Grid, int] | None:
    """The token grid of one of the model's tables and its number of prefix tokens, or None where nothing says."""
    part, _, last = name.rpartition(".")
    owner: Any = model.get_submodule(part) if part else model
    embeds = (getattr(owner, "patch_embed" + last.removeprefix("pos_embed"), None), getattr(owner, "patch_embed", None))
    for place in (owner, *embeds):
        for key in ("grid_size", "grid"):
            grid = getattr(place, key, None)
            if isinstance(grid, tuple | list) and len(grid) == 2 and 0 <= tokens - grid[0] * grid[1] <= 16:
                return (int(grid[0]), int(grid[1])), tokens - int(grid[0]) * int(grid[1])
    return next(
        (
            ((side, side), prefix)
            for prefix in (0, 1, 2)
            if (side := math.isqrt(tokens - prefix)) ** 2 == tokens - prefix
        ),
        None,
    )


def file_grid(tokens: int, image_size: Grid | None) -> Grid | None:
    """The grid of this many tokens: square, or nearest to the shape of the images; None where there is none such."""
    if image_size is None:
        side = math.isqrt(max(tokens, 0))
        return (side, side) if side * side == tokens else None
    wanted = math.log(image_size[0] / image_size[1])
    grids = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    best = min(grids, key=lambda grid: abs(math.log(grid[0] / grid[1]) - wanted), default=None)
    # patches cut a few pixels off the sides, so the ratio is that of the image within a token
    if best is None or abs(math.log(best[0] / best[1]) - wanted) > math.log1p(1 / min(best)):
        return None
    return best


def _fit_positions(fitted: Fitted, name: str, model: nn.Module, mine: Tensor, wishes: Wishes) -> None:
    x = fitted.state[name]
    place = own_grid(model, name, mine.shape[1])
    if place is None or x.shape[2] != mine.shape[2]:
        return
    new, prefix = place
    old = file_grid(x.shape[1] - prefix, wishes.image_size)
    # as many tokens as the model has are on its grid, unless the file's images say otherwise
    if x.shape == mine.shape and (old is None or old == new or wishes.image_size is None):
        return
    if old is None:
        fitted.hints[name] = _no_grid(x.shape[1], prefix, wishes.image_size)
    elif not wishes.resize_pos_embed:
        fitted.hints[name] = f"resize_pos_embed=True resamples the positions {_by(old)} to {_by(new)}"
    else:
        # bicubic with antialiasing
        fitted.state[name] = resample_abs_pos_embed(x, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix)
        fitted.resized.append(f"{name}: {_by(old)} to {_by(new)}")


def _no_grid(tokens: int, prefix: int, image_size: Grid | None) -> str:
    other = next((p for p in (0, 1, 2) if p != prefix and file_grid(tokens - p, image_size)), None)
    if other is not None:
        return (
            f"the file has positions of {other} tokens before those of the picture, the model of {prefix}; build the "
            "model with the class token (class_token=True or False) that the file has"
        )
    shape = "square grid" if image_size is None else f"grid of the shape of {image_size[0]} x {image_size[1]} pixels"
    return (
        f"the {tokens - prefix} positions of the file are of no {shape}; file_image_size=(height, width) says which "
        "images it was made for"
    )


def _by(grid: Grid) -> str:
    return f"{grid[0]} x {grid[1]}"
