"""From a table of labels and a folder of bags to a run, or to a cross-validation; and a run measured on others.

A single split is drawn, or given: train, val and test patients. The targets of the test patients meet their
predictions when training is over.
"""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.bags.cases import Cases, read_cases
from sansmax.data.bags.fold import Fold
from sansmax.data.bags.folder import BagFolder, open_bags
from sansmax.data.bags.folds import complete_folds, draw_val
from sansmax.engine.bag_config import BagConfig, BagDataConfig
from sansmax.engine.bag_run import BagRun, build_slide_network
from sansmax.engine.bag_train import fit_bags, predict_run
from sansmax.engine.callbacks import METRICS
from sansmax.engine.cross_validate import MARK, CrossValidation, cross_validate, without_empty
from sansmax.engine.launch import spread
from sansmax.engine.place import check_alone
from sansmax.engine.processes import Processes
from sansmax.engine.progress import Reporter
from sansmax.engine.run import is_run, read_json
from sansmax.engine.trackers import check_trackers
from sansmax.engine.watching import send_results
from sansmax.errors import InputError
from sansmax.report.case_metrics import CaseMetrics
from sansmax.report.case_page import headline, report_cases
from sansmax.report.case_predictions import CasePredictions, write_case_predictions
from sansmax.report.tables import read_rows

PREDS = "patient-preds.csv"


def train_bags(
    config: BagConfig,
    output: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    command: str = "",
) -> BagRun | CrossValidation:
    """Trains on the bags and labels that the configuration names: one run, or a run per fold.

    With `data.folds`, or several given splits, a cross-validation (`sansmax.engine.cross_validate`); else a run whose
    folder also holds the predictions of the test patients, their scores and summary.md. With `resume` what was stopped
    is completed.

    Raises InputError for wrong input, and `Stopped` when asked to stop by Ctrl-C or SIGTERM (everything is saved).
    """
    output, reporter = Path(output), reporter or Reporter(quiet=True)
    how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "command": command}
    return spread("bags", config, output, reporter, _train_bags, **how) or BagRun.open(output)


def _train_bags(
    config: BagConfig,
    output: Path,
    processes: Processes,
    reporter: Reporter,
    *,
    resume: bool,
    overwrite: bool,
    command: str,
) -> BagRun | CrossValidation:
    """`train_bags`, as each of the processes does it; the first one alone writes."""
    bags, cases = open_experiment(config.data, reporter)
    # a missing tracker, a wrong name or argument of the network is said before anything is written
    check_trackers(config.track)
    build_slide_network(config.model.model_copy(update={"pretrained": False}), bags.width or 1, cases.outputs)
    how: dict[str, Any] = {"resume": resume, "reporter": reporter, "command": command}
    d = config.data
    if d.folds or len(cases.folds) > 1:
        check_alone(config.parallel)
        if overwrite:
            raise InputError("a cross-validation is not overwritten; remove its folder, or give another --output")
        shares = {"val_share": d.val_fraction, "by_site": d.by_site, "seed": config.seed}
        return cross_validate(config, bags, cases, output, folds=d.folds, **shares, **how)
    cases, notes = without_empty(bags, cases)
    fold = single_split(cases, d, config.seed)
    cases = replace(cases, notes=(*cases.notes, *notes))
    inside = cases.take((*fold.train, *fold.val))
    how |= {"overwrite": overwrite, "processes": processes}
    run = fit_bags(config, None, bags, inside, fold.train, fold.val, output, **how)
    processes.first(lambda: report_run(run, bags, cases, fold, reporter))
    return run


def open_experiment(data: BagDataConfig, reporter: Reporter) -> tuple[BagFolder, Cases]:
    """The bags and cases of a configuration; what was found is said.

    Raises InputError for what is missing or does not fit together.
    """
    if not data.bags or not data.labels:
        raise InputError("training on bags needs a table of labels and a folder of bags: LABELS --bags DIR")
    with reporter.bar("bags") as bar:
        bags = open_bags(data.bags, layout=data.layout, mpp=data.mpp, progress=bar)
    reporter.say(bags.note)
    columns = ("task", "label", "case_column", "slide_column", "time_column", "status_column", "site_column")
    others = ("slide_table", "classes", "splits", "per", "allow_missing")
    given = {name: getattr(data, name) for name in (*columns, *others)}
    cases = read_cases(data.labels, bags.ids, **given)
    for line in cases.notes:
        reporter.say(line)
    return bags, cases


