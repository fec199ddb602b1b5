"""What every entry point of a network tells timm: its default configuration, its paper, and how it is built."""

from collections.abc import Callable, Sequence
from typing import Any

from timm.models import build_model_with_cfg
from torch import nn

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# the licence is that of the authors' code; of sequence normalisation there is none but ours
SEQNORM = {
    "license": "apache-2.0",
    "paper_name": (
        "Compute-Efficient Medical Image Classification with Softmax-Free Transformers and Sequence Normalization"
    ),
    "paper_ids": "arXiv:2406.01314",
}
SIMA = {
    "license": "mit",
    "paper_name": "SimA: Simple Softmax-free Attention for Vision Transformers",
    "paper_ids": "arXiv:2206.08898",
    "origin_url": "https://github.com/UCDvision/sima",
}
SOFT = {
    "license": "mit",
    "paper_name": "SOFT: Softmax-free Transformer with Linear Complexity",
    "paper_ids": "arXiv:2110.11945",
    "origin_url": "https://github.com/fudan-zvg/SOFT",
}
SOFT_NORM = {**SOFT, "paper_name": "Softmax-free Linear Transformers", "paper_ids": "arXiv:2207.03341"}
CVT = {
    "license": "mit",
    "paper_name": "CvT: Introducing Convolutions to Vision Transformers",
    "paper_ids": "arXiv:2103.15808",
    "origin_url": "https://github.com/microsoft/CvT",
}


def configuration(first_conv: str, paper: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """timm's default configuration of a network for 224 px images of 1,000 classes, without weights."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 16, 16),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        **IMAGENET,
        "first_conv": first_conv,
        "classifier": "head",
        **paper,
        **changes,
    }


def build(
    network: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    maps: int | Sequence[int],
    checkpoint_filter_fn: Callable[..., Any] | None = None,
    **arguments: Any,
) -> nn.Module:
    """The network, or timm's wrapper of it where `features_only=True` asks for `maps` (or `out_indices`)."""
    out_indices = arguments.pop("out_indices", maps)
    return build_model_with_cfg(
        network,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **arguments,
    )
