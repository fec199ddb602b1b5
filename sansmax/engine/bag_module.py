"""A slide network in training, as a Lightning module: a step over packs of bags, whatever their number.

The loss of a step is that of all its patients at once. Of a loss that is a sum over patients each pack gives its part;
Cox's likelihood is not, so there the risks of all patients are computed first, then each pack again with the gradient
of the whole loss by its risks. Either way the gradient is exact, and memory that of one pack.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sansmax.data.bag_loading import Pack
from sansmax.engine.bag_config import OptimConfig, TokenConfig
from sansmax.engine.bag_losses import Objective
from sansmax.engine.loss_scale import LossScale, skipped_step
from sansmax.engine.module import Classifier, not_finite
from sansmax.models.slide import FeatureNetwork


class BagModule(Classifier):
    """A slide network with its objective.

    `targets` are those of the training patients, `val_targets` of the validation patients, as in `Cases`.
    """

    def __init__(
        self,
        network: FeatureNetwork,
        optim: OptimConfig,
        tokens: TokenConfig,
        objective: Objective,
        targets: np.ndarray,
        epochs: int,
        steps_per_epoch: int,
        seed: int,
    ) -> None:
        super().__init__(network, optim, network.num_classes, epochs, steps_per_epoch, seed)
        self.tokens, self.objective = tokens, objective
        self.automatic_optimization = False
        # a step is one batch of the loader, in as many packs as it takes
        self.batches_per_step = 1
        self.register_buffer("targets", _tensor(targets), persistent=False)

    def training_step(self, batch: list[Pack], batch_idx: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step of the optimiser over the packs of a batch, which the processes share out."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.last_loss = self.accumulate(batch)
        self.processes.sum_gradients(list(self.network.parameters()))
        if not np.isfinite(self.last_loss):
            raise not_finite("the loss", self.global_step + 1, self.current_epoch, self.optim)
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, LossScale):
            plugin.unscale(optimizer.optimizer)
        if self.optim.clip_grad is not None:
            self.clip_gradients(optimizer, self.optim.clip_grad, "norm")
        optimizer.step()
        scheduler: Any = self.lr_schedulers()
        if scheduler is not None:
            self.lr_scheduler_step(scheduler, None)
        if self.ema is not None and not skipped_step(self):
            self.ema.update(self.network, step=self.global_step)

    def accumulate(self, packs: list[Pack]) -> float:
        """Adds the gradient of the loss over all packs to the parameters, and gives the loss."""
        o, targets = self.objective, [self._targets(p) for p in packs]
        if o.separable:
            weights = [o.weight(t, shares) for pairs in targets for t, shares in pairs]
            own = torch.stack(weights).sum() if weights else o.weight(self.get_buffer("targets")[:0])
            whole = self.processes.summed(own).clamp_min(1e-12)
            parts = enumerate(zip(packs, targets, strict=True))
            loss = sum(self._backward(self._total(self.outputs(p, i), pairs) / whole) for i, (p, pairs) in parts)
            return float(self.processes.summed(own.new_tensor(loss)))
        every = [pairs[0][0] for pairs in targets]
        if len(packs) == 1 and self.processes.data_world == 1:
            return self._backward(o.loss(self.outputs(packs[0], 0), every[0]))
        with torch.no_grad():
            outputs = [self.outputs(p, i) for i, p in enumerate(packs)]
        loss, by_own = self._of_all(outputs, every)
        for i, (p, by) in enumerate(zip(packs, by_own.split([len(p.indices) for p in packs]), strict=True)):
            self._backward((self.outputs(p, i) * by).sum())
        return loss

    def _of_all(self, outputs: list[Tensor], targets: list[Tensor]) -> tuple[float, Tensor]:
        """The loss of the outputs of all processes together, and its gradient by one's own."""
        columns = self.network.get_parameter("head.weight").new_zeros(0, 1)
        own, truth = torch.cat([columns, *outputs]), torch.cat([self.get_buffer("targets")[:0], *targets])
        whose = self.processes.gathered(torch.full((len(own),), self.processes.data_rank))
        every = self.processes.gathered(own).to(own.device).requires_grad_()
        loss = self.objective.loss(every, self.processes.gathered(truth).to(own.device))
        mine = (whose == self.processes.data_rank).to(own.device)
        return float(loss.detach()), torch.autograd.grad(loss, every)[0][mine]

    def _targets(self, pack: Pack) -> list[tuple[Tensor, Tensor | None]]:
        """Targets of a pack's bags, and how much each counts: of mixed bags those of both patients."""
        targets = self.get_buffer("targets")
        if pack.partners is None or pack.shares is None:
            return [(targets[pack.indices], None)]
        return [(targets[pack.indices], pack.shares), (targets[pack.partners], 1 - pack.shares)]

    def _total(self, outputs: Tensor, pairs: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        return torch.stack([self.objective.total(outputs, t, shares) for t, shares in pairs]).sum()

    def _backward(self, loss: Tensor) -> float:
        self.manual_backward(loss)
        return float(loss.detach())

    def outputs(self, pack: Pack, number: int) -> Tensor:
        """What the network gives for the bags of a pack in training, random numbers by seed, step and pack."""
        words = np.random.SeedSequence([self.seed, self.global_step, number, self.processes.data_rank])
        torch.manual_seed(int(words.generate_state(1)[0]))
        features = pack.features
        if self.tokens.noise:
            features = features + torch.randn_like(features) * (self.tokens.noise * features.std())
        features = F.dropout(features, self.tokens.drop)
        return run_pack(self.shared(self.network), pack._replace(features=features)).float()

    def validation_step(self, batch: list[Pack], batch_idx: int) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Collects outputs, and whose they are."""
        for pack in batch:
            self.val_logits.append(run_pack(self.shared(self.evaluated), pack).float().cpu())
            self.val_indices.append(pack.indices.cpu())

    def validated(self) -> tuple[Tensor, ...]:
        """Outputs of all validation patients in their order, whichever process had them."""
        width: Any = self.network.num_classes
        outputs = self.val_logits or [torch.zeros(0, width)]
        indices = self.val_indices or [torch.zeros(0, dtype=torch.int64)]
        outputs, indices = (self.processes.gathered(torch.cat(kept)) for kept in (outputs, indices))
        return (outputs[indices.argsort()],)

    def kept(self) -> nn.Module:
        """The network whose weights a run keeps: its outputs are in the units of the targets."""
        return in_units(self.evaluated, self.objective)


def run_pack(network: nn.Module, pack: Pack) -> Tensor:
    """Outputs of the bags of a pack, one row each."""
    if len(pack.lengths) == 1:
        return network(pack.features, pack.coords)
    return network(pack.features, pack.coords, lengths=pack.lengths)


def in_units(network: nn.Module, objective: Objective) -> nn.Module:
    """The network, its linear head scaled and moved where targets were standardised."""
    if objective.mean is None or objective.scale is None:
        return network
    import copy

    scaled: Any = copy.deepcopy(network)
    with torch.no_grad():
        scale, mean = objective.scale.to(scaled.head.weight), objective.mean.to(scaled.head.weight)
        scaled.head.weight.mul_(scale.unsqueeze(1))
        scaled.head.bias.mul_(scale).add_(mean)
    return scaled


def _tensor(targets: np.ndarray) -> Tensor:
    if targets.dtype.kind in "iu":
        return torch.tensor(targets, dtype=torch.int64)
    # times that differ after the eighth digit are not tied
    return torch.tensor(targets, dtype=torch.float64)
