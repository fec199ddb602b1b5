"""How long it takes to read the features of one slide, by the layout of its file.

    python -m benchmarks.bags

20,000 tiles of 1,536 numbers in TRIDENT's file as it writes it (a chunk for every tile), the same repacked, CLAM's, and
the package's own. They take turns, in an order drawn anew in each round; times are medians. "from the disk" has the
system forget the file before every reading. Writes bags.csv and bags.md.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from benchmarks.machine import do_it_again
from sansmax.data.bags.bag import Bag
from sansmax.data.bags.reading import read_bag
from sansmax.data.bags.writing import write_bag
from sansmax.engine.progress import Reporter
from sansmax.engine.run import environment
from sansmax.report.summary import table, write_summary
from sansmax.report.tables import write_rows

ORIGINAL = "TRIDENT, as it writes"
COLUMNS = (
    "layout",
    "chunks",
    "dtype",
    "mib",
    "library_s",
    "read_bag_s",
    "disk_s",
    "ratio",
    "ratio_read_bag",
    "ratio_disk",
)
HOW = (
    "Medians of alternating rounds, one thread. h5py: the features alone into an array, by h5py (`torch.load` for the "
    "tensor), as the neighbours read them, with the file in the system's cache, as in every epoch after the first. "
    "read_bag: the features with places and attributes, searched for NaN. From the disk: `read_bag` after the system "
    "was told to forget the file (posix_fadvise); a cache of the disk itself is not emptied. Times as fast: as "
    "TRIDENT's own file, by h5py, by `read_bag`, from the disk. The same features are in all files."
)


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=20_000)
    parser.add_argument("--width", type=int, default=1_536)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the files are made [the system's temporary one]"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def write_trident(bag: Bag, path: Path) -> None:
    """TRIDENT's file: every tile is a chunk."""
    assert bag.xy is not None
    with h5py.File(path, "w") as file:
        for name, data in (("features", bag.features), ("coords", bag.xy)):
            file.create_dataset(name, data=data, chunks=(1, data.shape[1]), maxshape=(None, data.shape[1]))
        file["features"].attrs.update({"name": path.stem, "savetodir": str(path.parent), "encoder": "uni_v2"})
        file["coords"].attrs.update({"patch_size": 256, "patch_size_level0": 512.0, "overlap": 0, "name": path.stem})


def make_files(folder: Path, tiles: int, width: int) -> dict[str, Path]:
    """One file for each layout, of the same features."""
    rng = np.random.default_rng(0)
    columns = int(tiles**0.5) + 1
    xy = np.stack([np.arange(tiles) % columns, np.arange(tiles) // columns], axis=1) * 512
    features = rng.standard_normal((tiles, width), dtype=np.float32)
    bag = Bag("slide", features, xy=xy, tile_level0=512.0, mpp=0.25, encoder="uni_v2")
    paths = {ORIGINAL: folder / "trident.h5", "CLAM": folder / "h5_files" / "clam.h5"}
    write_trident(bag, paths[ORIGINAL])
    write_bag(bag, paths["CLAM"], "clam")
    for name, layout, dtype in (
        ("TRIDENT, repacked", "trident", "float32"),
        ("sansmax, float32", "sansmax", "float32"),
        ("sansmax, float16", "sansmax", "float16"),
        ("tensor (.pt)", "pt", "float32"),
    ):
        paths[name] = folder / f"{len(paths)}.{'pt' if layout == 'pt' else 'h5'}"
        write_bag(bag, paths[name], layout, dtype=dtype)
    return paths


def by_library(path: Path) -> object:
    """The features as an array, by the library that the neighbours read with."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    with h5py.File(path) as file:
        features: Any = file["features"]
        return features[()]


def forget(path: Path) -> None:
    """Has the system drop its copy of the file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def race(
    paths: dict[str, Path], read: Callable[[Path], object], rounds: int, before: Callable[[Path], None] | None = None
) -> dict[str, float]:
    """Median seconds for each file."""
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for path in paths.values():
        read(path)
    for _ in range(rounds):
        for name in random.sample(list(paths), len(paths)):
            if before is not None:
                before(paths[name])
            start = time.perf_counter()
            read(paths[name])
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(arguments: argparse.Namespace, reporter: Reporter) -> list[dict[str, Any]]:
    """A line for each layout."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        paths = make_files(Path(folder), arguments.tiles, arguments.width)
        times = {}
        for name, read, before in (
            ("library_s", by_library, None),
            ("read_bag_s", read_bag, None),
            ("disk_s", read_bag, forget),
        ):
            times[name] = race(paths, read, arguments.rounds, before)
            reporter.say(f"{name}: " + ", ".join(f"{k} {1000 * v:.1f} ms" for k, v in times[name].items()))
        rows = []
        for name, path in paths.items():
            row: dict[str, Any] = {"layout": name, **facts(path), **{key: times[key][name] for key in times}}
            for key, ratio in zip(times, ("ratio", "ratio_read_bag", "ratio_disk"), strict=True):
                row[ratio] = times[key][ORIGINAL] / times[key][name]
            rows.append(row)
        return rows


def facts(path: Path) -> dict[str, Any]:
    """How the features lie in a file."""
    size = {"mib": path.stat().st_size / 2**20}
    if path.suffix == ".pt":
        return {"chunks": "one piece", "dtype": "float32", **size}
    with h5py.File(path) as file:
        features: Any = file["features"]
        chunks = "one piece" if features.chunks is None else " x ".join(map(str, features.chunks))
        return {"chunks": chunks, "dtype": str(features.dtype), **size}


def main() -> None:
    """Measures, prints and writes."""
    arguments, reporter = parse(), Reporter()
    rows = measure(arguments, reporter)
    head = ["layout", "chunks", "MiB", "h5py", "read_bag", "from the disk", "times as fast", "read_bag", "disk"]
    lines = [
        [
            *(row["layout"], row["chunks"], f"{row['mib']:.0f}"),
            *(f"{1000 * row[key]:.1f} ms" for key in ("library_s", "read_bag_s", "disk_s")),
            *(f"{row[key]:.1f}" for key in ("ratio", "ratio_read_bag", "ratio_disk")),
        ]
        for row in rows
    ]
    print(table(head, lines))
    write_rows(arguments.output / "bags.csv", COLUMNS, rows)
    title = f"Reading a bag of {arguments.tiles:,} tiles of {arguments.width:,} numbers"
    again = do_it_again("benchmarks.bags", environment())
    write_summary(
        arguments.output / "bags.md", title, [("", table(head, lines) + "\n\n" + HOW), ("Do it again", again)]
    )


if __name__ == "__main__":
    main()
