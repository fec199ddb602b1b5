"""Cross-validation: each case tested once by what never saw it, chosen inside, completed after a kill, compared."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from standin import PLACES, Bags, learner, least_squares, make

import sansmax.report.cross_validation as page
from sansmax.data.bags.fold import Fold
from sansmax.data.bags.folds import draw_folds
from sansmax.data.bags.split_files import read_splits
from sansmax.engine.cross_validate import Learner, compare, cross_validate
from sansmax.engine.stopping import Stopped
from sansmax.errors import InputError
from sansmax.report.case_metrics import CaseMetrics, measure_cases
from sansmax.report.case_predictions import read_case_predictions
from sansmax.report.delong import delong_test

DRAW = page.draw
PICTURES = {
    "classification": {"curves.png", "confusion.png"},
    "multilabel": {"curves_EGFR.png", "curves_KRAS.png"},
    "regression": {"scatter.png"},
    "survival": {"survival.png"},
}


def run(folder, task="classification", n=40, log=None, **options):
    cases, z = make(task, n)
    return cross_validate({"lr": 1}, Bags(), cases, folder, learner=learner(z, log), **{"folds": 4, **options})


@pytest.fixture(autouse=True, scope="module")
def unseen():
    """No pictures but in the tests that ask for `drawn`: they take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "draw", lambda *_: [])
        yield


@pytest.fixture
def drawn(monkeypatch):
    monkeypatch.setattr(page, "draw", DRAW)


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("task", list(PICTURES))
def test_every_case_is_predicted_once_by_the_network_of_its_fold(tmp_path, task):
    cases, z = make(task)
    found = cross_validate({}, Bags(), cases, tmp_path, folds=4, learner=learner(z))
    assert sorted(found.predictions.ids) == sorted(cases.ids)
    for k, fold in enumerate(read_splits(tmp_path, cases)):
        own = found.predictions.in_fold(k)
        assert own.ids == fold.test
        weights = json.loads((tmp_path / f"split-{k}" / "weights.json").read_text())["weights"]
        np.testing.assert_allclose(weights, least_squares(cases.take(fold.train), z))
        np.testing.assert_array_equal(own.targets, cases.take(fold.test).targets)
    again = read_case_predictions(tmp_path / "patient-preds.csv", task, cases.target, cases.classes)
    np.testing.assert_array_equal(again.predictions, found.predictions.predictions)
    assert {p.name for p in tmp_path.glob("*.png")} == PICTURES[task]
    stored = json.loads((tmp_path / "metrics.json").read_text())
    assert CaseMetrics.from_dict(stored["all"]).to_dict() == found.metrics.to_dict()
    assert len(stored["folds"]) == 4
    assert json.loads((tmp_path / "cross_validation.json").read_text())["state"] == "finished"


def test_risks_are_compared_inside_folds_only(tmp_path):
    found = run(tmp_path, "survival")
    p = found.predictions
    inside = measure_cases("survival", p.targets, p.predictions, p.classes, folds=p.folds, resamples=1).scores[
        "c_index"
    ]
    across = measure_cases("survival", p.targets, p.predictions, p.classes, resamples=1).scores["c_index"]
    assert found.metrics.scores["c_index"].value == inside.value != across.value


@pytest.mark.usefixtures("drawn")
def test_the_page_says_what_was_measured(tmp_path):
    found = run(tmp_path)
    text = (tmp_path / "summary.md").read_text(encoding="utf-8")
    auc = found.metrics.scores["auc"]
    assert f"AUROC {auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f})" in text
    own = [m.scores["auc"].value for m in found.folds]
    assert f"{np.mean(own):.3f} +- {np.std(own, ddof=1):.3f}" in text
    assert "AUROC by DeLong" in text
    assert "![" in text


# The test fold touches nothing


def test_training_is_given_no_case_of_the_test_fold_and_prediction_no_target(tmp_path):
    log = []
    cases, _ = make()
    run(tmp_path, log=log, inner=3)
    folds = read_splits(tmp_path, cases)
    assert sum(entry[0] == "fit" for entry in log) == 12
    for what, folder, given, *parts in log:
        fold = folds[int(folder.parent.name.removeprefix("split-"))]
        if what == "fit":
            assert not set(given.ids) & set(fold.test)
            assert set(given.ids) == {*parts[0], *parts[1]} == {*fold.train, *fold.val}
        else:
            assert given.ids == fold.test
            assert not given.targets.any()


