"""The cases of a suite, checked against what this installation has."""

from collections.abc import Sequence

import torch

from sansmax.engine.cases import (
    DIRECTIONS,
    DTYPES,
    FORCED,
    PRODUCTS,
    SUITES,
    Case,
    Setup,
    attention_cases,
    order_cases,
    target_cases,
)
from sansmax.engine.contestants import build_layer, known_names, parsed
from sansmax.engine.peers import INSTALL, PEERS, missing
from sansmax.errors import InputError, unknown_name
from sansmax.models.blocks import ATTENTIONS

KINDS = ("layer", "encoder")


def cases_of(
    suite: str, setup: Setup, *, kinds: Sequence[str] = KINDS, contestants: Sequence[str] | None = None
) -> list[Case]:
    """The cases of a suite, checked: those of "attention" for the contestants named, or for all there are.

    Raises InputError for names and sizes that cannot be, and for a device or a package that is not there.
    """
    if suite not in SUITES:
        raise unknown_name("suite", suite, SUITES)
    _check_setup(setup)
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("case", kind, KINDS)
    if suite == "targets":
        if contestants:
            raise InputError("the suite targets has its own contestants; leave them out")
        return target_cases(setup)
    if suite == "orders":
        cases = order_cases(_orders_of(contestants), setup)
    else:
        # a peer that is not installed is left out with a reason, unless it was asked for
        for name in contestants or ():
            if name in PEERS and (package := missing(name)):
                raise InputError(f"{name} needs the package {package}: {INSTALL}")
        names = contestants or [n for n in known_names() if not (setup.quick and n in PEERS)]
        cases = attention_cases(kinds, tuple(dict.fromkeys(names)), setup)
    for dim, heads, name in dict.fromkeys((c.dim, c.heads, n) for c in cases for n in c.contestants):
        _check_buildable(name, dim, heads)
    return cases


def _orders_of(names: Sequence[str] | None) -> dict[str, list[str]]:
    """The forced orders of the mechanisms named, or of those that choose among all."""
    found = {}
    for name in names or ATTENTIONS:
        mechanism, options = parsed(name)
        if options or mechanism in PEERS:
            raise InputError(f"the suite orders takes mechanisms of the package, without an order, got {name!r}")
        orders = [order for order in FORCED if _can_be_built(f"{name}:{order}")]
        if names and len(orders) < 2:
            raise InputError(f"{name} has one order of computation; the suite orders takes those that choose")
        if names or len(orders) == len(FORCED):
            found[name] = orders
    return found


def _can_be_built(name: str) -> bool:
    try:
        _check_buildable(name, 64, 1)
    except InputError:
        return False
    return True


def _check_buildable(name: str, dim: int, heads: int) -> None:
    if name == PRODUCTS:
        return
    mechanism, _ = parsed(name)
    if dim % heads:
        raise InputError(f"{dim} channels are not divisible by {heads} heads; give another --dim or --heads")
    if mechanism not in PEERS:
        with torch.device("meta"):
            build_layer(name, dim, heads)


def _check_setup(setup: Setup) -> None:
    whole = {"tokens": setup.tokens, "threads": setup.threads}
    whole |= {name: (value,) for name in ("dim", "heads", "batch") if (value := getattr(setup, name)) is not None}
    for name, values in whole.items():
        if values is not None and (not values or min(values) < 1):
            raise InputError(f"{name} must be whole numbers above 0, got {', '.join(map(str, values)) or 'none'}")
    for direction in setup.directions or ():
        if direction not in DIRECTIONS:
            raise unknown_name("direction", direction, DIRECTIONS)
    for dtype in setup.dtypes:
        if dtype not in DTYPES:
            raise unknown_name("dtype", dtype, DTYPES)
    if setup.device not in ("cpu", "cuda"):
        raise InputError(f"device must be cpu or cuda, got {setup.device!r}")
    if setup.device == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device on this machine; leave out --device, or give --device cpu")
