"""A stack of blocks over tokens in memory, a chunk at a time: exact, with gradients, and only one chunk in work.

    summary = merge over chunks of summarise(x)                       # of the first block
    for each block:
        finished = finish(summary);  summary = nothing
        for each chunk x:                                             # one read and one write of the tokens
            x = map(finished, x)
            summary = merge(summary, next block's summarise(x))

Training runs the same schedule backwards with the activations of one chunk recomputed at a time: through `map` of each
chunk to the gradient of `finished`, through `finish` to that of the summary, through `summarise` of each chunk to its
tokens. There is no attention mathematics here.

Shapes: b images, n tokens, c channels.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sansmax.errors import InputError
from sansmax.models.attention_soft import Place
from sansmax.models.blocks import Block
from sansmax.ops.checks import check_layer
from sansmax.ops.moments import Weight, merged, without_padding

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
    parameters = [p for block in layers for p in block.parameters() if p.requires_grad]
    wants = [t for t in (tokens, mask, *parameters) if isinstance(t, Tensor) and t.requires_grad]
    if not (torch.is_grad_enabled() and wants):
        with torch.no_grad():
            run = _Stack(layers, tokens if in_place else tokens.clone(), mask, chunk_tokens, progress)
            run.forward(keep_inputs=False)
            return run.inputs[-1]
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
        for name, module in block.named_modules():
            rate = getattr(module, "p", None) or getattr(module, "drop_prob", None)
            if module.training and isinstance(rate, float) and rate > 0:
                raise InputError(
                    f"block {i} draws random numbers in training ({name}: rate {rate}), which would depend on the "
                    "chunks; set the rate to 0, or call eval()"
                )


class _Stack:
    """Tokens on their way through blocks; `inputs[l]` are those that block l reads, the last ones the result."""

    def __init__(
        self,
        blocks: list[Block],
        tokens: Tensor,
        mask: Weight,
        chunk_tokens: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.blocks, self.mask, self.progress = blocks, mask, progress
        n = tokens.shape[1]
        self.chunks = [slice(first, min(first + chunk_tokens, n)) for first in range(0, n, chunk_tokens)]
        self.inputs = [tokens]
        # for each block, what `finish` gave in each of its rounds
        self.known: list[list[Any]] = []
        self.done, self.total = 0, len(self.chunks) * (1 + sum(block.rounds for block in blocks))

    def forward(self, keep_inputs: bool) -> None:
        """Runs all blocks; the tokens are overwritten unless the inputs are kept."""
        state: Any = None
        for chunk in self.chunks:
            state = merged(state, self.summarise(0, self.inputs[0][:, chunk], chunk))
            self._tick()
        for layer, block in enumerate(self.blocks):
            x = self.inputs[layer]
            y = torch.empty_like(x) if keep_inputs else x
            known = [block.finish(state, None)]
            for _ in range(1, block.rounds):
                state = None
                for chunk in self.chunks:
                    state = merged(state, self.summarise(layer, x[:, chunk], chunk, known[-1]))
                    self._tick()
                known.append(block.finish(state, known[-1]))
            self.known.append(known)
            state = None
            for chunk in self.chunks:
                out = block.map(known[-1], without_padding(x[:, chunk], self.weight(chunk)))
                y[:, chunk] = out
                if layer + 1 < len(self.blocks):
                    state = merged(state, self.summarise(layer + 1, out, chunk))
                self._tick()
            self.inputs.append(y)

    def _tick(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)

    def weight(self, chunk: slice) -> Weight:
        """The mask of a chunk."""
        return None if self.mask is None else self.mask[:, chunk]

    def place(self, chunk: slice) -> Place:
        """Where a chunk stands among the real tokens."""
        if self.mask is None:
            b, n = self.inputs[0].shape[:2]
            first, total = torch.tensor([[chunk.start], [n]]).expand(2, b).to(self.inputs[0].device)
            return Place(first, total)
        real = self.mask if self.mask.dtype == torch.bool else self.mask != 0
        return Place(real[:, : chunk.start].sum(1), real.sum(1))

    def summarise(self, layer: int, x: Tensor, chunk: slice, known: Any = None, weight: Weight = None) -> Any:
        """One round's summary of a chunk."""
        block = self.blocks[layer]
        place = self.place(chunk) if block.rounds > 1 else None
        return block.summarise(x, self.weight(chunk) if weight is None else weight, known, place)

    def read(self, layer: int, chunk: slice) -> Tensor:
        """The tokens of a chunk before a block: as they were kept, or made again."""
        if layer < len(self.inputs):
            return self.inputs[layer][:, chunk]
        x = self.inputs[0][:, chunk]
        for block, known in zip(self.blocks[:layer], self.known, strict=False):
            x = block.map(known[-1], without_padding(x, self.weight(chunk)))
        return x


