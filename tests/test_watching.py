"""What people watch while a run trains: every figure once, the same after a stop, and never at the cost of the run."""

import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import sys
import types
import warnings
from unittest import mock

import numpy as np
import pytest
import torch
from runs import KEYS, options, refused, tiny, train_only
from torch import nn

from sansmax.engine import trackers, watching
from sansmax.engine.callbacks import Recorder
from sansmax.engine.config import TrackConfig
from sansmax.engine.progress import Reporter
from sansmax.engine.stopping import Stopped
from sansmax.engine.trackers import Trackers, check_trackers
from sansmax.engine.watching import Watchers, send_results
from sansmax.errors import InputError
from sansmax.report.jsonl import append_line, read_lines, truncate_lines
from sansmax.report.resample import Interval
from sansmax.report.tables import read_rows

CLOCKS = ("seconds", "images_per_second", "memory_mib")
WATCHED = {"track__log_steps": 1}


def lines_of(folder, kind=None):
    """The journal but for what a clock measured."""
    lines = [line for line in read_lines(folder / "metrics.jsonl") if kind in (None, line["kind"])]
    return [{k: v for k, v in line.items() if k not in CLOCKS} for line in lines]


def stop_after(step):
    """Asks training to stop when it has done so many steps."""
    original = Recorder.on_train_batch_end

    def acting(self, trainer, *args):
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, trainer, *args)

    return mock.patch.object(Recorder, "on_train_batch_end", acting)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped: two epochs of four steps."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_only(tiny(**WATCHED), folder)
    return folder


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The same run, stopped after six steps, taken up, and then once more from the same place: the steps after it
    were done twice."""
    has_tensorboard = importlib.util.find_spec("tensorboard") is not None
    folder = tmp_path_factory.mktemp("resumed") / "run"
    loggers = ("tensorboard",) if has_tensorboard else ()
    with stop_after(6), pytest.raises(Stopped):
        train_only(tiny(**WATCHED, track__loggers=loggers), folder)
    earlier = (folder / "last.ckpt").read_bytes()
    train_only(None, folder, resume=True)
    (folder / "last.ckpt").write_bytes(earlier)
    train_only(None, folder, resume=True)
    return folder


# The journal


def test_the_journal_holds_the_rows_of_the_table(whole):
    rows = read_rows(whole / "metrics.csv")
    lines = [line for line in read_lines(whole / "metrics.jsonl") if line.pop("kind") == "epoch"]
    assert all(line.pop("memory_mib") > 50 for line in lines)
    assert lines == rows and len(rows) == 2


def test_the_steps_of_an_epoch_make_its_loss(whole):
    steps = lines_of(whole, "step")
    assert [(line["epoch"], line["step"]) for line in steps] == [(1 + i // 4, i + 1) for i in range(8)]
    for epoch, row in enumerate(read_rows(whole / "metrics.csv"), start=1):
        losses = [line["loss"] for line in steps if line["epoch"] == epoch]
        assert np.mean(losses) == pytest.approx(row["train_loss"], rel=1e-12)
    # up in the first of two epochs, then down
    rates = [line["lr"] for line in steps]
    assert rates[0] == 1e-6 and np.argmax(rates) == 3
    assert all(line["grad_norm"] > 0 for line in steps)


def test_lines_come_as_often_as_was_asked_for(tmp_path):
    train_only(tiny(track__log_steps=3), tmp_path / "run")
    assert [(x["kind"], x["step"]) for x in lines_of(tmp_path / "run")] == [
        *(("step", 3), ("epoch", 4), ("step", 6), ("epoch", 8))
    ]


def test_a_run_that_was_stopped_has_every_line_once(whole, resumed):
    assert lines_of(resumed) == lines_of(whole)


def test_the_norm_is_that_of_all_gradients(tmp_path):
    module = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2, bias=False)).double()
    module.automatic_optimization = True
    (1e3 * module(torch.randn(7, 5, dtype=torch.float64)).square().sum()).backward()
    every = torch.cat([p.grad.ravel() for p in module.parameters()])
    watchers = Watchers(tmp_path, tiny(track__log_steps=2), say=print)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.25)
    for step in (1, 2, 3):
        watchers.before_step(step, module, optimizer)
        watchers.step(step, 1, 0.5)
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line.pop("grad_norm") == pytest.approx(float((every**2).sum() ** 0.5), rel=1e-12)
    assert line == {"kind": "step", "epoch": 1, "step": 2, "loss": 0.5, "lr": 0.25}


def test_gradients_that_wait_for_their_step_make_no_second_line(tmp_path):
    watchers = Watchers(tmp_path, tiny(track__log_steps=1), say=print)
    watchers.start(0)
    for step in (0, 1, 1, 2, 2):
        watchers.step(step, 1, 0.5)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_of_several_processes_the_first_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "first_process", lambda: False)
    watchers = Watchers(tmp_path, tiny(track__log_steps=1), say=print)
    watchers.start(0)
    watchers.step(1, 1, 0.5)
    watchers.row({"epoch": 1, "step": 1})
    assert list(tmp_path.iterdir()) == []


def test_lines_come_back_as_they_were(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == truncate_lines(path, 3) == []
    append_line(path, {"step": 1, "loss": 0.1 + 0.2, "lr": np.float32(0.1), "name": "é\n"})
    append_line(path, {"step": np.int64(2), "loss": float("nan"), "area": float("inf")})
    assert read_lines(path) == [
        {"step": 1, "loss": 0.1 + 0.2, "lr": float(np.float32(0.1)), "name": "é\n"},
        {"step": 2, "loss": None, "area": None},
    ]
    assert "NaN" not in path.read_text() and path.read_text().count("\n") == 2


@pytest.mark.parametrize("rest", ["", '{"step": 3', '{"step": 3}', "\0\0\0"])
def test_half_a_line_of_a_killed_run_is_cut_off(tmp_path, rest):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 5):
        append_line(path, {"step": step})
    with path.open("a") as file:
        file.write(rest)
    assert [line["step"] for line in read_lines(path)] == [1, 2, 5]
    assert [line["step"] for line in truncate_lines(path, 4)] == [1, 2]
    append_line(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_damaged_journal_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2 is no JSON object"):
        truncate_lines(path, 4)


# Learning curves and progress


def test_the_learning_curves_are_drawn_while_training_goes_on(whole, tmp_path, monkeypatch):
    shutil.copy(whole / "metrics.csv", tmp_path)
    watchers = Watchers(tmp_path, tiny(), say=print)
    watchers.row({"epoch": 1, "step": 4})
    assert not (tmp_path / "curves.png").exists()
    monkeypatch.setattr(watching, "REDRAW", 0.0)
    watchers.row({"epoch": 2, "step": 8})
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_that_cannot_be_drawn_are_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(watching, "REDRAW", 0.0)
    said = []
    watchers = Watchers(tmp_path, tiny(), said.append)
    for epoch in (1, 2):
        watchers.row({"epoch": epoch, "step": epoch})
    assert len(said) == 1 and said[0].startswith("warning: the learning curves are not drawn")
    assert len(read_lines(tmp_path / "metrics.jsonl")) == 2


def test_the_time_left_of_a_run_taken_up_is_that_of_its_own_speed(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("sansmax.engine.progress.time.monotonic", lambda: now[0])
    said = []
    reporter = Reporter(seconds=30)
    monkeypatch.setattr(reporter, "say", lambda text, style="": said.append(text))
    with reporter.bar("training") as bar:
        for done in range(900, 1001):
            bar.update(done, 1000, "loss 0.5")
            now[0] += 2.0
    assert [text.split() for text in said[:2]] == [
        ["training:", "92", "%", "loss", "0.5", "left", "2", "min", "50", "s"],
        ["training:", "93", "%", "loss", "0.5", "left", "2", "min", "20", "s"],
    ]


# Trackers


class Logger:
    """A tracker that fails when it is told to; what it was sent stays when it is opened again."""

    def __init__(self):
        self.got, self.broken = [], False
        self.experiment = types.SimpleNamespace(flush=lambda: None, close=lambda: None)

    def log_metrics(self, figures, step):
        if self.broken:
            raise ConnectionError("no network")
        self.got.append((step, sorted(figures)))


@pytest.fixture
def logger(monkeypatch):
    made = Logger()
    monkeypatch.setattr(trackers, "_wandb", lambda folder, track, known: (made, "abc"))
    made.log_hyperparams = made.experiment.finish = lambda *_args, **_how: None
    return made


LINES = [{"kind": kind, "step": step, "loss": 0.5} for step in (1, 2, 3) for kind in ("step", "epoch")]
SENT = [(line["step"], ["step/loss" if line["kind"] == "step" else "loss"]) for line in LINES]


def test_what_a_tracker_missed_is_sent_later_and_nothing_twice(logger, tmp_path):
    said = []

    def opened(lines):
        found = Trackers(tmp_path, TrackConfig(loggers=("wandb",)), {}, said.append)
        found.open(0, lines)
        return found

    first = opened([])
    for line in LINES[:2]:
        first.send(line)
    logger.broken = True
    for line in LINES[2:4]:
        first.send(line)
    first.close("failed")
    assert len(said) == 1 and "W&B is given up (ConnectionError: no network); training goes on" in said[0]
    logger.broken = False
    # the journal of the run has what was missed; some steps are done again
    second = opened(LINES[:3])
    for line in LINES[2:]:
        second.send(line)
    assert logger.got == SENT and len(said) == 1


def test_the_final_scores_are_sent_once(logger, tmp_path):
    config = tiny(track__loggers=("wandb",))
    append_line(tmp_path / "metrics.jsonl", LINES[0])
    measured = {"test": {"auc": Interval(0.75), "kappa": Interval(float("nan"))}}
    for _ in range(2):
        send_results(tmp_path, config, measured, {}, print)
    assert logger.got == [SENT[0], (1, ["test/auc"])]


def test_a_tracker_that_cannot_start_does_not_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "_tensorboard", mock.Mock(side_effect=OSError("read-only")))
    monkeypatch.setattr("sansmax.engine.train.check_trackers", lambda track: None)
    train_only(tiny(epochs=1, track__loggers=("tensorboard",)), tmp_path / "run")
    assert len(read_rows(tmp_path / "run" / "metrics.csv")) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    message = refused("train", *options(KEYS), f"--{name}", "--output", tmp_path / "run")
    assert message == f'{name} is not installed; it comes with: pip install "sansmax[track]"'
    assert not (tmp_path / "run").exists()


def test_who_is_unknown_to_wandb_is_told_how_to_log_in(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(login=lambda prompt: False))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(InputError, match=r"run `wandb login` once, .* --set track\.offline=true"):
        check_trackers(TrackConfig(loggers=("wandb",)))
    check_trackers(TrackConfig(loggers=("wandb",), offline=True))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_trackers(TrackConfig(loggers=("wandb",)))


def scalars(folder):
    """Steps and values of each name in a folder of TensorBoard, as a viewer shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        found.Reload()
        names = found.Tags()["scalars"]
        return {name: [(e.step, e.value) for e in found.Scalars(name)] for name in names}


