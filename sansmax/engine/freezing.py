"""Parts of a network that stay as they are while the rest is trained."""

import fnmatch
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sansmax.engine.optimisers import classifier_parameters
from sansmax.errors import InputError, listed, nearest

BACKBONE = "backbone"


def freeze(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freezes the parameters that a pattern names, and gives their names.

    A pattern is the name of a parameter or of a layer, `*` standing for anything, or "backbone": all parameters but
    the classifier's. What is frozen has no gradient, no state in the optimiser and no weight decay.

    Raises InputError for a pattern that names nothing, and where nothing is left to train.
    """
    names = [name for name, _ in network.named_parameters()]
    frozen: set[str] = set()
    for pattern in patterns:
        chosen = _named(network, names, pattern)
        if not chosen:
            tops = sorted({part for name in names for part in (name, *_layers_of(name))})
            like = nearest(pattern, tops) or sorted({name.split(".")[0] for name in names})
            raise InputError(f"model.freeze: {pattern!r} names no parameter or layer; there are {listed(like, 8)}")
        frozen.update(chosen)
    if frozen and len(frozen) == len(names):
        raise InputError(f"model.freeze={list(patterns)} freezes all of the network; nothing is left to train")
    for name, p in network.named_parameters():
        if name in frozen:
            p.requires_grad_(False)
    return [name for name in names if name in frozen]


def _named(network: nn.Module, names: list[str], pattern: str) -> list[str]:
    if pattern == BACKBONE:
        heads = set(classifier_parameters(network))
        if not heads:
            raise InputError(f"{type(network).__name__} has no classifier of its own; name the layers to freeze")
        return [name for name in names if name not in heads]
    return [n for n in names if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"{pattern}.*")]


def _layers_of(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:k]) for k in range(1, len(parts))]


def keep_statistics(network: nn.Module) -> None:
    """Takes the batch norms of frozen parts out of training: their means and variances stay, too.

    A batch norm without parameters of its own is frozen with the layer that holds it.
    """
    if all(p.requires_grad for p in network.parameters()):
        return
    for module in network.modules():
        if not _frozen(module):
            continue
        for inner in module.modules():
            if isinstance(inner, _BatchNorm):
                inner.eval()


def _frozen(module: Any) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)
