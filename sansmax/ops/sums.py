"""States as one row of numbers that add up over those who hold the tokens.

    merge over parts p of state_p  ==  state.of_sum(sum over p of state_p.to_sum(p, parts), parts)

so that one sum over processes merges the summaries of their tokens. Where merging is a sum already, the row is the
fields one after the other. What merges by another formula (means) is put into a slot of its own among zeros; the sum
then holds the slots of all parts, and each reads them and merges for itself.

Shapes: s numbers of a row, p parts.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def row_of(fields: Iterable[Tensor]) -> Float[Tensor, "s"]:
    """The numbers of all fields, one after the other."""
    return torch.cat([field.reshape(-1) for field in fields])


def fields_of(row: Float[Tensor, "s"], like: Iterable[Tensor]) -> Iterator[Tensor]:
    """The fields that `row_of` laid out, shaped as those of `like`."""
    like = list(like)
    for part, field in zip(row.split([field.numel() for field in like]), like, strict=True):
        yield part.view(field.shape)


def in_slot(row: Float[Tensor, "s"], part: int, parts: int) -> Float[Tensor, "ps"]:
    """The row in the slot of `part`, with zeros in those of the others."""
    return F.pad(row, (part * len(row), (parts - 1 - part) * len(row)))


def slots_of(row: Float[Tensor, "ps"], parts: int, like: Iterable[Tensor]) -> list[Tensor]:
    """The fields of all parts, with an axis of parts in front."""
    like, slots = list(like), row.view(parts, -1)
    split = slots.split([field.numel() for field in like], dim=1)
    return [part.view(parts, *field.shape) for part, field in zip(split, like, strict=True)]


def triangle_of(x: Float[Tensor, "*b c c"]) -> Float[Tensor, "*b t"]:
    """The lower triangle of symmetric matrices, t = c (c + 1) / 2: half of the numbers are there twice."""
    i, j = torch.tril_indices(x.shape[-1], x.shape[-1], device=x.device).unbind(0)
    return x[..., i, j]


def symmetric_of(x: Float[Tensor, "*b t"], c: int) -> Float[Tensor, "*b c c"]:
    """The symmetric matrices that `triangle_of` took the triangle of."""
    i = torch.arange(c, device=x.device)
    low, high = torch.minimum(i.unsqueeze(0), i.unsqueeze(1)), torch.maximum(i.unsqueeze(0), i.unsqueeze(1))
    return x[..., high * (high + 1) // 2 + low]
