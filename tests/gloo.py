"""A function in several processes that speak over gloo, as on several machines."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from pathlib import Path

import torch

_CONTEXT = multiprocessing.get_context("forkserver")
# a process that has loaded the libraries and computed nothing is copied for each rank
_CONTEXT.set_forkserver_preload(
    [
        *("torch", "torch.distributed.device_mesh", "torch.distributed.fsdp", "lightning.pytorch", "timm.optim"),
        *("sansmax.models", "sansmax.engine.schedule", "sansmax.engine.train", "sansmax.engine.bag_train"),
        *("sansmax.engine.callbacks", "sansmax.engine.trainer"),
    ]
)


def in_processes(world, function, *arguments, seconds=120):
    """What `function(rank, *arguments)` gives on each of `world` ranks, in their order.

    `function` and what it takes and gives must be of a module, and pickle; a failure on a rank is raised here with
    its traceback. The ranks have their default group when `function` begins.
    """
    with tempfile.TemporaryDirectory() as folder:
        answers = _CONTEXT.Queue()
        ranks = [
            _CONTEXT.Process(target=_rank, args=(rank, world, folder, function, arguments, answers), daemon=True)
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        found, failed = {}, []
        try:
            for _ in ranks:
                rank, ok, value = answers.get(timeout=seconds)
                if not ok:
                    failed.append(f"rank {rank}:\n{value}")
                    break
                found[rank] = pickle.loads(value)
        finally:
            for process in ranks:
                process.join(timeout=0 if failed else 10)
                if process.is_alive():
                    process.kill()
                    process.join()
        assert not failed, "\n".join(failed)
        return [found[rank] for rank in range(world)]


def _rank(rank, world, folder, function, arguments, answers):
    torch.set_num_threads(1)
    os.environ.update({"GLOO_SOCKET_IFNAME": "lo"})
    try:
        store = torch.distributed.FileStore(str(Path(folder, "store")), world)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
        # plain bytes: the queue would share a tensor's memory with a process that is gone
        value = pickle.dumps(function(rank, *arguments))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        answers.put((rank, True, value))
    except BaseException:
        answers.put((rank, False, traceback.format_exc()))
