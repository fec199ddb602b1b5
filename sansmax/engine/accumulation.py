"""The gradient of several batches, which is that of one batch of all their images.

The loss of a step is sum(losses) / sum(weights) over its batches. How much the later ones weigh is not known when the
first goes backwards, so each is divided by the weight W_1 of the first, and the sum of their gradients is multiplied
by W_1 / (W_1 + ... + W_n) before it is clipped and used. A last group of fewer batches is right by that, too.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Accumulated:
    """What the batches of a step weigh so far."""

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.whole: Tensor | None = None
        self.batches = 0

    def share(self, total: Tensor, weight: Tensor) -> Tensor:
        """What goes backwards for a batch whose losses sum to `total`."""
        weight = weight.detach()
        if self.first is None or self.whole is None:
            self.first = self.whole = weight
        else:
            self.whole = self.whole + weight
        self.batches += 1
        return total / self.first

    @torch.no_grad()
    def correct(self, parameters: Iterable[nn.Parameter], divided_by: int = 1) -> None:
        """Makes the gradients that were added up those of the step; the next step begins with nothing.

        `divided_by` is what each loss was divided by on its way, as Lightning does by the number of batches.
        """
        first, whole, batches = self.first, self.whole, self.batches
        self.__init__()
        if first is None or whole is None or batches == divided_by == 1:
            return
        factor = first * divided_by / whole
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(factor.to(p.grad.dtype))
