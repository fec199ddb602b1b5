"""Which slides a job has: named on the command line or in a table, and the share of one of several processes."""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

from sansmax.data.slides.opening import find_slides, slide_id
from sansmax.engine.tokenize_slide import SlideJob
from sansmax.errors import InputError


def list_jobs(
    slides: Sequence[str | Path], table: str | Path | None = None, mpp: float | None = None
) -> list[SlideJob]:
    """The slides, sorted by name.

    `slides` are files and folders. `table` is a CSV file with the columns `wsi` (a path) and, if wanted, `mpp`
    (micrometres per level-0 pixel; an empty cell leaves it to the slide); its paths are relative to the one folder in
    `slides`, else to the table. `mpp` is for all slides that say no resolution, and neither does the table.

    Raises InputError for missing files, slides of the same name, and a table that cannot be understood.
    """
    if mpp is not None and not 0 < mpp < float("inf"):
        raise InputError(f"--mpp is a positive number of micrometres per pixel, got {mpp}")
    if table is None:
        if not slides:
            raise InputError("name slides or folders of slides, or a table of them: --list slides.csv")
        found = [(path, None) for path in find_slides([Path(s) for s in slides])]
    else:
        found = read_list(Path(table), [Path(s) for s in slides])
        find_slides([path for path, _ in found])
    jobs = [SlideJob(slide_id(path), path.absolute(), own, mpp) for path, own in found]
    return sorted(jobs, key=lambda job: job.slide_id)


def read_list(table: Path, folders: Sequence[Path]) -> list[tuple[Path, float | None]]:
    """Paths and resolutions of a table with the columns `wsi` and, if wanted, `mpp`."""
    if len(folders) > 1 or (folders and not folders[0].is_dir()):
        raise InputError("with --list give no slides, or the one folder that its paths are relative to")
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            lines, columns = list(reader), reader.fieldnames or []
    except OSError as error:
        raise InputError(f"the table {table} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"the table {table} is no CSV text in UTF-8") from None
    if "wsi" not in columns:
        raise InputError(f"the table {table} needs a column wsi; its columns are {', '.join(columns) or 'none'}")
    root = folders[0] if folders else table.parent
    rows = [
        (root / line["wsi"], _mpp(table, n, line.get("mpp"))) for n, line in enumerate(lines, start=2) if line["wsi"]
    ]
    if not rows:
        raise InputError(f"the table {table} names no slides")
    if missing := [str(path) for path, _ in rows if not path.exists()]:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise InputError(
            f"{len(missing)} slides of {table} are not there: {shown}; paths are relative to {root}, another folder is "
            "given as SLIDES"
        )
    return rows


def _mpp(table: Path, line: int, cell: str | None) -> float | None:
    text = (cell or "").strip()
    if text.lower() in ("", "na", "nan", "none"):
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"{table}, line {line}: mpp is a positive number of micrometres per pixel, got {text!r}")
    return value


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) from "i/n", the i-th of n processes, counted from 1."""
    first, _, last = text.partition("/")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)):
        raise InputError(f'--shard is i/n, the i-th of n processes counted from 1, such as "1/4"; got {text!r}')
    return int(first), int(last)


def shard_of(jobs: Sequence[SlideJob], shard: tuple[int, int]) -> list[SlideJob]:
    """The jobs of the i-th of n processes.

    A slide's place follows from its name alone: processes that see other slides, or see them in another order, still
    share them without a slide that is done twice or by nobody.
    """
    return [job for job in jobs if _place(job.slide_id, shard[1]) == shard[0]]


def _place(slide_id: str, parts: int) -> int:
    return int.from_bytes(hashlib.sha256(slide_id.encode()).digest()[:8]) % parts + 1
