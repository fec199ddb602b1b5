"""Patch embedding by overlapping convolutions: https://arxiv.org/abs/2106.14881.

A plain patch embedding sees each patch alone; a stack of 3 x 3 convolutions of stride 2 to the same token grid trains
faster and better on small sets of small images. It needs pixels of the neighbours, so it does not run in bands of rows.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn


class ConvStem(PatchEmbed):
    """`log2(patch_size)` convolutions of stride 2, with batch norm and GELU between them, in timm's patch embedding.

    The widths double up to `embed_dim`. Raises ValueError unless `patch_size` is a power of two.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        bias: bool = True,
        strict_img_size: bool = True,
        output_fmt: str | None = None,
        dynamic_img_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # only what was asked for: timm's patch embedding before 1.0.21 takes neither
        factory: dict[str, Any] = {k: v for k, v in (("device", device), ("dtype", dtype)) if v is not None}
        super().__init__(
            img_size if isinstance(img_size, int) else (img_size[0], img_size[1]),
            patch_size,
            in_chans,
            embed_dim,
            strict_img_size=strict_img_size,
            output_fmt=output_fmt,
            dynamic_img_pad=dynamic_img_pad,
            **factory,
        )
        side = patch_size if isinstance(patch_size, int) else 0
        if side < 2 or side & (side - 1):
            raise ValueError(f"a convolutional stem needs a patch size of 2, 4, 8, 16 or 32, got {patch_size}")
        steps = side.bit_length() - 1
        layers: list[nn.Module] = []
        for step in range(steps):
            last = step == steps - 1
            width = embed_dim // 2 ** (steps - 1 - step)
            conv = nn.Conv2d(in_chans, width, 3, stride=2, padding=1, bias=bias and last, device=device, dtype=dtype)
            layers += [conv] if last else [conv, nn.BatchNorm2d(width, device=device, dtype=dtype), nn.GELU()]
            in_chans = width
        self.proj = nn.Sequential(*layers)  # pyright: ignore[reportAttributeAccessIssue] - one of timm's convolutions

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Another image size; the patch size is fixed by the number of convolutions."""
        if patch_size is not None and patch_size not in (self.patch_size, self.patch_size[0]):
            raise ValueError(f"the patch size of a convolutional stem is fixed: {self.patch_size[0]}, got {patch_size}")
        super().set_input_size(img_size)

    def forward(self, x: Float[Tensor, "b in_chans h w"]) -> Tensor:
        """The token grid, in the format that timm asks for."""
        return super().forward(x)
