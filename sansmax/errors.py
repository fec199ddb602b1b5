"""Errors made by the user's input, with the way out in the message.

The command line prints an `InputError` as one message without a traceback; everything else is a fault of
ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Sequence


class InputError(ValueError):
    """Says what was wrong, what is allowed, what was given and what to do."""


def listed(items: Sequence[str], most: int = 5) -> str:
    """The first few items as text, with a count of the others."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more} more" if more > 0 else "")


def nearest(name: str, allowed: Iterable[str], count: int = 3) -> list[str]:
    """The allowed names most like `name`, best first; empty where none is like it."""
    lowered = {a.lower(): a for a in allowed}
    return [lowered[m] for m in difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.5)]


def unknown_name(kind: str, name: str, allowed: Iterable[str], hint: str = "") -> InputError:
    """The error for a name that is none of `allowed`, with the nearest ones."""
    allowed = list(allowed)
    like = nearest(name, allowed)
    if like:
        way_out = f"did you mean {' or '.join(repr(m) for m in like)}?"
    elif len(allowed) <= 20:
        way_out = f"allowed are {', '.join(allowed)}"
    else:
        way_out = f"there are {len(allowed)} allowed names, none like it"
    return InputError(f"unknown {kind} {name!r}: {way_out}" + (f" {hint}" if hint else ""))
