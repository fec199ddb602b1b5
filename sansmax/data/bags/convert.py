"""Bags of one layout made into bags of another: resumed, one bad file does not stop the rest, losses are said."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sansmax.data.bags.contents import read_json
from sansmax.data.bags.folder import BagFolder, open_bags
from sansmax.data.bags.layout import Layout
from sansmax.data.bags.layouts import layout_named
from sansmax.data.bags.reading import read_header
from sansmax.data.bags.writing import write_bag
from sansmax.errors import InputError
from sansmax.files import write_text

RECORD = "convert.json"
FAILED = "failed.txt"
_FIRST = 10


@dataclass
class Conversion:
    """What came of a conversion: slides written, slides that were there already, and slides that failed, with reasons.

    `lost` counts the slides of each thing that the layout cannot hold; `remarks` are what a person should know of
    single slides; `note` says what was found in the source.
    """

    note: str
    layout: str
    target: Path
    written: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)
    remarks: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def text(self) -> str:
        """The report in lines, the most important last."""
        lines = [f"found: {self.note}"]
        lines += [f"lost, which {self.layout} does not hold: {what} ({_slides(n)})" for what, n in self.lost.items()]
        lines += _first([f"remark: {i}: {said}" for i, words in self.remarks.items() for said in words], "")
        lines += _first(self.failures(), f", all in {self.target / FAILED}")
        done = f"{_slides(len(self.written))} written to {self.target} as {self.layout}"
        done += f", {len(self.skipped)} were there" if self.skipped else ""
        return "\n".join([*lines, done + (f", {len(self.failed)} failed" if self.failed else "")])

    def failures(self) -> list[str]:
        """A line for each slide that failed."""
        return [f"failed: {slide_id}: {reason}" for slide_id, reason in self.failed.items()]


def _slides(count: int) -> str:
    return "1 slide" if count == 1 else f"{count} slides"


def _first(lines: list[str], where: str) -> list[str]:
    return lines[:_FIRST] + ([f"and {len(lines) - _FIRST} more{where}"] if len(lines) > _FIRST else [])


def convert_bags(
    source: str | Path,
    target: str | Path,
    layout: str,
    *,
    mpp: float | Mapping[str, float] | None = None,
    tile_level0: float | None = None,
    encoder: str | None = None,
    dtype: str | None = None,
    patches: str | Path | None = None,
    overwrite: bool = False,
    allow_nan: bool = False,
    trust_numpy: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Conversion:
    """Writes every bag of `source` to the folder `target` in another layout, or in the same one, packed for speed.

    `mpp` is micrometres per level-0 pixel of all slides, or of each by slide id; between pixels and micrometres it is
    needed where the files do not say it. The other options are those of `open_bags` and `write_bag`. Slides that are
    done are skipped, unless their source is newer; `overwrite` writes all again. Slides that fail are listed in the
    result and in failed.txt, and do not stop the rest. Raises InputError for what concerns all slides: among others a
    target that holds the result of other settings, or the source itself.
    """
    kind, target = layout_named(layout, written=True), Path(target).expanduser()
    if dtype is not None and dtype not in kind.dtypes:
        raise InputError(f"the layout {layout} keeps features as {' or '.join(kind.dtypes)}, got {dtype!r}")
    known = {"tile_level0": tile_level0, "encoder": encoder, "patches": patches}
    bags = open_bags(source, **known, allow_nan=allow_nan, trust_numpy=trust_numpy, skip_bad=True)
    if any((target / kind.place.format(i)).resolve() == bags.path(i).resolve() for i in bags.ids):
        raise InputError(f"the bags of {source} would replace themselves; give another folder for the result")
    _keep_settings(target, {"layout": layout, "dtype": dtype, "mpp": _told(mpp), **known}, overwrite)
    report = Conversion(bags.note, layout, target, failed=dict(bags.bad))
    for done, slide_id in enumerate(bags.ids, 1):
        try:
            path = target / kind.place.format(slide_id)
            if not overwrite and _is_done(bags, slide_id, path, kind, dtype):
                report.skipped.append(slide_id)
            else:
                bag = bags.read(slide_id, mpp=mpp.get(slide_id) if isinstance(mpp, Mapping) else mpp)
                report.lost.update(write_bag(bag, path, layout, dtype=dtype, allow_nan=allow_nan))
                report.written.append(slide_id)
                if bag.remarks:
                    report.remarks[slide_id] = bag.remarks
        except InputError as e:
            report.failed[slide_id] = str(e)
        if progress is not None:
            progress(done, len(bags.ids))
    (target / FAILED).unlink(missing_ok=True)
    if report.failed:
        write_text(target / FAILED, "\n".join(report.failures()) + "\n")
    return report


def _told(mpp: float | Mapping[str, float] | None) -> float | str | None:
    """A resolution, or a table of them by its content."""
    if isinstance(mpp, Mapping):
        return hashlib.sha256(json.dumps(sorted(mpp.items())).encode()).hexdigest()[:12]
    return mpp


def _keep_settings(target: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Notes the settings beside the result; InputError where it was made with others."""
    now = {name: value if isinstance(value, float | None) else str(value) for name, value in settings.items()}
    before = read_json(target / RECORD)
    differing = [
        f"{name} was {before[name]}, is {now[name]}" for name in now if before and before.get(name) != now[name]
    ]
    if differing and not overwrite:
        raise InputError(
            f"{target} holds bags that were converted otherwise: {'; '.join(differing)}. Give another folder, or "
            "--overwrite"
        )
    if before != now:
        write_text(target / RECORD, json.dumps(now, indent=1) + "\n")


def _is_done(bags: BagFolder, slide_id: str, path: Path, kind: Layout, dtype: str | None) -> bool:
    """Whether `path` is this slide's result and not older than its source; InputError where it is something else."""
    if not path.exists():
        return False
    header, wanted = read_header(path), bags.header(slide_id)
    if bags.path(slide_id).stat().st_mtime > path.stat().st_mtime:
        return False
    same = header.tokens == wanted.tokens and (header.width == wanted.width or not header.tokens)
    if header.found.layout != kind.name or not same or dtype not in (None, header.dtype):
        raise InputError(
            f"{path} is there already: {header.tokens} tiles of {header.width} numbers, {header.dtype}, of the layout "
            f"{header.found.layout}. It would be {wanted.tokens} of {wanted.width}, {dtype or header.dtype}, "
            f"{kind.name}. Remove it, give another folder, or --overwrite"
        )
    return True
