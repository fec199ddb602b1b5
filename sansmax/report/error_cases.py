"""Pictures that a network got wrong, small enough for a page, each beside its coloured scores."""

import numpy as np

from sansmax.report.heatmap import brightest, check_grid, robust_limit, stretched_rgb, tinted
from sansmax.report.html import Case
from sansmax.report.pictures import stretched, thumbnail

LONGEST = 288


def error_case(name: str, text: str, pixels: np.ndarray, scores: np.ndarray | None) -> Case:
    """A picture with its name and what is said of it; `scores` `(rows, columns)` colour a copy of it."""
    picture = thumbnail(pixels, LONGEST)
    return Case(name, text, [picture] if scores is None else [picture, coloured(picture, scores)])


def coloured(picture: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The picture (RGB from 0 to 1), pale under its scores: red speaks for the answer, blue against it."""
    scores = np.asarray(scores)
    check_grid(scores)
    height, width = picture.shape[:2]
    # scores finer than the picture are not averaged away
    rows, columns = max(height, scores.shape[0]), max(width, scores.shape[1])
    base = picture if (rows, columns) == (height, width) else stretched_rgb(picture, (rows, columns))
    cells = stretched(scores, rows, columns)
    return tinted(base, cells, robust_limit(scores), brightest(picture)).clip(0, 1)
