"""Slides that OpenSlide reads: SVS, NDPI, MRXS, SCN, VMS, BIF, generic tiled TIFF, DICOM."""

import threading
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.slides.levels import LevelSlide, physical_mpp
from sansmax.data.slides.slide import SlideError
from sansmax.optional import need


def vendor(path: Path) -> str | None:
    """What OpenSlide takes the file for; None where it does not know it, or OpenSlide is not installed."""
    try:
        import openslide
    except (ImportError, OSError):
        return None
    try:
        return openslide.OpenSlide.detect_format(path)
    except openslide.OpenSlideError:
        return None


class OpenSlideSlide(LevelSlide):
    """A slide opened by OpenSlide. What it leaves transparent is white."""

    def __init__(self, path: str | Path, name: str, mpp: float | None = None):
        path = Path(path)
        self._openslide = need("openslide", "slides")
        self._lock = threading.Lock()
        self._file_path = path
        self._handle: Any = self._open()
        said = self._handle.properties
        found = physical_mpp(_number(said.get("openslide.mpp-x")), _number(said.get("openslide.mpp-y")))
        kind = f"{said.get('openslide.vendor', 'unknown')} (OpenSlide)"
        super().__init__(name, path, kind, [tuple(s) for s in self._handle.level_dimensions], mpp or found)

    def window(self, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
        """(height, width, 3) uint8 RGB of a window inside the level."""
        scale = self.levels[level].downsample
        corner = (round(x * scale), round(y * scale))
        try:
            picture = np.asarray(self._opened().read_region(corner, level, (width, height)))
        except self._openslide.OpenSlideError as e:
            # after an error OpenSlide refuses everything else on the handle, good levels too
            self._drop()
            raise SlideError(f"cannot read level {level} of {self.path} at {corner}: {e}; replace the file") from e
        alpha = picture[..., 3:]
        if alpha.min() == 255:
            return picture[..., :3]
        share = alpha.astype(np.float32) / 255
        return np.rint(picture[..., :3] * share + 255 * (1 - share)).astype(np.uint8)

    def close(self) -> None:
        """Closes the file; reading afterwards is an error."""
        super().close()
        self._drop()

    def _open(self) -> Any:
        try:
            return self._openslide.OpenSlide(self._file_path)
        except (self._openslide.OpenSlideError, OSError) as e:
            raise SlideError(f"cannot open {self._file_path}: {e}; the file is damaged, or of no known kind") from e

    def _opened(self) -> Any:
        with self._lock:
            if self._handle is None:
                self._handle = self._open()
            return self._handle

    def _drop(self) -> None:
        with self._lock:
            handle, self._handle = self._handle, None
        if handle is not None:
            handle.close()


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
