"""How much faster the published networks are than their formulas in plain eager PyTorch, and how near.

    python -m benchmarks.published

Both run on the same weights and images, in turn, in an order drawn anew in each round; the ratio is that of the medians
of their times. Writes published.csv and published.md.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import sansmax  # noqa: F401  (registers the networks)
from benchmarks import published_sima, published_soft
from benchmarks.machine import do_it_again
from sansmax.engine.progress import Reporter
from sansmax.engine.run import environment
from sansmax.report.summary import table, write_summary
from sansmax.report.tables import write_rows

COLUMNS = ("network", "threads", "published_s", "sansmax_s", "ratio", "difference", "bfloat16_difference")
HOW = (
    "One batch of random images, evaluation, no gradients, float32; seconds are medians. Difference: the largest of "
    "the logits between the two, over the largest logit; in bfloat16: that of autocast from float32, both by sansmax. "
    "Weights are those of the start of training."
)


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["soft_tiny", "soft_norm_tiny", "sima_small_12_p16"])
    parser.add_argument("--size", type=int, default=224, help="side of the pictures in pixels")
    parser.add_argument("--batch", type=int, default=8, help="pictures per pass")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="threads of PyTorch")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def race(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contestant."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for step in contestants.values():
        step()
    for _ in range(rounds):
        for name in random.sample(list(contestants), len(contestants)):
            start = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return ((found.float() - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def measure(name: str, threads: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row: a network on a number of threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model: Any = timm.create_model(name).eval()
    plain = published_soft.forward if name.startswith("soft") else published_sima.forward
    x = torch.randn(arguments.batch, model.in_chans, arguments.size, arguments.size)
    logits = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(x)
    medians = race({"published": lambda: plain(model, x), "sansmax": lambda: model(x)}, arguments.rounds)
    return {
        "network": name,
        "threads": threads,
        "published_s": medians["published"],
        "sansmax_s": medians["sansmax"],
        "ratio": medians["published"] / medians["sansmax"],
        "difference": distance(plain(model, x), logits),
        "bfloat16_difference": distance(narrow, logits),
    }


def main() -> None:
    """Measures, prints and writes."""
    arguments = parse()
    reporter = Reporter()
    rows = []
    for name in arguments.models:
        for threads in arguments.threads:
            rows.append(measure(name, threads, arguments))
            reporter.say(f"{name}, {threads} threads: {rows[-1]['ratio']:.2f} times as fast as its formulas")
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.output / "published.csv", COLUMNS, rows)
    cells = [
        [
            row["network"],
            row["threads"],
            f"{row['published_s']:.3f}",
            f"{row['sansmax_s']:.3f}",
            f"{row['ratio']:.2f}",
            f"{row['difference']:.1e}",
            f"{row['bfloat16_difference']:.1e}",
        ]
        for row in rows
    ]
    header = ["network", "threads", "formulas, s", "sansmax, s", "ratio", "difference", "in bfloat16"]
    results = table(header, cells)
    print(results)
    page = write_summary(
        arguments.output / "published.md",
        "Published networks beside their formulas written out",
        [
            ("", f"{arguments.batch} images of {arguments.size} x {arguments.size} px. {HOW}"),
            ("Results", results),
            ("Do it again", do_it_again("benchmarks.published", environment())),
        ],
    )
    print(f"\nwritten: {page}")


if __name__ == "__main__":
    main()