def test_tensorboard_shows_every_row_and_step_once(whole, resumed):
    pytest.importorskip("tensorboard")
    found = scalars(resumed / "tensorboard")
    rows, steps = read_rows(whole / "metrics.csv"), lines_of(whole, "step")
    for name in ("epoch", "lr", "train_loss", "val_loss", "val_accuracy", "val_auc"):
        assert found[name] == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows], name
    for name in ("loss", "lr", "grad_norm"):
        assert found[f"step/{name}"] == [(x["step"], pytest.approx(x[name], rel=1e-6)) for x in steps], name


def test_mlflow_keeps_rows_settings_and_results_in_one_run(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = tiny(track__loggers=("mlflow",), track__project="p", track__name="n")
    said, path = [], tmp_path / "metrics.jsonl"
    for lines in (LINES[:3], LINES[3:]):
        for line in lines:
            append_line(path, line)
        open_now = Trackers(tmp_path, config.track, config.model_dump(mode="json"), said.append)
        open_now.open(0, read_lines(path))
        open_now.close("stopped")
    send_results(tmp_path, config, {"test": {"auc": Interval(0.75)}}, {}, said.append)
    assert said == []
    with sqlite3.connect(tmp_path / "mlflow.db") as base:
        assert base.execute("select name, status from runs").fetchall() == [("n", "FINISHED")]
        got = base.execute("select key, step, value from metrics order by step, key").fetchall()
        assert base.execute("select value from params where key = 'optim/lr'").fetchall() == [("0.001",)]
    base.close()
    wanted = [(name, step, 0.5) for step in (1, 2, 3) for name in ("loss", "step/loss")]
    assert got == sorted([*wanted, ("test/auc", 3, 0.75)], key=lambda row: (row[1], row[0]))


def test_wandb_keeps_rows_and_results_under_one_name(tmp_path):
    wandb = pytest.importorskip("wandb")
    config = tiny(track__loggers=("wandb",), track__offline=True)
    said = []
    for line in LINES:
        append_line(tmp_path / "metrics.jsonl", line)
    send_results(tmp_path, config, {"test": {"auc": Interval(0.75)}}, {}, said.append)
    assert said == []
    (identity,) = {folder.name.rsplit("-", 1)[1] for folder in (tmp_path / "wandb").glob("offline-run-*")}
    kept = json.loads((tmp_path / "track.json").read_text())["wandb"]
    assert kept == {"id": identity, "sent": [3, 2]}
    # its own process writes, and has done when it ends
    wandb.teardown()
    written = (tmp_path / "wandb" / "latest-run" / f"run-{identity}.wandb").read_bytes()
    assert b"step/loss" in written and b"test/auc" in written and KEYS["model.name"].encode() in written
