"""The formulas of SimA on XCiT written out in plain eager PyTorch, on the weights of this package's networks.

What the speed of `sansmax.models.xcit` is compared with: the same parameters, the operations in the order and the
layout of the published code (https://github.com/UCDvision/sima): queries and keys normalised before the products, all
queries of the class attention, maps turned to channels first and back around the local convolutions, batch norm by
itself.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sansmax.models.class_attention import ClassAttentionBlock
from sansmax.models.xcit import SimAXCiT
from sansmax.models.xcit_layers import FourierPositions, LocalPatchInteraction, XCiTBlock


def forward(model: SimAXCiT, x: Tensor) -> Tensor:
    """Logits of images, as `model(x)` in evaluation with a head on the class token."""
    for layer in model.patch_embed.proj:
        x = layer(x)
    b, c, gh, gw = x.shape
    x = x.flatten(2).transpose(1, 2)
    if model.pos_embed is not None:
        x = x + _positions(model.pos_embed, b, gh, gw).reshape(b, c, -1).permute(0, 2, 1)
    block: Any
    for block in model.blocks:
        x = _block(block, x, gh, gw)
    assert model.cls_token is not None
    x = torch.cat((model.cls_token.expand(b, -1, -1), x), dim=1)
    for block in model.cls_attn_blocks:
        x = _class_block(block, x)
    return model.head(model.norm(x)[:, 0])


def _positions(layer: FourierPositions, b: int, gh: int, gw: int) -> Tensor:
    real = torch.ones(b, gh, gw, dtype=torch.bool, device=layer.token_projection.weight.device)
    pair = torch.arange(32, dtype=torch.float32, device=real.device) // 2
    waves = []
    for axis in (1, 2):
        at = real.cumsum(axis, dtype=torch.float32)
        last = at[:, -1:, :] if axis == 1 else at[:, :, -1:]
        angle = (at / (last + 1e-6) * (2 * math.pi)).unsqueeze(-1) / 10000 ** (2 * pair / 32)
        waves.append(torch.stack((angle[..., 0::2].sin(), angle[..., 1::2].cos()), dim=4).flatten(3))
    table = torch.cat(waves, dim=3).permute(0, 3, 1, 2)
    return layer.token_projection(table.to(layer.token_projection.weight.dtype))


def _heads(layer: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    b, n, c = x.shape
    qkv = F.linear(x, layer.qkv.weight, layer.qkv.bias).reshape(b, n, 3, layer.num_heads, c // layer.num_heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.normalize(q, p=1.0, dim=-2, eps=eps), F.normalize(k, p=1.0, dim=-2, eps=eps), v


def _projected(layer: Any, x: Tensor) -> Tensor:
    return F.linear(x, layer.proj.weight, layer.proj.bias)


def _block(block: XCiTBlock, x: Tensor, gh: int, gw: int) -> Tensor:
    b, n, c = x.shape
    q, k, v = _heads(block.attn, block.norm1(x), eps=1e-12)
    few = n < q.shape[-1]
    out = (q @ k.transpose(-2, -1)) @ v if few else q @ (k.transpose(-2, -1) @ v)
    x = x + block.gamma1 * _projected(block.attn, out.transpose(1, 2).reshape(b, n, c))
    x = x + block.gamma3 * _local(block.local_mp, block.norm3(x), gh, gw)
    return x + block.gamma2 * _mlp(block.mlp, block.norm2(x))


def _local(layer: LocalPatchInteraction, x: Tensor, gh: int, gw: int) -> Tensor:
    b, n, c = x.shape
    x = x.permute(0, 2, 1).reshape(b, c, gh, gw)
    x = layer.conv2(layer.bn(layer.act(layer.conv1(x))))
    return x.reshape(b, c, n).permute(0, 2, 1)


def _mlp(layer: Any, x: Tensor) -> Tensor:
    x = F.gelu(F.linear(x, layer.fc1.weight, layer.fc1.bias))
    return F.linear(x, layer.fc2.weight, layer.fc2.bias)


def _class_block(block: ClassAttentionBlock, x: Tensor) -> Tensor:
    b, _, c = x.shape
    y = block.norm1(x)
    q, k, v = _heads(block.attn, y, eps=1e-6)
    scores = (q[:, :, :1] * k).sum(dim=-1)
    cls = _projected(block.attn, (scores.unsqueeze(2) @ v).transpose(1, 2).reshape(b, 1, c))
    x = x + block.gamma1 * torch.cat((cls, y[:, 1:]), dim=1)
    x = block.norm2(x) if block.tokens_norm else torch.cat((block.norm2(x[:, :1]), x[:, 1:]), dim=1)
    return x + torch.cat((block.gamma2 * _mlp(block.mlp, x[:, :1]), x[:, 1:]), dim=1)
