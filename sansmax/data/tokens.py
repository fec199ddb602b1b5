"""A huge picture in bands of patches: pixels become floating-point numbers one band at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sansmax.data.images import read_image, to_tensor
from sansmax.errors import InputError


@runtime_checkable
class TokenSource(Protocol):
    """A picture as a grid of patches, read in bands of whole rows of patches."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        ...

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        ...

    def read(self, row0: int, row1: int) -> Float[Tensor, "1 c h w"]:
        """Rows row0 ... row1 - 1 of patches as normalised pixels, (1, C, (row1 - row0) * ph, columns * pw)."""
        ...

    def bands(self, rows_per_band: int) -> Iterator[Float[Tensor, "1 c h w"]]:
        """The whole picture, from the top, in bands of at most `rows_per_band` rows of patches."""
        ...


class PixelSource:
    """A `TokenSource` over an array of pixels, in memory or memory-mapped; only the band that is read is copied.

    `pixels` is (H, W) or (H, W, 3), uint8 or uint16, of any strides; `mean` and `std` are in units of [0, 1].
    A height or width that is no multiple of the patch is filled up by repeating the last row or column: every patch
    of the grid is a real token, and there is no mask.
    """

    def __init__(
        self,
        pixels: np.ndarray,
        patch_size: int | tuple[int, int],
        *,
        in_chans: int = 3,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
    ):
        _check_picture(pixels, "pixels")
        self.pixels, self.in_chans = pixels, in_chans
        self._patch = (patch_size, patch_size) if isinstance(patch_size, int) else (patch_size[0], patch_size[1])
        if min(self._patch) < 1:
            raise InputError(f"patches must be at least 1 px, {self._patch} was given")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, in_chans):
                raise InputError(f"{name} has {len(values)} values for {in_chans} channels")
        self._mean = torch.tensor(mean, dtype=torch.float32)[:, None, None]
        self._std = torch.tensor(std, dtype=torch.float32)[:, None, None]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.pixels.shape[:2]
        return -(-height // self._patch[0]), -(-width // self._patch[1])

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        return self._patch

    def read(self, row0: int, row1: int) -> Float[Tensor, "1 c h w"]:
        """Rows row0 ... row1 - 1 of patches as normalised pixels."""
        rows, columns = self.grid
        if not 0 <= row0 < row1 <= rows:
            raise InputError(f"rows {row0} to {row1} of patches were asked for, the picture has {rows}")
        ph, pw = self._patch
        band = np.asarray(self.pixels[row0 * ph : row1 * ph])
        spare = ((0, (row1 - row0) * ph - band.shape[0]), (0, columns * pw - band.shape[1]), (0, 0))
        if any(after for _, after in spare):
            band = np.pad(band, spare[: band.ndim], mode="edge")
        return to_tensor(band, self.in_chans).sub_(self._mean).div_(self._std)[None]

    def bands(self, rows_per_band: int) -> Iterator[Float[Tensor, "1 c h w"]]:
        """The whole picture in bands of at most `rows_per_band` rows of patches."""
        if rows_per_band < 1:
            raise InputError(f"a band has at least 1 row of patches, {rows_per_band} was given")
        rows = self.grid[0]
        for row in range(0, rows, rows_per_band):
            yield self.read(row, min(row + rows_per_band, rows))


def open_pixels(path: str | Path) -> np.ndarray:
    """The pixels of a picture file, (H, W) or (H, W, 3), uint8 or uint16.

    `.npy` and TIFF without compression are memory-mapped, read-only; other files are decoded into memory.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy" and path.is_file():
        try:
            pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as e:
            raise InputError(f"cannot read {path}: it is damaged, or no .npy file ({e}); write it again") from None
        _check_picture(pixels, str(path))
        return pixels
    if path.suffix.lower() in (".tif", ".tiff") and path.is_file():
        mapped = _mapped_tiff(path)
        if mapped is not None:
            return mapped
    return read_image(path)


def _check_picture(pixels: np.ndarray, what: str) -> None:
    shaped = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)
    if not shaped or 0 in pixels.shape or pixels.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise InputError(f"{what}: {pixels.dtype} {pixels.shape}; allowed are (H, W) and (H, W, 3) of uint8 or uint16")


def _mapped_tiff(path: Path) -> np.ndarray | None:
    """The pixels where they lie in the file; None where they have to be decoded."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages.first
            dtype = page.dtype
            plain = (
                len(tiff.pages) == 1
                and page.is_memmappable
                and page.photometric in (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB)
                and page.bitspersample in (8, 16)
                and page.tags.valueof("Orientation", 1) == 1
                and dtype is not None
                and dtype.kind == "u"
                and (len(page.shape) == 2 or (len(page.shape) == 3 and page.shape[2] == 3))
            )
            if not plain or dtype is None or page.dataoffsets[0] + page.nbytes > path.stat().st_size:
                return None
            return np.memmap(path, dtype.newbyteorder(tiff.byteorder), "r", page.dataoffsets[0], page.shape)
    except (tifffile.TiffFileError, OSError, ValueError, IndexError, KeyError):
        # read_image says what is wrong with it
        return None
