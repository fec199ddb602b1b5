"""Stopping in good order: the first Ctrl-C is a request, the second one ends the program."""

import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from sansmax.errors import InputError

# SIGUSR1 is what SLURM is often told to send before the time is over; Windows has none
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(Exception):
    """The user or the system asked the run in `folder` to stop, and it did.

    `what` says by whom and where, and what is kept; `verb` is that of the command line which goes on.
    """

    def __init__(self, what: str, folder: Path, verb: str = "train") -> None:
        super().__init__(f"{what}. Go on with: {resume_command(folder, verb)}")
        self.what = what


class StopNow(BaseException):
    """The second request; no KeyboardInterrupt, for which Lightning ends the program itself."""


class StopSignal:
    """Turns the first Ctrl-C (or SIGTERM) into a request that training honours at the next step."""

    def __init__(self) -> None:
        self.name: str | None = None

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            raise StopNow
        self.name = signal.Signals(number).name

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Listens while the block runs."""
        before = [signal.getsignal(number) for number in SIGNALS]
        self.listen()
        try:
            yield self
        finally:
            if _in_main_thread():
                for number, handler in zip(SIGNALS, before, strict=True):
                    signal.signal(number, handler)

    def listen(self) -> None:
        """Takes the signals; does nothing in a thread, which gets none."""
        if _in_main_thread():
            for number in SIGNALS:
                signal.signal(number, self._request)


def leave_signals_to_training(worker: int) -> None:
    """Makes a process that loads images deaf to the signals of its group; it ends when training ends it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class WorkerDied(InputError):
    """A process that loads images ended before its work."""


@contextmanager
def explained_workers(folder: Path) -> Iterator[None]:
    """Says what the end of a process that loads images means for the run in `folder`.

    Raises WorkerDied in place of what the loader raises.
    """
    try:
        yield
    except RuntimeError as error:
        # the loader has no type of its own for this
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        raise WorkerDied(
            f"a process that loads images ended before its work ({str(error).strip().splitlines()[0]}), as the system "
            "ends processes where memory runs out. The checkpoint written before is whole; free some memory and go on "
            f"with: {resume_command(folder)}"
        ) from error


def resume_command(folder: Path, verb: str = "train") -> str:
    """What to type to go on with a run."""
    return f"sansmax {verb} --resume --output {shlex.quote(str(folder))}"


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
