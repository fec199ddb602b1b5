"""Short runs for the tests: a tiny network on tiny mosaics, the command line, and pictures on disk."""

import contextlib
import csv
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from PIL import Image

from sansmax.cli import main
from sansmax.engine.config import load_config
from sansmax.engine.train import train
from sansmax.report.tables import read_rows

SOURCE = "mosaics:grid=4,share=0.4,train=64,val=20,test=20"
MODEL = "seqnorm_vit_pico_patch8_128"
# 4 steps an epoch
KEYS = {
    "data.source": SOURCE,
    "model.name": MODEL,
    "model.options.depth": 1,
    "data.image_size": 32,
    "epochs": 2,
    "batch_size": 16,
    "seed": 3,
}
# every random number there is: augmentation, mixing, dropout, drop path, and an average with a memory
RANDOM = {
    "augment.hflip": 0.5,
    "augment.rotate": 20.0,
    "augment.noise": 0.05,
    "augment.erase": 0.3,
    "augment.auto": "rand-m5-mstd0.5",
    "optim.mixup": 0.4,
    "optim.cutmix": 0.4,
    "optim.model_ema_decay": 0.9,
    "model.options.drop_rate": 0.2,
    "model.options.proj_drop_rate": 0.2,
    "model.options.drop_path_rate": 0.3,
}
TINY = ("--model", MODEL, "--set", "model.options.depth=1", "--epochs", "1", "--batch-size", "16")


def tiny(**keys):
    """The configuration of a tiny run; dots of a key are written as two underscores."""
    return load_config(None, {**KEYS, **{name.replace("__", "."): value for name, value in keys.items()}})


def options(keys):
    """A configuration as options of the command line."""
    return [word for name, value in keys.items() for word in ("--set", f"{name}={value}")]


def train_only(config, folder, **how):
    """Trains without the report at the end."""
    with mock.patch("sansmax.engine.train.finish_run", lambda output, data, reporter: output):
        return train(config, folder, **how)


class Said(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str


def sansmax(*words):
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["sansmax", *map(str, words)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = 0 if ended.code is None else ended.code
    return Said(status, out.getvalue(), err.getvalue())


def start(*words):
    """The command line in a process and a group of its own, with as many threads as this one has."""
    threads = str(torch.get_num_threads())
    return subprocess.Popen(
        [sys.executable, "-m", "sansmax", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
    )


def refused(*words):
    """The message of a command that ends as wrong input does: status 2, one message, no traceback, no output."""
    said = sansmax(*words)
    assert said.status == 2, said
    assert "Traceback" not in said.err and "fault of ours" not in said.err
    assert said.err.count("error: ") == 1 and said.out == "", said
    return said.err.partition("error: ")[2].strip()


def rows_of(folder):
    """The rows of metrics.csv but for what a clock measured."""
    clocks = ("seconds", "images_per_second")
    return [{k: v for k, v in row.items() if k not in clocks} for row in read_rows(folder / "metrics.csv")]


def result_of(folder):
    """All of a run that has to be the same when it is trained again."""
    predictions = [p.read_bytes() for p in sorted(folder.glob("predictions_*"))]
    return rows_of(folder), (folder / "model.safetensors").read_bytes(), predictions


def read_csv(path):
    """Header and rows as dicts of text."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def picture(label, seed, size=(24, 20), colour=False, dtype=np.uint8):
    """Noise with a bright square whose place is the label, so that classes can be told apart."""
    rng = np.random.default_rng([label, seed])
    top = np.iinfo(dtype).max
    pixels = rng.integers(0, top // 3, (*size, 3) if colour else size, dtype=dtype)
    side = size[1] // 3
    pixels[2 : 2 + side, side * label : side * (label + 1)] = top
    return pixels


def folder_of_pictures(root, classes=("benign", "malignant"), count=12, splits=("",), **how):
    """A folder per class of PNG files, under a folder per split where there are any; returns the folder."""
    seed = 0
    for split in splits:
        for label, name in enumerate(classes):
            where = Path(root, split, name)
            where.mkdir(parents=True)
            for i in range(count):
                seed += 1
                save(where / f"{name[0]}{i:02}.png", picture(label, seed, **how))
    return Path(root)


def save(path, pixels):
    """A PNG file, of 16 bit where the pixels are."""
    if pixels.dtype == np.uint16:
        import imagecodecs

        path.write_bytes(imagecodecs.png_encode(pixels))
    else:
        Image.fromarray(pixels).save(path)
    return path
