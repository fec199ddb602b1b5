"""What decides the features of a slide, and what only decides how fast they are there."""

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sansmax.data.bags.layouts import layout_named
from sansmax.engine.encoders import PRECISIONS, Encoder, EncoderSpec
from sansmax.errors import InputError, unknown_name

# of all that bags are written in, those that keep where the tiles are
LAYOUTS = ("sansmax", "trident", "clam", "stamp")


@dataclass(frozen=True)
class TileSettings:
    """Which tiles a slide has.

    `tile_px` is the side of a tile in pixels as it is read, `tile_mpp` micrometres per pixel of those, `overlap_px`
    counts the same pixels. `min_tissue` is the least share of tissue in a tile.
    """

    tile_px: int = 256
    tile_mpp: float = 0.5
    overlap_px: int = 0
    min_tissue: float = 0.25

    def __post_init__(self) -> None:
        if self.tile_px < 1 or not (math.isfinite(self.tile_mpp) and self.tile_mpp > 0):
            raise InputError(
                f"a tile has at least one pixel and a resolution above 0, got {self.tile_px} px of {self.tile_mpp} um"
            )
        if not 0 <= self.overlap_px < self.tile_px:
            raise InputError(f"--overlap is from 0 to less than the {self.tile_px} px of a tile, got {self.overlap_px}")
        if not 0 <= self.min_tissue <= 1:
            raise InputError(f"--min-tissue is a share from 0 to 1, got {self.min_tissue}")

    @classmethod
    def of(cls, tile_px: int, tile_um: float | None, tile_mpp: float | None, **rest: Any) -> "TileSettings":
        """From the side in micrometres or from the resolution, whichever is given; 0.5 um per pixel without both."""
        if tile_um is not None and tile_mpp is not None and not math.isclose(tile_um, tile_px * tile_mpp, rel_tol=1e-6):
            raise InputError(
                f"{tile_px} px of {tile_mpp} um are {tile_px * tile_mpp:g} um and not --tile-um {tile_um:g}; "
                "give one of --tile-um and --tile-mpp"
            )
        if tile_um is not None:
            return cls(tile_px, tile_um / max(tile_px, 1), **rest)
        return cls(tile_px, 0.5 if tile_mpp is None else tile_mpp, **rest)


@dataclass(frozen=True)
class Plan:
    """One job of making features: what is made, and how. It travels to other processes and machines.

    `encoder` is None where only tissue is to be found. `dtype` is that of the features in the file; None takes
    float32 for fp32 and float16 for bf16, or the one dtype of the layout. `tissue` is a folder of GeoJSON files that
    are used in place of found tissue. `workers` is the number of processes that read tiles.
    """

    output: Path
    encoder: EncoderSpec | None
    tiles: TileSettings = TileSettings()
    layout: str = "sansmax"
    dtype: str | None = None
    tissue: Path | None = None
    batch_size: int = 32
    workers: int = 2

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise unknown_name("layout", self.layout, LAYOUTS)
        if self.dtype is not None and self.dtype not in (dtypes := layout_named(self.layout).dtypes):
            raise InputError(
                f"the layout {self.layout} keeps features as {' or '.join(dtypes)}, got --dtype {self.dtype}"
            )
        if self.encoder is not None and self.encoder.precision not in PRECISIONS:
            raise unknown_name("precision", self.encoder.precision, PRECISIONS)
        if self.batch_size < 1:
            raise InputError(f"--batch-size is at least 1, got {self.batch_size}")
        if self.workers < 0:
            raise InputError(f"--workers is 0 or more, got {self.workers}")
        if self.tissue is not None and not self.tissue.is_dir():
            raise InputError(f"--tissue {self.tissue} is no folder; give the folder of the edited GeoJSON files")

    @property
    def stored_dtype(self) -> str:
        """The dtype of the features in the file."""
        half = self.encoder is not None and self.encoder.precision == "bf16"
        usual, allowed = "float16" if half else "float32", layout_named(self.layout).dtypes
        return self.dtype or (usual if usual in allowed else allowed[0])

    def settings(self, encoder: Encoder, mpp: float | None) -> dict[str, Any]:
        """All that decides the features of a slide whose resolution is given by hand as `mpp`, or not."""
        return {
            "encoder": encoder.spec.name,
            "encoder_sha256": encoder.sha256,
            "transform": encoder.transform,
            "precision": encoder.spec.precision,
            "dtype": self.stored_dtype,
            "layout": self.layout,
            **vars(self.tiles),
            "mpp": mpp,
        }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting that differs; the name of an encoder counts only with its weights."""
    names = [n for n in now if n != "encoder" and before.get(n) != now[n]]
    if "encoder_sha256" in names:
        names.remove("encoder_sha256")
        old, new = ({"name": s.get("encoder"), "weights": str(s.get("encoder_sha256"))[:12]} for s in (before, now))
        first = f"encoder: {old['name']} (weights {old['weights']}) -> {new['name']} (weights {new['weights']})"
        return [first, *(f"{n}: {before.get(n)} -> {now[n]}" for n in names)]
    return [f"{n}: {before.get(n)} -> {now[n]}" for n in names]


def default_workers() -> int:
    """As many processes that read as there are processors for this one, eight at most."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores, 8)