class _Gradients:
    """Running the stack backwards; `tokens` hold the gradient by the input of the block that was passed last."""

    def __init__(self, run: _Stack, by_result: Tensor, parameters: list[Tensor]) -> None:
        self.run, self.tokens, self.parameters = run, by_result.clone(), parameters
        self.of = {id(p): torch.zeros_like(p) for p in parameters}
        weighted = run.mask is not None and run.mask.requires_grad
        self.weight = torch.zeros_like(run.mask) if weighted and run.mask is not None else None

    def all_layers(self) -> None:
        """From the result to the tokens, the weights of the tokens and the parameters."""
        for layer in reversed(range(len(self.run.blocks))):
            by_known = self._through_map(layer)
            for round_ in reversed(range(self.run.blocks[layer].rounds)):
                by_known = self._through_round(layer, round_, by_known)

    def _through_map(self, layer: int) -> list[Tensor]:
        """Replaces the gradient of a block's result by that of its input, and returns that of `finished`."""
        block, known = self.run.blocks[layer], _leaves_of(self.run.known[layer][-1])
        totals = [torch.zeros_like(t) for t in _floats(known)]
        for chunk in self.run.chunks:
            with torch.no_grad():
                x = self.run.read(layer, chunk).detach()
            with torch.enable_grad():
                y = block.map(known, without_padding(x.requires_grad_(), self.run.weight(chunk)))
            by_x, *by_known = self._differentiate([y], [self.tokens[:, chunk]], [x, *_floats(known)], block)
            _add(totals, by_known)
            self.tokens[:, chunk] = by_x
        return totals

    def _through_round(self, layer: int, round_: int, by_known: list[Tensor]) -> list[Tensor]:
        """Carries the gradient of what a round gave to the tokens, and returns that of what the round knew."""
        run, block = self.run, self.run.blocks[layer]
        before = _leaves_of(run.known[layer][round_ - 1]) if round_ else None
        totals = [torch.zeros_like(t) for t in _floats(before)]
        with torch.no_grad():
            chunks = [run.summarise(layer, run.read(layer, c), c, before) for c in run.chunks]
        parts = [_leaves_of(part) for part in chunks]
        with torch.enable_grad():
            state = None
            for part in parts:
                state = merged(state, part)
            given = _floats(block.finish(state, before))
        leaves = [t for part in parts for t in _floats(part)]
        by_all = iter(self._differentiate(given, by_known, [*leaves, *_floats(before)], block))
        upstream = [[next(by_all) for _ in _floats(part)] for part in parts]
        _add(totals, by_all)
        for chunk, by_part in zip(run.chunks, upstream, strict=True):
            with torch.no_grad():
                x = run.read(layer, chunk).detach()
            weight = run.weight(chunk)
            if self.weight is not None and weight is not None:
                weight = weight.detach().requires_grad_()
            inputs = [x, *([] if self.weight is None else [weight]), *_floats(before)]
            with torch.enable_grad():
                part = _floats(run.summarise(layer, x.requires_grad_(), chunk, before, weight))
            by_x, *rest = self._differentiate(part, by_part, inputs, block)
            self.tokens[:, chunk] += by_x
            if self.weight is not None:
                self.weight[:, chunk] += rest.pop(0)
            _add(totals, rest)
        return totals

    def _differentiate(self, of: list[Tensor], by: list[Tensor], inputs: list[Any], block: Block) -> list[Tensor]:
        """Gradients of `inputs`; those of the block's parameters are added up on the way."""
        own = [p for p in block.parameters() if id(p) in self.of]
        pairs = [(t, g) for t, g in zip(of, by, strict=True) if t.requires_grad]
        if not pairs:
            return [torch.zeros_like(t) for t in inputs]
        of, by = [t for t, _ in pairs], [g for _, g in pairs]
        found = torch.autograd.grad(of, [*inputs, *own], by, allow_unused=True, materialize_grads=True)
        for p, g in zip(own, found[len(inputs) :], strict=True):
            self.of[id(p)] += g
        return list(found[: len(inputs)])


class _Differentiable(torch.autograd.Function):
    """The stack as one step of PyTorch's automatic differentiation."""

    @staticmethod
    def forward(ctx: Any, how: tuple, tokens: Tensor, mask: Tensor | None, *parameters: Tensor) -> Tensor:
        blocks, chunk_tokens, keep, progress = how
        kept = keep == "inputs"
        run = _Stack(blocks, tokens.detach() if kept else tokens.detach().clone(), mask, chunk_tokens, progress)
        run.forward(keep_inputs=kept)
        result = run.inputs.pop()
        if not kept:
            run.inputs = [tokens.detach()]
        ctx.run = run
        # so that changing them before backward is noticed
        ctx.save_for_backward(tokens, mask, *parameters)
        return result

    @staticmethod
    def backward(ctx: Any, by_result: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _, _, *parameters = ctx.saved_tensors
        gradients = _Gradients(ctx.run, by_result, parameters)
        gradients.all_layers()
        return None, gradients.tokens, gradients.weight, *(gradients.of[id(p)] for p in parameters)


def _floats(fields: Any) -> list[Tensor]:
    """The tensors of a state or of what was finished that gradients reach."""
    return [] if fields is None else [t for t in fields if t is not None and t.is_floating_point()]


def _leaves_of(fields: Any) -> Any:
    """The same state with tensors that gradients are asked for."""
    new = [t if t is None or not t.is_floating_point() else t.detach().requires_grad_() for t in fields]
    return tuple(new) if type(fields) is tuple else type(fields)(*new)


def _add(totals: list[Tensor], parts: Any) -> None:
    for total, part in zip(totals, parts, strict=True):
        total += part
