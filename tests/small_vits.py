"""Small ViTs for the tests of loading weights, and what a refusal must leave as it was."""

from collections import OrderedDict

import pytest
import timm
import torch
from networks import perturbed

from sansmax.models.weights import load_checkpoint

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "num_classes": 5}


def vit(**changes):
    return perturbed(timm.create_model("seqnorm_vit_tiny_patch16_224", **{**SMALL, **changes}))


def timm_vit(name="vit_tiny_patch16_224", **changes):
    return perturbed(timm.create_model(name, **{**SMALL, **changes}))


def copied(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(model, source, **options):
    """The message, with the model as it was."""
    before = copied(model)
    with pytest.raises(ValueError) as caught:
        load_checkpoint(model, source, **options)
    assert same(model.state_dict(), before)
    return str(caught.value)


def prefixed(state, *prefixes):
    return OrderedDict(("".join(prefixes) + name, x) for name, x in state.items())
