"""Reads a file of weights without running anything that is in it.

safetensors holds tensors and nothing else. What `torch.save` wrote is a pickle, which may name any function to be
called; it is read with `weights_only=True`, that is tensors and plain containers, and beside them
`argparse.Namespace`, in which training scripts keep their arguments. Everything else is refused.
"""

import argparse
import contextlib
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from sansmax.errors import InputError

FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
SUFFIXES = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".ckpt")


def read_checkpoint(path: str | Path) -> tuple[Any, Path]:
    """What is in the file of weights, on the CPU, and which file that is; of a folder, the file it holds.

    Raises InputError for a file that is missing, empty, damaged, of another kind, or asks for code to be run, and for
    a folder without weights or with several files to choose from.
    """
    file = weights_file(path)
    with file.open("rb") as opened:
        start = opened.read(512)
    _check_start(file, start)
    if _is_safetensors(file, start):
        return _read_safetensors(file), file
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise InputError(
            f"{file} is no file of weights: neither safetensors nor what torch.save writes, by its first bytes "
            f"{start[:12]!r}"
        )
    return _read_torch(file), file


def weights_file(path: str | Path) -> Path:
    """The file of weights itself: `path`, or the one in this folder."""
    if re.match(r"https?://|hf[-_]hub:", str(path)):
        raise InputError(
            f"{path} is an address; weights are loaded from files. Download it first, or let timm fetch a model of the "
            'hub with its weights: timm.create_model("hf-hub:OWNER/NAME", pretrained=True)'
        )
    path = Path(str(path).removeprefix("local-dir:")).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"there is no file or folder of weights {path}; check the path, relative to {Path.cwd()}")
    for name in FILES:
        if (path / name).is_file():
            return path / name
    found = sorted(p for p in path.iterdir() if p.is_file() and p.name.endswith(SUFFIXES))
    if len(found) == 1 and found[0].name not in ("last.ckpt", "previous.ckpt"):
        return found[0]
    if (path / "run.json").is_file():
        raise InputError(
            f"the run {path} has no model.safetensors yet: training stopped before the end of its first epoch; go on "
            "with --resume"
        )
    if (path / "model.safetensors.index.json").is_file():
        raise InputError(
            f"the weights in {path} are split over several files; join them once: read each with "
            "safetensors.torch.load_file, and save_file the dictionary of all"
        )
    if found:
        raise InputError(f"which weights in {path} are meant? Give the file: {', '.join(p.name for p in found)}")
    raise InputError(f"{path} holds no weights: no {', '.join(FILES)}, nor another file *{', *'.join(SUFFIXES)}")


def _check_start(file: Path, start: bytes) -> None:
    """Files that are no weights at all, by their first bytes."""
    size = file.stat().st_size
    text = start.lstrip().lower()
    if not start:
        raise InputError(f"{file} is empty; copy or download it again")
    if text.startswith(b"version https://git-lfs"):
        raise InputError(
            f"{file} is a pointer of git-lfs ({size} bytes), not the weights themselves; run `git lfs pull` where it "
            "was cloned, or download the file from its page"
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise InputError(
            f"{file} is a web page ({size} bytes), not weights: the server answered with a page, of an error or a "
            "login perhaps. Open it in a browser to see which, and download the file itself"
        )
    if text.startswith((b'{"', b"{\n", b"{ ")):
        raise InputError(f"{file} is JSON text ({size} bytes), not weights; give the file that holds tensors")
    if file.suffix in (".npz", ".npy"):
        raise InputError(
            f"{file} is a NumPy file; a timm network reads those of JAX itself: model.load_pretrained({str(file)!r})"
        )


def _is_safetensors(file: Path, start: bytes) -> bool:
    # eight bytes for the length of a JSON header, and the header
    return file.suffix == ".safetensors" or (len(start) > 8 and start[8:9] == b"{")


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise _damaged(file, error) from error


def _read_torch(file: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # what cannot be read is an error below
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if wanted := _wanted(file, str(error)):
            raise _refused(file, wanted) from None
        raise InputError(
            f"{file} is no file of weights that can be read safely: neither safetensors nor what torch.save writes "
            f"({_last_sentence(error)}). {_conversion(file)}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        if "TorchScript" in str(error):
            raise InputError(
                f"{file} is a TorchScript program, not weights alone; save its weights once, in a script of your own: "
                f"torch.save(torch.jit.load({str(file)!r}).state_dict(), 'weights.pth')"
            ) from error
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> InputError:
    reason = str(error).split(". ")[0] or type(error).__name__
    return InputError(
        f"{file} is damaged or was cut off, at {file.stat().st_size} bytes ({reason}); compare its size with the "
        "original, and copy or download it again"
    )


def _wanted(file: Path, message: str) -> list[str]:
    """What the pickle wants to be loaded or called that is no weight; empty where the file is another thing."""
    named = re.findall(r"(?:GLOBAL |but got <class ')([\w.]+\.\w+)", message)
    # it reads one of the two formats only; the message names the first object in any case
    with contextlib.suppress(Exception):
        named += torch.serialization.get_unsafe_globals_in_checkpoint(file)
    return sorted({name for name in named if name != "argparse.Namespace"})


def _refused(file: Path, wanted: list[str]) -> InputError:
    return InputError(
        f"{file} was not read: beside tensors it holds {', '.join(wanted)}, and making such objects runs code that the "
        f"file chooses. {_conversion(file)}"
    )


def _conversion(file: Path) -> str:
    out = str(file.with_suffix(".safetensors"))
    return f"""If you trust whoever made it, convert it once, in a script of your own, and load the result:

    import torch
    from safetensors.torch import save_file

    checkpoint = torch.load({str(file)!r}, map_location="cpu", weights_only=False)
    weights = checkpoint.state_dict() if hasattr(checkpoint, "state_dict") else checkpoint
    weights = weights.get("model", weights.get("state_dict", weights))
    weights = weights.state_dict() if hasattr(weights, "state_dict") else weights
    save_file({{name: x.clone().contiguous() for name, x in weights.items()}}, {out!r})
"""


def _last_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line.startswith("Unsupported")), type(error).__name__)
