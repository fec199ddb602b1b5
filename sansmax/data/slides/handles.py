"""Open slides, a bounded number of them, each process with its own."""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, Self

from sansmax.data.slides.opening import open_slide
from sansmax.data.slides.slide import Slide


class SlideHandles:
    """Opens slides when they are asked for and keeps those used last, `max_open` at most.

    Handles are never shared between processes: after a fork, and after being sent to a worker, each process opens its
    own. A slide that `get` gave may be closed by a later `get` of another one; ask again instead of keeping it.
    """

    def __init__(self, max_open: int = 8):
        assert max_open > 0
        self.max_open = max_open
        self._start()

    def get(self, path: str | Path, *, mpp: float | None = None, frame: int | None = None) -> Slide:
        """The slide, opened in this process."""
        if self._process != os.getpid():
            # the parent's handles share file positions with ours: forgotten here, they stay open there
            self._start()
        key = (str(path), mpp, frame)
        with self._lock:
            slide = self._open.pop(key, None)
            if slide is None:
                slide = open_slide(path, mpp=mpp, frame=frame)
            self._open[key] = slide
            while len(self._open) > self.max_open:
                self._open.popitem(last=False)[1].close()
            return slide

    def close(self) -> None:
        """Closes all that this process has open; they are opened again when asked for."""
        if self._process == os.getpid():
            with self._lock:
                while self._open:
                    self._open.popitem()[1].close()

    def __len__(self) -> int:
        return len(self._open) if self._process == os.getpid() else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"max_open": self.max_open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.max_open = state["max_open"]
        self._start()

    def _start(self) -> None:
        self._process, self._lock = os.getpid(), threading.Lock()
        self._open: OrderedDict[tuple, Slide] = OrderedDict()
