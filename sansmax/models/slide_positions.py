"""Positions of the tokens of a slide as fixed sines and cosines, that know nothing of where the slide lies.

    p(x, y) = [sin(w x), cos(w x), sin(w y), cos(w y)],   w_i = 10000^(-i / (c / 4)),   (x, y) in sides of a tile

Coordinates are taken from the middle of the bag, so a slide that is shifted gives the same positions. The embedding is
that of https://arxiv.org/abs/1706.03762, section 3.5, one half of the channels for each axis.

Shapes: b bags, n tokens, c channels.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from sansmax.ops.moments import Weight

LONGEST = 10000.0


def bag_centre(coords: Float[Tensor, "b n 2"], mask: Weight = None) -> Float[Tensor, "b 1 2"]:
    """The mean place of the tokens of each bag, zero where it has none; `mask` is True (or not 0) for real tokens.

    No gradient runs through it: removing a token from the sums leaves the others where they are.
    """
    with torch.no_grad():
        wide = coords.double()
        if mask is None:
            return wide.mean(1, keepdim=True)
        real = (mask != 0).unsqueeze(-1)
        # padding may hold anything, NaN included
        total = wide.masked_fill(~real, 0.0).sum(1, keepdim=True)
        return total / real.sum(1, keepdim=True).clamp_min(1)


def centred_coords(
    coords: Float[Tensor, "b n 2"], mask: Weight = None, centre: Float[Tensor, "b 1 2"] | None = None
) -> Float[Tensor, "b n 2"]:
    """Coordinates from the middle of each bag, in their own dtype; zero at tokens that are none.

    `centre` is that of the whole bag, where these are some of its tokens only.
    """
    moved = (coords.double() - (bag_centre(coords, mask) if centre is None else centre)).to(coords.dtype)
    return moved if mask is None else moved.masked_fill((mask == 0).unsqueeze(-1), 0.0)


def sincos_positions(coords: Float[Tensor, "b n 2"], channels: int) -> Float[Tensor, "b n c"]:
    """The embedding of coordinates in sides of a tile, in float32 or wider; `channels` is a multiple of 4."""
    quarter = channels // 4
    coords = coords.to(torch.promote_types(coords.dtype, torch.float32))
    steps = torch.arange(quarter, device=coords.device, dtype=coords.dtype) / quarter
    angles = coords.unsqueeze(-1) * LONGEST**-steps
    return torch.cat((angles.sin(), angles.cos()), dim=-1).flatten(2)
