"""Training on bags of features: from cases and their bags to a run folder with weights and metrics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sansmax.data.bag_loading import BagLoader, Bags, Keep, empty_cases
from sansmax.data.bags.cases import Cases
from sansmax.data.sampling import WHOLE, Share
from sansmax.engine.bag_config import BagConfig
from sansmax.engine.bag_losses import Objective
from sansmax.engine.bag_predict import predict_bags, predict_run, reader_for
from sansmax.engine.bag_run import BagRun, start_slide_network, write_start
from sansmax.engine.build import num_parameters
from sansmax.engine.config import differences
from sansmax.engine.locking import sole_writer
from sansmax.engine.place import check_alone, check_shared_out, processes_to_start
from sansmax.engine.processes import Processes, joined
from sansmax.engine.progress import Reporter
from sansmax.engine.run import START, check_folder, explained_disk, is_run, prepare_folder, write_json
from sansmax.engine.starting import at_hand, write_report
from sansmax.engine.stopping import StopNow, Stopped, StopSignal
from sansmax.engine.trackers import check_trackers
from sansmax.errors import InputError, listed
from sansmax.files import PARTIAL, write_text
from sansmax.models.slide import FeatureNetwork
from sansmax.report.tables import as_csv

__all__ = ["BagRun", "fit_bags", "fit_or_resume", "predict_bags", "predict_run"]


def fit_bags(
    config: BagConfig,
    network: FeatureNetwork | None,
    bags: Bags,
    cases: Cases,
    train_ids: Sequence[str],
    val_ids: Sequence[str],
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    command: str = "",
    processes: Processes | None = None,
) -> BagRun:
    """Trains on the cases `train_ids`, chooses the epoch by `val_ids`, and leaves everything in `folder`.

    `network` None: that of the configuration, its start drawn by the seed. Cases without a token are left out and
    listed in data.txt. With `resume` a run that was stopped goes on where it was, and ends as one that never stopped;
    a finished one is given back. Nothing but these cases is looked at. Under torchrun or SLURM all processes call this
    and train together; `processes` are those that have met already.

    Raises InputError for wrong input, and `Stopped` when asked to stop by Ctrl-C or SIGTERM (everything is saved).
    """
    if processes is None:
        if count := processes_to_start(config.parallel):
            raise InputError(
                f"bags in the memory of one process cannot be trained on by {count}: start them with torchrun, or give "
                "files to `sansmax train --devices`"
            )
        with joined(config.parallel, config.device) as met:
            how: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "reporter": reporter, "command": command}
            return fit_bags(config, network, bags, cases, train_ids, val_ids, folder, processes=met, **how)
    folder = Path(folder)
    reporter = reporter if reporter is not None and processes.is_first else Reporter(quiet=True)
    processes.first(lambda: check_folder(folder, overwrite=overwrite, resume=resume))
    check_trackers(config.track)
    check_shared_out(config.parallel.strategy, config.precision, config.parallel.sequence_parallel, packs=True)
    train, val, notes = _parts(bags, cases, train_ids, val_ids)
    if resume:
        _check_same(folder, config, train, val)
        if (run := BagRun.open(folder)).info["state"] == "finished":
            reporter.say(f"{folder} is finished, there is nothing to go on with")
            return run
    if not len(val) and (config.monitor != "last" or config.patience):
        raise InputError("there are no patients to validate with: give some, or --set monitor=last")
    objective = _objective(config, cases, train)
    torch.manual_seed(config.seed)
    width = _width(bags, network)
    started: list[str] = []
    if network is None:
        network = start_slide_network(at_hand(config.model, folder, resume), width, cases.outputs, started.append)
    if processes.sequence > 1:
        from sansmax.engine.parallel import check_trains_shared

        check_trains_shared(network)
    with explained_disk(folder), sole_writer(folder, processes):
        processes.check_same("the patients, or their parts,", _splits(train, val))
        if not resume:
            written = (folder, config, cases, train, val, bags, width, notes, command, overwrite, started)
            processes.first(lambda: _write_new(*written))
        for line in started:
            reporter.say(line)
        reporter.say(
            f"{config.model.name}: {num_parameters(network):,} parameters; {len(train):,} patients to train on, "
            f"{len(val):,} to validate; run in {folder}"
        )
        try:
            _fit(config, folder, network, objective, bags, train, val, resume, reporter, processes)
            return processes.first(lambda: _finish(folder, bags, val)) or BagRun.open(folder)
        except (KeyboardInterrupt, StopNow):
            raise Stopped("stopped at once; what was written before is kept", folder) from None


def fit_or_resume(
    config: BagConfig,
    bags: Bags,
    cases: Cases,
    train_ids: Sequence[str],
    val_ids: Sequence[str],
    folder: str | Path,
    reporter: Reporter | None = None,
) -> None:
    """`fit_bags` for one of many runs: goes on with what is in the folder, even where a kill left half a start."""
    check_alone(config.parallel)
    folder = Path(folder)
    there = is_run(folder)
    if not there and folder.is_dir():
        for name in START:
            (folder / name).unlink(missing_ok=True)
        for partial in folder.glob(PARTIAL):
            partial.unlink()
    fit_bags(config, None, bags, cases, train_ids, val_ids, folder, resume=there, reporter=reporter)


def _parts(
    bags: Bags, cases: Cases, train_ids: Sequence[str], val_ids: Sequence[str]
) -> tuple[Cases, Cases, list[str]]:
    """The training and validation cases that have tokens, and notes on those that have none."""
    if both := sorted(set(train_ids) & set(val_ids)):
        raise InputError(f"{len(both)} cases are both to train and to validate: {listed(both, 10)}")
    kept, notes = [], []
    for what, ids in (("train", train_ids), ("val", val_ids)):
        part = cases.take(ids)
        empty = {part.ids[i] for i in empty_cases(bags, part.slides)}
        if empty:
            notes.append(f"{len(empty)} cases of {what} left out, their bags are empty: {listed(sorted(empty), 10)}")
        kept.append(part.take([name for name in part.ids if name not in empty]))
    if not len(kept[0]):
        raise InputError("there are no patients to train on: " + ("; ".join(notes) or "the training part is empty"))
    return kept[0], kept[1], notes


def _objective(config: BagConfig, cases: Cases, train: Cases) -> Objective:
    """The loss of the configuration for the training patients."""
    o = config.optim
    focal = o.focal_gamma if o.loss == "focal" else None
    return Objective.of(cases.task, train.targets, cases.outputs, o.class_weights, o.smoothing, o.ties, focal)


def _width(bags: Any, network: FeatureNetwork | None) -> int:
    """The width of the features, which must be that of the network."""
    width = getattr(bags, "width", None) or (network.in_features if network is not None else None)
    if width is None:
        raise InputError("the bags do not say how wide their features are; give a network")
    if network is not None and network.in_features != width:
        raise InputError(
            f"the bags hold features of width {width} (encoder {getattr(bags, 'encoder', None) or 'not named'}), the "
            f"network reads {network.in_features}; build it with in_features={width}"
        )
    return width


def _splits(train: Cases, val: Cases) -> str:
    rows = [[name, part] for part, of in (("train", train), ("val", val)) for name in of.ids]
    return as_csv([["case", "split"], *rows])


def _check_same(folder: Path, config: BagConfig, train: Cases, val: Cases) -> None:
    stored = BagRun.open(folder).config
    if changed := differences(stored, config):
        raise InputError(
            "a resumed run keeps its configuration, and this one differs:\n  " + "\n  ".join(changed) + "\n"
            "leave the changes out, or start a new run in another --output"
        )
    if (folder / "splits.csv").read_text(encoding="utf-8") != _splits(train, val):
        raise InputError(
            f"the patients are not those the run {folder} began with (see its splits.csv); put them back, or start a "
            "new run in another --output"
        )


def _write_new(
    folder: Path,
    config: BagConfig,
    cases: Cases,
    train: Cases,
    val: Cases,
    bags: Any,
    width: int,
    notes: list[str],
    command: str,
    overwrite: bool,
    started: list[str],
) -> None:
    prepare_folder(folder, overwrite=overwrite, resume=False)
    info = {
        "task": cases.task,
        "target": list(cases.target),
        "classes": list(cases.classes),
        "encoder": getattr(bags, "encoder", None),
        "in_features": width,
        "layout": getattr(bags, "layout", None),
    }
    said = [getattr(bags, "note", ""), *cases.notes, *notes]
    write_text(folder / "data.txt", "\n".join(line for line in said if line) + "\n")
    write_text(folder / "splits.csv", _splits(train, val))
    write_start(folder, config, info, command)
    write_report(folder, started)


def _fit(
    config: BagConfig,
    folder: Path,
    network: FeatureNetwork,
    objective: Objective,
    bags: Bags,
    train: Cases,
    val: Cases,
    resume: bool,
    reporter: Reporter,
    processes: Processes,
) -> None:
    from sansmax.engine.bag_module import BagModule
    from sansmax.engine.bag_recorder import BagRecorder
    from sansmax.engine.checkpoints import take_up
    from sansmax.engine.trainer import run_lightning

    train_loader, val_loader = loaders(config, network, bags, train, val, processes.share)
    steps = len(train_loader)
    module = BagModule(
        network, config.optim, config.tokens, objective, train.targets, config.epochs, steps, config.seed
    )
    checkpoint = processes.in_turn(lambda: take_up(folder, train_loader, reporter.say)) if resume else None
    if checkpoint is not None and checkpoint.finished:
        return
    stop = StopSignal()
    with stop.listening(), reporter.bar("training") as bar:
        recorder = BagRecorder(folder, config, stop, bar, steps, train.task, val.targets, val.outputs)
        run_lightning(config, module, recorder, train_loader, val_loader, checkpoint, processes)


def loaders(
    config: BagConfig, network: FeatureNetwork, bags: Bags, train: Cases, val: Cases, share: Share = WHOLE
) -> tuple[BagLoader, BagLoader | None]:
    """The loaders of training and validation patients, for a share of each step; none where there are no patients."""
    t, readers = config.tokens, [reader_for(network, bags, part) for part in (train, val)]
    common: dict[str, Any] = {
        "batch_size": config.patients(train.task),
        "pack_tokens": t.batch_tokens,
        "workers": config.data.workers,
        "share": share,
    }
    if config.balanced and train.task != "classification":
        raise InputError(f"balanced shows classes equally often, and the task is {train.task}; leave it out")
    whole = t.keep == (1.0, 1.0) and t.most is None
    first = BagLoader(
        readers[0],
        seed=config.seed,
        shuffle=True,
        keep=None if whole else Keep(*t.keep, t.most),
        # a risk set has no patients between two patients
        mix=0.0 if train.task == "survival" else t.mix,
        labels=train.targets if config.balanced else None,
        **common,
    )
    # both kept, or neither: what one leaves of the memory is not counted
    if readers[0].keep_in_memory():
        readers[1].keep_in_memory()
    return first, BagLoader(readers[1], **common) if len(val) else None


def _finish(folder: Path, bags: Bags, val: Cases) -> BagRun:
    """Predicts the validation patients by the best weights and marks the run as finished."""
    run = BagRun.open(folder)
    if len(val):
        said = predict_bags(run.load_model(), bags, val, max_tokens=run.config.tokens.batch_tokens)
        write_text(folder / "predictions_val.csv", predictions_csv(val, said))
    write_json(folder / "run.json", {**run.info, "state": "finished"})
    return BagRun.open(folder)


def predictions_csv(cases: Cases, said: np.ndarray) -> str:
    """A row per case: its slides, and what the network says of each class or target."""
    names = [f"probability_{c}" if cases.task in ("classification", "multilabel") else c for c in cases.classes]
    rows = [
        [name, " ".join(slides), *map(repr, map(float, row))]
        for name, slides, row in zip(cases.ids, cases.slides, said, strict=True)
    ]
    return as_csv([["case", "slides", *names], *rows])
