"""Copies what the tests need of the reference outputs of the published code: python copy_reference.py FOLDER.

FOLDER holds manifests/MODEL.json, logits/MODEL_SIZE.npz and blocks/NAME.npz, made by running the authors' code of SOFT
(d3febc3) and SimA (3ec3b8e) on a CPU in float64 with the weights of `tests/published.py`. Names and shapes go to one
file. Of a block's tokens that come out every seventh number is kept: a test of them loses nothing.
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
BLOCKS = ("soft_block_ratio4", "soft_norm_block_ratio4", "soft_stage4_block")
SIMA_BLOCKS = ("sima_block", "sima_cls_block_tokens_norm_True", "sima_pos_14x14")
STRIDE = 7


def main(folder: Path) -> None:
    """Writes manifests.json.gz, logits/ and blocks/ beside this file."""
    manifests = {}
    for path in sorted(folder.glob("manifests/*.json")):
        manifests[path.stem] = {k: v["shape"] for k, v in json.loads(path.read_text())["entries"].items()}
    text = json.dumps(manifests, separators=(",", ":")).encode()
    (HERE / "manifests.json.gz").write_bytes(gzip.compress(text, 9, mtime=0))
    (HERE / "logits").mkdir(exist_ok=True)
    for path in sorted(folder.glob("logits/*.npz")):
        np.savez_compressed(HERE / "logits" / path.name, **np.load(path))
    (HERE / "blocks").mkdir(exist_ok=True)
    for name in BLOCKS + SIMA_BLOCKS:
        arrays = dict(np.load(folder / "blocks" / f"{name}.npz"))
        for key, value in arrays.items():
            if key in ("y", "grad_x"):
                arrays[key] = value.ravel()[::STRIDE]
        np.savez_compressed(HERE / "blocks" / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
