"""Logits of an image larger than memory as one step of PyTorch's automatic differentiation, with exact gradients.

    logits = streamed_logits(model, "huge.svs", mpp=2.0, store="disk")
    F.cross_entropy(logits, label).backward()          # .grad of every parameter, patch embedding and head included

Memory is that of a chunk, a state per layer and the store; the gradients are those of the forward pass in memory.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sansmax.engine.chunked import check_no_randomness
from sansmax.engine.sources import open_source
from sansmax.engine.stream import Progress, Run, check, chunk_size
from sansmax.errors import InputError


def streamed_logits(
    model: Any,
    source: Any,
    *,
    chunk_tokens: int = 65536,
    store: str = "memory",
    keep_every: int = 1,
    mpp: float | None = None,
    slide_mpp: float | None = None,
    tissue: Any = True,
    min_tissue: float = 0.5,
    progress: Progress | None = None,
) -> Tensor:
    """Logits (1, classes) over all tokens of `source`, through which gradients flow to the model's parameters.

    The arguments are those of `sansmax.stream`. Between forward and backward the inputs of every `keep_every`-th layer
    stay in the store (none with "recompute"), and the source stays open; both are given back when backward is through,
    or when the logits are forgotten.

    Raises InputError for what cannot be streamed, and for a network that draws random numbers in training (dropout
    would depend on the chunks).
    """
    check(model, chunk_tokens, store)
    if keep_every < 1:
        raise InputError(f"keep_every must be at least 1, got {keep_every}")
    check_no_randomness(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with ExitStack() as held:
        options = {"mpp": mpp, "slide_mpp": slide_mpp, "tissue": tissue, "min_tissue": min_tissue}
        opened = held.enter_context(open_source(model, source, **options))
        embed = held.enter_context(opened.embedder(model, chunk_size(model, chunk_tokens)))
        folder = held.enter_context(tempfile.TemporaryDirectory(prefix="sansmax-"))
        differentiable = torch.is_grad_enabled() and bool(parameters)
        run = Run(model, embed, store, keep_every if differentiable else None, Path(folder))
        held.callback(run.close)
        run.count_to(run.schedule.forward_ticks + run.schedule.backward_ticks * differentiable, progress)
        if not differentiable:
            with torch.no_grad():
                return model.read_out(run.schedule.forward())
        return _Streamed.apply(_Held(run, held.pop_all()), *parameters)  # pyright: ignore[reportReturnType]


class _Held:
    """A run whose files are given back once, at the latest when nobody refers to it any more."""

    def __init__(self, run: Run, resources: ExitStack) -> None:
        self.run, self.resources = run, resources

    def close(self) -> None:
        self.resources.close()

    def __del__(self) -> None:
        self.close()


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: _Held, *parameters: Tensor) -> Tensor:
        ctx.held = held
        # so that changing them before backward is noticed
        ctx.save_for_backward(*parameters)
        return held.run.model.read_out(held.run.schedule.forward())

    @staticmethod
    def backward(ctx: Any, by_logits: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        parameters = ctx.saved_tensors
        back = ctx.held.run.backward(by_logits, parameters=parameters)
        ctx.held.close()
        return None, *(back.of[id(p)] for p in parameters)
