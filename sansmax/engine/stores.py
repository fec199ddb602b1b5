"""Where tokens live between two layers: in memory, in a file, or nowhere.

A store keeps the inputs of some layers (`kept`) and, in one further place, those of the layer in work, where each
layer's tokens take the place of the last one's. What it does not have is made again by whoever asks.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

STORES = ("memory", "disk", "recompute")


class Chunk(NamedTuple):
    """Tokens start ... stop - 1 of all tokens, which are in work at a time."""

    start: int
    stop: int


class Store:
    """Tokens (images, tokens, channels) of the layers in `kept`, and of the layer in work where `rolling`."""

    def __init__(self, kept: Iterable[int] = (), *, rolling: bool = True) -> None:
        self.kept, self.rolling = frozenset(kept), rolling
        # which layer's input the rolling place holds, chunk by chunk
        self._now: dict[Chunk, int] = {}

    def write(self, layer: int, chunk: Chunk, x: Tensor) -> None:
        """Keeps a chunk of a layer's input, where there is a place for it."""
        if layer in self.kept:
            self.put(layer, chunk, x)
        elif self.rolling:
            self._now[chunk] = layer
            self.put(None, chunk, x)

    def read(self, layer: int, chunk: Chunk) -> Tensor | None:
        """The chunk as it was written, or None where it was not kept."""
        if layer in self.kept:
            return self.get(layer, chunk)
        return self.get(None, chunk) if self._now.get(chunk) == layer else None

    def put(self, place: int | None, chunk: Chunk, x: Tensor) -> None:
        """Writes to the place of a layer, or to the rolling one (None)."""
        raise NotImplementedError

    def get(self, place: int | None, chunk: Chunk) -> Tensor:
        """Reads from a place."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives back what the store holds beside memory."""


class MemoryStore(Store):
    """Tokens in memory, one tensor a place; `rolled` is one that is there already and may be overwritten."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        like: Tensor,
        kept: Iterable[int] = (),
        *,
        rolling: bool = True,
        rolled: Tensor | None = None,
    ) -> None:
        super().__init__(kept, rolling=rolling)
        self.shape, self.like = shape, like
        self.places: dict[int | None, Tensor] = {} if rolled is None else {None: rolled}

    def put(self, place: int | None, chunk: Chunk, x: Tensor) -> None:
        """Copies the chunk into the tensor of the place."""
        if place not in self.places:
            # not the type of the chunk: autocast embeds in half precision what the layers add to in float32
            self.places[place] = self.like.new_empty(self.shape)
        self.places[place][:, chunk.start : chunk.stop] = x

    def get(self, place: int | None, chunk: Chunk) -> Tensor:
        """A view of the tensor of the place."""
        return self.places[place][:, chunk.start : chunk.stop]


class FileStore(Store):
    """Tokens of one image in files of `folder`, one a place, in their own type; nothing of them stays mapped."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        like: Tensor,
        kept: Iterable[int] = (),
        *,
        folder: Path,
        rolling: bool = True,
    ) -> None:
        if shape[0] != 1:
            raise ValueError(f"a file holds the tokens of one image, got {shape[0]}")
        super().__init__(kept, rolling=rolling)
        self.channels, self.like, self.folder = shape[2], like, folder
        self.files: dict[int | None, int] = {}

    def put(self, place: int | None, chunk: Chunk, x: Tensor) -> None:
        """Writes the chunk where it belongs in the file of the place."""
        if place not in self.files:
            self.files[place] = os.open(self._path(place), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        x = x.detach().to("cpu", self.like.dtype).contiguous()
        data = _bytes(x)
        at = chunk.start * self.channels * x.element_size()
        while data:
            written = os.pwrite(self.files[place], data, at)
            data, at = data[written:], at + written

    def get(self, place: int | None, chunk: Chunk) -> Tensor:
        """A copy of the chunk, on the device of the network."""
        x = torch.empty((1, chunk.stop - chunk.start, self.channels), dtype=self.like.dtype)
        data = _bytes(x)
        at = chunk.start * self.channels * x.element_size()
        while data:
            count = os.preadv(self.files[place], [data], at)
            if count == 0:
                raise OSError(f"the file of tokens in {self.folder} is shorter than what was written to it")
            data, at = data[count:], at + count
        return x.to(self.like.device)

    def close(self) -> None:
        """Removes the files."""
        for place, file in self.files.items():
            os.close(file)
            self._path(place).unlink(missing_ok=True)
        self.files.clear()

    def _path(self, place: int | None) -> Path:
        return self.folder / ("tokens" if place is None else f"tokens-{place}")


def _bytes(x: Tensor) -> memoryview:
    # numpy has no bfloat16, and every type is bytes
    return memoryview(x.view(-1).view(torch.uint8).numpy().data)
