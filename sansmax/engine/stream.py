"""Exact forward pass, and scores of every token, over more tokens than fit into memory.

Each layer reads all tokens twice: once to summarise them, once to map each by the summary. A band of rows of the
token grid is in work at a time, and the pass that maps by layer l also summarises for layer l + 1, so a network costs
one read and one write of the token store per layer. There is no attention mathematics here: the network's own
`summarise`, `finish` and `map` are called in order, and summaries merge.

Scores run the same schedule backwards, with the activations of one band recomputed at a time.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from sansmax.data.tokens import PixelSource, TokenSource, open_pixels
from sansmax.engine.explain import check_class, log_odds
from sansmax.errors import InputError
from sansmax.models.blocks import Block
from sansmax.models.vit import VisionTransformer
from sansmax.ops.moments import merged

STORES = ("memory", "disk", "recompute")


@dataclass(frozen=True)
class Streamed:
    """`logits` (1, classes); `scores` (tokens, classes asked for) or None, tokens in reading order of `grid`."""

    logits: Tensor
    scores: np.ndarray | None
    grid: tuple[int, int]


class _Band(NamedTuple):
    """Rows [first, last) of the token grid; the prefix tokens are the band with no rows."""

    first: int
    last: int
    columns: int

    @property
    def is_prefix(self) -> bool:
        return self.first == self.last

    @property
    def tokens(self) -> slice:
        return slice(self.first * self.columns, self.last * self.columns)


def stream(
    model: VisionTransformer,
    source: str | Path | np.ndarray | TokenSource,
    *,
    chunk_tokens: int = 65536,
    store: str = "memory",
    scores: bool | Sequence[int] = False,
    progress: Callable[[int, int], None] | None = None,
) -> Streamed:
    """Exact logits over all patches of a picture of any size, at its own resolution, and scores of the patches.

    `source` is the path of a picture, its pixels (H, W) or (H, W, 3) as a uint8 or uint16 array or memmap, or a
    `TokenSource` of your own. Pixels are normalised by the mean and standard deviation of the model's configuration; a
    side that is no multiple of the patch is filled up by repeating its edge. The other arguments are those of
    `stream_tokens`.
    """
    _check(model, chunk_tokens, store)
    if isinstance(source, str | Path):
        source = open_pixels(source)
    if isinstance(source, np.ndarray):
        mean, std = (_per_channel(model, key) for key in ("mean", "std"))
        source = PixelSource(source, model.patch_embed.patch_size, in_chans=model.in_chans, mean=mean, std=std)
    return stream_tokens(model, source, chunk_tokens=chunk_tokens, store=store, scores=scores, progress=progress)


def _per_channel(model: VisionTransformer, key: str) -> tuple[float, ...]:
    cfg: dict[str, Any] = cast(Any, model).pretrained_cfg
    values = tuple(cfg.get(key, (0.5,)))
    return values if len(values) in (1, model.in_chans) else (sum(values) / len(values),)


def stream_tokens(
    model: VisionTransformer,
    source: TokenSource,
    *,
    chunk_tokens: int = 65536,
    store: str = "memory",
    scores: bool | Sequence[int] = False,
    progress: Callable[[int, int], None] | None = None,
) -> Streamed:
    """The network's logits over all tokens of `source`, equal to the forward pass in memory.

    `chunk_tokens` bounds the tokens in work at a time (whole rows of the grid, one at least). `store` says where the
    tokens between two layers live: "memory", "disk" (a temporary file) or "recompute" (nowhere: each layer starts from
    the pixels again, L(L+1)/2 times the arithmetic). `scores` asks for the gradient of the log-odds by the weight of
    each token, for every class (True) or for the classes given; it keeps the tokens of every layer in the store (none
    with "recompute") and one gradient per token. `progress(done, total)` is called after each band.

    Raises InputError for a network that cannot run in chunks, and for wrong arguments.
    """
    _check(model, chunk_tokens, store)
    classes = _score_classes(scores, model.num_classes)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with tempfile.TemporaryDirectory(prefix="sansmax-") as folder:
            return _Pass(model, source, chunk_tokens, store, classes, progress, Path(folder)).run()
    finally:
        # each by itself: part of a network may be frozen in evaluation mode while the rest trains
        for module, training in modes:
            module.training = training


def _check(model: VisionTransformer, chunk_tokens: int, store: str) -> None:
    other = None if isinstance(model, VisionTransformer) else "it is not a network of this package"
    obstacle = getattr(model, "stream_obstacle", other)
    if obstacle is not None:
        raise InputError(
            f"{type(model).__name__} cannot run in chunks: {obstacle}. "
            "Use a network such as seqnorm_vit_tiny_patch16_224"
        )
    if chunk_tokens < 1:
        raise InputError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if store not in STORES:
        raise InputError(f"store must be one of {', '.join(STORES)}, got {store!r}")


def _score_classes(scores: bool | Sequence[int], num_classes: int) -> list[int]:
    if isinstance(scores, bool):
        classes = list(range(num_classes)) if scores else []
    else:
        classes = [int(c) for c in scores]
    for c in classes:
        check_class(c, num_classes)
    return classes


class _Pass:
    """One picture on its way through the network and back."""

    def __init__(
        self,
        model: VisionTransformer,
        source: TokenSource,
        chunk_tokens: int,
        store: str,
        classes: list[int],
        progress: Callable[[int, int], None] | None,
        folder: Path,
    ) -> None:
        self.model, self.source, self.store, self.classes = model, source, store, classes
        rows, columns = source.grid
        step = max(1, chunk_tokens // columns)
        self.bands = [_Band(r, min(r + step, rows), columns) for r in range(0, rows, step)]
        if model.num_prefix_tokens:
            self.bands.insert(0, _Band(0, 0, columns))
        self.finished: list[Any] = []
        self.blocks = cast(list[Block], list(model.blocks))
        self.layers = len(self.blocks)
        self.like = next(model.patch_embed.parameters())
        self.tokens = _Tokens(store, folder, (rows * columns, model.embed_dim), self.like)
        self.done, self.total = 0, len(self.bands) * (self.layers + 1 + (3 * self.layers + 1) * len(classes))
        self.progress = progress

    def run(self) -> Streamed:
        with torch.no_grad():
            pooled = self.forward()
            logits = self.model.read_out(pooled)
        scores = None
        if self.classes:
            scores = np.stack([self.backward(c).numpy() for c in self.classes], axis=1)
        return Streamed(logits, scores, self.source.grid)

    def _tick(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)

    # Forward: `read(0, band)` embeds, `read(l, band)` gives the input of block l.

    def forward(self) -> Any:
        summary: Any = None
        for band in self.bands:
            x = self.embed(band)
            self.tokens.write(0, band, x)
            summary = merged(summary, self.summarise(0, x, band))
            self._tick()
        for layer, block in enumerate(self.blocks):
            self.finished.append(block.finish(summary))
            summary = None
            for band in self.bands:
                x = block.map(self.finished[layer], self.read(layer, band))
                # without scores nobody reads a layer's input again: its place is used for the next
                self.tokens.write(layer + 1, band, x, over=not self.classes)
                summary = merged(summary, self.summarise(layer + 1, x, band))
                self._tick()
        return summary

    def embed(self, band: _Band) -> Tensor:
        if band.is_prefix:
            prefix = self.model.embed_prefix()
            assert prefix is not None
            return prefix
        pixels = self.source.read(band.first, band.last).to(self.like)
        return self.model.embed_rows(pixels, band.first, self.source.grid)

    def summarise(self, layer: int, x: Tensor, band: _Band, weight: Tensor | None = None) -> Any:
        if layer < self.layers:
            return self.blocks[layer].summarise(x, weight)
        return self.model.summarise_pool(x, weight, prefix=band.is_prefix)

    def read(self, layer: int, band: _Band) -> Tensor:
        if self.store != "recompute":
            return self.tokens.read(layer, band)
        x = self.embed(band)
        for block, finished in zip(self.blocks[:layer], self.finished, strict=False):
            x = block.map(finished, x)
        return x

    # Backward: the derivative of the log-odds of one class by the weight of each token.

    def backward(self, class_index: int) -> Tensor:
        rows, columns = self.source.grid
        scores = torch.zeros(rows * columns, dtype=torch.float64)
        gradients = self.tokens.gradients()
        self._through_summary(self.layers, lambda s: log_odds(self.model.read_out(s), class_index), gradients, scores)
        for layer in reversed(range(self.layers)):
            block = self.blocks[layer]
            finished = [t.detach().requires_grad_() for t in self.finished[layer]]
            by_finished = [torch.zeros_like(t) for t in finished]
            for band in self.bands:
                with torch.enable_grad():
                    x = self.read(layer, band).detach().requires_grad_()
                    y = block.map(tuple(finished), x)
                    by_x, *by_state = torch.autograd.grad(y, [x, *finished], gradients.read(0, band))
                for total, part in zip(by_finished, by_state, strict=True):
                    total += part
                gradients.write(0, band, by_x)
                self._tick()
            self._through_summary(layer, lambda s, b=block, g=by_finished: _dot(b.finish(s), g), gradients, scores)
        return scores if self.like.dtype == torch.float64 else scores.float()

    def _through_summary(
        self, layer: int, answer: Callable[[Any], Tensor], gradients: "_Tokens", scores: Tensor
    ) -> None:
        """Adds to gradients and scores what reaches `answer` through the summary of a layer's input."""
        parts = []
        for band in self.bands:
            with torch.no_grad():
                part = self.summarise(layer, self.read(layer, band), band)
            parts.append(type(part)(*(t.requires_grad_() for t in part)))
            if layer < self.layers:
                self._tick()
        with torch.enable_grad():
            total = None
            for part in parts:
                total = merged(total, part)
            leaves = [t for part in parts for t in part]
            by_part: Iterator[Tensor | None] = iter(torch.autograd.grad(answer(total).sum(), leaves, allow_unused=True))
        for band, part in zip(self.bands, parts, strict=True):
            upstream = [next(by_part) for _ in part]
            with torch.enable_grad():
                x = self.read(layer, band).detach().requires_grad_()
                weight = None if band.is_prefix else x.new_ones(x.shape[:2], requires_grad=True)
                inner = _dot(self.summarise(layer, x, band, weight), upstream)
                inputs = [x] if weight is None else [x, weight]
                by_x, *by_weight = torch.autograd.grad(inner, inputs, allow_unused=True, materialize_grads=True)
            for by_w in by_weight:
                scores[band.tokens] += by_w[0].double().cpu()
            gradients.write(0, band, by_x if layer == self.layers else gradients.read(0, band) + by_x)
            self._tick()


