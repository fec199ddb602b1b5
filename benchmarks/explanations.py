"""Do scores point at the right tokens, are they true of the network, and what does that cost in accuracy?

    OMP_NUM_THREADS=1 python -m benchmarks.explanations

Two tasks whose true tokens are known. Digit mosaics: 256 patches, one digit fills a quarter of them (trained on mosaics
of 64 patches). Planted bags: 300 features of which 2 to 10 % carry the class, among clusters that say nothing. Networks
of each mechanism, of some depths and pooling heads, are trained plainly, on random subsets of the tokens, and on
subsets with label smoothing, with three seeds, and measured on data never seen: accuracy, area under the ROC curve of
the scores against the true tokens, correlation of the scores with truly removing tokens, deletion and insertion. Writes
explanations.csv, explanations.md and explanations.png.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import sansmax  # noqa: F401  (registers the networks)
from benchmarks.machine import do_it_again
from sansmax.data.mosaics import DigitMosaics
from sansmax.engine.explain import bag_scores, token_scores
from sansmax.engine.faithfulness import Faithfulness, bag_answer, faithfulness, image_answer, mean_curves
from sansmax.engine.run import environment
from sansmax.report.deletion import deletion_picture
from sansmax.report.summary import table, write_summary
from sansmax.report.tables import write_rows

# the weight of a token that is removed from a bag: none, but the stretches that SOFT averages stay as they are
ABSENT = 1e-12
# small mosaics to train on, a quarter of the patches of those that are measured: nothing here depends on their number
TRAINED_ON = {"grid": 8, "share": 0.3}
KEPT_OF_MOSAICS, KEPT_OF_BAGS = (0.25, 1.0), (0.1, 0.6)
COLUMNS = ("task", "network", "head", "layers", "training", "seed", "accuracy", "auroc", "correlation")
COLUMNS += ("relative_error", "deletion", "random_deletion", "insertion", "random_insertion", "seconds")
BOTH = "subsets, smoothing"
PICTURE_OF = ("planted bags", "seqnorm", 2, BOTH)
WIDTH, CLASSES, CLUSTERS, TOKENS = 64, 4, 24, 300
# a quarter of the networks' own width: a table of 60 trainings in minutes
NARROW = {"embed_dim": 64}
NOTE = (
    "*subsets*: each training step sees a random share of the tokens, drawn anew: 25 to 100 % of a mosaic, 10 to 60 % "
    "of a bag. *smoothing*: label smoothing of 0.1. *plain*: neither. *AUROC*: scores of the true class against the "
    "true tokens, mean over test pictures or bags; 0.5 is chance. *Correlation*: scores against the change of the "
    "log-odds when tokens are truly removed, one at a time; the lowest of all. *Deletion*, *insertion*: mean log-odds "
    "while tokens are removed or added by score, less the same in random order. Medians over the seeds where nothing "
    "else is said. Tokens of bags are removed by a weight of 1e-12, so that the landmarks of SOFT stay means of the "
    "same tokens; by a mask they are grouped anew, and the correlation of SOFT falls to 0.7 to 0.96."
)


@dataclass(frozen=True)
class Variant:
    """One network and one way to train it."""

    task: str
    network: str
    layers: int
    training: str = "plain"
    head: str = "mean"
    model: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def subsets(self) -> bool:
        """Whether each step sees a random share of the tokens."""
        return "subsets" in self.training

    @property
    def smoothing(self) -> float:
        """Label smoothing: the network is not rewarded for being ever more certain."""
        return 0.1 if "smoothing" in self.training else 0.0


def variants() -> list[Variant]:
    """What is compared."""
    of = {
        "seqnorm": ((2, "plain"), (2, "subsets"), (2, BOTH), (1, "plain"), (1, BOTH), (0, "plain")),
        "sima": ((2, "plain"), (2, BOTH), (1, BOTH)),
        "soft": ((2, "plain"), (2, BOTH), (1, "plain")),
        "abmil": ((0, "plain"),),
    }
    bags = [_of_bags(name, *how) for name, kinds in of.items() for how in kinds]
    mosaic = functools.partial(Variant, "digit mosaics", model="seqnorm_vit_pico_patch8_128")
    token = {"class_token": True, "global_pool": "token"}
    sima = {"attention": "sima", "attn_options": {"reference_tokens": 64}}
    mosaics = [mosaic("seqnorm", 3, training) for training in ("plain", BOTH)]
    mosaics += [mosaic("seqnorm", 1, training) for training in ("plain", BOTH)]
    mosaics += [mosaic("seqnorm", 3, training, "class token", options=token) for training in ("plain", BOTH)]
    mosaics += [mosaic("sima", 3, training, options=sima) for training in ("plain", BOTH)]
    return bags + mosaics


def _of_bags(name: str, layers: int, training: str) -> Variant:
    head = "gated attention" if name == "abmil" else "mean"
    options = NARROW if name == "abmil" else {**NARROW, "depth": layers}
    return Variant("planted bags", name, layers, training, head, f"{name}_slide_small", options)


# Digit mosaics


@dataclass(frozen=True)
class Plan:
    """How much is trained and measured."""

    mosaics: int = 1500
    epochs: int = 7
    bags: int = 240
    bag_epochs: int = 10
    tested: int = 100
    explained: int = 20
    removed: int = 48
    curves: int = 3


@functools.lru_cache(maxsize=2)
def mosaic_pixels(split: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (n, 1, 8 cells, 8 cells) from -1 to 1, labels, and which patches show the label (n, cells^2)."""
    images = DigitMosaics(split, count, seed=seed, **(TRAINED_ON if split == "train" else {}))
    pixels = torch.from_numpy(np.stack([images.read(i) for i in range(count)])).float() / 127.5 - 1
    truth = np.stack([images.truth(i).ravel() == images.labels[i] for i in range(count)])
    return pixels[:, None], torch.from_numpy(np.asarray(images.labels)).long(), torch.from_numpy(truth)


