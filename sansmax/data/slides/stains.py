"""Tiles that look like tissue stained with haematoxylin and eosin, drawn: pink ground, purple nuclei."""

import numpy as np

_GLASS = np.array([243, 242, 245], np.float32)
_EOSIN, _HAEMATOXYLIN = np.array([226, 158, 190], np.float32), np.array([112, 74, 152], np.float32)
_DARK = np.array([70, 40, 110], np.float32)


def tile_pool(side: int, seed: int, plain: int, planted: int) -> np.ndarray:
    """(1 + plain + planted, side, side, 3) uint8: glass, tissue, and tissue with large, dark, crowded nuclei."""
    rng = np.random.default_rng([seed, 2])
    area = (side / 256) ** 2
    tiles = [np.rint(_GLASS + rng.normal(0, 0.6, (side, side, 1))).astype(np.uint8)]
    tiles += [_tissue(rng, side, round(70 * area), (3.0, 5.5), _HAEMATOXYLIN) for _ in range(plain)]
    tiles += [_tissue(rng, side, round(150 * area), (6.0, 10.0), _DARK) for _ in range(planted)]
    return np.stack(tiles)


def _tissue(
    rng: np.random.Generator, side: int, nuclei: int, radii: tuple[float, float], colour: np.ndarray
) -> np.ndarray:
    fibres = _smooth(rng, side, 12) * 0.6 + _smooth(rng, side, 40) * 0.4
    ground = _EOSIN * (1 + 0.10 * fibres[..., None]) + rng.normal(0, 2, (side, side, 1))
    stain = np.zeros((side, side), np.float32)
    for _ in range(nuclei):
        _add_nucleus(rng, stain, radii)
    picture = ground * (1 - stain[..., None]) + colour * stain[..., None] * (
        1 + 0.08 * _smooth(rng, side, 60)[..., None]
    )
    return np.rint(picture.clip(0, 255)).astype(np.uint8)


def _add_nucleus(rng: np.random.Generator, stain: np.ndarray, radii: tuple[float, float]) -> None:
    """One ellipse with a soft edge, wholly inside, so that tiles fit together anywhere."""
    side = len(stain)
    long, short = np.sort(rng.uniform(*radii, 2))[::-1]
    reach = int(long) + 2
    cy, cx = rng.uniform(reach, side - reach, 2)
    y0, x0 = int(cy) - reach, int(cx) - reach
    y, x = np.mgrid[y0 : y0 + 2 * reach + 1, x0 : x0 + 2 * reach + 1]
    turn = rng.uniform(0, np.pi)
    u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
    v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
    inside = np.clip(short * (1 - np.sqrt((u / long) ** 2 + (v / short) ** 2)) + 0.5, 0, 1)
    part = stain[max(y0, 0) : y0 + 2 * reach + 1, max(x0, 0) : x0 + 2 * reach + 1]
    inside = inside[max(-y0, 0) :, max(-x0, 0) :][: part.shape[0], : part.shape[1]]
    np.maximum(part, (rng.uniform(0.75, 0.95) * inside).astype(np.float32), out=part)


def _smooth(rng: np.random.Generator, side: int, frequency: int) -> np.ndarray:
    """Random numbers of unit variance without waves shorter than side / frequency; periodic, so without seams."""
    spectrum = np.fft.rfft2(rng.normal(size=(side, side)))
    fy, fx = np.fft.fftfreq(side, 1 / side)[:, None], np.fft.rfftfreq(side, 1 / side)[None]
    field = np.fft.irfft2(spectrum * np.exp(-(fy**2 + fx**2) / (2 * frequency**2)), (side, side))
    return (field / field.std()).astype(np.float32)
