"""Which order of computation a layer takes, and why: one function for every mechanism that has several.

The orders of a mechanism give the same numbers; only their cost differs. The cost here is counted in multiplications,
and a fixed time as the multiplications that fit into it. `sansmax benchmark orders` measures how good the choice is.
"""

from typing import NamedTuple

import torch

ORDERS = ("auto", "quadratic", "linear", "moments")
# multiplications in the time that the second moments take beyond theirs, per call: about 0.2 ms on one core of 2024
OVERHEAD = 10_000_000


class Choice(NamedTuple):
    """The order in which a layer is computed, and why."""

    order: str
    reason: str


def choose_order(
    num_tokens: int,
    embed_dim: int,
    head_dim: int,
    batch: int = 1,
    device: torch.device | str = "cpu",
    mechanism: str = "seqnorm",
) -> Choice:
    """The cheapest order of a layer of `mechanism` ("seqnorm" or "sima") for `batch` images of `num_tokens` tokens.

    A graph that is exported holds for any number of tokens, so that number must not be looked at; the order is then
    "moments", whose cost grows least.
    """
    if torch.compiler.is_exporting():
        return Choice("moments", "an exported graph holds for any number of tokens")
    costs = COSTS[mechanism](num_tokens, embed_dim, head_dim)
    costs["moments"] += OVERHEAD // batch
    # no min(..., key=...): compilers do not follow it where the number of tokens is a symbol
    order = "moments"
    for name, cost in costs.items():
        if cost < costs[order]:
            order = name
    if torch.compiler.is_compiling():
        return Choice(order, "cheapest")
    mega = ", ".join(f"{name} {batch * cost / 1e6:.3g}" for name, cost in costs.items())
    size = f"{batch} x {num_tokens} tokens, {embed_dim} channels, heads of {head_dim} on {torch.device(device).type}"
    return Choice(order, f"cheapest for {size} (million multiplications: {mega})")


def seqnorm_costs(n: int, c: int, d: int) -> dict[str, int]:
    """Multiplications of one image: four projections or two moments of n c^2, then what the order adds."""
    return {
        "moments": 2 * n * c * c + 4 * c**3 + 2 * c * c * d,
        "linear": 4 * n * c * c + 2 * n * c * d,
        "quadratic": 4 * n * c * c + 2 * n * n * c,
    }


def sima_costs(n: int, c: int, d: int) -> dict[str, int]:
    """Multiplications of one image; the l1 norms need Q and K in every order."""
    return {
        "moments": 4 * n * c * c + 2 * c**3 + 2 * c * c * d,
        # first, so that it is taken where both cost the same: it has fewer steps
        "quadratic": 4 * n * c * c + 2 * n * n * c,
        "linear": 4 * n * c * c + 2 * n * c * d,
    }


COSTS = {"seqnorm": seqnorm_costs, "sima": sima_costs}
