"""The folder of a run: what is in it, how it is opened, and what may be done to one that is there.

config.yaml        the whole configuration
run.json           classes, preprocessing, versions, machine, command, state
splits.csv         which image was in which split
bad_images.csv     images that were left out, with the reason (only with --skip-bad)
initial_checkpoint.txt  what was loaded to start from, and what is new
metrics.csv        a row per epoch
model.safetensors  the best weights so far
last.ckpt          everything needed to go on; previous.ckpt is the one before it
metrics.jsonl      the same and more, a line at a time
track.json, tensorboard/, wandb/, mlflow.db, mlartifacts/    trackers that were asked for
.lock              while it is being trained; see `sansmax.engine.locking`
metrics.json, predictions_*.csv, summary.md, report.html, *.png    written at the end
"""

import errno
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from sansmax.data.loading import Preprocess
from sansmax.engine.build import build_model
from sansmax.engine.config import TrainConfig, dump_config, load_config
from sansmax.engine.locking import LOCK
from sansmax.engine.stopping import resume_command
from sansmax.errors import InputError, listed
from sansmax.files import PARTIAL, replacing, write_text

MARKS = ("config.yaml", "run.json")
METRICS = "metrics.csv"
FILES = (
    *MARKS,
    *("splits.csv", "bad_images.csv", "data.txt", METRICS, "model.safetensors", "last.ckpt", "previous.ckpt"),
    "initial_checkpoint.txt",
    *("metrics.json", "predictions_*.csv", "predictions_*.json", "summary.md", "*.png", "demo.json"),
    *("metrics.jsonl", "report.html", "track.json", "mlflow.db*"),
    PARTIAL,
    LOCK,
)
# what is there before run.json makes a folder a run
START = ("splits.csv", "bad_images.csv", "initial_checkpoint.txt", "data.txt", "config.yaml")
FOLDERS = ("heatmaps", "tensorboard", "wandb", "mlartifacts")


@dataclass(frozen=True)
class Run:
    """An opened run folder."""

    folder: Path
    config: TrainConfig
    classes: tuple[str, ...]
    preprocess: Preprocess
    info: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """Opens the folder that `sansmax train` wrote.

        Raises InputError if it is none.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise InputError(f"the run {folder} does not exist; `sansmax train DATA --output {folder}` makes one")
        if not is_run(folder):
            raise InputError(
                f"{folder} is not a run: it has no {' and '.join(m for m in MARKS if not (folder / m).exists())}"
            )
        info = read_json(folder / "run.json")
        if "preprocess" not in info:
            raise InputError(
                f"{folder} is a run on bags of features, which reads no pictures; give bags, or another run"
            )
        config = load_config(folder / "config.yaml")
        return cls(folder, config, tuple(info["classes"]), Preprocess.from_dict(info["preprocess"]), info)

    def load_model(self, device: torch.device | str = "cpu") -> nn.Module:
        """The network with its best weights, in evaluation mode.

        Raises InputError where training has not come to its first evaluation, or the weights do not fit.
        """
        path = self.folder / "model.safetensors"
        if not path.exists():
            raise InputError(
                f"{self.folder} has no weights yet: training stopped before the end of its first epoch. "
                f"Go on with: {resume_command(self.folder)}"
            )
        options = self.config.model.model_copy(update={"pretrained": False})
        network = build_model(options, self.config.data, len(self.classes), self.preprocess.in_chans)
        load_weights(network, path)
        return network.to(device).eval()


def is_run(folder: Path) -> bool:
    """Whether a folder was written by a training run."""
    return all((folder / mark).is_file() for mark in MARKS)


def load_weights(network: nn.Module, path: Path) -> None:
    """Loads a safetensors file into the network, strictly."""
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors raises its own type for torn files
        raise InputError(
            f"{path} is damaged ({error}); go on from the checkpoint with --resume, or train again"
        ) from error
    have, want = set(weights), set(network.state_dict())
    if have != want:
        lines = [f"  - {k}" for k in sorted(want - have)] + [f"  + {k}" for k in sorted(have - want)]
        raise InputError(f"{path} does not fit the network; missing (-) and surplus (+):\n" + "\n".join(lines))
    network.load_state_dict(weights)


def save_weights(network: nn.Module, path: Path, *, write: bool = True) -> None:
    """Writes the weights as one whole safetensors file; where processes share them out, one of them has to `write`."""
    state: dict[str, Any] = network.state_dict()
    whole = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}
    if not write:
        return
    weights = {k: v.detach().cpu().contiguous() for k, v in whole.items()}
    # its own writer makes files that nobody else may read, and hides why a disk refused them
    data = save(weights, metadata={"format": "pt"})
    with replacing(path) as partial:
        partial.write_bytes(data)


def check_folder(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Raises InputError unless a run may be started, replaced or taken up in the folder; changes nothing."""
    if overwrite and resume:
        raise InputError("--overwrite starts anew and --resume goes on; give one of them")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file; give a folder")
    if resume:
        if not is_run(folder):
            raise InputError(f"{folder} holds no run to resume; leave out --resume to start one")
    elif _contents(folder):
        if half_a_start(folder):
            return
        if not is_run(folder):
            raise InputError(f"{folder} is not empty and holds no run; give an empty or new folder to --output")
        if not overwrite:
            raise InputError(
                f"{folder} holds another run; go on with it by --resume, replace it by --overwrite, "
                "or give another --output"
            )
        if foreign := sorted(p.name for p in folder.iterdir() if not _of_a_run(p)):
            raise InputError(
                f"{folder} holds files that are not of a run: {listed(foreign)}; move them away, or give another "
                "--output. Nothing was deleted"
            )


