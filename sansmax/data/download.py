"""Fetches one file: continued after a broken connection, checked by its MD5 sum, put in place whole or not at all."""

import contextlib
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from sansmax.errors import InputError

_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Where downloads are kept: `$SANSMAX_CACHE`, or `~/.cache/sansmax`."""
    given = os.environ.get("SANSMAX_CACHE")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "sansmax"


def md5_of(path: Path) -> str:
    """The MD5 sum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def download(
    url: str, path: Path, md5: str, progress: Callable[[int, int], object] | None = None, timeout: float = 30.0
) -> Path:
    """The file at `url` as `path`, fetched where it is not there yet.

    What arrived before the connection broke stays in `path` + `.part`, and the next call continues there. A file
    with another MD5 sum is removed and reported. `progress(done, total)` is called with bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with _alone(part):
        # another process may have fetched it meanwhile
        if path.exists():
            return path
        try:
            _fetch(url, part, progress, timeout)
        except (OSError, http.client.HTTPException) as e:
            reason = getattr(e, "reason", None) or e
            raise InputError(
                f"cannot fetch {url} ({reason}); try again, which continues the download, or fetch it by hand "
                f"and save it as {path}"
            ) from e
        got = md5_of(part)
        if got != md5:
            part.unlink()
            raise InputError(
                f"{url} came with the MD5 sum {got}, expected is {md5}; the bad download was removed: try again, "
                f"or fetch it by hand and save it as {path}"
            )
        part.replace(path)
    return path


def _fetch(url: str, part: Path, progress: Callable[[int, int], object] | None, timeout: float) -> None:
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as e:
        e.close()
        # 416: there is nothing after what is here already
        if e.code == 416 and done:
            return
        raise OSError(f"HTTP status {e.code}") from None
    with response:
        if response.status != 206:
            done = 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length is not None else 0
        with part.open("ab" if done else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, max(total, done))
    if done < total:
        raise OSError(f"the connection broke after {done} of {total} bytes")


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Lets one process at a time write `part`."""
    try:
        import fcntl
    except ImportError:
        # Windows: two downloads at once end in a wrong MD5 sum, which is reported
        yield
        return
    # the empty lock file stays: removing it would let two processes hold a lock each
    with part.with_name(f".{part.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
