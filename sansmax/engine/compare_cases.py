"""Two cross-validations of the same patients against each other."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sansmax.engine.bag_run import is_bag_run
from sansmax.engine.run import read_json
from sansmax.errors import InputError, listed
from sansmax.report.case_metrics import TITLES, compare_cases
from sansmax.report.case_predictions import CasePredictions, read_case_predictions
from sansmax.report.delong import DeLong, delong_test
from sansmax.report.metrics import RESAMPLES
from sansmax.report.resample import Interval
from sansmax.report.summary import interval_text

PREDS = "patient-preds.csv"


@dataclass(frozen=True)
class Comparison:
    """Run a against run b on the cases that both predicted.

    `differences` are "a minus b" of every score, with 95 % intervals over the same resamples of patients for both.
    `delong` holds DeLong's paired test of each class (of two classes the last) or label; it is empty where a patient
    has several cases, since the test is for independent ones, and for regression and survival.
    """

    cases: int
    patients: int
    differences: Mapping[str, Interval]
    delong: Mapping[str, DeLong]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """A line per score, then a line per test."""
        lines = [f"a minus b on {self.cases:,} cases of {self.patients:,} patients, 95 % intervals:"]
        lines += [f"  {TITLES[name]} {interval_text(d, percent=False)}" for name, d in self.differences.items()]
        for name, test in self.delong.items():
            gap = interval_text(test.difference, percent=False)
            lines.append(f"  DeLong, {name}: {test.auc_a:.3f} - {test.auc_b:.3f} = {gap}, p = {test.p:.3g}")
        return "\n".join([*lines, *self.notes])


def compare(run_a: str | Path, run_b: str | Path, *, resamples: int = RESAMPLES, seed: int = 0) -> Comparison:
    """Compares the predictions of two finished cross-validations, or of two runs on bags, case by case.

    Raises InputError where they are of other tasks, targets or classes, where the same case has two truths, and where
    they share no case. Cases that only one of them has are left out with a note.
    """
    a, b = open_predictions(run_a), open_predictions(run_b)
    for what in ("task", "target", "classes"):
        of_a, of_b = getattr(a, what), getattr(b, what)
        if of_a != of_b:
            raise InputError(
                f"the runs have different {what}: {of_a} in {run_a}, {of_b} in {run_b}; compare runs of the same labels"
            )
    a, b, notes = on_the_same(a, b)
    differences = compare_cases(
        a.task,
        a.targets,
        a.predictions,
        b.predictions,
        a.classes,
        groups=a.groups,
        folds_a=a.folds,
        folds_b=b.folds,
        resamples=resamples,
        seed=seed,
    )
    tests, more = paired_tests(a, b)
    return Comparison(len(a.ids), len(set(a.groups)), differences, tests, (*notes, *more))


def open_predictions(run: str | Path) -> CasePredictions:
    """The out-of-fold predictions of a finished cross-validation, or those of one run on bags for its test cases."""
    run = Path(run)
    mark = run / "cross_validation.json"
    if is_bag_run(run):
        info = read_json(run / "run.json")
        if not (run / PREDS).is_file():
            raise InputError(f"{run} has no {PREDS}: it is not finished; go on with --resume")
        return read_case_predictions(run / PREDS, info["task"], info["target"], info["classes"])
    if not mark.is_file():
        raise InputError(f"{run} is no cross-validation: it has no {mark.name}; `sansmax train` with --folds makes one")
    settings = read_json(mark)["settings"]
    return read_case_predictions(run / PREDS, settings["task"], settings["target"], settings["classes"])


def on_the_same(a: CasePredictions, b: CasePredictions) -> tuple[CasePredictions, CasePredictions, list[str]]:
    """Both on the cases that they share, in one order, with a note on the others."""
    place_a, place_b = places(a), places(b)
    shared = [key for key in place_a if key in place_b]
    if not shared:
        raise InputError(f"the runs share no case: one has {listed(a.ids, 3)}, the other {listed(b.ids, 3)}")
    alone = len(place_a) + len(place_b) - 2 * len(shared)
    notes = [f"{alone} predictions left out: only one of the runs has them"] if alone else []
    a, b = (p.pick(np.array([at[key] for key in shared])) for p, at in ((a, place_a), (b, place_b)))
    same = np.isclose(a.targets, b.targets, equal_nan=True)
    differ = np.flatnonzero(~same.reshape(len(shared), -1).all(axis=1))
    if differ.size:
        names = listed([a.ids[i] for i in differ], 10)
        raise InputError(f"{differ.size} cases have other targets in one run than in the other: {names}")
    return a, b, notes


def places(preds: CasePredictions) -> dict[tuple[str, int], int]:
    """The row of each prediction by its case and how often that was predicted before."""
    seen: Counter[str] = Counter()
    out = {}
    for i, name in enumerate(preds.ids):
        out[name, seen[name]] = i
        seen[name] += 1
    return out


def paired_tests(a: CasePredictions, b: CasePredictions) -> tuple[dict[str, DeLong], list[str]]:
    """DeLong's test of each class or label for which it can be made, and why it cannot."""
    if a.task not in ("classification", "multilabel"):
        return {}, []
    if len(set(a.groups)) < len(a.groups):
        return {}, ["no DeLong test: patients have several cases, and it is for independent ones"]
    tests: dict[str, DeLong] = {}
    notes = []
    for i, name in chosen_classes(a.task, a.classes):
        truth = a.targets if a.task == "classification" else a.targets[:, i]
        known = np.isfinite(truth)
        positive = truth[known] == (i if a.task == "classification" else 1)
        try:
            tests[name] = delong_test(positive, a.predictions[known, i], b.predictions[known, i])
        except InputError as e:
            notes.append(f"{name}: {e}")
    return tests, notes


def chosen_classes(task: str, classes: Sequence[str]) -> list[tuple[int, str]]:
    """The classes to test: of two the last, since the first is its mirror image."""
    every = list(enumerate(classes))
    return every[1:] if task == "classification" and len(classes) == 2 else every
