"""Time and memory of an epoch of each arm of `benchmarks.accuracy`, at each size, side by side.

    python -m benchmarks.accuracy_cost --idrid FOLDER

Real training steps, images and augmentation included, by our loaders: a few steps of each arm in turn, round after
round, and the median scaled to an epoch. Peak memory is that of a process of its own, less what it held before it had
a network. Writes accuracy_cost.csv, which `python -m benchmarks.accuracy --page` reads.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import ARMS, STUDIES, config_of
from sansmax.data.loading import Batch, make_loader
from sansmax.engine.build import build_model, build_preprocess
from sansmax.engine.memory import give_back, peak_mib
from sansmax.engine.module import Classifier
from sansmax.engine.progress import Reporter
from sansmax.engine.train import augmentation, open_training_data
from sansmax.report.tables import read_rows, write_rows

COLUMNS = (
    "image_size",
    "patch_size",
    "precision",
    "tokens",
    "attention",
    "images",
    "epoch_seconds",
    "low",
    "high",
    "peak_mib",
    "threads",
)
STUDY = "idrid"


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idrid", type=Path, required=True, help="folder of IDRiD's pictures and labels.csv")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(STUDIES[STUDY].sizes))
    parser.add_argument("--patch-size", type=int, default=16, help="side of a token; rows of others stay as they are")
    parser.add_argument("--precision", default="32", choices=["32", "bf16"], help="rows of the other stay as they are")
    parser.add_argument("--rounds", type=int, default=7, help="times that are taken of each arm")
    parser.add_argument("--steps", type=int, default=2, help="steps of a time")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--medmnist", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--memory-of", nargs=2, metavar=("ATTENTION", "SIZE"), default=None, help=argparse.SUPPRESS)
    return parser.parse_args()


class Loop:
    """Training steps of one arm: the loop of the trainer, without what it writes."""

    def __init__(self, arguments: argparse.Namespace, attention: str, size: int) -> None:
        config = config_of(arguments, STUDIES[STUDY], size, attention, 0, patch_size=arguments.patch_size)
        data = open_training_data(config.data, config.seed, Reporter(quiet=True))
        assert data.train is not None
        torch.manual_seed(0)
        network = build_model(config.model, config.data, len(data.classes), 3)
        preprocess = build_preprocess(network, config.data, 3)
        self.loader = make_loader(
            data.train, preprocess, augmentation(config), batch_size=config.batch_size, seed=0, shuffle=True
        )
        self.module = Classifier(network, config.optim, len(data.classes), config.epochs, len(self.loader), 0)
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
        self.images, self.tokens = len(data.train), (size // arguments.patch_size) ** 2
        self.batches = iter(self.loader)
        self.half = torch.autocast("cpu", torch.bfloat16, enabled=arguments.precision == "bf16")

    def step(self) -> None:
        """Draws a batch and learns from it."""
        batch: Batch | None = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        assert batch is not None
        self.optimizer.zero_grad()
        with self.half:
            logits = self.module.network(batch.images)
        torch.nn.functional.cross_entropy(logits.float(), batch.labels).backward()
        self.optimizer.step()

    def seconds(self, steps: int) -> float:
        """Seconds of an epoch, from so many steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        return (time.perf_counter() - start) / steps * len(self.loader)


def memory(attention: str, size: int) -> float:
    """MiB that training takes at its peak, beyond what the libraries take, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.accuracy_cost", *sys.argv[1:], "--memory-of", attention, str(size)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measures, prints and writes."""
    arguments = parse()
    if arguments.memory_of:
        before = peak_mib(now=True)
        loop = Loop(arguments, arguments.memory_of[0], int(arguments.memory_of[1]))
        for _ in range(3):
            loop.step()
        print(json.dumps(peak_mib() - before))
        return
    rows: list[dict[str, Any]] = []
    for size in arguments.sizes:
        loops = {attention: Loop(arguments, attention, size) for attention in ARMS}
        times: dict[str, list[float]] = {attention: [] for attention in ARMS}
        for round_ in range(arguments.rounds + 1):
            for attention, loop in loops.items():
                seconds = loop.seconds(arguments.steps)
                # the first one reads the pictures and warms up
                if round_:
                    times[attention].append(seconds)
        for attention, loop in loops.items():
            middle, low, high = statistics.median(times[attention]), min(times[attention]), max(times[attention])
            row = {"image_size": size, "patch_size": arguments.patch_size, "precision": arguments.precision}
            row |= {"tokens": loop.tokens, "attention": attention, "images": loop.images}
            row |= {"epoch_seconds": round(middle, 2), "low": round(low, 2), "high": round(high, 2)}
            rows.append({**row, "peak_mib": round(memory(attention, size)), "threads": torch.get_num_threads()})
            print(rows[-1], flush=True)
        loops.clear()
        give_back()
    path = arguments.output / "accuracy_cost.csv"
    measured = (arguments.patch_size, arguments.precision)
    before = read_rows(path) if path.exists() else []
    others = [r for r in before if (r["patch_size"], str(r["precision"])) != measured]
    print("written:", write_rows(path, COLUMNS, [*others, *rows]))


if __name__ == "__main__":
    main()
