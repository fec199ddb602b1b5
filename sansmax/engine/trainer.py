"""Lightning's loop over one process or several, with our own records of it.

ddp: every process holds the network, and gradients are averaged while they are computed. A module that steps by itself
sums its gradients by itself, after packs whose number differs from process to process. fsdp: parameters, gradients and
the optimiser's averages are shared out (FSDP2); a checkpoint holds them whole, as that of one process.
"""

import logging
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from sansmax.engine.batch_norm import synchronise
from sansmax.engine.checkpoints import Checkpoint, WholeFiles
from sansmax.engine.loss_scale import LossScale
from sansmax.engine.processes import Processes

# float16 has a plugin of its own
PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16": "bf16-mixed", "16": None}


def run_lightning(
    config: Any,
    module: Any,
    recorder: Any,
    train_loader: Any,
    val_loader: Any,
    checkpoint: Checkpoint | None,
    processes: Processes | None = None,
) -> None:
    """Trains `module` over the loaders, from a checkpoint where one is given."""
    processes = processes or Processes.alone()
    module.processes = recorder.processes = processes
    own_steps = not module.automatic_optimization
    if not own_steps:
        kind = "cpu" if config.device == "cpu" or not torch.cuda.is_available() else "cuda"
        module.network = synchronise(module.network, processes, smallest_batch(train_loader, module), kind)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # its advice on workers and logging intervals is answered by our own configuration
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        trainer = pl.Trainer(
            accelerator={"auto": "auto", "cpu": "cpu", "cuda": "gpu", "mps": "mps"}[config.device],
            devices=processes.place.local_world,
            num_nodes=processes.world // processes.place.local_world,
            strategy=strategy_for(config.parallel.strategy, module, processes, train_loader),
            precision=PRECISIONS[config.precision],
            max_epochs=config.epochs,
            # a module that steps by itself counts its batches and clips by itself
            accumulate_grad_batches=1 if own_steps else config.optim.grad_accum_steps,
            gradient_clip_val=None if own_steps else config.optim.clip_grad,
            callbacks=[recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            # the records of other runs in this folder are none of ours
            default_root_dir=recorder.folder,
            plugins=[
                WholeFiles(),
                Started(processes),
                *([LossScale(kind_of(config.device))] * (config.precision == "16")),
            ],
        )
        trainer.fit(module, train_loader, val_loader, ckpt_path=None if checkpoint is None else str(checkpoint.path))


def kind_of(device: str) -> str:
    """The kind of device that Lightning will train on."""
    if device != "auto":
        return device
    return "mps" if torch.backends.mps.is_available() else "cuda" if torch.cuda.is_available() else "cpu"


def smallest_batch(loader: Any, module: Any) -> int:
    """Images of the smallest batch of an epoch; of pairs, each of which is in one process, the number of pairs."""
    sampler = loader.batch_sampler
    last = sampler.n % sampler.batch_size
    n = sampler.batch_size if sampler.drop_last or not last else last
    return n // 2 if sampler.pairs and module.processes.data_world > 1 else n


def strategy_for(name: str, module: Any, processes: Processes, loader: Any) -> Strategy | str:
    """How Lightning spreads a module over the processes."""
    if processes.world == 1:
        return "auto"
    if not module.automatic_optimization:
        return Together()
    if name == "fsdp":
        return SharedOut()
    shape = loader.dataset.preprocess
    unused = unused_parameters(module.network, torch.zeros(1, shape.in_chans, *shape.image_size))
    # all have the same statistics, so buffers need not be sent
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=bool(unused))


class Started(ClusterEnvironment):
    """The processes as they were started, whoever did it: Lightning starts none, and leaves SLURM's signals alone."""

    def __init__(self, processes: Processes) -> None:
        super().__init__()
        self.place = processes.place

    @property
    def creates_processes_externally(self) -> bool:
        """They are there."""
        return True

    @property
    def main_address(self) -> str:
        """Not asked for, since the processes have met."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Not asked for, since the processes have met."""
        return 0

    @staticmethod
    def detect() -> bool:
        """Lightning does not choose this one by itself."""
        return False

    def world_size(self) -> int:
        """Number of processes."""
        return self.place.world

    def set_world_size(self, size: int) -> None:
        """It is what it is."""

    def global_rank(self) -> int:
        """Number of this process."""
        return self.place.rank

    def set_global_rank(self, rank: int) -> None:
        """It is what it is."""

    def local_rank(self) -> int:
        """Number of this process on its machine."""
        return self.place.local_rank

    def node_rank(self) -> int:
        """Number of this machine."""
        return self.place.rank // self.place.local_world


class Together(DDPStrategy):
    """Every process holds the module as it is; the module sums its gradients by itself."""

    def configure_ddp(self) -> None:
        """Starts all processes from the parameters of the first one; gradients are not touched."""
        assert self.model is not None
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            torch.distributed.broadcast(tensor.detach(), 0)


class SharedOut(DDPStrategy):
    """Parameters, gradients and optimiser are shared out over all processes (FSDP2); checkpoints hold them whole."""

    def configure_ddp(self) -> None:
        """Shares out the network, and its moving average in the same way."""
        from torch.distributed.device_mesh import init_device_mesh

        module: Any = self.model
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for network in (module.network, *([] if module.ema is None else [module.ema.module])):
            share_out(network, mesh)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The state of the module, every tensor whole; all processes have to ask for it."""
        return {name: whole(value) for name, value in super().lightning_module_state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimiser, every tensor whole; all processes have to ask for it."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        held = {i: {k: whole(v) for k, v in values.items()} for i, values in state["state"].items()}
        return {**state, "state": held}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Takes up whole tensors, of which every process keeps its part."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            held = {i: {k: _part(v, parameters[i]) for k, v in of.items()} for i, of in state["state"].items()}
            optimizer.load_state_dict({**state, "state": held})


def share_out(network: nn.Module, mesh: Any) -> None:
    """Shares out the parameters of a network over a mesh: block by block where it has blocks, else as one."""
    from torch.distributed.fsdp import fully_shard

    blocks: Any = getattr(network, "blocks", None)
    for block in blocks if isinstance(blocks, nn.ModuleList | nn.Sequential) else ():
        fully_shard(block, mesh=mesh)
    # whole parameters are there while a pass needs them, and no longer
    fully_shard(network, mesh=mesh, reshard_after_forward=True)


def whole(value: Any) -> Any:
    """A tensor whose parts are in several processes, in one piece; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _part(value: Any, parameter: nn.Parameter) -> Any:
    if not (isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def unused_parameters(network: nn.Module, images: Tensor) -> list[str]:
    """Names of trained parameters that the outputs do not depend on: no process may wait for their gradients."""
    wanted = {name: p for name, p in network.named_parameters() if p.requires_grad}
    modes = {module: module.training for module in network.modules()}
    # batch norm learns nothing of this pass
    network.eval()
    found = torch.autograd.grad(network(images).sum(), list(wanted.values()), allow_unused=True)
    for module, mode in modes.items():
        module.training = mode
    return [name for name, gradient in zip(wanted, found, strict=True) if gradient is None]
