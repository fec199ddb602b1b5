"""Who watches a run while it trains: its journal metrics.jsonl, its learning curves, and the trackers.

A line of the journal is `{"kind": "step" | "epoch", "epoch": ..., "step": ..., ...}`. Those of epochs are the rows of
metrics.csv with the largest memory so far; those of steps come every `track.log_steps` steps of the optimiser, and hold
that step's loss, learning rate and norm of the gradient before it is clipped. A run that was stopped and taken up has
every line once, and the same but for what a clock measured.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from sansmax.engine.memory import peak_mib
from sansmax.engine.run import METRICS
from sansmax.engine.trackers import Trackers
from sansmax.report.jsonl import append_line, read_lines, truncate_lines
from sansmax.report.resample import Interval
from sansmax.report.tables import read_rows

JOURNAL = "metrics.jsonl"
# seconds between two drawings of the learning curves; the first comes as late
REDRAW = 30.0


class Watchers:
    """Shows the run in `folder` to those who watch it; of several processes the first one does.

    `say` prints a line; `picture` is the name of the learning curves. What may fail without harm does so with one
    warning; a full disk is an error, as everywhere.
    """

    def __init__(self, folder: Path, config: Any, say: Callable[[str], None], picture: str = "curves.png") -> None:
        self.folder, self.config, self.say, self.picture = folder, config, say, picture
        self.trackers = Trackers(folder, config.track, config.model_dump(mode="json"), say)
        self.lr: float | None = None
        self.norm: float | None = None
        self.last_step = 0
        self.drawn = time.monotonic()
        self.can_draw = True

    def start(self, step: int) -> None:
        """Training begins, or goes on after `step` steps: later lines are dropped, and will be written again."""
        self.drawn, self.last_step = time.monotonic(), step
        if first_process():
            self.trackers.open(step, truncate_lines(self.folder / JOURNAL, step))

    def due(self, step: int) -> bool:
        """Whether a line is written of this step."""
        return step > self.last_step and step % self.config.track.log_steps == 0 and first_process()

    def before_step(self, step: int, module: Any, optimizer: Optimizer) -> None:
        """Looks at learning rate and gradients of the step that is about to be made, if a line will be written of it.

        The norm is of all gradients together; it is left out where a process holds a part of them, and where the module
        has clipped them itself.
        """
        if self.due(step):
            self.lr = max(group["lr"] for group in optimizer.param_groups)
            if module.automatic_optimization and self.config.parallel.strategy != "fsdp":
                grads = [p.grad for p in module.parameters() if p.grad is not None]
                self.norm = float(torch.nn.utils.get_total_norm(grads))

    def step(self, step: int, epoch: int, loss: float) -> None:
        """A batch of the `epoch`, counted from 1, is done, and `step` steps; writes a line where one is due."""
        if self.due(step):
            figures = {"epoch": epoch, "step": step, "loss": loss, "lr": self.lr, "grad_norm": self.norm}
            self._write({"kind": "step", **{k: v for k, v in figures.items() if v is not None}})
            self.lr = self.norm = None
        self.last_step = max(self.last_step, step)

    def row(self, row: Mapping[str, Any]) -> None:
        """An epoch is done: its row of metrics.csv, which is written already."""
        if not first_process():
            return
        self._write({"kind": "epoch", **row, "memory_mib": round(memory_mib())})
        if time.monotonic() - self.drawn >= REDRAW:
            self._draw()

    def close(self, status: str = "success") -> None:
        """Training is over, for now ("stopped") or for good."""
        self.trackers.close(status)

    def _write(self, line: Mapping[str, Any]) -> None:
        append_line(self.folder / JOURNAL, line)
        self.trackers.send(line)

    def _draw(self) -> None:
        from sansmax.report.curves import learning_curves

        if not self.can_draw:
            return
        started = time.monotonic()
        try:
            learning_curves(read_rows(self.folder / METRICS), self.folder / self.picture, monitor=self.config.monitor)
        except Exception as error:
            self.can_draw = False
            self.say(f"warning: the learning curves are not drawn ({error}); training goes on")
        # a picture of many epochs on a slow machine takes no more than a tenth of the time
        self.drawn = time.monotonic() + max(0.0, 10 * (time.monotonic() - started) - REDRAW)


def first_process() -> bool:
    """Whether this process is the one that writes."""
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def memory_mib() -> float:
    """The largest memory so far in MiB: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_mib()


def memory_text() -> str:
    """`memory_mib` in words."""
    mib = memory_mib()
    return f"{mib / 1024:.1f} GiB" if mib >= 1024 else f"{mib:.0f} MiB"


def send_results(
    folder: Path,
    config: Any,
    measured: Mapping[str, Mapping[str, Interval]],
    pictures: Mapping[str, Path],
    say: Callable[[str], None],
) -> None:
    """Sends the final scores of each split to the trackers of a run, as "test/auc", and its pictures."""
    lines = read_lines(folder / JOURNAL)
    if not config.track.loggers or not lines or not first_process():
        return
    scores = {f"{split}/{name}": value.value for split, metrics in measured.items() for name, value in metrics.items()}
    step = int(lines[-1]["step"])
    trackers = Trackers(folder, config.track, config.model_dump(mode="json"), say)
    trackers.open(step, lines)
    trackers.results(step, scores, pictures)
    trackers.close()
