"""Training of slide classifiers: time of an epoch beside other networks in one loop, and of ragged beside equal bags.

    python -m benchmarks.slide_training

Writes slide_training.csv and slide_training.md. Steps of a few bags are measured, contestants in turn, and the medians
are scaled to an epoch of 200 bags. TransMIL (https://arxiv.org/abs/2106.00908) is written here from the description in
its paper, around the attention of the package nystrom-attention (`pip install '.[bench]'`) with its settings: 512
channels, 2 layers, 8 heads, 256 landmarks, 6 steps of the pseudo-inverse, residual convolution, dropout 0.1. It reads
one bag at a time, as published; ours lie side by side.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import do_it_again
from sansmax.engine.run import environment
from sansmax.files import write_text
from sansmax.report.summary import table
from sansmax.report.tables import as_csv

EPOCH = 200
WIDTH = 512


def nystrom(dim: int) -> nn.Module:
    """Nystrom attention with TransMIL's settings."""
    from nystrom_attention import NystromAttention  # pyright: ignore[reportMissingImports]

    settings = {"dim_head": dim // 8, "heads": 8, "num_landmarks": dim // 2, "pinv_iterations": 6}
    return NystromAttention(dim=dim, residual=True, dropout=0.1, **settings)


class TransMIL(nn.Module):
    """Two Nystrom layers around a convolution of positions, and a class token."""

    def __init__(self, in_features: int, num_classes: int, dim: int = 512) -> None:
        super().__init__()
        self.embed = nn.Linear(in_features, dim)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.layers = nn.ModuleList(nystrom(dim) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim) for k in (7, 5, 3))
        self.head = nn.Linear(dim, num_classes)

    def forward(self, features: Tensor, coords: Tensor | None = None) -> Tensor:
        """Logits of one bag: its tokens are filled up to a square by the first ones."""
        x = self.embed(features).relu()
        side = math.ceil(math.sqrt(x.shape[1]))
        x = torch.cat([self.token, x, x[:, : side * side - x.shape[1]]], dim=1)
        x = x + self.layers[0](self.norms[0](x))
        grid = x[:, 1:].mT.unflatten(2, (side, side))
        positions = grid + sum(conv(grid) for conv in self.convs)
        x = torch.cat([x[:, :1], positions.flatten(2).mT], dim=1)
        x = x + self.layers[1](self.norms[1](x))
        return self.head(self.norms[2](x)[:, 0])


class Nystrom(nn.Module):
    """Nystrom attention in the place of a layer of ours."""

    streams = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layer = nystrom(dim)

    def forward(self, x: Tensor, mask: None = None) -> Tensor:
        """Attention over all tokens."""
        return self.layer(x)


def ours(name: str, **arguments: Any) -> nn.Module:
    """A network of this package."""
    return timm.create_model(name, in_features=WIDTH, num_classes=2, **arguments)


def ours_with_nystrom(**arguments: Any) -> nn.Module:
    """Ours, but for the attention."""
    model: Any = ours("softmax_slide_small", **arguments)
    for block in model.blocks:
        block.attn = Nystrom(model.embed_dim)
    return model


LARGE = {"embed_dim": 512, "num_heads": 8}
# name, how it is built, whether bags lie side by side
CONTESTANTS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "seqnorm_slide_small": (lambda: ours("seqnorm_slide_small"), True),
    "softmax_slide_small": (lambda: ours("softmax_slide_small"), True),
    "the same with Nystrom attention": (ours_with_nystrom, False),
    "TransMIL": (lambda: TransMIL(WIDTH, 2), False),
    "seqnorm, 512 channels": (lambda: ours("seqnorm_slide_small", **LARGE), True),
    "softmax, 512 channels": (lambda: ours("softmax_slide_small", **LARGE), True),
    "Nystrom, 512 channels": (lambda: ours_with_nystrom(**LARGE), False),
    "sima_slide_small": (lambda: ours("sima_slide_small"), True),
    "soft_slide_small": (lambda: ours("soft_slide_small"), True),
    "abmil_slide_small": (lambda: ours("abmil_slide_small"), True),
}
RATIOS = (
    ("softmax_slide_small", "seqnorm_slide_small", 6.0),
    ("TransMIL", "seqnorm_slide_small", 4.0),
    ("the same with Nystrom attention", "seqnorm_slide_small", None),
    ("TransMIL", "seqnorm, 512 channels", None),
    ("Nystrom, 512 channels", "seqnorm, 512 channels", None),
    ("softmax, 512 channels", "seqnorm, 512 channels", None),
)


