"""Files that are damaged or no weights are refused with a reason, and no file is ever run."""

import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from small_vits import refused, same, vit

from sansmax.models.weights import load_checkpoint


class Runs:
    """An object that runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_never_run(kind, tmp_path):
    mark, path = tmp_path / "it_ran", tmp_path / "model.pth"
    file = {"model": vit().state_dict(), "extra": Runs(f"touch '{mark}'")}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(file))
    else:
        torch.save(file, path, _use_new_zipfile_serialization=kind == "zip")
    message = refused(vit(), path)
    assert not mark.exists()
    if kind != "pickle":
        assert f"holds {os.name}.system" in message
    assert "weights_only=False" in message
    # it would have run
    if kind == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert mark.exists()


def test_the_way_out_of_a_refusal_works(tmp_path, monkeypatch):
    source, model = vit(), vit()
    file = {"model": source.state_dict(), "best": np.float64(0.8), "when": np.zeros(2)}
    torch.save(file, tmp_path / "trained.pth")
    message = refused(model, tmp_path / "trained.pth")
    assert "numpy" in message and "was not read" in message
    code = re.search(r"^    import torch.*", message, flags=re.MULTILINE | re.DOTALL)
    assert code is not None
    exec(re.sub(r"^    ", "", code[0], flags=re.MULTILINE), {})
    load_checkpoint(model, tmp_path / "trained.safetensors")
    assert same(model.state_dict(), source.state_dict())


def test_a_whole_module_is_refused_and_converted(tmp_path):
    source, model = vit(), vit()
    torch.save(source, tmp_path / "whole.pth")
    message = refused(model, tmp_path / "whole.pth")
    assert "sansmax.models.vit.VisionTransformer" in message
    exec(re.sub(r"^    ", "", message[message.index("    import torch") :], flags=re.MULTILINE), {})
    load_checkpoint(model, tmp_path / "whole.safetensors")
    assert same(model.state_dict(), source.state_dict())


def zipped():
    out = io.BytesIO()
    torch.save(vit().state_dict(), out)
    return out.getvalue()


def torn_inside():
    data = bytearray(zipped())
    with zipfile.ZipFile(io.BytesIO(bytes(data))) as file:
        start = next(i.header_offset for i in file.infolist() if i.filename.endswith("data/0"))
    data[start : start + 8] = bytes(8)
    return bytes(data)


def npz():
    out = io.BytesIO()
    np.savez(out, a=np.ones(2))
    return out.getvalue()


def legacy():
    out = io.BytesIO()
    torch.save(vit().state_dict(), out, _use_new_zipfile_serialization=False)
    return out.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
WRONG = {
    "empty": ("a.pth", lambda: b"", "is empty"),
    "page": ("a.pth", lambda: b"\n<!DOCTYPE html>\n<html><body>404", "is a web page"),
    "page as safetensors": ("a.safetensors", lambda: b"<html><head></head></html>", "is a web page"),
    "pointer": ("a.safetensors", lambda: LFS, "is a pointer of git-lfs"),
    "json": ("a.pth", lambda: b'{"error": "Repository not found"}', "is JSON text"),
    "text": ("a.pth", lambda: b"hello, world", "no file of weights"),
    "half a zip": ("a.pth", lambda: zipped()[: len(zipped()) // 2], "is damaged or was cut off"),
    "no end": ("a.pth", lambda: zipped()[:-10], "is damaged or was cut off"),
    "torn inside": ("a.pth", torn_inside, "is damaged or was cut off"),
    "half of the old kind": ("a.pth", lambda: legacy()[: len(legacy()) // 2], "is damaged or was cut off"),
    "start of the old kind": ("a.pth", lambda: legacy()[:40], "is damaged or was cut off"),
    "half a safetensors": (
        "a.safetensors",
        lambda: safetensors.torch.save(vit().state_dict())[:-100],
        "is damaged or was cut off",
    ),
    "numpy": ("a.npz", npz, "is a NumPy file"),
    "a list": ("a.pth", lambda: saved([torch.ones(1)]), "a dictionary of tensors by name, got list"),
    "a tensor": ("a.pth", lambda: saved(torch.ones(1)), "a dictionary of tensors by name, got torch.Tensor"),
}


def saved(value):
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


@pytest.mark.parametrize("what", list(WRONG))
def test_each_wrong_file_has_its_own_message(what, tmp_path):
    name, content, words = WRONG[what]
    (tmp_path / name).write_bytes(content())
    assert words in refused(vit(), tmp_path / name)


def test_paths_without_weights_are_explained(tmp_path):
    model = vit()
    assert "there is no file or folder" in refused(model, tmp_path / "none.pth")
    assert "is an address" in refused(model, "https://example.org/soft_tiny.pth")
    assert 'timm.create_model("hf-hub:' in refused(model, "hf-hub:owner/name")
    assert "holds no weights" in refused(model, tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert "before the end of its first epoch" in refused(model, tmp_path)
    (tmp_path / "run.json").unlink()
    for name in ("a.pth", "b.pth"):
        torch.save(model.state_dict(), tmp_path / name)
    assert "Give the file: a.pth, b.pth" in refused(model, tmp_path)
    (tmp_path / "a.pth").unlink()
    load_checkpoint(model, tmp_path)
