"""What a network starts from: given weights, another attention in their place, and what of it is trained."""

from collections.abc import Callable
from pathlib import Path

from torch import nn

from sansmax.engine.build import converted, create_model
from sansmax.engine.config import DataConfig, ModelConfig, load_config
from sansmax.engine.freezing import freeze
from sansmax.errors import InputError
from sansmax.files import write_text
from sansmax.models.weights import LoadReport, load_checkpoint

REPORT = "initial_checkpoint.txt"


def start_model(
    model: ModelConfig, data: DataConfig, num_classes: int, in_chans: int, say: Callable[[str], None] | None = None
) -> nn.Module:
    """`build_model`, with the weights it is to start from and in the state in which it is trained; see `started`."""
    return started(create_model(model, data, num_classes, in_chans), model, say)


def started(network: nn.Module, model: ModelConfig, say: Callable[[str], None] | None = None) -> nn.Module:
    """The plain network `network` with `initial_checkpoint`, `convert`, `freeze` and `grad_checkpointing` applied.

    Weights are loaded before the attention is swapped, or after it where they are a run's whose own was swapped.
    Positions are resampled and channels shared out where the file has others; where it has other classes the
    classifier stays new. `say` is told what was loaded, line by line.

    Raises InputError for weights that do not fit, and for what the network cannot do.
    """
    said = say or (lambda _: None)
    if model.initial_checkpoint is None:
        network = converted(network, model)
    elif of_converted(model.initial_checkpoint):
        network = converted(network, model)
        said(_load(network, model.initial_checkpoint))
    else:
        said(_load(network, model.initial_checkpoint))
        network = converted(network, model)
    if model.convert is not None:
        said(f"attention: {model.convert}, in place of that of {model.name}")
    if frozen := freeze(network, model.freeze):
        held = sum(network.get_parameter(name).numel() for name in frozen)
        whole = sum(p.numel() for p in network.parameters())
        said(f"frozen: {held:,} of {whole:,} parameters, {len(frozen)} tensors")
    if model.grad_checkpointing:
        _checkpoint_activations(network, model.name)
    return network


def of_converted(source: str) -> bool:
    """Whether weights are of a run whose attention was swapped."""
    path = Path(source)
    file = (path if path.is_dir() else path.parent) / "config.yaml"
    if not (file.is_file() and (file.parent / "run.json").is_file()):
        return False
    try:
        return load_config(file).model.convert is not None
    except InputError:
        # of bags, or of another version: its weights decide
        return "\n  convert: null" not in file.read_text(encoding="utf-8")


def _load(network: nn.Module, source: str) -> str:
    report = load_checkpoint(
        network, source, resize_pos_embed=True, adapt_classifier=True, adapt_in_chans=True, ignore=_extra_heads(network)
    )
    return "\n".join([str(report), *_new_classifier(network, report)])


def _extra_heads(network: nn.Module) -> list[str]:
    """What a distilled DeiT's file has beside a network with one classifier."""
    return [] if hasattr(network, "head_dist") else ["head_dist.*"]


def _new_classifier(network: nn.Module, report: LoadReport) -> list[str]:
    if not report.left:
        return []
    classes = getattr(network, "num_classes", None)
    return [f"a new classifier of {classes} classes: the file has another number, or none"]


def _checkpoint_activations(network: nn.Module, name: str) -> None:
    try:
        network.set_grad_checkpointing(True)  # pyright: ignore[reportCallIssue]
    except (AttributeError, AssertionError):
        raise InputError(
            f"{name} cannot make its activations again (model.grad_checkpointing); leave it out, and lower batch_size "
            "with optim.grad_accum_steps for less memory"
        ) from None


def at_hand(model: ModelConfig, folder: Path, resume: bool) -> ModelConfig:
    """The configuration of a network that a checkpoint will fill: without the weights it started from.

    These may be gone by then. Where a run was stopped before its first checkpoint they are needed again.
    """
    if not resume or not any(folder.glob("*.ckpt")):
        return model
    return model.model_copy(update={"pretrained": False, "initial_checkpoint": None})


def write_report(folder: Path, lines: list[str]) -> None:
    """Keeps what was said of the start in the run's folder."""
    if lines:
        write_text(folder / REPORT, "\n".join(lines) + "\n")
