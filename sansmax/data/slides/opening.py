"""Opens slides, whatever kind of file they are, and finds those in folders. Files are recognised by their content."""

import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sansmax.data.images import is_dicom, is_nifti
from sansmax.data.slides import openslide_reader
from sansmax.data.slides.dicom_reader import one_per_series, open_dicom
from sansmax.data.slides.levels import LevelSlide
from sansmax.data.slides.nifti_reader import open_nifti
from sansmax.data.slides.openslide_reader import OpenSlideSlide
from sansmax.data.slides.picture_reader import ArraySlide, PictureSlide, open_npy
from sansmax.data.slides.slide import Slide, SlideError
from sansmax.data.slides.tiff_reader import TiffSlide, check_whole
from sansmax.errors import InputError

_SCANNERS = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide")
_TIFF = (".ome.tiff", ".ome.tif", ".tiff", ".tif", ".btf", ".tf8")
_OTHERS = (".dcm", ".dicom", ".nii.gz", ".nii", ".npy", ".png", ".jpg", ".jpeg", ".jp2", ".webp", ".bmp")
# compound ones first: the longest that fits is the suffix
SLIDE_SUFFIXES: tuple[str, ...] = tuple(sorted(_SCANNERS + _TIFF + _OTHERS, key=lambda s: (-s.count("."), -len(s), s)))
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def open_slide(path: str | Path | np.ndarray, *, mpp: float | None = None, frame: int | None = None) -> Slide:
    """A slide: a file of any supported kind, or pixels (H, W) or (H, W, 3), uint8 or uint16.

    `mpp` is micrometres per level-0 pixel; it goes before what the file says, with a warning where both differ by more
    than a tenth. `frame` chooses one page, frame or slice of a file that holds several. Raises `SlideError` for
    files that are missing, damaged, or of no known kind.
    """
    if mpp is not None and not 0 < mpp < float("inf"):
        raise InputError(f"micrometres per pixel must be a positive number, {mpp} was given")
    if isinstance(path, np.ndarray):
        return ArraySlide(path, mpp=mpp)
    path = Path(path)
    slide = _open_file(path, _first_bytes(path), frame)
    if mpp is not None:
        if slide.mpp is not None and abs(slide.mpp / mpp - 1) > 0.1:
            warnings.warn(
                f"{path} says {slide.mpp:g} micrometres per pixel, the {mpp:g} that was given goes before", stacklevel=2
            )
        slide.mpp = mpp
    return slide


def slide_id(path: str | Path) -> str:
    """The file name without its suffix; `.ome.tif`, `.nii.gz` and their like go as one, unknown suffixes stay."""
    name = Path(path).name
    for suffix in SLIDE_SUFFIXES:
        if name.lower().endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


def find_slides(paths: Iterable[str | Path] | str | Path) -> list[Path]:
    """The slides among files and in folders (searched with their sub-folders), sorted by id.

    In a folder, the DICOM files of one slide (a file per level) count as one: that of the finest level.
    Raises InputError for files of another suffix, folders without a slide, and ids that two files share; all of the
    latter are listed.
    """
    paths = [paths] if isinstance(paths, str | Path) else list(paths)
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = one_per_series([p for p in path.rglob("*") if _is_slide(p)])
            if not inside:
                raise InputError(f"the folder {path} holds no slides; their suffixes are {_suffixes()}")
            found += inside
        elif not path.exists():
            raise InputError(f"no such file: {path}; correct the path")
        elif not path.name.lower().endswith(SLIDE_SUFFIXES):
            raise InputError(f"{path} has not the suffix of a slide; allowed are {_suffixes()}")
        else:
            found.append(path)
    return _distinct(found)


def _distinct(found: list[Path]) -> list[Path]:
    by_id: dict[str, list[Path]] = {}
    for path in {p.resolve(): p for p in found}.values():
        by_id.setdefault(slide_id(path), []).append(path)
    twice = {name: same for name, same in sorted(by_id.items()) if len(same) > 1}
    if twice:
        lines = [f"  {name}: {', '.join(map(str, sorted(same)))}" for name, same in twice.items()]
        raise InputError("\n".join(["slide ids must differ, these files share one; rename or leave out:", *lines]))
    return [by_id[name][0] for name in sorted(by_id)]


def _is_slide(path: Path) -> bool:
    hidden = path.name.startswith(".")
    return not hidden and path.name.lower().endswith(SLIDE_SUFFIXES) and path.is_file()


def _suffixes() -> str:
    return " ".join(sorted(SLIDE_SUFFIXES))


def _first_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise SlideError(f"cannot open {path}: it is a folder; give a slide file")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError:
        raise SlideError(f"cannot open {path}: no such file; correct the path") from None
    except OSError as e:
        raise SlideError(f"cannot open {path}: {e.strerror}; check the permissions") from None
    if not start:
        raise SlideError(f"cannot open {path}: the file is empty; copy or export it again")
    return start


def _open_file(path: Path, start: bytes, frame: int | None) -> LevelSlide:
    name = slide_id(path)
    if is_nifti(start, path):
        return open_nifti(path, name, frame=frame)
    if start.startswith(b"\x93NUMPY"):
        return open_npy(path, name)
    known = openslide_reader.vendor(path) if frame is None else None
    if is_dicom(start):
        return OpenSlideSlide(path, name) if known == "dicom" else open_dicom(path, name, frame=frame)
    if start.startswith(_TIFF_STARTS):
        return _open_tiff(path, name, known, frame)
    if known is not None:
        return OpenSlideSlide(path, name)
    if frame not in (None, 0):
        raise SlideError(f"frame {frame} of {path} was asked for, it has one")
    return PictureSlide(path, name)


def _open_tiff(path: Path, name: str, known: str | None, frame: int | None) -> LevelSlide:
    if known is None:
        return TiffSlide(path, name, frame=frame)
    try:
        slide = OpenSlideSlide(path, name)
    except SlideError:
        # OpenSlide refuses a file whose coarsest level is cut short; the finer ones may still be whole
        return TiffSlide(path, name, frame=frame)
    try:
        _check_tiff(path, slide.size)
    except BaseException:
        slide.close()
        raise
    return slide


def _check_tiff(path: Path, size: tuple[int, int]) -> None:
    """Refuses a slide whose level 0 is cut short: OpenSlide would notice at the first tile that is missing."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            if (page.imagewidth, page.imagelength) == size:
                check_whole(page, path)
    except InputError:
        raise
    except Exception:
        # a dialect that tifffile does not know is still OpenSlide's to read
        return
