"""What training leaves in the folder of a run, from every kind of source, and that the seed decides all of it."""

import json
import re

import numpy as np
import pytest
import torch
from runs import (
    KEYS,
    RANDOM,
    TINY,
    folder_of_pictures,
    picture,
    read_csv,
    refused,
    result_of,
    rows_of,
    sansmax,
    tiny,
    train_only,
)
from safetensors.torch import load_file

import sansmax as package
from sansmax.engine.config import load_config
from sansmax.engine.progress import Reporter
from sansmax.engine.run import Run, load_weights
from sansmax.engine.train import class_weights, train
from sansmax.errors import InputError
from sansmax.report.metrics import Metrics
from sansmax.report.summary import score_text

FILES = {
    *("config.yaml", "run.json", "splits.csv", "data.txt", "metrics.csv", "model.safetensors", "last.ckpt"),
    *("metrics.json", "predictions_val.csv", "predictions_val.json", "predictions_test.csv", "predictions_test.json"),
    *("summary.md", "curves.png", "roc.png", "confusion.png"),
}
PNG = b"\x89PNG\r\n\x1a\n"


def folder(top):
    return folder_of_pictures(top / "data")


def folder_with_splits(top):
    return folder_of_pictures(top / "data", classes=("a", "b", "c"), splits=("train", "test"), colour=True)


def table_with_groups(top):
    folder_of_pictures(top / "data", count=20)
    lines = [
        f"{path.relative_to(top / 'data')},{path.parent.name},p{i // 2}"
        for i, path in enumerate(sorted((top / "data").rglob("*.png")))
    ]
    (top / "data" / "list.csv").write_text("\n".join(["image,diagnosis,patient", *lines]))
    return top / "data" / "list.csv"


def npz(top, colour):
    arrays = {}
    for word, count in (("train", 24), ("val", 12), ("test", 12)):
        labels = np.arange(count) % 3
        seeds = np.random.default_rng(len(word)).integers(0, 1000, count)
        arrays[f"{word}_images"] = np.stack([picture(k, s, colour=colour) for k, s in zip(labels, seeds, strict=True)])
        arrays[f"{word}_labels"] = labels[:, None]
    np.savez(top / "set.npz", **arrays)
    return top / "set.npz"


def deep_pictures(top):
    return folder_of_pictures(top / "data", dtype=np.uint16)


