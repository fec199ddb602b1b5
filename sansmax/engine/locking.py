"""A run folder is written by one run at a time: a second one that would is told so.

The lock is one of the operating system's on a file `.lock` in the folder. It ends with its process, however that ends,
so that a run killed a moment ago can be taken up at once; processes that load images do not inherit it.
"""

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sansmax.engine.processes import Processes
from sansmax.errors import InputError

LOCK = ".lock"
HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def sole_writer(folder: Path, processes: Processes) -> Iterator[None]:
    """Has the folder for the processes of this run alone; it is made where it is missing.

    Where the operating system or the file system know no locks, nothing is locked. Raises InputError, in all processes,
    while another run has the folder.
    """
    held: list[int] = []
    processes.first(lambda: held.extend(_take(folder)))
    try:
        yield
    finally:
        for number in held:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(number)


def _take(folder: Path) -> list[int]:
    """The number of the open and locked file, or none where there are no locks."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        return []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {folder} cannot be made: {error.strerror}") from None
    while True:
        try:
            number = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError as error:
            raise InputError(f"the folder {folder} cannot be written: {error.strerror}") from None
        try:
            fcntl.lockf(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(number, 200).decode(errors="replace").strip()
            os.close(number)
            if error.errno not in HELD:
                return []
            raise InputError(
                f"{folder} is being trained by another run ({owner or 'just started'}); wait until it has ended, "
                "or give another --output"
            ) from None
        if _is_still(folder / LOCK, number):
            # a full disk may have no room for the name, which is a courtesy
            with suppress(OSError):
                os.ftruncate(number, 0)
                os.write(number, f"process {os.getpid()} on {platform.node()}".encode())
            return [number]
        # the run that had it ended between the two calls, and took the file along
        os.close(number)


def _is_still(path: Path, number: int) -> bool:
    """Whether the path is the open file's."""
    try:
        return os.path.samestat(path.stat(), os.fstat(number))
    except FileNotFoundError:
        return False
