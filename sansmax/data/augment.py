"""Random changes to training images, on tensors in [0, 1] before they are normalised."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sansmax.errors import InputError, unknown_name

_TUPLES = ("scale", "crop_scale", "crop_ratio")


@dataclass(frozen=True)
class Augment:
    """What may happen to a training image; the defaults do nothing. Random numbers come from the torch generator.

    hflip, vflip            probability of a flip
    crop_scale, crop_ratio  range of area and aspect of a random part that is resized to the image size (None: whole)
    rotate                  largest angle in degrees
    translate               largest shift, as a part of the size
    scale                   range of the zoom
    auto                    a policy of timm, such as "rand-m9-mstd0.5-inc1", "augmix-m3-w3", or "trivial" for
                            TrivialAugment; works on 8 bit colours, draws from Python's and numpy's generators too
    brightness, contrast, color   largest relative change; color is saturation
    blur                    largest standard deviation in pixels of a Gaussian blur, drawn anew for each image
    noise                   largest standard deviation of added Gaussian noise, drawn anew for each image
    erase                   probability that a rectangle becomes `fill` (mid-grey with "edge")
    fill                    grey value, in [0, 1], of what comes into view from outside and of erased parts; or "edge":
                            the border of the picture goes on

    They are applied in this order, crop first, then flips.
    """

    hflip: float = 0.0
    vflip: float = 0.0
    rotate: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    crop_scale: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    brightness: float = 0.0
    contrast: float = 0.0
    color: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    erase: float = 0.0
    fill: float | str = 0.0
    auto: str | None = None

    def __post_init__(self):
        for name in _TUPLES:
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
                if len(value) != 2 or not 0 < value[0] <= value[1]:
                    raise InputError(f"{name} must be two numbers above 0, the smaller first; {value} was given")
        if isinstance(self.fill, str) and self.fill != "edge":
            raise InputError(f'fill must be "edge" or a grey value in 0 ... 1, {self.fill!r} was given')
        shares = ["hflip", "vflip", "translate", "erase"] + ([] if self.fill == "edge" else ["fill"])
        for name in shares:
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be in 0 ... 1, {getattr(self, name)} was given")
        for name in ("rotate", "brightness", "contrast", "color", "blur", "noise"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, {getattr(self, name)} was given")
        if self.auto:
            _policy(self.auto)

    @property
    def is_none(self) -> bool:
        """Whether nothing is changed."""
        return self == Augment(crop_ratio=self.crop_ratio, fill=self.fill)

    def __call__(self, image: Float[Tensor, "c a b"], size: tuple[int, int] | None = None) -> Float[Tensor, "c h w"]:
        """The changed image, still in [0, 1]; a random part is resized to `size`, by default that of the image."""
        from torchvision.transforms import v2

        if self.crop_scale is not None:
            crop = v2.RandomResizedCrop(
                size or image.shape[-2:], self.crop_scale, self.crop_ratio, v2.InterpolationMode.BICUBIC
            )
            # bicubic weights can leave the range
            image = crop(image).clamp_(0, 1)
        for step in self._steps:
            image = step(image)
        return image

    @cached_property
    def _steps(self) -> list[Any]:
        from torchvision.transforms import v2

        steps: list[Any] = []
        if self.hflip:
            steps.append(v2.RandomHorizontalFlip(self.hflip))
        if self.vflip:
            steps.append(v2.RandomVerticalFlip(self.vflip))
        if self.rotate or self.translate or self.scale != (1.0, 1.0):
            shift = (self.translate, self.translate) if self.translate else None
            zoom = self.scale if self.scale != (1.0, 1.0) else None
            bilinear = v2.InterpolationMode.BILINEAR
            grey = 0.0 if isinstance(self.fill, str) else self.fill
            affine = v2.RandomAffine([-self.rotate, self.rotate], shift, zoom, interpolation=bilinear, fill=grey)
            steps.append(_WithBorder(affine, self._border()) if self.fill == "edge" else affine)
        if self.auto:
            steps.append(_OnPictures(_policy(self.auto)))
        if self.brightness or self.contrast or self.color:
            steps.append(v2.ColorJitter(self.brightness, self.contrast, self.color))
        if self.blur:
            # torchvision wants a smallest width above 0: this one changes nothing
            size = 2 * max(1, round(3 * self.blur)) + 1
            steps.append(v2.GaussianBlur(size, (min(1e-3, self.blur), self.blur)))
        if self.noise:
            steps.append(_Noise(self.noise))
        if self.erase:
            steps.append(v2.RandomErasing(self.erase, value=0.5 if isinstance(self.fill, str) else self.fill))
        return steps

    def _border(self) -> float:
        """How far the outside can come into view, as a part of the larger side."""
        turn = math.radians(min(self.rotate, 45.0))
        reach = (math.cos(turn) + math.sin(turn)) / 2 + self.translate
        return reach / self.scale[0] - 0.5

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain lists, numbers and strings."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Augment":
        """The settings that `to_dict` gave."""
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise unknown_name("setting of Augment", name, known)
        return cls(**settings)


class _WithBorder:
    """A change of place whose outside is the border of the picture gone on, not a colour.

    `part` says by how much of its larger side the picture is padded first.
    """

    def __init__(self, change: Any, part: float):
        self.change, self.part = change, part

    def __call__(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional as F

        height, width = image.shape[-2:]
        border = math.ceil(max(height, width) * self.part) + 1
        wide = F.pad(image, [border], padding_mode="edge")
        # the numbers are drawn for the picture itself: a shift is a part of its own size
        return F.center_crop(self.change.transform(wide, self.change.make_params([image])), [height, width])


class _Noise:
    """Gaussian noise of a standard deviation drawn evenly between 0 and `largest`."""

    def __init__(self, largest: float):
        self.largest = largest

    def __call__(self, image: Tensor) -> Tensor:
        return (image + torch.randn_like(image) * (self.largest * torch.rand(()))).clamp_(0, 1)


class _OnPictures:
    """A policy for PIL pictures, applied to a tensor in [0, 1]; grey goes through it as colour."""

    def __init__(self, policy: Any):
        self.policy = policy

    def __call__(self, image: Tensor) -> Tensor:
        from torchvision.transforms.v2 import functional as F

        colour = image.expand(3, -1, -1)
        picture = F.to_pil_image((colour * 255).round().to(torch.uint8))
        out = F.pil_to_tensor(self.policy(picture)).float() / 255
        return out if image.shape[0] == 3 else F.rgb_to_grayscale(out, 1)


def _policy(name: str) -> Any:
    if name == "trivial":
        from torchvision.transforms import v2

        return v2.TrivialAugmentWide()
    from timm.data import auto_augment as policies

    allowed = ("trivial", "rand", "augmix", "original", "originalr", "v0", "v0r", "3a")
    if name.split("-")[0] not in allowed:
        raise unknown_name("augmentation policy", name.split("-")[0], allowed)
    makers = {"rand": policies.rand_augment_transform, "augmix": policies.augment_and_mix_transform}
    make = makers.get(name.split("-")[0], policies.auto_augment_transform)
    try:
        return make(name, {"translate_const": 32, "img_mean": (124, 116, 104)})
    except (AssertionError, ValueError, KeyError) as e:
        raise InputError(
            f"timm cannot make the augmentation policy {name!r} ({e}); an example is rand-m9-mstd0.5-inc1"
        ) from None
