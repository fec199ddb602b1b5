"""Redoes cvt_*.npz by running the published code of CvT: python make_cvt.py path/to/cls_cvt.py (needs transformers).

cls_cvt.py is lib/models/cls_cvt.py of https://github.com/microsoft/CvT. Three of its imports are mended, and its
LayerNorm computes in float64 like the rest, not in float32. Everything runs on a CPU in float64 with the weights of
`tests/published.py` under the names of the code that runs. Each file holds `logits_HxW` and `meta`: the names and
shapes, the arguments of the network, and the version of the code.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from published import picture, weights  # noqa: E402

CVT_13 = {"embed_dims": [64, 192, 384], "depths": [1, 2, 10], "num_heads": [1, 3, 6], "num_classes": 1000}
CVT_21 = {**CVT_13, "depths": [1, 4, 16]}
# heads of several widths, in every stage more than one; the port cannot build a last stage of two blocks
SMALL = {"embed_dims": [12, 20, 36], "depths": [2, 2, 3], "num_heads": [2, 4, 3], "num_classes": 11}
# odd numbers, so that strides leave a remainder; then images so small that stages have a single token
SIZES = ((33, 70), (97, 50), (64, 64), (9, 5), (3, 3))
MENDED = (
    ("from torch._six import container_abcs", "import collections.abc as container_abcs"),
    ("from timm.models.layers import", "from timm.layers import"),
    ("from .registry import register_model", "register_model = lambda f: f"),
)


def microsoft(path: Path, arguments: dict) -> torch.nn.Module:
    """The authors' network with the arguments of their configuration file."""
    text = path.read_text()
    for before, after in MENDED:
        assert before in text, f"{before!r} is not in {path}: is it another version?"
        text = text.replace(before, after)
    module = types.ModuleType("cls_cvt")
    exec(compile(text, str(path), "exec"), module.__dict__)
    module.LayerNorm = torch.nn.LayerNorm
    spec = {
        "NUM_STAGES": 3,
        "PATCH_SIZE": [7, 3, 3],
        "PATCH_STRIDE": [4, 2, 2],
        "PATCH_PADDING": [2, 1, 1],
        "DIM_EMBED": arguments["embed_dims"],
        "NUM_HEADS": arguments["num_heads"],
        "DEPTH": arguments["depths"],
        "MLP_RATIO": [4.0] * 3,
        "ATTN_DROP_RATE": [0.0] * 3,
        "DROP_RATE": [0.0] * 3,
        "DROP_PATH_RATE": [0.0, 0.0, 0.1],
        "QKV_BIAS": [True] * 3,
        "CLS_TOKEN": [False, False, True],
        "QKV_PROJ_METHOD": ["dw_bn"] * 3,
        "KERNEL_QKV": [3] * 3,
        "PADDING_KV": [1] * 3,
        "STRIDE_KV": [2] * 3,
        "PADDING_Q": [1] * 3,
        "STRIDE_Q": [1] * 3,
    }
    config = types.SimpleNamespace(MODEL=types.SimpleNamespace(SPEC=spec, NUM_CLASSES=arguments["num_classes"]))
    return module.get_cls_model(config)


def transformers(arguments: dict) -> torch.nn.Module:
    """Hugging Face's port."""
    from transformers import CvtConfig, CvtForImageClassification

    names = {"embed_dims": "embed_dim", "depths": "depth", "num_heads": "num_heads", "num_classes": "num_labels"}
    return CvtForImageClassification(CvtConfig(**{names[k]: v for k, v in arguments.items()}))


def write(name: str, model: torch.nn.Module, arguments: dict, code: str, sizes: tuple) -> None:
    """Fills the network, runs it on the pictures and stores what it says."""
    model = model.double().eval()
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict(weights(shapes))
    arrays = {}
    for height, width in sizes:
        with torch.no_grad():
            out = model(picture(height, width))
        arrays[f"logits_{height}x{width}"] = getattr(out, "logits", out).numpy()
    meta = json.dumps({"code": code, "arguments": arguments, "shapes": shapes}, separators=(",", ":"))
    arrays["meta"] = np.frombuffer(meta.encode(), dtype=np.uint8)
    np.savez_compressed(HERE / f"cvt_{name}.npz", **arrays)


def main(path: Path) -> None:
    """Writes cvt_*.npz beside this file."""
    import transformers as port

    theirs, ported = "microsoft/CvT 56984ed", f"transformers {port.__version__}"
    write("13_microsoft", microsoft(path, CVT_13), CVT_13, theirs, ((224, 224), (96, 160)))
    write("13_transformers", transformers(CVT_13), CVT_13, ported, ((224, 224), (96, 160)))
    write("21_microsoft", microsoft(path, CVT_21), CVT_21, theirs, ())
    write("21_transformers", transformers(CVT_21), CVT_21, ported, ())
    write("small_microsoft", microsoft(path, SMALL), SMALL, theirs, SIZES)
    write("small_transformers", transformers(SMALL), SMALL, ported, SIZES)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
