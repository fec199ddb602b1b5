"""The scores of the tokens of one slide, where the tokens lie, and what the numbers mean in words."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sansmax.errors import InputError

# what a score is a change of: by task, in words
QUANTITIES = {
    "log-odds": "the log-odds log(p / (1 - p)) of '{}', in nats",
    "value": "the predicted value of '{}', in its own unit",
    "risk": "the log-risk '{}' of the Cox model, in nats",
}
METHODS = {
    "mask gradient": "derivative by the weight of the token (1 = present, 0 = absent), exact to first order",
    "occlusion": "square painted in the mean colour, network run again",
}


@dataclass(frozen=True)
class SlideScores:
    """Signed scores `(N,)` of the tokens of one slide for one class: the effect of each token on the answer.

    `xy` `(N, 2)` are the upper left corners (x, y) of the tokens in level-0 pixels, in any order, and `side` the side
    of a token's square in level-0 pixels; both None where no coordinates are known. `mpp` is micrometres per level-0
    pixel, `slide_size` (width, height) at level 0. `quantity` says what the score is a change of: "log-odds", "value"
    or "risk". `probability` is that of the class, where there is one.

    Raises InputError for shapes that do not fit, scores that are not finite, and tokens that lie outside the slide.
    """

    slide_id: str
    scores: np.ndarray
    xy: np.ndarray | None
    side: float | None
    class_name: str
    method: str = "mask gradient"
    mpp: float | None = None
    slide_size: tuple[int, int] | None = None
    quantity: str = "log-odds"
    probability: float | None = None

    def __post_init__(self) -> None:
        scores = np.asarray(self.scores, dtype=np.float64)
        if scores.ndim != 1 or not scores.size:
            raise InputError(
                f"{self.slide_id}: scores are one number per token and at least one token, got shape {scores.shape}"
            )
        if bad := int((~np.isfinite(scores)).sum()):
            raise InputError(
                f"{self.slide_id}: {bad:,} of {scores.size:,} scores are not finite numbers; look for NaN in the "
                "features or in the weights of the network"
            )
        if self.quantity not in QUANTITIES:
            raise InputError(f"quantity is one of {', '.join(QUANTITIES)}, got {self.quantity!r}")
        object.__setattr__(self, "scores", scores)
        if self.xy is not None:
            object.__setattr__(self, "xy", self._checked_places(np.asarray(self.xy), scores.size))

    def _checked_places(self, xy: np.ndarray, tokens: int) -> np.ndarray:
        if xy.shape != (tokens, 2):
            raise InputError(f"{self.slide_id}: {tokens:,} scores need xy of shape ({tokens}, 2), got {xy.shape}")
        if self.side is None or not self.side > 0:
            raise InputError(
                f"{self.slide_id}: coordinates need the side of a token in level-0 pixels, got {self.side}"
            )
        if self.slide_size is not None:
            check_inside(xy, self.side, self.slide_size, self.slide_id)
        return xy.astype(np.int64)

    @property
    def score_name(self) -> str:
        """The name of the score in tables and measurements: "score_tumour"."""
        return f"score_{self.class_name}"

    @property
    def meaning(self) -> str:
        """What a score says, in one paragraph for people."""
        what = QUANTITIES[self.quantity].format(self.class_name)
        how = f" ({METHODS[self.method]})" if self.method in METHODS else f" ({self.method})"
        return (
            f"Effect of removing one token, sign reversed, on {what}{how}. A score of +s: without the token the answer "
            f"would be about s lower, the token speaks for '{self.class_name}'. Negative: it speaks against it. "
            "Scores say what this network used, not what is true."
        )

    @property
    def short_meaning(self) -> str:
        """The same in one line, for a colour bar."""
        words = {"log-odds": "log-odds of", "value": "value of", "risk": "log-risk"}[self.quantity]
        return f"how much the {words} '{self.class_name}' would fall if the token were removed"


def check_inside(xy: np.ndarray, side: float, slide_size: Sequence[int], name: str) -> None:
    """Raises InputError where a token lies wholly outside a slide of `slide_size` (width, height) level-0 pixels.

    Tokens at the right and lower edge may stick out.
    """
    outside = ((xy >= np.asarray(slide_size)) | (xy + side <= 0)).any(axis=1)
    if not outside.any():
        return
    (left, upper), (right, lower) = xy.min(axis=0), xy.max(axis=0)
    raise InputError(
        f"{name}: {int(outside.sum()):,} of {len(xy):,} tokens lie outside the slide of {slide_size[0]:,} x "
        f"{slide_size[1]:,} level-0 px; their corners reach from ({left:,}, {upper:,}) to ({right:,}, {lower:,}). "
        "The bag belongs to another slide, or its coordinates are not level-0 pixels: give the slide that was tiled"
    )
