"""Encoders of tiles: any network of timm's registry or the hub, what it expects of a tile, and what it makes of one.

A tile is resized whole to the encoder's input by timm's own evaluation transform, mean and standard deviation are the
encoder's. On a processor every tile goes through the network by itself: no sum then depends on which tiles are its
neighbours, so the features are the same, bit for bit, for every size of batch. It costs no time there.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from sansmax.engine.build import weights_sha256
from sansmax.errors import InputError, unknown_name

LOCAL, HUB = "local-dir:", "hf-hub:"
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class EncoderSpec:
    """Everything that says which encoder it is and how it runs.

    `name` is a name of timm's registry ("resnet50.a1_in1k"), "hf-hub:OWNER/NAME" or "local-dir:FOLDER". Without
    `pretrained` the weights are drawn by `seed`. `crop_pct` is timm's: 1 shows the encoder the whole tile.
    """

    name: str
    pretrained: bool = True
    seed: int = 0
    precision: str = "fp32"
    crop_pct: float = 1.0
    device: str = "auto"
    offline: bool = False


class ToInput:
    """One tile as the encoder's input before normalisation; goes to the processes that read."""

    def __init__(self, resize: Callable[[Image.Image], Tensor]) -> None:
        self.resize = resize

    def __call__(self, tile: np.ndarray) -> UInt8[Tensor, "3 h w"]:
        """The tile, (height, width, 3) of uint8, at the encoder's size."""
        return self.resize(Image.fromarray(tile))


@dataclass(frozen=True)
class Encoder:
    """A network without its classifier, ready to turn tiles into features.

    `sha256` is that of all its weights, `revision` the commit of the hub where that is known, `transform` what is
    done to a tile, as text.
    """

    spec: EncoderSpec
    network: nn.Module
    to_input: ToInput
    mean: Float32[Tensor, "3 1 1"]
    std: Float32[Tensor, "3 1 1"]
    width: int
    sha256: str
    revision: str
    transform: str

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.mean.device

    def encode(self, tiles: UInt8[Tensor, "b 3 h w"], pad_to: int = 0) -> Float32[np.ndarray, "b d"]:
        """The features of tiles that `to_input` made, a row per tile.

        A batch of fewer than `pad_to` tiles is filled up where batches are computed together (not on a processor):
        the last batch of a slide is then computed as every other.
        """
        if self.device.type == "cpu":
            return np.concatenate([self._forward(tile[None]) for tile in tiles])
        count = len(tiles)
        if count < pad_to:
            tiles = torch.cat([tiles, tiles.new_zeros(pad_to - count, *tiles.shape[1:])])
        return self._forward(tiles)[:count]

    def _forward(self, tiles: UInt8[Tensor, "b 3 h w"]) -> Float32[np.ndarray, "b d"]:
        images = (tiles.to(self.device).float() / 255 - self.mean) / self.std
        half = self.spec.precision == "bf16"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            features = self.network(images)
        if not isinstance(features, Tensor) or features.ndim != 2:
            shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise InputError(f"{self.spec.name} gives {shape} for a tile and no vector; take an encoder that pools")
        return features.float().cpu().numpy()


def load_encoder(spec: EncoderSpec, say: Callable[[str], None] = lambda text: None) -> Encoder:
    """The encoder in evaluation mode on its device; `say` is told before anything is fetched.

    Raises InputError for an unknown name (nearest ones), weights that are not here and cannot be had (the way out is
    named), and a device that is not there.
    """
    if spec.precision not in PRECISIONS:
        raise unknown_name("precision", spec.precision, PRECISIONS)
    if not 0 < spec.crop_pct <= 1:
        raise InputError(f"--crop-pct is a share of the tile's side in (0, 1], got {spec.crop_pct}")
    _check_name(spec)
    device = resolve_device(spec.device)
    network = _network(spec, say).eval().requires_grad_(False)
    config = resolve_model_data_config(network)
    if config["input_size"][0] != 3:
        raise InputError(f"{spec.name} reads {config['input_size'][0]} channels; tiles have three")
    to_input, transform = _transform(config, spec.crop_pct)
    mean, std = (torch.tensor(config[k], dtype=torch.float32).view(-1, 1, 1).to(device) for k in ("mean", "std"))
    digest = weights_sha256(network)
    network = network.to(device)
    made = Encoder(spec, network, to_input, mean, std, 0, digest, _revision(network, spec), transform)
    width = made.encode(torch.zeros(1, *config["input_size"], dtype=torch.uint8)).shape[1]
    return replace(made, width=width)


