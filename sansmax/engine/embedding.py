"""From a source of tokens to the first block's input, a chunk at a time.

An embedder knows how many tokens there are, where they lie, which of them are read together, and how the network makes
them from pixels or features. Prefix tokens of the network (class token, registers) are a chunk of their own, the first.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sansmax.data.slide_tokens import Block, SlideTokens, read_ahead
from sansmax.data.tokens import TokenSource
from sansmax.engine.stores import Chunk
from sansmax.errors import InputError


class Span(NamedTuple):
    """What is read for the tokens start ... stop - 1 of the source: rows of a picture, blocks of a slide, features."""

    start: int
    stop: int
    what: Any


class Embedder:
    """The chunks of a source's tokens, and the tokens of a chunk as the network embeds them.

    `make(what)` gives the tokens (1, n, channels) of a span.
    """

    def __init__(self, network: Any, spans: Sequence[Span], make: Callable[[Any], Tensor]) -> None:
        self.network, self.make = network, make
        prefix = network.num_prefix_tokens
        self.prefix = Chunk(0, prefix) if prefix else None
        self._what = {Chunk(prefix + s.start, prefix + s.stop): s.what for s in spans}
        self.chunks = [*([self.prefix] if self.prefix else []), *self._what]
        self.count = self.chunks[-1].stop

    def __call__(self, chunk: Chunk) -> Tensor:
        """The first block's input for a chunk."""
        return self.network.embed_prefix() if chunk == self.prefix else self.make(self._what[chunk])


def embed_picture(network: Any, source: TokenSource, chunk_tokens: int) -> Embedder:
    """All patches of a picture, in bands of whole rows."""
    like = next(network.patch_embed.parameters())
    rows, columns = source.grid
    step = max(1, chunk_tokens // columns)
    bands = [(first, min(first + step, rows)) for first in range(0, rows, step)]

    def make(band: tuple[int, int]) -> Tensor:
        return network.embed_rows(source.read(*band).to(like), band[0], source.grid)

    return Embedder(network, [Span(a * columns, b * columns, (a, b)) for a, b in bands], make)


@contextmanager
def embed_slide(network: Any, source: SlideTokens, chunk_tokens: int) -> Iterator[Embedder]:
    """The patches of a slide with tissue, in blocks; a thread reads the next block while this one is in work."""
    like = next(network.patch_embed.parameters())
    with ThreadPoolExecutor(1, thread_name_prefix="slide") as pool:
        read = read_ahead(source, pool)

        def block(what: Block) -> Tensor:
            x = network.embed_region(read(what).to(like), (what.row, what.column), source.grid)
            return x[:, torch.from_numpy(source.inside(what)).to(x.device)]

        def make(what: list[Block]) -> Tensor:
            return torch.cat([block(b) for b in what], dim=1)

        yield Embedder(network, [Span(b[0].start, b[-1].stop, b) for b in grouped(source.blocks, chunk_tokens)], make)


def grouped(blocks: Sequence[Block], chunk_tokens: int) -> list[list[Block]]:
    """Neighbouring blocks side by side in a chunk, as long as they do not exceed it."""
    groups: list[list[Block]] = []
    for block in blocks:
        if groups and block.stop - groups[-1][0].start <= chunk_tokens:
            groups[-1].append(block)
        else:
            groups.append([block])
    return groups


def embed_features(network: Any, features: np.ndarray, coords: np.ndarray | None, chunk_tokens: int) -> Embedder:
    """Features (N, width) of any array, in memory, mapped or of HDF5, with coordinates (N, 2) in tile sides or None.

    Reading a chunk raises InputError where features are not finite.
    """
    like = next(network.parameters())
    n = len(features)

    def make(what: slice) -> Tensor:
        read = np.array(features[what])
        # a sum in float64 is finite where all its terms are
        if not np.isfinite(read.sum(dtype=np.float64)):
            raise InputError(
                f"features {what.start:,} to {what.stop - 1:,} hold NaN or infinity; extract this slide again, or "
                "leave those tokens out"
            )
        some = torch.from_numpy(read).to(like)[None]
        where = None if coords is None else torch.from_numpy(np.array(coords[what])).to(like)[None]
        return network.embed_tokens(some, where)

    spans = [slice(first, min(first + chunk_tokens, n)) for first in range(0, n, chunk_tokens)]
    return Embedder(network, [Span(s.start, s.stop, s) for s in spans], make)
