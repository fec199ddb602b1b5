"""What is known of each slide of a job: one small file per slide, written when the slide is finished.

Processes that share a folder write different files, so they do not disturb each other. A record is written after the
features it speaks of: features without one are made again.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sansmax.errors import InputError
from sansmax.files import write_text

FOLDER = "slides"
STATES = ("done", "empty", "masked", "failed")


@dataclass(frozen=True)
class Record:
    """How a slide ended.

    `state` is done, empty (no tissue), masked (tissue only) or failed. `settings` and `inputs` are what its features
    depend on, `files` the sizes in bytes of what was written, by their place in the output folder.
    """

    slide_id: str
    path: str
    state: str
    tiles: int = 0
    width: int = 0
    tissue_share: float | None = None
    mpp: float | None = None
    seconds: float = 0.0
    reason: str = ""
    warnings: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)

    def write(self, output: Path) -> None:
        """Writes the record, whole or not at all."""
        write_text(record_path(output, self.slide_id), json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    def is_whole(self, output: Path) -> bool:
        """Whether the files it speaks of are there, as long as they were."""
        paths = {output / name: size for name, size in self.files.items()}
        return all(p.is_file() and p.stat().st_size == size for p, size in paths.items())


def record_path(output: Path, slide_id: str) -> Path:
    """Where the record of a slide lies."""
    return output / FOLDER / f"{slide_id}.json"


def read_record(output: Path, slide_id: str) -> Record | None:
    """The record of a slide; None where there is none, or none that can be read."""
    path = record_path(output, slide_id)
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{**known, "warnings": tuple(known["warnings"])})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError):
        # not one of ours, or from another version: the slide is made again
        return None


def all_records(output: Path) -> Iterator[Record]:
    """The records of a folder, sorted by slide."""
    for path in sorted((output / FOLDER).glob("*.json")):
        if not path.name.startswith(".") and (record := read_record(output, path.stem)) is not None:
            yield record


def sha256_of(path: Path) -> str:
    """The digest of a small file.

    Raises InputError where it cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
