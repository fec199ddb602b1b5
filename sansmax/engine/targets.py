"""Single operations made ready to run, each beside its formula written out.

What is measured here is looked up when it is measured, so a case of something that this version lacks says so.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sansmax.engine.cases import IN_CHUNKS, LANDMARKS, Case
from sansmax.engine.contestants import Step, build_block, dtype_of, network_step, passes, random_tokens

NEWTON_STEPS = 20


class NotThere(Exception):
    """This version of the package lacks what is to be measured."""


def looked_up(module: str, name: str) -> Callable[..., Any]:
    """A function of this package by name.

    Raises NotThere.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise NotThere(f"not there yet: this version has no {module}.{name}") from None


def operation_step(case: Case, name: str) -> Step:
    """One pass of an operation on q, k, v of the case, or of its formula."""
    if case.kind == "sima":
        function = sima_written_out if name == "normalise, then multiply" else looked_up("sansmax.ops", name)
        return passes(function, _qkv(case), [], case.backward)
    q, _, v = _qkv(case)
    landmarks = q[:, :, :: max(1, case.tokens // LANDMARKS)][:, :, :LANDMARKS].contiguous()
    function = soft_written_out if name == "formula written out" else looked_up("sansmax.ops", name)
    return passes(function, [q, v, landmarks], [], case.backward)


def chunked_step(case: Case, name: str) -> Step:
    """One pass of an encoder: `NAME in chunks`, or at once, or its products alone."""
    mechanism = name.removesuffix(IN_CHUNKS)
    if mechanism == name:
        return network_step(case, name)
    run = looked_up("sansmax.engine.chunked", "run_chunked")
    torch.manual_seed(0)
    blocks = nn.ModuleList(build_block(mechanism, case.dim, case.heads) for _ in range(case.depth))
    blocks = blocks.to(case.device, dtype_of(case)).eval()
    return passes(lambda x: run(blocks, x), [random_tokens(case)], list(blocks.parameters()), case.backward)


def sima_written_out(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-12) -> Tensor:
    """SimA (arXiv 2206.08898) as its formula stands: q and k by their l1 norms over the tokens, then q (k^T v)."""
    q = q / q.abs().sum(-2, keepdim=True).clamp_min(eps)
    k = k / k.abs().sum(-2, keepdim=True).clamp_min(eps)
    return q @ (k.mT @ v)


def soft_written_out(q: Tensor, v: Tensor, landmarks: Tensor) -> Tensor:
    """SOFT (arXiv 2110.11945) as its formula stands: P inv(A) (P^T v) with Newton's inverse, 20 steps."""
    width = q.shape[-1] ** 0.5
    p, a = (torch.exp(-0.5 / width * _squared_distances(x, landmarks)) for x in (q, landmarks))
    a = a + 0.01 * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    z = 1.8 / a.abs().sum(-1).amax(-1)[..., None, None] ** 2 * a
    for _ in range(NEWTON_STEPS):
        z = 2 * z - z @ a @ z
    return p @ (z @ (p.mT @ v))


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x * x).sum(-1, keepdim=True) + (y * y).sum(-1).unsqueeze(-2) - 2 * (x @ y.mT)


def _qkv(case: Case) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.heads, case.tokens, case.dim // case.heads)
    return [torch.randn(shape, generator=generator).to(case.device, dtype_of(case)) for _ in range(3)]
