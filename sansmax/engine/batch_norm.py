"""Batch norm whose statistics are those of the images of all processes, as if one process had the whole batch.

    mean = sum(x) / n,  var = sum((x - mean)^2) / n        over all images, rows and columns of all processes

torch's SyncBatchNorm, where it runs: on GPUs. On processors the sums are made here, twice forwards and twice backwards.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sansmax.engine.processes import Processes
from sansmax.errors import InputError

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all processes; the loss is the sum of theirs, so that its gradient is a sum, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_total: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        by_x = by_total.clone()
        dist.all_reduce(by_x)
        return by_x


class SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """`nn.BatchNorm` over the default group of processes; in evaluation mode the same as ever."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        pass

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalised `input`, (b, c, ...)."""
        if not self.training:
            return super().forward(input)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        others = [0, *range(2, x.ndim)]
        shape = [1, -1] + [1] * (x.ndim - 2)
        count = x.new_full((1,), x.numel() // x.shape[1])
        total: Tensor = _Sum.apply(torch.cat([x.sum(others), count]))  # pyright: ignore[reportAssignmentType]
        n = total[-1].detach()
        mean = total[:-1] / n
        centred = x - mean.view(shape)
        # around the mean of all: a difference of two large numbers has no digits left
        squares: Tensor = _Sum.apply(centred.square().sum(others))  # pyright: ignore[reportAssignmentType]
        self._remember(mean.detach(), squares.detach() / (n - 1).clamp_min(1))
        out = centred * (squares / n + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)

    def _remember(self, mean: Tensor, var: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), share)
        self.running_var.lerp_(var.to(self.running_var), share)


def synchronise(network: nn.Module, processes: Processes, smallest: int, device: str) -> nn.Module:
    """The network, its batch norms over all processes; names and parameters stay. `smallest` is the smallest batch.

    Raises InputError where a process would have no image of a batch, which cannot take part in its statistics, and for
    a batch norm of another kind on processors.
    """
    found = {name: m for name, m in network.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    if processes.world == 1 or not found:
        return network
    if smallest < processes.data_world:
        raise InputError(
            f"the network has batch norm, and a batch of {smallest} leaves some of {processes.data_world} processes "
            "without an image; raise batch_size, or use fewer processes"
        )
    if device == "cuda":
        from timm.layers import convert_sync_batchnorm

        return convert_sync_batchnorm(network)
    for name, norm in found.items():
        if type(norm) not in PLAIN:
            raise InputError(
                f"{name} is a {type(norm).__name__}, whose statistics processes share on GPUs only; use one process, "
                "or another network"
            )
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, _shared(norm))
    return network


def _shared(norm: Any) -> SharedBatchNorm:
    new = SharedBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    # the very same parameters and buffers
    new._parameters, new._buffers, new.training = norm._parameters, norm._buffers, norm.training
    return new
