"""The records of a run on bags: rows of the task's figures, and speed in tokens."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from sansmax.data.bag_loading import Pack
from sansmax.engine.bag_config import BagConfig
from sansmax.engine.bag_losses import Objective
from sansmax.engine.bag_module import BagModule
from sansmax.engine.callbacks import Recorder, in_words
from sansmax.engine.module import Classifier, not_finite
from sansmax.engine.progress import Bar
from sansmax.engine.stopping import StopSignal
from sansmax.report.case_metrics import PRIMARY, TITLES, sampler

COLUMNS = ("epoch", "step", "seconds", "lr", "train_loss", "val_loss")
SPEED = "tokens_per_second"


class BagRecorder(Recorder):
    """`Recorder` for runs on bags of a `task`: `targets` are those of the validation patients, of `classes` classes."""

    def __init__(
        self,
        folder: Path,
        config: BagConfig,
        stop: StopSignal,
        bar: Bar,
        batches: int,
        task: str,
        targets: np.ndarray,
        classes: int,
    ) -> None:
        super().__init__(folder, config, stop, bar, batches)  # pyright: ignore[reportArgumentType] - the same keys
        self.targets, self.classes, self.tokens_here = targets, classes, 0
        self.watchers.picture = "learning.png"
        self.score = f"val_{PRIMARY[task][0]}"
        self.columns: Sequence[str] = (*COLUMNS, self.score, SPEED)

    def speed(self, batch: list[Pack]) -> str:
        """Tokens per second, in words."""
        self.tokens_here += sum(sum(pack.lengths) for pack in batch)
        # other processes have nearly as many
        return f"{self._rate(self.tokens_here * self.processes.data_world):,.0f} tokens/s"

    def _rate(self, tokens: float) -> float:
        return tokens / max(time.monotonic() - self.started, 1e-9)

    @property
    def state_key(self) -> str:
        """Where the checkpoint keeps its state: under the name that every run has."""
        return Recorder.__qualname__

    def blamed(self, trainer: pl.Trainer, batch: list[Pack]) -> str:
        """What a step held, in words: its slides, and those among them that are not finite themselves."""
        loader: Any = trainer.train_dataloader
        names, bad = [], []
        for pack in batch:
            for i, tokens in zip(pack.indices.tolist(), pack.features[0].split(pack.lengths), strict=True):
                names.append(" + ".join(loader.reader.slides[i]))
                bad += [] if tokens.isfinite().all() else names[-1:]
        return in_words("slides", self.processes.joined_lists(names), self.processes.joined_lists(bad))

    def watched(self, row: dict[str, Any]) -> float | None:
        """The figure by which the best epoch is chosen."""
        return row.get(self.score) if self.config.monitor == "val_score" else super().watched(row)

    def row(self, trainer: pl.Trainer, module: Classifier) -> dict[str, Any]:
        """The figures of an epoch."""
        assert isinstance(module, BagModule)
        figures: dict[str, float | None] = {"val_loss": None}
        tokens = float(self.processes.summed(torch.tensor(float(self.tokens_here), device=module.device)))
        if len(self.targets):
            (outputs,) = module.validated()
            if not outputs.isfinite().all():
                raise not_finite("the validation", trainer.global_step, trainer.current_epoch, self.config.optim)
            figures = validation_figures(module.objective, outputs, self.targets, self.classes)
        return {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "seconds": round(self.seconds, 2),
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            "train_loss": self.loss_sum / self.loss_count,
            **figures,
            SPEED: round(self._rate(tokens), 1),
        }

    def line(self, row: dict[str, Any]) -> str:
        """An epoch in one line."""
        parts = [f"epoch {row['epoch']:>3}/{self.config.epochs}", f"train loss {row['train_loss']:.4f}"]
        if row["val_loss"] is not None:
            parts.append(f"val loss {row['val_loss']:.4f}")
        if row.get(self.score) is not None:
            parts.append(f"val {TITLES[self.score.removeprefix('val_')]} {row[self.score]:.4f}")
        return "  ".join([*parts, f"{row[SPEED]:,.0f} tokens/s"])


def validation_figures(
    objective: Objective, outputs: torch.Tensor, targets: np.ndarray, classes: int
) -> dict[str, float | None]:
    """Loss and main score of the task over the validation patients; None where one is not defined on them."""
    y = torch.from_numpy(targets)
    name, _ = PRIMARY[objective.task]
    # the weights and the softening of training are means to an end
    plain = Objective(objective.task, mean=objective.mean, scale=objective.scale, ties=objective.ties)
    said = objective.answers(outputs).numpy()
    names = [str(i) for i in range(classes)]
    overall, _ = sampler(objective.task, targets, said, names, None)(np.ones((len(targets), 1)))
    score = float(overall[name][0])
    return {"val_loss": float(plain.loss(outputs.double(), y)), f"val_{name}": score if np.isfinite(score) else None}
