"""A slide in, an answer out: exact attention over all of its tissue, at a resolution in micrometres."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sansmax.data.slides.opening import open_slide
from sansmax.engine.sources import opened_tokens, slide_tokens
from sansmax.engine.stream import Progress, check, stream_opened
from sansmax.errors import InputError

if TYPE_CHECKING:
    from sansmax.engine.predict import Prediction, Predictor


@dataclass(frozen=True)
class SlideOptions:
    """How slides are read and run.

    `mpp` is the resolution that the network sees in micrometres per pixel (None: level 0 as it is), `slide_mpp` that of
    level 0 where the file does not say. Patches need the share `min_tissue` of tissue, unless `tissue` is False.
    `store` and `keep_every` are those of `sansmax.stream`.
    """

    mpp: float | None = None
    slide_mpp: float | None = None
    tissue: Any = True
    min_tissue: float = 0.5
    store: str = "memory"
    keep_every: int = 1
    chunk_tokens: int = 65536


def predict_slide(
    predictor: "Predictor",
    slide: str | Path | Any,
    options: SlideOptions | None = None,
    *,
    scores: bool | str | int = False,
    progress: Progress | None = None,
    name: str | None = None,
) -> "Prediction":
    """The answer for a slide given by its path, or open; `scores` as in `Predictor.__call__`.

    `scores` (N,) of the prediction are those of the patches with tissue, `xy_level0` (N, 2) their upper left corners
    and `side` their side in level-0 pixels. Raises InputError for a slide without tissue, without a resolution where
    `options.mpp` needs one, and for a network that cannot run in chunks or reads features.
    """
    from sansmax.engine.predict import Prediction

    how = options or SlideOptions()
    if isinstance(slide, str | Path):
        with open_slide(slide, mpp=how.slide_mpp) as opened:
            return predict_slide(
                predictor, opened, how, scores=scores, progress=progress, name=name or Path(slide).name
            )
    network: Any = predictor.network
    if hasattr(network, "embed_tokens"):
        raise InputError(
            f"{type(network).__name__} reads features of tiles, not pixels; make a bag with `sansmax tokenize` and the "
            "encoder of training, and predict on that"
        )
    check(network, how.chunk_tokens, how.store)
    p = predictor.preprocess
    source = slide_tokens(
        network, slide, mpp=how.mpp, tissue=how.tissue, min_tissue=how.min_tissue, mean=tuple(p.mean), std=tuple(p.std)
    )
    asked = "predicted" if scores is True else [] if scores is False else [predictor.class_index(scores)]
    found = stream_opened(
        network,
        opened_tokens(source),
        chunk_tokens=how.chunk_tokens,
        store=how.store,
        scores=asked,
        keep_every=how.keep_every,
        progress=progress,
    )
    probabilities = found.logits.double().softmax(1)[0].cpu().numpy()
    answer: dict[str, Any] = {}
    if found.scores is not None:
        answer = {
            "scores": found.scores[:, 0].astype(np.float64),
            "score_class": predictor.classes[found.score_classes[0]],
            "score_method": "mask gradient",
            "xy_level0": found.xy,
            "side": found.side,
        }
    return Prediction(name or slide.name, predictor.classes, probabilities, **answer)
