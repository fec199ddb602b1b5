"""The configuration of a training run: every key, its default, its unit, and errors that name the nearest key.

Names are timm's. A value is set by its dotted name, `optim.lr=3e-4`, or by its last part where that is unique.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from sansmax.errors import InputError

Config = TypeVar("Config", bound=BaseModel)


def _as_text(value: Any) -> Any:
    """A whole number as text: YAML and the command line read 16 as a number."""
    return f"{value:.0f}" if isinstance(value, int | float) and value == int(value) else value


Precision = Annotated[Literal["32", "bf16", "16"], BeforeValidator(_as_text)]


class Section(BaseModel):
    """Keys that belong together; unknown ones are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class DataConfig(Section):
    """What to read, how to split it, and how pictures become tensors."""

    source: str = ""
    root: str | None = None
    path_column: str | None = None
    label_column: str | None = None
    split_column: str | None = None
    group_column: str | None = None
    val_fraction: float = Field(default=0.15, gt=0.0, lt=1.0)
    test_fraction: float = Field(default=0.15, ge=0.0, lt=1.0)
    check: bool = True
    """Decode every image file once before training, so that a broken one is found in the first minute."""
    skip_bad: bool = False
    image_size: int | tuple[int, int] = 224
    """Pixels, or (height, width)."""
    resize_mode: Literal["squash", "crop", "pad"] = "squash"
    in_chans: Literal[1, 3] | None = None
    """Channels of the network; none: 1 if every image is grey, else 3."""
    mean: tuple[float, ...] | None = None
    """Per channel, of values in [0, 1]; none: that of the model."""
    std: tuple[float, ...] | None = None
    workers: int = Field(default=0, ge=0)
    """Processes that load images; 0 loads in the training process."""

    @field_validator("image_size")
    @classmethod
    def _positive(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ValueError("must be at least 1 pixel")
        return value

    @property
    def height_width(self) -> tuple[int, int]:
        """The size of the network's input."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)


class ModelConfig(Section):
    """Which network of timm's registry, ours included, and its arguments."""

    name: str = "seqnorm_vit_tiny_patch16_224"
    pretrained: bool = False
    """Start from the weights that timm has for the name (downloads them)."""
    initial_checkpoint: str | None = None
    """Start from these weights: a file or run that `sansmax.load_checkpoint` reads; a head of other classes is new."""
    convert: str | None = None
    """Swap the attention for this one once the weights are there, as `sansmax.convert` does."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are: names of theirs or of layers, with * for anything, or "backbone" for all but
    the classifier."""
    grad_checkpointing: bool = False
    """Make activations again in the backward pass: less memory, a third more time, the same numbers."""
    options: dict[str, Any] = {}
    """Further arguments of `timm.create_model`: `model.options.depth=6`."""

    @field_validator("freeze", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_start(self) -> "ModelConfig":
        if self.pretrained and self.initial_checkpoint is not None:
            raise ValueError("give pretrained or initial_checkpoint: a network starts from one set of weights")
        return self


class AugmentConfig(Section):
    """Random changes of training pictures (torchvision); all are off at 0."""

    hflip: float = Field(default=0.5, ge=0.0, le=1.0)
    """Probability of a horizontal flip."""
    vflip: float = Field(default=0.0, ge=0.0, le=1.0)
    rotate: float = Field(default=0.0, ge=0.0, le=180.0)
    """Largest angle in degrees, either way."""
    translate: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Largest shift as a share of the side."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest zoom factor."""
    crop_scale: tuple[float, float] | None = None
    """Random resized crop: smallest and largest share of the area."""
    crop_ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    brightness: float = Field(default=0.0, ge=0.0)
    """Largest relative change of brightness."""
    contrast: float = Field(default=0.0, ge=0.0)
    """Largest relative change of contrast."""
    color: float = Field(default=0.0, ge=0.0)
    """Largest relative change of saturation."""
    blur: float = Field(default=0.0, ge=0.0)
    """Largest standard deviation of a Gaussian blur in pixels."""
    noise: float = Field(default=0.0, ge=0.0)
    """Largest standard deviation of Gaussian noise, of values in [0, 1]."""
    erase: float = Field(default=0.0, ge=0.0, le=1.0)
    """Probability of random erasing."""
    fill: float | Literal["edge"] = 0.0
    """Grey value in [0, 1] of what comes into view from outside, or "edge": the border goes on."""
    auto: str | None = None
    """timm's auto-augment string, such as `rand-m9-mstd0.5-inc1`."""


class OptimConfig(Section):
    """Optimiser, schedule and loss (timm)."""

    opt: str = "adamw"
    opt_betas: tuple[float, ...] | None = None
    """Decay rates of an optimiser's averages; none: its own."""
    opt_eps: float | None = Field(default=None, gt=0.0)
    """Smallest denominator of an optimiser; none: its own."""
    momentum: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Of optimisers that have one (SGD, Muon, ...)."""
    lr: float = Field(default=1e-3, gt=0.0)
    weight_decay: float = Field(default=0.05, ge=0.0)
    sched: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = Field(default=1.0, ge=0.0)
    warmup_lr: float = Field(default=1e-6, ge=0.0)
    min_lr: float = Field(default=1e-5, ge=0.0)
    layer_decay: float | None = Field(default=None, gt=0.0, le=1.0)
    clip_grad: float | None = Field(default=1.0, gt=0.0)
    """Largest norm of the gradient."""
    grad_accum_steps: int = Field(default=1, ge=1)
    """Batches whose gradients make one step of the optimiser: that of one batch of all their images."""
    loss: Literal["cross_entropy", "bce", "focal"] = "cross_entropy"
    """bce: a yes or no for each class (timm); focal: images that are answered well count less (Lin et al. 2017)."""
    focal_gamma: float = Field(default=2.0, ge=0.0)
    """How much less: an image of probability p counts (1 - p) to this power; 0 is cross entropy."""
    smoothing: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Label smoothing."""
    class_weights: bool = False
    """Weight the loss by the inverse frequency of the classes."""
    mixup: float = Field(default=0.0, ge=0.0)
    cutmix: float = Field(default=0.0, ge=0.0)
    mixup_prob: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the batches that mixup or CutMix mixes."""
    mixup_switch_prob: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the mixed batches that CutMix mixes, where both are on."""
    mixup_off_epoch: int | None = Field(default=None, ge=1)
    """Epochs after which nothing is mixed any more; none: mixed to the end."""
    model_ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Evaluate and keep an exponential moving average of the weights."""

    @model_validator(mode="after")
    def _hard_labels(self) -> "OptimConfig":
        if self.loss == "focal" and (self.mixup or self.cutmix or self.smoothing):
            raise ValueError(
                "the focal loss cannot be combined with mixup, cutmix or smoothing: it asks how probable the one right "
                "class is; leave them out, or take loss=cross_entropy or loss=bce"
            )
        return self


class DistillConfig(Section):
    """Learning from a trained network beside the labels."""

    teacher: str | None = None
    """A run, or a model of timm's registry; none: labels alone."""
    teacher_checkpoint: str | None = None
    """Weights of a teacher that is named by its model."""
    kind: Literal["soft", "hard"] = "soft"
    """soft: the teacher's probabilities (Hinton et al.); hard: its answer (DeiT)."""
    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the teacher in the loss."""
    temperature: float = Field(default=3.0, gt=0.0)
    """Of kind soft: both networks' logits are divided by it, so that small probabilities count, too."""

    @model_validator(mode="after")
    def _whose(self) -> "DistillConfig":
        if self.teacher_checkpoint is not None and self.teacher is None:
            raise ValueError("teacher_checkpoint needs the name of its network: distill.teacher=NAME")
        return self


class TrackConfig(Section):
    """Where the figures of a run go beside metrics.csv and metrics.jsonl, which are always there."""

    loggers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Which of them, if any."""
    project: str = "sansmax"
    """Project of W&B, experiment of MLflow."""
    name: str | None = None
    """Name of the run there; none: that of its folder."""
    offline: bool = False
    """W&B writes to the run's folder and sends nothing."""
    log_steps: int = Field(default=50, ge=1)
    """Steps of the optimiser between two lines of metrics.jsonl on loss, learning rate and gradient."""


class ParallelConfig(Section):
    """How many processes share the work; the numbers of a run do not depend on it, but for rounding.

    `batch_size` is that of all processes together.
    """

    devices: int | None = Field(default=None, ge=1)
    """Processes of this machine, a device each; none: as many as torchrun or SLURM started, else 1."""
    num_nodes: int = Field(default=1, ge=1)
    """Machines."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process holds the network; fsdp: parameters and optimiser are shared out."""
    sequence_parallel: int = Field(default=1, ge=1)
    """Processes that share the tokens of one image."""


class TrainConfig(Section):
    """A whole run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    distill: DistillConfig = DistillConfig()
    track: TrackConfig = TrackConfig()
    parallel: ParallelConfig = ParallelConfig()
    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Images of a step, over all processes."""
    balanced: bool = False
    """Show every class equally often."""
    seed: int = Field(default=0, ge=0)
    tta_hflip: bool = False
    """Average the probabilities of evaluation and prediction over the picture and its mirror image."""
    monitor: Literal["val_loss", "val_auc", "val_accuracy", "last"] = "val_loss"
    """Which epoch's weights are kept: the best by this figure, or the last."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many epochs without a better `monitor`."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Precision = "32"
    """32, bf16 (autocast), or 16 (autocast to float16 with a scaled loss)."""
    checkpoint_minutes: float = Field(default=5.0, gt=0.0)
    """A checkpoint is written after every epoch, and within an epoch after so many minutes."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """And after so many steps of the optimiser."""

    @model_validator(mode="after")
    def _consistent(self) -> "TrainConfig":
        if self.patience is not None and self.monitor == "last":
            raise ValueError("patience needs a monitor to watch: val_loss, val_auc or val_accuracy")
        if self.balanced and self.optim.class_weights:
            raise ValueError("give balanced or optim.class_weights: both would count rare classes twice")
        return self


def dotted_names(model: type[BaseModel] = TrainConfig, prefix: str = "") -> list[str]:
    """Every key of the configuration, sections joined by dots."""
    names = []
    for name, info in model.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            names += dotted_names(section, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def load_config(
    file: str | Path | None = None,
    overrides: list[str] | dict[str, Any] | None = None,
    kind: type[Config] = TrainConfig,
) -> Config:
    """The configuration of a YAML file (or the defaults), changed by `key=value` texts or a dict of dotted names.

    `kind` is the class of the configuration. Raises InputError for an unreadable file, an unknown key (with the nearest
    names) and a value of the wrong kind.
    """
    values: dict[str, Any] = {} if file is None else _read_yaml(Path(file))
    items = overrides.items() if isinstance(overrides, dict) else map(split_override, overrides or [])
    for key, value in items:
        _set(values, full_name(key, kind), value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(_explain(error, kind)) from None


def full_name(key: str, kind: type[BaseModel] = TrainConfig) -> str:
    """The dotted name that `key` stands for: itself, or the only name that ends with it."""
    names = dotted_names(kind)
    if key in names or key.startswith("model.options."):
        return key
    ending = [n for n in names if n.rsplit(".", 1)[-1] == key]
    if len(ending) == 1:
        return ending[0]
    raise InputError(f"unknown key {key!r}: {_did_you_mean(key, kind)}")


def _did_you_mean(key: str, kind: type[BaseModel]) -> str:
    names = dotted_names(kind)
    by_end = {n.rsplit(".", 1)[-1]: n for n in names}
    like = difflib.get_close_matches(key, names, n=3, cutoff=0.6)
    like += [by_end[m] for m in difflib.get_close_matches(key.rsplit(".", 1)[-1], by_end, n=3, cutoff=0.6)]
    like = list(dict.fromkeys(like))
    if like:
        return f"did you mean {' or '.join(like[:3])}?"
    return f"the keys are {', '.join(names)}; arguments of the network are set by model.options.NAME"


def split_override(text: str) -> tuple[str, Any]:
    """Key and value of a `key=value` text."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set takes key=value, got {text!r}; for example --set optim.lr=3e-4")
    return key.strip(), parse_value(value.strip())


def parse_value(text: str) -> Any:
    """A value as YAML reads it, and numbers such as 3e-4, which YAML takes for text."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"the value {text!r} is not valid YAML; put texts with special characters in quotes") from None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise InputError(f"{name}: {section} is a value, not a section")
    values[last] = value


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"the configuration {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path} must hold keys and values such as 'epochs: 30', it holds a {type(values).__name__}")
    return values


def _explain(error: ValidationError, kind: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("tuple[", "int", "function-")))
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {name!r}: {_did_you_mean(name, kind)}")
        else:
            lines.append(f"{name or 'configuration'}: {item['msg']}, got {item['input']!r}")
    return "\n".join(dict.fromkeys(lines))


def dump_config(config: BaseModel) -> str:
    """The configuration as YAML, to be read back by `load_config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(old: BaseModel, new: BaseModel) -> list[str]:
    """The keys in which two configurations differ, as `key: old -> new`."""

    def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in values.items():
            out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return out

    a, b = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in sorted(a | b) if a.get(k) != b.get(k)]
