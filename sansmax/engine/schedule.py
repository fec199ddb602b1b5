"""The schedule of a network over tokens in chunks: exact, with gradients, and only one chunk in work.

    summary = merge over chunks of summarise(x)                       # of the first block
    for each block:
        finished = finish(summary);  summary = nothing
        for each chunk x:                                             # one read and one write of the tokens
            x = map(finished, x)
            summary = merge(summary, next block's summarise(x))

Backward runs the same schedule the other way, with the activations of one chunk recomputed at a time: through `map` of
each chunk to the gradient of `finished`, through `finish` to that of the summary, through `summarise` of each chunk to
its tokens. There is no attention mathematics here; who owns the tokens is the business of a `Store`.

Shapes: b images, n tokens, c channels.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sansmax.engine.stores import Chunk, Store
from sansmax.models.attention_soft import Place
from sansmax.models.blocks import Block
from sansmax.ops.moments import Weight, merged, without_padding


class Pool(Protocol):
    """What stands behind the last block: one more summary over all tokens."""

    def summarise(self, x: Tensor, weight: Weight, chunk: Chunk) -> Any:
        """The summary of a chunk; summaries merge."""
        ...

    def finish(self, state: Any) -> Tensor:
        """The answer from the summary of all tokens."""
        ...


class Schedule:
    """Tokens on their way through blocks, chunk by chunk.

    `embed(chunk)` makes the first block's input, `store` keeps what comes after, `weight(chunk)` is the mask of a
    chunk. `rank(chunk)` says which place a chunk has among the real tokens; None is that of its tokens.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        chunks: Sequence[Chunk],
        embed: Callable[[Chunk], Tensor],
        store: Store,
        *,
        weight: Callable[[Chunk], Weight] | None = None,
        rank: Callable[[Chunk], Place] | None = None,
        pool: Pool | None = None,
        tick: Callable[[], None] | None = None,
    ) -> None:
        self.blocks, self.chunks, self.embed, self.store, self.pool = blocks, chunks, embed, store, pool
        self.weight = weight or (lambda chunk: None)
        self.rank = rank
        self.tick = tick or (lambda: None)
        self.layers = len(blocks)
        # for each block, what `finish` gave in each of its rounds
        self.known: list[list[Any]] = []

    @property
    def forward_ticks(self) -> int:
        """How often `tick` is called in a forward pass."""
        return len(self.chunks) * (1 + sum(block.rounds for block in self.blocks))

    @property
    def backward_ticks(self) -> int:
        """How often `tick` is called from the answer of the pool to the first block."""
        return len(self.chunks) * (1 + sum(1 + block.rounds for block in self.blocks))

    def forward(self) -> Any:
        """Runs all blocks, and gives the summary of the pool, where there is one."""
        state: Any = None
        for chunk in self.chunks:
            x = self.embed(chunk)
            self.store.write(0, chunk, x)
            state = self._added(state, 0, x, chunk)
            self.tick()
        for layer, block in enumerate(self.blocks):
            self.known.append(self._rounds(layer, block.finish(state, None)))
            state = None
            for chunk in self.chunks:
                x = block.map(self.known[layer][-1], without_padding(self.read(layer, chunk), self.weight(chunk)))
                self.store.write(layer + 1, chunk, x)
                state = self._added(state, layer + 1, x, chunk)
                self.tick()
        return state

    def _rounds(self, layer: int, first: Any) -> list[Any]:
        known = [first]
        for _ in range(1, self.blocks[layer].rounds):
            state: Any = None
            for chunk in self.chunks:
                state = merged(state, self.summarise(layer, self.read(layer, chunk), chunk, known[-1]))
                self.tick()
            known.append(self.blocks[layer].finish(state, known[-1]))
        return known

    def _added(self, state: Any, layer: int, x: Tensor, chunk: Chunk) -> Any:
        if layer == self.layers and self.pool is None:
            return None
        return merged(state, self.summarise(layer, x, chunk))

    def place(self, chunk: Chunk, images: int, device: torch.device) -> Place:
        """Where a chunk stands among the real tokens."""
        if self.rank is not None:
            return self.rank(chunk)
        total = self.chunks[-1].stop
        first, every = torch.tensor([[chunk.start], [total]]).expand(2, images).to(device)
        return Place(first, every)

    def summarise(self, layer: int, x: Tensor, chunk: Chunk, known: Any = None, weight: Weight = None) -> Any:
        """One round's summary of a chunk; the layer behind the last block is the pool."""
        weight = self.weight(chunk) if weight is None else weight
        if layer == self.layers:
            assert self.pool is not None
            return self.pool.summarise(x, weight, chunk)
        block = self.blocks[layer]
        place = self.place(chunk, x.shape[0], x.device) if block.rounds > 1 else None
        return block.summarise(x, weight, known, place)

    def finish(self, layer: int, state: Any, known: Any) -> list[Tensor]:
        """What gradients reach of the result of a round."""
        if layer == self.layers:
            assert self.pool is not None
            return [self.pool.finish(state)]
        return floats(self.blocks[layer].finish(state, known))

    def read(self, layer: int, chunk: Chunk) -> Tensor:
        """The tokens of a chunk before a block: as they were kept, or made again."""
        below = layer
        while (x := self.store.read(below, chunk)) is None:
            if below == 0:
                x = self.embed(chunk)
                break
            below -= 1
        for block, known in zip(self.blocks[below:layer], self.known[below:layer], strict=True):
            x = block.map(known[-1], without_padding(x, self.weight(chunk)))
        return x


