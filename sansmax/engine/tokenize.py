"""From slides to bags of features: a folder that completes itself, whatever stops it.

OUTPUT/features/NAME.h5       the features of one slide, with coordinates and units
OUTPUT/tissue/NAME.geojson    its tissue; edit it in QuPath, and the slide is made again
OUTPUT/thumbnails/NAME.jpg    a picture of it with the tissue outlined
OUTPUT/slides/NAME.json       how it ended, and what its features depend on
OUTPUT/failed.csv, run.json, summary.md    the report over all slides
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sansmax.engine.encoders import Encoder, load_encoder
from sansmax.engine.progress import Bar, Reporter
from sansmax.engine.stopping import StopNow, Stopped, StopSignal
from sansmax.engine.tokenize_jobs import list_jobs, shard_of
from sansmax.engine.tokenize_records import FOLDER, Record
from sansmax.engine.tokenize_report import counted, write_report
from sansmax.engine.tokenize_settings import Plan
from sansmax.engine.tokenize_slide import DISK_FULL, SlideJob, is_done, tokenize_slide
from sansmax.errors import InputError, unknown_name

ENGINES = ("local", "ray")
PLACES = (FOLDER, "features", "tissue", "thumbnails")
# a temporary file that nobody has written to for so many seconds is of a process that was killed
ABANDONED = 900


@dataclass(frozen=True)
class Tokenized:
    """What a job came to: the records of its slides that were worked on, and how many had nothing left to do."""

    output: Path
    records: tuple[Record, ...]
    skipped: int
    seconds: float

    @property
    def failed(self) -> tuple[Record, ...]:
        """Slides that could not be done."""
        return tuple(r for r in self.records if r.state == "failed")

    def text(self) -> str:
        """One line for the end of the job."""
        rate = 60 * len(self.records) / max(self.seconds, 1e-9)
        before = f"; {self.skipped} were done before" if self.skipped else ""
        return (
            f"{len(self.records)} slides in {self.seconds:.0f} s ({rate:.1f} a minute): {counted(self.records)}{before}"
        )


class StoppedTokenizing(Stopped):
    """The job was asked to stop, and did; the same command goes on with it."""

    def __init__(self, what: str, command: str) -> None:
        Exception.__init__(self, f"{what}. Go on with: {command or 'the same call'}")
        self.what = what


def tokenize(
    slides: Sequence[str | Path],
    plan: Plan,
    *,
    table: str | Path | None = None,
    mpp: float | None = None,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    engine: str = "local",
    concurrency: int | None = None,
    command: str = "",
    reporter: Reporter | None = None,
) -> Tokenized:
    """Makes the features of slides, as `plan` says, in the folder `plan.output`; what is there already stays.

    `slides` are files and folders; `table` is a CSV file of slides (`list_jobs`); `mpp` is the resolution of level 0
    in micrometres per pixel where the slides do not say it. `shard` is (i, n): the i-th of n processes that share the
    folder. `overwrite` makes anew what was made with other settings. `engine` "ray" spreads the slides over a Ray
    cluster, `concurrency` of them at a time.

    Raises InputError for wrong input and for features of other settings without `overwrite`, and `Stopped` at Ctrl-C
    or SIGTERM. A slide that fails does not end the work: it is in `failed`.
    """
    reporter = reporter or Reporter(quiet=True)
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    plan = replace(plan, output=plan.output.absolute(), tissue=plan.tissue and plan.tissue.absolute())
    _check_output(plan.output)
    jobs = list_jobs(slides, table, mpp)
    whole = len(jobs)
    jobs = jobs if shard is None else shard_of(jobs, shard)
    encoder = _encoder(plan, engine, reporter)
    todo = _to_do(jobs, plan, encoder, overwrite)
    part = "" if shard is None else f" of shard {shard[0]}/{shard[1]} ({whole} in all)"
    reporter.say(f"{len(jobs)} slides{part}, {len(jobs) - len(todo)} of them done; output in {plan.output}")
    started = time.monotonic()
    with _explained_end(plan, command):
        _make_folders(plan, todo)
        stop = StopSignal()
        with stop.listening(), reporter.bar("tokenizing") as bar:
            progress = _Progress(bar, stop, len(todo), command)
            try:
                for record in _records(todo, plan, encoder, engine, concurrency, progress):
                    progress.add(record)
            finally:
                write_report(plan, encoder, command)
    return Tokenized(plan.output, tuple(progress.done), len(jobs) - len(todo), time.monotonic() - started)


def _encoder(plan: Plan, engine: str, reporter: Reporter) -> Encoder | None:
    if plan.encoder is None:
        return None
    # the driver of a cluster may have no GPU
    spec = replace(plan.encoder, device="cpu") if engine == "ray" else plan.encoder
    encoder = load_encoder(spec, reporter.say)
    reporter.say(f"{spec.name}: {encoder.width} features a tile, on {encoder.device}, {spec.precision}")
    return encoder


def _records(
    todo: list[SlideJob],
    plan: Plan,
    encoder: Encoder | None,
    engine: str,
    concurrency: int | None,
    progress: "_Progress",
) -> Iterator[Record]:
    """The slides, done one after the other or by a cluster."""
    if engine == "ray":
        from sansmax.engine.tokenize_ray import tokenize_by_ray

        yield from tokenize_by_ray(todo, plan, encoder, concurrency)
    else:
        for job in todo:
            yield tokenize_slide(job, plan, encoder, progress.step)


def _to_do(jobs: list[SlideJob], plan: Plan, encoder: Encoder | None, overwrite: bool) -> list[SlideJob]:
    todo, other = [], []
    for job in jobs:
        done, changed = is_done(job, plan, encoder)
        if not done:
            todo.append(job)
        if changed:
            other.append((job.slide_id, changed))
    if other and not overwrite:
        first, changed = other[0]
        raise InputError(
            f"{len(other)} slides in {plan.output} have features of other settings, such as {first}:\n  "
            + "\n  ".join(changed)
            + "\ngive the settings they were made with, another --output, or --overwrite to replace them"
        )
    return todo


class _Progress:
    """Counts slides and tiles, shows them, and stops between two batches when asked to."""

    def __init__(self, bar: Bar, stop: StopSignal, total: int, command: str) -> None:
        self.bar, self.stop, self.total, self.command = bar, stop, total, command
        self.done: list[Record] = []
        self.tiles, self.started = 0, time.monotonic()

    def check(self) -> None:
        """Raises `Stopped` if somebody asked for it, and something is left to be done."""
        if self.stop.name is not None and len(self.done) < self.total:
            raise StoppedTokenizing(
                f"stopped by {self.stop.name} after {len(self.done)} of {self.total} slides; they are kept",
                self.command,
            )

    def step(self, done: int, total: int) -> None:
        """`done` of the `total` tiles of the slide in work are encoded."""
        self._show(done, done / total)
        self.check()

    def add(self, record: Record) -> None:
        """A slide is finished."""
        self.done.append(record)
        self.tiles += record.tiles
        remarks = [f"failed: {record.reason}"] if record.state == "failed" else []
        remarks += ["no tissue, an empty bag"] if record.state == "empty" else []
        for remark in [*remarks, *record.warnings]:
            self.bar.say(f"{record.slide_id}: {remark}")
        self._show(0, 0.0)
        self.check()

    def _show(self, tiles: int, part: float) -> None:
        seconds = max(time.monotonic() - self.started, 1e-9)
        slides = len(self.done) + part
        text = (
            f"{len(self.done)}/{self.total} slides  {(self.tiles + tiles) / seconds:.0f} tiles/s  "
            f"{60 * slides / seconds:.1f} slides/min"
        )
        self.bar.update(slides, self.total, text)


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / FOLDER).is_dir():
        raise InputError(
            f"{output} is not empty and holds no tokenized slides; give an empty or new folder to --output"
        )


def _make_folders(plan: Plan, todo: Sequence[SlideJob]) -> None:
    try:
        for name in PLACES:
            (plan.output / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder {plan.output} cannot be made: {error.strerror}") from None
    _sweep(plan.output, {job.slide_id for job in todo})


def _sweep(output: Path, names: set[str]) -> None:
    """Removes what processes that were killed left half written of these slides."""
    for place in PLACES:
        for path in (output / place).rglob(".*.????????.*"):
            try:
                if path.name[1:].rsplit(".", 2)[0] in names and time.time() - path.stat().st_mtime > ABANDONED:
                    path.unlink()
            except FileNotFoundError:
                continue


@contextmanager
def _explained_end(plan: Plan, command: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, StopNow):
        raise StoppedTokenizing("stopped at once; the slides that were finished are kept", command) from None
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise InputError(
            f"the disk is full: {plan.output} could not be written ({error.strerror}). What is finished is whole; free "
            f"some space and go on with: {command or 'the same call'}"
        ) from error
