"""Softmax attention with the tokens shared out over processes, three ways, each exact, forwards and backwards.

* ring attention (https://arxiv.org/abs/2310.01889): blocks of keys and values go round, a process at a time, and each
  adds what it reads from them to a running softmax;
* all-gather: every process fetches all keys and values (https://arxiv.org/abs/2407.21783, section 3.3.2);
* all-to-all (DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509): tokens are exchanged for heads and back, so there
  must be as many heads as processes, or a multiple.

Small and plain, to count what they send: no overlap of sending and computing, no fused kernels beside PyTorch's.

Shapes: h heads, n own tokens, d channels per head, p processes.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# rows of the softmax that are made at once
ROWS = 1024


def passed_on(blocks: Tensor) -> Tensor:
    """The blocks of the process before, while one's own go to the next."""
    rank, world = dist.get_rank(), dist.get_world_size()
    blocks, came = blocks.contiguous(), torch.empty_like(blocks, memory_format=torch.contiguous_format)
    calls = [
        dist.P2POp(dist.isend, blocks, (rank + 1) % world),
        dist.P2POp(dist.irecv, came, (rank - 1) % world),
    ]
    for work in dist.batch_isend_irecv(calls):
        work.wait()
    return came


class Ring(torch.autograd.Function):
    """Ring attention; shares of the tokens must be equal."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The output of one's own queries over the keys of all."""
        world, blocks = dist.get_world_size(), torch.stack((k, v))
        out, log_sum = torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf)
        for step in range(world):
            for rows in torch.arange(q.shape[-2]).split(ROWS):
                scores = q[..., rows, :] @ blocks[0].mT * q.shape[-1] ** -0.5
                more = scores.logsumexp(-1)
                total = torch.logaddexp(log_sum[..., rows], more)
                kept = (log_sum[..., rows] - total).exp().unsqueeze(-1)
                out[..., rows, :] = out[..., rows, :] * kept + (scores - total.unsqueeze(-1)).exp() @ blocks[1]
                log_sum[..., rows] = total
            if step < world - 1:
                blocks = passed_on(blocks)
        ctx.save_for_backward(q, k, v, out, log_sum)
        return out

    @staticmethod
    def backward(ctx: Any, by_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keys and values go round again; their gradients go with them, and one step further: home."""
        q, k, v, out, log_sum = ctx.saved_tensors
        world, blocks, scale = dist.get_world_size(), torch.stack((k, v)), q.shape[-1] ** -0.5
        by_q, by_blocks, within = torch.zeros_like(q), torch.zeros_like(blocks), (by_out * out).sum(-1, keepdim=True)
        for step in range(world):
            for rows in torch.arange(q.shape[-2]).split(ROWS):
                some, by = q[..., rows, :], by_out[..., rows, :]
                p = (some @ blocks[0].mT * scale - log_sum[..., rows].unsqueeze(-1)).exp()
                by_scores = p * (by @ blocks[1].mT - within[..., rows, :]) * scale
                by_q[..., rows, :] += by_scores @ blocks[0]
                by_blocks[0] += by_scores.mT @ some
                by_blocks[1] += p.mT @ by
            if step < world - 1:
                blocks = passed_on(blocks)
            by_blocks = passed_on(by_blocks)
        return by_q, by_blocks[0], by_blocks[1]


class Gathered(torch.autograd.Function):
    """The tokens of all processes, (p, ...); backward gives each the sum of the gradients of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Own blocks of all processes."""
        every = x.new_empty(dist.get_world_size() * x.numel())
        dist.all_gather_into_tensor(every, x.contiguous().view(-1))
        return every.view(-1, *x.shape)

    @staticmethod
    def backward(ctx: Any, by_every: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Each block goes to its owner, who adds them up: a reduce-scatter, which gloo has by sums of all only."""
        return exchanged(by_every).sum(0)


class Exchanged(torch.autograd.Function):
    """Block j of (p, ...) goes to process j, whose block comes back in its place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Blocks of all processes."""
        return exchanged(x)

    @staticmethod
    def backward(ctx: Any, by_x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The same way back."""
        return exchanged(by_x)


def exchanged(x: Tensor) -> Tensor:
    """An all-to-all over the first axis."""
    came = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(came.view(-1), x.contiguous().view(-1))
    return came


def ring(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Ring attention of one's own tokens (h, n, d)."""
    out = Ring.apply(q, k, v)
    assert isinstance(out, Tensor)
    return out


def all_gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Own queries over the keys and values of all, by PyTorch's kernel."""
    every = Gathered.apply(torch.stack((k, v)))
    assert isinstance(every, Tensor)
    k, v = every.permute(1, 2, 0, 3, 4).flatten(2, 3).unbind(0)
    return F.scaled_dot_product_attention(q[None], k[None], v[None])[0]


def all_to_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All tokens of some heads, then back to one's own tokens of all heads."""
    world = dist.get_world_size()
    # (3, h, n, d) -> (p, 3, h / p, n, d): to each process its heads
    blocks = torch.stack((q, k, v)).unflatten(1, (world, -1)).transpose(0, 1)
    every = Exchanged.apply(blocks)
    assert isinstance(every, Tensor)
    q, k, v = every.permute(1, 2, 0, 3, 4).flatten(2, 3).unbind(0)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    back = Exchanged.apply(out.unflatten(1, (world, -1)).transpose(0, 1))
    assert isinstance(back, Tensor)
    return back.flatten(0, 1)


RIVALS = {"ring attention": ring, "all-gather of K and V": all_gather, "all-to-all of heads": all_to_all}
