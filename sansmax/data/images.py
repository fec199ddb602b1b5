"""One image file as an array, every bit of it, and as a tensor.

`read_image` gives (H, W) grey or (H, W, 3) colour, uint8 or uint16, upright, transparent parts over white.
Pillow reads the usual formats; imagecodecs reads 16 bit PNG, of which Pillow keeps only 8 bits in colour; tifffile
reads TIFF; pydicom and nibabel read DICOM and NIfTI as a reader is meant to see them. No global switch of Pillow is
touched: its plugins are opened directly, past the limit on picture size.
"""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sansmax.errors import InputError

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2", ".pgm", ".ppm", ".pbm", ".pnm"}
    | {".dcm", ".nii"}
)
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# Those of Pillow's formats that begin with a mark of their own and hold one picture of pixels
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "JPEG2000", "PPM", "AVIF", "SGI", "PCX")
_ORIENTATION = 0x0112
# What the decoders raise on damaged bytes; MemoryError: a header that promises more pixels than memory holds.
_DAMAGE = (OSError, SyntaxError, ValueError, RuntimeError, EOFError, IndexError, KeyError, TypeError, struct.error)
# ITU-R BT.601, the weights of Pillow and of torchvision
_LUMINANCE = (0.299, 0.587, 0.114)


def read_image(path: str | Path) -> np.ndarray:
    """The pixels of one image file: (H, W) or (H, W, 3), uint8 or uint16.

    Values are those of the file: 16 bit stay 16 bit, 1 bit becomes 0 and 255, a palette becomes its colours. The
    orientation that a camera noted is applied; TIFF with white as zero is inverted. DICOM is rescaled, windowed and
    inverted where it says so; of NIfTI, 0 and 65535 are the 0.5th and the 99.5th percentile. A file that cannot be
    read, or holds several pages, frames or slices, is an `InputError`.
    """
    path = Path(path)
    data = _bytes_of(path)
    try:
        # the 128 bytes before the mark of DICOM may be the beginning of a TIFF
        if is_dicom(data):
            return _read_dicom(path)
        if data.startswith(_TIFF_STARTS):
            return _read_tiff(path)
        if is_nifti(data, path):
            return _read_nifti(path)
        if data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) > 25 and data[24] == 16:
            return _read_png16(data)
        return _read_pillow(data)
    except InputError as e:
        raise InputError(f"cannot read {path}: {e}") from None
    except MemoryError:
        raise InputError(f"cannot read {path}: its pixels do not fit in memory, or its header is damaged") from None
    except _DAMAGE as e:
        reason = str(e).strip().rstrip(".") or type(e).__name__
        raise InputError(
            f"cannot read {path}: the file is damaged or cut short ({reason}); replace it, or pass --skip-bad"
        ) from e


def to_tensor(pixels: np.ndarray, in_chans: int) -> Float[Tensor, "c h w"]:
    """The pixels as float32 in [0, 1], channels first.

    uint8 is divided by 255 and uint16 by 65535. Grey is repeated to three channels; colour becomes grey by
    luminance (0.299 R + 0.587 G + 0.114 B) where `in_chans` is 1.
    """
    if in_chans not in (1, 3):
        raise InputError(
            f"images have 1 or 3 channels, in_chans={in_chans} was given; use a model with in_chans 1 or 3"
        )
    check_pixels(pixels)
    largest = np.iinfo(pixels.dtype).max
    if pixels.dtype == np.uint8:
        # a copy, since torch refuses to share memory that must not be written
        x = torch.from_numpy(np.array(pixels, order="C")).float()
    else:
        x = torch.from_numpy(pixels.astype(np.float32))
    x = x.div_(largest)
    if x.ndim == 2:
        return x.expand(in_chans, -1, -1).contiguous()
    x = x.permute(2, 0, 1)
    if in_chans == 1:
        return luminance(x).clamp_(max=1.0)
    return x.contiguous()


