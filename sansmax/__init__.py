"""sansmax: softmax-free vision transformers whose attention costs linear time and memory.

Importing registers every model with timm:

    import sansmax, timm
    model = timm.create_model("seqnorm_vit_tiny_patch16_224", num_classes=5, img_size=512)

Published weights load by `load_checkpoint`, another attention comes by `convert`, and networks are given on by
`save_pretrained` and `push_to_hub`. `stream`, `predict` and `train` are loaded when they are first used, with what
they need.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sansmax import models as models

if TYPE_CHECKING:
    from sansmax.engine.config import load_config as load_config
    from sansmax.engine.evaluate import evaluate as evaluate
    from sansmax.engine.predict import Prediction as Prediction
    from sansmax.engine.predict import predict as predict
    from sansmax.engine.run import Run as Run
    from sansmax.engine.stream import stream as stream
    from sansmax.engine.train import train as train
    from sansmax.models.convert import convert as convert
    from sansmax.models.share import push_to_hub as push_to_hub
    from sansmax.models.share import save_pretrained as save_pretrained
    from sansmax.models.weights import load_checkpoint as load_checkpoint

__version__ = "0.1.0"

_LAZY = {
    "Prediction": "sansmax.engine.predict",
    "Run": "sansmax.engine.run",
    "convert": "sansmax.models.convert",
    "evaluate": "sansmax.engine.evaluate",
    "load_checkpoint": "sansmax.models.weights",
    "load_config": "sansmax.engine.config",
    "predict": "sansmax.engine.predict",
    "push_to_hub": "sansmax.models.share",
    "save_pretrained": "sansmax.models.share",
    "stream": "sansmax.engine.stream",
    "train": "sansmax.engine.train",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
