"""The tissue of a slide, outlined on its picture."""

from pathlib import Path

import numpy as np
from PIL import Image

from sansmax.files import replacing

# seen on stained tissue, on glass and by people who cannot tell red from green
COLOUR = (0, 90, 255)


def draw_tissue(picture: np.ndarray, tissue: np.ndarray, cells: tuple[float, float], path: str | Path) -> Path:
    """Writes the picture, (h, w, 3) of uint8, as JPEG with the outline of the tissue.

    `tissue` is a mask, True for tissue, of which the picture shows the first `cells` (across, down); they need not be
    whole. The line is about a four-hundredth of the longer side wide and lies inside the tissue, so that tissue at the
    edge of the picture is outlined, too.
    """
    height, width = picture.shape[:2]
    box = (0.0, 0.0, min(cells[0], tissue.shape[1]), min(cells[1], tissue.shape[0]))
    mask = Image.fromarray(tissue).convert("L").resize((width, height), Image.Resampling.NEAREST, box)
    line = max(1, round(max(height, width) / 400))
    inside = np.asarray(mask) > 0
    edge = inside & ~_eroded(_eroded(inside, line, 0), line, 1)
    drawn = picture.copy()
    drawn[edge] = COLOUR
    with replacing(path) as partial:
        Image.fromarray(drawn).save(partial, format="JPEG", quality=85)
    return Path(path)


def _eroded(mask: np.ndarray, by: int, axis: int) -> np.ndarray:
    """What has tissue for `by` pixels on both sides along an axis; outside the picture there is none."""
    around = np.pad(mask, [(by, by) if k == axis else (0, 0) for k in range(2)])
    length = mask.shape[axis]
    return np.logical_and.reduce([around.take(range(k, k + length), axis) for k in range(2 * by + 1)])