def test_poisoned_test_targets_change_no_weight(tmp_path):
    """Turned round, the targets of a test fold give the same network, byte for byte, and other scores."""
    cases, z = make()
    given = draw_folds(cases, 4)[:1]
    poisoned = cases.targets.copy()
    for name in given[0].test:
        i = cases.ids.index(name)
        poisoned[i] = 1 - poisoned[i]
    scores = []
    for name, own in (("clean", cases), ("poisoned", replace(cases, targets=poisoned))):
        configs = [{"sign": 1}, {"sign": -1}]
        found = cross_validate(configs, Bags(), own, tmp_path / name, folds=given, learner=learner(z))
        scores.append(found.metrics.scores["auc"].value)
    for file in ("choice-0/weights.json", "choice-1/weights.json", "choice.json"):
        clean, dirty = ((tmp_path / n / "split-0" / file).read_bytes() for n in ("clean", "poisoned"))
        assert clean == dirty
    assert scores[1] == pytest.approx(1 - scores[0])


def test_the_choice_is_made_by_validation_alone(tmp_path):
    """A configuration that is wrong on every validation case and right on every test case is not taken."""
    cases, _ = make()
    fold = draw_folds(cases, 4)[0]
    truth = dict(zip(cases.ids, cases.targets, strict=True))

    def fit(config, bags, own, train, val, folder, reporter):
        folder.mkdir(parents=True)
        (folder / "c").write_text(config["right on"])

    def predict(folder, bags, own):
        right = set(getattr(fold, (folder / "c").read_text()))
        one = np.array([truth[n] if n in right else 1 - truth[n] for n in own.ids])
        return np.eye(2)[one]

    configs = [{"right on": "test"}, {"right on": "val"}]
    found = cross_validate(configs, Bags(), cases, tmp_path, folds=[fold], learner=Learner(fit, predict))
    chosen = json.loads((tmp_path / "split-0" / "choice.json").read_text())
    assert chosen == {"score": "auc", "scores": [0.0, 1.0], "chosen": 1}
    assert found.metrics.scores["auc"].value == 0


def test_inner_folds_predict_by_the_mean_of_their_networks(tmp_path):
    cases, z = make("regression")
    found = cross_validate({}, Bags(), cases, tmp_path, folds=3, inner=4, learner=learner(z))
    own = found.predictions.in_fold(1)
    x = np.column_stack([np.ones(len(own.ids)), [z[name] for name in own.ids]])
    files = sorted((tmp_path / "split-1").glob("inner-*/weights.json"))
    assert len(files) == 4
    each = [x @ np.array(json.loads(f.read_text())["weights"]) for f in files]
    assert not np.allclose(each[0], each[1])
    np.testing.assert_allclose(own.predictions, np.mean(each, axis=0))


def test_given_splits_are_used_as_they_are(tmp_path):
    cases, z = make(n=20)
    given = (Fold(cases.ids[:10], cases.ids[10:14], cases.ids[14:]), Fold(cases.ids[8:], (), cases.ids[:8]))
    log = []
    own = replace(cases, folds=given)
    cross_validate({}, Bags(), own, tmp_path, learner=learner(z, log))
    fits = [entry for entry in log if entry[0] == "fit"]
    assert fits[0][3:] == (given[0].train, given[0].val)
    assert set(fits[1][3]) | set(fits[1][4]) == set(given[1].train)
    assert [entry[2].ids for entry in log if entry[0] == "predict"] == [f.test for f in given]


def test_empty_bags_are_left_out_and_named(tmp_path):
    cases, z = make()
    found = cross_validate({}, Bags(["p003_s"]), cases, tmp_path, folds=4, learner=learner(z))
    assert "p003" not in found.predictions.ids
    assert "1 cases left out, their bags are empty: p003" in (tmp_path / "summary.md").read_text(encoding="utf-8")


