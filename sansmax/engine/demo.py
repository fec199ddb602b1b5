"""The main job from end to end on digit mosaics, with nothing but what the package brings.

Train a sequence-normalised vision transformer, keep the best weights, evaluate once on digits never seen, classify
pictures of 4,096 x 4,096 px with the very same weights, draw what the network looks at beside the truth, and measure
what a softmax twin costs, what logistic regression reaches, and what is lost when the pictures are reduced.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from sansmax.data.mosaics import DigitMosaics, open_mosaics
from sansmax.data.sets import LabelledImages
from sansmax.engine.config import TrainConfig, load_config
from sansmax.engine.evaluate import probabilities_of
from sansmax.engine.predict import NATIVE, Predictor
from sansmax.engine.progress import Reporter
from sansmax.engine.run import Run, is_run, prepare_folder, write_json
from sansmax.engine.scaling import measure_scaling
from sansmax.engine.train import train
from sansmax.report.metrics import Metrics, compare_paired, measure
from sansmax.report.resample import Interval

MODEL = "seqnorm_vit_pico_patch8_128"
REDUCTION = 4


@dataclass(frozen=True)
class Plan:
    """How much of everything; `quick` has every step and is too short to be good."""

    train: int = 2000
    val: int = 300
    test: int = 1000
    epochs: int = 20
    large: int = 20
    large_cells: int = 512
    explained: int = 50
    sizes: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    budget_seconds: float = 20.0

    @classmethod
    def quick(cls) -> "Plan":
        """Every step in short."""
        return cls(200, 50, 100, 1, 2, 64, 5, (128, 256, 512), 2.0)


@dataclass(frozen=True)
class Large:
    """One large picture: what it shows, what the network says."""

    label: int
    predicted: int
    probability: float
    seconds: float


def demo_config(plan: Plan, seed: int) -> TrainConfig:
    """The configuration of the demo's network."""
    return load_config(
        None,
        {
            "data.source": f"mosaics:train={plan.train},val={plan.val},test={plan.test},seed={seed}",
            "data.image_size": 128,
            "data.in_chans": 1,
            "model.name": MODEL,
            "epochs": plan.epochs,
            "batch_size": 32,
            "seed": seed,
            "augment.hflip": 0.0,
            "optim.lr": 3e-3,
            # random quarters of the tokens: faster, and every cell has to carry its own evidence
            "model.options.patch_drop_rate": 0.75,
            "device": "cpu",
        },
    )


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    """The configuration with other values; sections are joined to keys by two underscores."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    values = config.model_dump()
    for key, value in dotted.items():
        section, name = key.split(".", 1)
        values[section][name] = value
    return TrainConfig.model_validate(values)


def run_demo(
    output: str | Path,
    *,
    seed: int = 0,
    quick: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """Runs the demo into the folder `output` and returns it; see summary.md there.

    The accuracies are the same digits for the same seed, machine and versions; times are what the machine gives. A
    demo that was stopped goes on with `resume`.
    """
    from sansmax.engine.demo_page import write_page

    output, reporter = Path(output), reporter or Reporter(quiet=True)
    if not resume:
        prepare_folder(output, overwrite=overwrite, resume=False)
    plan = Plan.quick() if quick else Plan()
    config = demo_config(plan, seed)
    size = 128 // REDUCTION
    stages = {
        "softmax_twin": changed(config, model__options={**config.model.options, "attention": "softmax"}),
        "reduced": changed(config, data__image_size=size),
    }
    reporter.say("1/6  training on digit mosaics of 128 x 128 px", style="bold")
    run = _stage(config, output, reporter)
    reporter.say("2/6  training a softmax twin: the same network but for its attention", style="bold")
    twin = _stage(stages["softmax_twin"], output / "softmax_twin", reporter)
    reporter.say(f"3/6  training the same network on the pictures reduced to {size} x {size} px", style="bold")
    reduced = _stage(stages["reduced"], output / "reduced", reporter)
    reporter.say("4/6  logistic regression on the pixels", style="bold")
    data = open_mosaics(config.data.source)
    results = {"sequence norm": _test_probabilities(run), "softmax twin": _test_probabilities(twin)}
    results["logistic regression"] = logistic_regression(data, reporter)
    results[f"reduced to {size} px"] = _test_probabilities(reduced)
    reporter.say(
        f"5/6  pictures of {8 * plan.large_cells:,} px, {plan.large_cells**2:,} tokens, without retraining",
        style="bold",
    )
    predictor = Predictor.of(run, "cpu")
    large = large_pictures(predictor, plan, seed, reporter)
    reporter.say("6/6  time and memory against the size of the picture", style="bold")
    scaling = measure_scaling(MODEL, plan.sizes, budget_seconds=plan.budget_seconds, reporter=reporter)
    assert data.test is not None
    metrics = {name: measure(data.test.labels, p, data.classes, ordered=False) for name, p in results.items()}
    differences = _differences(data.test.labels, results, data.classes)
    pointing = pointing_score(predictor, data, plan.explained)
    write_json(output / "demo.json", _record(plan, metrics, differences, large, scaling, pointing))
    write_page(run, data, plan, results, metrics, differences, large, scaling, pointing, predictor, reporter)
    return output


def _stage(config: TrainConfig, folder: Path, reporter: Reporter) -> Run:
    """Trains, goes on training, or takes the finished run that is there."""
    if not is_run(folder):
        return train(config, folder, command="sansmax demo", reporter=reporter)
    run = Run.open(folder)
    return run if run.info["state"] == "finished" else train(config, folder, resume=True, reporter=reporter)


def _test_probabilities(run: Run) -> np.ndarray:
    data = open_mosaics(run.config.data.source)
    assert data.test is not None
    return probabilities_of(Predictor.of(run, "cpu"), data.test)


def logistic_regression(data: LabelledImages, reporter: Reporter) -> np.ndarray:
    """Probabilities of the test images by scikit-learn's logistic regression on all pixels."""
    from sklearn.linear_model import LogisticRegression

    assert data.train is not None and data.test is not None

    def pixels(images: Any) -> np.ndarray:
        return np.stack([images.read(i).ravel() for i in range(len(images))]).astype(np.float32) / 255 - 0.3

    model = LogisticRegression(C=1e-3, max_iter=300, tol=1e-3)
    with reporter.bar("fitting"):
        model.fit(pixels(data.train), data.train.labels)
        return model.predict_proba(pixels(data.test)).astype(np.float64)


