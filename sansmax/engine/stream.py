"""Exact forward pass, and scores of every token, over more tokens than fit into memory.

Each layer reads all tokens twice: once to summarise them, once to map each by the summary. A chunk of tokens is in work
at a time, and the pass that maps by layer l also summarises for layer l + 1, so a network costs one read and one write
of the token store per layer (`sansmax.engine.schedule`). Sources are pictures, slides and bags of features
(`sansmax.engine.embedding`); what they have in common is that the network embeds them a chunk at a time.

Scores run the same schedule backwards, with the activations of one chunk recomputed at a time.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sansmax.data.tokens import TokenSource
from sansmax.engine.chunked import CHUNK_TOKENS
from sansmax.engine.embedding import Embedder
from sansmax.engine.explain import check_class, log_odds
from sansmax.engine.schedule import Backward, Schedule
from sansmax.engine.sources import Opened, open_source, opened_tokens
from sansmax.engine.stores import STORES, Chunk, FileStore, MemoryStore, Store
from sansmax.errors import InputError
from sansmax.models.blocks import Block
from sansmax.ops.moments import Weight

Progress = Callable[[int, int], None]
Answer = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Streamed:
    """What a stream gives.

    `logits` (1, classes). `scores` (tokens, classes asked for) or None, for `score_classes`. Tokens of a picture are in
    reading order of `grid` (rows, columns); those of a slide and of a bag are at `xy` (tokens, 2), upper left corners
    (x, y) in level-0 pixels, squares of `side` such pixels; None where they are not known.
    """

    logits: Tensor
    scores: np.ndarray | None
    grid: tuple[int, int] | None
    score_classes: tuple[int, ...] = ()
    xy: np.ndarray | None = None
    side: float | None = None


def stream(
    model: Any,
    source: Any,
    *,
    chunk_tokens: int = 65536,
    store: str = "memory",
    scores: bool | str | Sequence[int] = False,
    mpp: float | None = None,
    slide_mpp: float | None = None,
    tissue: Any = True,
    min_tissue: float = 0.5,
    keep_every: int = 1,
    answer: Answer = log_odds,
    progress: Progress | None = None,
) -> Streamed:
    """Exact logits over all tokens of a picture or slide at its own resolution, or of a bag, and scores of the tokens.

    `source` is one of

    * the path of a picture or of a slide, an opened slide, or pixels (H, W) or (H, W, 3) as a uint8 or uint16 array or
      memmap, for a network of patches. Pixels are normalised by the mean and standard deviation of the model's
      configuration. A side of a picture that is no multiple of the patch is filled up by repeating its edge.
    * features (N, width) as an array or memmap, a bag, or the path of one, for a network of features.
    * a `TokenSource` or `SlideTokens` of your own.

    Of a slide the patches with tissue are tokens: `tissue` True finds them, False takes every patch, and a `Tissue` is
    one you have; a patch needs the share `min_tissue` of it. `mpp` is the resolution in micrometres per pixel that the
    network sees (None: level 0 as it is), `slide_mpp` that of level 0 where the file does not say.

    `chunk_tokens` bounds the tokens in work at a time. The other arguments are those of `stream_tokens`.
    """
    check(model, chunk_tokens, store)
    with open_source(model, source, mpp=mpp, slide_mpp=slide_mpp, tissue=tissue, min_tissue=min_tissue) as opened:
        how: dict[str, Any] = {"scores": scores, "keep_every": keep_every, "answer": answer, "progress": progress}
        return stream_opened(model, opened, chunk_tokens=chunk_tokens, store=store, **how)


def stream_tokens(
    model: Any,
    source: TokenSource,
    *,
    chunk_tokens: int = 65536,
    store: str = "memory",
    scores: bool | str | Sequence[int] = False,
    keep_every: int = 1,
    answer: Answer = log_odds,
    progress: Progress | None = None,
) -> Streamed:
    """The network's logits over all tokens of `source`, equal to the forward pass in memory.

    `chunk_tokens` bounds the tokens in work at a time (whole rows of the grid, one at least). `store` says where the
    tokens between two layers live: "memory", "disk" (temporary files) or "recompute" (nowhere: each layer starts from
    the pixels again, L(L+1)/2 times the arithmetic). `scores` asks for the gradient of the log-odds by the weight of
    each token, for every class (True), for the classes given, or for the "predicted" one; it keeps the tokens of every
    `keep_every`-th layer in the store (none with "recompute") and makes the others from them again, and one gradient
    per token. `answer(logits, class)` is what scores explain, instead of the log-odds. `progress(done, total)` is
    called after each chunk.

    Raises InputError for a network that cannot run in chunks, and for wrong arguments.
    """
    check(model, chunk_tokens, store)
    how: dict[str, Any] = {"scores": scores, "keep_every": keep_every, "answer": answer, "progress": progress}
    return stream_opened(model, opened_tokens(source), chunk_tokens=chunk_tokens, store=store, **how)


def check(model: Any, chunk_tokens: int, store: str) -> None:
    """Raises InputError for a network that cannot run in chunks, and for wrong arguments."""
    other = None if hasattr(model, "summarise_pool") else "it is not a network of this package"
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


def chunk_size(model: Any, chunk_tokens: int) -> int:
    """How many tokens are in work at a time: on a CPU no more than its cache holds temporaries of."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return min(chunk_tokens, CHUNK_TOKENS) if on_cpu else chunk_tokens


