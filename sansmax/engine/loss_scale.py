"""Training in float16: the loss is scaled so that its gradients stay in the range of the type.

The scale starts at 2^16. A step whose gradients are not finite is left out and halves the scale; the weights, the
optimiser and the moving average then stay as they are. After 2,000 good steps in a row it doubles. Lightning has this
for GPUs and takes bfloat16 in silence on a CPU; here it is float16 wherever it was asked for.
"""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.optim import Optimizer

from sansmax.errors import InputError

# gradients that are not finite under a smaller scale are not so because of it
LEAST_SCALE = 2.0**-24


class LossScale(MixedPrecision):
    """Autocast to float16 on `device` ("cpu", "cuda" or "mps") with a scaled loss.

    Gradients are unscaled before they are clipped. `skipped` says whether the last step was left out. The scale travels
    in checkpoints.
    """

    scaler: torch.amp.GradScaler

    def __init__(self, device: str) -> None:
        super().__init__("16-mixed", device, torch.amp.GradScaler(device))
        self.skipped = self.unscaled = False

    def unscale(self, optimizer: Optimizer) -> None:
        """Makes the gradients those of the loss itself, for a module that clips them by itself; once before a step."""
        self.scaler.unscale_(optimizer)
        self.unscaled = True

    def optimizer_step(  # pyright: ignore[reportIncompatibleMethodOverride] - Lightning's own is as narrow
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        """A step of the optimiser, or none where a gradient is not finite.

        Raises InputError where no scale makes them finite.
        """
        done = closure()
        if done is None and model.automatic_optimization:
            return done
        if not self.unscaled:
            self.scaler.unscale_(optimizer)
        self.unscaled = False
        self._after_closure(model, optimizer)
        before = self.scaler.get_scale()
        out = self.scaler.step(optimizer, **kwargs)
        self.scaler.update()
        self.skipped = self.scaler.get_scale() < before
        if self.skipped and before <= LEAST_SCALE:
            raise InputError(
                f"the gradients are not finite in float16, however small the loss is made (scale {before:.1e}); "
                "train with precision=bf16, which has the range of float32, or precision=32"
            )
        return out


def skipped_step(module: LightningModule) -> bool:
    """Whether the last step of a module in training was left out."""
    plugin = module.trainer.precision_plugin
    return isinstance(plugin, LossScale) and plugin.skipped
