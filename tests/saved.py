"""Small networks to be saved, and the folders they are loaded from."""

import json

import timm
import torch
from networks import perturbed

from sansmax.models import cvt, deit, soft, xcit  # noqa: F401  (registers the networks)

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "num_classes": 3}


def built(name, **arguments):
    """The network; with older timm, which does not record them, its arguments are written down here."""
    return recorded(timm.create_model(name, **arguments), arguments)


def recorded(model, arguments):
    if not hasattr(model, "_model_args"):
        model._model_args = arguments
    return model


def small(**changes):
    return perturbed(built("seqnorm_vit_tiny_patch16_224", **{**SMALL, **changes}))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def images(folder, b=2):
    return torch.randn(b, *config_of(folder)["pretrained_cfg"]["input_size"])


def reloaded(folder, **changes):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **changes).eval()
