"""A tissue mask as GeoJSON that QuPath opens and edits, and back.

Outlines run along the edges of the mask's cells, in level-0 pixels, so that a mask written and read again is the same
to the cell. https://datatracker.ietf.org/doc/html/rfc7946
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.slides.outlines import outlines
from sansmax.data.slides.slide import SlideError
from sansmax.data.slides.tissue import Tissue
from sansmax.files import write_text

_TISSUE = {"name": "Tissue", "color": [200, 60, 140]}
# QuPath's own class for what is to be left out
_LEFT_OUT = ("ignore*", "exclude", "background")


def write_tissue(tissue: Tissue, path: str | Path) -> Path:
    """Writes a FeatureCollection, one annotation of class Tissue per connected piece, holes as inner rings."""
    features = []
    for rings in outlines(tissue.mask):
        places = [_closed(ring * tissue.downsample) for ring in rings]
        properties = {"objectType": "annotation", "classification": _TISSUE, "isLocked": False}
        geometry = {"type": "Polygon", "coordinates": places}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    # one feature a line: a difference between two masks can be read
    lines = ",\n".join(json.dumps(f, separators=(",", ":")) for f in features)
    return write_text(path, f'{{"type":"FeatureCollection","features":[\n{lines}\n]}}\n')


def read_tissue(path: str | Path, slide_size: tuple[int, int], downsample: float) -> Tissue:
    """The mask that outlines describe, in cells of `downsample` level-0 pixels over a slide of (width, height).

    A cell is tissue where its centre lies inside a polygon. Polygons and MultiPolygons count, whatever their class;
    those of the classes Ignore*, Exclude and Background are cut out. Other shapes are passed over. Raises
    `SlideError` for files that are no GeoJSON or hold no polygon at all but have other shapes.
    """
    path = Path(path)
    shape = (max(1, -int(-slide_size[1] // downsample)), max(1, -int(-slide_size[0] // downsample)))
    mask, cut = np.zeros(shape, bool), np.zeros(shape, bool)
    others = polygons = 0
    for geometry, left_out in _geometries(_parsed(path), path):
        if geometry.get("type") not in ("Polygon", "MultiPolygon"):
            others += 1
            continue
        whole = geometry.get("coordinates") or []
        for rings in [whole] if geometry["type"] == "Polygon" else whole:
            polygons += 1
            _fill(cut if left_out else mask, [_points(ring, path) / downsample for ring in rings])
    if others and not polygons:
        raise SlideError(f"{path} holds {others} shapes, none of them a polygon; outline the tissue with polygons")
    return Tissue(mask & ~cut, downsample)


def _closed(ring: np.ndarray) -> list[list[float]]:
    points = [[int(v) if v == int(v) else round(float(v), 4) for v in point] for point in ring]
    return [*points, points[0]]


def _parsed(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SlideError(f"no such file: {path}; correct the path") from None
    except (OSError, ValueError) as e:
        raise SlideError(f"cannot read {path}: it is no GeoJSON ({e}); export it again") from None


def _geometries(found: Any, path: Path, left_out: bool = False) -> Iterator[tuple[dict, bool]]:
    """The geometries of whatever GeoJSON allows as outermost: collections, features, bare geometries, lists."""
    if isinstance(found, list):
        found = {"type": "FeatureCollection", "features": found}
    if not isinstance(found, dict) or "type" not in found:
        raise SlideError(f"cannot read {path}: it is no GeoJSON, objects need a type; export it again from QuPath")
    if found["type"] == "FeatureCollection":
        for feature in found.get("features") or []:
            yield from _geometries(feature, path)
    elif found["type"] == "Feature":
        kind = (found.get("properties") or {}).get("classification") or {}
        name = kind.get("name", "") if isinstance(kind, dict) else str(kind)
        if found.get("geometry"):
            yield from _geometries(found["geometry"], path, str(name).lower() in _LEFT_OUT)
    elif found["type"] == "GeometryCollection":
        for geometry in found.get("geometries") or []:
            yield from _geometries(geometry, path, left_out)
    else:
        yield found, left_out


def _points(ring: Any, path: Path) -> np.ndarray:
    try:
        points = np.array([point[:2] for point in ring], np.float64)
    except (TypeError, ValueError, IndexError):
        points = np.empty((0, 0))
    if points.ndim != 2 or points.shape[-1] != 2 or len(points) < 3 or not np.isfinite(points).all():
        raise SlideError(f"cannot read {path}: a ring has at least 3 points of 2 numbers; export it again")
    return points


def _fill(mask: np.ndarray, rings: list[np.ndarray]) -> None:
    """Sets the cells whose centres lie inside an odd number of the rings, which are in units of cells."""
    height, width = mask.shape
    turns = np.zeros((height, width + 1), bool)
    for ring in rings:
        x0, y0 = ring.T
        x1, y1 = np.roll(ring, -1, 0).T
        # an edge passes the centres of rows from ceil(low - 1/2) up to, not with, ceil(high - 1/2)
        first, last = (
            np.ceil(v - 0.5).clip(0, height).astype(np.int64) for v in (np.minimum(y0, y1), np.maximum(y0, y1))
        )
        edge = np.repeat(np.arange(len(ring)), last - first)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(last - first) - (last - first), last - first) + first[edge]
        slope = (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
        crossing = x0[edge] + (row + 0.5 - y0[edge]) * slope
        column = np.ceil(crossing - 0.5).clip(0, width).astype(np.int64)
        # passed twice is not passed
        np.logical_xor.at(turns, (row, column), True)
    mask |= np.logical_xor.accumulate(turns, axis=1)[:, :width]
