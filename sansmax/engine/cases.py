"""What the benchmark measures: the cases of each suite, by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from sansmax.engine.peers import PEERS

PRODUCTS = "products alone"
BASELINE = "softmax"
DTYPES = ("float32", "bfloat16", "float16", "float64")
DIRECTIONS = ("forward", "forward+backward")
CHOSEN = "auto"
FORCED = ("quadratic", "linear", "moments")
SUITES = {
    "attention": "attention layers and encoders against their peers, over the number of tokens",
    "orders": "the order of computation that a layer chooses against each forced one",
    "targets": "single cases by name, each against its formula written out or its products alone",
}
# squares, so that mechanisms which need a grid of tokens take part
TOKENS = (196, 1024, 4096, 16384, 65536, 262144)
QUICK_TOKENS = (196, 1024)
ORDER_TOKENS = (16, 64, 256, 1024, 4096, 16384)
ORDER_DIMS = (64, 192, 384, 768)
ORDER_BATCHES = (1, 8, 32)
LANDMARKS = 49
IN_CHUNKS = " in chunks"
NORMALISED_FIRST = "normalise first"


@dataclass(frozen=True)
class Case:
    """One thing to compute, and who is to compute it side by side.

    `kind` says what is built: "layer", "encoder" and "block" are networks of named mechanisms, "seqnorm" and "soft"
    layers beside their formulas, "sima" the operation on given q, k, v beside its own, "chunked" an encoder in chunks.
    """

    name: str
    kind: str
    tokens: int
    dim: int
    heads: int
    contestants: tuple[str, ...]
    depth: int = 1
    batch: int = 1
    direction: str = "forward"
    dtype: str = "float32"
    threads: int = 1
    device: str = "cpu"

    @property
    def backward(self) -> bool:
        """Whether gradients are computed, too."""
        return self.direction != "forward"

    def facts(self) -> dict[str, Any]:
        """The columns of the table that say what was computed."""
        names = ("tokens", "batch", "dim", "heads", "depth", "direction", "dtype", "threads", "device")
        return {"case": self.name, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Setup:
    """On what the cases run; sizes that are None are those of each case."""

    tokens: tuple[int, ...] | None = None
    dim: int | None = None
    heads: int | None = None
    batch: int | None = None
    directions: tuple[str, ...] | None = None
    dtypes: tuple[str, ...] = ("float32",)
    threads: tuple[int, ...] = (1,)
    device: str = "cpu"
    quick: bool = False

    def machines(self) -> list[dict[str, Any]]:
        """Type and threads of each pass over the cases."""
        return [{"dtype": d, "threads": t, "device": self.device} for d in self.dtypes for t in self.threads]


def attention_cases(kinds: Sequence[str], contestants: Sequence[str], setup: Setup) -> list[Case]:
    """A layer of 384 channels and an encoder of 12 blocks of 192, both ways, sizes growing."""
    sizes = {"layer": (384, 6, 1), "encoder": (192, 3, 12)}
    found = []
    for machine in setup.machines():
        for kind in kinds:
            dim, heads, depth = sizes[kind]
            for tokens in setup.tokens or (QUICK_TOKENS if setup.quick else TOKENS):
                for direction in setup.directions or DIRECTIONS:
                    case = Case(
                        kind,
                        kind,
                        tokens,
                        setup.dim or dim,
                        setup.heads or heads,
                        tuple(contestants),
                        depth=min(depth, 3) if setup.quick else depth,
                        batch=setup.batch or 1,
                        direction=direction,
                        **machine,
                    )
                    found.append(case)
    return found


def order_cases(orders: Mapping[str, Sequence[str]], setup: Setup) -> list[Case]:
    """A grid of sizes for the choice of each mechanism against its forced orders; heads of 64 channels."""
    dims = (setup.dim,) if setup.dim else (64, 384) if setup.quick else ORDER_DIMS
    batches = (setup.batch,) if setup.batch else (1, 8) if setup.quick else ORDER_BATCHES
    sizes = setup.tokens or (ORDER_TOKENS[::2] if setup.quick else ORDER_TOKENS)
    directions = setup.directions or DIRECTIONS[:1]
    grid = product(setup.machines(), orders, directions, batches, dims, sizes)
    return [
        Case(
            "orders",
            "layer",
            tokens,
            dim,
            setup.heads or max(1, dim // 64),
            (f"{name}:{CHOSEN}", *(f"{name}:{order}" for order in orders[name])),
            batch=batch,
            direction=direction,
            **machine,
        )
        for machine, name, direction, batch, dim, tokens in grid
    ]


def target_cases(setup: Setup) -> list[Case]:
    """Each by name, at the size at which it counts."""
    quick, found = setup.quick, []
    for machine in setup.machines():
        for tokens in (1024,) if quick else (4096, 16384):
            peers = () if quick else tuple(PEERS)
            names = ("seqnorm", "seqnorm:linear", NORMALISED_FIRST, BASELINE, *peers, PRODUCTS)
            whole = Case("seqnorm layer", "seqnorm", tokens, 384, 6, names, **machine)
            found += [replace(whole, direction=direction) for direction in setup.directions or DIRECTIONS]
        names = ("sima_attention", "normalise, then multiply", "the same by abs and sum")
        alone = Case("sima attention alone", "sima", 1024 if quick else 4096, 384, 6, names, **machine)
        soft = Case(
            f"soft layer ({LANDMARKS} landmarks)",
            "soft",
            1024 if quick else 16384,
            384,
            6,
            ("soft", "formula written out"),
            **machine,
        )
        for case in (alone, soft):
            found += [replace(case, direction=direction) for direction in setup.directions or DIRECTIONS]
        for tokens in (49, 196):
            names = ("seqnorm", "sima", "softmax")
            step = {"batch": 4 if quick else 32, "direction": DIRECTIONS[1], **machine}
            found.append(Case("block training step", "block", tokens, 384, 6, names, **step))
    dtype = "bfloat16" if setup.dtypes == ("float32",) else setup.dtypes[0]
    for threads in setup.threads:
        machine = {"dtype": dtype, "threads": threads, "device": setup.device}
        names = (f"seqnorm{IN_CHUNKS}", "seqnorm", PRODUCTS)
        found.append(
            Case("encoder in chunks", "chunked", 4096 if quick else 262144, 192, 3, names, depth=12, **machine)
        )
    return found
