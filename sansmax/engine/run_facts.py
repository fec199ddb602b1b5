"""What a run's page tells of its network, its settings, its cost and its errors, gathered from where it is known."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from sansmax.data.sets import ImageSet, LabelledImages
from sansmax.engine.build import num_parameters, patch_size, takes_mask
from sansmax.engine.config import TrainConfig, differences
from sansmax.engine.predict import Predictor, shown_picture
from sansmax.engine.run import METRICS, Run
from sansmax.engine.watching import JOURNAL
from sansmax.report.curves import duration
from sansmax.report.error_cases import error_case
from sansmax.report.html import Case
from sansmax.report.jsonl import read_lines
from sansmax.report.tables import read_rows

WORST = 12


def counts_of(data: LabelledImages) -> tuple[list[str], list[list[Any]]]:
    """Headers and rows: images of each class and split, and of all together."""
    counts = data.counts()
    rows: list[list[Any]] = [[name, *(int(n[c]) for n in counts.values())] for c, name in enumerate(data.classes)]
    return ["class", *counts], [*rows, ["all", *(int(n.sum()) for n in counts.values())]]


def model_of(run: Run, predictor: Predictor) -> dict[str, Any]:
    """The network: its parts, its input, and what one image takes."""
    network, (height, width) = predictor.network, run.preprocess.image_size
    said: dict[str, Any] = {"network": run.config.model.name, "parameters": num_parameters(network)}
    kinds = sorted({type(m).__name__ for m in network.modules() if type(m).__name__.endswith("Attention")})
    if kinds:
        said["attention"] = ", ".join(kinds)
    said["input"] = f"{height} x {width} px, {run.preprocess.in_chans} channel{'s' * (run.preprocess.in_chans > 1)}"
    if (patch := patch_size(network)) is not None:
        rows, columns = -(-height // patch[0]), -(-width // patch[1])
        said["tokens"] = f"{rows * columns:,} of {patch[0]} x {patch[1]} px ({rows} x {columns})"
    count = multiply_adds(predictor, (run.preprocess.in_chans, height, width))
    said["multiply-adds per image"] = f"{count / 1e9:,.2f} billion" if count >= 1e9 else f"{count / 1e6:,.2f} million"
    return said


@torch.no_grad()
def multiply_adds(predictor: Predictor, shape: tuple[int, int, int]) -> float:
    """Multiplications with addition that one image takes, in matrix products and convolutions."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        predictor.network(torch.zeros(1, *shape, device=predictor.device))
    # the counter takes a multiplication and an addition as two
    return counter.get_total_flops() / 2


def settings_of(config: TrainConfig) -> dict[str, str]:
    """Keys that are not the defaults, and their values."""
    changed = [line.partition(": ") for line in differences(TrainConfig(), config)]
    return {key: change.partition(" -> ")[2] for key, _, change in changed}


def cost_of(run: Run) -> dict[str, Any]:
    """What training took, from the rows of metrics.csv and the journal."""
    rows = read_rows(run.folder / METRICS)
    if not rows:
        return {}
    cost = {
        "epochs": rows[-1]["epoch"],
        "training time": duration(float(rows[-1]["seconds"])),
        "images per second": f"{np.median([r['images_per_second'] for r in rows]):.0f}",
    }
    held = [line["memory_mib"] for line in read_lines(run.folder / JOURNAL) if "memory_mib" in line]
    return {**cost, "peak memory": f"{max(held):,.0f} MiB"} if held else cost


def worst_errors(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Indices of wrongly classified images, the most confident first."""
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")][:WORST]


def in_words(label: int, probabilities: np.ndarray, classes: tuple[str, ...]) -> str:
    """What an image is, and what it is taken for."""
    said = int(probabilities.argmax())
    return f"{classes[label]} taken for {classes[said]} ({100 * probabilities[said]:.0f} %)"


def error_cases(
    predictor: Predictor, images: ImageSet, probabilities: np.ndarray, classes: tuple[str, ...]
) -> list[Case]:
    """The worst errors as pictures, coloured by what speaks for the wrong answer where the network weighs tokens."""
    cases = []
    weighs = takes_mask(predictor.network)
    for i in map(int, worst_errors(images.labels, probabilities)):
        pixels = images.read(i)
        said = int(probabilities[i].argmax())
        scores = predictor(pixels, scores=said, name=images.names[i]).scores if weighs else None
        text = in_words(int(images.labels[i]), probabilities[i], classes)
        cases.append(error_case(Path(images.names[i]).name, text, shown_picture(pixels, predictor.preprocess), scores))
    return cases
