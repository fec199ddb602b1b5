"""One opened file of features: which container it is, told by its first bytes, and what lies in it."""

import contextlib
import json
import os
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.errors import InputError
from sansmax.optional import need

SUFFIXES = (".h5", ".hdf5", ".pt", ".pth", ".npy", ".npz")
_HDF5 = b"\x89HDF\r\n\x1a\n"


@dataclass(frozen=True)
class Contents:
    """What a file holds. `kind` is "hdf5", "torch", "npy" or "npz".

    `parts` maps names to arrays that are read when they are sliced: HDF5 data sets, torch tensors, numpy arrays. What
    has no name, a bare tensor or array, is under "". `attributes` are those of an HDF5 file's root.
    """

    path: Path
    kind: str
    parts: dict[str, Any]
    attributes: dict[str, Any]
    mmap: bool = False

    @property
    def slide_id(self) -> str:
        """The name of the file without its last suffix."""
        return self.path.stem

    def attributes_of(self, name: str) -> dict[str, Any]:
        """Attributes of one HDF5 data set as plain Python values; none where there are none."""
        part = self.parts.get(name)
        return plain_attributes(part.attrs) if self.kind == "hdf5" and part is not None else {}

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of one part; nothing else of it is read."""
        return self.parts.shape(name) if isinstance(self.parts, _Arrays) else tuple(self.parts[name].shape)

    def features(self, name: str) -> np.ndarray:
        """Part `name` as (N, D) floats: float16, float32 and float64 stay, bfloat16 becomes float32.

        With `mmap`, parts that lie in one piece in their file are not read but mapped, read-only.
        """
        part = self.parts[name]
        array = self._in_one_piece(part) if self.kind == "hdf5" else as_numpy(part)
        if array.ndim == 3 and len(array) == 1:
            array = array[0]
        if array.size == 0 and array.ndim == 1:
            array = array.reshape(0, 0)
        return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))

    def _in_one_piece(self, part: Any) -> np.ndarray:
        """HDF5's copying through its own buffers takes longer than the reading: past it where that is possible."""
        offset = part.id.get_offset()
        if offset is None or part.size == 0 or part.dtype.kind != "f" or part.file.userblock_size:
            return part[()]
        with self.path.open("rb") as file:
            if not os.path.samestat(os.fstat(file.fileno()), os.fstat(part.file.id.get_vfd_handle())):
                # the file was replaced since it was opened, and HDF5 still has the old one
                return part[()]
            if self.mmap:
                return np.memmap(file, part.dtype, "r", offset, part.shape)
            array = np.fromfile(file, part.dtype, part.size, offset=offset)
        if array.size != part.size:
            raise OSError(f"the file ends within {part.name}")
        return array.reshape(part.shape)

    def points(self, name: str) -> np.ndarray | None:
        """Part `name` as an array of points; None where it is not there."""
        if name not in self.parts:
            return None
        part = self.parts[name]
        points = part[()] if self.kind == "hdf5" else as_numpy(part)
        return points[0] if points.ndim == 3 and len(points) == 1 else points


def as_numpy(part: Any) -> np.ndarray:
    """A torch tensor or numpy array as a numpy array; bfloat16, which numpy lacks, as float32."""
    if isinstance(part, np.ndarray):
        return part
    import torch

    return (part.float() if part.dtype == torch.bfloat16 else part).detach().numpy()


def plain_attributes(attributes: Any) -> dict[str, Any]:
    """HDF5 attributes as str, int, float, bool, list or None; the word 'None' is None, as TRIDENT writes it."""
    return {name: _plain(attributes[name]) for name in attributes}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        return [_plain(entry) for entry in value.tolist()]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, str):
        return None if value == "None" else str(value)
    return value if isinstance(value, bool | int | float | list) else None


