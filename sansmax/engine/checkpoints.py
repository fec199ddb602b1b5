"""Checkpoints that survive what happens to the program, the disk and the machine, and how a run is taken up from them.

last.ckpt is what `torch.save` writes, a ZIP archive, and its comment is the sha256 of all bytes before it: a byte that
is missing or another one is noticed. A new one takes its name when it is whole on the disk, and the one before it
becomes previous.ckpt; so at every moment one of the two is whole. Nothing is unpickled but tensors and plain values.
"""

import errno
import hashlib
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from sansmax.engine.run import METRICS, environment
from sansmax.errors import InputError
from sansmax.files import PARTIAL, replacing
from sansmax.report.tables import truncate_rows

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
MARK = b"sha256:"
# the comment of the archive: the mark and the sum in hexadecimal
SEAL = len(MARK) + 64
# the end of an archive without a comment is 22 bytes, the last two the length of the comment
END, END_MARK = 22, b"PK\x05\x06"


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all and keeps the one before it; reads it without unpickling objects."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the checkpoint, sealed; an older last.ckpt is kept as previous.ckpt."""
        written = io.BytesIO()
        torch.save(checkpoint, written)
        seal(written)
        path = Path(path)
        with replacing(path, keep=path.with_name(PREVIOUS) if path.name == LAST else None) as partial:
            partial.write_bytes(written.getbuffer())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a checkpoint; whatever is asked for, objects are not unpickled."""
        return torch.load(path, map_location=map_location, weights_only=True)


def seal(archive: io.BytesIO) -> None:
    """Adds to a ZIP archive without a comment the comment that holds the sha256 of all bytes before it."""
    start = archive.seek(-END, io.SEEK_END)
    assert archive.read(len(END_MARK)) == END_MARK, "torch.save ends a file as every ZIP archive ends"
    archive.seek(start + END - 2)
    archive.write(struct.pack("<H", SEAL))
    digest = hashlib.sha256(archive.getbuffer()).hexdigest()
    archive.write(MARK + digest.encode())


class Damaged(Exception):
    """A checkpoint that is not as it was written; says what is wrong with it."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its file, and the state that the recorder of the run left in it."""

    path: Path
    state: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Reads a checkpoint and makes sure of every byte of it.

        Raises Damaged where it is not whole.
        """
        sealed = _is_sealed(path)
        try:
            # of a sealed one every byte was read
            whole = torch.load(path, map_location="cpu", weights_only=True, mmap=sealed)
            state = whole["callbacks"]["Recorder"]
        except Exception as error:  # of many types, by where the damage is
            raise Damaged(f"it cannot be read: {type(error).__name__}") from error
        # earlier versions wrote neither; who lost the seal still has the conditions
        if not sealed and "conditions" in state:
            raise Damaged("its end is missing")
        return cls(path, state)

    @property
    def finished(self) -> bool:
        """Whether training was over."""
        return self.state["finished"]

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and batch that come next, from 0."""
        epoch, batch = self.state["next_batch"]
        return epoch, batch


def _is_sealed(path: Path) -> bool:
    """Whether a file ends with the sum of its bytes; raises Damaged where it is another sum."""
    try:
        with path.open("rb") as file:
            left = max(0, file.seek(0, io.SEEK_END) - SEAL)
            file.seek(left)
            comment = file.read(SEAL)
            if not comment.startswith(MARK):
                return False
            file.seek(0)
            digest = hashlib.sha256()
            while piece := file.read(min(left, 1 << 20)):
                digest.update(piece)
                left -= len(piece)
    except OSError as error:
        # what a dying disk says
        if error.errno != errno.EIO:
            raise
        raise Damaged("the disk cannot read it") from error
    if comment != MARK + digest.hexdigest().encode():
        raise Damaged("its checksum does not fit")
    return True


