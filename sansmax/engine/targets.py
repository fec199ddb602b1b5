"""Single operations and layers made ready to run, each beside its formula written out."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sansmax.engine.cases import IN_CHUNKS, LANDMARKS, NORMALISED_FIRST, Case
from sansmax.engine.chunked import run_chunked
from sansmax.engine.contestants import Step, build_block, dtype_of, network_step, passes, random_tokens, step_of
from sansmax.models.attention import SeqNormAttention
from sansmax.models.attention_soft import SoftAttention
from sansmax.ops import sima_attention
from sansmax.ops.moments import Weight

NEWTON_STEPS = 20


def operation_step(case: Case, name: str) -> Step:
    """One pass of SimA on the heads of the case, or of a SeqNorm or SOFT layer on its tokens, or of their formulas."""
    if case.kind == "sima":
        return passes(SIMA[name], _qkv(case), [], case.backward)
    torch.manual_seed(0)
    if case.kind == "seqnorm" and name != NORMALISED_FIRST:
        return network_step(replace(case, kind="layer"), name)
    if case.kind == "seqnorm":
        return step_of(SeqNormWrittenOut(case.dim, case.heads), case)
    build = SoftWrittenOut if name == "formula written out" else SoftAttention
    return step_of(build(case.dim, case.heads, num_landmarks=LANDMARKS, inverse="newton"), case)


def chunked_step(case: Case, name: str) -> Step:
    """One pass of an encoder: `NAME in chunks`, or at once, or its products alone."""
    mechanism = name.removesuffix(IN_CHUNKS)
    if mechanism == name:
        return network_step(case, name)
    torch.manual_seed(0)
    blocks = nn.ModuleList(build_block(mechanism, case.dim, case.heads) for _ in range(case.depth))
    blocks = blocks.to(case.device, dtype_of(case)).eval()
    return passes(lambda x: run_chunked(blocks, x), [random_tokens(case)], list(blocks.parameters()), case.backward)


def sima_written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SimA (arXiv 2206.08898) as its formula stands: q and k by their l1 norms over the tokens, then q (k^T v)."""
    return F.normalize(q, p=1.0, dim=-2) @ (F.normalize(k, p=1.0, dim=-2).mT @ v)


def sima_by_sums(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-12) -> Tensor:
    """The same with the norms taken by `abs` and `sum`, which PyTorch is quicker at where heads are strided."""
    q = q / q.abs().sum(-2, keepdim=True).clamp_min(eps)
    k = k / k.abs().sum(-2, keepdim=True).clamp_min(eps)
    return q @ (k.mT @ v)


class SeqNormWrittenOut(SeqNormAttention):
    """The SeqNorm layer as its formula stands: Q, K and V normalised over the tokens, then Q^ (K^^T V^) / n."""

    def forward(self, x: Tensor, mask: Weight = None) -> Tensor:
        """For tokens without padding."""
        b, n, c = x.shape
        normalised = []
        for name, t in zip("qkv", self.qkv(x).chunk(3, dim=-1), strict=True):
            variance, mean = torch.var_mean(t, dim=1, correction=0, keepdim=True)
            t = (t - mean) / (variance + self.eps).sqrt()
            t = t * self.get_parameter(f"gamma_{name}") + self.get_parameter(f"beta_{name}")
            normalised.append(t.view(b, n, self.num_heads, -1).transpose(1, 2))
        q, k, v = normalised
        return self.proj((q @ (k.mT @ v / n)).transpose(1, 2).reshape(b, n, c))


SIMA = {
    "sima_attention": sima_attention,
    "normalise, then multiply": sima_written_out,
    "the same by abs and sum": sima_by_sums,
}


class SoftWrittenOut(SoftAttention):
    """The SOFT layer as its formula stands, with the projections of the other."""

    def forward(self, x: Tensor, mask: Weight = None, grid: tuple[int, int] | None = None) -> Tensor:
        """For tokens without padding, their number a multiple of the landmarks or the rest left out of these."""
        b, n, c = x.shape
        q, v = (t.view(b, n, self.num_heads, -1).transpose(1, 2) for t in (self.q(x), self.v(x)))
        stretch = n // self.num_landmarks
        landmarks = q[:, :, : stretch * self.num_landmarks].unflatten(2, (self.num_landmarks, stretch)).mean(3)
        return self.proj(soft_written_out(q, v, landmarks).transpose(1, 2).reshape(b, n, c))


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
    """Heads as one projection gives them to a layer: side by side in memory, token by token."""
    generator = torch.Generator().manual_seed(1)
    shape = (case.batch, case.tokens, 3, case.heads, case.dim // case.heads)
    qkv = torch.randn(shape, generator=generator).to(case.device, dtype_of(case))
    return list(qkv.permute(2, 0, 3, 1, 4).unbind(0))
