"""The machine and the command of a benchmark, for its page."""

import os
import shlex
import sys
from collections.abc import Mapping
from typing import Any

from sansmax.report.summary import bullets


def command_line(module: str) -> str:
    """What a person types to run the same again, the number of threads included where it was set."""
    threads = os.environ.get("OMP_NUM_THREADS")
    prefix = f"OMP_NUM_THREADS={threads} " if threads else ""
    return prefix + shlex.join(["python", "-m", module, *sys.argv[1:]])


def do_it_again(module: str, environment: Mapping[str, Any], command: str | None = None) -> str:
    """The section of a page that says how its figures come about again, and where; the command is that of this process.

    `command`: another one, where this process wrote a page of what others measured.
    """
    lines = bullets([f"{name}: {value}" for name, value in environment.items()])
    return f"```sh\n{command or command_line(module)}\n```\n\n{lines}"
