"""Cross-validation with the slide classifiers themselves: what is trained knows nothing of the test fold."""

import json
from dataclasses import replace

import numpy as np
import pytest
from bags import config, toy

import sansmax.report.cross_validation as page
from sansmax.data.bags.folds import draw_folds
from sansmax.engine.bag_train import BagRun, predict_bags
from sansmax.engine.cross_validate import cross_validate


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Pictures are looked at elsewhere."""
    monkeypatch.setattr(page, "draw", lambda *_: [])


def test_poisoned_test_targets_change_no_byte_of_the_weights(tmp_path):
    bags, cases = toy(n=16)
    given = draw_folds(cases, 4, val_share=0.25)[:1]
    turned = cases.targets.copy()
    for name in given[0].test:
        turned[cases.ids.index(name)] ^= 1
    found = []
    for name, own in (("clean", cases), ("poisoned", replace(cases, targets=turned))):
        found.append(cross_validate(config(epochs=1), bags, own, tmp_path / name, folds=given))
    files = [tmp_path / name / "split-0" / "model.safetensors" for name in ("clean", "poisoned")]
    assert files[0].read_bytes() == files[1].read_bytes()
    clean, poisoned = (f.predictions for f in found)
    np.testing.assert_array_equal(clean.predictions, poisoned.predictions)
    assert (clean.targets != poisoned.targets).all()
    changed = cases.targets.copy()
    changed[cases.ids.index(given[0].train[0])] ^= 1
    cross_validate(config(epochs=1), bags, replace(cases, targets=changed), tmp_path / "train", folds=given)
    assert files[0].read_bytes() != (tmp_path / "train" / "split-0" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("task", ["multilabel", "regression", "survival"])
def test_folds_are_runs_of_their_own_whose_networks_predict_their_test_cases(tmp_path, task):
    bags, cases = toy(task, n=18)
    found = cross_validate(config(epochs=1), bags, cases, tmp_path, folds=2, val_share=0.25)
    assert sorted(found.predictions.ids) == sorted(cases.ids)
    own = found.predictions.in_fold(1)
    run = BagRun.open(tmp_path / "split-1")
    assert run.task == task
    said = predict_bags(run.load_model(), bags, cases.take(own.ids))
    np.testing.assert_array_equal(own.predictions, said)
    assert np.isfinite(found.predictions.predictions).all()
    assert (tmp_path / "summary.md").read_text(encoding="utf-8").count("seqnorm_slide_small") == 1


def test_a_fold_whose_training_was_stopped_half_way_goes_on(tmp_path):
    """What an interrupted fit left is taken up: the second fold ends as in a run that never stopped."""
    bags, cases = toy(n=16)
    given = draw_folds(cases, 2, val_share=0.25)
    cross_validate(config(), bags, cases, tmp_path / "whole", folds=given)
    cross_validate(config(), bags, cases, tmp_path / "cut", folds=given)
    fold = tmp_path / "cut" / "split-1"
    # as after a kill between the end of training and the table of the fold
    (fold / "patient-preds.csv").unlink()
    info = json.loads((fold / "run.json").read_text())
    (fold / "run.json").write_text(json.dumps({**info, "state": "started"}))
    (tmp_path / "cut" / "summary.md").unlink()
    first = (tmp_path / "cut" / "split-0" / "model.safetensors").stat().st_mtime_ns
    cross_validate(config(), bags, cases, tmp_path / "cut", folds=given, resume=True)
    for name in ("patient-preds.csv", "metrics.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert (tmp_path / "cut" / "split-0" / "model.safetensors").stat().st_mtime_ns == first


def test_inner_folds_and_choice_run_with_networks(tmp_path):
    bags, cases = toy(n=24)
    given = draw_folds(cases, 3, val_share=0.25)[:1]
    configs = [config(epochs=1), config(epochs=1, optim__lr=1e-5)]
    cross_validate(configs, bags, cases, tmp_path, folds=given, inner=2)
    chosen = json.loads((tmp_path / "split-0" / "choice.json").read_text())
    assert len(chosen["scores"]) == 2
    runs = sorted(p.parent.relative_to(tmp_path / "split-0").as_posix() for p in tmp_path.rglob("model.safetensors"))
    assert runs == ["choice-0/inner-0", "choice-0/inner-1", "choice-1/inner-0", "choice-1/inner-1"]
    run = BagRun.open(tmp_path / "split-0" / "choice-0" / "inner-1")
    inside = {*given[0].train, *given[0].val}
    part = (run.folder / "splits.csv").read_text()
    assert {line.split(",")[0] for line in part.splitlines()[1:]} == inside
