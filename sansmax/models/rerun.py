"""Activation checkpointing of blocks with batch norms: memory for time, and nothing else changed."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def rerun(block: nn.Module, x: Tensor, *arguments: Any) -> Tensor:
    """`block(x, *arguments)`, its activations made again in backward instead of kept.

    The batch is counted into running statistics once.
    """
    again: dict[str, Any] = {}
    # compilers make activations again in their own way and take no context
    if not torch.compiler.is_compiling():
        again["context_fn"] = lambda: (nullcontext(), _counted_already(block))
    out: Any = checkpoint(block, x, *arguments, use_reentrant=False, **again)
    return out


@contextmanager
def _counted_already(block: nn.Module) -> Iterator[None]:
    # the norms count it into copies of their statistics
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kept = [dict(norm._buffers) for norm in norms]
    try:
        for norm in norms:
            norm._buffers.update({name: None if b is None else b.clone() for name, b in norm._buffers.items()})
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
