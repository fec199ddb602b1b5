"""The benchmark: time and memory of attention layers and encoders, contestants side by side.

Seconds are comparable within a group, which is one case at one size: its contestants take turns in one process. Memory
is measured in a process of its own for each of them. Whatever stops a contestant is a row with the reason.
"""

import math
import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sansmax.engine.cases import PRODUCTS, SUITES, Case, Setup
from sansmax.engine.memory import free_mib
from sansmax.engine.peers import INSTALL, PEERS, missing, version_of
from sansmax.engine.progress import Reporter
from sansmax.engine.run import environment
from sansmax.engine.timing import OUT_OF_MEMORY
from sansmax.engine.workers import Workers
from sansmax.errors import InputError
from sansmax.report.benchmark import write_benchmark
from sansmax.report.scaling import time_text
from sansmax.report.tables import write_rows

COLUMNS = (
    *("case", "contestant", "tokens", "batch", "dim", "heads", "depth", "direction", "dtype", "threads", "device"),
    *("seconds", "seconds_min", "repeats", "peak_mib", "reason"),
)
# a process that gives no sign of life for so long beyond the budget is stopped
GRACE = 30.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """How much a contestant may take: seconds of one pass, memory of one pass, and samples of its time."""

    budget: float = 10.0
    memory_mib: float = 0.0
    repeats: int = 7

    @classmethod
    def of(
        cls, suite: str, *, quick: bool, budget: float | None, memory_mib: float = 0.0, repeats: int | None
    ) -> "Limits":
        """What is given, and for the rest what suits the suite: near ratios need many samples."""
        usual = {"orders": (2.0, 15), "targets": (120.0, 5)}.get(suite, (10.0, 7))
        usual = (1.0, 3) if quick else usual
        return cls(usual[0] if budget is None else budget, memory_mib, usual[1] if repeats is None else repeats)

    def __post_init__(self) -> None:
        for name, value in (("budget", self.budget), ("repeats", self.repeats)):
            if not value > 0:
                raise InputError(f"{name} must be above 0, got {value}")
        if self.memory_mib < 0:
            raise InputError(f"memory must be above 0 MiB, or 0 for half of what is free, got {self.memory_mib}")


@dataclass
class Past:
    """What smaller sizes of the same case took, and how it goes on."""

    points: dict[tuple[Any, ...], list[tuple[int, float]]] = field(default_factory=dict)

    def add(self, key: tuple[Any, ...], tokens: int, value: float) -> None:
        """Counts a size that was measured."""
        self.points.setdefault(key, []).append((tokens, value))

    def expected(self, key: tuple[Any, ...], tokens: int) -> float:
        """What this size will take, about, by how it grew between the last two; with fewer, what it took so far or 0.

        Growth is between the root of the size and its square: small sizes have costs that do not grow.
        """
        points = sorted(p for p in self.points.get(key, []) if p[0] < tokens)
        if len(points) < 2:
            return points[-1][1] if points else 0.0
        (m, before), (n, last) = points[-2:]
        power = math.log(last / before) / math.log(n / m) if last > 0 and before > 0 and n > m else 1.0
        return last * (tokens / n) ** min(max(power, 0.5), 2.0)


def measure(
    cases: Sequence[Case],
    limits: Limits,
    *,
    reporter: Reporter | None = None,
    done: Callable[[list[Row]], None] | None = None,
) -> tuple[list[Row], bool]:
    """A row for each contestant of each case, and whether all were measured; Ctrl-C ends it with what is there.

    `done` is called with all rows so far after each group.
    """
    reporter = reporter or Reporter(quiet=True)
    if not limits.memory_mib:
        limits = Limits(limits.budget, _half_of_the_memory(cases), limits.repeats)
    rows: list[Row] = []
    with Workers() as workers, reporter.bar("measuring") as bar:
        run = _Run(workers, limits)
        try:
            for i, case in enumerate(cases, start=1):
                bar.update(i - 1, len(cases), f"{case.name}, {case.tokens:,} tokens, {case.direction}, {case.dtype}")
                rows += run.group(case)
                if done is not None:
                    done(rows)
        except KeyboardInterrupt:
            return rows, False
    return rows, True


def _half_of_the_memory(cases: Sequence[Case]) -> float:
    if any(case.device == "cuda" for case in cases):
        return torch.cuda.get_device_properties(0).total_memory / 2**21
    return free_mib() / 2


