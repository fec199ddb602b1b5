"""SimA on DeiT: https://arxiv.org/abs/2206.08898, on https://arxiv.org/abs/2012.12877.

DeiT's network with its widths, class token and learned positions, in which the softmax of each layer is replaced by
l1 norms over the tokens, the class token included. Names and shapes of the parameters are DeiT's, so that its
checkpoints load and can be fine-tuned. `num_heads=1` is the paper's variant with a single head.

The authors published no checkpoint of these networks. `init_values=1.0` adds the layer scale that their other
networks have.
"""

import re
from collections.abc import Mapping

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from sansmax.models.vit import VisionTransformer

__all__ = ["checkpoint_filter_fn"]


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """The same tensors under this package's names: gains of layers as DeiT III or SimA call them become timm's.

    All other names of DeiT are kept, those that the network lacks included (the distillation token and its head), so
    that loading reports them.
    """
    del model
    return {re.sub(r"^(blocks\.\d+)\.gamma_?([12])$", r"\1.ls\2.gamma", name): x for name, x in state_dict.items()}


def _cfg() -> dict[str, object]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "min_input_size": (3, 16, 16),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_name": "SimA: Simple Softmax-free Attention for Vision Transformers",
        "paper_ids": "arXiv:2206.08898",
        "origin_url": "https://github.com/UCDvision/sima",
    }


default_cfgs = generate_default_cfgs(
    {
        "sima_deit_tiny_patch16_224.untrained": _cfg(),
        "sima_deit_small_patch16_224.untrained": _cfg(),
        "sima_deit_base_patch16_224.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, **arguments) -> nn.Module:
    # a `VisionTransformer`, or timm's wrapper of one where `features_only=True` asks for maps
    deit = {"attention": "sima", "patch_size": 16, "depth": 12, "class_token": True, "global_pool": "token"}
    # the norm before the pooling for every pooling, so that names stay as they are
    arguments = {**deit, "qkv_bias": True, "fc_norm": False, **arguments}
    out_indices = arguments.pop("out_indices", 3)
    return build_model_with_cfg(
        VisionTransformer,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **arguments,
    )


@register_model
def sima_deit_tiny_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on DeiT-Ti/16: width 192, 12 layers, 3 heads."""
    arguments = {"embed_dim": 192, "num_heads": 3, **kwargs}
    return _create("sima_deit_tiny_patch16_224", pretrained, **arguments)


@register_model
def sima_deit_small_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on DeiT-S/16: width 384, 12 layers, 6 heads."""
    arguments = {"embed_dim": 384, "num_heads": 6, **kwargs}
    return _create("sima_deit_small_patch16_224", pretrained, **arguments)


@register_model
def sima_deit_base_patch16_224(pretrained: bool = False, **kwargs) -> nn.Module:
    """SimA on DeiT-B/16: width 768, 12 layers, 12 heads."""
    arguments = {"embed_dim": 768, "num_heads": 12, **kwargs}
    return _create("sima_deit_base_patch16_224", pretrained, **arguments)
