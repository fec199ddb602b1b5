"""What cannot be converted is refused by name and left alone, unless its block is left out."""

import copy

import pytest
import timm
import torch
from originals import build
from timm.models import vision_transformer as timm_vit
from torch import nn

from sansmax.models.attention_soft import SoftAttention
from sansmax.models.attention_terms import SimAWithTerms
from sansmax.models.convert import convert

REFUSED = {
    "no such mechanism": ("vit", "linear", {}, "attention of convert must be one of softmax, seqnorm, sima, soft"),
    "no such option": ("vit", "sima", {"num_landmarks": 3}, "num_landmarks: no option .* takes eps, order, refer"),
    "size of the layer": ("vit", "sima", {"qkv_bias": False}, "qkv_bias: no option of sima attention"),
    "landmarks by convolution": (
        "vit",
        "soft",
        {"ratio": 2},
        "ratio: no option .* takes inverse, normalized, num_landmarks, order$",
    ),
    "no such order": ("vit", "relu", {"order": "moments"}, "order of pointwise attention"),
    "moments of rotated tokens": (
        "rotary, eva02, q and v biased",
        "sima",
        {"order": "moments"},
        'order "moments" of sima attention needs a layer without rotary positions',
    ),
    "soft and rotary": (
        "rotary, gate",
        "soft",
        {},
        r"soft attention: blocks\.0\.attn has rotary positions and a gate, but the landmarks of SOFT",
    ),
    "soft and norms": (
        "norms of queries and keys",
        "soft",
        {},
        r"blocks\.0\.attn has norms of queries and keys and a norm after the heads",
    ),
    "no such block": ("vit", "sima", {"blocks": [0, 2]}, r"blocks must be numbers from 0 to 1, .* got \[2\]"),
    "no block": ("vit", "sima", {"blocks": []}, "blocks is empty"),
}


def snapshot(model):
    return (
        type(model),
        [(name, type(module), id(module)) for name, module in model.named_modules()],
        [(name, id(p), p._version) for name, p in model.named_parameters()],
        {name: value for name, value in vars(model).items() if not name.startswith("_")},
        copy.deepcopy(getattr(model, "pretrained_cfg", None)),
    )


def refused(model, attention, message, **options):
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        convert(model, attention, **options)
    assert snapshot(model) == before


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_the_network_left_alone(case):
    which, attention, options, message = REFUSED[case]
    refused(build(which), attention, message, **options)


@pytest.mark.parametrize("attention", ["softmax", "sima", "seqnorm", "relu", "soft"])
@pytest.mark.parametrize("bias", ["use_rel_pos_bias", "use_shared_rel_pos_bias"])
def test_a_relative_position_bias_is_refused_by_name(attention, bias):
    biases = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": False, bias: True}
    message = (
        rf"cannot convert to {attention} attention: blocks\.0\.attn adds a relative position bias .*"
        r"without it \(Beit: use_rel_pos_bias=False, use_shared_rel_pos_bias=False\), or leave its block out"
    )
    refused(build("beit without bias", **biases), attention, message)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_relpos_small_patch16_224", r"blocks\.0\.attn adds a relative position bias"),
        ("samvit_base_patch16", r"blocks\.0\.attn adds a relative position bias"),
        ("vit_dlittle_patch16_reg1_gap_256", r"blocks\.0\.attn is a timm\.\S+\.DiffAttention, which is not known"),
        ("cait_xxs24_224", r"blocks\.0\.attn is a timm\.\S+\.TalkingHeadAttn, which is not known"),
        ("twins_svt_small", r"blocks\.0 \(ModuleList\) has no attention layer"),
    ],
)
def test_other_attention_of_timm_is_refused_by_name(name, message):
    if not timm.is_model(name):
        pytest.skip("not in this version of timm")
    refused(timm.create_model(name), "sima", message)


def test_a_layer_that_cannot_be_read_is_refused_wherever_it_stands():
    model = build("vit", attn_drop_rate=0.1)
    refused(model, "sima", r"blocks\.0\.attn drops attention weights \(p = 0.1\).*use attn_drop_rate=0")
    model = build("vit")
    model.blocks[1].attn = nn.MultiheadAttention(48, 4)
    refused(model, "sima", r"blocks\.1\.attn is a torch\.\S+\.MultiheadAttention, which is not known")
    assert convert(model, "sima", blocks=[0]).attention == "softmax and sima"
    model = convert(build("vit"), "softmax")
    model.blocks[1].attn = SoftAttention(48, 4, value_kernel=3)
    refused(model, "sima", r"blocks\.1\.attn convolves on the grid of tokens")
    model = build("vit")
    model.blocks[1].attn.proj = nn.Linear(48, 36)
    refused(model, "sima", r"blocks\.1\.attn has heads of 48 channels together.* embed_dim, 36")


def test_dropout_in_blocks_that_are_left_out_stays():
    model = build("vit")
    model.blocks[1].attn.attn_drop.p = 0.5
    convert(model, "sima", blocks=[0])
    assert type(model) is timm_vit.VisionTransformer
    assert model.blocks[1].attn.attn_drop.p == 0.5


def test_blocks_without_attention_can_be_left_out():
    model = build("distilled")
    model.blocks[1] = nn.Identity()
    refused(model, "sima", r"blocks\.1 \(Identity\) has no attention layer of its own; leave it out")
    assert type(convert(model, "sima", blocks=[0]).blocks[0].attn) is SimAWithTerms


def test_networks_without_attention_of_their_own_are_refused():
    refused(timm.create_model("resnet10t"), "sima", "ResNet has no `blocks`")
    refused(timm.create_model("mixer_s32_224", num_classes=2), "sima", r"blocks\.0 \(MixerBlock\) has no attention")


@pytest.mark.parametrize("attention", ["sima", "softmax", "soft"])
@pytest.mark.parametrize("which", ["distilled", "eva without rotary"])
def test_masks_for_pairs_of_tokens_are_refused_in_the_forward_pass(attention, which):
    block = convert(build(which), attention).blocks[0]
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot take attn_mask, a term for each pair of tokens; leave it out"):
        block(x, attn_mask=torch.ones(7, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="cannot take is_causal"):
        block.attn(x, is_causal=True)
    with pytest.raises(ValueError, match="cannot take shared_rel_pos_bias"):
        block.attn(x, shared_rel_pos_bias=torch.zeros(4, 7, 7))
    if attention == "soft":
        with pytest.raises(ValueError, match="cannot take rotary positions"):
            block.attn(x, rope=torch.zeros(7, 24))
