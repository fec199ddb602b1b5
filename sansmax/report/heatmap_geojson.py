"""Scores of a slide's tokens as tiles that QuPath opens and shows as a measurement map."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sansmax.errors import InputError
from sansmax.files import replacing
from sansmax.report.slide_scores import SlideScores

MOST_TILES = 200_000
# the ends of the colour bar's scale, a little lighter
FOR, AGAINST = (200, 53, 28), (20, 96, 170)


def write_heatmap_geojson(scores: SlideScores, path: str | Path, *, most_tiles: int = MOST_TILES) -> tuple[Path, str]:
    """A GeoJSON FeatureCollection with one locked tile per token, and a line that says what a tile is.

    Tiles are squares in level-0 pixels with the measurement `score_<class>` and a classification by sign: "for
    <class>" red, "against <class>" blue, none where the score is 0. More than `most_tiles` tokens are gathered into
    coarser squares whose score is the mean of their tokens and whose measurement `tokens` is their number: QuPath holds
    every tile as an object. The file is written a feature at a time, whole or not at all.

    Raises InputError for scores without coordinates.
    """
    xy, values, side, tokens, note = gathered(scores, most_tiles)
    head = {"slide_id": scores.slide_id, "meaning": scores.meaning, "tiles": note}
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write('{"type":"FeatureCollection","sansmax":' + json.dumps(head) + ',"features":[\n')
        for i, feature in enumerate(_features(scores, xy, values, side, tokens)):
            file.write((",\n" if i else "") + feature)
        file.write("\n]}\n")
    return Path(path), note


def gathered(scores: SlideScores, most: int) -> tuple[np.ndarray, np.ndarray, float, np.ndarray | None, str]:
    """Corners, scores, side and number of tokens of at most `most` squares, and a line that says what they are.

    A token belongs to the square that holds its middle. The number of tokens is None where each square is one token.
    """
    if scores.xy is None or scores.side is None:
        raise InputError(
            f"{scores.slide_id}: the tokens have no coordinates, so tiles cannot be placed; write the array (h5), or "
            "make a bag with coordinates"
        )
    if most < 1:
        raise InputError(f"most_tiles must be 1 or more, got {most}")
    xy, side = scores.xy, float(scores.side)
    if len(xy) <= most:
        return xy, scores.scores, side, None, f"one tile per token, {len(xy):,} in all"
    origin = xy.min(axis=0)
    times = max(2, int((len(xy) / most) ** 0.5))
    while True:
        cell = np.floor((xy - origin + side / 2) / (side * times)).astype(np.int64)
        key = cell[:, 1] * (cell[:, 0].max() + 1) + cell[:, 0]
        squares, index, count = np.unique(key, return_inverse=True, return_counts=True)
        if len(squares) <= most:
            break
        times += 1
    mean = np.bincount(index, scores.scores) / count
    columns = cell[:, 0].max() + 1
    corners = origin + np.stack((squares % columns, squares // columns), axis=1) * side * times
    note = (
        f"{len(squares):,} squares of {times} x {times} tokens, each the mean of the tokens in it, because "
        f"{len(xy):,} tiles are more than {most:,}"
    )
    return corners, mean, side * times, count, note


def _features(
    scores: SlideScores, xy: np.ndarray, values: np.ndarray, side: float, tokens: np.ndarray | None
) -> Iterator[str]:
    name = json.dumps(scores.score_name)
    kinds = {
        1: _classification(f"for {scores.class_name}", FOR),
        -1: _classification(f"against {scores.class_name}", AGAINST),
        0: "",
    }
    for i, ((x, y), value) in enumerate(zip(xy.tolist(), values.tolist(), strict=True)):
        a, b, c, d = (f"{v:.10g}" for v in (x, y, x + side, y + side))
        count = "" if tokens is None else f',"tokens":{int(tokens[i])}'
        yield (
            f'{{"type":"Feature","geometry":{{"type":"Polygon","coordinates":'
            f"[[[{a},{b}],[{c},{b}],[{c},{d}],[{a},{d}],[{a},{b}]]]}},"
            f'"properties":{{"objectType":"tile","isLocked":true,"measurements":{{{name}:{value:.9g}{count}}}'
            f"{kinds[(value > 0) - (value < 0)]}}}}}"
        )


def _classification(name: str, colour: tuple[int, int, int]) -> str:
    return f',"classification":{{"name":{json.dumps(name)},"color":{json.dumps(list(colour))}}}'