def luminance(colour: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 1 h w"]:
    """Colour as grey: 0.299 R + 0.587 G + 0.114 B."""
    red, green, blue = (w * colour.select(-3, c) for c, w in enumerate(_LUMINANCE))
    return (red + green + blue).unsqueeze(-3)


def check_pixels(pixels: np.ndarray) -> None:
    """Refuses an array that is not (H, W) or (H, W, 3) of uint8 or uint16."""
    if pixels.dtype.kind != "u" or pixels.dtype.itemsize > 2:
        raise InputError(f"pixels must be uint8 or uint16, these are {pixels.dtype}; scale them to 0 ... 65535 first")
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)) or 0 in pixels.shape:
        raise InputError(f"pixels must be (H, W) or (H, W, 3), these are {pixels.shape}")


def is_dicom(start: bytes) -> bool:
    """Whether a file that starts with these bytes (132 at least) is DICOM."""
    return start[128:132] == b"DICM"


def is_nifti(start: bytes, path: Path) -> bool:
    """Whether a file that starts with these bytes (348 at least) is NIfTI; packed ones are known by their name."""
    packed = start.startswith(b"\x1f\x8b") and path.name.lower().endswith(".nii.gz")
    return packed or start[344:347] in (b"n+1", b"ni1") or start[4:7] == b"n+2"


def _read_dicom(path: Path) -> np.ndarray:
    from sansmax.data.slides.dicom_pixels import frame_pixels
    from sansmax.data.slides.dicom_reader import frames, read_header

    dataset = read_header(path)
    if frames(dataset) > 1:
        raise InputError(f"it holds {frames(dataset)} frames, one is allowed; save the frame you need as its own file")
    return frame_pixels(dataset, path, 0)


def _read_nifti(path: Path) -> np.ndarray:
    from sansmax.data.slides.nifti_reader import load_volume, slice_pixels, slices

    volume = load_volume(path)
    if slices(volume) > 1:
        raise InputError(f"it holds {slices(volume)} slices, one is allowed; save the slice you need as its own file")
    return slice_pixels(volume, path, 0)


