"""Nested cross-validation of slide classifiers: every case is predicted once by networks that never saw it.

    found = cross_validate(config, bags, cases, "runs/er", folds=5)
    found.metrics.scores["auc"]

The targets of a test fold are not handed to training at all: it gets the cases of the other folds, with a part of them
to stop by and to choose by. They meet the predictions when these are written.

cross_validation.json   settings, versions, state
splits.csv, splits.json, splits_0.csv ...   the splits: ours, STAMP's, CLAM's
split-0/                the run of a fold; its patient-preds.csv, written last, says that the fold is done
patient-preds.csv       the out-of-fold predictions of all cases
metrics.json, summary.md, *.png
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.bags.cases import Cases
from sansmax.data.bags.fold import Fold
from sansmax.data.bags.folds import complete_folds, draw_folds, fold_notes, inner_folds
from sansmax.data.bags.split_files import write_splits
from sansmax.engine.compare_cases import Comparison, compare
from sansmax.engine.progress import Reporter
from sansmax.engine.run import environment, explained_disk, read_json, write_json
from sansmax.engine.stopping import Stopped
from sansmax.errors import InputError, listed
from sansmax.report.case_metrics import PRIMARY, CaseMetrics, sampler
from sansmax.report.case_predictions import CasePredictions, read_case_predictions, write_case_predictions
from sansmax.report.cross_validation import report_cross_validation

__all__ = ["Comparison", "CrossValidation", "Learner", "compare", "cross_validate"]

MARK = "cross_validation.json"
PREDS = "patient-preds.csv"
# what is left of a file whose writing was cut off
CUT_OFF = ".*.????????.*"
# fit(config, bags, cases, train ids, validation ids, folder): `cases` holds these two parts and no others
Fit = Callable[[Any, Any, Cases, Sequence[str], Sequence[str], Path, Reporter], None]
# predict(folder, bags, cases): `(n, outputs)` probabilities, values or risks; the targets of `cases` are blank
Predict = Callable[[Path, Any, Cases], np.ndarray]


@dataclass(frozen=True)
class Learner:
    """How networks are trained in a folder (taken up where a run is there) and predict from it."""

    fit: Fit
    predict: Predict


@dataclass(frozen=True)
class CrossValidation:
    """A finished cross-validation: the out-of-fold predictions, their scores, and those of each fold."""

    folder: Path
    predictions: CasePredictions
    metrics: CaseMetrics
    folds: tuple[CaseMetrics, ...]


def cross_validate(
    config: Any,
    bags: Any,
    cases: Cases,
    folder: str | Path,
    *,
    folds: int | Sequence[Fold] | None = None,
    val_share: float = 0.2,
    inner: int = 0,
    by_site: bool = False,
    seed: int = 0,
    resume: bool = False,
    reporter: Reporter | None = None,
    learner: Learner | None = None,
    command: str = "",
) -> CrossValidation:
    """Trains and tests on every fold, then measures all out-of-fold predictions together and writes the report.

    `folds` is how many are drawn, or the splits themselves; None takes those of the cases, or draws 5. `val_share` of
    the training patients stop the training. With `inner` folds instead, each of them stops one network, and a case is
    predicted by the mean of these networks. Of several configurations (a sequence) each fold tests only the one that
    is best on its own validation part. `resume` completes what a run that was stopped left, and trains no finished
    fold again. Raises InputError where the folder holds another run, or its settings, cases or splits differ.
    """
    configs = list(config) if isinstance(config, list | tuple) else [config]
    reporter, learner, folder = reporter or Reporter(quiet=True), learner or default_learner(), Path(folder)
    cases, notes = without_empty(bags, cases)
    splits = choose_folds(cases, folds, val_share, seed, by_site)
    if len(configs) > 1 and not inner and not all(fold.val for fold in splits):
        raise InputError(
            "choosing between configurations needs validation cases; give a val_share above 0, or inner folds"
        )
    notes += fold_notes(cases, splits)
    plan = Plan(configs, bags, cases, splits, inner, by_site, seed)
    with explained_disk(folder):
        start(folder, plan, resume, command)
        for k in range(len(splits)):
            if (folder / f"split-{k}" / PREDS).exists():
                continue
            reporter.say(f"split {k}, {k + 1} of {len(splits)}")
            try:
                run_fold(folder / f"split-{k}", plan, k, learner, reporter)
            except Stopped as e:
                # what goes on is the whole, not the fold
                raise Stopped(f"split {k}: {e.what}", folder) from None
        return finish(folder, plan, notes, reporter)


@dataclass(frozen=True)
class Plan:
    """What is to be done: the configurations to choose from, cases, splits, and how each is parted inside."""

    configs: Sequence[Any]
    bags: Any
    cases: Cases
    splits: tuple[Fold, ...]
    inner: int
    by_site: bool
    seed: int

    def settings(self) -> dict[str, Any]:
        """What a run that is taken up must share with this one, in plain values."""
        truth = {name: np.asarray(t).tolist() for name, t in zip(self.cases.ids, self.cases.targets, strict=True)}
        slides = dict(zip(self.cases.ids, self.cases.slides, strict=True))
        return {
            "task": self.cases.task,
            "target": list(self.cases.target),
            "classes": list(self.cases.classes),
            "configurations": [plain(config) for config in self.configs],
            "cases": digest([truth, slides]),
            "splits": digest([[list(f.train), list(f.val), list(f.test)] for f in self.splits]),
            "folds": len(self.splits),
            "inner folds": self.inner,
            "seed": self.seed,
        }


def plain(config: Any) -> Any:
    """A configuration as values that JSON holds."""
    dump = getattr(config, "model_dump", None)
    return json.loads(json.dumps(dump(mode="json") if dump else config, default=str))


def digest(value: Any) -> str:
    """A short fingerprint of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def without_empty(bags: Any, cases: Cases) -> tuple[Cases, list[str]]:
    """The cases that have any token, and a note that names the others."""
    empty = [n for n, own in zip(cases.ids, cases.slides, strict=True) if not sum(bags.length(s) for s in own)]
    if not empty:
        return cases, []
    kept = cases.take([name for name in cases.ids if name not in set(empty)])
    return kept, [f"{len(empty)} cases left out, their bags are empty: {listed(empty, 10)}"]