def find_checkpoint(folder: Path, say: Callable[[str], object]) -> Checkpoint | None:
    """The newest whole checkpoint of a run; None where there is none yet.

    Where the last one is damaged or gone, the one before it is taken, and `say` gets a line on what that means; the
    damaged file is removed, or it would take the place of the whole one when the next is written.

    Raises InputError where there are checkpoints and none of them is whole.
    """
    wrong = []
    for path in (folder / LAST, folder / PREVIOUS):
        try:
            found = Checkpoint.read(path)
        except FileNotFoundError:
            continue
        except Damaged as damage:
            wrong.append(f"the checkpoint {path} is damaged ({damage})")
            continue
        if path.name == PREVIOUS:
            epoch, batch = found.place
            why = wrong[0] if wrong else f"the checkpoint {folder / LAST} is missing"
            where = "the end of training" if found.finished else f"epoch {epoch + 1}, batch {batch + 1}"
            say(
                f"warning: {why}; going back to {PREVIOUS}, written before {where}. What came after it is trained "
                "again; the result is the same"
            )
            (folder / LAST).unlink(missing_ok=True)
        return found
    if wrong:
        raise InputError(
            "; ".join(wrong) + "; no other is there. Start anew with --overwrite. "
            "The best weights so far, model.safetensors, are not touched until then"
        )
    return None


class Loader(Protocol):
    """What is asked of the loader of training data."""

    def start_at(self, epoch: int, batch: int) -> None:
        """Takes up an epoch at a batch."""
        ...

    def __len__(self) -> int:
        """Batches of an epoch."""
        ...


def take_up(folder: Path, loader: Loader, say: Callable[[str], object]) -> Checkpoint | None:
    """Goes back to the newest whole checkpoint of a run: the loader starts there, and rows written later go.

    None: there is none yet, and the run starts from the beginning. Of a `finished` one there is nothing to train.

    Raises InputError where there are checkpoints and none of them is whole.
    """
    for partial in folder.glob(PARTIAL):
        partial.unlink(missing_ok=True)
    found = find_checkpoint(folder, say)
    if found is None:
        say("the run was stopped before its first checkpoint: starting from the beginning")
        truncate_rows(folder / METRICS, step=0)
    elif not found.finished:
        epoch, batch = found.place
        loader.start_at(epoch, batch)
        say(f"going on at epoch {epoch + 1}, batch {batch + 1} of {len(loader)}")
        truncate_rows(folder / METRICS, step=found.state.get("row_step", epoch * len(loader)))
    return found


# what may not change in a run, and how it is called
KEPT = {
    "processes": "processes",
    "sequence_parallel": "processes that share the tokens of an image",
    "precision": "precision",
}


def conditions(
    processes: int, sequence_parallel: int, precision: str, device: torch.device, teacher: str | None = None
) -> dict[str, Any]:
    """What the exact numbers of a run depend on beside its configuration and its data, as plain values.

    `precision` is that of the trainer, `device` the one that computes, `teacher` the digest of a teacher's weights.
    """
    return {
        "processes": processes,
        "sequence_parallel": sequence_parallel,
        "precision": precision,
        "teacher": teacher,
        "device": device.type,
        # wider registers add in another order
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **environment(),
    }


def check_conditions(before: dict[str, Any] | None, now: dict[str, Any], say: Callable[[str], object]) -> None:
    """Compares the `conditions` in a checkpoint with those of today; None in a checkpoint of an earlier version.

    What changes the last digits alone is told by `say`.

    Raises InputError for another number of processes, another precision and another teacher.
    """
    if before is None:
        say("warning: the checkpoint is of an earlier version of sansmax; the last digits may differ from here on")
        return
    for name, title in KEPT.items():
        if before[name] != now[name]:
            raise InputError(
                f"{title}: the run was trained with {before[name]}, and now it would be {now[name]}, whose sums are "
                f"others. Go on with {before[name]} as before, or start a new run in another --output from the weights "
                "of this one: --set model.initial_checkpoint=RUN/model.safetensors"
            )
    if "teacher" in before and before["teacher"] != now["teacher"]:
        raise InputError(
            "the weights of the teacher (distill.teacher) are not those that the run has learned from until now; put "
            "them back, or start a new run in another --output"
        )
    changed = [f"{n} {before.get(n)} -> {now.get(n)}" for n in {**before, **now} if before.get(n) != now.get(n)]
    if changed:
        say(f"warning: the last digits may differ from here on, since this changed: {', '.join(changed)}")
