"""Training on bags: it learns, repeats, goes on after any end, and predicts bags of any size."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from bags import KEYS, RANDOM, TASKS, WIDTH, MemoryBags, bag, config, toy
from runs import options, sansmax
from safetensors.torch import load_file

from sansmax.data.bags.writing import write_bag
from sansmax.engine.bag_losses import Objective
from sansmax.engine.bag_module import BagModule
from sansmax.engine.bag_predict import MAX_TOKENS, predict_folder
from sansmax.engine.bag_recorder import BagRecorder, validation_figures
from sansmax.engine.bag_run import BagRun, is_bag_run
from sansmax.engine.bag_train import fit_bags, fit_or_resume, predict_bags, predict_run
from sansmax.engine.module import NotFinite
from sansmax.engine.run import Run
from sansmax.engine.stopping import Stopped
from sansmax.errors import InputError
from sansmax.report.tables import read_rows

RANDOM_KEYS = {name.replace(".", "__"): value for name, value in RANDOM.items()}


def fit(folder, task="classification", n=24, keys=None, **how):
    bags, cases = how.pop("data", None) or toy(task, n=n)
    made = config(**(RANDOM_KEYS if keys is None else keys))
    k = 2 * len(cases) // 3
    return fit_bags(made, None, bags, cases, cases.ids[:k], cases.ids[k:], folder, **how)


def result_of(folder):
    rows = read_rows(folder / "metrics.csv")
    for row in rows:
        del row["seconds"], row["tokens_per_second"]
    weights = {k: v.numpy().tobytes() for k, v in load_file(folder / "model.safetensors").items()}
    return rows, weights


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run with everything random gives that is never stopped: two epochs of three steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(folder)
    assert [row["step"] for row in read_rows(folder / "metrics.csv")] == [3, 6]
    return result_of(folder)


@pytest.mark.parametrize("task", TASKS)
def test_it_learns_what_the_features_say(task, tmp_path):
    keys = {"epochs": 8, "optim__lr": 1e-2, "monitor": "val_score", "batch_size": 10, "tokens__batch_tokens": 400}
    run = fit(tmp_path / "run", task, n=60, keys=keys)
    name = {"regression": "val_r2", "survival": "val_c_index"}.get(task, "val_auc")
    rows = read_rows(run.folder / "metrics.csv")
    best = max(row[name] for row in rows)
    assert best > {"regression": 0.5}.get(task, 0.8)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    # the best epoch by that figure was kept, and predicts in the units of the targets
    bags, cases = toy(task, n=60)
    val = cases.take(cases.ids[40:])
    said = predict_bags(run.load_model(), bags, val)
    objective = Objective(task, mean=torch.zeros(1), scale=torch.ones(1))
    shown = {"classification": np.log, "multilabel": lambda p: np.log(p / (1 - p))}.get(task, lambda v: v)(said)
    figures = validation_figures(objective, torch.from_numpy(shown), val.targets, val.outputs)
    assert figures[name] == pytest.approx(best, abs=1e-4)


def test_the_same_seed_gives_the_same_run_and_the_budget_of_tokens_no_other(whole, tmp_path):
    fit(tmp_path / "again")
    assert result_of(tmp_path / "again") == whole
    fit(tmp_path / "other", keys={**RANDOM_KEYS, "seed": 4})
    assert result_of(tmp_path / "other") != whole
    # without anything drawn per pack the budget changes rounding only
    plain = [fit(tmp_path / f"budget{n}", keys={"tokens__batch_tokens": n}) for n in (1, 10**6)]
    bags, cases = toy()
    np.testing.assert_allclose(*(predict_run(run, bags, cases) for run in plain), atol=1e-4)


def at_step(monkeypatch, step, act):
    original, done = BagRecorder.on_train_batch_end, []

    def acting(self, trainer, *args):
        if trainer.global_step == step and not done:
            done.append(step)
            act()
        return original(self, trainer, *args)

    monkeypatch.setattr(BagRecorder, "on_train_batch_end", acting)


@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_stopped_at_any_step_it_ends_the_same(step, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        at_step(patched, step, lambda: os.kill(os.getpid(), signal.SIGTERM if step % 2 else signal.SIGINT))
        epoch, batch = divmod(step, 3)
        where = "the evaluation" if step == 6 else f"epoch {epoch + 1}, batch {batch + 1} of 3"
        with pytest.raises(Stopped, match=rf"^stopped by SIG\w+ before {where}; everything is saved"):
            fit(tmp_path / "run")
    run = fit(tmp_path / "run", resume=True)
    assert result_of(tmp_path / "run") == whole
    assert run.info["state"] == "finished" and (run.folder / "predictions_val.csv").exists()


def test_half_a_start_is_begun_again(whole, tmp_path):
    bags, cases = toy()
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "data.txt").write_text("half")
    (folder / ".config.0123abcd.yaml").write_text("half")
    fit_or_resume(config(**RANDOM_KEYS), bags, cases, cases.ids[:16], cases.ids[16:], folder)
    assert result_of(folder) == whole
    before = (folder / "model.safetensors").stat().st_mtime_ns
    fit_or_resume(config(**RANDOM_KEYS), bags, cases, cases.ids[:16], cases.ids[16:], folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory):
    """Bags and labels as files."""
    folder = tmp_path_factory.mktemp("files")
    bags, cases = toy(n=30)
    for name in bags.ids:
        write_bag(bags.read(name), folder / "bags" / f"{name}.h5")
    rows = zip(cases.ids, cases.slides, cases.targets, strict=True)
    lines = [f"{case},{slide},{cases.classes[y]}" for case, slides, y in rows for slide in slides]
    (folder / "labels.csv").write_text("\n".join(["case_id,slide_id,label", *lines]) + "\n")
    return folder


def words(folder, output, **keys):
    made = {**KEYS, **keys}
    return ["train", folder / "labels.csv", "--bags", folder / "bags", "--output", output, *options(made)]


def test_a_process_that_is_killed_goes_on_as_if_nothing_had_been(on_disk, tmp_path, monkeypatch):
    # pictures and intervals take longer than training
    monkeypatch.setattr("sansmax.engine.bag_experiment.report_run", lambda *arguments: None)
    keys = {**RANDOM, "epochs": 9, "checkpoint_minutes": 0.001}
    run = tmp_path / "killed"
    command = [sys.executable, "-m", "sansmax", *map(str, words(on_disk, run, **keys))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 300
        while not (run / "metrics.csv").exists() or (run / "metrics.csv").read_text().count("\n") < 4:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert not (run / "summary.md").exists()
    resumed = sansmax("train", "--resume", "--output", run)
    assert resumed.status == 0, resumed
    assert "going on at epoch" in resumed.err
    assert sansmax(*words(on_disk, tmp_path / "whole", **keys)).status == 0
    assert len(read_rows(run / "metrics.csv")) == 9
    assert result_of(run) == result_of(tmp_path / "whole")
    assert (run / "predictions_val.csv").read_text() == (tmp_path / "whole" / "predictions_val.csv").read_text()


def test_the_command_line_trains_measures_and_predicts(on_disk, tmp_path):
    run = tmp_path / "run"
    said = sansmax(*words(on_disk, run, **{"model.options.depth": 2}))
    assert said.status == 0, said
    assert "30 patients" in said.err and f"read: {run / 'summary.md'}" in said.out
    assert is_bag_run(run) and BagRun.open(run).config.model.options["depth"] == 2
    page = (run / "summary.md").read_text()
    assert "AUROC" in page and "6 test cases, which training never saw" in page
    tested = {line.split(",")[0] for line in (run / "patient-preds.csv").read_text().splitlines()[1:]}
    seen = {line.split(",")[0] for line in (run / "splits.csv").read_text().splitlines()[1:]}
    assert len(tested) == 6 and len(seen) == 24 and not tested & seen
    assert sansmax("train", "--resume", "--output", run).status == 0
    changed = sansmax("train", "--resume", "--output", run, "--epochs", "3")
    assert changed.status == 2 and "epochs: 2 -> 3" in changed.err
    measured = sansmax("evaluate", run, on_disk / "labels.csv", "--bags", on_disk / "bags")
    assert measured.status == 0, measured
    assert "on 6 test cases" in measured.out
    printed = sansmax("predict", run, on_disk / "bags")
    assert printed.status == 0, printed
    answers = predict_folder(run, on_disk / "bags", output=tmp_path / "answers.csv")
    assert len(answers.rows()) == 45 and (tmp_path / "answers.json").exists()
    assert (tmp_path / "answers.csv").read_text().splitlines()[
        0
    ] == "name,predicted,probability_benign,probability_tumour"
    assert printed.out == (tmp_path / "answers.csv").read_text()
    np.testing.assert_allclose(answers.values.sum(1), 1)
    for option in (["--image-size", "64"], ["--split-column", "x"]):
        wrong = sansmax(*words(on_disk, tmp_path / "no"), *option)
        assert wrong.status == 2 and f"{option[0]} is for images" in wrong.err
    assert "--task and --folds are for bags" in sansmax("train", "x.csv", "-o", tmp_path / "no", "--folds", "3").err


def test_poisoned_test_labels_change_nothing_that_is_trained(on_disk, tmp_path):
    assert sansmax(*words(on_disk, tmp_path / "a")).status == 0
    tested = {line.split(",")[0] for line in (tmp_path / "a" / "patient-preds.csv").read_text().splitlines()[1:]}
    bags, cases = toy(n=30)
    ids = [line.split(",") for line in (tmp_path / "a" / "splits.csv").read_text().splitlines()[1:]]
    train, val = ([case for case, part in ids if part == which] for which in ("train", "val"))
    targets = np.where(np.isin(cases.ids, list(tested)), 1 - cases.targets, cases.targets)
    run = fit_bags(config(), None, bags, replace(cases, targets=targets), train, val, tmp_path / "b")
    assert result_of(run.folder) == result_of(tmp_path / "a")


@pytest.mark.parametrize("name", ["seqnorm_slide_small", "sima_slide_small", "soft_slide_small", "abmil_slide_small"])
def test_a_bag_in_chunks_is_predicted_as_the_whole(name):
    import timm

    arguments = {} if "abmil" in name else {"pos_embed": "sincos"}
    network = timm.create_model(name, in_features=WIDTH, num_classes=2, embed_dim=16, **arguments)
    bags, cases = toy(n=6, low=100, high=200)
    expected = predict_bags(network, bags, cases)
    assert max(map(bags.length, bags.ids)) < MAX_TOKENS
    network.train()
    np.testing.assert_allclose(predict_bags(network, bags, cases, max_tokens=37), expected, atol=1e-5)
    assert network.training
    one = np.concatenate([predict_bags(network, bags, cases.take([c])) for c in cases.ids])
    np.testing.assert_allclose(one, expected, atol=1e-5)


def test_empty_bags_are_left_out_of_training_and_refused_in_prediction(tmp_path):
    bags, cases = toy()
    for name in (*cases.slides[0], *cases.slides[20]):
        bags.bags[name] = bag(name, np.zeros((0, WIDTH), np.float32))
    run = fit(tmp_path / "run", keys={}, data=(bags, cases))
    said = (run.folder / "data.txt").read_text()
    assert "1 cases of train left out, their bags are empty: p00" in said
    assert "1 cases of val left out, their bags are empty: p20" in said
    assert "p00" not in (run.folder / "splits.csv").read_text()
    with pytest.raises(InputError, match=r"2 of 24 cases have an empty bag.*nothing can be predicted: p00, p20"):
        predict_run(run, bags, cases)


def test_features_of_another_encoder_or_width_are_refused_naming_both(tmp_path):
    run = fit(tmp_path / "run", keys={})
    bags, cases = toy()
    other = MemoryBags(bags.bags, encoder="other")
    with pytest.raises(InputError, match=r"features of the encoder 'other', the run .* was trained on those of 'toy'"):
        predict_run(run, other, cases)
    wide = MemoryBags({k: bag(k, np.ones((2, 5), np.float32)) for k in bags.ids}, encoder="other", width=5)
    with pytest.raises(InputError, match=r"width 5 \(encoder other\), the run .* width 12 \(encoder toy\)"):
        predict_run(run, wide, cases)
    with pytest.raises(InputError, match=r"width 12 \(encoder toy\), the network reads 5"):
        network = run.load_model().__class__(in_features=5)
        fit_bags(config(), network, bags, cases, cases.ids[:9], cases.ids[9:], tmp_path / "no")


def test_what_cannot_be_trained_is_refused_before_anything_is_written(tmp_path):
    bags, cases = toy()
    for keys, train, val, message in (
        (
            {"model__name": "seqnorm_vit_tiny_patch16_224"},
            9,
            12,
            "reads images, and bags hold features; models .* abmil",
        ),
        ({"model__name": "seqnorm_slide_smal"}, 9, 12, "unknown model .*did you mean 'seqnorm_slide_small'"),
        ({"model__options__embed_dim": 15}, 9, 12, "cannot be built with .*'embed_dim': 15"),
        ({}, 9, 0, "no patients to validate with.*monitor=last"),
        ({"balanced": True}, 0, 12, "no patients to train on"),
    ):
        with pytest.raises(InputError, match=message):
            fit_bags(config(**keys), None, bags, cases, cases.ids[:train], cases.ids[12 : 12 + val], tmp_path / "no")
        assert not (tmp_path / "no").exists()
    with pytest.raises(InputError, match=r"both to train and to validate: p00"):
        fit_bags(config(), None, bags, cases, cases.ids[:9], cases.ids[:3], tmp_path / "no")
    with pytest.raises(InputError, match=r"unknown key 'tokens.kep'.*did you mean tokens.keep"):
        config(tokens__kep=[0.5, 1.0])
    with pytest.raises(InputError, match="task: Input should be 'classification'"):
        config(data__task="segmentation")


def test_the_folders_of_both_kinds_of_runs_are_told_apart(tmp_path):
    run = fit(tmp_path / "run", keys={"monitor": "last"})
    with pytest.raises(InputError, match=r"is a run on bags of features, which reads no pictures"):
        Run.open(run.folder)
    with pytest.raises(InputError, match=r"is not a run: it has no config.yaml and run.json"):
        BagRun.open(tmp_path)
    with pytest.raises(InputError, match=r"the patients are not those the run .* began with"):
        bags, cases = toy()
        fit_bags(run.config, None, bags, cases, cases.ids[:9], cases.ids[9:], run.folder, resume=True)


def test_a_loss_that_is_no_number_stops_and_what_was_good_stays(tmp_path, monkeypatch):
    original = BagModule.accumulate
    with monkeypatch.context() as patched:
        patched.setattr(
            BagModule, "accumulate", lambda self, packs: original(self, packs) * (1 if self.global_step < 4 else np.nan)
        )
        with pytest.raises(NotFinite, match=r"the loss gave numbers that are not finite at step 5 \(epoch 2\)"):
            fit(tmp_path / "run", keys={})
    assert len(read_rows(tmp_path / "run" / "metrics.csv")) == 1
    fit(tmp_path / "run", keys={}, resume=True)
    fit(tmp_path / "whole", keys={})
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


def test_without_validation_the_last_epoch_is_kept_in_bfloat16_too(tmp_path):
    bags, cases = toy()
    made = config(monitor="last", precision="bf16", optim__model_ema_decay=0.5)
    run = fit_bags(made, None, bags, cases, cases.ids, (), tmp_path / "run")
    assert [row["val_loss"] for row in read_rows(run.folder / "metrics.csv")] == [None, None]
    assert np.isfinite(predict_run(run, bags, cases)).all()
