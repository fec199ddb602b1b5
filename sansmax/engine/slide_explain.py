"""The scores of one slide's tokens: of a bag of features, or of the slide's own patches."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from sansmax.engine.explain import QUANTITY, answer_of, bag_scores, check_class
from sansmax.engine.predict import Predictor
from sansmax.engine.predict_slide import SlideOptions, predict_slide
from sansmax.engine.stream import Streamed, stream
from sansmax.errors import InputError, unknown_name
from sansmax.report.slide_scores import SlideScores


@dataclass(frozen=True)
class Asked:
    """What a heat map explains: the network, its classes or targets, its task, and which class (None: the predicted).

    Raises InputError for an unknown task, a class that is none (the nearest are named), and a network of one class.
    """

    network: Any
    classes: tuple[str, ...]
    task: str = "classification"
    class_name: str | None = None

    def __post_init__(self) -> None:
        if self.task not in QUANTITY:
            raise unknown_name("task", self.task, QUANTITY)
        if self.class_name is not None and self.class_name not in self.classes:
            raise unknown_name("class", self.class_name, self.classes)
        if self.task == "classification":
            check_class(0, len(self.classes))

    def index(self, logits: np.ndarray) -> int:
        """Number of the class that is explained: the one asked for, else the largest."""
        if self.class_name is not None:
            return self.classes.index(self.class_name)
        return 0 if self.task in ("survival", "regression") else int(logits.argmax())

    def probability(self, logits: np.ndarray, index: int) -> float | None:
        """The probability of that class; None for values and risks."""
        if self.task == "classification":
            return float(torch.from_numpy(logits).double().softmax(0)[index])
        return float(torch.from_numpy(logits).double().sigmoid()[index]) if self.task == "multilabel" else None


def explain_bag(
    asked: Asked,
    bag: Any,
    *,
    slide: Any = None,
    chunk_tokens: int = 65536,
    store: str = "memory",
    progress: Callable[[int, int], None] | None = None,
) -> SlideScores:
    """The scores of a bag's tokens: the gradient of the mask, streamed where the network can.

    An opened `slide` gives the size and the micrometres per pixel that the bag does not hold. Raises InputError for an
    empty bag, features of another width, and a bag whose coordinates lie outside the slide.
    """
    bag = placed(bag, slide)
    if not len(bag.features):
        raise InputError(
            f"{bag.slide_id}: the bag is empty, so there is nothing to explain: a slide without tissue has no answer"
        )
    network = asked.network.eval()
    if network.stream_obstacle is None:
        run = partial(stream, network, bag, chunk_tokens=chunk_tokens, store=store, progress=progress)
        logits, values, index = _streamed(run, asked)
    else:
        logits, values, index = _in_memory(network, bag, asked)
    return SlideScores(
        slide_id=bag.slide_id,
        scores=values,
        xy=bag.xy if bag.tile_level0 is not None else None,
        side=bag.tile_level0,
        class_name=asked.classes[index],
        mpp=bag.mpp,
        slide_size=bag.slide_size,
        quantity=QUANTITY[asked.task],
        probability=asked.probability(logits, index),
    )


def placed(bag: Any, slide: Any) -> Any:
    """The bag with the size of its open slide, and the slide's resolution where the bag has none."""
    if slide is None:
        return bag
    if bag.mpp is None and slide.mpp is not None:
        bag = bag.with_mpp(slide.mpp)
    return dataclasses.replace(bag, slide_size=tuple(slide.size))


def _streamed(run: Callable[..., Streamed], asked: Asked) -> tuple[np.ndarray, np.ndarray, int]:
    """Logits, scores and number of the class, in one forward and one backward pass."""
    answer = partial(_answer, asked.task)
    if asked.class_name is not None or asked.task in ("survival", "regression"):
        result = run(scores=[asked.index(np.zeros(1))], answer=answer)
    else:
        result = run(scores="predicted", answer=answer)
    assert result.scores is not None
    return result.logits[0].double().cpu().numpy(), result.scores[:, 0].astype(np.float64), result.score_classes[0]


def _answer(task: str, logits: torch.Tensor, index: int) -> torch.Tensor:
    return answer_of(logits, index, task)


def _in_memory(network: Any, bag: Any, asked: Asked) -> tuple[np.ndarray, np.ndarray, int]:
    features, coords = tensors(network, bag)
    with torch.no_grad():
        logits = network(features[None], None if coords is None else coords[None])[0].double().cpu().numpy()
    index = asked.index(logits)
    values = bag_scores(network, features, coords, index, asked.task)
    return logits, values.double().cpu().numpy(), index


def tensors(network: Any, bag: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features and coordinates of a bag as the network reads them."""
    like = next(network.parameters())
    coords = None if bag.grid is None else torch.from_numpy(np.ascontiguousarray(bag.grid)).to(like)
    return torch.from_numpy(np.ascontiguousarray(bag.features)).to(like), coords


def explain_slide(
    predictor: Predictor,
    slide: Any,
    options: SlideOptions | None = None,
    *,
    class_name: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SlideScores:
    """The scores of all patches of an opened slide (or picture) that have tissue, for a class or the predicted one."""
    found = predict_slide(
        predictor, slide, options, scores=True if class_name is None else class_name, progress=progress
    )
    assert found.scores is not None and found.score_class is not None
    return SlideScores(
        slide_id=slide.name,
        scores=found.scores,
        xy=found.xy_level0,
        side=found.side,
        class_name=found.score_class,
        mpp=slide.mpp,
        slide_size=tuple(slide.size),
        probability=float(found.probabilities[found.classes.index(found.score_class)]),
    )