def train_mosaics(variant: Variant, plan: Plan, seed: int) -> nn.Module:
    """A network trained on mosaics, in evaluation mode."""
    torch.manual_seed(seed)
    rate = 0.5 if variant.subsets else 0.0
    model = timm.create_model(variant.model, depth=variant.layers, patch_drop_rate=rate, **variant.options)
    pixels, labels, _ = mosaic_pixels("train", plan.mosaics, seed)
    rng = np.random.default_rng(seed)

    def batches() -> Iterator[tuple[Callable[[], Tensor], Tensor]]:
        for part in torch.from_numpy(rng.permutation(len(pixels))).split(32):
            if variant.subsets:
                model.patch_drop.prob = 1 - rng.uniform(*KEPT_OF_MOSAICS)  # pyright: ignore
            yield (lambda p=part: model(pixels[p])), labels[part]

    fit(model, batches, plan.epochs, len(pixels) // 32 + 1, lr=3e-3, smoothing=variant.smoothing)
    return model.eval()


def measure_mosaics(model: Any, plan: Plan, seed: int) -> tuple[float, float, list[Faithfulness]]:
    """Accuracy, AUROC of the scores, and their faithfulness, on digits never seen."""
    pixels, labels, truth = mosaic_pixels("test", plan.tested, seed)
    with torch.no_grad():
        right = torch.cat([model(p).argmax(1) for p in pixels.split(50)]) == labels
    areas, results = [], []
    for i in range(plan.explained):
        scores = token_scores(model, pixels[i : i + 1], [int(labels[i])])[0].flatten().double().numpy()
        areas.append(roc_auc_score(truth[i].numpy(), scores))
        if i < plan.curves:
            answer = image_answer(model, pixels[i : i + 1], int(labels[i]))
            results.append(faithfulness(f"mosaic {i}", answer, scores, removed=plan.removed, seed=seed))
    return float(right.double().mean()), float(np.mean(areas)), results


# Planted bags


@dataclass(frozen=True)
class PlantedBag:
    """Features (n, 64), which tokens carry the class, and the class."""

    features: Tensor
    truth: np.ndarray
    label: int


def planted_bags(count: int, seed: int, stream: int) -> list[PlantedBag]:
    """Bags of 300 tokens: clusters that every bag draws in its own shares, and 2 to 10 % of its class's own.

    The directions of clusters and classes depend on `seed` alone, the bags on `stream` (training or test), too.
    """
    fixed = np.random.default_rng([seed, 99])
    centres = 1.2 * fixed.standard_normal((CLUSTERS, WIDTH))
    planted = 1.2 * fixed.standard_normal((CLASSES, WIDTH))
    rng = np.random.default_rng([seed, stream])
    bags = []
    for i in range(count):
        n, label = TOKENS, i % CLASSES
        cluster = rng.choice(CLUSTERS, n, p=rng.dirichlet(np.full(CLUSTERS, 0.5)))
        truth = np.zeros(n, bool)
        truth[rng.choice(n, max(3, round(rng.uniform(0.02, 0.1) * n)), replace=False)] = True
        features = np.where(truth[:, None], planted[label], centres[cluster]) + rng.standard_normal((n, WIDTH))
        bags.append(PlantedBag(torch.from_numpy(features).float(), truth, label))
    return bags


def train_bags(variant: Variant, plan: Plan, seed: int) -> nn.Module:
    """A slide classifier trained on planted bags, 8 bags a step, in evaluation mode."""
    torch.manual_seed(seed)
    model = timm.create_model(variant.model, in_features=WIDTH, num_classes=CLASSES, **variant.options)
    bags, rng = planted_bags(plan.bags, seed, 0), np.random.default_rng(seed)
    features, labels = torch.stack([bag.features for bag in bags]), torch.tensor([bag.label for bag in bags])

    def batches() -> Iterator[tuple[Callable[[], Tensor], Tensor]]:
        for part in torch.from_numpy(rng.permutation(len(bags))).split(8):
            x = features[part]
            if variant.subsets:
                kept = rng.permuted(np.tile(np.arange(TOKENS), (len(part), 1)), axis=1)
                kept = torch.from_numpy(kept[:, : round(rng.uniform(*KEPT_OF_BAGS) * TOKENS)])
                x = x.gather(1, kept[..., None].expand(-1, -1, WIDTH))
            yield (lambda x=x: model(x)), labels[part]

    fit(model, batches, plan.bag_epochs, len(bags) // 8, lr=4e-3, smoothing=variant.smoothing)
    return model.eval()


def measure_bags(model: Any, plan: Plan, seed: int) -> tuple[float, float, list[Faithfulness]]:
    """As `measure_mosaics`, on bags never seen."""
    bags = planted_bags(plan.tested, seed, 1)
    with torch.no_grad():
        right = [int(model(bag.features[None]).argmax()) == bag.label for bag in bags]
    areas, results = [], []
    for i, bag in enumerate(bags[: plan.explained]):
        scores = bag_scores(model, bag.features, None, bag.label).double().numpy()
        areas.append(roc_auc_score(bag.truth, scores))
        if i < plan.curves:
            answer = bag_answer(model, bag.features, None, bag.label, absent=ABSENT)
            results.append(faithfulness(f"bag {i}", answer, scores, removed=plan.removed, seed=seed))
    return float(np.mean(right)), float(np.mean(areas)), results


def fit(
    model: nn.Module,
    batches: Callable[[], Iterator[tuple[Callable[[], Tensor], Tensor]]],
    epochs: int,
    steps: int,
    lr: float,
    smoothing: float = 0.0,
) -> None:
    """AdamW with one cycle of the learning rate; cross entropy."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=epochs * steps + 1, pct_start=0.15)
    model.train()
    for _ in range(epochs):
        for forward, labels in batches():
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(forward(), labels, label_smoothing=smoothing).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()


# The table


def measure(variant: Variant, plan: Plan, seed: int) -> tuple[dict[str, Any], list[Faithfulness]]:
    """One row of explanations.csv, and the curves behind it."""
    start = time.perf_counter()
    mosaics = variant.task == "digit mosaics"
    model = (train_mosaics if mosaics else train_bags)(variant, plan, seed)
    seconds = time.perf_counter() - start
    accuracy, auroc, results = (measure_mosaics if mosaics else measure_bags)(model, plan, seed)
    areas = [r.curves.areas() for r in results]
    means = {name: statistics.fmean(a[name] for a in areas) for name in areas[0]}
    row = {
        "task": variant.task,
        "network": variant.network,
        "head": variant.head,
        "layers": variant.layers,
        "training": variant.training,
        "seed": seed,
        "accuracy": accuracy,
        "auroc": auroc,
        "correlation": min(r.removal.correlation for r in results),
        "relative_error": statistics.fmean(r.removal.relative_error for r in results),
        **means,
        "seconds": seconds,
    }
    return row, results


def summary_rows(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """A line per variant."""
    keys = list(dict.fromkeys(tuple(row[k] for k in COLUMNS[:5]) for row in rows))
    lines = []
    for key in keys:
        own = [row for row in rows if tuple(row[k] for k in COLUMNS[:5]) == key]

        def median(name: str, own: list[dict[str, Any]] = own) -> float:
            return statistics.median(row[name] for row in own)

        gained = [median(name) - median(f"random_{name}") for name in ("deletion", "insertion")]
        lines.append(
            [
                *key,
                f"{100 * median('accuracy'):.1f} %",
                f"{median('auroc'):.3f}",
                f"{min(row['correlation'] for row in own):.4f}",
                *(f"{g:+.2f}" for g in gained),
                len(own),
                f"{median('seconds'):.0f} s",
            ]
        )
    return lines


HEADS = [*COLUMNS[:5], "accuracy", "AUROC", "correlation", "deletion", "insertion", "seeds", "time"]


def main() -> None:
    """Trains, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--task", choices=("mosaics", "bags", "both"), default="both")
    parser.add_argument("--mosaics", type=int, default=Plan.mosaics, help="training mosaics")
    parser.add_argument("--epochs", type=int, default=Plan.epochs, help="epochs over the mosaics")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    plan = Plan(mosaics=arguments.mosaics, epochs=arguments.epochs)
    rows, shown = [], []
    for seed in arguments.seeds:
        for variant in variants():
            if arguments.task not in ("both", variant.task.split()[1]):
                continue
            row, results = measure(variant, plan, seed)
            rows.append(row)
            if (variant.task, variant.network, variant.layers, variant.training) == PICTURE_OF:
                shown += results
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            # each time: what is there stays when the rest is stopped
            write_page(arguments.output, rows, shown)
    print(table(HEADS, summary_rows(rows)))


def write_page(folder: Path, rows: list[dict[str, Any]], shown: list[Faithfulness]) -> None:
    """explanations.csv, .md and .png."""
    rows = sorted(rows, key=lambda row: row["task"])
    write_rows(folder / "explanations.csv", COLUMNS, rows)
    text = table(HEADS, summary_rows(rows)) + "\n\n" + NOTE
    if shown:
        title = "Planted bags, sequence norm, subsets and smoothing"
        deletion_picture(mean_curves(shown), folder / "explanations.png", title=title)
        text += "\n\n![Deletion and insertion curves](explanations.png)"
    again = do_it_again("benchmarks.explanations", environment())
    write_summary(folder / "explanations.md", "Explanations", [("", text), ("Do it again", again)])


if __name__ == "__main__":
    main()