def single_split(cases: Cases, data: BagDataConfig, seed: int) -> Fold:
    """The given split, a validation part added where it has none; or one drawn by patients."""
    shares = {"val_share": data.val_fraction, "by_site": data.by_site}
    if cases.folds:
        return complete_folds(cases, cases.folds, seed=seed, **shares)[0]
    outer = draw_val(cases, cases.ids, (), data.test_fraction, seed, data.by_site)
    return draw_val(cases, outer.train, outer.val, data.val_fraction, seed + 1, data.by_site)


def report_run(run: BagRun, bags: BagFolder, cases: Cases, fold: Fold, reporter: Reporter) -> CaseMetrics | None:
    """Predicts the test cases (without any, those of validation stand in) and writes predictions, scores and page."""
    part = "test" if fold.test else "validation"
    of = cases.take(fold.test or fold.val)
    if not len(of):
        reporter.say("there are no test or validation patients: no report is written")
        return None
    with reporter.bar(f"predicting {part}") as bar:
        said = predict_run(run, bags, of.without_targets(), progress=bar)
    preds = predictions_of(of, said)
    write_case_predictions(run.folder / PREDS, preds)
    info = {**run.info, "model": run.config.model.name, "monitor": run.config.monitor}
    rows = read_rows(run.folder / METRICS)
    metrics = report_cases(run.folder, preds, part, [bags.note, *cases.notes], info, rows)
    pictures = {path.stem: path for path in sorted(run.folder.glob("*.png"))}
    send_results(run.folder, run.config, {part: metrics.scores}, pictures, reporter.say)
    reporter.say(headline(metrics, part).replace("*", ""))
    return metrics


def predictions_of(cases: Cases, said: np.ndarray) -> CasePredictions:
    """Predictions of one network beside what is true."""
    zeros = np.zeros(len(cases), dtype=np.int64)
    what = (cases.task, cases.target, cases.classes, cases.ids, cases.targets, said, zeros, cases.patients)
    return CasePredictions(*what)


def evaluate_bags(
    run: str | Path | BagRun,
    labels: str | Path,
    bags: str | Path,
    *,
    output: str | Path | None = None,
    reporter: Reporter | None = None,
    allow_missing: bool = False,
    **columns: Any,
) -> CaseMetrics:
    """Measures a run on other bags with labels; writes predictions, metrics.json, pictures and summary.md.

    `columns` are those of `read_cases`; what is not given is as in training. The folder is `output`, or one in the
    run's that is named by the table. Raises InputError for features of another encoder or width, classes that the run
    does not have, and cases that the run was trained with.
    """
    run = run if isinstance(run, BagRun) else BagRun.open(run)
    reporter = reporter or Reporter(quiet=True)
    data, given = run.config.data, {name: value for name, value in columns.items() if value is not None}
    classes = run.classes if run.task == "classification" else None
    changes = {**given, "task": run.task, "classes": classes, "bags": str(bags), "labels": str(labels), "splits": None}
    changes |= {"allow_missing": allow_missing, "slide_table": given.get("slide_table")}
    found, cases = open_experiment(data.model_copy(update=changes), reporter)
    cases, notes = without_empty(found, cases)
    seen = set(cases.ids) & trained_with(run)
    if seen and len(seen) < len(cases):
        notes.append(f"{len(seen)} cases left out: the run was trained with them")
        cases = cases.take([name for name in cases.ids if name not in seen])
    elif seen:
        raise InputError(f"the run {run.folder} was trained with all of these {len(seen)} cases; give others")
    with reporter.bar("predicting") as bar:
        preds = predictions_of(cases, predict_run(run, found, cases.without_targets(), progress=bar))
    folder = Path(output) if output is not None else run.folder / f"evaluate-{Path(labels).stem}"
    write_case_predictions(folder / PREDS, preds)
    info = {**run.info, "model": run.config.model.name}
    return report_cases(folder, preds, "test", [found.note, *cases.notes, *notes], info)


def trained_with(run: BagRun) -> set[str]:
    """The cases that the run was trained or chosen with."""
    with (run.folder / "splits.csv").open(encoding="utf-8", newline="") as file:
        return {row["case"] for row in csv.DictReader(file)}


def stored_config(output: Path) -> BagConfig | None:
    """The configuration of the run or cross-validation in a folder; None where there is none of bags."""
    if is_run(output):
        return BagRun.open(output).config if read_json(output / "run.json").get("kind") == "bags" else None
    if not (output / MARK).is_file():
        return None
    stored = read_json(output / MARK)["settings"]["configurations"][0]
    return BagConfig.model_validate_json(json.dumps(stored))