@contextlib.contextmanager
def open_contents(path: str | Path, *, trust_numpy: bool = False, mmap: bool = False) -> Iterator[Contents]:
    """Opens a file of features; InputError, with words, where it is damaged or of no kind that holds features.

    Nothing in a file is ever run: `torch.load` reads tensors and plain containers only. numpy arrays inside a .pt file
    are refused unless `trust_numpy`, which lets through arrays of numbers and still nothing else.
    """
    path = Path(path)
    with contextlib.ExitStack() as stack:
        try:
            contents = _open(path, stack, trust_numpy, mmap)
        except InputError:
            raise
        except (OSError, EOFError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as e:
            raise _damaged(path, e) from None
        try:
            yield contents
        except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as e:
            raise _damaged(path, e) from None


def _damaged(path: Path, e: Exception) -> InputError:
    why = " ".join(str(e).split())
    return InputError(f"{path} is damaged, or was not written to its end ({why}); copy or extract it again")


def _open(path: Path, stack: contextlib.ExitStack, trust_numpy: bool, mmap: bool) -> Contents:
    kind = _kind(path)
    if kind == "hdf5":
        file = stack.enter_context(_open_hdf5(path))
        parts = {name: file[name] for name in file if hasattr(file[name], "shape")}
        return Contents(path, kind, parts, plain_attributes(file.attrs), mmap)
    if kind == "torch":
        return Contents(path, kind, _read_torch(path, trust_numpy, mmap), {}, mmap)
    if kind == "npy":
        return Contents(path, kind, {"": np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)}, {}, mmap)
    return Contents(path, kind, _Arrays(stack.enter_context(np.load(path, allow_pickle=False))), {}, mmap)


class _Arrays(dict[str, Any]):
    """The arrays of an .npz file, read when they are asked for."""

    def __init__(self, arrays: Any) -> None:
        super().__init__(dict.fromkeys(arrays.files))
        self.arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            return self.arrays[name]
        except ValueError as e:
            # what numpy says of arrays that end early, or hold Python objects
            raise OSError(str(e)) from None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, from the first bytes of the array."""
        with self.arrays.zip.open(f"{name}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            return read(file)[0]


def _kind(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"there is no file {path}; check the path, relative to {Path.cwd()}")
    with path.open("rb") as file:
        start = file.read(8)
    if start == _HDF5:
        return "hdf5"
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start.startswith(b"PK"):
        return _kind_of_zip(path)
    if start.startswith(b"\x80"):
        return "torch"
    if not start:
        raise InputError(f"{path} is empty; copy or extract it again")
    if start.startswith(b"version "):
        raise InputError(f"{path} is a pointer of Git LFS, not the file itself; fetch it with: git lfs pull")
    raise InputError(
        f"{path} holds no features: it is neither HDF5, nor of torch.save, nor .npy or .npz, by its first bytes "
        f"{start!r}"
    )


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as e:
        raise InputError(f"{path} is damaged, or was not written to its end ({e}); copy or extract it again") from None
    if any(name.endswith("data.pkl") for name in names):
        return "torch"
    if any(name.endswith(".npy") for name in names):
        return "npz"
    raise InputError(f"{path} is a zip archive without arrays; a file of features was expected")


def _open_hdf5(path: Path) -> Any:
    h5py = need("h5py", "slides")
    # finished files never change; locks fail on many network disks
    return h5py.File(path, "r", locking=False)


def _read_torch(path: Path, trust_numpy: bool, mmap: bool) -> dict[str, Any]:
    import torch

    loaded: Any = None
    allowed = torch.serialization.safe_globals(_numpy_names() if trust_numpy else [])
    with allowed, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # files of before torch 1.6 are no zip archives and cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
        except (pickle.UnpicklingError, AttributeError, TypeError) as e:
            raise InputError(_refusal(path, str(e))) from None
    if isinstance(loaded, torch.Tensor | np.ndarray):
        return {"": loaded}
    if isinstance(loaded, dict):
        return {str(k): v for k, v in loaded.items() if isinstance(v, torch.Tensor | np.ndarray)}
    raise InputError(f"{path} holds a {type(loaded).__name__}; a tensor of features, or a dictionary with one, is read")


def _refusal(path: Path, why: str) -> str:
    if "numpy" in why:
        return (
            f"{path} holds numpy arrays inside a file of torch.save, which can also hold code. If you know who wrote "
            "it, allow arrays of numbers with --trust-numpy; nothing else is let through"
        )
    return (
        f"{path} asks for code to be run when it is loaded, or is damaged; it is not opened. Save the tensor alone: "
        "torch.save(features, path)"
    )


def _numpy_names() -> list[Any]:
    """What the pickle of a numpy array of numbers calls: allowed, and nothing else."""
    import _codecs

    from numpy._core import multiarray

    names = ("Float16", "Float32", "Float64", "Int32", "Int64")
    kinds = [getattr(np.dtypes, f"{name}DType") for name in names]
    reconstruct = multiarray._reconstruct
    old = (reconstruct, "numpy.core.multiarray._reconstruct")
    return [reconstruct, old, np.ndarray, np.dtype, *kinds, _codecs.encode]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file beside the features as a dictionary; empty where it is missing or unreadable."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}