class Loop:
    """One loop for all: forward, cross entropy, backward, AdamW."""

    def __init__(self, network: nn.Module, side_by_side: bool) -> None:
        self.network, self.side_by_side = network.train(), side_by_side
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def step(self, features: Tensor, lengths: list[int]) -> float:
        """Seconds of a step over the bags (1, t, width)."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        labels = torch.arange(len(lengths)) % 2
        if self.side_by_side:
            F.cross_entropy(self.network(features, lengths=lengths), labels).backward()
        else:
            for bag, label in zip(features.split(lengths, 1), labels, strict=True):
                (F.cross_entropy(self.network(bag), label[None]) / len(lengths)).backward()
        self.optimizer.step()
        return time.perf_counter() - start

    def batch(self, features: Tensor) -> float:
        """Seconds of a step over bags of one length (b, n, width)."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        F.cross_entropy(self.network(features), torch.arange(len(features)) % 2).backward()
        self.optimizer.step()
        return time.perf_counter() - start


def epochs(names: list[str], tokens: int, repeats: int, bags: int) -> dict[str, list[float]]:
    """Seconds of an epoch of each contestant, measured in turn; the first round warms up."""
    loops = {name: Loop(CONTESTANTS[name][0](), CONTESTANTS[name][1]) for name in names}
    features = torch.randn(1, bags * tokens, WIDTH)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(repeats + 1):
        for name, loop in loops.items():
            taken = loop.step(features, [tokens] * bags) * EPOCH / bags
            print(f"{name:34} {taken:8.1f} s an epoch" + ("  (warming up)" if round_ == 0 else ""), flush=True)
            if round_:
                seconds[name].append(taken)
    return seconds


def ragged(repeats: int, least: int, most: int) -> dict[str, list[float]]:
    """Tokens per second of 16 bags of very different lengths side by side, and of 16 equal ones."""
    lengths = np.geomspace(least, most, 16).astype(int).tolist()
    mean = sum(lengths) // 16
    features = torch.randn(1, sum(lengths), WIDTH)
    equal = features[:, : 16 * mean].view(16, mean, WIDTH)
    loop = Loop(ours("seqnorm_slide_small"), True)
    rates: dict[str, list[float]] = {"ragged": [], "equal": []}
    for round_ in range(repeats + 1):
        found = {
            "ragged": sum(lengths) / loop.step(features, lengths),
            "equal": 16 * mean / loop.batch(equal),
        }
        for name, rate in found.items():
            print(f"{name:34} {rate:8.0f} tokens/s" + ("  (warming up)" if round_ == 0 else ""), flush=True)
            if round_:
                rates[name].append(rate)
    return rates


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=list(CONTESTANTS))
    parser.add_argument("--tokens", type=int, default=5000, help="tokens of a bag")
    parser.add_argument("--bags", type=int, default=4, help="bags of a step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small bags, for a test of the benchmark")
    parser.add_argument("--note", default="", help="a line for the page, such as what else ran")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    """Measures, prints and writes."""
    arguments = parse()
    torch.manual_seed(0)
    tokens = 300 if arguments.quick else arguments.tokens
    seconds = epochs(arguments.contestants, tokens, arguments.repeats, arguments.bags)
    rates = ragged(arguments.repeats, *((20, 800) if arguments.quick else (500, 20000)))
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    sizes = {name: sum(p.numel() for p in CONTESTANTS[name][0]().parameters()) for name in seconds}
    rows = [
        [name, f"{sizes[name]:,}", f"{medians[name]:.1f}", f"{min(v):.1f} to {max(v):.1f}"]
        for name, v in seconds.items()
    ]
    ratios = []
    for slow, fast, wanted in RATIOS:
        if slow in medians and fast in medians:
            # of each round by itself, so that what else the machine does counts for both
            own = np.divide(seconds[slow], seconds[fast])
            spread = f"{own.min():.2f} to {own.max():.2f}"
            goal = "" if wanted is None else f">= {wanted:g}"
            ratios.append([f"{slow} / {fast}", f"{np.median(own):.2f}", spread, goal])
    own = np.divide(rates["ragged"], rates["equal"])
    ratios.append(
        ["token rate, ragged / equal", f"{np.median(own):.2f}", f"{own.min():.2f} to {own.max():.2f}", ">= 0.8"]
    )
    lines = [["contestant", "parameters", "seconds", "spread"], *rows]
    write_text(arguments.output / "slide_training.csv", as_csv([[str(c) for c in line] for line in lines]))
    page = [
        "# Training of slide classifiers",
        f"An epoch of {EPOCH} bags of {tokens:,} tokens of {WIDTH} features, scaled from {arguments.repeats} steps of "
        f"{arguments.bags} bags each, contestants in turn; median and range.",
        table(["network", "parameters", "seconds an epoch", "range"], rows),
        "Ratios are taken within each round.",
        table(["", "median", "range", "goal"], ratios),
        "Ragged: 16 bags of 500 to 20,000 tokens side by side; equal: as many tokens in 16 bags of one length.",
        *([arguments.note] if arguments.note else []),
        do_it_again("benchmarks.slide_training", environment()),
    ]
    write_text(arguments.output / "slide_training.md", "\n\n".join(page) + "\n")
    print(table(["", "median", "range", "goal"], ratios))


if __name__ == "__main__":
    main()
