"""What a person sees while something long runs: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sansmax.report.curves import duration


class Step(Protocol):
    """Called as work goes on."""

    def __call__(self, done: int, total: int) -> None:
        """`done` of `total` units are finished."""
        ...


class Reporter:
    """Bars and lines on one console.

    `quiet` prints nothing. Away from a terminal a bar is replaced by a line every `seconds` and one at its end.
    """

    def __init__(self, *, quiet: bool = False, seconds: float = 30.0, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr, quiet=quiet, highlight=False)
        self.quiet, self.seconds = quiet, seconds

    def say(self, text: str, style: str = "") -> None:
        """One line; square brackets are printed as they are."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str) -> Iterator["Bar"]:
        """A bar for one piece of work."""
        live = self.console.is_terminal and not self.quiet
        bar = _LiveBar(self.console, title) if live else _LineBar(self, title)
        try:
            yield bar
        finally:
            bar.close()


class Bar:
    """Progress of one piece of work; `text` holds figures such as the loss."""

    def update(self, done: float, total: float, text: str = "") -> None:
        """`done` of `total` units are finished."""
        raise NotImplementedError

    def say(self, text: str) -> None:
        """A line above the bar."""
        raise NotImplementedError

    def close(self) -> None:
        """Takes the bar away."""

    def __call__(self, done: int, total: int) -> None:
        """As a plain callback."""
        self.update(done, total)


class _LiveBar(Bar):
    def __init__(self, console: Console, title: str) -> None:
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[text]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            # steps come in bursts around a validation: the mean of five minutes is steadier than that of 30 s
            speed_estimate_period=300.0,
            console=console,
            transient=True,
        )
        self.task = self.progress.add_task(title, total=None, text="")
        self.progress.start()

    def update(self, done: float, total: float, text: str = "") -> None:
        self.progress.update(self.task, completed=done, total=total, text=text)

    def say(self, text: str) -> None:
        self.progress.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self.progress.stop()


class _LineBar(Bar):
    # when work began here, and what was done by then
    first: tuple[float, float] | None = None

    def __init__(self, reporter: Reporter, title: str) -> None:
        self.reporter, self.title = reporter, title
        self.printed = time.monotonic()

    def update(self, done: float, total: float, text: str = "") -> None:
        now = time.monotonic()
        if self.first is None:
            # work that is taken up begins far from zero: what was done before tells nothing of the speed
            self.first = now, done
        if now - self.printed < self.reporter.seconds or done <= 0:
            return
        self.printed = now
        self.reporter.say(
            "  ".join(part for part in (self._share(done, total), text, self._left(now, done, total)) if part)
        )

    def _share(self, done: float, total: float) -> str:
        return f"{self.title}: {100 * done / total:.0f} %"

    def _left(self, now: float, done: float, total: float) -> str:
        assert self.first is not None
        started, before = self.first
        if done <= before:
            return ""
        seconds = (now - started) / (done - before) * (total - done)
        return f"left {seconds:.0f} s" if seconds < 60 else f"left {duration(seconds)}"

    def say(self, text: str) -> None:
        self.reporter.say(text)