def stream_opened(
    model: Any,
    opened: Opened,
    *,
    chunk_tokens: int = 65536,
    store: str = "memory",
    scores: bool | str | Sequence[int] = False,
    keep_every: int = 1,
    answer: Answer = log_odds,
    progress: Progress | None = None,
) -> Streamed:
    """`stream_tokens` for any source that is open."""
    classes = _score_classes(scores, model.num_classes, answer)
    if keep_every < 1:
        raise InputError(f"keep_every must be at least 1, got {keep_every}")
    wanted = keep_every if scores else None
    with (
        evaluating(model),
        opened.embedder(model, chunk_size(model, chunk_tokens)) as embed,
        running(model, embed, store, wanted) as run,
    ):
        return _answered(run, opened, classes, answer, progress)


def _answered(
    run: "Run", opened: Opened, classes: list[int] | None, answer: Answer, progress: Progress | None
) -> Streamed:
    backward = 1 if classes is None else len(classes)
    run.count_to(run.schedule.forward_ticks + backward * run.schedule.backward_ticks, progress)
    with torch.no_grad():
        pooled = run.schedule.forward()
        logits = run.model.read_out(pooled)
    if classes is None:
        classes = [int(logits[0].argmax())]
    scores = None
    if classes:
        scores = np.stack([run.scores(logits, c, answer) for c in classes], axis=1)
    return Streamed(logits, scores, opened.grid, tuple(classes), opened.xy, opened.side)


def _score_classes(scores: bool | str | Sequence[int], num_classes: int, answer: Answer) -> list[int] | None:
    if isinstance(scores, str):
        if scores != "predicted":
            raise InputError(f'scores are True, False, numbers of classes or "predicted", got {scores!r}')
        if answer is log_odds:
            check_class(0, num_classes)
        return None
    if isinstance(scores, bool):
        classes = list(range(num_classes)) if scores else []
    else:
        classes = [int(c) for c in scores]
    for c in classes:
        if answer is log_odds or not 0 <= c < num_classes:
            check_class(c, num_classes)
    return classes


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode inside the block, every part of it as it was after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # each by itself: part of a network may be frozen in evaluation mode while the rest trains
        for module, training in modes:
            module.training = training


@contextmanager
def running(model: Any, embed: Embedder, store: str, keep_every: int | None) -> Iterator["Run"]:
    """A network about to run over the tokens of `embed`; temporary files go when the block ends.

    `keep_every` None is a forward pass alone.
    """
    with tempfile.TemporaryDirectory(prefix="sansmax-") as folder:
        run = Run(model, embed, store, keep_every, Path(folder))
        try:
            yield run
        finally:
            run.close()


class _Pooling:
    """The network's pooling and head, behind its last block."""

    def __init__(self, model: Any, prefix: Chunk | None) -> None:
        self.model, self.prefix = model, prefix

    def summarise(self, x: Tensor, weight: Weight, chunk: Chunk) -> Any:
        return self.model.summarise_pool(x, weight, prefix=chunk == self.prefix)

    def finish(self, state: Any) -> Tensor:
        return self.model.read_out(state)


class Run:
    """One image on its way through the network and back."""

    def __init__(self, model: Any, embed: Embedder, store: str, keep_every: int | None, folder: Path) -> None:
        self.model, self.embed, self.kind, self.folder = model, embed, store, folder
        blocks = cast(list[Block], list(model.blocks))
        self.like = next(model.parameters())
        # the last place holds what the pool reads
        kept = () if keep_every is None else [i for i in range(len(blocks)) if i % keep_every == 0]
        self.stores: list[Store] = []
        self.schedule = Schedule(
            blocks, embed.chunks, embed, self.store(kept), pool=_Pooling(model, embed.prefix), tick=self._tick
        )
        self.done, self.total, self.progress = 0, 0, None

    def store(self, kept: Sequence[int], *, gradients: bool = False) -> Store:
        """A place for the tokens, or for one gradient per token ("recompute" has to keep these in memory)."""
        shape = (1, self.embed.count, self.model.embed_dim)
        if self.kind == "recompute" and not gradients:
            new: Store = Store(rolling=False)
        elif self.kind == "disk":
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            new = FileStore(shape, self.like, kept, folder=folder)
        else:
            new = MemoryStore(shape, self.like, kept)
        self.stores.append(new)
        return new

    def close(self) -> None:
        """Gives the stores back."""
        for store in self.stores:
            store.close()

    def count_to(self, total: int, progress: Progress | None) -> None:
        """Reports each chunk that is done."""
        self.done, self.total, self.progress = 0, total, progress

    def _tick(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)

    def scores(self, logits: Tensor, class_index: int, answer: Answer) -> np.ndarray:
        """The derivative of the answer for one class by the weight of each token."""
        exact = torch.float64 if self.like.device.type == "cpu" else torch.float32
        weight = torch.zeros((1, self.embed.count), dtype=exact, device=self.like.device)
        with torch.enable_grad():
            at = logits.detach().requires_grad_()
            (by_logits,) = torch.autograd.grad(answer(at, class_index).sum(), at)
        self.backward(by_logits, weight=weight)
        found = weight[0, self.model.num_prefix_tokens :].cpu()
        return (found if self.like.dtype == torch.float64 else found.float()).numpy()

    def backward(
        self, by_logits: Tensor, *, parameters: Sequence[Tensor] = (), weight: Tensor | None = None
    ) -> Backward:
        """From the gradient of the logits to those of the parameters and of the tokens' weights."""
        back = Backward(self.schedule, self.store((0,), gradients=True), parameters, weight)
        back.pool(by_logits, parameters)
        back.blocks()
        back.embedding(parameters)
        back.tokens.close()
        return back
