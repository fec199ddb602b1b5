"""Training: from a configuration to a run folder with weights, metrics and a report."""

import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sansmax.data.loading import Augment, ImageLoader, Preprocess, make_loader
from sansmax.data.open import open_data
from sansmax.data.sets import LabelledImages
from sansmax.engine.build import build_model, build_preprocess, num_parameters
from sansmax.engine.config import DataConfig, TrainConfig, differences
from sansmax.engine.progress import Reporter
from sansmax.engine.run import Run, check_folder, explained_disk, prepare_folder, write_json, write_start
from sansmax.engine.stopping import StopNow, Stopped, StopSignal, leave_signals_to_training
from sansmax.errors import InputError
from sansmax.files import write_text
from sansmax.report.tables import as_csv, truncate_rows


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

    Raises InputError for wrong input, and `Stopped` when asked to stop by Ctrl-C or SIGTERM (everything is saved).
    """
    output, reporter = Path(output), reporter or Reporter(quiet=True)
    check_folder(output, overwrite=overwrite, resume=resume)
    if resume:
        config = _same_config(output, config)
        if (run := Run.open(output)).info["state"] == "finished":
            reporter.say(f"{output} is finished, there is nothing to go on with")
            return run
    elif config is None:
        raise InputError("a new run needs a configuration; give DATA, or --resume to go on with a run")
    check_buildable(config)
    data = open_training_data(config.data, config.seed, reporter)
    assert data.train is not None and data.val is not None
    in_chans = config.data.in_chans or (3 if data.colour else 1)
    torch.manual_seed(config.seed)
    network = build_model(config.model, config.data, len(data.classes), in_chans)
    preprocess = build_preprocess(network, config.data, in_chans)
    with explained_disk(output):
        if resume:
            _same_splits(output, data)
        else:
            prepare_folder(output, overwrite=overwrite, resume=False)
            _write_new(output, config, data, preprocess, command)
        parameters = num_parameters(network)
        reporter.say(
            f"{config.model.name}: {parameters:,} parameters; {len(data.train):,} training images; run in {output}"
        )
        try:
            _fit(config, output, network, data, preprocess, resume, reporter)
            return finish_run(output, data, reporter)
        except (KeyboardInterrupt, StopNow):
            raise Stopped("stopped at once; what was written before is kept", output) from None


def check_buildable(config: TrainConfig) -> None:
    """Raises InputError for whatever is wrong with network, optimiser and device, before an image is read."""
    if (
        config.device not in ("auto", "cpu")
        and not {"cuda": torch.cuda, "mps": torch.backends.mps}[config.device].is_available()
    ):
        raise InputError(f"device is {config.device} and there is none here; leave it at auto, or give device=cpu")
    in_chans = config.data.in_chans or 3
    network = build_model(config.model.model_copy(update={"pretrained": False}), config.data, 2, in_chans)
    build_preprocess(network, config.data, in_chans)
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


def _same_splits(output: Path, data: LabelledImages) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data.write_splits(Path(folder) / "splits.csv")
        now = (Path(folder) / "splits.csv").read_bytes()
    if now != (output / "splits.csv").read_bytes():
        raise InputError(
            f"the images of {data.source} are not those the run {output} began with (see its splits.csv); "
            "put them back, or start a new run in another --output"
        )


def _write_new(output: Path, config: TrainConfig, data: LabelledImages, preprocess: Preprocess, command: str) -> None:
    try:
        data.write_splits(output / "splits.csv")
        if data.bad:
            write_text(output / "bad_images.csv", as_csv([["name", "reason"], *map(list, data.bad)]))
        write_text(output / "data.txt", data.describe() + "\n")
        write_start(output, config, data.classes, preprocess, command)
    except OSError:
        # half a start would be neither a run nor an empty folder
        shutil.rmtree(output)
        raise


def loaders(config: TrainConfig, data: LabelledImages, preprocess: Preprocess) -> tuple[ImageLoader, ImageLoader]:
    """The loaders of training and validation images."""
    assert data.train is not None and data.val is not None
    augment = augmentation(config)
    common: dict[str, Any] = {"batch_size": config.batch_size, "workers": config.data.workers}
    first = make_loader(data.train, preprocess, augment, seed=config.seed, shuffle=True, **common)
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
    data: LabelledImages,
    preprocess: Preprocess,
    resume: bool,
    reporter: Reporter,
) -> None:
    from sansmax.engine.callbacks import CHECKPOINT, METRICS, Recorder
    from sansmax.engine.module import Classifier

    assert data.train is not None
    train_loader, val_loader = loaders(config, data, preprocess)
    steps = len(train_loader)
    weights = class_weights(data.train.labels, len(data.classes)) if config.optim.class_weights else None
    module = Classifier(network, config.optim, len(data.classes), config.epochs, steps, config.seed, weights)
    checkpoint = output / CHECKPOINT
    ckpt_path = None
    if resume and checkpoint.exists():
        state = recorder_state(checkpoint)
        if state["finished"]:
            return
        epoch, batch = state["next_batch"]
        train_loader.start_at(epoch, batch)
        reporter.say(f"going on at epoch {epoch + 1}, batch {batch + 1} of {steps}")
        truncate_rows(output / METRICS, step=epoch * steps)
        ckpt_path = str(checkpoint)
    elif resume:
        reporter.say("the run was stopped before its first checkpoint: starting from the beginning")
        truncate_rows(output / METRICS, step=0)
    stop = StopSignal()
    with stop.listening(), reporter.bar("training") as bar:
        recorder = Recorder(output, config, stop, bar, steps)
        try:
            run_lightning(config, module, recorder, train_loader, val_loader, ckpt_path)
        finally:
            for loader in (train_loader, val_loader):
                _end_workers(loader)


def _end_workers(loader: ImageLoader) -> None:
    """Ends the processes of a loader; at the end of the program they would be waited for in vain."""
    iterator: Any = getattr(loader, "_iterator", None)
    if iterator is not None:
        iterator._shutdown_workers()


def recorder_state(checkpoint: Path) -> dict[str, Any]:
    """What the recorder of a run left in its checkpoint; InputError where that is damaged."""
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True)["callbacks"]["Recorder"]
    except Exception as error:
        raise InputError(
            f"the checkpoint {checkpoint} is damaged ({type(error).__name__}); start anew with --overwrite. "
            "The best weights so far, model.safetensors, are not touched until then"
        ) from error


def run_lightning(
    config: Any, module: Any, recorder: Any, train_loader: Any, val_loader: Any, ckpt_path: str | None
) -> None:
    """Lightning's loop on one device, with our own records of it."""
    import lightning.pytorch as pl

    from sansmax.engine.callbacks import WholeFiles

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # its advice on workers and logging intervals is answered by our own configuration
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        trainer = pl.Trainer(
            accelerator={"auto": "auto", "cpu": "cpu", "cuda": "gpu", "mps": "mps"}[config.device],
            devices=1,
            precision={"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[config.precision],  # pyright: ignore[reportArgumentType]
            max_epochs=config.epochs,
            # a module that steps by itself clips by itself
            gradient_clip_val=config.optim.clip_grad if module.automatic_optimization else None,
            callbacks=[recorder],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            plugins=[WholeFiles()],
        )
        trainer.fit(module, train_loader, val_loader, ckpt_path=ckpt_path)


def finish_run(output: Path, data: LabelledImages, reporter: Reporter) -> Run:
    """Evaluates the best weights on validation and test images and writes the report."""
    from sansmax.engine.report_run import report_run

    run = Run.open(output)
    report_run(run, data, reporter)
    write_json(output / "run.json", {**run.info, "state": "finished"})
    return Run.open(output)
