"""What happens beside the training loop: progress, the table of metrics, checkpoints, stopping in good order."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from sansmax.engine.checkpoints import LAST, check_conditions, conditions
from sansmax.engine.config import TrainConfig
from sansmax.engine.module import Classifier, NotFinite, not_finite
from sansmax.engine.processes import Processes
from sansmax.engine.progress import Bar
from sansmax.engine.run import METRICS, save_weights
from sansmax.engine.stopping import Stopped, StopSignal
from sansmax.engine.watching import Watchers, memory_text
from sansmax.errors import listed
from sansmax.report.scores import class_rankings, mean_defined
from sansmax.report.tables import COLUMNS, append_row


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
        # set by what starts training over several
        self.processes = Processes.alone()
        # steps of the optimiser until now, and until the last row
        self.step = self.row_step = 0
        self.finished = False
        self.conditions: dict[str, Any] = {}
        self.batch: Any = None
        self.watchers = Watchers(folder, config, bar.say)

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
            "step": self.step,
            "row_step": self.row_step,
            "finished": self.finished,
            "conditions": self.conditions,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what `state_dict` kept.

        Raises InputError where the run was trained under conditions that would not give the same numbers.
        """
        check_conditions(state_dict.get("conditions"), self.conditions, self.bar.say)
        self.best, self.best_epoch = state_dict["best"], state_dict["best_epoch"]
        self.loss_sum, self.loss_count = state_dict["loss_sum"], state_dict["loss_count"]
        self.seconds_before = state_dict["seconds"]
        epoch, batch = state_dict["next_batch"]
        self.step = state_dict.get("step", epoch * self.batches + batch)
        self.row_step = state_dict.get("row_step", epoch * self.batches)

    @property
    def seconds(self) -> float:
        """Time in training, validation included, over all parts of the run."""
        return self.seconds_before + time.monotonic() - self.started

    # Hooks of the loop

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Notes what the exact numbers depend on, before a checkpoint is read and compared with it."""
        shared = self.config.parallel.sequence_parallel
        precision, teacher = str(trainer.precision), getattr(pl_module, "teacher", None)
        self.conditions = conditions(
            trainer.world_size, shared, precision, trainer.strategy.root_device, teacher and teacher.sha256
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock, and takes the signals back from Lightning, which gives up a validation at SIGTERM."""
        self.stop.listen()
        self.started = self.saved = time.monotonic()
        self.watchers.start(trainer.global_step)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        """Lets the watchers see the gradients."""
        self.watchers.before_step(trainer.global_step + 1, pl_module, optimizer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remembers the batch, to name it should it break the run."""
        self.batch = batch

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the loss, moves the bar, saves now and then, stops if asked to."""
        assert isinstance(pl_module, Classifier)
        self.batch = None
        stepped = trainer.global_step > self.step
        self.step = trainer.global_step
        self.loss_sum += pl_module.last_loss
        self.loss_count += 1
        self.steps_here += 1
        epoch, done = trainer.current_epoch, batch_idx + 1
        self.next_batch = (epoch, done)
        self.watchers.step(self.step, epoch + 1, pl_module.last_loss)
        self.bar.update(
            epoch * self.batches + done,
            self.config.epochs * self.batches,
            f"epoch {epoch + 1}/{self.config.epochs}  loss {self.loss_sum / self.loss_count:.4f}  {self.speed(batch)}"
            f"  {memory_text()}",
        )
        if done == self.batches or not stepped:
            # taken up after its last batch, an epoch would not be validated: its end writes the checkpoint;
            # and gradients that wait for their step are in no checkpoint
            return
        due = self._agreed(self.is_due())
        if self.stop.name is not None:
            self._checkpoint(trainer)
            raise self._stopped()
        if due:
            self._checkpoint(trainer)

    def _agreed(self, due: bool = False) -> bool:
        """Whether a checkpoint is due; what one process is asked for, to stop or to save, all of them do."""
        asked = 0 if self.stop.name is None else signal.Signals[self.stop.name].value
        number, due_somewhere = self.processes.highest([asked, due])
        if number:
            self.stop.name = signal.Signals(int(number)).name
        return bool(due_somewhere)

    def is_due(self) -> bool:
        """Whether it is time for a checkpoint within the epoch, by the clock or by the steps."""
        every = self.config.checkpoint_steps
        if every is not None and self.step % every == 0:
            return True
        return time.monotonic() - self.saved > 60 * self.config.checkpoint_minutes

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
            save_weights(pl_module.kept(), self.folder / "model.safetensors", write=self.processes.is_first)
        if self.processes.is_first:
            append_row(self.folder / METRICS, row, self.columns)
        self.watchers.row(row)
        self.row_step = trainer.global_step
        self.loss_sum, self.loss_count = 0.0, 0
        self.next_batch = (trainer.current_epoch + 1, 0)
        self.bar.say(self.line(row) + ("  *" if self.best_epoch == trainer.current_epoch else ""))
        self.finished = trainer.current_epoch + 1 >= self.config.epochs
        if self.config.patience is not None and trainer.current_epoch - self.best_epoch >= self.config.patience:
            self.finished = trainer.should_stop = True
        self._agreed()
        self._checkpoint(trainer)
        if self.stop.name is not None:
            raise self._stopped()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes leave of the watchers."""
        self.watchers.close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Names the batch that gave numbers which are not finite."""
        self.watchers.close("stopped" if isinstance(exception, Stopped) else "failed")
        if isinstance(exception, NotFinite) and self.batch is not None:
            exception.args = (f"{exception}. {self.blamed(trainer, self.batch)}",)
        self.batch = None

    def blamed(self, trainer: pl.Trainer, batch: Any) -> str:
        """What a batch held, in words: its images, and those among them that are not finite themselves."""
        loader: Any = trainer.train_dataloader
        names, bad = [], []
        for i in batch.indices.tolist():
            names.append(loader.dataset.images.names[i])
            # read again: mixing spreads what is bad over the batch
            image = loader.dataset[(trainer.current_epoch, i)][0]
            bad += [] if image.isfinite().all() else names[-1:]
        return in_words("images", self.processes.joined_lists(names), self.processes.joined_lists(bad))

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
        logits, labels = module.validated()
        if not logits.isfinite().all():
            raise not_finite("the validation", trainer.global_step, trainer.current_epoch, self.config.optim)
        figures = validation_figures(logits, labels)
        here = max(time.monotonic() - self.started, 1e-9)
        return {
            "epoch": trainer.current_epoch + 1,
            "step": trainer.global_step,
            "seconds": round(self.seconds, 2),
            "lr": max(group["lr"] for group in trainer.optimizers[0].param_groups),
            "train_loss": self.loss_sum / self.loss_count,
            **figures,
            "images_per_second": round(self.steps_here * self.config.batch_size / here, 1),
        }

    def _stopped(self) -> Stopped:
        epoch, batch = self.next_batch
        where = "the evaluation" if self.finished else f"epoch {epoch + 1}, batch {batch + 1} of {self.batches}"
        return Stopped(f"stopped by {self.stop.name} before {where}; everything is saved", self.folder)

    def _checkpoint(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder / LAST)
        self.saved = time.monotonic()


def in_words(what: str, names: Sequence[str], bad: Sequence[str]) -> str:
    """The members of a batch that broke training, and which of them hold what is no number."""
    held = f"Its batch held the {what} {listed(names, 64)}"
    if bad:
        return f"{held}; NaN or infinity is in {listed(bad, 64)} before the network sees it: leave it out, or mend it"
    return f"{held}; all their numbers are finite before the network sees them"


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
