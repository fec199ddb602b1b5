"""The journal of a run: one JSON object a line, in the order of its steps.

`metrics.jsonl` is only ever added to, so that a program can follow it. A process that is killed may leave half a line
at the end; reading passes over it, and a run that is taken up cuts it off.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.errors import InputError
from sansmax.files import write_text


def append_line(path: str | Path, values: Mapping[str, Any]) -> None:
    """Adds a line and waits until it is on the disk; a number that is not finite is null."""
    line = json.dumps({k: plain(v) for k, v in values.items()}, ensure_ascii=False, allow_nan=False) + "\n"
    with Path(path).open("a", encoding="utf-8", newline="\n") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The lines, oldest first, without half a one at the end; none where there is no file."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in whole_lines(Path(path))]


def truncate_lines(path: str | Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines after `step` (training resumes there) and returns those that stay; without a file, none."""
    path = Path(path)
    if not path.exists():
        return []
    texts = whole_lines(path)
    lines = [json.loads(text) for text in texts]
    kept = [i for i, line in enumerate(lines) if line.get("step") is not None and line["step"] <= step]
    text = "".join(texts[i] + "\n" for i in kept)
    if text.encode() != path.read_bytes():
        write_text(path, text)
    return [lines[i] for i in kept]


def whole_lines(path: Path) -> list[str]:
    """The lines as text; InputError where one that is not the last is no JSON object."""
    *texts, rest = path.read_bytes().split(b"\n")
    # a line that was cut off, or whose end alone is missing: what cannot be told apart is written again
    del rest
    out = []
    for number, raw in enumerate(texts, start=1):
        try:
            text = raw.decode("utf-8")
            good = isinstance(json.loads(text), dict)
        except ValueError:
            text, good = "", False
        if not good:
            raise InputError(f"{path}, line {number} is no JSON object; mend or remove the line")
        out.append(text)
    return out


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