def _dot(values: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Tensor:
    return torch.stack([(v * w).sum() for v, w in zip(values, weights, strict=True) if w is not None]).sum()


class _Tokens:
    """Tokens of each layer's input, band by band, in memory or in a file; "recompute" keeps none."""

    def __init__(self, store: str, folder: Path, shape: tuple[int, int], like: Tensor) -> None:
        self.store, self.folder, self.shape, self.like = store, folder, shape, like
        self.memory: dict[tuple[int, _Band], Tensor] = {}
        self.files: dict[int, np.ndarray] = {}

    def gradients(self) -> "_Tokens":
        """A store of the same kind for one gradient per token ("recompute" has to keep these in memory)."""
        kind = "memory" if self.store == "recompute" else self.store
        return _Tokens(kind, Path(tempfile.mkdtemp(prefix="gradients-", dir=self.folder)), self.shape, self.like)

    def write(self, layer: int, band: _Band, x: Tensor, over: bool = False) -> None:
        """Keeps the tokens of a band; `over` says the input of the layer before is no longer needed."""
        if self.store == "recompute":
            return
        if self.store == "memory" or band.is_prefix:
            if over:
                self.memory.pop((layer - 1, band), None)
            self.memory[layer, band] = x
            return
        key = 0 if over else layer
        if key not in self.files:
            # numpy has no bfloat16: narrower types are kept in float32, which holds them exactly
            dtype = np.float64 if self.like.dtype == torch.float64 else np.float32
            self.files[key] = np.memmap(self.folder / f"layer{key}", dtype=dtype, mode="w+", shape=self.shape)
        self.files[layer] = self.files[key]
        file = self.files[key]
        file[band.tokens] = x[0].detach().cpu().to(torch.from_numpy(file[:0]).dtype).numpy()

    def read(self, layer: int, band: _Band) -> Tensor:
        """The tokens of a band as they were written."""
        if (layer, band) in self.memory:
            return self.memory[layer, band]
        return torch.from_numpy(np.array(self.files[layer][band.tokens])).unsqueeze(0).to(self.like)