def _bytes_of(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"cannot read {path}: it is a folder; give an image file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"cannot read {path}: no such file; correct the path, or pass --skip-bad") from None
    except OSError as e:
        raise InputError(f"cannot read {path}: {e.strerror}; check the permissions, or pass --skip-bad") from None
    if not data:
        raise InputError(f"cannot read {path}: the file is empty; replace it, or pass --skip-bad")
    return data


def _read_png16(data: bytes) -> np.ndarray:
    import imagecodecs

    pixels = np.asarray(imagecodecs.png_decode(data))
    return _upright(_flatten_alpha(pixels), _png_orientation(data))


def _png_orientation(data: bytes) -> int:
    with open_pillow(data) as image:
        return int(image.getexif().get(_ORIENTATION, 1))


def _read_pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    try:
        image = open_pillow(data)
    except Image.DecompressionBombError:
        return _read_huge_webp(data)
    with image:
        frames = getattr(image, "n_frames", 1)
        # MPO: cameras store a preview after the picture
        if frames > 1 and image.format != "MPO":
            raise InputError(f"it holds {frames} frames, one is allowed; save the frame you need as its own file")
        orientation = int(image.getexif().get(_ORIENTATION, 1))
        return _upright(_pillow_pixels(image), orientation)


def open_pillow(data: bytes) -> Any:
    """What `PIL.Image.open` gives, without its limit on the number of pixels."""
    from PIL import Image

    Image.init()
    for name in _FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(data[:16]) and not isinstance(accept(data[:16]), str):
            return factory(io.BytesIO(data), "")
    raise InputError("it is no image, or of a kind that cannot be read; convert it to PNG or TIFF, or pass --skip-bad")


def _read_huge_webp(data: bytes) -> np.ndarray:
    import imagecodecs

    return _flatten_alpha(np.asarray(imagecodecs.webp_decode(data)))


def _pillow_pixels(image: Any) -> np.ndarray:
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 65535:
            raise InputError(f"its values run from {wide.min()} to {wide.max()}; save it with 8 or 16 bits")
        return wide.astype(np.uint16)
    if image.mode == "F":
        raise InputError("its values are floating-point numbers; save it with 8 or 16 bits")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        grey = image.mode in ("L", "LA", "La", "1")
        return _flatten_alpha(np.asarray(image.convert("RGBA").convert("LA") if grey else image.convert("RGBA")))
    if image.mode == "P":
        return _palette_pixels(image)
    if image.mode in ("1", "L"):
        return np.array(image.convert("L"))
    return np.array(image.convert("RGB"))


def _palette_pixels(image: Any) -> np.ndarray:
    rgb = np.array(image.convert("RGB"))
    # a palette of greys is how 8 bit grey is kept in GIF and BMP
    grey = (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all()
    return np.ascontiguousarray(rgb[..., 0]) if grey else rgb


def _flatten_alpha(pixels: np.ndarray, *, premultiplied: bool = False) -> np.ndarray:
    """(H, W, 2 or 4) with alpha last over white; without it unchanged."""
    if pixels.ndim == 2 or pixels.shape[2] in (1, 3):
        return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    colour, alpha = pixels[..., :-1], pixels[..., -1:]
    largest = np.iinfo(pixels.dtype).max
    if (alpha != largest).any():
        share = alpha.astype(np.float32) / largest
        front = colour.astype(np.float32) * (1 if premultiplied else share)
        colour = np.rint(np.minimum(front + (1 - share) * largest, largest)).astype(pixels.dtype)
    return np.ascontiguousarray(colour[..., 0] if colour.shape[2] == 1 else colour)


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes the turn that an EXIF or TIFF orientation tag (1 ... 8) notes."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _read_tiff(path: Path) -> np.ndarray:
    import tifffile

    with tifffile.TiffFile(path) as tiff:
        if len(tiff.pages) != 1:
            raise InputError(
                f"the TIFF holds {len(tiff.pages)} pages, one is allowed; save the page you need as its own file"
            )
        page = tiff.pages.first
        pixels = page.asarray()
        if page.planarconfig == 2 and pixels.ndim == 3:
            pixels = np.moveaxis(pixels, 0, -1)
        pixels = tiff_colours(page, pixels)
        orientation = page.tags.valueof(_ORIENTATION, 1)
    return _upright(pixels, int(orientation))


def tiff_colours(page: Any, pixels: np.ndarray) -> np.ndarray:
    """Full-range grey or colour from the samples of one TIFF page."""
    from tifffile import PHOTOMETRIC as P

    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    if pixels.ndim not in (2, 3) or channels > 4:
        raise InputError(f"its shape is {pixels.shape}, allowed are (H, W) and (H, W, 3); save one plane as a file")
    if pixels.dtype.kind not in "ub" or pixels.dtype.itemsize > 2:
        raise InputError(f"its values are {pixels.dtype}, allowed are 8 and 16 bit unsigned; convert it")
    if page.photometric == P.PALETTE:
        return np.take(np.asarray(page.colormap) >> 8, pixels, axis=1).transpose(1, 2, 0).astype(np.uint8)
    if page.photometric not in (P.MINISBLACK, P.MINISWHITE, P.RGB, P.YCBCR):
        raise InputError(f"its colours are {P(page.photometric).name}; convert it to grey or RGB")
    pixels = _full_range(pixels, page.bitspersample)
    base = 3 if page.photometric in (P.RGB, P.YCBCR) else 1
    if channels < base:
        raise InputError(f"its shape is {pixels.shape}, which does not fit its colours; convert it to grey or RGB")
    if page.photometric == P.MINISWHITE:
        largest = np.iinfo(pixels.dtype).max
        pixels = np.concatenate([largest - pixels[..., :1], pixels[..., 1:]], -1) if channels > 1 else largest - pixels
    if channels > base:
        kind = int(page.extrasamples[0]) if page.extrasamples else 0
        # 0: a channel of no stated meaning, 1 and 2: alpha, multiplied into the colours or not
        pixels = pixels[..., : base + (kind in (1, 2))]
        return _flatten_alpha(pixels, premultiplied=kind == 1)
    return pixels


def _full_range(pixels: np.ndarray, bits: Any) -> np.ndarray:
    """Samples of 1, 4, 12, ... bits spread over 8 or 16."""
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    bits = bits if isinstance(bits, int) else max(bits)
    whole = 8 * pixels.dtype.itemsize
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    if bits in (8, 16) or bits > whole:
        return pixels
    return (pixels.astype(np.uint32) * (2**whole - 1) // (2**bits - 1)).astype(pixels.dtype)
