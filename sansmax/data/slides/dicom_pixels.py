"""The pixels of one DICOM frame as a person is meant to see them: rescaled, windowed, in colour, black as zero.

Grey goes through the modality LUT (or slope and intercept), then the VOI LUT or the first window, over the range of
the frame where there is neither; MONOCHROME1 is inverted. Palettes become their colours, YBR becomes RGB.
https://dicom.nema.org/medical/dicom/current/output/chtml/part03/sect_C.11.2.html
"""

from typing import Any

import numpy as np

from sansmax.data.slides.slide import SlideError
from sansmax.optional import need

# What pydicom and its decoders raise on damaged bytes, tags that are missing, syntaxes that nothing decodes
DAMAGE = (
    OSError,
    ValueError,
    RuntimeError,
    AttributeError,
    KeyError,
    IndexError,
    TypeError,
    NotImplementedError,
    EOFError,
)


def frame_pixels(dataset: Any, path: Any, frame: int) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8 or uint16 of one frame; 16 bit where more than 8 are stored.

    `dataset` is the header, `path` the file: only the bytes of this frame are decoded.
    """
    try:
        pixels = need("pydicom.pixels", "slides").pixel_array(path, index=frame)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            colours = need("pydicom.pixels", "slides").apply_color_lut(pixels, dataset)
            return _eight_bit(colours, dataset)
        if pixels.ndim == 3:
            return _full_range(pixels, dataset)
        return _windowed(pixels, dataset, frame)
    except DAMAGE as e:
        raise SlideError(
            f"cannot read frame {frame} of {path}: {_first_line(e)}; the file is damaged, or of a kind that needs "
            'another decoder: pip install "sansmax[slides]" pylibjpeg-libjpeg'
        ) from e


def frame_item(dataset: Any, frame: int, name: str) -> Any:
    """The data set that holds what `name` says of a frame: its own, the shared one, or the file's top level."""
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        sequence = dataset.get(groups)
        if sequence and index < len(sequence) and sequence[index].get(name):
            return sequence[index].get(name)[0]
    return dataset


def window_unit(values: np.ndarray, centre: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """The window of DICOM PS3.3 C.11.2.1.2 and C.11.2.1.3 as float64 in [0, 1]: LINEAR, LINEAR_EXACT or SIGMOID."""
    values = values.astype(np.float64)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (values - centre) / width, -700, 700)))
    if function == "LINEAR_EXACT":
        return np.clip((values - centre) / width + 0.5, 0, 1)
    if width <= 1:
        return (values > centre - 0.5).astype(np.float64)
    return np.clip((values - (centre - 0.5)) / (width - 1) + 0.5, 0, 1)


def _windowed(stored: np.ndarray, dataset: Any, frame: int) -> np.ndarray:
    voi = frame_item(dataset, frame, "FrameVOILUTSequence")
    values = _rescaled(stored, dataset, frame)
    if voi.get("VOILUTSequence"):
        lut = need("pydicom.pixels", "slides").apply_voi(values.astype(np.int64), voi)
        depth = int(voi.VOILUTSequence[0].LUTDescriptor[2])
        unit = lut.astype(np.float64) / (2**depth - 1)
    elif voi.get("WindowCenter") is not None and voi.get("WindowWidth") is not None:
        centre, width = (_first(voi.get(name)) for name in ("WindowCenter", "WindowWidth"))
        unit = window_unit(values, centre, width, str(voi.get("VOILUTFunction") or "LINEAR"))
    else:
        unit = _over_its_range(values, stored, dataset)
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        unit = 1 - unit
    deep = int(dataset.BitsStored) > 8
    return np.rint(np.clip(unit, 0, 1) * (65535 if deep else 255)).astype(np.uint16 if deep else np.uint8)


def _rescaled(stored: np.ndarray, dataset: Any, frame: int) -> np.ndarray:
    item = frame_item(dataset, frame, "PixelValueTransformationSequence")
    if item is dataset and dataset.get("ModalityLUTSequence"):
        return need("pydicom.pixels", "slides").apply_modality_lut(stored, dataset)
    slope, intercept = _first(item.get("RescaleSlope"), 1.0), _first(item.get("RescaleIntercept"), 0.0)
    return stored.astype(np.float64) * slope + intercept


def _over_its_range(values: np.ndarray, stored: np.ndarray, dataset: Any) -> np.ndarray:
    """The values from smallest to largest as [0, 1]; padding around the picture does not count."""
    padding = dataset.get("PixelPaddingValue")
    real = stored != padding if isinstance(padding, int) and (stored != padding).any() else np.ones(stored.shape, bool)
    low, high = float(values[real].min()), float(values[real].max())
    return np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros(values.shape)


def _full_range(pixels: np.ndarray, dataset: Any) -> np.ndarray:
    bits = int(dataset.BitsStored)
    if bits == 8 or (bits == 16 and pixels.dtype == np.uint16):
        return pixels
    whole = 8 if bits < 8 else 16
    scaled = pixels.astype(np.uint64) * (2**whole - 1) // (2**bits - 1)
    return scaled.astype(np.uint8 if whole == 8 else np.uint16)


def _eight_bit(colours: np.ndarray, dataset: Any) -> np.ndarray:
    depth = int(dataset.RedPaletteColorLookupTableDescriptor[2])
    return (colours[..., :3] >> (depth - 8)).astype(np.uint8) if depth > 8 else colours[..., :3].astype(np.uint8)


def _first(value: Any, default: float = 0.0) -> float:
    if value is None or value == "":
        return default
    return float(value[0] if not isinstance(value, str) and hasattr(value, "__getitem__") else value)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
