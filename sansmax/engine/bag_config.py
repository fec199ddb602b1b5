"""The configuration of a run on bags of features: every key, its default, its unit.

Keys that a run on images has too mean the same there; see `sansmax.engine.config`.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sansmax.engine.config import (
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    Precision,
    Section,
    TrackConfig,
    load_config,
    split_override,
)

# patients of a step; a step is the risk set of survival, and one with few events teaches little
BATCH_SIZE, SURVIVAL_BATCH_SIZE = 16, 64


class BagDataConfig(Section):
    """Where the bags and the labels are, and what is to be predicted."""

    bags: str = ""
    """Folder of bags, one file per slide."""
    labels: str = ""
    """Table of labels."""
    task: Literal["classification", "multilabel", "regression", "survival"] | None = None
    """None: recognised by the table where it can be."""
    layout: str | None = None
    """Layout of the bags; none: recognised by looking."""
    mpp: float | None = Field(default=None, gt=0.0)
    """Micrometres per level-0 pixel, for bags that do not say."""
    label: tuple[str, ...] | None = None
    """Columns of the table that hold the targets."""
    case_column: str | None = None
    slide_column: str | None = None
    time_column: str | None = None
    status_column: str | None = None
    site_column: str | None = None
    slide_table: str | None = None
    """Second table, which says which slides are whose."""
    classes: tuple[str, ...] | None = None
    """Order of the classes."""
    splits: str | None = None
    """Folder or file of given splits."""
    per: Literal["patient", "slide"] = "patient"
    """What one prediction is made for."""
    allow_missing: bool = False
    """Leave out labels without bag and bags without label."""
    folds: int | None = Field(default=None, ge=2)
    """Cross-validation; none: one split."""
    by_site: bool = False
    """Keep the patients of a site in one part."""
    val_fraction: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Of the patients that are not tested, the share that validates."""
    test_fraction: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Without folds or given splits."""
    workers: int = Field(default=1, ge=1)
    """Threads that read bags ahead."""

    @field_validator("label", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class TokenConfig(Section):
    """How many tokens a step sees, and what happens to them in training."""

    batch_tokens: int = Field(default=65536, ge=1)
    """Tokens that are in work at a time; changes memory, and no number."""
    keep: tuple[float, float] = (1.0, 1.0)
    """Least and largest share of a bag's tokens that a step sees, drawn for each bag and step."""
    most: int | None = Field(default=None, ge=1)
    """Most tokens of a bag that a step sees, drawn at random."""
    mix: float = Field(default=0.5, ge=0.0, le=1.0)
    """Probability that a bag is mixed with another one of its step, tokens and targets in a random share; not for
    survival. It makes scores of tokens point at what carries the answer."""
    noise: float = Field(default=0.0, ge=0.0)
    """Standard deviation of noise on the features, in standard deviations of theirs."""
    drop: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the numbers of each feature that are dropped."""

    @field_validator("keep")
    @classmethod
    def _shares(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0.0 < value[0] <= value[1] <= 1.0:
            raise ValueError("must be two shares of (0, 1], the smaller one first")
        return value


class BagOptimConfig(OptimConfig):
    """Optimiser, schedule and loss; see `OptimConfig`."""

    lr: float = Field(default=3e-4, gt=0.0)
    weight_decay: float = Field(default=0.01, ge=0.0)
    min_lr: float = Field(default=1e-6, ge=0.0)
    ties: Literal["efron", "breslow"] = "efron"
    """Of survival: how events at one time are counted."""

    @model_validator(mode="after")
    def _unmixed(self) -> "BagOptimConfig":
        if self.mixup or self.cutmix:
            raise ValueError("mixup and cutmix mix images of one size; bags have tokens.mix and tokens.noise instead")
        if self.loss == "bce":
            raise ValueError("bce is the loss of several labels already (data.task=multilabel); leave it out, or focal")
        return self


class BagConfig(Section):
    """A whole run on bags."""

    data: BagDataConfig = BagDataConfig()
    model: ModelConfig = ModelConfig(name="seqnorm_slide_small")
    tokens: TokenConfig = TokenConfig()
    optim: BagOptimConfig = BagOptimConfig()
    track: TrackConfig = TrackConfig()
    parallel: ParallelConfig = ParallelConfig()
    epochs: int = Field(default=32, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    """Patients of a step (of `grad_accum_steps` times as many); none: 16, and 64 for survival, the risk set."""
    balanced: bool = False
    """Show every class equally often."""
    seed: int = Field(default=0, ge=0)
    monitor: Literal["val_loss", "val_score", "last"] = "val_loss"
    """Which epoch's weights are kept: the best by loss or by the task's score (AUROC, R2, c-index), or the last."""
    patience: int | None = Field(default=None, ge=1)
    """Stop after so many epochs without a better `monitor`."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    precision: Precision = "32"
    """32, bf16 (autocast), or 16 (autocast to float16 with a scaled loss)."""
    checkpoint_minutes: float = Field(default=5.0, gt=0.0)
    """A checkpoint is written after every epoch, and within an epoch after so many minutes."""
    checkpoint_steps: int | None = Field(default=None, ge=1)
    """And after so many steps of the optimiser."""

    @field_validator("model", mode="before")
    @classmethod
    def _of_slides(cls, value: Any) -> Any:
        return {"name": "seqnorm_slide_small", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _consistent(self) -> "BagConfig":
        if self.patience is not None and self.monitor == "last":
            raise ValueError("patience needs a monitor to watch: val_loss or val_score")
        return self

    def patients(self, task: str) -> int:
        """Patients of a step: of `optim.grad_accum_steps` batches, which are one risk set and one set to mix in."""
        batch = self.batch_size or (SURVIVAL_BATCH_SIZE if task == "survival" else BATCH_SIZE)
        return batch * self.optim.grad_accum_steps


def load_bag_config(file: str | Path | None = None, overrides: list[str] | dict[str, Any] | None = None) -> BagConfig:
    """The configuration of a run on bags from a YAML file (or the defaults), changed by `key=value` texts or a dict."""
    return load_config(file, overrides, BagConfig)


def with_changes(config: BagConfig, changes: list[str]) -> BagConfig:
    """The configuration changed by `key=value` texts."""
    values = {**_flat(config.model_dump(mode="json")), **dict(map(split_override, changes))}
    return load_bag_config(None, values)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key != "options"
        out |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return out
