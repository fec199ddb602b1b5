"""Stopping in good order: the first Ctrl-C is a request, the second one ends the program."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(Exception):
    """The user or the system asked the run to stop, and it did, with everything on disk."""


class StopSignal:
    """Turns the first Ctrl-C (or SIGTERM) into a request that training honours at the next step."""

    def __init__(self) -> None:
        self.name: str | None = None

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    @contextmanager
    def listening(self) -> Iterator["StopSignal"]:
        """Listens while the block runs; only the main thread gets signals."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._request) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)
