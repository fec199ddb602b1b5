"""Which of several processes this one is, as who started it says, and whether what was asked for fits that."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist

from sansmax.engine.config import ParallelConfig
from sansmax.errors import InputError


@dataclass(frozen=True)
class Place:
    """Which process this is: number `rank` of `world`, and number `local_rank` of `local_world` on its machine."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def place_of(environment: Mapping[str, str] | None = None) -> Place | None:
    """What torchrun or SLURM's srun say of this process; None where neither started it.

    Only a job step counts as started by SLURM: in a batch script itself the variables of the job are there, too.
    """
    e = os.environ if environment is None else environment
    if "RANK" in e and "WORLD_SIZE" in e:
        rank, world = int(e["RANK"]), int(e["WORLD_SIZE"])
        return Place(rank, world, int(e.get("LOCAL_RANK", rank)), int(e.get("LOCAL_WORLD_SIZE", world)))
    if "SLURM_STEP_NUM_TASKS" in e and "SLURM_PROCID" in e:
        world, nodes = int(e["SLURM_STEP_NUM_TASKS"]), int(e.get("SLURM_STEP_NUM_NODES", "1"))
        if world % nodes:
            raise InputError(f"{world} tasks on {nodes} machines: give each as many, with --ntasks-per-node")
        return Place(int(e["SLURM_PROCID"]), world, int(e.get("SLURM_LOCALID", "0")), world // nodes)
    return None


def processes_to_start(parallel: ParallelConfig) -> int:
    """How many processes `--devices` asks for that nobody has started yet; 0: none, this one trains.

    Raises InputError where the configuration and what was started do not fit together.
    """
    wanted = None if parallel.devices is None else parallel.devices * parallel.num_nodes
    if dist.is_initialized():
        there: int | None = dist.get_world_size()
    else:
        place = place_of()
        there = None if place is None else place.world
    if there is None or (there == 1 and wanted not in (None, 1) and parallel.num_nodes == 1):
        if parallel.num_nodes > 1:
            raise InputError(
                f"parallel.num_nodes is {parallel.num_nodes}, and a machine cannot start the processes of another: "
                "start them with torchrun on each, or with srun"
            )
        check_columns(parallel.sequence_parallel, wanted or 1)
        return 0 if wanted in (None, 1) else wanted
    if wanted is not None and wanted != there:
        raise InputError(
            f"the configuration is for {wanted} processes (parallel.devices, parallel.num_nodes), and {there} were "
            "started; leave --devices out, or start as many"
        )
    check_columns(parallel.sequence_parallel, there)
    return 0


def check_alone(parallel: ParallelConfig) -> None:
    """Raises InputError where several processes were started, or asked for: a cross-validation is made by one."""
    place = place_of()
    several = dist.get_world_size() > 1 if dist.is_initialized() else place is not None and place.world > 1
    if several or processes_to_start(parallel):
        raise InputError(
            "a cross-validation is trained by one process; leave --devices and torchrun out, or train each split by "
            "itself, in a folder of its own"
        )


def check_shared_out(strategy: str, precision: str, sequence_parallel: int, packs: bool = False) -> None:
    """Raises InputError for what cannot be combined with parameters that are shared out; `packs`: of bags."""
    if strategy != "fsdp":
        return
    if sequence_parallel > 1:
        raise InputError(
            "parallel.strategy=fsdp gathers parameters where the whole network is called, and with --sequence-parallel "
            "its parts are; leave the strategy at ddp, or --sequence-parallel at 1"
        )
    if packs:
        raise InputError(
            "parallel.strategy=fsdp needs as many passes in each process, and packs of bags differ in number; slide "
            "networks are small: use parallel.strategy=ddp"
        )
    if precision == "16":
        raise InputError("parallel.strategy=fsdp cannot scale the loss for float16; use precision=bf16 or 32")


def check_columns(sequence: int, world: int) -> None:
    """Raises InputError where `sequence` processes that share an image do not divide the `world` of them."""
    if world % sequence:
        fitting = ", ".join(str(k) for k in range(1, world + 1) if world % k == 0)
        raise InputError(
            f"--sequence-parallel {sequence} does not divide the {world} process{'es' * (world > 1)} of the run; "
            f"it can be {fitting}" + ("; start several with --devices, torchrun or srun" if world == 1 else "")
        )
