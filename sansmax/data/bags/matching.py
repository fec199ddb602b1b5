"""Slides of a table and slides there are features of, brought together by their ids."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from sansmax.data.bags.contents import SUFFIXES as BAG_SUFFIXES
from sansmax.data.bags.tables import CaseRow
from sansmax.data.slides.opening import SLIDE_SUFFIXES
from sansmax.errors import InputError, listed

# of files of slides and of features, and of what others make features from; compound ones first, so that they go as one
SUFFIXES = tuple(
    sorted(
        {*SLIDE_SUFFIXES, *BAG_SUFFIXES, ".hdf5", ".zarr", ".ome.zarr", ".czi", ".isyntax", ".sdpc"},
        key=lambda s: (-len(s), s),
    )
)


def bare_id(name: str) -> str:
    """The id without the suffix of a file; dots that are part of the id stay."""
    lowered = name.lower()
    suffix = next((s for s in SUFFIXES if lowered.endswith(s) and len(name) > len(s)), "")
    return name[: len(name) - len(suffix)]


def named_ids(ids: Iterable[str]) -> dict[str, str]:
    """The id that each name means: itself, and without a suffix where that is the name of one id only."""
    ids = list(ids)
    bare = [bare_id(name) for name in ids]
    counts = Counter(bare)
    short = {b: name for b, name in zip(bare, ids, strict=True) if counts[b] == 1}
    return {**short, **{name: name for name in ids}}


def find_id(name: str, known: Mapping[str, str]) -> str | None:
    """What `known` has under this name, else under the name without its suffix, without its folders, or without both;
    None where it has nothing."""
    whole = name.replace("\\", "/")
    bare = bare_id(whole)
    forms = (name, whole, bare, PurePosixPath(whole).name, PurePosixPath(bare).name)
    return next((known[form] for form in forms if form in known), None)


def match_slides(
    path: Path,
    rows: Sequence[CaseRow],
    known: Sequence[CaseRow],
    bags_ids: Iterable[str] | None,
    allow_missing: bool,
    notes: list[str],
) -> list[CaseRow]:
    """The rows with a known target under the ids of their bags.

    `rows` are all rows, `known` those with a target: a bag whose target is missing in the table is no stranger.
    Raises InputError where two rows mean one bag, or, unless `allow_missing`, where rows or bags stand alone.
    """
    if bags_ids is None:
        matched = {row.slide: bare_id(row.slide) for row in rows}
    else:
        there = set(bags_ids)
        if not there:
            raise InputError(f"there are no bags for {path}; give the folder that holds them with --bags")
        known_as = named_ids(there)
        matched = {row.slide: find_id(row.slide, known_as) for row in rows}
        _check_alone(path, rows, known, matched, there, allow_missing, notes)
    found = [
        replace(row, slide=name, case=row.case or name) for row in known if (name := matched[row.slide]) is not None
    ]
    lines: dict[str, int] = {}
    twice = [f"{r.slide!r} (lines {lines[r.slide]} and {r.line})" for r in found if _seen(lines, r)]
    if twice:
        raise InputError(
            f"{path}: {len(twice)} rows name a slide that another names: {listed(twice, 10)}; keep one of each"
        )
    return found


def _seen(lines: dict[str, int], row: CaseRow) -> bool:
    return lines.setdefault(row.slide, row.line) != row.line


def _check_alone(
    path: Path,
    rows: Sequence[CaseRow],
    known: Sequence[CaseRow],
    matched: dict[str, str | None],
    there: set[str],
    allow_missing: bool,
    notes: list[str],
) -> None:
    """Lists labels without bag and bags without label."""
    no_bag = [r.slide for r in known if matched[r.slide] is None]
    no_label = sorted(there - {name for name in matched.values() if name is not None})
    parts = []
    if no_bag:
        parts.append(f"{len(no_bag):,} labelled slides have no bag: {listed(no_bag, 10)}")
    if no_label:
        parts.append(f"{len(no_label):,} bags have no label: {listed(no_label, 10)}")
    if not parts:
        return
    if len(no_bag) == len(known):
        names = listed(sorted(there), 3)
        raise InputError(
            f"{path}: none of its {len(known):,} slides has a bag ({listed(no_bag, 3)} ...); the bags are {names}. "
            "Name the column of their ids with --set data.slide_column=NAME, or give another --bags"
        )
    if not allow_missing:
        raise InputError(
            f"{path}: {'; '.join(parts)}. Correct the table or the bags, or leave them out with --skip-bad"
        )
    notes.extend(f"left out: {part}" for part in parts)
