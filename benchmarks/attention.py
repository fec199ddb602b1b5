"""Time and memory of attention layers and encoders, contestants side by side; orders of computation; single cases.

    python -m benchmarks.attention

Writes attention.csv, attention*.png and attention.md, and the same for the suites orders and targets. The peers come
with `pip install '.[bench]'`.
"""

import argparse
from pathlib import Path

from rich.console import Console

from benchmarks.machine import do_it_again
from sansmax.engine.benchmark import Limits, benchmark, versions
from sansmax.engine.cases import DTYPES, SUITES, Setup
from sansmax.engine.progress import Reporter
from sansmax.engine.suites import KINDS, cases_of
from sansmax.report.benchmark import draw


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=list(SUITES), choices=list(SUITES))
    parser.add_argument("--cases", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--contestants", nargs="+", default=None, help="names, NAME:ORDER for a forced order [all]")
    parser.add_argument("--tokens", type=int, nargs="+", default=None, help="sizes [those of each suite]")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], choices=list(DTYPES))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="each is measured; orders: the first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--budget", type=float, default=None, help="seconds of one pass [10, orders 2, targets 120]")
    parser.add_argument("--memory", type=float, default=0.0, help="GiB of one pass [half of what is free]")
    parser.add_argument("--repeats", type=int, default=None, help="times of each [7, orders 15, targets 5]")
    parser.add_argument("--quick", action="store_true", help="small sizes, the package alone")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    """Measures, prints and writes."""
    arguments = parse()
    for suite in arguments.suites:
        setup = Setup(
            tokens=tuple(sorted(arguments.tokens)) if arguments.tokens and suite != "targets" else None,
            dtypes=tuple(arguments.dtypes),
            threads=tuple(arguments.threads[:1] if suite == "orders" else arguments.threads),
            device=arguments.device,
            quick=arguments.quick,
        )
        contestants = arguments.contestants if suite == "attention" else None
        cases = cases_of(suite, setup, kinds=arguments.cases, contestants=contestants)
        limits = Limits.of(
            suite,
            quick=arguments.quick,
            budget=arguments.budget,
            memory_mib=1024 * arguments.memory,
            repeats=arguments.repeats,
        )
        again = do_it_again("benchmarks.attention", versions(setup))
        done = benchmark(suite, arguments.output, cases, limits, again=again, reporter=Reporter())
        draw(Console(), done.rows)
        print("written: " + ", ".join(map(str, done.files)))
        if not done.complete:
            raise SystemExit(130)


if __name__ == "__main__":
    main()
