"""Training: from a configuration to a run folder with weights, metrics and a report."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sansmax.data.loading import Augment, ImageLoader, Preprocess, make_loader
from sansmax.data.open import open_data
from sansmax.data.sampling import WHOLE, Share
from sansmax.data.sets import LabelledImages
from sansmax.engine.build import build_preprocess, num_parameters
from sansmax.engine.config import DataConfig, TrainConfig, differences
from sansmax.engine.distill import Teacher, load_teacher
from sansmax.engine.launch import spread
from sansmax.engine.locking import sole_writer
from sansmax.engine.place import check_shared_out
from sansmax.engine.processes import Processes
from sansmax.engine.progress import Reporter
from sansmax.engine.run import Run, check_folder, explained_disk, prepare_folder, write_json, write_start
from sansmax.engine.starting import at_hand, start_model, write_report
from sansmax.engine.stopping import StopNow, Stopped, StopSignal, explained_workers, leave_signals_to_training
from sansmax.engine.trackers import check_trackers
from sansmax.errors import InputError
from sansmax.files import write_text
from sansmax.report.tables import as_csv


def train(
    config: TrainConfig | None,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    command: str = "",
    reporter: Reporter | None = None,
) -> Run:
    """Trains a network as `config` says and leaves everything in the folder `output`; see `sansmax.engine.run`.

    With `resume` a run that was stopped goes on where it was: the result is that of a run that never stopped. The
    configuration is then the run's own; `config` may be None and must not differ from it. `overwrite` replaces a run.

    Under torchrun or SLURM all processes call this and train together (`sansmax.engine.processes`); with
    `parallel.devices` they are started here.

    Raises InputError for wrong input, and `Stopped` when asked to stop by Ctrl-C or SIGTERM (everything is saved).
    """
    output, reporter = Path(output), reporter or Reporter(quiet=True)
    if config is None and not resume:
        raise InputError("a new run needs a configuration; give DATA, or --resume to go on with a run")
    how: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "command": command}
    config = Run.open(output).config if config is None else config
    return spread("images", config, output, reporter, _train, **how) or Run.open(output)


def _train(
    config: TrainConfig,
    output: Path,
    processes: Processes,
    reporter: Reporter,
    *,
    overwrite: bool,
    resume: bool,
    command: str,
) -> Run:
    """`train`, as each of the processes does it; the first one alone writes."""
    processes.first(lambda: check_folder(output, overwrite=overwrite, resume=resume))
    if resume:
        config = _same_config(output, config)
        if (run := Run.open(output)).info["state"] == "finished":
            reporter.say(f"{output} is finished, there is nothing to go on with")
            return run
    start = at_hand(config.model, output, resume)
    check_buildable(config.model_copy(update={"model": start}))
    # one process fetches what is not here yet
    data = processes.in_turn(lambda: open_training_data(config.data, config.seed, reporter))
    assert data.train is not None and data.val is not None
    in_chans = config.data.in_chans or (3 if data.colour else 1)
    torch.manual_seed(config.seed)
    started: list[str] = []
    network = start_model(start, config.data, len(data.classes), in_chans, started.append)
    preprocess = build_preprocess(network, config.data, in_chans)
    teacher = load_teacher(config.distill, data.classes, preprocess)
    with explained_disk(output), explained_workers(output), sole_writer(output, processes):
        processes.check_same(f"the images of {config.data.source}", _splits(data))
        if resume:
            _same_splits(output, data)
        else:
            processes.first(lambda: _write_new(output, config, data, preprocess, command, overwrite, started))
        for line in started:
            reporter.say(line)
        parameters = num_parameters(network)
        reporter.say(
            f"{config.model.name}: {parameters:,} parameters; {len(data.train):,} training images; run in {output}"
        )
        try:
            _fit(config, output, network, teacher, data, preprocess, resume, reporter, processes)
            return processes.first(lambda: finish_run(output, data, reporter)) or Run.open(output)
        except (KeyboardInterrupt, StopNow):
            raise Stopped("stopped at once; what was written before is kept", output) from None


def check_buildable(config: TrainConfig) -> None:
    """Raises InputError for whatever is wrong with network, optimiser and device, before an image is read."""
    check_trackers(config.track)
    check_shared_out(config.parallel.strategy, config.precision, config.parallel.sequence_parallel)
    if (
        config.device not in ("auto", "cpu")
        and not {"cuda": torch.cuda, "mps": torch.backends.mps}[config.device].is_available()
    ):
        raise InputError(f"device is {config.device} and there is none here; leave it at auto, or give device=cpu")
    in_chans = config.data.in_chans or 3
    network = start_model(config.model.model_copy(update={"pretrained": False}), config.data, 2, in_chans)
    build_preprocess(network, config.data, in_chans)
    if config.parallel.sequence_parallel > 1:
        from sansmax.engine.parallel import check_trains_shared

        check_trains_shared(network)
    augmentation(config)
    from sansmax.engine.module import Classifier

    weights = torch.ones(2) if config.optim.class_weights else None
    Classifier(network, config.optim, 2, config.epochs, 1, config.seed, weights).configure_optimizers()


def open_training_data(data: DataConfig, seed: int, reporter: Reporter) -> LabelledImages:
    """The splits of a training run; val is always there, test where the source allows one."""
    with reporter.bar("reading images") as bar:
        opened = open_data(
            data.source,
            path_column=data.path_column,
            label_column=data.label_column,
            split_column=data.split_column,
            group_column=data.group_column,
            val_fraction=data.val_fraction,
            test_fraction=data.test_fraction,
            seed=seed,
            root=data.root,
            check=data.check,
            skip_bad=data.skip_bad,
            progress=bar,
        )
    reporter.say(opened.describe())
    if opened.train is None or opened.val is None:
        raise InputError(f"{data.source} has no images to {'train on' if opened.train is None else 'validate with'}")
    return opened


def _same_config(output: Path, config: TrainConfig | None) -> TrainConfig:
    stored = Run.open(output).config
    if config is not None and (changed := differences(stored, config)):
        raise InputError(
            "a resumed run keeps its configuration, and this one differs:\n  " + "\n  ".join(changed) + "\n"
            "leave the changes out, or start a new run in another --output"
        )
    return stored


def _splits(data: LabelledImages) -> bytes:
    """splits.csv, as it would be written."""
    with tempfile.TemporaryDirectory() as folder:
        data.write_splits(Path(folder) / "splits.csv")
        return (Path(folder) / "splits.csv").read_bytes()


def _same_splits(output: Path, data: LabelledImages) -> None:
    if _splits(data) != (output / "splits.csv").read_bytes():
        raise InputError(
            f"the images of {data.source} are not those the run {output} began with (see its splits.csv); "
            "put them back, or start a new run in another --output"
        )


def _write_new(
    output: Path,
    config: TrainConfig,
    data: LabelledImages,
    preprocess: Preprocess,
    command: str,
    overwrite: bool,
    started: list[str],
) -> None:
    prepare_folder(output, overwrite=overwrite, resume=False)
    try:
        data.write_splits(output / "splits.csv")
        if data.bad:
            write_text(output / "bad_images.csv", as_csv([["name", "reason"], *map(list, data.bad)]))
        write_text(output / "data.txt", data.describe() + "\n")
        write_start(output, config, data.classes, preprocess, command)
        write_report(output, started)
    except OSError:
        # half a start would be neither a run nor an empty folder
        shutil.rmtree(output)
        raise


def loaders(
    config: TrainConfig, data: LabelledImages, preprocess: Preprocess, share: Share = WHOLE
) -> tuple[ImageLoader, ImageLoader]:
    """The loaders of training and validation images, for a share of each batch."""
    assert data.train is not None and data.val is not None
    augment = augmentation(config)
    common: dict[str, Any] = {"batch_size": config.batch_size, "workers": config.data.workers, "share": share}
    # what is mixed with each other is in one process
    pairs = bool(config.optim.mixup or config.optim.cutmix)
    how: dict[str, Any] = {"seed": config.seed, "shuffle": True, "balanced": config.balanced, "pairs": pairs}
    first = make_loader(data.train, preprocess, augment, **how, **common)
    second = make_loader(data.val, preprocess, **common)
    for loader in (first, second):
        loader.worker_init_fn = leave_signals_to_training
    return first, second


def augmentation(config: TrainConfig) -> Augment:
    """The random changes of training images."""
    return Augment(**config.augment.model_dump())


def class_weights(labels: np.ndarray, num_classes: int) -> Tensor:
    """Loss weights by inverse frequency, of mean 1 over the images."""
    counts = np.bincount(labels, minlength=num_classes)
    return torch.tensor(len(labels) / (num_classes * np.maximum(counts, 1)), dtype=torch.float32)


def _fit(
    config: TrainConfig,
    output: Path,
    network: torch.nn.Module,
    teacher: Teacher | None,
    data: LabelledImages,
    preprocess: Preprocess,
    resume: bool,
    reporter: Reporter,
    processes: Processes,
) -> None:
    from sansmax.engine.callbacks import Recorder
    from sansmax.engine.checkpoints import take_up
    from sansmax.engine.module import Classifier
    from sansmax.engine.trainer import run_lightning

    assert data.train is not None
    train_loader, val_loader = loaders(config, data, preprocess, processes.share)
    steps = len(train_loader)
    weights = class_weights(data.train.labels, len(data.classes)) if config.optim.class_weights else None
    module = Classifier(network, config.optim, len(data.classes), config.epochs, steps, config.seed, weights, teacher)
    checkpoint = processes.in_turn(lambda: take_up(output, train_loader, reporter.say)) if resume else None
    if checkpoint is not None and checkpoint.finished:
        return
    stop = StopSignal()
    with stop.listening(), reporter.bar("training") as bar:
        recorder = Recorder(output, config, stop, bar, steps)
        try:
            run_lightning(config, module, recorder, train_loader, val_loader, checkpoint, processes)
        finally:
            for loader in (train_loader, val_loader):
                _end_workers(loader)


def _end_workers(loader: ImageLoader) -> None:
    """Ends the processes of a loader; at the end of the program they would be waited for in vain."""
    iterator: Any = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


def finish_run(output: Path, data: LabelledImages, reporter: Reporter) -> Run:
    """Evaluates the best weights on validation and test images and writes the report."""
    from sansmax.engine.report_run import report_run

    run = Run.open(output)
    report_run(run, data, reporter)
    write_json(output / "run.json", {**run.info, "state": "finished"})
    return Run.open(output)
