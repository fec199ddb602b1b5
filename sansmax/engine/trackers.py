"""TensorBoard, W&B and MLflow, by Lightning's loggers: each gets the lines of metrics.jsonl, every line once.

`track.json` holds the name under which a run is known to each of them and how far it was sent. A run that is taken up
goes on under the same name, and what was not sent is sent then. A tracker that fails while training goes on is given
up with a warning.
"""

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sansmax.engine.config import TrackConfig
from sansmax.engine.run import read_json, write_json
from sansmax.errors import InputError
from sansmax.optional import need

EXTRA = "track"
KEPT = "track.json"
TITLES = {"tensorboard": "TensorBoard", "wandb": "W&B", "mlflow": "MLflow"}
# lines of one step in their order
KINDS = ("step", "epoch", "results")
Key = tuple[int, int]


def check_trackers(track: TrackConfig) -> None:
    """Raises InputError where a tracker's package is missing, or W&B does not know who sends."""
    for name in track.loggers:
        module = need(name, EXTRA)
        if name == "wandb" and _wandb_mode(track) == "online" and not _logged_in(module):
            raise InputError(
                "W&B needs to know who you are: run `wandb login` once, or set WANDB_API_KEY, or leave the figures on "
                "this machine with --set track.offline=true"
            )


class Trackers:
    """The trackers of the run in `folder`, none by default; `settings` are shown as its configuration."""

    def __init__(
        self, folder: Path, track: TrackConfig, settings: Mapping[str, Any], warn: Callable[[str], None]
    ) -> None:
        self.folder, self.track, self.settings, self.warn = folder, track, settings, warn
        self.loggers: dict[str, Any] = {}
        self.kept: dict[str, dict[str, Any]] = {}

    def open(self, step: int, lines: Sequence[Mapping[str, Any]] = ()) -> None:
        """Starts the trackers, or goes on with them after `step`, and sends those of `lines` that they do not have."""
        path = self.folder / KEPT
        if self.track.loggers and path.exists():
            self.kept = read_json(path)
        for name in self.track.loggers:
            self._guarded(name, lambda name=name: self._start(name, step))
        for line in lines:
            self.send(line)

    def send(self, line: Mapping[str, Any]) -> None:
        """Sends a line of metrics.jsonl to each tracker that does not have it."""
        key = key_of(line)
        for name in list(self.loggers):
            if key > self._sent(name):
                self._guarded(name, lambda name=name: self._send(name, line, key))

    def results(self, step: int, scores: Mapping[str, float], pictures: Mapping[str, Path]) -> None:
        """Sends the final scores, and pictures by their names."""
        key = (step, KINDS.index("results"))
        for name in list(self.loggers):
            if key > self._sent(name):
                self._guarded(name, lambda name=name: self._results(name, step, scores, pictures, key))

    def close(self, status: str = "success") -> None:
        """Ends the trackers: `status` is "success", "failed", or "stopped" for a run that may go on."""
        for name in list(self.loggers):
            self._guarded(name, lambda name=name: self._close(name, status))
        self.loggers.clear()

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        """What a tracker does; its failure ends it, and not the training."""
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        try:
            with warnings.catch_warnings():
                # advice to who calls these libraries, which is not the user
                warnings.simplefilter("ignore")
                act()
        except Exception as error:
            self.loggers.pop(name, None)
            text = " ".join(str(error).split())[:300]
            self.warn(
                f"warning: {TITLES[name]} is given up ({type(error).__name__}: {text}); training goes on, and the "
                "figures are in metrics.csv and metrics.jsonl"
            )

    def _start(self, name: str, step: int) -> None:
        known = self.kept.get(name)
        if name == "tensorboard" and known is not None:
            # its file forgets what training does again; the others keep it, and are not sent it twice
            known["sent"] = list(min(self._sent(name), (step, KINDS.index("results"))))
        start = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}[name]
        logger, identity = start(self.folder, self.track, known)
        self.loggers[name] = logger
        if known is None:
            self.kept[name] = {"id": identity, "sent": [-1, 0]}
            if name != "tensorboard":
                logger.log_hyperparams(dict(self.settings))
            self._keep()

    def _send(self, name: str, line: Mapping[str, Any], key: Key) -> None:
        prefix = "step/" if line["kind"] == "step" else ""
        left_out = ("kind", "step")
        figures = {prefix + k: float(v) for k, v in line.items() if k not in left_out and _is_number(v)}
        self.loggers[name].log_metrics(figures, step=key[0])
        if name == "tensorboard":
            self.loggers[name].experiment.flush()
        self._mark(name, key)

    def _results(
        self, name: str, step: int, scores: Mapping[str, float], pictures: Mapping[str, Path], key: Key
    ) -> None:
        logger = self.loggers[name]
        finite = {k: float(v) for k, v in scores.items() if _is_number(v)}
        if name == "tensorboard":
            logger.log_hyperparams(dict(self.settings), finite)
        logger.log_metrics(finite, step=step)
        for title, path in pictures.items():
            _picture(name, logger, title, path, step)
        self._mark(name, key)

    def _close(self, name: str, status: str) -> None:
        logger = self.loggers[name]
        if name == "wandb":
            logger.experiment.finish(exit_code=0 if status == "success" else 1)
        elif name == "mlflow":
            logger.finalize({"success": "success", "failed": "failed"}.get(status, "KILLED"))
        else:
            logger.experiment.close()

    def _sent(self, name: str) -> Key:
        step, kind = self.kept[name]["sent"]
        return step, kind

    def _mark(self, name: str, key: Key) -> None:
        self.kept[name]["sent"] = list(key)
        self._keep()

    def _keep(self) -> None:
        write_json(self.folder / KEPT, self.kept)