def choose_folds(
    cases: Cases, folds: int | Sequence[Fold] | None, val_share: float, seed: int, by_site: bool
) -> tuple[Fold, ...]:
    """The splits that were given, validation parts added, or drawn ones."""
    given = cases.folds if folds is None else () if isinstance(folds, int) else tuple(folds)
    if given:
        there = set(cases.ids)
        kept = [Fold(*(tuple(n for n in part if n in there) for part in (f.train, f.val, f.test))) for f in given]
        if untested := [k for k, fold in enumerate(kept) if not fold.test]:
            raise InputError(f"split {untested[0]} of those given has no test cases; give each split a test part")
        return complete_folds(cases, kept, val_share=val_share, seed=seed, by_site=by_site)
    count = folds if isinstance(folds, int) else 5
    return draw_folds(cases, count, val_share=val_share, seed=seed, by_site=by_site)


def start(folder: Path, plan: Plan, resume: bool, command: str) -> None:
    """Makes the folder with its settings and splits, or checks that it can be taken up."""
    there = (folder / MARK).is_file()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file; give a folder")
    if there and not resume:
        raise InputError(f"{folder} holds a cross-validation; complete it with --resume, or give another --output")
    if not there and folder.is_dir() and any(not p.match(CUT_OFF) for p in folder.iterdir()):
        raise InputError(
            f"{folder} is not empty and holds no cross-validation; give an empty or new folder to --output"
        )
    settings = plan.settings()
    if there:
        before = read_json(folder / MARK)["settings"]
        if differ := [k for k in settings if before.get(k) != settings[k]]:
            raise InputError(
                f"{folder} was started with other {listed(differ, 10)}; give the same again to complete it, or another "
                "--output"
            )
    else:
        info = {"settings": settings, "command": command, "environment": environment(), "state": "started"}
        write_json(folder / MARK, info)
    for partial in folder.glob(CUT_OFF):
        partial.unlink()
    # also when it is taken up: a kill may have come before the last of these files
    write_splits(plan.splits, plan.cases, folder)


