"""From pixels of any size to the normalised tensor that a model reads, always the same way."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sansmax.data.images import check_pixels, to_tensor
from sansmax.errors import InputError, unknown_name

RESIZE_MODES = ("squash", "crop", "pad")


@dataclass(frozen=True)
class Preprocess:
    """Pixels (H, W) or (H, W, 3), uint8 or uint16, to a tensor (in_chans, *image_size).

    `resize_mode`: "squash" scales both sides to `image_size` whatever the aspect; "crop" scales until the picture
    covers `image_size` / `crop_pct` and keeps the centre; "pad" scales until it fits and fills the rest with the mean.
    `interpolation` is "bicubic" or "bilinear", antialiased. `mean` and `std` are in units of [0, 1], one per channel.

    A call is `normalise(scaled(resize(pixels)))`. `resize` gives pixels of the same dtype again, rounded: they
    can be kept instead of the file without changing a result.
    """

    image_size: tuple[int, int]
    in_chans: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    crop_pct: float = 1.0
    resize_mode: str = "squash"
    interpolation: str = "bicubic"

    def __post_init__(self):
        for name in ("image_size", "mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.in_chans):
                raise InputError(f"{name} has {len(getattr(self, name))} values for {self.in_chans} channels")
        if len(self.image_size) != 2 or min(self.image_size) < 1:
            raise InputError(f"image_size must be (height, width) of at least 1 px, {self.image_size} was given")
        if self.in_chans not in (1, 3):
            raise InputError(f"in_chans must be 1 or 3, {self.in_chans} was given")
        if self.resize_mode not in RESIZE_MODES:
            raise unknown_name("resize_mode", self.resize_mode, RESIZE_MODES)
        if self.interpolation not in ("bicubic", "bilinear"):
            raise unknown_name("interpolation", self.interpolation, ("bicubic", "bilinear"))
        if min(self.std) <= 0 or not 0 < self.crop_pct <= 1:
            raise InputError(f"std must be above 0 and crop_pct in (0, 1]; got {self.std} and {self.crop_pct}")

    def __call__(self, pixels: np.ndarray) -> Float[Tensor, "c h w"]:
        """The tensor that the model reads."""
        return self.normalise(self.scaled(self.resize(pixels)))

    def resize(self, pixels: np.ndarray) -> np.ndarray:
        """The pixels at `image_size`; with "pad" at the largest size that fits in it."""
        check_pixels(pixels)
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        have, want = pixels.shape[:2], self.image_size
        if self.resize_mode == "squash":
            return _resize(pixels, want, self.interpolation)
        ratios = [w / h for h, w in zip(have, want, strict=True)]
        if self.resize_mode == "pad":
            size = [max(1, min(w, round(h * min(ratios)))) for h, w in zip(have, want, strict=True)]
            return _resize(pixels, (size[0], size[1]), self.interpolation)
        scale = max(ratios) / self.crop_pct
        size = [max(w, round(h * scale)) for h, w in zip(have, want, strict=True)]
        pixels = _resize(pixels, (size[0], size[1]), self.interpolation)
        top, left = (size[0] - want[0]) // 2, (size[1] - want[1]) // 2
        return np.ascontiguousarray(pixels[top : top + want[0], left : left + want[1]])

    def scaled(self, resized: np.ndarray) -> Float[Tensor, "c h w"]:
        """Resized pixels as a tensor in [0, 1] of `image_size`, padded where the mode asks for it."""
        image = to_tensor(resized, self.in_chans)
        spare_y, spare_x = (want - have for want, have in zip(self.image_size, image.shape[1:], strict=True))
        if spare_y <= 0 and spare_x <= 0:
            return image
        around = (spare_x // 2, spare_x - spare_x // 2, spare_y // 2, spare_y - spare_y // 2)
        mean = self._per_channel(self.mean)
        return F.pad(image - mean, around).add_(mean)

    def normalise(self, image: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
        """(image - mean) / std."""
        return (image - self._per_channel(self.mean)) / self._per_channel(self.std)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain lists, numbers and strings."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Preprocess":
        """The settings that `to_dict` gave."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise unknown_name("setting of Preprocess", name, known)
        return cls(**settings)

    @staticmethod
    def _per_channel(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values)[:, None, None]


def _resize(pixels: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    if pixels.shape[:2] == size:
        return pixels
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    # torch has no resampling of uint16
    planes = planes.astype(np.float32) if pixels.dtype == np.uint16 else np.ascontiguousarray(planes)
    # a copy where memory must not be written, which torch refuses to share
    x = torch.from_numpy(planes if planes.flags.writeable else planes.copy()).permute(2, 0, 1)[None]
    x = F.interpolate(x, size, mode=interpolation, align_corners=False, antialias=True)
    out = x[0].permute(1, 2, 0).numpy()
    if pixels.dtype == np.uint16:
        out = np.rint(out.clip(0, 65535)).astype(np.uint16)
    return np.ascontiguousarray(out[..., 0] if pixels.ndim == 2 else out)
