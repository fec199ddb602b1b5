"""The outlines of a mask: closed rings along the edges of its cells, with holes."""

import numpy as np

from sansmax.optional import need


def outlines(mask: np.ndarray) -> list[list[np.ndarray]]:
    """One list of rings per 4-connected piece of a boolean (h, w) mask: the outer ring, then its holes.

    A ring is (n, 2) int64, (x, y) corners of cells where it turns, not closed. Pieces that touch at a corner only are
    pieces of their own.
    """
    cv2 = need("cv2", "slides")
    count, labels = cv2.connectedComponents(np.ascontiguousarray(mask, dtype=np.uint8), connectivity=4)
    corners, owner = _turns(mask, labels)
    pieces: list[list[tuple[float, np.ndarray]]] = [[] for _ in range(count)]
    for ring in _rings(corners):
        points = corners[ring, :2]
        pieces[owner[ring[0]]].append((_area(points), points))
    # the outer ring is the largest
    return [[p for _, p in sorted(rings, key=lambda r: -r[0])] for rings in pieces[1:]]


def _turns(mask: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where outlines turn, and whose they are: rows of (x, y, right, down), labels.

    `right` and `down` say into which half the two edges lead. A point where two cells touch by their corners has two.
    """
    # the four cells around each corner of a cell, at (row, column): upper left, upper right, lower left, lower right
    around = np.pad(np.asarray(mask, dtype=bool), 1)
    cells = [around[:-1, :-1], around[:-1, 1:], around[1:, :-1], around[1:, 1:]]
    number = np.sum(cells, 0, dtype=np.uint8)
    saddle = (number == 2) & (cells[0] == cells[3])
    turns, whose = [], []
    for place in range(4):
        right, down = place % 2, place // 2
        # the odd one out of four tells where the edges lead, be it the only cell or the only gap
        alone = cells[place] & ((number == 1) | saddle)
        gap = ~cells[place] & (number == 3)
        # beside the only gap all three cells are one piece: the one across is any of them
        for here, owner in ((alone, place), (gap, 3 - place)):
            y, x = np.nonzero(here)
            turns.append(np.stack([x, y, np.full_like(x, right), np.full_like(x, down)], -1))
            whose.append(labels[y - 1 + owner // 2, x - 1 + owner % 2])
    return np.concatenate(turns), np.concatenate(whose)


def _rings(turns: np.ndarray) -> list[list[int]]:
    """The turns in the order of walking, ring by ring: edges join neighbours in a row, then in a column, in turn."""
    x, y, right, down = turns.T
    along = np.empty(len(turns), np.int64)
    across = np.empty(len(turns), np.int64)
    for partner, order in ((along, np.lexsort((right, x, y))), (across, np.lexsort((down, y, x)))):
        partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    along_list, across_list = along.tolist(), across.tolist()
    seen, rings = [False] * len(turns), []
    for start in range(len(turns)):
        ring, at = [], start
        while not seen[at]:
            beside = along_list[at]
            seen[at] = seen[beside] = True
            ring += [at, beside]
            at = across_list[beside]
        if ring:
            rings.append(ring)
    return rings


def _area(points: np.ndarray) -> float:
    x, y = points.T.astype(np.float64)
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2
