"""Small slides, the command that tokenizes them, and what it leaves."""

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from runs import sansmax

DATA = Path(os.environ.get("SANSMAX_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
ENCODER = "test_vit"
# the encoder reads 160 px; a tile of 0.5 um per pixel is 64 um wide
QUICK = ("--encoder", ENCODER, "--no-pretrained", "--tile-px", "128", "--workers", "0")


def real(name):
    """A file of the real data, or a skipped test with the reason."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there; name the folder of the real data by SANSMAX_TEST_DATA")
    return DATA / name


def pixels(seed, size=(768, 512), tissue=True):
    """(h, w, 3) of a white slide with a stained, textured rectangle; sides are multiples of 16."""
    rng = np.random.default_rng(seed)
    width, height = size
    made = np.full((height, width, 3), 245, np.uint8)
    if tissue:
        inside = made[64 : height - 64, 128 : width - 128]
        inside[:] = rng.integers((120, 30, 110), (230, 110, 190), inside.shape)
    return made


def write_slide(path, seed=0, *, mpp=0.5, size=(768, 512), tissue=True, array=None):
    """A tiled TIFF with its resolution in the tags; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    how = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    array = pixels(seed, size, tissue) if array is None else array
    tifffile.imwrite(path, array, tile=(256, 256), photometric="rgb", **how)
    return path


def slides_in(folder, count=3, **how):
    """A folder of so many slides, s0.tif and on."""
    for k in range(count):
        write_slide(folder / f"s{k}.tif", k, **how)
    return folder


def tokenize(*words, status=0):
    """The command with the small encoder; checks how it ended."""
    said = sansmax("tokenize", *words, *QUICK)
    assert said.status == status, said
    return said


def features(folder):
    """The bytes of every feature file, by name; half-written ones begin with a dot and are none."""
    return {p.name: p.read_bytes() for p in sorted((folder / "features").rglob("*.h5")) if p.name[0] != "."}


def bag(folder, name):
    """Features, coordinates and what the file says, as anybody's reader finds them."""
    with h5py.File(folder / "features" / f"{name}.h5") as file:
        said = {k: v.item() if hasattr(v, "item") else v for k, v in file.attrs.items()}
        return file["features"][()], file["coords"][()], said, dict(file["coords"].attrs)


def record(folder, name):
    """How a slide ended."""
    return json.loads((folder / "slides" / f"{name}.json").read_text())