def prepare_folder(folder: Path, *, overwrite: bool, resume: bool) -> None:
    """Makes the folder of a new run, or checks that it can be taken up.

    Nothing is deleted but a run, and only with `overwrite`. Raises InputError for a folder that holds anything else,
    and for a run without `overwrite` or `resume`.
    """
    check_folder(folder, overwrite=overwrite, resume=resume)
    if resume:
        return
    try:
        for path in _contents(folder):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made: {error.strerror}") from None


def half_a_start(folder: Path) -> bool:
    """Whether a folder holds just what is written before run.json: training was killed in its first moments."""
    names = [path.name for path in _contents(folder) if not path.match(PARTIAL)]
    return {"splits.csv", "data.txt"} <= set(names) <= set(START)


def _contents(folder: Path) -> list[Path]:
    """What is in the folder, if it is there, but for the lock."""
    return [path for path in folder.iterdir() if path.name != LOCK] if folder.is_dir() else []


def _of_a_run(path: Path) -> bool:
    """Whether a run, a demo or an interrupted write of theirs leaves a file or folder of this name."""
    if path.is_dir():
        return is_run(path) or path.name in FOLDERS or path.name.startswith("evaluate-")
    return any(path.match(pattern) for pattern in FILES)


@contextmanager
def explained_disk(folder: Path) -> Iterator[None]:
    """Says what a full disk means for the run: the files written before are whole."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        go_on = f"go on with: {resume_command(folder)}" if is_run(folder) else "start again"
        raise InputError(
            f"the disk is full: {folder} could not be written ({error.strerror}). What was written before is whole; "
            f"free some space and {go_on}"
        ) from error


def write_start(
    folder: Path, config: TrainConfig, classes: tuple[str, ...], preprocess: Preprocess, command: str
) -> dict[str, Any]:
    """Writes config.yaml and run.json of a new run."""
    info = {
        "classes": list(classes),
        "preprocess": preprocess.to_dict(),
        "command": command,
        "environment": environment(),
        "state": "started",
    }
    write_text(folder / "config.yaml", dump_config(config))
    write_json(folder / "run.json", info)
    return info


def environment() -> dict[str, Any]:
    """Versions and machine, for the record of a result."""
    names = ("sansmax", "torch", "torchvision", "timm", "lightning", "numpy", "scikit-learn")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in names},
        "machine": machine(),
        "threads": torch.get_num_threads(),
    }


def machine() -> str:
    """Processor, cores and accelerator in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    cuda = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores} cores{cuda}, {platform.system()}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the run; InputError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged: {error}") from None


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a whole JSON file."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
