"""Do heat maps of slide classifiers point at what was planted in the slides, with and without mixing in training?

    OMP_NUM_THREADS=1 python -m benchmarks.planted_slides

Draws slides, half of them with planted tissue, makes features of their tiles by an encoder with random weights, trains
slide classifiers on two thirds of them by the package's own training, and measures on the others: accuracy, area under
the ROC curve of the scores of tokens against the planted tiles, and the correlation of the scores with truly removing
tokens. Three seeds. Writes planted_slides.csv and planted_slides.md.
"""

import argparse
import csv
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.machine import do_it_again
from sansmax.data.bags.cases import read_cases
from sansmax.data.bags.folder import open_bags
from sansmax.data.slides.synthetic import read_planted, write_synthetic_slide
from sansmax.engine.bag_config import load_bag_config
from sansmax.engine.bag_train import fit_bags
from sansmax.engine.encoders import EncoderSpec
from sansmax.engine.explain import bag_scores
from sansmax.engine.faithfulness import bag_answer, faithfulness
from sansmax.engine.run import environment
from sansmax.engine.tokenize import tokenize
from sansmax.engine.tokenize_settings import Plan, TileSettings
from sansmax.files import write_text
from sansmax.report.summary import table
from sansmax.report.tables import write_rows

NETWORKS = ("seqnorm_slide_small", "sima_slide_small", "soft_slide_small", "abmil_slide_small")
COLUMNS = ("network", "mix", "seed", "accuracy", "auroc", "lowest_auroc", "correlation")
NOTE = (
    "*mix*: `tokens.mix`, the probability that a bag is mixed with another one of its step. *AUROC*: scores of the "
    "tokens of slides never seen against the planted tiles, mean over slides; 0.5 is chance, below it the map points "
    "away. "
    "*Correlation*: scores against truly removing tokens one at a time (by a weight of 1e-12), the lowest over slides. "
    "Medians over the seeds; the lowest correlation of all."
)


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--slides", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--folder", type=Path, default=Path("runs/planted_slides"), help="slides and features")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    return parser.parse_args()


def main() -> None:
    """Draws, tokenizes, trains, measures, writes."""
    arguments = parse()
    slides = draw(arguments)
    plan = Plan(
        arguments.folder / "job",
        EncoderSpec("resnet18.a1_in1k", pretrained=False),
        TileSettings(tile_px=256, tile_mpp=0.5),
        workers=1,
    )
    tokenize([str(p) for p in slides], plan)
    rows = []
    for seed in arguments.seeds:
        for name in arguments.networks:
            for mix in (0.0, 0.5):
                row = {"network": name, "mix": mix, "seed": seed, **measure(arguments, plan.output, name, mix, seed)}
                print(row, flush=True)
                rows.append(row)
    write_rows(arguments.output / "planted_slides.csv", COLUMNS, rows)
    write_text(arguments.output / "planted_slides.md", page(rows))


def draw(arguments: argparse.Namespace) -> list[Path]:
    """Slides of 4,096 px, every other one with planted tissue, and their table."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with (arguments.folder / "labels.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["case_id", "slide_id", "label"])
        for i in range(arguments.slides):
            path = arguments.folder / f"slide{i:02}.tif"
            planted: dict[str, Any] = {"planted": 4 * (i % 2), "planted_share": 0.1 * (i % 2)}
            if not path.exists():
                write_synthetic_slide(path, (4096, 4096), mpp=0.5, seed=i, **planted)
            rows.writerow([f"patient{i:02}", path.stem, ("plain", "planted")[i % 2]])
            paths.append(path)
    return paths


def measure(arguments: argparse.Namespace, job: Path, name: str, mix: float, seed: int) -> dict[str, Any]:
    """One training, measured on the slides that it has not seen."""
    bags = open_bags(job)
    cases = read_cases(arguments.folder / "labels.csv", bags.ids, task="classification")
    changes = {"model.name": name, "epochs": arguments.epochs, "tokens.mix": mix, "seed": seed, "monitor": "last"}
    ids, cut = cases.ids, 2 * len(cases.ids) // 3 // 2 * 2
    with tempfile.TemporaryDirectory() as folder:
        run = fit_bags(load_bag_config(None, changes), None, bags, cases, ids[:cut], ids[cut:], Path(folder) / "run")
        network, index = run.load_model(), run.classes.index("planted")
    right, areas, correlations = [], [], []
    for patient, (slide,) in zip(ids[cut:], cases.take(ids[cut:]).slides, strict=True):
        bag = bags.read(slide)
        features = torch.from_numpy(np.asarray(bag.features, np.float32))
        truth = read_planted(arguments.folder / f"{slide}.tif")
        with torch.no_grad():
            right.append((int(network(features[None]).argmax()) == index) == bool(truth.boxes))
        if truth.boxes:
            scores = bag_scores(network, features, None, index).double().numpy()
            areas.append(roc_auc_score(inside(np.asarray(bag.xy) + 128, truth.boxes), scores))
            answer = bag_answer(network, features, None, index, absent=1e-12)
            correlations.append(faithfulness(patient, answer, scores, removed=32, seed=seed).removal.correlation)
    return {
        "accuracy": float(np.mean(right)),
        "auroc": float(np.mean(areas)),
        "lowest_auroc": min(areas),
        "correlation": min(correlations),
    }


def inside(xy: np.ndarray, boxes: Any) -> np.ndarray:
    """Which places lie in one of the boxes (x, y, width, height)."""
    found = np.zeros(len(xy), bool)
    for x, y, w, h in boxes:
        found |= (xy[:, 0] >= x) & (xy[:, 0] < x + w) & (xy[:, 1] >= y) & (xy[:, 1] < y + h)
    return found


def page(rows: list[dict[str, Any]]) -> str:
    """The table, and how it comes about again."""
    lines = []
    for network, mix in dict.fromkeys((r["network"], r["mix"]) for r in rows):
        own = [r for r in rows if (r["network"], r["mix"]) == (network, mix)]
        median = {k: statistics.median(r[k] for r in own) for k in ("accuracy", "auroc")}
        lowest = min(r["lowest_auroc"] for r in own), min(r["correlation"] for r in own)
        lines.append(
            [network, mix, f"{100 * median['accuracy']:.1f} %", f"{median['auroc']:.3f}", f"{lowest[0]:.3f}",
             f"{lowest[1]:.4f}", len(own)]
        )  # fmt: skip
    head = ["network", "mix", "accuracy", "AUROC", "lowest AUROC of a slide", "correlation", "seeds"]
    again = do_it_again("benchmarks.planted_slides", environment())
    return f"# Heat maps of planted slides\n\n{table(head, lines)}\n\n{NOTE}\n\n## Do it again\n\n{again}\n"


if __name__ == "__main__":
    main()
