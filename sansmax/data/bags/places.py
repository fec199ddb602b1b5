"""Which files of a folder are bags: CLAM's two folders, TRIDENT's jobs, STAMP's nested folders, or a flat one."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sansmax.data.bags.contents import SUFFIXES
from sansmax.data.bags.slideflow import INDEX
from sansmax.errors import InputError, nearest

_JOB = "*x_*px_*px_overlap"
_FIRST = 10


class Places(NamedTuple):
    """Files of bags by slide id, and words on where they were found."""

    files: dict[str, Path]
    note: str


def find_bags(path: str | Path) -> Places:
    """The files of bags in a folder, or the one file `path`, by slide id (the name without its suffix).

    InputError where there are none, where several sets of features are there to choose from, and where two files have
    the same slide id.
    """
    path = Path(path).expanduser()
    if path.is_file():
        return Places({path.stem: path}, "one file")
    if not path.is_dir():
        raise _missing(path)
    if files := _bags_in(path):
        return Places(_by_id(files), "a folder of files")
    if (path / "h5_files").is_dir() or (path / "pt_files").is_dir():
        return _clam(path)
    if (job := _trident(path)) is not None:
        return job
    nested = sorted(p for p in path.rglob("*") if _is_bag(p))
    if nested:
        return Places(_by_id(nested), "files in sub-folders")
    raise InputError(f"{path} holds no bags: no file *{', *'.join(SUFFIXES)}, in it or below it")


def _is_bag(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts[-2:])
    return path.suffix.lower() in SUFFIXES and not hidden and not path.name.endswith(INDEX) and path.is_file()


def _bags_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if _is_bag(p))


def _by_id(files: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    twice = []
    for file in files:
        if file.stem in found:
            twice.append(f"{found[file.stem]} and {file}")
        else:
            found[file.stem] = file
    if twice:
        raise InputError(
            f"slide ids that are there twice: {_listed(twice)}. A slide has one bag; give the folder of one "
            "set of features, or remove the others"
        )
    return dict(sorted(found.items()))


def _listed(words: list[str]) -> str:
    return "; ".join(words[:_FIRST]) + (f"; and {len(words) - _FIRST} more" if len(words) > _FIRST else "")


def _clam(path: Path) -> Places:
    """h5_files knows the places, pt_files does not."""
    both = {name: _bags_in(path / name) if (path / name).is_dir() else [] for name in ("h5_files", "pt_files")}
    taken = "h5_files" if both["h5_files"] else "pt_files"
    if not both[taken]:
        raise InputError(f"{path}/h5_files and pt_files hold no bags; run the extraction of features first")
    files = _by_id(both[taken])
    note = f"CLAM's {taken}"
    if taken == "h5_files" and (missing := [p.stem for p in both["pt_files"] if p.stem not in files]):
        note += f" ({len(missing)} slides are in pt_files only and left out: {_listed(missing)})"
    return Places(files, note)


def _trident(path: Path) -> Places | None:
    """A job's folder, or one of its folders of a magnification."""
    places = [path, *sorted(p for p in path.glob(_JOB) if p.is_dir())]
    below = [p for place in places for p in sorted(place.iterdir()) if p.is_dir()]
    tiles = [p for p in below if p.name.startswith(("features_", "patch_features_")) and _bags_in(p)]
    if len(tiles) > 1:
        names = ", ".join(str(p.relative_to(path)) for p in tiles)
        raise InputError(f"{path} holds several sets of features: {names}; give the folder of one of them")
    if tiles:
        return Places(_by_id(_bags_in(tiles[0])), f"TRIDENT's folder {tiles[0].relative_to(path)}")
    if slides := [p.name for p in below if p.name.startswith("slide_features_")]:
        raise InputError(
            f"{path} holds embeddings of whole slides ({', '.join(slides)}), no features of tiles; extract them with "
            "TRIDENT's --task feat --patch_encoder NAME"
        )
    if any(p.name == "patches" for p in below):
        raise InputError(
            f"{path} holds coordinates of tiles, no features; extract them first, with the tool that made them or with "
            "`sansmax tokenize`"
        )
    return None


def _missing(path: Path) -> InputError:
    like = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else []
    hint = f"; did you mean {' or '.join(repr(str(path.parent / name)) for name in like)}?" if like else ""
    return InputError(f"there is no file or folder {path}{hint or f', relative to {Path.cwd()}'}")
