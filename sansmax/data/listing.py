"""Files with labels, as a folder or a table lists them, made into checked splits."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from sansmax.data.assemble import Split, assemble
from sansmax.data.sets import BadImage, FileImages, ImageSet, LabelledImages, class_order, looks_coloured
from sansmax.errors import InputError, listed

Progress = Callable[[int, int], object]


class Row(NamedTuple):
    """One image file with what its source says of it; `where` is the place to correct: a line, a folder."""

    path: Path
    name: str
    label: str
    group: str | None
    split: str | None
    where: str


@dataclass(frozen=True)
class Listing:
    """The image files of one source; `split_note` says where its splits come from, empty where it has none."""

    source: str
    rows: list[Row]
    bad: tuple[BadImage, ...] = ()
    split_note: str = ""
    notes: tuple[str, ...] = ()


def open_listing(
    listing: Listing,
    *,
    classes: Sequence[str] | None,
    split: Split,
    check: bool,
    skip_bad: bool,
    workers: int,
    progress: Progress | None,
) -> LabelledImages:
    """Checks the listed files and gives them as splits, drawn where the source has none."""
    _refuse_repeats(listing)
    names = tuple(classes) if classes is not None else class_order({row.label for row in listing.rows})
    _refuse_unknown_labels(listing, names)
    colour = None
    if check:
        listing, colour = _check(listing, names, skip_bad, workers, progress)
    label_of = {name: i for i, name in enumerate(names)}
    given: dict[str, ImageSet] = {}
    for word in dict.fromkeys(row.split or "all" for row in listing.rows):
        rows = [row for row in listing.rows if (row.split or "all") == word]
        groups = [row.group for row in rows if row.group is not None]
        given[word] = FileImages(
            [row.path for row in rows],
            [row.name for row in rows],
            [label_of[row.label] for row in rows],
            groups if groups else None,
        )
    data = assemble(
        listing.source,
        names,
        given,
        split,
        origin=listing.split_note,
        known_classes=classes is not None,
        colour=colour if colour is not None else looks_coloured(given),
    )
    note = "; ".join((data.split_note, *listing.notes))
    return replace(data, bad=listing.bad, split_note=note)


def _refuse_repeats(listing: Listing) -> None:
    seen: dict[Path, Row] = {}
    for row in listing.rows:
        path = row.path.resolve()
        if path in seen:
            first = seen[path]
            splits = f" of {first.split} and {row.split}" if first.split != row.split else ""
            raise InputError(
                f"{listing.source} lists {row.name!r} twice{splits} ({first.where} and {row.where}); remove one"
            )
        seen[path] = row


def _refuse_unknown_labels(listing: Listing, classes: tuple[str, ...]) -> None:
    unknown = sorted({row.label for row in listing.rows} - set(classes))
    if unknown:
        first = next(row for row in listing.rows if row.label == unknown[0])
        raise InputError(
            f"{listing.source} has labels that are none of the classes: {listed(unknown)} (first at {first.where}); "
            f"the classes are {listed(classes, 20)}"
        )


def _check(
    listing: Listing, classes: tuple[str, ...], skip_bad: bool, workers: int, progress: Progress | None
) -> tuple[Listing, bool]:
    """Decodes every file once: the listing without bad ones, and whether any is in colour."""
    images = FileImages([r.path for r in listing.rows], [r.name for r in listing.rows], [0] * len(listing.rows))

    def verdict(i: int) -> bool | str:
        try:
            return images.read(i).ndim == 3
        except InputError as e:
            return str(e)

    verdicts: list[bool | str] = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for answer in pool.map(verdict, range(len(images))):
            verdicts.append(answer)
            if progress is not None:
                progress(len(verdicts), len(images))
    bad = [BadImage(row.name, v) for row, v in zip(listing.rows, verdicts, strict=True) if isinstance(v, str)]
    if bad and not skip_bad:
        first = "\n  ".join(b.reason for b in bad[:3])
        raise InputError(
            f"{len(bad)} of {len(images)} images of {listing.source} cannot be read; the first:\n  {first}\n"
            "replace them, or leave them out with --skip-bad"
        )
    rows = [row for row, v in zip(listing.rows, verdicts, strict=True) if not isinstance(v, str)]
    emptied = sorted({row.label for row in listing.rows} - {row.label for row in rows})
    if emptied:
        raise InputError(f"no image of the class {listed(emptied)} of {listing.source} can be read; {bad[0].reason}")
    colour = any(v is True for v in verdicts)
    return replace(listing, rows=rows, bad=listing.bad + tuple(bad)), colour
