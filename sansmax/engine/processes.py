"""Several processes that train one network together: how they meet, and what they tell each other.

torchrun and `srun` start the same command once for each process and say by the environment which one it is;
`sansmax train --devices 4` starts its processes by itself (`sansmax.engine.launch`). All of them read the data and take
part in each step; the first one writes and speaks, the others are silent.

With `sequence_parallel` k the processes are a table of world / k rows (data) and k columns (sequence): a row sees the
same samples and shares their tokens, and the samples of a step are shared out over the rows.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sansmax.data.sampling import Share
from sansmax.engine.config import ParallelConfig
from sansmax.engine.place import Place, check_columns, place_of, processes_to_start
from sansmax.errors import InputError

T = TypeVar("T")
# what they agree on takes as long as the slowest of them, which may read all images or write the report meanwhile;
# a process that is gone is noticed at once by its closed connection
PATIENCE = timedelta(days=2)
# how long a process that lost another one waits for that one to say why
LAST_WORDS = 2.0


class Lost(InputError):
    """Another process of the run is gone."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them; without any groups: this one alone.

    `data_group` are those that have other samples, `sequence_group` those that share the tokens of the same ones.
    `control` speaks between processors, whatever the network computes on.
    """

    place: Place
    sequence: int = 1
    control: Any = None
    data_group: Any = None
    sequence_group: Any = None

    @classmethod
    def alone(cls) -> "Processes":
        """One process that trains by itself."""
        return cls(Place(0, 1, 0, 1))

    @classmethod
    def of_group(cls, place: Place, sequence: int, device: str) -> "Processes":
        """All processes of the default group, which has to be there."""
        from torch.distributed.device_mesh import init_device_mesh

        check_columns(sequence, place.world)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        if sequence == 1:
            return cls(place, 1, control, dist.group.WORLD)
        mesh = init_device_mesh(device, (place.world // sequence, sequence), mesh_dim_names=("data", "sequence"))
        return cls(place, sequence, control, mesh.get_group("data"), mesh.get_group("sequence"))

    @property
    def world(self) -> int:
        """How many there are."""
        return self.place.world

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.place.rank == 0

    @property
    def data_world(self) -> int:
        """Among how many the samples of a step are shared out."""
        return self.place.world // self.sequence

    @property
    def data_rank(self) -> int:
        """Whose share of the samples this process has."""
        return self.place.rank // self.sequence

    @property
    def share(self) -> Share:
        """The part of each batch that this process has."""
        return Share(self.data_rank, self.data_world)

    # Numbers

    def summed(self, values: Tensor) -> Tensor:
        """The sum over all shares of the samples; no gradient."""
        if self.data_world == 1:
            return values.detach()
        total = values.detach().clone()
        dist.all_reduce(total, group=self.data_group)
        return total

    def highest(self, values: Sequence[float]) -> list[float]:
        """The largest over all processes, entry by entry: what one of them asks for, all of them do."""
        if self.world == 1:
            return list(values)
        most = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.control)
        return most.tolist()

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all shares one after the other, on the processor; any number of each, none too."""
        rows = rows.detach().cpu()
        if self.data_world == 1:
            return rows
        counts = torch.zeros(self.world, dtype=torch.int64)
        counts[self.place.rank] = len(rows)
        dist.all_reduce(counts, group=self.control)
        # gloo gathers equal parts
        padded = rows.new_zeros(int(counts.max()), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded, group=self.control)
        own = zip(parts, counts.tolist(), strict=True)
        return torch.cat([part[:n] for rank, (part, n) in enumerate(own) if rank % self.sequence == 0])

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes each gradient the sum of those of all shares; a parameter without one here counts as 0."""
        if self.world == 1:
            return
        own = [p for p in parameters if p.requires_grad]
        for dtype in dict.fromkeys(p.dtype for p in own):
            of_type = [p for p in own if p.dtype == dtype]
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in of_type])
            dist.all_reduce(flat)
            # of processes that share tokens the mean is the gradient
            flat /= self.sequence
            for p, part in zip(of_type, flat.split([p.numel() for p in of_type]), strict=True):
                p.grad = part.view_as(p).clone()

    # Agreement

    def first(self, act: Callable[[], T]) -> T | None:
        """Has the first process do something while the others wait; what it raises is raised in all of them.

        The others get None.
        """
        if self.world == 1:
            return act()
        said: list[Any] = [None]
        done = None
        try:
            if self.is_first:
                done = act()
        except BaseException as error:
            said = [error if isinstance(error, InputError) else Lost("the first process of the run ended")]
            raise
        finally:
            if self.is_first:
                dist.broadcast_object_list(said, 0, group=self.control)
        if not self.is_first:
            dist.broadcast_object_list(said, 0, group=self.control)
            if isinstance(said[0], Lost):
                # the first one says why
                time.sleep(LAST_WORDS)
            if said[0] is not None:
                raise said[0]
        return done

    def in_turn(self, act: Callable[[], T]) -> T:
        """Has the first process do something, then the others the same; gives what this one got."""
        if self.world == 1:
            return act()
        got: list[T] = []
        self.first(lambda: got.append(act()))
        if not self.is_first:
            got.append(act())
        dist.barrier(group=self.control)
        return got[0]

    def joined_lists(self, own: Sequence[T]) -> list[T]:
        """The lists of all shares of the samples, one after the other."""
        if self.world == 1:
            return list(own)
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, list(own), group=self.control)
        return [item for rank, items in enumerate(found) if rank % self.sequence == 0 for item in items]

    def check_same(self, what: str, text: str | bytes) -> None:
        """Raises InputError in all processes unless all of them have the same text."""
        if self.world == 1:
            return
        data = text.encode() if isinstance(text, str) else text
        digests: list[Any] = [None] * self.world
        dist.all_gather_object(digests, hashlib.sha256(data).hexdigest(), group=self.control)
        if len(set(digests)) > 1:
            others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise InputError(f"{what} differ between process 0 and {others}: give all machines the same files")


@contextmanager
def joined(parallel: ParallelConfig, device: str = "auto") -> Iterator[Processes]:
    """The processes of this run, which meet here; this one alone where nobody started several.

    Raises InputError where what was started does not fit the configuration or the devices of this machine, and `Lost`
    where one of them ends while the others wait for it.
    """
    assert not processes_to_start(parallel), "the processes have been started"
    if dist.is_initialized():
        rank, world = dist.get_rank(), dist.get_world_size()
        place = Place(rank, world, int(os.environ.get("LOCAL_RANK", rank)), world)
        # a group that the caller made, and ends
        yield Processes.of_group(place, parallel.sequence_parallel, _kind(device))
        return
    place = place_of()
    if place is None or place.world == 1:
        yield Processes.alone()
        return
    kind = _kind(device)
    if kind == "cuda":
        if place.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"{place.local_world} processes were started on a machine with {torch.cuda.device_count()} GPUs; start "
                "as many as there are, or give device=cpu"
            )
        torch.cuda.set_device(place.local_rank)
    with explained_loss():
        _meet(place, kind)
        yield Processes.of_group(place, parallel.sequence_parallel, kind)
        # after an error the group ends with its process: the others may wait in it
        dist.destroy_process_group()


def _kind(device: str) -> str:
    """The kind of device that several processes compute on."""
    if device == "mps":
        raise InputError("device=mps is one device, which one process uses; give device=cpu for several")
    return "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"


_voice: list[Any] = []


def _meet(place: Place, kind: str) -> None:
    """Makes the default group of all processes, gloo between processors and NCCL between GPUs."""
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        _address_of_slurm()
    try:
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.world, timeout=timedelta(minutes=15)))
        _voice[:] = [store]
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        group_store = dist.PrefixStore("sansmax", store)
        dist.init_process_group(backend, store=group_store, rank=place.rank, world_size=place.world)
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise InputError(
            f"process {place.rank} of {place.world} did not meet the others at {where} ({error}); see that all the "
            "machines reach this address (MASTER_ADDR, MASTER_PORT)"
        ) from error


def _address_of_slurm() -> None:
    """The first machine of the job, and a port that follows from the job's number."""
    from lightning.fabric.plugins.environments import SLURMEnvironment

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "127.0.0.1")
    os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    os.environ.setdefault("MASTER_PORT", str(15000 + job % 10000))


@contextmanager
def explained_loss() -> Iterator[None]:
    """Raises `Lost` for the errors that a process gets when another one is gone."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        # the one that is gone may be about to say why; then this one has nothing to add
        time.sleep(LAST_WORDS)
        raise Lost(
            "another process of this run ended while this one waited for it (killed, or out of memory?); what was "
            "written before is kept. Go on with the same command and --resume"
        ) from error


def _is_of_connection(error: RuntimeError) -> bool:
    words = ("connection closed", "connection reset", "broken pipe", "gloo", "nccl", "socket", "timed out", "store")
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in words)


def speaks() -> bool:
    """Whether this process tells the user why the run ends: the first one to ask, and no other of the run."""
    place = place_of()
    if place is None or place.world == 1:
        return True
    if not _voice:
        # before they met: all found the same, and when one has ended the others are ended
        if place.rank > 0:
            time.sleep(LAST_WORDS)
        return place.rank == 0
    try:
        return _voice[0].add("sansmax/said", 1) == 1
    except RuntimeError:
        # who kept the store has ended, and spoken
        return False
