"""The network in training, as a Lightning module: loss, optimiser, schedule, moving average.

Every random number of a training step is a function of the seed and the step alone, so a run that is taken up in the
middle sees the same ones.
"""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from timm.data.mixup import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sansmax.data.loading import Batch
from sansmax.engine.config import OptimConfig
from sansmax.errors import InputError


class NotFinite(InputError):
    """The loss is NaN or infinite."""


def not_finite(what: str, step: int, epoch: int, optim: OptimConfig) -> NotFinite:
    """Training cannot go on: where it broke off, what is left, and what to change."""
    return NotFinite(
        f"{what} gave numbers that are not finite at step {step} (epoch {epoch + 1}); the weights and the checkpoint "
        "written before are kept. Start a new run with a lower learning rate, for example "
        f"--set optim.lr={optim.lr / 3:.2g}, or a smaller largest norm of the gradient, --set optim.clip_grad=0.5"
    )


class Classifier(pl.LightningModule):
    """A timm network with its loss.

    `class_weights` is the loss weight of each class, or None. `epochs` and `steps_per_epoch` set the schedule.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        network: nn.Module,
        optim: OptimConfig,
        num_classes: int,
        epochs: int,
        steps_per_epoch: int,
        seed: int,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network, self.optim, self.seed = network, optim, seed
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        decay = optim.model_ema_decay
        self.ema = None if decay is None else ModelEmaV3(network, decay=decay, use_warmup=True)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.mixup = None
        if optim.mixup or optim.cutmix:
            if class_weights is not None:
                raise InputError("optim.class_weights cannot be combined with mixup or cutmix, whose labels are mixed")
            self.mixup = Mixup(
                mixup_alpha=optim.mixup,
                cutmix_alpha=optim.cutmix,
                label_smoothing=optim.smoothing,
                num_classes=num_classes,
            )
        self.last_loss = float("nan")
        self.val_logits: list[Tensor] = []
        self.val_labels: list[Tensor] = []

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are evaluated and kept: the moving average where there is one."""
        return self.network if self.ema is None else self.ema.module

    def kept(self) -> nn.Module:
        """The network whose weights a run keeps."""
        return self.evaluated

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds dropout, drop path and mixup by the step."""
        words = np.random.SeedSequence([self.seed, self.global_step]).generate_state(2)
        torch.manual_seed(int(words[0]))
        np.random.seed(int(words[1]))  # noqa: NPY002 - timm's mixup draws from the global generator

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        images, labels, _ = batch
        loss = self._loss(images, labels)
        self.last_loss = float(loss.detach())
        if not np.isfinite(self.last_loss):
            raise not_finite("the loss", self.global_step + 1, self.current_epoch, self.optim)
        return loss

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        # an odd last batch cannot be mixed in pairs
        if self.mixup is not None and len(images) % 2 == 0:
            images, targets = self.mixup(images, labels)
            return SoftTargetCrossEntropy()(self.network(images), targets)
        logits = self.network(images)
        if self.class_weights is not None:
            return F.cross_entropy(logits, labels, weight=self.class_weights, label_smoothing=self.optim.smoothing)
        if self.optim.smoothing:
            return LabelSmoothingCrossEntropy(self.optim.smoothing)(logits, labels)
        return F.cross_entropy(logits, labels)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step of the optimiser, and of the moving average after it."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None:
            self.ema.update(self.network, step=self.global_step + 1)

    def on_validation_epoch_start(self) -> None:
        """Forgets the predictions of the last validation."""
        self.val_logits.clear()
        self.val_labels.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collects logits and labels."""
        images, labels, _ = batch
        self.val_logits.append(self.evaluated(images).float().cpu())
        self.val_labels.append(labels.cpu())

    def configure_optimizers(self) -> Any:
        """timm's optimiser by name, and its schedule, stepped after every batch."""
        o = self.optim
        try:
            optimizer = create_optimizer_v2(
                self.network, opt=o.opt, lr=o.lr, weight_decay=o.weight_decay, layer_decay=o.layer_decay
            )
        except (ValueError, AssertionError, KeyError) as error:
            raise InputError(f"optim.opt={o.opt!r} is no optimiser of timm's: {error}") from None
        if o.sched == "constant":
            return optimizer
        if o.warmup_epochs >= self.epochs:
            warmup = self.epochs / 2
        else:
            warmup = o.warmup_epochs
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched="cosine",
            num_epochs=self.epochs,
            warmup_epochs=warmup,  # pyright: ignore[reportArgumentType] - a part of an epoch is fine
            warmup_lr=min(o.warmup_lr, o.lr),
            min_lr=min(o.min_lr, o.lr),
            warmup_prefix=False,
            step_on_epochs=False,
            updates_per_epoch=self.steps_per_epoch,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """timm's schedules are functions of the number of updates."""
        scheduler.step_update(num_updates=self.global_step)
