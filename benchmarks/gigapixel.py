"""A slide of 10 gigapixel from pixels to label and heat map on one machine, and a bag of a million tokens.

    python -m benchmarks.gigapixel

Writes a synthetic slide of 100,000 x 100,000 px with planted regions, trains a network of 12 layers and 192 channels on
small pictures of the same two tissues (none of whose tiles are in the slide), and runs it over every patch with
tissue: logits alone with the tokens in memory, and scores with the tokens in files, each in a process of its own whose
peak of memory is read from the system. Between its chunks the bare matrix products of the same sizes are timed.
Then a bag of 1,000,000 tokens. Writes gigapixel.csv, gigapixel.md and gigapixel.png.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import sansmax
from benchmarks.machine import do_it_again
from sansmax.engine.memory import peak_mib
from sansmax.engine.run import environment
from sansmax.files import write_text

MPP = 1.0
CHUNK = 4096


def network(layers: int) -> Any:
    """The network of the benchmark: no positions, so that it takes any number of tokens."""
    name = "seqnorm_vit_tiny_patch16_224"
    return timm.create_model(name, depth=layers, num_classes=2, pos_embed="none", img_size=512)


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100_000, help="side of the slide in pixels of 0.5 micrometres")
    parser.add_argument("--tissue", type=float, default=0.26, help="share of the slide that is tissue")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="tokens of the bag")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60, help="steps of training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/gigapixel"), help="slide, weights and stages")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--stage", choices=("train", "logits", "scores", "bag", "same"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs the stages that are not there yet, each in its own process, and writes the results."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage:
        result = STAGES[arguments.stage](arguments)
        write_text(arguments.folder / f"{arguments.stage}.json", json.dumps(result, indent=1) + "\n")
        return
    write_slide(arguments)
    for stage in STAGES:
        if not (arguments.folder / f"{stage}.json").exists():
            print(f"{stage} ...", flush=True)
            subprocess.run([sys.executable, "-m", "benchmarks.gigapixel", *sys.argv[1:], "--stage", stage], check=True)
    report(arguments)


def slide_path(arguments: argparse.Namespace) -> Path:
    """Where the slide lies."""
    return arguments.folder / "slide.tif"


def write_slide(arguments: argparse.Namespace) -> None:
    """The synthetic slide, once."""
    from sansmax.data.slides.synthetic import write_synthetic_slide

    if not slide_path(arguments).exists():
        began = time.perf_counter()
        size = (arguments.size, arguments.size)
        options: dict[str, Any] = {"planted": 12, "planted_share": 0.02, "tissue_share": arguments.tissue}
        write_synthetic_slide(slide_path(arguments), size, mpp=0.5, seed=7, **options)
        seconds = {"write_seconds": time.perf_counter() - began, "bytes": slide_path(arguments).stat().st_size}
        write_text(arguments.folder / "slide.json.times", json.dumps(seconds))


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains on small pictures with and without planted tissue, on random subsets of their patches."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model, batch = network(arguments.layers).train(), 8
    plain, planted = pools(arguments)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-4, total_steps=arguments.steps, pct_start=0.15)
    began, right = time.perf_counter(), []
    for _ in range(arguments.steps):
        x, labels, keep = pictures(rng, plain, planted, batch)
        logits = model(x, mask=keep)
        loss = F.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        right.append(float((logits.argmax(1) == labels).float().mean()))
    model.eval()
    with torch.no_grad():
        tests = [pictures(rng, *pools(arguments, seed=12), batch) for _ in range(12)]
        accuracy = float(torch.cat([(model(x).argmax(1) == y).float() for x, y, _ in tests]).mean())
    save_file(model.state_dict(), arguments.folder / "model.safetensors")
    return {"seconds": time.perf_counter() - began, "train_accuracy": float(np.mean(right[-20:])), "accuracy": accuracy}


def pools(arguments: argparse.Namespace, seed: int = 11) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of both tissues at 1 micrometre per pixel, (tiles, 128, 128, 3)."""
    from sansmax.data.slides.opening import open_slide
    from sansmax.data.slides.scaled import read_scaled
    from sansmax.data.slides.synthetic import read_planted, write_synthetic_slide

    path = arguments.folder / f"tiles{seed}.tif"
    if not path.exists():
        write_synthetic_slide(
            path, (8192, 8192), mpp=0.5, seed=seed, tissue_share=0.9, planted=8, planted_share=0.2, levels=2
        )
    with open_slide(path) as slide:
        picture = read_scaled(slide, (0, 0), MPP / 0.5, (4096, 4096))
    tiles = picture.reshape(32, 128, 32, 128, 3).swapaxes(1, 2).reshape(-1, 128, 128, 3)
    inside = np.zeros((32, 32), bool)
    for x, y, w, h in read_planted(path).boxes:
        inside[y // 256 : (y + h) // 256, x // 256 : (x + w) // 256] = True
    tissue = tiles.reshape(len(tiles), -1).std(1) > 5
    return tiles[tissue & ~inside.ravel()], tiles[inside.ravel()]


def pictures(rng: np.random.Generator, plain: np.ndarray, planted: np.ndarray, batch: int) -> tuple[Any, Any, Any]:
    """Mosaics of 4 x 4 tiles, half of them with one to three planted ones, and which of their patches are there."""
    x, labels = np.empty((batch, 512, 512, 3), np.uint8), rng.permutation(np.arange(batch) % 2)
    for image, label in zip(x, labels, strict=True):
        cells = plain[rng.integers(len(plain), size=16)].copy()
        count = int(rng.integers(1, 4)) * int(label)
        cells[rng.permutation(16)[:count]] = planted[rng.integers(len(planted), size=count)]
        image[:] = cells.reshape(4, 4, 128, 128, 3).swapaxes(1, 2).reshape(512, 512, 3)
    keep = rng.random((batch, 1024)) < rng.uniform(0.05, 0.6, (batch, 1))
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return pixels, torch.from_numpy(labels), torch.from_numpy(keep)


def trained(arguments: argparse.Namespace) -> Any:
    """The network of the training stage."""
    model = network(arguments.layers)
    model.load_state_dict(load_file(arguments.folder / "model.safetensors"))
    return model.eval()


class Clock:
    """Notes when each chunk was done, and times the bare products of one layer on a chunk now and then.

    Contestants side by side: what the machine does meanwhile slows both. The time of the products is taken out.
    """

    def __init__(self, c: int = 192, every: int = 40) -> None:
        self.every, self.times, self.products, self.out = every, [], [], 0.0
        self.x, self.wide = torch.randn(CHUNK, c), torch.empty(CHUNK, 4 * c)
        self.square, self.up, self.down = torch.randn(c, c), torch.randn(c, 4 * c), torch.randn(4 * c, c)
        self.y, self.state = torch.empty(CHUNK, c), torch.empty(c, c)
        self.began = time.perf_counter()

    def __call__(self, done: int, total: int) -> None:
        """A chunk is done."""
        self.times.append(time.perf_counter() - self.began - self.out)
        if done % self.every == 0:
            first = time.perf_counter()
            self.layer()
            between = time.perf_counter()
            for _ in range(4):
                self.layer()
            last = time.perf_counter()
            self.products.append((last - between) / 4)
            self.out += last - first

    def layer(self) -> None:
        """X^T X, X M and the two products of the MLP, into memory that is there; no norms, no activation."""
        torch.mm(self.x.T, self.x, out=self.state)
        torch.mm(self.x, self.square, out=self.y)
        torch.mm(self.x, self.up, out=self.wide)
        torch.mm(self.wide, self.down, out=self.y)


def logits(arguments: argparse.Namespace) -> dict[str, Any]:
    """The forward pass with all tokens in memory, and the bare products between its chunks."""
    clock = Clock()
    model = trained(arguments)
    start = peak_mib()
    found = sansmax.stream(model, slide_path(arguments), mpp=MPP, progress=clock)
    assert found.xy is not None
    peak, n = peak_mib(), len(found.xy)
    # a tick for each chunk that was read and embedded, then one for each chunk and layer
    chunks = len(clock.times) // (arguments.layers + 1)
    passes = clock.times[-1] - clock.times[chunks - 1]
    later = clock.products[chunks // clock.every :]
    products = float(np.mean(later)) * arguments.layers * n / CHUNK
    return {
        "tokens": n,
        "logits": found.logits[0].tolist(),
        "seconds": clock.times[-1],
        "reading_seconds": clock.times[chunks - 1],
        "layers_seconds": passes,
        "products_seconds": products,
        "ratio": passes / products,
        "chunks": chunks,
        "product_samples": len(later),
        "peak_mib": peak,
        "start_mib": start,
    }


def scores(arguments: argparse.Namespace) -> dict[str, Any]:
    """Scores of every token, products in bfloat16 and tokens in files, and how well they find what was planted."""
    from sklearn.metrics import roc_auc_score

    from sansmax.data.slides.synthetic import read_planted
    from sansmax.engine.predict import Predictor
    from sansmax.engine.predict_slide import SlideOptions, predict_slide

    model = trained(arguments)
    options = SlideOptions(mpp=MPP, store="disk")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predict_slide(Predictor.of(model, "cpu"), slide_path(arguments), options, scores="1")
    peak = peak_mib()
    assert found.scores is not None and found.xy_level0 is not None and found.side is not None
    truth = in_boxes(found.xy_level0 + found.side / 2, read_planted(slide_path(arguments)).boxes)
    np.savez(arguments.folder / "scores.npz", scores=found.scores, xy=found.xy_level0, side=found.side, truth=truth)
    # what a reader of the map looks at: tiles of 256 px
    tiles, inverse = np.unique(found.xy_level0 // 256, axis=0, return_inverse=True)
    by_tile = np.bincount(inverse.ravel(), found.scores) / np.bincount(inverse.ravel())
    tile_truth = np.bincount(inverse.ravel(), truth, len(tiles)) > 0
    return {
        "tokens": len(truth),
        "planted_tokens": int(truth.sum()),
        "probability": float(found.probabilities[1]),
        "auroc_tokens": float(roc_auc_score(truth, found.scores)),
        "auroc_tiles": float(roc_auc_score(tile_truth, by_tile)),
        "tiles": len(tiles),
        "planted_tiles": int(tile_truth.sum()),
        "planted_in_top": float(tile_truth[np.argsort(-by_tile)[: int(tile_truth.sum())]].mean()),
        "peak_mib": peak,
    }


def in_boxes(xy: np.ndarray, boxes: Any) -> np.ndarray:
    """Which places lie in any of the boxes (x, y, width, height)."""
    inside = np.zeros(len(xy), bool)
    for x, y, w, h in boxes:
        inside |= (xy[:, 0] >= x) & (xy[:, 0] < x + w) & (xy[:, 1] >= y) & (xy[:, 1] < y + h)
    return inside


def bag_network(layers: int) -> Any:
    """A slide classifier of 12 layers on features."""
    torch.manual_seed(0)
    arguments: dict[str, Any] = {
        "in_features": 512,
        "num_classes": 2,
        "depth": layers,
        "embed_dim": 192,
        "num_heads": 3,
    }
    return timm.create_model("seqnorm_slide_small", **arguments).eval()


def features(arguments: argparse.Namespace, n: int) -> Path:
    """A bag of random features of half precision, written in pieces."""
    path = arguments.folder / f"bag{n}.npy"
    if not path.exists():
        bag = np.lib.format.open_memmap(path, "w+", np.float16, (n, 512))
        rng = np.random.default_rng(0)
        for first in range(0, n, 2**16):
            bag[first : first + 2**16] = rng.standard_normal((min(2**16, n - first), 512), np.float32)
        bag.flush()
    return path


def bag(arguments: argparse.Namespace) -> dict[str, Any]:
    """A million tokens of features from a file, the tokens between layers in a file."""
    path = features(arguments, arguments.tokens)
    began, start = time.perf_counter(), peak_mib()
    source = np.load(path, mmap_mode="r")
    found = sansmax.stream(bag_network(arguments.layers), source, store="disk")
    result = {"tokens": arguments.tokens, "seconds": time.perf_counter() - began, "start_mib": start}
    return {**result, "peak_mib": peak_mib(), "logits": found.logits[0].tolist()}


def same(arguments: argparse.Namespace) -> dict[str, Any]:
    """The difference of a stream from the forward pass in memory, on a bag that fits."""
    some = np.load(features(arguments, arguments.tokens), mmap_mode="r")[:20_000]
    model = bag_network(arguments.layers)
    with torch.no_grad():
        whole = model(torch.from_numpy(np.array(some)).float()[None])
    found = sansmax.stream(model, some, store="disk").logits
    difference = float((found - whole).abs().max() / whole.abs().max())
    return {"tokens": len(some), "relative_difference": difference}


STAGES = {"train": train, "logits": logits, "scores": scores, "bag": bag, "same": same}


def report(arguments: argparse.Namespace) -> None:
    """Tables, page and picture from what the stages left."""
    found = {name: json.loads((arguments.folder / f"{name}.json").read_text()) for name in STAGES}
    lines = ["stage,what,value"]
    for stage, values in found.items():
        lines += [f"{stage},{k},{v}" for k, v in values.items() if not isinstance(v, list)]
    write_text(arguments.output / "gigapixel.csv", "\n".join(lines) + "\n")
    write_text(arguments.output / "gigapixel.md", page(arguments, found))
    picture(arguments)


def page(arguments: argparse.Namespace, found: dict[str, Any]) -> str:
    """The results in words."""
    a, b, c, d, e = (found[name] for name in ("logits", "scores", "bag", "same", "train"))
    here = environment()
    rows = [
        ("slide", f"{arguments.size:,} x {arguments.size:,} px, read at {MPP:g} micrometre per pixel"),
        ("tokens with tissue", f"{a['tokens']:,} patches of 16 px, {arguments.layers} layers, 192 channels"),
        ("logits: peak of the process", f"{a['peak_mib']:,.0f} MiB ({a['start_mib']:,.0f} before the slide)"),
        ("logits: seconds", f"{a['seconds']:.0f}, of which reading and embedding {a['reading_seconds']:.0f}"),
        ("layers against their bare products", f"{a['layers_seconds']:.0f} s / {a['products_seconds']:.0f} s = "
         f"{a['ratio']:.2f}"),
        ("scores: peak of the process", f"{b['peak_mib']:,.0f} MiB (tokens in files, products in bfloat16)"),
        ("probability of planted tissue", f"{b['probability']:.4f}"),
        ("AUROC of scores, tokens", f"{b['auroc_tokens']:.4f} ({b['planted_tokens']:,} planted)"),
        ("AUROC of scores, tiles of 256 px",
         f"{b['auroc_tiles']:.4f} ({b['planted_tiles']} of {b['tiles']:,} planted)"),
        ("planted among as many best tiles", f"{100 * b['planted_in_top']:.0f} %"),
        ("bag: peak of the process, seconds",
         f"{c['tokens']:,} tokens: {c['peak_mib']:,.0f} MiB, {c['seconds']:.0f} s"),
        ("bag: stream against memory", f"{d['relative_difference']:.1e} of the logits, {d['tokens']:,} tokens"),
        ("training", f"{e['seconds']:.0f} s, accuracy on pictures of unseen tiles {100 * e['accuracy']:.1f} %"),
    ]  # fmt: skip
    table = "\n".join(["| what | measured |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in rows)])
    return (
        "# Ten gigapixel on one machine\n\n"
        f"{here['machine']}, {arguments.threads} threads, torch {here['torch']}. Peaks are those of whole processes, "
        "Python and PyTorch included. The slide is synthetic: its planted regions are known, and its two tissues are "
        "easy to tell apart; it says that the arithmetic works at this size, not how good a model is.\n\n"
        f"{table}\n\n![scores over the slide](gigapixel.png)\n\n{do_it_again('benchmarks.gigapixel', here)}\n"
    )


def picture(arguments: argparse.Namespace) -> None:
    """Scores over the slide beside what was planted."""
    from sansmax.data.slides.opening import open_slide
    from sansmax.report.heatmap import heatmap

    saved = np.load(arguments.folder / "scores.npz")
    with open_slide(slide_path(arguments)) as slide:
        thumbnail, size = slide.thumbnail(1600), slide.size
    cell = max(size) / 400
    shape = (round(size[1] / cell), round(size[0] / cell))
    x, y = np.minimum((saved["xy"] / cell).astype(int), np.array(shape)[::-1] - 1).T
    place = y * shape[1] + x
    count = np.bincount(place, minlength=shape[0] * shape[1])
    with np.errstate(invalid="ignore"):
        mean = (np.bincount(place, saved["scores"], len(count)) / count).reshape(shape)
    truth = np.bincount(place, saved["truth"], len(count)).reshape(shape) > 0
    title = f"{len(x):,} tokens of a slide of {size[0]:,} x {size[1]:,} px"
    heatmap(thumbnail, mean, arguments.output / "gigapixel.png", truth, title=title, class_name="planted")


if __name__ == "__main__":
    main()
