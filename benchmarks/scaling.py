"""Seconds and memory of one forward pass against the size of the picture, beside a softmax twin.

    python -m benchmarks.scaling

Each mechanism runs in a process of its own and stops where the next size would take longer than `--budget` seconds.
Writes scaling.csv, scaling.png and scaling.md.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.machine import command_line, do_it_again
from sansmax.engine.progress import Reporter
from sansmax.engine.run import environment
from sansmax.engine.scaling import MECHANISMS, measure_scaling
from sansmax.report.scaling import scaling
from sansmax.report.summary import figure_text, table, write_summary
from sansmax.report.tables import write_rows

COLUMNS = ("mechanism", "tokens", "image_px", "seconds", "peak_mib", "reason")
HOW = (
    "One picture, no gradients, float32. Seconds: median of up to five passes. Memory: the largest of the process "
    "during them, beyond what it held after a pass of the smallest picture; the pixels are not in it. The softmax twin "
    "has the same architecture with PyTorch's fused attention."
)


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="seqnorm_vit_tiny_patch16_224")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448, 896, 1792, 3584], help="sides in pixels")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds that a size may take")
    parser.add_argument("--threads", type=int, default=None, help="threads of PyTorch [all cores]")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def shown(row: dict[str, Any]) -> list[Any]:
    """A row as cells of the page."""
    if row["seconds"] is None:
        return [row["mechanism"], f"{row['image_px']} px", row["tokens"], row["reason"], ""]
    return [
        row["mechanism"],
        f"{row['image_px']} px",
        row["tokens"],
        row["seconds"],
        "below 1" if row["peak_mib"] is None else round(row["peak_mib"]),
    ]


def main() -> None:
    """Measures, prints and writes."""
    arguments = parse()
    rows = measure_scaling(
        arguments.model,
        sorted(arguments.sizes),
        budget_seconds=arguments.budget,
        threads=arguments.threads,
        reporter=Reporter(),
    )
    results = table(["mechanism", "picture", "tokens", "seconds", "MiB"], [shown(row) for row in rows])
    print(results)
    write_rows(arguments.output / "scaling.csv", COLUMNS, rows)
    # two lines say it: the network as people run it, and what runs at any size
    drawn = [row for row in rows if row["mechanism"] != MECHANISMS["seqnorm"]]
    picture = scaling(drawn, arguments.output / "scaling.png", note=arguments.model)
    found = environment()
    if arguments.threads:
        found["threads"] = arguments.threads
    page = write_summary(
        arguments.output / "scaling.md",
        f"Time and memory of {arguments.model}",
        [
            ("", HOW),
            ("Results", results + "\n\n" + figure_text("Time and memory against the number of tokens", picture.name)),
            ("Do it again", do_it_again("benchmarks.scaling", found)),
        ],
    )
    print(f"\n{command_line('benchmarks.scaling')}\nwritten: {page}")


if __name__ == "__main__":
    main()