# Stopped and taken up


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with a run for each of `PLACES`, each by a process that was killed there; and a whole run, "whole"."""
    here, folder = Path(__file__).parent, tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": f"{here.parent}{os.pathsep}{here}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, here / "standin.py", folder], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    run(folder / "whole")
    return folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are killed by a signal that this system lacks")
@pytest.mark.parametrize(("place", "finished"), list(zip(PLACES, (2, 1, 4), strict=True)))
def test_a_killed_run_is_completed_and_ends_as_one_that_never_stopped(killed, place, finished):
    folder = killed / place.replace(" ", "-")
    done = [(folder / f"split-{k}" / "patient-preds.csv").exists() for k in range(4)]
    assert done == [k < finished for k in range(4)]
    assert not (folder / "summary.md").exists()
    with pytest.raises(InputError, match="complete it with --resume"):
        run(folder)
    (folder / ".metrics.0123abcd.json").write_text("half a file")
    log = []
    run(folder, log=log, resume=True)
    assert {entry[1].name for entry in log} == {f"split-{k}" for k in range(finished, 4)}
    for name in ("patient-preds.csv", "metrics.json", "summary.md", "splits.csv"):
        assert (folder / name).read_bytes() == (killed / "whole" / name).read_bytes(), name
    assert not (folder / ".metrics.0123abcd.json").exists()


def test_a_finished_run_is_taken_up_without_training(tmp_path):
    run(tmp_path)
    log = []
    run(tmp_path, log=log, resume=True)
    assert log == []


def test_what_remains_of_a_kill_before_the_first_file_is_no_obstacle(tmp_path):
    (tmp_path / ".cross_validation.0123abcd.json").write_text("half")
    run(tmp_path)
    assert not (tmp_path / ".cross_validation.0123abcd.json").exists()


def test_a_stop_names_the_whole_run(tmp_path):
    cases, z = make()

    def fit(*_):
        raise Stopped("stopped at epoch 3", tmp_path / "split-0")

    with pytest.raises(Stopped, match=r"split 0: stopped at epoch 3. Go on with: .*--resume --output .*/cv$"):
        cross_validate({}, Bags(), cases, tmp_path / "cv", folds=4, learner=Learner(fit, learner(z).predict))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"lr": 2}}, "other configurations"),
        ({"seed": 5}, "other splits, seed"),
        ({"folds": 3}, "other splits, folds"),
        ({"inner": 2}, "other inner folds"),
        ({"labels": True}, "other cases"),
    ],
)
def test_a_run_is_completed_with_its_own_settings_only(tmp_path, change, message):
    cases, z = make()
    run(tmp_path)
    if change.pop("labels", False):
        turned = cases.targets.copy()
        # the same classes in the same places, so that the draw stays: two of one fold and class swap nothing else
        a, b = (next(i for i, t in enumerate(turned) if t == c) for c in (0, 1))
        turned[a], turned[b] = 1, 0
        cases = replace(cases, targets=turned)
    config = change.pop("config", {"lr": 1})
    options = {"folds": 4, "resume": True, "learner": learner(z), **change}
    with pytest.raises(InputError, match=f"was started with {message}.*another --output"):
        cross_validate(config, Bags(), cases, tmp_path, **options)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(InputError, match="is not empty and holds no cross-validation"):
        run(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="is a file"):
        run(tmp_path / "thesis.txt")


def test_choosing_needs_something_to_choose_by(tmp_path):
    cases, z = make()
    with pytest.raises(InputError, match="needs validation cases"):
        cross_validate([{}, {"sign": -1}], Bags(), cases, tmp_path, folds=4, val_share=0, learner=learner(z))


# Compared


def test_two_runs_are_compared_on_the_same_patients(tmp_path):
    cases, z = make(n=60)
    blind = {name: np.random.default_rng(i).normal(size=3) for i, name in enumerate(z)}
    a = cross_validate({}, Bags(), cases, tmp_path / "a", folds=4, learner=learner(z)).predictions
    b = cross_validate({}, Bags(["p007_s"]), cases, tmp_path / "b", folds=5, learner=learner(blind)).predictions
    found = compare(tmp_path / "a", tmp_path / "b", resamples=200)
    assert found.cases == found.patients == 59
    assert "1 predictions left out" in found.notes[0]
    of_a, of_b = (dict(zip(p.ids, p.predictions[:, 1], strict=True)) for p in (a, b))
    shared = [name for name in cases.ids if name in of_b]
    y = cases.take(shared).targets == 1
    test = delong_test(y, np.array([of_a[n] for n in shared]), np.array([of_b[n] for n in shared]))
    assert found.delong["tumour"].p == pytest.approx(test.p, rel=1e-9)
    assert found.differences["auc"].value == pytest.approx(test.difference.value, abs=1e-12)
    assert found.differences["auc"].low > 0
    assert "DeLong, tumour" in found.text()


def test_a_run_against_itself_differs_in_nothing(tmp_path):
    run(tmp_path, "survival")
    found = compare(tmp_path, tmp_path, resamples=50)
    assert all(d.value == d.low == d.high == 0 for d in found.differences.values())
    assert found.delong == {}


def test_runs_that_are_not_of_the_same_labels_are_not_compared(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b", "regression")
    with pytest.raises(InputError, match="different task"):
        compare(tmp_path / "a", tmp_path / "b")
    cases, z = make()
    turned = replace(cases, targets=1 - cases.targets)
    cross_validate({}, Bags(), turned, tmp_path / "c", folds=4, learner=learner(z))
    with pytest.raises(InputError, match="40 cases have other targets in one run than in the other: p0"):
        compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(InputError, match="is no cross-validation"):
        compare(tmp_path / "a", tmp_path)


def test_patients_with_several_cases_have_no_delong_test(tmp_path):
    cases, z = make()
    cases = replace(cases, patients=tuple(f"q{i // 2}" for i in range(40)))
    cross_validate({}, Bags(), cases, tmp_path, folds=4, learner=learner(z))
    found = compare(tmp_path, tmp_path, resamples=20)
    assert (found.cases, found.patients) == (40, 20)
    assert found.delong == {}
    assert "no DeLong test" in found.notes[0]
