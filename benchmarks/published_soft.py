"""The formulas of SOFT written out in plain eager PyTorch, on the weights of this package's networks.

What the speed of `sansmax.models.soft` is compared with: the same parameters, the operations in the order and the
layout of the published code (https://github.com/fudan-zvg/SOFT): heads apart, landmarks by a convolution over heads as
a batch, squares by products with ones, Newton's steps, P made whole, values convolved channel by channel.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sansmax.models.soft import Soft, SoftBlock


def forward(model: Soft, x: Tensor) -> Tensor:
    """Logits of images, as `model(x)` in evaluation."""
    stage: Any
    for i, stage in enumerate(model.stages):
        x = stage.patch_embed(x)
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        if stage.cls_token is not None:
            x = torch.cat((stage.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + stage.positions(grid)
        for block in stage.blocks:
            x = _block(block, x, grid) if i < 3 else _last_block(block, x)
        if i < 3:
            x = x.transpose(1, 2).reshape(x.shape[0], -1, *grid).contiguous()
    return model.head(model.norm(x)[:, 0])


def _block(block: SoftBlock, x: Tensor, grid: torch.Size) -> Tensor:
    x = block.norm1(x + _attention(block.attn, x, grid))
    return block.norm2(x + _mlp(block.mlp, x, "tanh"))


def _mlp(mlp, x: Tensor, approximate: str = "none") -> Tensor:
    # not the layers themselves: ours hold the activation, and compute in their own way
    x = F.gelu(F.linear(x, mlp.fc1.weight, mlp.fc1.bias), approximate=approximate)
    return F.linear(x, mlp.fc2.weight, mlp.fc2.bias)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    squares_a = (a**2) @ torch.ones_like(b).transpose(-1, -2)
    squares_b = torch.ones_like(a) @ (b**2).transpose(-1, -2)
    return torch.exp(-0.5 * (squares_a + squares_b - 2 * (a @ b.transpose(-1, -2))))


def _newton(a: Tensor) -> Tensor:
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    a_row = a.sum(-1).amax(-1, keepdim=True).unsqueeze(-1)
    a = a + 0.01 * eye
    z = 1.8 / a_row**2 * a
    for _ in range(20):
        z = 2 * z - z @ a @ z
    return z


def _newton_halved(a: Tensor) -> Tensor:
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    alpha = 2 / a.sum(-1).amax((-2, -1), keepdim=True).unsqueeze(-1) ** 2
    for _ in range(10):
        norm = (eye - alpha * a @ a).abs().sum(-2).amax((-2, -1))
        if not bool((norm > 1.01).any()):
            break
        alpha = torch.where(norm[:, None, None, None] > 1.01, alpha / 2, alpha)
    z = alpha * a
    for _ in range(20):
        z = 2 * z - z @ a @ z
    return z


def _attention(attn, x: Tensor, grid: torch.Size) -> Tensor:
    b, n, c = x.shape
    h, d = attn.num_heads, c // attn.num_heads
    q = attn.q(x).view(b, n, h, d).transpose(1, 2) / d**0.25
    v = attn.v(x).view(b, n, h, d).transpose(1, 2)
    landmarks = attn.landmark_conv(q.reshape(b * h, *grid, d).permute(0, 3, 1, 2))
    landmarks = landmarks.reshape(b, h, d, -1).transpose(-1, -2)
    landmarks = F.gelu(attn.landmark_norm(landmarks))
    p, a = _kernel(q, landmarks), _kernel(landmarks, landmarks)
    if attn.options["normalized"]:
        scale = a.sum(-1) ** -0.5
        z = scale.unsqueeze(-1) * _newton_halved(a) * scale.unsqueeze(-2)
    else:
        z = _newton(a)
    out = (p @ z) @ (p.transpose(-1, -2) @ v)
    images = v.reshape(b, h, *grid, d).permute(0, 4, 1, 2, 3).reshape(b * d, h, *grid)
    values = F.conv2d(images, attn.value_conv.weight, padding=attn.value_conv.padding, groups=h)
    out = out + values.reshape(b, d, h, n).permute(0, 2, 3, 1)
    return attn.proj(out.transpose(1, 2).reshape(b, n, c))


def _last_block(block, x: Tensor) -> Tensor:
    b, n, c = x.shape
    h = block.attn.num_heads
    q, k, v = block.attn.qkv(block.norm1(x)).reshape(b, n, 3, h, c // h).permute(2, 0, 3, 1, 4).unbind(0)
    attention = (q @ k.transpose(-2, -1) * (c // h) ** -0.5).softmax(dim=-1)
    x = x + block.attn.proj((attention @ v).transpose(1, 2).reshape(b, n, c))
    return x + _mlp(block.mlp, block.norm2(x))
