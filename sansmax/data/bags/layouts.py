"""All layouts of bags, and which one a file has: told by looking into it, never by its name."""

from typing import NamedTuple

from sansmax.data.bags import clam, gigapath, own, plain, slideflow, stamp, trident
from sansmax.data.bags.contents import Contents
from sansmax.data.bags.layout import Layout
from sansmax.errors import InputError, unknown_name

# in the order in which they are asked: those that say most of themselves first
_ALL = (own.LAYOUT, stamp.LAYOUT, trident.LAYOUT, clam.LAYOUT, gigapath.LAYOUT, slideflow.LAYOUT, *plain.LAYOUTS)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _ALL}
WRITTEN = tuple(name for name, layout in LAYOUTS.items() if layout.write is not None)


class Found(NamedTuple):
    """The layout of a file and a few words on what was seen."""

    layout: str
    note: str


def layout_named(name: str, *, written: bool = False) -> Layout:
    """The layout of this name; `written` for one that can be written."""
    if name not in LAYOUTS:
        raise unknown_name("layout", name, WRITTEN if written else LAYOUTS)
    if written and LAYOUTS[name].write is None:
        raise InputError(f"the layout {name} is only read; written are {', '.join(WRITTEN)}")
    return LAYOUTS[name]


def found_in(contents: Contents, layout: str | None = None) -> Found:
    """The layout of an opened file: the first that knows it, or `layout`, which must know it."""
    for candidate in _ALL if layout is None else (layout_named(layout),):
        note = candidate.recognise(contents)
        if note is not None:
            return Found(candidate.name, note)
    holds = ", ".join(f"{name or 'a bare array'} {contents.shape(name)}" for name in contents.parts) or "nothing"
    if layout is not None:
        actual = found_in(contents)
        raise InputError(f"{contents.path} is not of the layout {layout} but {actual.layout} ({actual.note})")
    raise InputError(
        f"{contents.path} holds no features that are recognised: there is {holds}. In HDF5 they are named features "
        "(TRIDENT, CLAM, GigaPath) or feats (STAMP)"
    )
