"""Networks of timm in small, to be converted, and the names of the gains that seqnorm attention adds."""

import pytest
import timm
import torch
from networks import perturbed
from timm.models import vision_transformer as timm_vit
from torch import nn

GAINS = ("gamma_q", "beta_q", "gamma_k", "beta_k", "gamma_v", "beta_v")

PLAIN = {
    "vit": ("vit_tiny_patch16_224", {}),
    "deit3, layer scale": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),
    "norm before the blocks": ("vit_base_patch16_clip_224", {}),
    "mean of tokens": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg", "qkv_bias": False}),
    "norms of queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}),
}
OTHERS = {
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "beside each other": ("vit_small_patch16_18x2_224", {}),
    "norm after": ("vit_tiny_patch16_224", {"block_fn": timm_vit.ResPostBlock, "init_values": 0.1}),
    "beit without bias": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_abs_pos_emb": True}),
    "eva without rotary": ("eva_giant_patch14_224", {"patch_size": 16}),
}
ROTARY = {
    "eva02, q and v biased": ("eva02_tiny_patch14_224", {"patch_size": 16}),
    "eva02, separate projections, norm inside": ("eva02_base_patch16_clip_224", {}),
    "queries and keys normed": ("vit_medium_patch16_rope_reg1_gap_256", {"qk_norm": True}),
    "rotation of each head": ("vit_small_patch16_rope_mixed_224", {}),
    "rotation of halves": ("vit_small_patch16_dinov3", {}),
    "gate": ("eva02_tiny_patch14_224", {"patch_size": 16, "gate": True}),
    "norm after": ("eva02_tiny_patch14_224", {"patch_size": 16, "use_post_norm": True, "scale_attn_inner": True}),
    "keys shared by queries": (
        "eva02_tiny_patch14_224",
        {"patch_size": 16, "attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2},
    ),
}
ALL = {**PLAIN, **OTHERS, **{f"rotary, {name}": what for name, what in ROTARY.items()}}

every_network = pytest.mark.parametrize("which", ALL)


def build(which, **changes):
    """The network in small, for 2 x 3 patches, its parameters all moved off their start."""
    name, arguments = ALL[which]
    size = {"img_size": (32, 48), "embed_dim": 48, "num_heads": 4, "depth": 2, "num_classes": 5}
    arguments = {**size, **arguments, **changes}
    gate = arguments.pop("gate", False)
    try:
        model = timm.create_model(name, **arguments)
    except TypeError as e:
        if any(f"'{new}'" in str(e) for new in ("qk_norm", "num_kv_heads", "swiglu_align_to")):
            pytest.skip(f"not in this version of timm: {e}")
        raise
    if gate:
        # no network of timm asks for it by an argument
        if not hasattr(model.blocks[0].attn, "gate"):
            pytest.skip("not in this version of timm: gates")
        for block in model.blocks:
            block.attn.gate = nn.Linear(48, 48)
    return perturbed(model).double()


def pictures(b=3):
    return torch.randn(b, 3, 32, 48, dtype=torch.float64)


def layers(model):
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] == "attn"}
