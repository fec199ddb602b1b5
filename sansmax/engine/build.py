"""A network for a configuration: any model of timm's registry, with errors that say what to change."""

import hashlib
import inspect
from typing import Any

import timm
import torch
from torch import nn

from sansmax.data.loading import Preprocess
from sansmax.engine.config import DataConfig, ModelConfig
from sansmax.errors import InputError, unknown_name
from sansmax.models.convert import convert


def build_model(model: ModelConfig, data: DataConfig, num_classes: int, in_chans: int) -> nn.Module:
    """The network, for pictures of `data.image_size`, with the attention of `model.convert` where that is given.

    Raises InputError for an unknown model (nearest names), an argument the model does not take, an image size that its
    patches do not divide, and a conversion that the network does not allow.
    """
    return converted(create_model(model, data, num_classes, in_chans), model)


def converted(network: nn.Module, model: ModelConfig) -> nn.Module:
    """The network with the attention of `model.convert`, as it is where there is none."""
    if model.convert is None:
        return network
    try:
        return convert(network, model.convert)
    except ValueError as error:
        raise InputError(f"model.convert={model.convert!r} on {model.name}: {error}") from None


def create_model(model: ModelConfig, data: DataConfig, num_classes: int, in_chans: int) -> nn.Module:
    """The network by its name alone, before any conversion."""
    name = model.name
    local = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not local and not timm.is_model(name.split(".")[0]):
        raise unknown_name("model", name, timm.list_models(), hint="(`sansmax models` lists all)")
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, **model.options}
    size = data.height_width
    try:
        try:
            network = timm.create_model(name, pretrained=model.pretrained, img_size=size, **arguments)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            # convolutional networks take any size and no argument for it
            network = timm.create_model(name, pretrained=model.pretrained, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise InputError(
            f"{name} cannot be built with {_shown(arguments)}, image size {size[0]} x {size[1]}: {error}"
        ) from error
    check_image_size(network, size)
    return network


def _shown(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in arguments.items())


def patch_size(network: nn.Module) -> tuple[int, int] | None:
    """Height and width of the patches that the network cuts its pictures into, None for other networks."""
    size = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def check_image_size(network: nn.Module, size: tuple[int, int]) -> None:
    """Raises InputError, naming the nearest sizes, unless whole patches fill the picture."""
    patch = patch_size(network)
    if patch is None or getattr(network, "dynamic_img_pad", False):
        return
    for side, p in zip(size, patch, strict=True):
        if side % p:
            near = [n for n in (side // p * p, (side // p + 1) * p) if n]
            raise InputError(
                f"the image size {size[0]} x {size[1]} is not divisible by the patch size {p}; "
                f"use --image-size {' or '.join(map(str, near))}, or another patch with --set model.options.patch_size"
            )


def build_preprocess(network: nn.Module, data: DataConfig, in_chans: int) -> Preprocess:
    """How pictures become the network's input: mean and standard deviation of the configuration, else of the model."""
    cfg: dict[str, Any] = getattr(network, "pretrained_cfg", {}) or {}

    def per_channel(given: tuple[float, ...] | None, key: str) -> tuple[float, ...]:
        values = tuple(given if given is not None else cfg.get(key, (0.5,)))
        if len(values) in (1, in_chans):
            return values
        if given is None:
            return (sum(values) / len(values),)
        raise InputError(
            f"data.{key} has {len(values)} values and the network {in_chans} channels; give 1 or {in_chans}"
        )

    return Preprocess(
        data.height_width,
        in_chans,
        per_channel(data.mean, "mean"),
        per_channel(data.std, "std"),
        resize_mode=data.resize_mode,
    )


def num_parameters(network: nn.Module) -> int:
    """Trainable numbers in the network."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def takes_mask(network: nn.Module) -> bool:
    """Whether the network has a weight per token, so that scores of tokens are a gradient."""
    return "mask" in inspect.signature(network.forward).parameters and hasattr(network, "read_out")


def weights_sha256(network: nn.Module) -> str:
    """One digest of the names, shapes and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