def large_pictures(predictor: Predictor, plan: Plan, seed: int, reporter: Reporter) -> list[Large]:
    """The network's answers for large mosaics of digits it never saw, in chunks of tokens."""
    pictures = DigitMosaics("test", plan.large, grid=plan.large_cells, seed=seed)
    answers = []
    with reporter.bar("large pictures") as bar:
        for i in range(plan.large):
            pixels = pictures.read(i)
            start = time.perf_counter()
            p = predictor(pixels, image_size=NATIVE, chunk_tokens=16384).probabilities
            seconds = time.perf_counter() - start
            answers.append(Large(int(pictures.labels[i]), int(p.argmax()), float(p.max()), seconds))
            bar.update(i + 1, plan.large)
    right = sum(a.label == a.predicted for a in answers)
    reporter.say(f"{right} of {plan.large} right, {np.median([a.seconds for a in answers]):.1f} s each")
    return answers


def pointing_score(predictor: Predictor, data: LabelledImages, count: int) -> float:
    """How well scores tell the cells of the label from the others: area under the ROC curve, mean over pictures."""
    images = data.test
    assert isinstance(images, DigitMosaics)
    areas = []
    for i in range(min(count, len(images))):
        scores = predictor(images.read(i), scores=int(images.labels[i])).scores
        assert scores is not None
        areas.append(roc_auc_score((images.truth(i) == images.labels[i]).ravel(), scores.ravel()))
    return float(np.mean(areas))


def _differences(labels: np.ndarray, results: dict[str, np.ndarray], classes: tuple[str, ...]) -> dict[str, Interval]:
    first, *others = results
    return {name: compare_paired(labels, results[first], results[name], classes)["accuracy"] for name in others}


def _record(
    plan: Plan,
    metrics: dict[str, Metrics],
    differences: dict[str, Interval],
    large: list[Large],
    scaling: list[dict[str, Any]],
    pointing: float,
) -> dict[str, Any]:
    return {
        "plan": vars(plan),
        "metrics": {name: m.to_dict() for name, m in metrics.items()},
        "accuracy_differences": {name: i.to_dict() for name, i in differences.items()},
        "large": [vars(a) for a in large],
        "scaling": scaling,
        "pointing_auc": pointing,
    }