class _Run:
    """One measurement of many groups, which learns from the smaller sizes."""

    def __init__(self, workers: Workers, limits: Limits) -> None:
        self.workers, self.limits = workers, limits
        self.seconds, self.memory = Past(), Past()
        self.peaks: dict[tuple[Any, ...], float | None] = {}
        # why a contestant cannot run at all, whatever the size
        self.refused: dict[tuple[Any, ...], str] = {}
        # from which size on it fails, and how
        self.too_large: dict[tuple[Any, ...], tuple[int, str]] = {}

    def group(self, case: Case) -> list[Row]:
        """The rows of one case: memory one by one, then times side by side."""
        rows = {name: self._blank(case, name) for name in case.contestants}
        for name, row in rows.items():
            row["reason"] = self._foreseen(case, name)
            if row["reason"] is None:
                self._memory(case, name, row)
        while waiting := [n for n, row in rows.items() if row["reason"] is None and row["seconds"] is None]:
            self._times(case, waiting, rows)
        for name, row in rows.items():
            if row["seconds"] is not None:
                self.seconds.add(self._key(case, name), case.tokens, row["seconds"])
        return list(rows.values())

    def _blank(self, case: Case, name: str) -> Row:
        return {**dict.fromkeys(COLUMNS), **case.facts(), "contestant": name}

    @staticmethod
    def _key(case: Case, name: str, timed: bool = True) -> tuple[Any, ...]:
        how = (case.name, case.dim, case.heads, case.depth, case.batch, case.direction, case.dtype, case.device, name)
        return (*how, case.threads) if timed else how

    def _foreseen(self, case: Case, name: str) -> str | None:
        if name in PEERS and (package := missing(name)):
            return f"{package} is not installed: {INSTALL}"
        if reason := self.refused.get(self._key(case, name)):
            return reason
        failed, reason = self.too_large.get(self._key(case, name), (math.inf, ""))
        if case.tokens > failed:
            return reason
        seconds = self.seconds.expected(self._key(case, name), case.tokens)
        if seconds > self.limits.budget:
            return f"would take about {duration(seconds)}"
        mib = self.memory.expected(self._key(case, name, False), case.tokens)
        if mib > self.limits.memory_mib:
            return f"would need about {size(mib)}"
        return None

    def _memory(self, case: Case, name: str, row: Row) -> None:
        key = (*self._key(case, name, False), case.tokens)
        if name == PRODUCTS or key in self.peaks:
            # products write into memory that is given; threads do not change what a pass holds
            row["peak_mib"] = self.peaks.get(key)
            return
        for answer in self._asked("memory", case, name=name, memory_mib=self.limits.memory_mib):
            if "ended" in answer:
                self._ended(answer, [row], case)
            elif "reason" in answer:
                self._refuse(case, row, answer["reason"])
            elif "peak_mib" in answer:
                row["peak_mib"] = self.peaks[key] = answer["peak_mib"] if answer["peak_mib"] >= 1 else None
                self.memory.add(self._key(case, name, False), case.tokens, answer["peak_mib"])
                if answer["seconds"] > self.limits.budget:
                    row["reason"] = f"takes about {duration(answer['seconds'])}"
                    self.seconds.add(self._key(case, name), case.tokens, answer["seconds"])

    def _times(self, case: Case, names: list[str], rows: dict[str, Row]) -> None:
        at = names[0]
        limits = {"budget": self.limits.budget, "repeats": self.limits.repeats}
        for answer in self._asked("times", case, names=names, **limits):
            at = answer.get("begin", at)
            if "ended" in answer:
                self._ended(answer, [rows[at]], case)
            elif "reason" in answer:
                self._refuse(case, rows[answer["name"]], answer["reason"])
            for name, samples in answer.get("samples", {}).items():
                rows[name].update(seconds=statistics.median(samples), seconds_min=min(samples), repeats=len(samples))

    def _asked(self, what: str, case: Case, **more: Any) -> Iterator[Row]:
        limit = 2 * self.limits.budget + GRACE
        return self.workers.request(limit, what=what, case=vars(case), **more)

    def _refuse(self, case: Case, row: Row, reason: str) -> None:
        row["reason"] = reason
        if reason == OUT_OF_MEMORY:
            row["reason"] = f"needs more than {size(self.limits.memory_mib)}"
            self._give_up(case, row)
        else:
            self.refused[self._key(case, row["contestant"])] = reason

    def _ended(self, answer: Row, rows: list[Row], case: Case) -> None:
        if answer["ended"] == 0:
            return
        for row in rows:
            if answer["ended"] is None:
                row["reason"] = f"stopped after {duration(2 * self.limits.budget + GRACE)}"
            else:
                name = signal.Signals(-answer["ended"]).name
                row["reason"] = f"ended by the system ({name}), probably for want of memory"
            self._give_up(case, row)

    def _give_up(self, case: Case, row: Row) -> None:
        """What failed for its size is not tried at larger ones."""
        self.too_large[self._key(case, row["contestant"])] = (case.tokens, f"{row['reason']} at {case.tokens:,} tokens")


def duration(seconds: float) -> str:
    """A time with its unit and two digits, hours and minutes where it is long."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 9.5 else time_text(float(f"{seconds:.2g}"))
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def size(mib: float) -> str:
    """Memory with its unit."""
    return f"{mib / 1024:.3g} GiB" if mib >= 1024 else f"{mib:.3g} MiB"


@dataclass(frozen=True)
class Result:
    """What was measured and written."""

    suite: str
    rows: list[Row]
    files: list[Path]
    complete: bool


def benchmark(
    suite: str,
    folder: Path,
    cases: Sequence[Case],
    limits: Limits,
    *,
    again: str,
    note: str = "",
    reporter: Reporter | None = None,
) -> Result:
    """Measures the cases and writes table, page and pictures into `folder`, named after the suite.

    The table is written after each group. Ctrl-C ends the measurement; what is there is written.
    """
    table = folder / f"{suite}.csv"

    def keep(rows: list[Row]) -> None:
        write_rows(table, COLUMNS, rows)

    rows, complete = measure(cases, limits, reporter=reporter, done=keep)
    if not complete:
        note = f"Stopped before the end: {len(rows)} rows. {note}".strip()
    files = write_benchmark(folder, suite, f"Benchmark: {SUITES[suite]}", COLUMNS, rows, again, note) if rows else []
    return Result(suite, rows, files, complete)


def versions(setup: Setup) -> dict[str, Any]:
    """Versions and machine, those of the peers included."""
    found = {**environment(), **{PEERS[name].package: version_of(name) for name in PEERS}}
    return {**found, "threads": ", ".join(map(str, setup.threads))}
