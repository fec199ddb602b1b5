"""Small networks and pictures for the tests of models, streams and explanations."""

import timm
import torch

import sansmax  # noqa: F401  (registers the networks)

GRID = (3, 5)


def small(name, **changes):
    """The network with two narrow layers, for a grid of 3 x 5 patches, its parameters all moved off their start."""
    patch = timm.create_model(name, device="meta").patch_embed.patch_size[0]
    size = tuple(n * patch for n in GRID)
    reduced = {"img_size": size, "depth": 2, "embed_dim": 22, "num_heads": 2, "num_classes": 7, "dtype": torch.float64}
    model = timm.create_model(name, **{**reduced, **changes})
    return perturbed(model) if changes.get("device") != "meta" else model


def perturbed(model, by=0.2):
    with torch.no_grad():
        for p in model.parameters():
            p += by * torch.randn_like(p)
    return model.eval()


def images(model, b=2, grid=GRID):
    patch = model.patch_embed.patch_size[0]
    return torch.randn(b, model.in_chans, *(n * patch for n in grid), dtype=next(model.parameters()).dtype)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))