RESNET = ("--model", "resnet10t", "--epochs", "1", "--batch-size", "8", "--image-size", "32")
SOFTMAX = ("--model", "vit_tiny_patch16_224", "--set", "model.options={depth: 1, embed_dim: 24}", *RESNET[2:])
CASES = {
    "a folder": (folder, (*TINY, "--image-size", "32"), 2, 1),
    "a folder with train and test": (folder_with_splits, (*TINY, "--image-size", "24x32"), 3, 3),
    "a table with groups": (table_with_groups, (*TINY, "--image-size", "32", "--set", "resize_mode=pad"), 2, 1),
    "grey arrays": (lambda top: npz(top, False), (*TINY, "--image-size", "32"), 3, 1),
    "arrays in colour": (lambda top: npz(top, True), (*TINY, "--image-size", "32", "--set", "resize_mode=crop"), 3, 3),
    "16 bit": (deep_pictures, (*TINY, "--image-size", "32"), 2, 1),
    "softmax": (folder, SOFTMAX, 2, 1),
    "softmax of ours": (folder, (*TINY, "--image-size", "32", "--set", "model.options.attention=softmax"), 2, 1),
    "a convolutional network": (folder, RESNET, 2, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_every_source_and_network_trains_and_is_measured(case, tmp_path):
    source, words, num_classes, in_chans = CASES[case]
    data, folder = source(tmp_path), tmp_path / "run"
    said = sansmax("train", data, "--output", folder, *words)
    assert said.status == 0, said
    run = Run.open(folder)
    assert len(run.classes) == num_classes and run.preprocess.in_chans == in_chans
    assert run.info["state"] == "finished"
    assert {p.name for p in folder.iterdir()} >= FILES
    pictures = {p.name for p in folder.glob("*.png")}
    assert all((folder / name).read_bytes().startswith(PNG) for name in pictures)
    rows = rows_of(folder)
    assert [row["epoch"] for row in rows] == [1]
    assert all(np.isfinite(v) for row in rows for v in row.values())
    splits = read_csv(folder / "splits.csv")
    for split in ("val", "test"):
        predicted = read_csv(folder / f"predictions_{split}.csv")
        mine = [(r["name"], r["label"]) for r in splits if r["split"] == split]
        assert [(r["name"], r["label"]) for r in predicted] == mine
        read = json.loads((folder / f"predictions_{split}.json").read_text())
        assert [p["name"] for p in read["predictions"]] == [r["name"] for r in predicted]
    if case == "a table with groups":
        of_group = {}
        for r in splits:
            of_group.setdefault(r["group"], set()).add(r["split"])
        assert len(of_group) == 20 and all(len(s) == 1 for s in of_group.values())
    # the page says what the file of figures says
    measured = Metrics.from_dict(json.loads((folder / "metrics.json").read_text())["test"])
    summary = (folder / "summary.md").read_text()
    for name in ("auc", "accuracy", "balanced_accuracy", "log_loss"):
        assert score_text(name, measured[name]) in summary, name
    assert measured.images == len(predicted)
    for name in re.findall(r"!\[.*?\]\((.*?)\)", summary):
        assert (folder / name).is_file(), name
    said = sansmax("evaluate", folder, data, "--output", tmp_path / "again")
    assert said.status == 0, said
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["scores"] == measured.to_dict()["scores"]
    assert (tmp_path / "again" / "predictions.csv").read_bytes() == (folder / "predictions_test.csv").read_bytes()


def test_heat_maps_are_drawn_of_classes_that_were_found(tmp_path):
    # enough epochs to tell the classes apart
    data = folder_of_pictures(tmp_path / "data", count=40)
    words = (*TINY, "--image-size", "24x16", "--epochs", "12", "--set", "lr=0.005", "--set", "hflip=0")
    said = sansmax("train", data, "--output", tmp_path / "run", *words)
    assert said.status == 0, said
    measured = json.loads((tmp_path / "run" / "metrics.json").read_text())["test"]
    assert measured["scores"]["accuracy"]["value"] > 0.9
    for name in ("benign", "malignant"):
        assert (tmp_path / "run" / f"heatmap_{name}.png").read_bytes().startswith(PNG)
        assert f"(heatmap_{name}.png)" in (tmp_path / "run" / "summary.md").read_text()


def test_the_seed_decides_everything(tmp_path):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        train(tiny(seed=seed, epochs=1, **RANDOM), tmp_path / name)
    assert result_of(tmp_path / "one") == result_of(tmp_path / "same")
    for mine, theirs in zip(result_of(tmp_path / "one"), result_of(tmp_path / "other"), strict=True):
        assert mine != theirs


def test_what_was_drawn_before_does_not_matter(tmp_path):
    train_only(tiny(epochs=1, **RANDOM), tmp_path / "one")
    torch.rand(17)
    np.random.rand(5)  # noqa: NPY002
    train_only(tiny(epochs=1, data__workers=1, **RANDOM), tmp_path / "workers")
    assert result_of(tmp_path / "one") == result_of(tmp_path / "workers")


def test_the_configuration_of_a_run_trains_it_again(tmp_path):
    data = folder_of_pictures(tmp_path / "data")
    words = (*TINY, "--image-size", "32x24", "--seed", "9", "--set", "mixup=0.2", "--set", "rotate=10")
    assert sansmax("train", data, "--output", tmp_path / "run", *words).status == 0
    said = sansmax("train", "--config", tmp_path / "run" / "config.yaml", "--output", tmp_path / "again")
    assert said.status == 0, said
    assert result_of(tmp_path / "again") == result_of(tmp_path / "run")
    assert (tmp_path / "again" / "config.yaml").read_bytes() == (tmp_path / "run" / "config.yaml").read_bytes()


@pytest.mark.parametrize("monitor", ["val_loss", "val_auc", "val_accuracy", "last"])
def test_the_weights_kept_are_those_of_the_best_epoch(monitor, tmp_path, monkeypatch):
    kept = []
    from sansmax.engine import callbacks

    original = callbacks.save_weights

    def saving(network, path, **how):
        kept.append(len(rows_of(tmp_path / "run")) + 1 if (tmp_path / "run" / "metrics.csv").exists() else 1)
        original(network, path, **how)

    monkeypatch.setattr(callbacks, "save_weights", saving)
    # too high a rate, so that later epochs are worse than earlier ones
    train_only(tiny(epochs=6, monitor=monitor, optim__lr=0.3), tmp_path / "run")
    values = [row[monitor] if monitor != "last" else row["epoch"] for row in rows_of(tmp_path / "run")]
    best = np.argmin(values) if monitor == "val_loss" else np.argmax(values)
    assert kept[-1] == best + 1
    improved = [
        i + 1 for i, v in enumerate(values) if all((v < w) if monitor == "val_loss" else (v > w) for w in values[:i])
    ]
    assert kept == improved


def test_patience_ends_training_early(tmp_path):
    train(tiny(epochs=30, patience=2, optim__lr=0.3), tmp_path / "run")
    losses = [row["val_loss"] for row in rows_of(tmp_path / "run")]
    assert len(losses) < 30
    assert int(np.argmin(losses)) == len(losses) - 3
    assert Run.open(tmp_path / "run").info["state"] == "finished"


def test_an_average_of_the_weights_is_what_is_kept(tmp_path):
    train_only(tiny(epochs=1, optim__model_ema_decay=0.9), tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    kept = load_file(tmp_path / "run" / "model.safetensors")
    moved = 0
    for name, value in kept.items():
        assert torch.equal(value, state[f"ema.module.{name}"])
        moved += not torch.equal(value, state[f"network.{name}"])
    assert moved > 0.9 * len(kept)


def test_weights_of_classes_are_by_inverse_frequency():
    weights = class_weights(np.array([0, 0, 0, 1]), 3)
    assert weights.tolist() == pytest.approx([4 / 9, 4 / 3, 4 / 3])


def test_files_of_a_run_are_for_everybody(tmp_path):
    train_only(tiny(epochs=1), tmp_path / "run")
    assert {oct(p.stat().st_mode & 0o777) for p in (tmp_path / "run").iterdir()} == {
        oct((tmp_path / "run" / "config.yaml").stat().st_mode & 0o777)
    }


def test_weights_that_do_not_fit_are_listed(tmp_path):
    run = train_only(tiny(epochs=1), tmp_path / "run")
    network = Run.open(run).load_model()
    del network.norm
    network.extra = torch.nn.Linear(1, 1)
    with pytest.raises(InputError, match=r"missing \(-\) and surplus \(\+\):\n  - extra.bias\n  - extra.weight\n  \+ "):
        load_weights(network, tmp_path / "run" / "model.safetensors")


def test_training_works_in_a_thread(tmp_path):
    import threading

    worker = threading.Thread(target=lambda: train_only(tiny(epochs=1), tmp_path / "run"))
    worker.start()
    worker.join()
    assert len(rows_of(tmp_path / "run")) == 1


def test_training_is_silent_from_python_unless_asked(tmp_path, capfd):
    run = package.train(package.load_config(None, {**KEYS, "epochs": 1}), tmp_path / "run")
    assert isinstance(run, package.Run)
    assert capfd.readouterr() == ("", "")
    train_only(tiny(epochs=1), tmp_path / "loud", reporter=Reporter())
    assert "epoch   1/1" in capfd.readouterr().err


def test_a_source_without_images_to_validate_with_is_refused(tmp_path):
    message = refused_late("mosaics:grid=4,share=0.4,train=64,val=0,test=20", tmp_path)
    assert "has no images to validate with" in message
    assert not (tmp_path / "run").exists()


def refused_late(source, tmp_path):
    said = sansmax("train", source, "--output", tmp_path / "run", *TINY, "--image-size", "32")
    assert said.status == 2 and "Traceback" not in said.err
    return said.err.partition("error: ")[2]


def test_a_table_is_trained_on_by_the_columns_named(tmp_path):
    folder_of_pictures(tmp_path / "data", count=10)
    lines = [f"{p.parent.name}/{p.name},{p.parent.name},{p.name}" for p in sorted((tmp_path / "data").rglob("*.png"))]
    (tmp_path / "table.csv").write_text("\n".join(["a,b,c", *lines]))
    words = ("--path-column", "a", "--label-column", "b", "--root", tmp_path / "data", *TINY, "--image-size", "32")
    said = sansmax("train", tmp_path / "table.csv", "--output", tmp_path / "run", *words)
    assert said.status == 0, said
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.data.path_column, config.data.label_column) == ("a", "b")
    assert "no column" in refused(
        "train", tmp_path / "table.csv", "-o", tmp_path / "r", *words[:-2], "--group-column", "z"
    )
