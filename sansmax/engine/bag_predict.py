"""Predictions of a slide network for patients, of bags of any size in bounded memory."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sansmax.data.bag_loading import Bags, PatientBags, Tokens, empty_cases, pack, packs_of
from sansmax.data.bags.cases import Cases
from sansmax.data.bags.folder import open_bags
from sansmax.engine.bag_losses import answers
from sansmax.engine.bag_module import run_pack
from sansmax.engine.bag_run import BagRun
from sansmax.engine.predict import pick_device
from sansmax.engine.progress import Reporter
from sansmax.engine.stream import evaluating, stream
from sansmax.errors import InputError, listed
from sansmax.files import write_text
from sansmax.models.slide import FeatureNetwork
from sansmax.report.tables import as_csv

MAX_TOKENS = 65536
# bags that are read while others are in work
AHEAD = 2


@dataclass(frozen=True)
class _Whole:
    """All tokens of a patient, as a stream reads a bag."""

    features: np.ndarray
    grid: np.ndarray | None
    xy: None = None
    tile_level0: None = None


def predict_bags(
    network: FeatureNetwork,
    bags: Bags,
    cases: Cases,
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Callable[[int, int], object] | None = None,
) -> np.ndarray:
    """What a trained network says of each case, float64 (n, outputs).

    Classification: probabilities that sum to 1; multilabel: one of each label; regression: values in the units of the
    targets; survival: risks. Short bags run side by side, at most `max_tokens` tokens at a time; a longer one runs in
    chunks of as many, exactly. Softmax attention has no chunks: there a bag takes the memory of all its tokens.

    Raises InputError for a case without a token, and for features of another width than the network's.
    """
    if empty := empty_cases(bags, cases.slides):
        raise InputError(
            f"{len(empty)} of {len(cases)} cases have an empty bag (a slide without tissue), for which nothing can be "
            f"predicted: {listed([cases.ids[i] for i in empty], 10)}; leave them out"
        )
    reader = reader_for(network, bags, cases)
    found = np.zeros((len(cases), network.num_classes))
    groups = packs_of([reader.length(i) for i in range(len(cases))], max_tokens)
    done = 0
    with evaluating(network):
        for group, tokens in zip(groups, _read_ahead(reader, groups), strict=True):
            found[group] = answers(cases.task, outputs_of(network, tokens, max_tokens)).cpu().numpy()
            done += len(group)
            if progress is not None:
                progress(done, len(cases))
    return found


def reader_for(network: FeatureNetwork, bags: Bags, cases: Cases) -> PatientBags:
    """The tokens of cases as the network reads them."""
    positions = getattr(network, "pos_embed", "none") != "none"
    return PatientBags(bags, cases.slides, width=network.in_features, needs_coords=positions)


def _read_ahead(reader: PatientBags, groups: list[list[int]]) -> Iterator[list[Tokens]]:
    with ThreadPoolExecutor(1, thread_name_prefix="bags") as pool:

        def read(group: list[int]) -> list[Tokens]:
            return [reader.read(i) for i in group]

        ahead = [pool.submit(read, group) for group in groups[:AHEAD]]
        for k in range(len(groups)):
            yield ahead.pop(0).result()
            if k + AHEAD < len(groups):
                ahead.append(pool.submit(read, groups[k + AHEAD]))


@torch.no_grad()
def outputs_of(network: FeatureNetwork, tokens: list[Tokens], max_tokens: int = MAX_TOKENS) -> Tensor:
    """Outputs of a network in evaluation for a few bags, one row each."""
    if len(tokens) == 1 and len(tokens[0].features) > max_tokens and network.stream_obstacle is None:
        whole = _Whole(tokens[0].features, tokens[0].coords)
        return stream(network, whole, chunk_tokens=max_tokens).logits
    like = network.embed.weight
    packed = pack(tokens, range(len(tokens)))
    coords = None if packed.coords is None else packed.coords.to(like)
    return run_pack(network, packed._replace(features=packed.features.to(like), coords=coords))


def predict_run(
    run: str | Path | BagRun,
    bags: Bags,
    cases: Cases,
    *,
    max_tokens: int = MAX_TOKENS,
    progress: Callable[[int, int], object] | None = None,
) -> np.ndarray:
    """`predict_bags` by the best weights of a run, for features that are those of its training.

    Raises InputError for features of another encoder or width, naming both.
    """
    run = run if isinstance(run, BagRun) else BagRun.open(run)
    what: Any = bags
    run.check_features(
        getattr(what, "encoder", None), getattr(what, "width", None), getattr(what, "place", "the folder")
    )
    network = run.load_model(pick_device(run.config.device))
    return predict_bags(network, bags, cases, max_tokens=max_tokens, progress=progress)


@dataclass(frozen=True)
class BagAnswers:
    """What a run says of slides: `values` (n, outputs) as `predict_bags` gives them, a row per name."""

    names: tuple[str, ...]
    task: str
    classes: tuple[str, ...]
    values: np.ndarray
    left_out: tuple[tuple[str, str], ...] = ()

    def rows(self) -> list[dict[str, Any]]:
        """One dict per slide: its name, of classification the predicted class, and a number per class or target."""
        plain = self.task in ("regression", "survival")
        names = [c if plain else f"probability_{c}" for c in self.classes]
        rows = []
        for name, values in zip(self.names, self.values, strict=True):
            row: dict[str, Any] = {"name": name}
            if self.task == "classification":
                row["predicted"] = self.classes[int(values.argmax())]
            rows.append({**row, **dict(zip(names, values.tolist(), strict=True))})
        return rows

    def csv(self) -> str:
        """As a table."""
        rows = self.rows()
        return as_csv([list(rows[0]), *([str(v) for v in row.values()] for row in rows)]) if rows else ""

    def json(self) -> str:
        """As JSON."""
        plain = {"task": self.task, "classes": list(self.classes), "predictions": self.rows()}
        return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def predict_folder(
    run: str | Path | BagRun,
    path: str | Path,
    *,
    output: str | Path | None = None,
    skip_bad: bool = False,
    max_tokens: int = MAX_TOKENS,
    reporter: Reporter | None = None,
) -> BagAnswers:
    """What a run says of each bag of a folder, or of the one in a file; also written as CSV to `output`, JSON beside.

    Raises InputError for features of another encoder or width than the run's, and for empty or unreadable bags, which
    `skip_bad` leaves out and names.
    """
    run = run if isinstance(run, BagRun) else BagRun.open(run)
    reporter = reporter or Reporter(quiet=True)
    data = run.config.data
    bags = open_bags(path, layout=None, mpp=data.mpp, skip_bad=skip_bad)
    reporter.say(bags.note)
    left = dict(bags.bad)
    ids = bags.ids
    if skip_bad:
        left |= {name: "no tiles" for name in ids if not bags.length(name)}
        ids = tuple(name for name in ids if bags.length(name))
    blank = np.full((len(ids), len(run.classes)), np.nan)
    targets = np.zeros(len(ids), np.int64) if run.task == "classification" else blank
    if run.task == "survival":
        targets = np.full((len(ids), 2), np.nan)
    cases = Cases(run.task, ids, tuple((name,) for name in ids), targets, run.classes)
    with reporter.bar("predicting") as bar:
        values = predict_run(run, bags, cases, max_tokens=max_tokens, progress=bar)
    for name, reason in left.items():
        reporter.say(f"left out: {name}: {reason}")
    found = BagAnswers(ids, run.task, run.classes, values, tuple(left.items()))
    if output is not None:
        write_text(output, found.csv())
        write_text(Path(output).with_suffix(".json"), found.json())
    return found
