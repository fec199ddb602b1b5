"""What each image of a step costs, and how much it counts.

The loss of a step is sum(losses) / sum(weights) over all its images, whichever batch or process they came in: that is
why nothing is averaged here.

cross_entropy  -sum_c t_c log p_c, with p the softmax of the logits
bce            -mean_c (t_c log s_c + (1 - t_c) log(1 - s_c)), with s the sigmoid of the logits (timm's, as in
               https://arxiv.org/abs/2110.00476)
focal          -(1 - p_y)^gamma log p_y: https://arxiv.org/abs/1708.02002, equation 4, of the softmax's p

t is 1 for the class y and 0 for the others; with smoothing s, 1 - s + s / c and s / c; of mixed images, the shares.
Weights w of classes multiply an image's loss, and its weight is w_y, or sum_c t_c w_c where labels are mixed. With
cross entropy and smoothing they multiply the terms of the sum over classes, as in torch.

Shapes: b images, c classes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.loss import BinaryCrossEntropy
from torch import Tensor

from sansmax.engine.config import OptimConfig


class Losses(NamedTuple):
    """Losses of images, multiplied by what they count, and what their sum is to be divided by."""

    losses: Float[Tensor, "b"]
    weights: Float[Tensor, "b"]


def image_losses(
    logits: Float[Tensor, "b c"], targets: Tensor, optim: OptimConfig, class_weights: Float[Tensor, "c"] | None = None
) -> Losses:
    """Losses by `optim.loss`, in float32 or wider.

    `targets` are classes (b,), or shares of the classes (b, c) that are smoothed already.
    """
    logits = in_full(logits)
    weights = weights_of(targets, logits, class_weights)
    if optim.loss == "cross_entropy":
        by_class = None if class_weights is None else class_weights.to(logits)
        mixed = targets.ndim == 2
        smoothing = 0.0 if mixed else optim.smoothing
        targets = targets.to(logits) if mixed else targets
        each = F.cross_entropy(logits, targets, weight=by_class, label_smoothing=smoothing, reduction="none")
        return Losses(each, weights)
    if optim.loss == "bce":
        targets = targets.to(logits) if targets.ndim == 2 else targets
        each = BinaryCrossEntropy(optim.smoothing, reduction="none")(logits, targets).mean(1)
    else:
        each = focal_losses(logits, targets, optim.focal_gamma)
    return Losses(each * weights, weights)


def weights_of(targets: Tensor, logits: Float[Tensor, "b c"], class_weights: Tensor | None) -> Float[Tensor, "b"]:
    """How much each image counts, by its class or its shares of the classes."""
    if class_weights is None:
        return logits.new_ones(len(logits))
    by_class = class_weights.to(logits)
    return by_class[targets] if targets.ndim == 1 else targets.to(logits) @ by_class


def focal_losses(logits: Float[Tensor, "b c"], labels: Tensor, gamma: float) -> Float[Tensor, "b"]:
    """-(1 - p_y)^gamma log p_y, with p the softmax of the logits."""
    log_p = in_full(logits).log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    # a power below 1 has no derivative at 0, where an image of probability 1 is
    rest = (-log_p.expm1()).clamp_min(torch.finfo(log_p.dtype).tiny)
    return -(rest**gamma) * log_p


def in_full(logits: Tensor) -> Tensor:
    """Logits in float32 or wider: a sum of exponentials needs the digits."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
