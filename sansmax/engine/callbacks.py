"""What happens beside the training loop: progress, the table of metrics, checkpoints, stopping in good order."""

import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from sansmax.engine.config import TrainConfig
from sansmax.engine.module import Classifier, not_finite
from sansmax.engine.progress import Bar
from sansmax.engine.run import save_weights
from sansmax.engine.stopping import Stopped, StopSignal
from sansmax.files import replacing
from sansmax.report.scores import class_rankings, mean_defined
from sansmax.report.tables import COLUMNS, append_row

METRICS = "metrics.csv"
CHECKPOINT = "last.ckpt"


class Recorder(pl.Callback):
    """Writes metrics.csv, the best weights and the checkpoint, shows progress, and stops when asked to.

    Its state travels in the checkpoint: with it a run that is taken up gives the same rows as one that never stopped.
    """

    columns: Sequence[str] = COLUMNS

    def __init__(self, folder: Path, config: TrainConfig, stop: StopSignal, bar: Bar, batches: int) -> None:
        self.folder, self.config, self.stop, self.bar, self.batches = folder, config, stop, bar, batches
        self.best: float | None = None
        self.best_epoch = -1
        self.loss_sum, self.loss_count = 0.0, 0
        self.seconds_before, self.started = 0.0, time.monotonic()
        self.saved = time.monotonic()
        self.next_batch = (0, 0)
        self.steps_here = 0
        self.finished = False

    # State of the run

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps; plain numbers, so that it loads without unpickling objects."""
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "loss_sum": self.loss_sum,
            "loss_count": self.loss_count,
            "seconds": self.seconds,
            "next_batch": list(self.next_batch),
            "finished": self.finished,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` kept."""
        self.best, self.best_epoch = state_dict["best"], state_dict["best_epoch"]
        self.loss_sum, self.loss_count = state_dict["loss_sum"], state_dict["loss_count"]
        self.seconds_before = state_dict["seconds"]

    @property
    def seconds(self) -> float:
        """Time in training, validation included, over all parts of the run."""
        return self.seconds_before + time.monotonic() - self.started

    # Hooks of the loop

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock, and takes the signals back from Lightning, which gives up a validation at SIGTERM."""
        self.stop.listen()
        self.started = self.saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the loss, moves the bar, saves now and then, stops if asked to."""
        assert isinstance(pl_module, Classifier)
        self.loss_sum += pl_module.last_loss
        self.loss_count += 1
        self.steps_here += 1
        epoch, done = trainer.current_epoch, batch_idx + 1
        self.next_batch = (epoch, done)
        self.bar.update(
            epoch * self.batches + done,
            self.config.epochs * self.batches,
            f"epoch {epoch + 1}/{self.config.epochs}  loss {self.loss_sum / self.loss_count:.4f}  {self.speed(batch)}",
        )
        if done == self.batches:
            # taken up after its last batch, an epoch would not be validated: its end writes the checkpoint
            return
        if self.stop.name is not None:
            self._checkpoint(trainer)
            raise self._stopped()
        if time.monotonic() - self.saved > 60 * self.config.checkpoint_minutes:
            self._checkpoint(trainer)

    def speed(self, batch: Any) -> str:
        """How fast training is, in words; called once for each batch."""
        rate = self.steps_here * self.config.batch_size / max(time.monotonic() - self.started, 1e-9)
        return f"{rate:.0f} images/s"

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Adds the epoch's row, keeps the weights if they are the best, writes the checkpoint."""
        assert isinstance(pl_module, Classifier)
        row = self.row(trainer, pl_module)
        watched = self.watched(row)
        if self._is_best(watched):
            self.best = watched
            self.best_epoch = trainer.current_epoch
            save_weights(pl_module.kept(), self.folder / "model.safetensors")
        append_row(self.folder / METRICS, row, self.columns)
        self.loss_sum, self.loss_count = 0.0, 0
        self.next_batch = (trainer.current_epoch + 1, 0)
        self.bar.say(self.line(row) + ("  *" if self.best_epoch == trainer.current_epoch else ""))
        self.finished = trainer.current_epoch + 1 >= self.config.epochs
        if self.config.patience is not None and trainer.current_epoch - self.best_epoch >= self.config.patience:
            self.finished = trainer.should_stop = True
        self._checkpoint(trainer)
        if self.stop.name is not None:
            raise self._stopped()

    def watched(self, row: dict[str, Any]) -> float | None:
        """The figure by which the best epoch is chosen."""
        return None if self.config.monitor == "last" else row[self.config.monitor]

    def _is_best(self, watched: float | None) -> bool:
        if self.config.monitor == "last" or self.best is None:
            return True
        if watched is None:
            return False
        return watched < self.best if self.config.monitor == "val_loss" else watched > self.best

    def line(self, row: dict[str, Any]) -> str:
        """An epoch in one line."""
        area = "" if row["val_auc"] is None else f"  val AUC {row['val_auc']:.4f}"
        return (
            f"epoch {row['epoch']:>3}/{self.config.epochs}  train loss {row['train_loss']:.4f}  "
            f"val loss {row['val_loss']:.4f}  val accuracy {100 * row['val_accuracy']:.1f} %{area}  "
            f"{row['images_per_second']:.0f} images/s"
        )

    def row(self, trainer: pl.Trainer, module: Classifier) -> dict[str, Any]:
        """The figures of an epoch."""
        logits = torch.cat(module.val_logits)
        if not logits.isfinite().all():
            raise not_finite("the validation", trainer.global_step, trainer.current_epoch, self.config.optim)
        figures = validation_figures(logits, torch.cat(module.val_labels))
        here = max(time.monotonic() - self.started, 1e-9)
        return {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "seconds": round(self.seconds, 2),
            "lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train_loss": self.loss_sum / self.loss_count,
            **figures,
            "images_per_second": round(self.steps_here * self.config.batch_size / here, 1),
        }

    def _stopped(self) -> Stopped:
        epoch, batch = self.next_batch
        where = "the evaluation" if self.finished else f"epoch {epoch + 1}, batch {batch + 1} of {self.batches}"
        return Stopped(f"stopped by {self.stop.name} before {where}; everything is saved", self.folder)

    def _checkpoint(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / CHECKPOINT)
        self.saved = time.monotonic()


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, beside its place and not in the folder of temporary files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the checkpoint."""
        written = io.BytesIO()
        torch.save(checkpoint, written)
        with replacing(path) as partial:
            partial.write_bytes(written.getbuffer())


def validation_figures(logits: Tensor, labels: Tensor) -> dict[str, float | None]:
    """Log-loss, accuracy and (macro one-against-rest) AUC of one evaluation; None where the AUC is not defined."""
    log_p = logits.double().log_softmax(1)
    probabilities, y = log_p.exp().numpy(), labels.numpy()
    areas = class_rankings(np.ones((len(y), 1)), y, probabilities)["auc"]
    area = float(areas[-1, 0] if len(areas) == 2 else mean_defined(areas)[0])
    return {
        "val_loss": -float(log_p.gather(1, labels[:, None]).mean()),
        "val_accuracy": float((log_p.argmax(1) == labels).double().mean()),
        "val_auc": area if np.isfinite(area) else None,
    }
