"""Cases of every task with one informative number each, and a learner so small that its weights can be checked.

Run as a script it cross-validates in folders of its own for each of `PLACES`, and is killed there.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

import sansmax.report.cross_validation as page
from sansmax.data.bags.cases import Cases
from sansmax.engine.cross_validate import Learner, cross_validate

PLACES = ("fit 2", "predict 1", "report 0")
NAMES = {"classification": ("benign", "tumour"), "multilabel": ("EGFR", "KRAS"), "regression": ("age",)}
NAMES["survival"] = ("risk",)
TARGET = {"classification": ("label",), "survival": ("months", "dead")}


class Bags:
    """Only lengths: what a stand-in needs of a folder of bags."""

    def __init__(self, empty=()):
        self.empty = set(empty)

    def length(self, slide_id):
        return 0 if slide_id in self.empty else 3


def make(task="classification", n=40, seed=0, classes=2):
    """Cases and the features `(n, 3)` that tell of them, by id."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 3))
    noisy = z + 0.7 * rng.normal(size=z.shape)
    names = NAMES[task]
    if task == "classification":
        names = (*names, "other")[:classes]
        y = np.argmax(np.column_stack([np.zeros(n), noisy[:, : classes - 1]]), axis=1)
    elif task == "multilabel":
        y = (noisy[:, :2] > 0).astype(float)
        y[rng.random(y.shape) < 0.1] = np.nan
    elif task == "regression":
        y = 50 + 10 * noisy[:, :1]
    else:
        y = np.stack([np.ceil(20 * np.exp(-noisy[:, 0])), rng.random(n) < 0.6], axis=1).astype(float)
    ids = tuple(f"p{i:03d}" for i in range(n))
    cases = Cases(task, ids, tuple((f"{i}_s",) for i in ids), y, names, target=TARGET.get(task, names))
    return cases, dict(zip(ids, z, strict=True))


def least_squares(cases, z):
    """Weights that depend on every target there is."""
    x = np.column_stack([np.ones(len(cases)), [z[name] for name in cases.ids]])
    y = np.eye(len(cases.classes))[cases.targets] if cases.task == "classification" else np.nan_to_num(cases.targets)
    if cases.task == "survival":
        y = -np.log1p(y[:, :1])
    return np.linalg.lstsq(x, y, rcond=None)[0]


def learner(z, log=None, on_fit=None, scale=1.0):
    """Least squares; what it was given is written to `log`. A configuration is a dict; its "sign" turns the answers."""
    log = [] if log is None else log

    def fit(config, bags, cases, train, val, folder, reporter):
        log.append(("fit", Path(folder), cases, tuple(train), tuple(val)))
        folder.mkdir(parents=True, exist_ok=True)
        if on_fit is not None:
            on_fit(folder)
        weights = least_squares(cases.take(train), z)
        (folder / "weights.json").write_text(json.dumps({"config": config, "weights": weights.tolist()}))

    def predict(folder, bags, cases):
        log.append(("predict", Path(folder), cases))
        stored = json.loads((folder / "weights.json").read_text())
        x = np.column_stack([np.ones(len(cases)), [z[name] for name in cases.ids]])
        out = x @ np.array(stored["weights"]) * stored["config"].get("sign", 1)
        if cases.task == "classification":
            e = np.exp(scale * out)
            return e / e.sum(axis=1, keepdims=True)
        return 1 / (1 + np.exp(-out)) if cases.task == "multilabel" else out

    return Learner(fit, predict)


def kill_at(place):
    """A learner that ends its process, hard, where `place` says: "fit 2" in the third fold, "predict 1", "split 1"."""
    what, number = place.split()
    cases, z = make()

    def fatal(folder):
        if folder.name == f"split-{number}":
            (folder / "half").write_text("of some file")
            os.kill(os.getpid(), signal.SIGKILL)

    plain = learner(z, on_fit=fatal if what == "fit" else None)

    def predict(folder, bags, asked):
        out = plain.predict(folder, bags, asked)
        if what == "predict" and folder.name == f"split-{number}":
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    return cases, Learner(plain.fit, predict)


def cross_validate_until(folder, place):
    """Cross-validates in a child of this process, which is killed at the place."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{place}: {status}"
        return
    if place == "report 0":
        page.draw = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    cases, own = kill_at(place)
    cross_validate({"lr": 1}, Bags(), cases, folder, folds=4, learner=own)
    os._exit(0)


if __name__ == "__main__":
    for place in PLACES:
        cross_validate_until(Path(sys.argv[1]) / place.replace(" ", "-"), place)
