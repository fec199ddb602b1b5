"""Attention layers of other packages, for comparison: `pip install 'sansmax[bench]'`."""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

from torch import Tensor, nn

from sansmax.errors import InputError

INSTALL = "pip install 'sansmax[bench]', or in a clone: pip install '.[bench]'"
LANDMARKS = 256


class Peer(NamedTuple):
    """A layer, the module it is in, and the package that has it."""

    package: str
    module: str
    build: Callable[[Any, int, int], nn.Module]


PEERS = {
    "nystrom": Peer(
        "nystrom-attention",
        "nystrom_attention",
        lambda m, dim, heads: m.NystromAttention(dim=dim, dim_head=dim // heads, heads=heads, num_landmarks=LANDMARKS),
    ),
    "performer": Peer(
        "performer-pytorch",
        "performer_pytorch.performer_pytorch",
        lambda m, dim, heads: m.SelfAttention(dim=dim, dim_head=dim // heads, heads=heads, causal=False),
    ),
}


class PeerAttention(nn.Module):
    """A peer's layer under the call of this package's, for whole inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        """Attention over all tokens; the peers are compared without a mask."""
        return self.layer(x)


def missing(name: str) -> str:
    """The package that a peer needs and this installation lacks; empty where nothing is missing."""
    peer = PEERS[name]
    return "" if importlib.util.find_spec(peer.module.split(".")[0]) else peer.package


def version_of(name: str) -> str | None:
    """The version of a peer's package, None where it is missing."""
    return None if missing(name) else version(PEERS[name].package)


def build_peer(name: str, dim: int, heads: int) -> nn.Module:
    """The layer with its own defaults and no dropout, 256 landmarks for Nystrom attention.

    Raises InputError where its package is missing.
    """
    if package := missing(name):
        raise InputError(f"{name} needs the package {package}: {INSTALL}")
    peer = PEERS[name]
    with warnings.catch_warnings():
        # what they warn of is old ways of importing, which is not the reader's concern
        warnings.simplefilter("ignore")
        module = importlib.import_module(peer.module)
    return PeerAttention(peer.build(module, dim, heads))
