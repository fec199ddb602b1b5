"""Which features are no numbers: NaN and infinity, found at the speed of reading memory."""

import numpy as np

from sansmax.errors import InputError

# numbers that stay in the processor's cache
_BLOCK = 1 << 16


def all_finite(features: np.ndarray) -> bool:
    """Whether no entry is NaN or infinite; `features` is (N, D) of floats."""
    flat = np.ascontiguousarray(features).reshape(-1)
    blocks = (flat[start : start + _BLOCK] for start in range(0, len(flat), _BLOCK))
    if features.dtype == np.float16:
        # numpy converts halves one by one; their bits tell, and are quick to compare
        return all(int((block.view(np.uint16) & 0x7FFF).max()) < 0x7C00 for block in blocks)
    return all(bool(np.isfinite(block).all()) for block in blocks)


def bad_rows(features: np.ndarray) -> np.ndarray:
    """Indices of the rows that hold NaN or infinity, int64."""
    return np.flatnonzero(~np.isfinite(features).all(axis=1))


def require_finite(features: np.ndarray, slide_id: str) -> None:
    """InputError with the number of bad tiles and the first of them, where there are any."""
    if not all_finite(features):
        rows = bad_rows(features)
        first = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise InputError(
            f"slide {slide_id}: {len(rows)} of {len(features)} tiles have features that are NaN or infinite (rows "
            f"{first}); extract the slide again in float32 or bfloat16, or allow them with --allow-nan"
        )
