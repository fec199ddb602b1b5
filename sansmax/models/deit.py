"""SimA on DeiT: https://arxiv.org/abs/2206.08898, on https://arxiv.org/abs/2012.12877.

DeiT's network with its widths, class token and learned positions, in which the softmax of each layer is replaced by
l1 norms over the tokens, the class token included. Names and shapes of the parameters are DeiT's, so that its
checkpoints load and can be fine-tuned. `num_heads=1` is the paper's variant with a single head.

The authors published no checkpoint of these networks. `init_values=1.0` adds the layer scale that their other
networks have.
"""

import re
from collections.abc import Mapping

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from sansmax.models.entries import SIMA, build, configuration
from sansmax.models.vit import VisionTransformer

__all__ = ["checkpoint_filter_fn"]


def checkpoint_filter_fn(state_dict: Mapping[str, Tensor], model: nn.Module | None = None) -> dict[str, Tensor]:
    """The same tensors under this package's names: gains of layers as DeiT III or SimA call them become timm's.

    All other names of DeiT are kept, those that the network lacks included (the distillation token and its head), so
    that loading reports them.
    """
    del model
    return {re.sub(r"^(blocks\.\d+)\.gamma_?([12])$", r"\1.ls\2.gamma", name): x for name, x in state_dict.items()}


_SIZES = ("tiny", "small", "base")
default_cfgs = generate_default_cfgs(
    {f"sima_deit_{size}_patch16_224.untrained": configuration("patch_embed.proj", SIMA) for size in _SIZES}
)


def _create(variant: str, pretrained: bool, **arguments) -> nn.Module:
    deit = {"attention": "sima", "patch_size": 16, "depth": 12, "class_token": True, "global_pool": "token"}
    # the norm before the pooling for every pooling, so that names stay as they are
    arguments = {**deit, "qkv_bias": True, "fc_norm": False, **arguments}
    return build(VisionTransformer, variant, pretrained, 3, checkpoint_filter_fn, **arguments)


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
