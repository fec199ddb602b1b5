"""The bags of a folder: which slides there are, how long each is, and the bag of one of them."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.layouts import LAYOUTS
from sansmax.data.bags.places import find_bags
from sansmax.data.bags.reading import Header, read_bag, read_header
from sansmax.errors import InputError, unknown_name

_FIRST = 10


class BagFolder:
    """Bags by slide id. Made by `open_bags`.

    Headers (layout, number of tiles, width, encoder) are read once; features only by `read`. `bad` maps the slides that
    cannot be read to the reason; they are not among `ids`.
    """

    def __init__(
        self,
        files: Mapping[str, Path],
        headers: Mapping[str, Header],
        bad: Mapping[str, str],
        place: str,
        reading: dict[str, Any],
    ) -> None:
        self.headers, self.bad, self.place, self._reading = dict(headers), dict(bad), place, reading
        self.ids = tuple(sorted(headers))
        self._files = dict(files)

    @cached_property
    def layout(self) -> str:
        """The layout of most of the files."""
        return Counter(header.found.layout for header in self.headers.values()).most_common(1)[0][0]

    @cached_property
    def width(self) -> int | None:
        """Numbers per tile; None where all bags are empty."""
        return next((header.width for header in self.headers.values() if header.width), None)

    @cached_property
    def encoder(self) -> str | None:
        """The encoder that the files name; None where none does."""
        given = self._reading.get("encoder")
        return next((header.encoder for header in self.headers.values() if header.encoder), given)

    @property
    def note(self) -> str:
        """One line on what was found."""
        notes = Counter(header.found.note for header in self.headers.values())
        tokens = sum(header.tokens for header in self.headers.values())
        what = notes.most_common(1)[0][0] + (f" (and {len(notes) - 1} other kinds of files)" if len(notes) > 1 else "")
        bags = "1 bag" if len(self.ids) == 1 else f"{len(self.ids)} bags"
        said = f"{what}; {bags} in {self.place}, {tokens:,} tiles of {self.width or '?'} numbers"
        said += f", encoder {self.encoder}" if self.encoder else ", encoder not named"
        empty = sum(not header.tokens for header in self.headers.values())
        return said + (f"; {empty} without tiles" if empty else "") + (f"; {len(self.bad)} unreadable" * bool(self.bad))

    def __len__(self) -> int:
        """The number of slides."""
        return len(self.ids)

    def path(self, slide_id: str) -> Path:
        """The file of a slide."""
        self.header(slide_id)
        return self._files[slide_id]

    def header(self, slide_id: str) -> Header:
        """What is known of a slide's bag without reading its features."""
        if slide_id in self.bad:
            raise InputError(self.bad[slide_id])
        if slide_id not in self.headers:
            raise unknown_name("slide", slide_id, self.ids)
        return self.headers[slide_id]

    def length(self, slide_id: str) -> int:
        """The number of tiles of a slide; its features are not read."""
        return self.header(slide_id).tokens

    def read(self, slide_id: str, *, mpp: float | None = None, mmap: bool = False) -> Bag:
        """The bag of a slide; an empty one has the width of the others. `mpp` goes before that of the folder."""
        reading = self._reading if mpp is None else {**self._reading, "mpp": mpp}
        bag = read_bag(self.path(slide_id), mmap=mmap, **reading)
        if not bag.width and self.width:
            bag = dataclasses.replace(bag, features=np.zeros((0, self.width), np.float32))
        return bag


def open_bags(
    path: str | Path,
    *,
    layout: str | None = None,
    mpp: float | None = None,
    tile_level0: float | None = None,
    encoder: str | None = None,
    patches: str | Path | None = None,
    allow_nan: bool = False,
    trust_numpy: bool = False,
    skip_bad: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> BagFolder:
    """The bags in a folder, or the one in a file: of sansmax, TRIDENT, CLAM, STAMP, GigaPath, slideflow, .pt, .npy.

    Folders of whole jobs are searched: CLAM's h5_files and pt_files, TRIDENT's features_*, STAMP's nested folders. The
    header of every file is read. Raises InputError for files that cannot be read (all are listed; `skip_bad` leaves
    them out), duplicate slide ids, and features of several widths or encoders. The other options are those of
    `read_bag` and hold for all slides. `progress(done, total)` is called with headers read.
    """
    files, place = find_bags(path)
    headers: dict[str, Header] = {}
    bad: dict[str, str] = {}
    for done, (slide_id, file) in enumerate(files.items(), 1):
        try:
            headers[slide_id] = read_header(file, layout=layout, trust_numpy=trust_numpy)
        except InputError as e:
            bad[slide_id] = str(e)
        if progress is not None:
            progress(done, len(files))
    if bad and (not skip_bad or not headers):
        raise _unreadable(path, bad, len(files))
    _require_one_kind(path, headers)
    reading = {"layout": layout, "mpp": mpp, "tile_level0": tile_level0, "encoder": encoder, "patches": patches}
    reading |= {"allow_nan": allow_nan, "trust_numpy": trust_numpy}
    return BagFolder({k: v for k, v in files.items() if k in headers}, headers, bad, place, reading)


def _unreadable(path: str | Path, bad: dict[str, str], total: int) -> InputError:
    if total == 1:
        return InputError(next(iter(bad.values())))
    lines = "\n  ".join(list(bad.values())[:_FIRST]) + (f"\n  and {len(bad) - _FIRST} more" * (len(bad) > _FIRST))
    return InputError(f"{len(bad)} of {total} files in {path} cannot be read as bags:\n  {lines}")


def _require_one_kind(path: str | Path, headers: dict[str, Header]) -> None:
    """InputError where features of several widths or encoders lie side by side."""
    for what, of in (("widths", "width"), ("encoders", "encoder")):
        groups: dict[Any, list[str]] = {}
        for slide_id, header in headers.items():
            if getattr(header, of) is not None:
                groups.setdefault(getattr(header, of), []).append(slide_id)
        if len(groups) > 1:
            said = "; ".join(
                f"{kind} in {len(ids)} ({', '.join(ids[:3])}{', ...' * (len(ids) > 3)})" for kind, ids in groups.items()
            )
            raise InputError(
                f"{path} holds features of several {what}: {said}. A network reads features of one encoder; give a "
                "folder with one kind"
            )


def layouts() -> dict[str, str]:
    """The names of all layouts with a few words on each."""
    return {name: layout.about for name, layout in LAYOUTS.items()}
