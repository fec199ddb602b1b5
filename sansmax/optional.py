"""Packages that come with an extra: imported where they are used, with the line that installs them."""

import importlib
from typing import Any

from sansmax.errors import InputError


def need(name: str, extra: str) -> Any:
    """The module `name`, which comes with `pip install "sansmax[extra]"`.

    `name` may be dotted. Raises `InputError` with that line where the package is not installed. An error inside a
    package that is installed stays what it is, unless it is a missing library: then its text is part of the message.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        package = name.partition(".")[0]
        missing = isinstance(e, ModuleNotFoundError) and (e.name or "").partition(".")[0] == package
        what = f"{package} is not installed" if missing else f"{package} cannot be imported ({e})"
        raise InputError(f'{what}; it comes with: pip install "sansmax[{extra}]"') from None