def key_of(line: Mapping[str, Any]) -> Key:
    """Where a line stands in the run: its step, and the place of its kind among those of the step."""
    return int(line["step"]), KINDS.index(line["kind"])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _title(folder: Path, track: TrackConfig) -> str:
    return track.name or folder.resolve().name


def _tensorboard(folder: Path, track: TrackConfig, known: Mapping[str, Any] | None) -> tuple[Any, str]:
    from lightning.pytorch.loggers import TensorBoardLogger

    # what a viewer has of later steps is void
    purge = {} if known is None else {"purge_step": known["sent"][0] + 1}
    logger = TensorBoardLogger(folder, name="tensorboard", version="", default_hp_metric=False, **purge)
    assert logger.experiment is not None
    return logger, "tensorboard"


def _wandb(folder: Path, track: TrackConfig, known: Mapping[str, Any] | None) -> tuple[Any, str]:
    import secrets

    from lightning.pytorch.loggers import WandbLogger

    identity = secrets.token_hex(8) if known is None else known["id"]
    # its own capture of the terminal would tear our bar
    settings = need("wandb", EXTRA).Settings(silent=True, console="off")
    how: Any = {"mode": _wandb_mode(track), "settings": settings}
    logger = WandbLogger(
        name=_title(folder, track), save_dir=folder, project=track.project, id=identity, resume="allow", **how
    )
    assert logger.experiment is not None
    return logger, identity


def _mlflow(folder: Path, track: TrackConfig, known: Mapping[str, Any] | None) -> tuple[Any, str]:
    # it sets its own levels when it is imported
    need("mlflow", EXTRA)
    from lightning.pytorch.loggers import MLFlowLogger

    for noisy in ("mlflow", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    where: dict[str, Any] = {"tracking_uri": os.environ.get("MLFLOW_TRACKING_URI")}
    if not where["tracking_uri"]:
        # its folders of files are no longer taken by newer versions
        home = folder.resolve()
        where = {
            "tracking_uri": f"sqlite:///{home / 'mlflow.db'}",
            "artifact_location": (home / "mlartifacts").as_uri(),
        }
    logger = MLFlowLogger(
        experiment_name=track.project,
        run_name=_title(folder, track),
        run_id=None if known is None else known["id"],
        **where,
    )
    assert logger.run_id is not None
    if known is not None:
        logger.experiment.set_terminated(logger.run_id, "RUNNING")
    return logger, logger.run_id


def _picture(name: str, logger: Any, title: str, path: Path, step: int) -> None:
    if name == "wandb":
        logger.log_image(title, [str(path)])
    elif name == "mlflow":
        logger.experiment.log_artifact(logger.run_id, str(path))
    else:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            logger.experiment.add_image(title, np.asarray(picture.convert("RGB")), step, dataformats="HWC")


def _wandb_mode(track: TrackConfig) -> str:
    chosen = os.environ.get("WANDB_MODE", "online")
    return "offline" if track.offline or chosen == "dryrun" else chosen


def _logged_in(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False))
    except TypeError:
        # before it could be told not to ask
        return wandb.api.api_key is not None
