"""The network in training, as a Lightning module: mixing, loss, steps over several batches, moving average.

Every random number of a training step is a function of the seed and the step alone, so a run that is taken up in the
middle sees the same ones.
"""

from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from sansmax.data.loading import Batch
from sansmax.engine.accumulation import Accumulated
from sansmax.engine.config import OptimConfig
from sansmax.engine.distill import Teacher
from sansmax.engine.freezing import keep_statistics
from sansmax.engine.loss_scale import skipped_step
from sansmax.engine.losses import Losses, image_losses
from sansmax.engine.optimisers import make_optimizer, make_schedule
from sansmax.engine.processes import Processes
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

    `class_weights` is the loss weight of each class, or None. `epochs` and `steps_per_epoch`, the batches of an epoch,
    set the schedule, which counts steps of the optimiser. `teacher` is what the network learns from beside the labels.
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
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.network, self.optim, self.seed = network, optim, seed
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self.teacher, self.accumulated = teacher, Accumulated()
        self.batches_per_step = optim.grad_accum_steps
        decay = optim.model_ema_decay
        self.ema = None if decay is None else ModelEmaV3(network, decay=decay, use_warmup=True)
        if self.ema is not None:
            # no process waits for gradients of these
            self.ema.module.requires_grad_(False)
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.mixup = None
        if optim.mixup or optim.cutmix:
            self.mixup = Mixup(
                mixup_alpha=optim.mixup,
                cutmix_alpha=optim.cutmix,
                prob=optim.mixup_prob,
                switch_prob=optim.mixup_switch_prob,
                label_smoothing=optim.smoothing,
                num_classes=num_classes,
            )
        # Lightning trains in the modes that it finds
        keep_statistics(self.network)
        self.last_loss = float("nan")
        self.val_logits: list[Tensor] = []
        self.val_labels: list[Tensor] = []
        self.val_indices: list[Tensor] = []
        # set by what starts training over several
        self.processes = Processes.alone()
        self._shards: dict[nn.Module, nn.Module] = {}

    @property
    def evaluated(self) -> nn.Module:
        """The weights that are evaluated and kept: the moving average where there is one."""
        return self.network if self.ema is None else self.ema.module

    def kept(self) -> nn.Module:
        """The network whose weights a run keeps."""
        return self.evaluated

    @property
    def updates_per_epoch(self) -> int:
        """Steps of the optimiser in an epoch; the last one may be over fewer batches."""
        return -(-self.steps_per_epoch // self.batches_per_step)

    def train(self, mode: bool = True) -> "Classifier":
        """As for any module, but for the statistics of frozen batch norms, which stay."""
        super().train(mode)
        if mode:
            keep_statistics(self.network)
        return self

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seeds dropout, drop path and mixup by the step, and the batch within it.

        How images are mixed is the same in all processes, and what is dropped is not: each has other images.
        """
        within = batch_idx % self.batches_per_step
        words = np.random.SeedSequence([self.seed, self.global_step, within]).generate_state(2)
        own = np.random.SeedSequence([self.seed, self.global_step, within, self.processes.data_rank])
        torch.manual_seed(int(own.generate_state(1)[0]))
        np.random.seed(int(words[1]))  # noqa: NPY002 - timm's mixup draws from the global generator

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """What goes backwards for a batch: its part of the loss of the step."""
        losses, weights = self.per_sample(batch.images, batch.labels)
        total, weight = self.of_step(losses.sum(), weights.sum())
        if not np.isfinite(self.last_loss):
            raise not_finite("the loss", self.global_step + 1, self.current_epoch, self.optim)
        return self.accumulated.share(total, weight)

    def of_step(self, total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What goes backwards of the losses of a batch, and what the batch weighs; notes its loss.

        Over several processes the weight is that of all of them, and since the mean of their gradients is taken, the
        own total counts as often as there are shares of the batch.
        """
        every = self.processes.summed(torch.stack([total.detach().double(), weight.double()]))
        self.last_loss = float(every[0] / every[1])
        if self.processes.data_world == 1:
            return total, weight
        return total * self.processes.data_world, every[1].to(weight)

    def per_sample(self, images: Tensor, labels: Tensor) -> Losses:
        """Losses of the images of a batch, after mixing, and what their sum is to be divided by."""
        if not len(images):
            # a process without images takes part with a gradient of 0
            nothing = self.shared(self.network)(images.new_zeros(1, *images.shape[1:])).float().sum(1) * 0.0
            return Losses(nothing, torch.zeros_like(nothing))
        images, targets = self.mixed(images, labels)
        logits = self.shared(self.network)(images)
        losses = image_losses(logits, targets, self.optim, self.class_weights)
        return losses if self.teacher is None else self.teacher.blended(losses, logits, images)

    def shared(self, network: nn.Module) -> nn.Module:
        """The network, its tokens shared out where several processes have the same images."""
        if self.processes.sequence_group is None:
            return network
        if network not in self._shards:
            from sansmax.engine.parallel import shard_sequence

            self._shards[network] = shard_sequence(network, self.processes.sequence_group)
        # in the mode of the network, which others set
        self._shards[network].training = network.training
        return self._shards[network]

    def mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The images as they are trained on, and their classes, or their shares of the classes."""
        off = self.optim.mixup_off_epoch
        if self.mixup is None or (off is not None and self.current_epoch >= off):
            return images, labels
        # an odd last batch cannot be mixed in pairs, and then no process does so
        if int(self.processes.summed(torch.tensor(len(images), device=images.device))) % 2:
            return images, labels
        return self.mixup(images, labels)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Makes the gradients of several batches that of one, before they are clipped."""
        self.accumulated.correct(self.network.parameters(), self.batches_per_step)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """A step of the optimiser, and of the moving average after it."""
        super().optimizer_step(*args, **kwargs)
        if self.ema is not None and not skipped_step(self):
            self.ema.update(self.network, step=self.global_step + 1)

    def on_validation_epoch_start(self) -> None:
        """Forgets the predictions of the last validation."""
        for kept in (self.val_logits, self.val_labels, self.val_indices):
            kept.clear()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Collects logits and labels, and whose they are."""
        images, labels, indices = batch
        # also without images: the others may wait in the pass
        given = images if len(images) else images.new_zeros(1, *images.shape[1:])
        self.val_logits.append(self.shared(self.evaluated)(given)[: len(images)].float().cpu())
        self.val_labels.append(labels.cpu())
        self.val_indices.append(indices.cpu())

    def validated(self) -> tuple[Tensor, ...]:
        """Logits and labels of all validation images in their order, each once, whichever process had it."""
        logits, labels, indices = (
            self.processes.gathered(torch.cat(kept)) for kept in (self.val_logits, self.val_labels, self.val_indices)
        )
        order = indices.argsort()
        return logits[order], labels[order]

    def configure_optimizers(self) -> Any:
        """timm's optimiser by name, and its schedule, stepped with it."""
        optimizer = make_optimizer(self.network, self.optim)
        scheduler = make_schedule(optimizer, self.optim, self.epochs, self.updates_per_epoch)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """timm's schedules are functions of the number of updates."""
        scheduler.step_update(num_updates=self.global_step)
