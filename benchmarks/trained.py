"""Runs of a benchmark that are trained once: finished ones are taken as they are, stopped ones go on."""

from pathlib import Path

from sansmax.engine.config import TrainConfig, differences
from sansmax.engine.progress import Reporter
from sansmax.engine.run import Run, is_run
from sansmax.engine.train import train
from sansmax.errors import InputError


def trained(config: TrainConfig, folder: Path, command: str, reporter: Reporter) -> Run:
    """The finished run in `folder`: as it is there, taken up where it stopped, or new, with `command` on its page.

    Raises InputError where the run there was trained with another configuration.
    """
    if not is_run(folder):
        return train(config, folder, command=command, reporter=reporter)
    run = Run.open(folder)
    if changed := differences(run.config, config):
        raise InputError(
            f"the run {folder} was trained with another configuration:\n  "
            + "\n  ".join(changed)
            + "\nremove it, or give another folder with --runs"
        )
    return run if run.info["state"] == "finished" else train(None, folder, resume=True, reporter=reporter)
