"""Requests to a process that measures: its answers as they come, and how it ended."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any


class Workers:
    """One process that has the libraries loaded and copies itself for each request.

    Ctrl-C does not reach it; it ends with the block.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the block

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self.errors.close()

    def request(self, limit: float, **request: Any) -> Iterator[dict[str, Any]]:
        """The answers to one request, the last one `{"ended": code}`: 0, or minus the signal that ended it.

        An answer that takes longer than `limit` seconds ends it with `{"ended": None}`.

        Raises RuntimeError for a fault of ours in the process that measures.
        """
        process = self._ready()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        while True:
            try:
                line = self.lines.get(timeout=limit)
            except queue.Empty:
                self.kill()
                yield {"ended": None}
                return
            if line is None:
                code = self._gone()
                if code > 0:
                    raise RuntimeError(f"the process that measures ended with status {code}:\n{self._said()}")
                yield {"ended": code}
                return
            answer = json.loads(line)
            if "fault" in answer:
                raise RuntimeError(f"measuring failed:\n{answer['fault']}")
            yield answer
            if "ended" in answer:
                if answer["ended"] > 0:
                    raise RuntimeError(f"the process that measures ended:\n{self._said()}")
                if sys.platform != "linux":
                    # it did the request itself, and is of no more use
                    self.kill()
                return

    def kill(self) -> None:
        """Ends the process and what it copied; the next request starts another."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self._gone()

    def _ready(self) -> "subprocess.Popen[str]":
        if self.process is not None and self.process.poll() is not None:
            self._gone()
        if self.process is None:
            self.lines = queue.Queue()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sansmax.engine.timing"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                text=True,
                start_new_session=True,
            )
            self.reader = threading.Thread(target=_read, args=(self.process, self.lines), daemon=True)
            self.reader.start()
        return self.process

    def _gone(self) -> int:
        assert self.process is not None
        process, self.process = self.process, None
        code = process.wait()
        self.reader.join(timeout=5)
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        return code

    def _said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()[-2000:]


def _read(process: "subprocess.Popen[str]", lines: "queue.Queue[str | None]") -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError, OSError):
        for line in process.stdout:
            lines.put(line)
    lines.put(None)
