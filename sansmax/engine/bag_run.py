"""The folder of a run on bags of features: what is in it, and how it is opened.

config.yaml        the whole configuration
run.json           task, classes, encoder and width of the features, versions, machine, command, state
splits.csv         which patient was in which part
data.txt           what was found in bags and table, and who was left out
metrics.csv        a row per epoch
model.safetensors  the best weights so far; outputs are in the units of the targets
last.ckpt          everything needed to go on; previous.ckpt is the one before it
predictions_val.csv, metrics.json    written at the end
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from sansmax.engine.bag_config import BagConfig, load_bag_config
from sansmax.engine.build import converted
from sansmax.engine.config import ModelConfig, dump_config
from sansmax.engine.run import MARKS, environment, is_run, load_weights, read_json, write_json
from sansmax.engine.stopping import resume_command
from sansmax.errors import InputError, unknown_name
from sansmax.files import write_text
from sansmax.models.slide import FeatureNetwork, reads_features

KIND = "bags"


@dataclass(frozen=True)
class BagRun:
    """An opened run folder."""

    folder: Path
    config: BagConfig
    task: str
    classes: tuple[str, ...]
    info: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> "BagRun":
        """Opens the folder that `sansmax train LABELS --bags DIR` wrote.

        Raises InputError if it is none.
        """
        folder = Path(folder)
        if (folder / "cross_validation.json").is_file():
            raise InputError(
                f"{folder} is a cross-validation, with a run for each fold; give one of them: {folder}/split-0"
            )
        if not is_run(folder):
            lacking = " and ".join(m for m in MARKS if not (folder / m).exists())
            raise InputError(f"{folder} is not a run: it has no {lacking}")
        info = read_json(folder / "run.json")
        if info.get("kind") != KIND:
            raise InputError(f"{folder} is a run on images, not on bags of features")
        return cls(folder, load_bag_config(folder / "config.yaml"), info["task"], tuple(info["classes"]), info)

    @property
    def encoder(self) -> str | None:
        """The encoder of the features that the run was trained on, where they said so."""
        return self.info["encoder"]

    @property
    def in_features(self) -> int:
        """The width of these features."""
        return self.info["in_features"]

    def load_model(self, device: torch.device | str = "cpu") -> FeatureNetwork:
        """The network with its best weights, in evaluation mode; its outputs are in the units of the targets.

        Raises InputError where training has not come to its first evaluation, or the weights do not fit.
        """
        path = self.folder / "model.safetensors"
        if not path.exists():
            raise InputError(
                f"{self.folder} has no weights yet: training stopped before the end of its first epoch. "
                f"Go on with: {resume_command(self.folder)}"
            )
        network = build_slide_network(self.config.model, self.in_features, len(self.classes))
        load_weights(network, path)
        return network.to(device).eval()

    def check_features(self, encoder: str | None, width: int | None, where: str | Path) -> None:
        """Raises InputError for features of another encoder or width than the run's, naming both."""
        if width is not None and width != self.in_features:
            raise InputError(
                f"{where} holds features of width {width} (encoder {encoder or 'not named'}), the run {self.folder} "
                f"was trained on width {self.in_features} (encoder {self.encoder or 'not named'}); make features with "
                "the encoder of training"
            )
        if encoder and self.encoder and encoder != self.encoder:
            raise InputError(
                f"{where} holds features of the encoder {encoder!r}, the run {self.folder} was trained on those of "
                f"{self.encoder!r}; make features with the encoder of training"
            )


def is_bag_run(folder: str | Path) -> bool:
    """Whether a folder is a run on bags of features."""
    folder = Path(folder)
    return is_run(folder) and read_json(folder / "run.json").get("kind") == KIND


def build_slide_network(model: ModelConfig, in_features: int, outputs: int) -> FeatureNetwork:
    """The network of a configuration, for features of this width, with the attention of `model.convert` if given.

    Raises InputError for an unknown name (nearest ones), a network that reads images, and wrong arguments.
    """
    network = converted(create_slide_network(model, in_features, outputs), model)
    assert isinstance(network, FeatureNetwork)
    return network


def start_slide_network(
    model: ModelConfig, in_features: int, outputs: int, say: Callable[[str], None] | None = None
) -> FeatureNetwork:
    """`build_slide_network`, with the weights it is to start from and in the state in which it is trained."""
    from sansmax.engine.starting import started

    network = started(create_slide_network(model, in_features, outputs), model, say)
    assert isinstance(network, FeatureNetwork)
    return network


def create_slide_network(model: ModelConfig, in_features: int, outputs: int) -> FeatureNetwork:
    """The network by its name alone, before any conversion."""
    from sansmax.models import list_models

    name = model.name
    slides = [n for n in list_models() if "_slide_" in n]
    if not timm.is_model(name.split(".")[0]):
        raise unknown_name("model", name, slides)
    arguments: dict[str, Any] = {"num_classes": outputs, "in_features": in_features, **model.options}
    try:
        network: nn.Module = timm.create_model(name, pretrained=model.pretrained, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        if name not in slides:
            raise _reads_images(name, slides) from None
        raise InputError(f"{name} cannot be built with {arguments}: {error}") from error
    if not reads_features(network):
        raise _reads_images(name, slides)
    assert isinstance(network, FeatureNetwork)
    return network


def _reads_images(name: str, slides: list[str]) -> InputError:
    return InputError(f"{name} reads images, and bags hold features; models of features are {', '.join(slides)}")


def write_start(folder: Path, config: BagConfig, info: dict[str, Any], command: str) -> None:
    """Writes config.yaml and run.json of a new run."""
    written = {"kind": KIND, **info, "command": command, "environment": environment(), "state": "started"}
    write_text(folder / "config.yaml", dump_config(config))
    write_json(folder / "run.json", written)
