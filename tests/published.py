"""The published networks as numbers: names and shapes, weights made from a name, and what the authors' code answers.

The weights are drawn from the name and the shape of each tensor alone, so any network can be filled without its
checkpoint; `golden/copy_reference.py` says where the answers come from.
"""

import gzip
import hashlib
import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
# without them the attention would hardly show in the logits
GAINS = (
    (r"^block1\.\d+\.att\.mha\.attn\.Qnorm_act\.0\.weight$", 0.9),
    (r"^block2\.\d+\.att\.mha\.attn\.Qnorm_act\.0\.weight$", 0.75),
    (r"^block3\.\d+\.att\.mha\.attn\.Qnorm_act\.0\.weight$", 0.8),
    (r"^(cls_attn_)?blocks\.\d+\.attn\.proj\.weight$", 10.0),
)


@cache
def _manifests():
    return json.loads(gzip.decompress((GOLDEN / "manifests.json.gz").read_bytes()))


def manifest(name):
    """Published names and shapes of a network, in the order of its state dict."""
    return {key: tuple(shape) for key, shape in _manifests()[name].items()}


def manifest_names():
    """Networks whose names and shapes are known."""
    return list(_manifests())


def weight(name, shape):
    """One tensor (float32 numbers, int64 for counters) from its name and shape."""
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape, dtype=np.int64)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    z = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    if last == "running_mean":
        out = np.float32(0.1) * z
    elif last == "running_var":
        out = np.float32(1.0) + np.float32(0.1) * np.abs(z)
    elif last.startswith("gamma") or (last == "weight" and len(shape) <= 1):
        out = np.float32(1.0) + np.float32(0.1) * z
    elif last == "weight":
        out = z * np.float32(1.0 / np.sqrt(int(np.prod(shape[1:]))))
    else:
        out = np.float32(0.02) * z
    gain = next((gain for pattern, gain in GAINS if re.search(pattern, name)), 1.0)
    return np.asarray(out * np.float32(gain), dtype=np.float32)


def weights(shapes, dtype=torch.float64, prefix="", extra_gain=None):
    """A state dict of published names and shapes; `prefix` goes before the names of a single block."""
    tensors = {}
    for name, shape in shapes.items():
        value = torch.from_numpy(weight(prefix + name, tuple(shape)))
        if value.is_floating_point():
            value = (value * np.float32((extra_gain or {}).get(prefix + name, 1.0))).to(dtype)
        tensors[name] = value
    return tensors


def reference(name):
    """Arrays of `golden/NAME.npz`; `meta`, where there is one, as a dict."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = dict(file)
    if "meta" in arrays:
        arrays["meta"] = json.loads(bytes(arrays["meta"]).decode())
    return arrays


def picture(height, width=None):
    """The two images of the reference logits, (2, 3, height, width)."""
    x = np.random.default_rng(1234).standard_normal((2, 3, height, width or height)).astype(np.float32)
    return torch.from_numpy(x).double()


def difference(found, expected):
    """The largest difference over the largest value; tokens of the reference blocks are kept thinned."""
    found, expected = torch.as_tensor(found).detach().double(), torch.as_tensor(expected).double()
    if found.shape != expected.shape:
        found = found.flatten()[::7]
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))