class Backward:
    """A schedule run backwards.

    `tokens` holds, for each token, the gradient by the input of the block that was passed last. `of` sums those of the
    `parameters`, `weight` (b, n) those of the weights of the tokens, where asked for.
    """

    def __init__(
        self, run: Schedule, tokens: Store, parameters: Iterable[Tensor] = (), weight: Tensor | None = None
    ) -> None:
        self.run, self.tokens, self.weight = run, tokens, weight
        self.of = {id(p): torch.zeros_like(p) for p in parameters}

    def gradient(self, chunk: Chunk) -> Tensor:
        """The gradient of a chunk."""
        x = self.tokens.read(0, chunk)
        assert x is not None
        return x

    def pool(self, by_answer: Tensor, parameters: Iterable[Tensor] = ()) -> None:
        """From the gradient of the pool's answer to that of the last block's result."""
        parts = self._parts(self.run.layers, None)
        self._through_round(self.run.layers, parts, None, [by_answer], list(parameters))

    def blocks(self) -> None:
        """From the gradient of the last block's result to that of the first block's input."""
        for layer in reversed(range(self.run.layers)):
            block, known = self.run.blocks[layer], self.run.known[layer]
            parameters: list[Tensor] = list(block.parameters())
            last = known[block.rounds - 2] if block.rounds > 1 else None
            by_known, parts = self._through_map(layer, last, parameters)
            for round_ in reversed(range(block.rounds)):
                before = known[round_ - 1] if round_ else None
                if round_ < block.rounds - 1:
                    parts = self._parts(layer, before)
                by_known = self._through_round(layer, parts, before, by_known, parameters)

    def embedding(self, parameters: Iterable[Tensor]) -> None:
        """From the gradient of the first block's input to that of the embedding's parameters."""
        own = [p for p in parameters if id(p) in self.of]
        for chunk in self.run.chunks if own else []:
            with torch.enable_grad():
                x = self.run.embed(chunk)
            self._differentiate([x], [self.gradient(chunk)], [], own)

    def _parts(self, layer: int, known: Any) -> list[Any]:
        with torch.no_grad():
            return [self.run.summarise(layer, self.run.read(layer, c), c, known) for c in self.run.chunks]

    def _through_map(self, layer: int, before: Any, parameters: list[Tensor]) -> tuple[list[Tensor], list[Any]]:
        """Replaces the gradient of a block's result by that of its input.

        Gives the gradient of `finished`, and the summaries of the last round, made while the tokens are at hand.
        """
        run, block, known = self.run, self.run.blocks[layer], leaves(self.run.known[layer][-1])
        totals = [torch.zeros_like(t) for t in floats(known)]
        parts = []
        for chunk in run.chunks:
            with torch.no_grad():
                x = run.read(layer, chunk).detach()
                parts.append(run.summarise(layer, x, chunk, before))
            with torch.enable_grad():
                y = block.map(known, without_padding(x.requires_grad_(), run.weight(chunk)))
            by_x, *by_known = self._differentiate([y], [self.gradient(chunk)], [x, *floats(known)], parameters)
            _add(totals, by_known)
            self.tokens.write(0, chunk, by_x)
            run.tick()
        return totals, parts

    def _through_round(
        self, layer: int, parts: list[Any], before: Any, by_known: list[Tensor], parameters: list[Tensor]
    ) -> list[Tensor]:
        """Carries the gradient of what a round gave to the tokens, and returns that of what the round knew."""
        run, before = self.run, None if before is None else leaves(before)
        totals = [torch.zeros_like(t) for t in floats(before)]
        upstream, by_before = self._through_finish(layer, parts, before, by_known, parameters)
        _add(totals, by_before)
        for chunk, by_part in zip(run.chunks, upstream, strict=True):
            with torch.no_grad():
                x = run.read(layer, chunk).detach()
            weight = run.weight(chunk)
            if self.weight is not None:
                weight = x.new_ones(x.shape[:2]) if weight is None else weight.detach()
                weight = weight.requires_grad_()
            inputs = [x, *([] if self.weight is None else [weight]), *floats(before)]
            with torch.enable_grad():
                part = floats(run.summarise(layer, x.requires_grad_(), chunk, before, weight))
            by_x, *rest = self._differentiate(part, by_part, inputs, parameters)
            self.tokens.write(0, chunk, by_x if layer == run.layers else self.gradient(chunk) + by_x)
            if self.weight is not None:
                self.weight[:, chunk.start : chunk.stop] += rest.pop(0).to(self.weight)
            _add(totals, rest)
            run.tick()
        return totals

    def _through_finish(
        self, layer: int, parts: list[Any], before: Any, by_known: list[Tensor], parameters: list[Tensor]
    ) -> tuple[list[list[Tensor]], list[Tensor]]:
        """The gradients of the summaries of all chunks, and of what the round knew."""
        parts = [leaves(part) for part in parts]
        with torch.enable_grad():
            state: Any = None
            for part in parts:
                state = merged(state, part)
            given = self.run.finish(layer, state, before)
        inputs = [t for part in parts for t in floats(part)]
        found = iter(self._differentiate(given, by_known, [*inputs, *floats(before)], parameters))
        return [[next(found) for _ in floats(part)] for part in parts], list(found)

    def _differentiate(
        self, of: list[Tensor], by: list[Tensor], inputs: list[Any], parameters: list[Tensor]
    ) -> list[Tensor]:
        """Gradients of `inputs`; those of the parameters are added up on the way."""
        own = [p for p in parameters if id(p) in self.of]
        pairs = [(t, g.to(t.dtype)) for t, g in zip(of, by, strict=True) if t.requires_grad]
        if not pairs:
            return [torch.zeros_like(t) for t in inputs]
        of, by = [t for t, _ in pairs], [g for _, g in pairs]
        found = torch.autograd.grad(of, [*inputs, *own], by, allow_unused=True, materialize_grads=True)
        for p, g in zip(own, found[len(inputs) :], strict=True):
            self.of[id(p)] += g
        return list(found[: len(inputs)])


def floats(fields: Any) -> list[Tensor]:
    """The tensors of a state or of what was finished that gradients reach."""
    return [] if fields is None else [t for t in fields if t is not None and t.is_floating_point()]


def leaves(fields: Any) -> Any:
    """The same state with tensors that gradients are asked for."""
    new = [t if t is None or not t.is_floating_point() else t.detach().requires_grad_() for t in fields]
    return tuple(new) if type(fields) is tuple else type(fields)(*new)


def _add(totals: list[Tensor], parts: Any) -> None:
    for total, part in zip(totals, parts, strict=True):
        total += part
