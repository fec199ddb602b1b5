"""A stack of blocks over tokens in memory, a chunk at a time: exact, with gradients, and only one chunk in work.

The schedule is that of `sansmax.engine.schedule`, with tokens and gradients that are tensors.

Shapes: b images, n tokens, c channels.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sansmax.engine.schedule import Backward, Schedule
from sansmax.engine.stores import Chunk, MemoryStore
from sansmax.errors import InputError
from sansmax.models.attention_soft import Place
from sansmax.models.blocks import Block
from sansmax.ops.checks import check_layer
from sansmax.ops.moments import Weight

# temporaries of this many tokens stay in the cache of a CPU, and products fill it
CHUNK_TOKENS = 4096
KEEP = ("inputs", "recompute")


def run_chunked(
    blocks: Sequence[Block] | nn.ModuleList | nn.Sequential,
    tokens: Float[Tensor, "b n c"],
    *,
    mask: Weight = None,
    chunk_tokens: int = CHUNK_TOKENS,
    in_place: bool = False,
    keep: str = "inputs",
    progress: Callable[[int, int], None] | None = None,
) -> Float[Tensor, "b n c"]:
    """The blocks one after the other over all `tokens`, with the memory of `chunk_tokens` tokens beside them.

    The result, and every gradient, is that of calling the blocks, whatever the chunk. `mask` is True for real tokens,
    or a weight per token, whose gradient is given, too. `in_place` overwrites `tokens` (without gradients only).
    Where gradients are wanted, `keep` says what forward leaves for backward: the "inputs" of every block (one copy of
    the tokens each), or nothing but the tokens ("recompute": each block's input is made from them again, L (L + 1) / 2
    times the arithmetic of one block). `progress(done, total)` is called after each chunk of a forward pass.

    Raises ValueError for blocks that have no two phases or that draw random numbers (dropout in training would depend
    on the chunks), and for wrong arguments.
    """
    _check(blocks, tokens, mask, chunk_tokens, keep)
    layers = cast(list[Block], [*blocks])
    if not layers:
        return tokens if in_place else tokens.clone()
    parameters = [p for block in layers for p in block.parameters() if p.requires_grad]
    wants = [t for t in (tokens, mask, *parameters) if isinstance(t, Tensor) and t.requires_grad]
    if not (torch.is_grad_enabled() and wants):
        with torch.no_grad():
            store = _Inputs(_shape(tokens), tokens, rolled=tokens if in_place else None)
            _schedule(layers, tokens, mask, store, chunk_tokens, progress).forward()
            return store.result()
    if in_place:
        raise InputError("in_place overwrites the tokens that gradients need; leave it out, or use torch.no_grad()")
    return _Differentiable.apply((layers, chunk_tokens, keep, progress), tokens, mask, *parameters)


def _check(blocks: Iterable[nn.Module], tokens: Tensor, mask: Weight, chunk_tokens: int, keep: str) -> None:
    check_layer(tokens, mask)
    if chunk_tokens < 1:
        raise InputError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    if keep not in KEEP:
        raise InputError(f"keep must be one of {', '.join(KEEP)}, got {keep!r}")
    for i, block in enumerate(blocks):
        if not isinstance(block, Block) or not block.streams:
            name = type(block.attn).__name__ if isinstance(block, Block) else type(block).__name__
            raise InputError(
                f"block {i} ({name}) cannot run in chunks: it has no summary of fixed size. "
                'Use blocks with attention="seqnorm", "sima", or "soft" with pooled landmarks'
            )
        check_no_randomness(block, f"block {i}")


def check_no_randomness(module: nn.Module, what: str = "the network") -> None:
    """Raises InputError for parts that draw random numbers in training: results would depend on the chunks."""
    for name, part in module.named_modules():
        rate = getattr(part, "p", None) or getattr(part, "drop_prob", None)
        if part.training and isinstance(rate, float) and rate > 0:
            raise InputError(
                f"{what} draws random numbers in training ({name}: rate {rate}), which would depend on the chunks; "
                "set the rate to 0, or call eval()"
            )


def chunks_of(n: int, chunk_tokens: int) -> list[Chunk]:
    """The tokens 0 ... n - 1 in chunks."""
    return [Chunk(first, min(first + chunk_tokens, n)) for first in range(0, n, chunk_tokens)]


def _schedule(
    blocks: list[Block],
    tokens: Tensor,
    mask: Weight,
    store: MemoryStore,
    chunk_tokens: int,
    progress: Callable[[int, int], None] | None = None,
) -> Schedule:
    """The schedule over tokens that are there."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, run.forward_ticks)

    def rank(chunk: Chunk) -> Place:
        assert mask is not None
        real = mask if mask.dtype == torch.bool else mask != 0
        return Place(real[:, : chunk.start].sum(1), real.sum(1))

    run = Schedule(
        blocks,
        chunks_of(tokens.shape[1], chunk_tokens),
        lambda chunk: tokens[:, chunk.start : chunk.stop],
        store,
        weight=None if mask is None else lambda chunk: mask[:, chunk.start : chunk.stop],
        rank=None if mask is None else rank,
        tick=tick,
    )
    return run


def _shape(tokens: Tensor) -> tuple[int, int, int]:
    b, n, c = tokens.shape
    return b, n, c


class _Differentiable(torch.autograd.Function):
    """The stack as one step of PyTorch's automatic differentiation."""

    @staticmethod
    def forward(ctx: Any, how: tuple, tokens: Tensor, mask: Tensor | None, *parameters: Tensor) -> Tensor:
        blocks, chunk_tokens, keep, progress = how
        # a block's input is the last one's result; the tokens themselves are the caller's and stay as they are
        kept = range(1, len(blocks)) if keep == "inputs" else ()
        store = _Inputs(_shape(tokens), tokens, kept)
        run = _schedule(blocks, tokens.detach(), mask, store, chunk_tokens, progress)
        run.forward()
        ctx.run = run
        # so that changing them before backward is noticed
        ctx.save_for_backward(tokens, mask, *parameters)
        return store.result()

    @staticmethod
    def backward(ctx: Any, by_result: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, mask, *parameters = ctx.saved_tensors
        ctx.run.tick = lambda: None
        gradients = MemoryStore(_shape(by_result), by_result, kept=(0,))
        gradients.places[0] = by_result.clone()
        weight = None if mask is None or not mask.requires_grad else torch.zeros_like(mask)
        back = Backward(ctx.run, gradients, parameters, weight)
        back.blocks()
        return None, gradients.places[0], weight, *(back.of[id(p)] for p in parameters)


class _Inputs(MemoryStore):
    """The inputs of blocks; the tokens themselves are not copied, and the result leaves."""

    def write(self, layer: int, chunk: Chunk, x: Tensor) -> None:
        """Keeps all but the first block's input."""
        if layer > 0:
            super().write(layer, chunk, x)

    def result(self) -> Tensor:
        """What the last block gave; the store forgets it."""
        self._now.clear()
        return self.places.pop(None)
