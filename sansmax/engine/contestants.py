"""Networks of a named mechanism, made ready to run: one call is one pass.

A name is that of a mechanism of the package, with `NAME:ORDER` for a forced order of computation, or that of a peer.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sansmax.engine.cases import BASELINE, PRODUCTS, Case
from sansmax.engine.peers import PEERS, build_peer
from sansmax.errors import InputError, unknown_name
from sansmax.models.blocks import ATTENTIONS, Block

Step = Callable[[], object]


def network_step(case: Case, name: str) -> Step:
    """One pass of a layer, a block or an encoder over random tokens.

    Raises InputError for what no mechanism of this installation is, or what it cannot be given.
    """
    if name == PRODUCTS:
        return products_step(case)
    torch.manual_seed(0)
    if case.kind == "layer":
        network = build_layer(name, case.dim, case.heads)
    else:
        network = nn.Sequential(*(build_block(name, case.dim, case.heads) for _ in range(case.depth)))
    return step_of(network, case)


def step_of(network: nn.Module, case: Case) -> Step:
    """One pass of `network` over random tokens, in evaluation mode and in the type of the case."""
    network = network.to(case.device, dtype_of(case)).eval()
    x = random_tokens(case)
    return passes(network, [x], list(network.parameters()), case.backward)


def passes(function: Callable[..., Tensor], inputs: list[Tensor], leaves: list[Any], backward: bool) -> Step:
    """One call of `function`: without gradients, or with those of inputs and leaves, made anew each time."""
    if not backward:

        def forward() -> object:
            with torch.no_grad():
                return function(*inputs)

        return forward
    inputs = [x.requires_grad_() for x in inputs]
    gradient: list[Tensor] = []

    def both() -> None:
        for leaf in (*inputs, *leaves):
            leaf.grad = None
        out = function(*inputs)
        if not gradient:
            gradient.append(torch.randn_like(out))
        out.backward(gradient[0])

    return both


def build_layer(name: str, dim: int, heads: int) -> nn.Module:
    """A whole multi-head attention layer, projections included."""
    mechanism, options = parsed(name)
    if mechanism in PEERS:
        return build_peer(mechanism, dim, heads)
    return _built(name, lambda: ATTENTIONS[mechanism](dim, num_heads=heads, **options))


def build_block(name: str, dim: int, heads: int) -> nn.Module:
    """A transformer block with the layer; around a peer's, everything else is the same."""
    mechanism, options = parsed(name)
    if mechanism in PEERS:
        block = Block(dim, heads, attention=BASELINE)
        block.attn = build_peer(mechanism, dim, heads)
        return block
    return _built(name, lambda: Block(dim, heads, attention=mechanism, **options))


def parsed(name: str) -> tuple[str, dict[str, Any]]:
    """Mechanism and options of a name.

    Raises InputError where there is no such mechanism.
    """
    mechanism, colon, order = name.partition(":")
    if mechanism not in ATTENTIONS and (mechanism not in PEERS or colon):
        raise unknown_name("contestant", name, known_names())
    return mechanism, {"order": order} if colon else {}


def known_names() -> list[str]:
    """Every mechanism of the package, the peers, and the limit."""
    return [*ATTENTIONS, *PEERS, PRODUCTS]


def _built(name: str, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise InputError(f"{name} cannot be built: {error}") from None


def products_step(case: Case) -> Step:
    """The matrix products of a layer by second moments, X^T X and X M, and those of the MLPs, into given memory."""
    calls = [call for call in _products(case) for _ in range(case.depth)]

    def run() -> None:
        for product, a, b, out in calls:
            product(a, b, out=out)

    return run


def _products(case: Case) -> Iterator[tuple[Callable[..., Tensor], Tensor, Tensor, Tensor]]:
    c, how = case.dim, {"dtype": dtype_of(case), "device": case.device}
    x = random_tokens(case)
    # one image is a plain product; with several, each has a map of its own
    each = torch.mm if case.batch == 1 else torch.bmm
    x = x[0] if case.batch == 1 else x
    m = torch.randn(*x.shape[:-2], c, c, **how)
    y, g = torch.randn_like(x), torch.empty_like(m)
    yield each, x.mT, x, g
    yield each, x, m, y
    if case.backward:
        z, g2 = torch.empty_like(x), torch.empty_like(m)
        yield each, x.mT, y, g2
        yield each, y, m.mT, z
        yield each, x, m, z
    if case.kind == "layer":
        return
    # the weights of the MLP are those of all images
    flat, out = x.reshape(-1, c), y.view(-1, c)
    w1, w2 = torch.randn(c, 4 * c, **how), torch.randn(4 * c, c, **how)
    hidden = torch.randn(len(flat), 4 * c, **how)
    yield torch.mm, flat, w1, hidden
    yield torch.mm, hidden, w2, out
    if case.backward:
        yield torch.mm, hidden.mT, out, torch.empty_like(w2)
        yield torch.mm, out, w2.mT, hidden
        yield torch.mm, hidden, w1.mT, out
        yield torch.mm, flat.mT, hidden, torch.empty_like(w1)


def random_tokens(case: Case) -> Tensor:
    """Tokens of the case, the same in every run."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.batch, case.tokens, case.dim, generator=generator).to(case.device, dtype_of(case))


def dtype_of(case: Case) -> torch.dtype:
    """The type of module and tokens."""
    return getattr(torch, case.dtype)
