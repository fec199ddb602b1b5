"""What a network of bags is trained for, by task: its loss over the patients of a step, and its answers.

classification  cross entropy, classes weighted where asked for
multilabel      binary cross entropy of each label; unknown labels (NaN) count nowhere
regression      squared error of targets standardised by the training patients; unknown targets count nowhere
survival        negative partial log-likelihood of Cox over the step, divided by its events

With a focal power gamma the terms of the first two are multiplied by (1 - p)^gamma, p being the probability of what is
right (https://arxiv.org/abs/1708.02002).

The risk set of survival is the step: its patients whose time is not shorter. The likelihood is that of Cox (1972), ties
by Efron (1977) or Breslow (1974).

Shapes: k patients, c outputs.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from sansmax.engine.losses import focal_losses
from sansmax.errors import InputError


@dataclass(frozen=True)
class Objective:
    """The loss of a task.

    `class_weights` (c,) weight the classes, or of several labels the positive side of each. `mean` and `scale` (c,)
    standardise targets of regression. `focal` is the power gamma of a focal loss, None for none.
    """

    task: str
    class_weights: Tensor | None = None
    smoothing: float = 0.0
    mean: Tensor | None = None
    scale: Tensor | None = None
    ties: str = "efron"
    focal: float | None = None

    @classmethod
    def of(
        cls,
        task: str,
        targets: np.ndarray,
        classes: int,
        weighted: bool,
        smoothing: float,
        ties: str,
        focal: float | None = None,
    ) -> "Objective":
        """The loss for training patients with these targets (as `Cases.targets`).

        Raises InputError where nothing can be learned of them.
        """
        _check(task, targets, classes)
        if focal is not None and task not in ("classification", "multilabel"):
            raise InputError(f"the focal loss is of classes, and the task is {task}; leave out optim.loss")
        weights = _class_weights(task, targets, classes) if weighted else None
        if task != "regression":
            return cls(task, weights, smoothing, ties=ties, focal=focal)
        mean, scale = np.nanmean(targets, axis=0), np.nanstd(targets, axis=0)
        # a target that is the same for all is only moved
        scale = np.where(scale > 0, scale, 1.0)
        return cls(task, None, 0.0, torch.tensor(mean).float(), torch.tensor(scale).float())

    @property
    def separable(self) -> bool:
        """Whether the loss of a step is a sum over its patients."""
        return self.task != "survival"

    def loss(self, outputs: Float[Tensor, "k c"], targets: Tensor) -> Float[Tensor, ""]:
        """The loss of a step; 0, with gradients of 0, where nothing of it is known."""
        if self.task == "survival":
            return cox_loss(outputs[:, 0], targets[:, 0], targets[:, 1] > 0, self.ties)
        return self.total(outputs, targets) / self.weight(targets).clamp_min(1e-12)

    def total(
        self, outputs: Float[Tensor, "k c"], targets: Tensor, shares: Float[Tensor, "k"] | None = None
    ) -> Float[Tensor, ""]:
        """The sum over patients of a part of a step, before it is divided by `weight` of the whole step.

        `shares` says how much each patient counts; None is 1.
        """
        outputs = outputs.float() if outputs.dtype in (torch.float16, torch.bfloat16) else outputs
        weights = None if self.class_weights is None else self.class_weights.to(outputs)
        if self.task == "classification":
            each = self._by_class(outputs, targets, weights)
            return each.sum() if shares is None else (each * shares.to(each)).sum()
        known = targets.isfinite()
        y = targets.nan_to_num(0.0).to(outputs)
        if self.task == "multilabel":
            y = y * (1 - self.smoothing) + self.smoothing / 2
            each = self._by_label(outputs, y, weights) * known
        else:
            assert self.mean is not None and self.scale is not None
            each = (outputs - (y - self.mean.to(outputs)) / self.scale.to(outputs)).square() * known
        return each.sum() if shares is None else (each * shares.to(each).unsqueeze(1)).sum()

    def _by_class(self, outputs: Float[Tensor, "k c"], targets: Tensor, weights: Tensor | None) -> Float[Tensor, "k"]:
        if self.focal is None:
            how = {"weight": weights, "label_smoothing": self.smoothing}
            return F.cross_entropy(outputs, targets, reduction="none", **how)
        each = focal_losses(outputs, targets, self.focal)
        return each if weights is None else each * weights[targets]

    def _by_label(
        self, outputs: Float[Tensor, "k c"], y: Float[Tensor, "k c"], weights: Tensor | None
    ) -> Float[Tensor, "k c"]:
        if self.focal is None:
            return F.binary_cross_entropy_with_logits(outputs, y, pos_weight=weights, reduction="none")
        each = sigmoid_focal_loss(outputs, y, alpha=-1, gamma=self.focal)
        return each if weights is None else each * torch.where(y > 0, weights, torch.ones_like(weights))

    def weight(self, targets: Tensor, shares: Float[Tensor, "k"] | None = None) -> Float[Tensor, ""]:
        """What the sum of a step is divided by: the weights of its patients, or how many targets are known."""
        # parts of a step are weighed one by one: their sum must not depend on the parts
        exact = torch.float32 if targets.device.type == "mps" else torch.float64
        ones = torch.ones(len(targets), dtype=exact, device=targets.device)
        shares = ones if shares is None else shares.to(ones)
        if self.task != "classification":
            return (targets.isfinite() * shares.unsqueeze(1)).sum()
        if self.class_weights is None:
            return shares.sum()
        return (self.class_weights.to(shares)[targets] * shares).sum()

    def answers(self, outputs: Float[Tensor, "k c"]) -> Float[Tensor, "k c"]:
        """Predictions in float64, in the units of the targets."""
        if self.task == "regression":
            assert self.mean is not None and self.scale is not None
            return outputs.double() * self.scale.to(outputs.device) + self.mean.to(outputs.device)
        return answers(self.task, outputs)


def answers(task: str, outputs: Float[Tensor, "k c"]) -> Float[Tensor, "k c"]:
    """What a trained network says, in float64: probabilities, values, or risks."""
    outputs = outputs.double()
    if task == "classification":
        return outputs.softmax(1)
    return outputs.sigmoid() if task == "multilabel" else outputs


def cox_loss(
    risk: Float[Tensor, "k"], time: Float[Tensor, "k"], event: Tensor, ties: str = "efron"
) -> Float[Tensor, ""]:
    """Cox's negative partial log-likelihood of patients who are each other's risk set, divided by their events.

    Patients of one time are all at risk then. With `ties` "efron" the l-th of d events at a time sees the sum over
    the risk set less l / d of that over the d events; "breslow" always sees the whole sum. In float64; 0 where there is
    no event.
    """
    risk = risk.double()
    if not event.any():
        return (risk * 0.0).sum()
    times, group = torch.unique(time, return_inverse=True)
    e = (risk - risk.detach().max()).exp()
    zeros = e.new_zeros(len(times))
    # sums over those whose time is not shorter
    at_risk = zeros.index_add(0, group, e).flip(0).cumsum(0).flip(0)
    seen = at_risk[group[event]]
    if ties == "efron":
        dying = zeros.index_add(0, group[event], e[event])
        number = zeros.index_add(0, group[event], torch.ones_like(e[event]))
        seen = seen - _rank(group[event]) / number[group[event]] * dying[group[event]]
    return (seen.log() + risk.detach().max() - risk[event]).sum() / event.sum()


def _rank(group: Tensor) -> Tensor:
    """How many earlier entries are of the same group."""
    same = group.unsqueeze(0) == group.unsqueeze(1)
    return same.tril(-1).sum(1).double()


def _class_weights(task: str, targets: np.ndarray, classes: int) -> Tensor | None:
    if task == "classification":
        counts = np.bincount(targets, minlength=classes)
        return torch.tensor(len(targets) / (classes * np.maximum(counts, 1)), dtype=torch.float32)
    if task == "multilabel":
        positive, negative = (targets == 1).sum(0), (targets == 0).sum(0)
        return torch.tensor(negative.clip(1) / positive.clip(1), dtype=torch.float32)
    raise InputError(f"optim.class_weights weights classes, and the task is {task}; leave it out")


def _check(task: str, targets: np.ndarray, classes: int) -> None:
    if task == "survival":
        if not (np.isfinite(targets).all() and (targets[:, 1] > 0).any()):
            raise InputError("no event was seen in the training patients: nothing can be learned of survival")
    elif task == "classification":
        if len(np.unique(targets)) < 2:
            raise InputError(
                f"the training patients are all of one class, of {classes}; two at least are needed to tell them apart"
            )
    elif not np.isfinite(targets).any(axis=0).all():
        unknown = int((~np.isfinite(targets).any(axis=0)).sum())
        raise InputError(
            f"{unknown} of {targets.shape[1]} targets are not known of any training patient; leave them out"
        )