def run_fold(folder: Path, plan: Plan, k: int, learner: Learner, reporter: Reporter) -> None:
    """Trains what one fold needs, chooses, predicts its test cases and writes their table, which ends the fold."""
    fold, cases = plan.splits[k], plan.cases
    parts = [Fold(fold.train, fold.val)]
    if plan.inner:
        parts = inner_folds(cases, fold, plan.inner, seed=plan.seed + 1 + k, by_site=plan.by_site)
    # from here to the predictions there are no test targets in reach
    inside = cases.take((*fold.train, *fold.val))
    test = cases.take(fold.test).without_targets()
    members: list[list[Path]] = []
    for c, config in enumerate(plan.configs):
        own = folder / f"choice-{c}" if len(plan.configs) > 1 else folder
        folders = [own / f"inner-{j}" if plan.inner else own for j in range(len(parts))]
        for part, run in zip(parts, folders, strict=True):
            learner.fit(config, plan.bags, inside.take((*part.train, *part.val)), part.train, part.val, run, reporter)
        members.append(folders)
    chosen = choose(members, parts, inside, plan, learner, folder) if len(members) > 1 else 0
    outputs = [np.asarray(learner.predict(run, plan.bags, test), np.float64) for run in members[chosen]]
    truth = cases.take(fold.test)
    preds = predictions_of(truth, np.mean(outputs, axis=0), k)
    write_case_predictions(folder / PREDS, preds)


def choose(
    members: list[list[Path]], parts: Sequence[Fold], inside: Cases, plan: Plan, learner: Learner, folder: Path
) -> int:
    """The configuration with the best mean score on its validation parts; the first of equal ones."""
    name, sign = PRIMARY[inside.task]
    scores = []
    for folders in members:
        own = []
        for part, run in zip(parts, folders, strict=True):
            val = inside.take(part.val)
            outputs = np.asarray(learner.predict(run, plan.bags, val.without_targets()), np.float64)
            overall, _ = sampler(val.task, val.targets, outputs, list(val.classes), None)(np.ones((len(val), 1)))
            own.append(float(overall[name][0]))
        # a validation part without both classes has no say
        scores.append(float(np.nanmean(own)) if np.isfinite(own).any() else float("nan"))
    if not np.isfinite(scores).any():
        raise InputError(f"no configuration can be chosen: {name} is not defined on the validation parts; enlarge them")
    best = int(np.nanargmax(sign * np.array(scores)))
    shown = [None if np.isnan(s) else s for s in scores]
    write_json(folder / "choice.json", {"score": name, "scores": shown, "chosen": best})
    return best


def predictions_of(truth: Cases, outputs: np.ndarray, fold: int) -> CasePredictions:
    """Predictions beside what is true."""
    if outputs.shape != (len(truth), truth.outputs):
        raise AssertionError(f"predictions of shape {outputs.shape} for {len(truth)} cases of {truth.outputs} outputs")
    return CasePredictions(
        truth.task,
        truth.target,
        truth.classes,
        truth.ids,
        truth.targets,
        outputs,
        np.full(len(truth), fold, dtype=np.int64),
        truth.patients,
    )


def finish(folder: Path, plan: Plan, notes: list[str], reporter: Reporter) -> CrossValidation:
    """Joins the tables of the folds, measures, writes the report, and marks the run as finished."""
    cases = plan.cases
    parts = [
        read_case_predictions(folder / f"split-{k}" / PREDS, cases.task, cases.target, cases.classes)
        for k in range(len(plan.splits))
    ]
    preds = CasePredictions.joined(parts)
    write_case_predictions(folder / PREDS, preds)
    info = read_json(folder / MARK)
    lines = [*cases.notes, *notes]
    reporter.say("measuring, drawing pictures and writing summary.md")
    metrics, each = report_cross_validation(folder, preds, lines, info)
    write_json(folder / MARK, {**info, "state": "finished"})
    return CrossValidation(folder, preds, metrics, each)


def default_learner() -> Learner:
    """Training and prediction of this package's slide classifiers."""
    # Lightning is loaded by what trains, not by what compares
    from sansmax.engine.bag_train import fit_or_resume, predict_run

    return Learner(fit_or_resume, predict_run)