def resolve_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device is auto, cpu, cuda, cuda:NUMBER or mps, got {name!r}") from None
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(device.type, False):
        raise InputError(f"--device {name}: there is none here; leave it at auto, or give --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: there are {torch.cuda.device_count()} here, counted from 0")
    return device


def _check_name(spec: EncoderSpec) -> None:
    name = spec.name
    if name.startswith((HUB, "hf_hub:")):
        return
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{name}: {folder} is no folder with a config.json and weights, as timm's save_for_hf and this "
                "package's save_pretrained write it"
            )
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = f"(an encoder of the hub is {HUB}OWNER/NAME, one in a folder {LOCAL}FOLDER)"
        raise unknown_name("encoder", name, timm.list_models(), hint=hint)
    known = [n.partition(".") for n in timm.list_pretrained(f"{architecture}*")]
    tags = [n[2] for n in known if n[0] == architecture]
    if tag and tag not in tags:
        raise unknown_name(f"weights of {architecture}", tag, tags)
    if spec.pretrained and not tags:
        raise InputError(
            f"timm knows no pretrained weights of {name}; give a folder that has them as --encoder {LOCAL}FOLDER, "
            "or --no-pretrained for weights drawn at random"
        )


def _network(spec: EncoderSpec, say: Callable[[str], None]) -> nn.Module:
    if spec.pretrained and not spec.offline and not spec.name.startswith(LOCAL):
        try:
            # weights that are here are used as they are: the hub is not asked whether there are newer ones
            return _network(replace(spec, offline=True), say)
        except InputError:
            say(f"fetching {spec.name}, which is not on this machine")
    with torch.random.fork_rng(devices=[]), _offline(spec.offline):
        torch.default_generator.manual_seed(spec.seed)
        try:
            if spec.offline and spec.pretrained:
                _check_cached(spec.name)
            return timm.create_model(spec.name, pretrained=spec.pretrained, num_classes=0)
        except Exception as error:
            # timm, the hub and the network each raise their own types
            raise InputError(_why_not(spec, error)) from error


def _why_not(spec: EncoderSpec, error: Exception) -> str:
    reason = (
        f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason given'}"
    )
    if not spec.pretrained or spec.name.startswith(LOCAL):
        return f"the encoder {spec.name} cannot be built ({reason})"
    tried = "--offline forbids to fetch them" if spec.offline else "and they could not be fetched"
    return (
        f"the encoder {spec.name} has no pretrained weights here, {tried} ({reason}). Fetch them once on a machine "
        f"with a network and copy its cache; or give the folder of the encoder as --encoder {LOCAL}FOLDER; or "
        "--no-pretrained for weights drawn at random. A gated encoder needs `hf auth login` first"
    )


def _check_cached(name: str) -> None:
    """Raises OSError where weights that lie under an address, and not on the hub, are not in torch's cache."""
    if name.startswith((HUB, "hf_hub:", LOCAL)):
        return
    config = timm.get_pretrained_cfg(name)
    if config is not None and isinstance(config.url, str) and not (config.hf_hub_id or config.file):
        path = Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2]
        if not path.exists():
            raise FileNotFoundError(f"no {path}")


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Keeps the hub's client from the network while the block runs."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _transform(config: dict[str, Any], crop_pct: float) -> tuple[ToInput, str]:
    whole = {**config, "crop_pct": crop_pct}
    if crop_pct == 1:
        # the same for a square input, and the whole tile for any other
        whole["crop_mode"] = "squash"
    resize: Any = create_transform(**whole, is_training=False, normalize=False)
    return ToInput(resize), json.dumps(whole, sort_keys=True)


def _revision(network: nn.Module, spec: EncoderSpec) -> str:
    """The commit of the hub that the weights came from; empty where they came from elsewhere."""
    from huggingface_hub import try_to_load_from_cache

    if not spec.pretrained:
        return f"random weights, seed {spec.seed}"
    config: dict[str, Any] = getattr(network, "pretrained_cfg", {}) or {}
    repository, _, wanted = (config.get("hf_hub_id") or "").partition("@")
    if not repository or spec.name.startswith(LOCAL):
        return ""
    for name in (
        "model.safetensors",
        config.get("hf_hub_filename"),
        "pytorch_model.bin",
        "open_clip_model.safetensors",
    ):
        found = try_to_load_from_cache(repository, name, revision=wanted or None) if name else None
        if isinstance(found, str):
            # .../snapshots/COMMIT/model.safetensors
            return Path(found).parent.name
    return ""
