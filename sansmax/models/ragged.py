"""Bags of different lengths side by side in one sequence, with no padding: norms and MLPs over all tokens at once.

Only attention must know which token is of which bag. A layer with a summary of fixed size summarises each bag, forms
the maps of all bags in one batch of small matrices, and maps each bag by its own; softmax attends to one bag at a time
between the projections, which run over all tokens.

    run_ragged(block, x, lengths) == concatenation of block(bag) over the bags

Shapes: t tokens of all bags one after the other, k bags, c channels; lengths sum to t.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.layers.drop import DropPath
from torch import Tensor, nn

from sansmax.models.attention import AffineAttention, Attention, HeadsAttention, Others
from sansmax.models.blocks import Block
from sansmax.ops.moments import Weight, without_padding


def run_ragged(
    block: Block, x: Float[Tensor, "1 t c"], lengths: Sequence[int], mask: Weight = None, others: Others | None = None
) -> Float[Tensor, "1 t c"]:
    """The block over several bags; `mask` (1, t) is True (or weight 1) for real tokens.

    With `others` the tokens are one's own, and these hold the rest of each bag.
    """
    x = without_padding(x, mask)
    attended = attend_ragged(block.attn, block.norm1(x), lengths, mask, others)
    x = x + _drop_path(block.drop_path1, block.ls1(attended), lengths)
    return x + _drop_path(block.drop_path2, block.ls2(block.mlp(block.norm2(x))), lengths)


def attend_ragged(
    layer: Attention,
    x: Float[Tensor, "1 t c"],
    lengths: Sequence[int],
    mask: Weight = None,
    others: Others | None = None,
) -> Float[Tensor, "1 t c"]:
    """The attention layer over several bags, each bag by itself."""
    if others is not None:
        return without_padding(_among(layer, x, list(lengths), mask, others), mask)
    if layer.streams:
        return without_padding(_by_summaries(layer, x, list(lengths), mask), mask)
    assert isinstance(layer, HeadsAttention)
    return without_padding(_by_heads(layer, x, list(lengths), mask), mask)


def split_weights(mask: Weight, lengths: Sequence[int]) -> list[Any]:
    """The mask of each bag."""
    return [None] * len(lengths) if mask is None else list(mask.split(list(lengths), dim=1))


def side_by_side(states: Sequence[Any]) -> Any:
    """States (or other named tuples of tensors) of single bags as that of a batch of bags."""
    fields = zip(*states, strict=True)
    return type(states[0])(*(None if f[0] is None else torch.cat(f) for f in fields))


def _one(batch: Any, i: int) -> Any:
    fields = [None if t is None else t[i : i + 1] for t in batch]
    return tuple(fields) if type(batch) is tuple else type(batch)(*fields)


def _by_summaries(layer: Any, x: Tensor, lengths: list[int], mask: Weight) -> Tensor:
    bags, masks = x.split(lengths, dim=1), split_weights(mask, lengths)
    known: Any = None
    beside = layer.summarise_beside if isinstance(layer, AffineAttention) else None
    for round_ in range(layer.rounds):
        if beside is not None:
            states, bags = zip(*map(beside, bags, masks), strict=True)
        else:
            before = [None if round_ == 0 else _one(known, i) for i in range(len(bags))]
            states = [layer.summarise(*each) for each in zip(bags, masks, before, strict=True)]
        known = layer.finish(side_by_side(states), known)
    return torch.cat([layer.map(_one(known, i), bag) for i, bag in enumerate(bags)], dim=1)


def _among(layer: Any, x: Tensor, lengths: list[int], mask: Weight, others: Others) -> Tensor:
    bags, masks = x.split(lengths, dim=1), split_weights(mask, lengths)
    places = [None if others.place is None else _one(others.place, i) for i in range(len(bags))]
    known: Any = None
    for round_ in range(layer.rounds):
        before = [None if round_ == 0 else _one(known, i) for i in range(len(bags))]
        states = [layer.summarise_to_send(*each) for each in zip(bags, masks, before, places, strict=True)]
        known = layer.finish(others.whole(side_by_side(states)), known)
    return torch.cat([layer.map(_one(known, i), bag) for i, bag in enumerate(bags)], dim=1)


def _by_heads(layer: HeadsAttention, x: Tensor, lengths: list[int], mask: Weight) -> Tensor:
    qkv = layer.qkv(x).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    out = []
    for heads, bag_mask in zip(qkv.split(lengths, dim=3), split_weights(mask, lengths), strict=True):
        q, k, v = layer.in_range(*heads.unbind(0))
        out.append(layer.attend(q, k, v, bag_mask, layer.order))
    return layer.proj_drop(layer.out_of(layer.proj, torch.cat(out, dim=2).transpose(1, 2).flatten(2)))


def _drop_path(layer: nn.Module, x: Tensor, lengths: Sequence[int]) -> Tensor:
    """Stochastic depth that leaves out whole bags, as it does in a batch of bags of one length."""
    if not isinstance(layer, DropPath) or not layer.training or not layer.drop_prob:
        return x
    drop = cast(DropPath, layer)
    kept = drop(x.new_ones(len(lengths), 1))
    return x * kept.repeat_interleave(torch.tensor(lengths, device=x.device), dim=0)
