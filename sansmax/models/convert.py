"""Another attention for a vision transformer that is there already, its weights kept.

`convert` reads each attention layer as projections and terms, and builds the layer of another mechanism around them.
A plain transformer of timm becomes the `VisionTransformer` of this package by that, and can do what it can: masks,
images of any size, and chunks. Any other network stays what it is, with other layers in its blocks.
"""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import timm
import torch
from timm.layers.attention import Attention as TimmAttention
from timm.layers.attention import AttentionRope
from timm.layers.format import Format
from timm.layers.patch_embed import PatchEmbed
from timm.models import beit, build_model_with_cfg, eva, register_model
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from sansmax.models.attention import HeadsAttention, SeqNormAttention
from sansmax.models.attention_soft import SoftAttention
from sansmax.models.attention_terms import WITH_TERMS, Terms
from sansmax.models.blocks import ATTENTIONS, Block
from sansmax.models.vit import VisionTransformer
from sansmax.ops.checks import check_choice

__all__ = ["convert"]

Network = TypeVar("Network", bound=nn.Module)
Layer = Any

READABLE = (TimmAttention, AttentionRope, eva.EvaAttention, beit.Attention)
RELATIVE = ("relative_position_bias_table", "rel_pos", "rel_pos_h")
# what a layer takes from the one before it, and what needs the grid of tokens, which no block is given
NOT_OPTIONS = {"activation", "device", "dtype", "ratio", "landmark_grid", "value_kernel"}


def convert(model: Network, attention: str, *, blocks: Sequence[int] | None = None, **options: Any) -> Network:
    """The same network with `attention` in its blocks ("sima", "seqnorm", "soft", "relu", ..., "softmax").

    Takes timm's `VisionTransformer` (ViT, DeiT, DeiT III, distilled DeiT), `Eva`, `Beit`, and other networks, of this
    package or not, whose `blocks` hold the same layers. `blocks` are the numbers of the blocks to convert, all of them
    by default. `options` are `order` and those of the mechanism, such as `num_landmarks` (see
    `sansmax.models.attention`).

    The model is changed and returned. Everything but attention keeps its modules, parameters and names; projections,
    norms of queries and keys, rotary positions, norms and gates after the heads go over to the new layers, separate
    projections and biases as one layer `qkv`. SOFT has its queries for keys: the keys' weights are dropped. From SOFT
    to another mechanism, keys start as the queries. Gains and biases of sequence normalisation start as a new layer's.
    "softmax" changes no output; after any other mechanism the network needs training.

    A plain `VisionTransformer` of timm, with its plain blocks and patch embedding, becomes one of this package: it
    takes masks and images of any size, and runs in `sansmax.stream` where its layers do. Blocks that are left out of
    `blocks` then have softmax attention of this package, which gives the same numbers.

    `model.attention` names the mechanism, and `model.conversion` holds the arguments of the network "converted", which
    builds the same network again.

    Raises ValueError, and leaves the model alone, for a mechanism or an option that does not exist, for layers that
    cannot be read, for dropout of attention weights, and where the mechanism cannot express a term of a layer: a
    relative position bias (any mechanism), terms on queries and keys (SOFT).
    """
    check_choice("attention", attention, tuple(ATTENTIONS), "convert")
    _check_options(attention, options)
    there = _blocks(model)
    chosen = _chosen(blocks, len(there))
    ours = _can_become_ours(model, there, chosen)
    new: list[tuple[Any, nn.Module]] = []
    for i, block in enumerate(there):
        if i not in chosen and not (ours and type(block.attn) in READABLE):
            continue
        name, arguments = (attention, options) if i in chosen else ("softmax", {})
        # plain where the block calls it as ours does
        plain = ours or isinstance(block, Block)
        for place, owner, old in _layers(block, f"blocks.{i}"):
            new.append((owner, _replacement(model, old, place, name, arguments, plain)))
    # nothing was touched so far, and from here on nothing fails
    for owner, layer in new:
        owner.attn = layer
    if ours:
        _become_ours(model)
    _record(model, attention, None if blocks is None else sorted(chosen), options)
    return model


def _check_options(attention: str, options: Mapping[str, Any]) -> None:
    named = inspect.signature(ATTENTIONS[attention]).parameters.values()
    allowed = {"order", *(p.name for p in named if p.kind is p.KEYWORD_ONLY)} - NOT_OPTIONS
    if wrong := [name for name in options if name not in allowed]:
        raise ValueError(
            f"{', '.join(wrong)}: no option of {attention} attention in a converted network, which takes "
            f"{', '.join(sorted(allowed))}"
        )


# What is there


def _blocks(model: nn.Module) -> list[nn.Module]:
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
        raise ValueError(
            f"{type(model).__name__} has no `blocks` with attention layers to convert; give a vision transformer such "
            'as timm.create_model("vit_small_patch16_224")'
        )
    return list(blocks)


def _chosen(blocks: Sequence[int] | None, depth: int) -> set[int]:
    if blocks is None:
        return set(range(depth))
    if wrong := [i for i in blocks if not -depth <= i < depth]:
        raise ValueError(f"blocks must be numbers from 0 to {depth - 1}, or from the end, got {wrong}")
    if not blocks:
        raise ValueError("blocks is empty: give the numbers of the blocks to convert, or None for all of them")
    return {i % depth for i in blocks}


def _layers(block: nn.Module, place: str) -> list[tuple[str, nn.Module, Layer]]:
    """Name, owner and module of the attention layers of a block: one, or several beside each other."""
    if hasattr(block, "attn"):
        return [(f"{place}.attn", block, block.attn)]
    if isinstance(beside := getattr(block, "attns", None), nn.ModuleList):
        return [(f"{place}.attns.{j}.attn", branch, branch.attn) for j, branch in enumerate(beside)]
    raise ValueError(f"{place} ({type(block).__name__}) has no attention layer of its own; leave it out with `blocks`")


def _is_rotary(model: nn.Module, old: Layer) -> bool:
    known = getattr(old, "rotary", False)
    return known or (getattr(model, "rope", None) is not None and isinstance(old, AttentionRope | eva.EvaAttention))


def _is_ours(layer: Layer) -> bool:
    return isinstance(layer, HeadsAttention | SoftAttention)


def _obstacle(old: Layer, shared_bias: bool = False) -> str | None:
    """Why a layer cannot be read as projections and terms, and what to do; None where it can."""
    if _is_ours(old):
        grid = isinstance(old, SoftAttention) and not old.streams
        return "convolves on the grid of tokens, which layers of other mechanisms do not" if grid else None
    if shared_bias or any(getattr(old, name, None) is not None for name in RELATIVE):
        return (
            "adds a relative position bias to the product of each query and key, which layers of this package do not "
            "have; create the network without it (Beit: use_rel_pos_bias=False, use_shared_rel_pos_bias=False)"
        )
    if type(old) not in READABLE:
        return (
            f"is a {type(old).__module__}.{type(old).__name__}, which is not known; use a network with timm's "
            "Attention, AttentionRope, EvaAttention or Beit's Attention"
        )
    if old.attn_drop.p > 0:
        return f"drops attention weights (p = {old.attn_drop.p}), of which there are none; use attn_drop_rate=0"
    inner, dim = old.proj.in_features, old.proj.out_features
    if inner != dim:
        return f"has heads of {inner} channels together; layers of this package need as many as embed_dim, {dim}"
    return None


# What takes its place


def _replacement(
    model: nn.Module, old: Layer, place: str, attention: str, options: Mapping[str, Any], plain: bool
) -> nn.Module:
    if why := _obstacle(old, shared_bias=getattr(model, "rel_pos_bias", None) is not None):
        raise ValueError(
            f"cannot convert to {attention} attention: {place} {why}, or leave its block out with `blocks`"
        )
    terms = _terms(old, _is_rotary(model, old))
    if terms.names and attention == "soft":
        raise ValueError(
            f"cannot convert to soft attention: {place} has {' and '.join(terms.names)}, but the landmarks of SOFT are "
            'projections of averages of tokens; use another mechanism such as "sima", or leave it out with `blocks`'
        )
    qkv = _qkv(old)
    kwargs: dict[str, Any] = {} if attention == "soft" or (plain and not terms.names) else {"terms": terms}
    kinds = ATTENTIONS if plain and not terms.names else WITH_TERMS
    weight = qkv.weight
    # without memory: the projections are there, and gains are made below
    layer: Any = kinds[attention](
        weight.shape[1], num_heads=old.num_heads, device="meta", dtype=weight.dtype, **kwargs, **options
    )
    if attention == "soft":
        layer.q, _, layer.v = _parts(qkv)
    else:
        layer.qkv = qkv
    layer.proj, layer.proj_drop = old.proj, old.proj_drop
    if isinstance(layer, SeqNormAttention):
        _start_gains(layer, old, weight.device)
    for module in set(layer.modules()) - set(old.modules()):
        module.training = old.training
    return layer


def _terms(old: Layer, rotary: bool) -> Terms:
    there = {name: getattr(old, name, None) for name in ("q_norm", "k_norm", "norm", "gate")}
    there = {name: None if isinstance(module, nn.Identity) else module for name, module in there.items()}
    half, prefix = getattr(old, "rotate_half", False), getattr(old, "num_prefix_tokens", 0)
    return Terms(**there, rotary=rotary, rotate_half=half, num_prefix_tokens=prefix)


def _qkv(old: Layer) -> nn.Linear:
    """The projection to queries, keys and values: the layer that is there, or made of several."""
    if isinstance(old, SoftAttention):
        return _joined([old.q, old.q, old.v])
    if old.qkv is None:
        groups = getattr(old, "num_kv_groups", 1)
        return _joined([old.q_proj, *(_repeated(w, old.num_heads, groups) for w in (old.k_proj, old.v_proj))])
    if getattr(old, "q_bias", None) is None:
        return old.qkv
    bias = torch.cat((old.q_bias, torch.zeros_like(old.q_bias), old.v_bias))
    return _linear(old.qkv.weight, _parameter(bias, old.q_bias, old.v_bias))


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, cast(nn.Parameter, bias)
    return layer


def _parameter(value: Tensor, *of: Tensor | None) -> nn.Parameter:
    return nn.Parameter(value.detach().clone(), any(p is not None and p.requires_grad for p in of))


def _joined(linears: Sequence[nn.Linear]) -> nn.Linear:
    weights, biases = [x.weight for x in linears], [x.bias for x in linears]
    weight = _parameter(torch.cat(weights), *weights)
    if all(b is None for b in biases):
        return _linear(weight, None)
    full = [w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)]
    return _linear(weight, _parameter(torch.cat(full), *biases))


def _repeated(linear: nn.Linear, num_heads: int, groups: int) -> nn.Linear:
    """A projection to fewer heads, each for `groups` of the queries', as one to all of them."""
    if groups == 1:
        return linear
    weight, bias = (
        None if p is None else p.unflatten(0, (num_heads // groups, -1)).repeat_interleave(groups, 0).flatten(0, 1)
        for p in (linear.weight, linear.bias)
    )
    assert weight is not None
    return _linear(_parameter(weight, linear.weight), None if bias is None else _parameter(bias, linear.bias))


def _parts(qkv: nn.Linear) -> list[nn.Linear]:
    biases = [None] * 3 if qkv.bias is None else [_parameter(b, qkv.bias) for b in qkv.bias.chunk(3)]
    return [_linear(_parameter(w, qkv.weight), b) for w, b in zip(qkv.weight.chunk(3), biases, strict=True)]


def _start_gains(layer: SeqNormAttention, old: Layer, device: torch.device) -> None:
    for name, p in layer.named_parameters(recurse=False):
        layer.register_parameter(name, nn.Parameter(torch.empty_like(p, device=device)))
    layer.reset_parameters()
    if isinstance(old, SeqNormAttention):
        for name, _ in layer.named_parameters(recurse=False):
            layer.register_parameter(name, old.get_parameter(name))


# The network


def _can_become_ours(model: nn.Module, blocks: Sequence[nn.Module], chosen: set[int]) -> bool:
    """Whether a network differs from that of this package in its methods only; subclasses have their own."""
    if type(model) is not timm_vit.VisionTransformer or type(model.patch_embed) is not PatchEmbed:
        return False
    if any(type(block) is not timm_vit.Block for block in blocks):
        return False
    return all(i in chosen or _obstacle(block.attn) is None for i, block in enumerate(blocks))


def _become_ours(model: Any) -> None:
    # By class, since the caller's object must be the one that changes, as in `nn.Module.to`: optimisers, hooks and
    # names for parts of it stay valid. Both classes derive from timm's or mirror it, and keep the same attributes.
    for block in model.blocks:
        block.__class__ = Block
    model.__class__ = VisionTransformer
    embed = model.patch_embed
    model.in_chans = embed.proj.in_channels
    # what `dynamic_img_size=True` does on construction
    model.dynamic_img_size = True
    embed.strict_img_size, embed.flatten, embed.output_fmt = False, False, Format.NHWC


def _record(model: Any, attention: str, blocks: list[int] | None, options: Mapping[str, Any]) -> None:
    cfg, earlier = getattr(model, "pretrained_cfg", None), getattr(model, "conversion", None)
    step = {"attention": attention, "attn_options": dict(options), "blocks": blocks}
    record: dict[str, Any] = {"base": earlier["base"] if earlier else (cfg or {}).get("architecture"), **step}
    if earlier and blocks is not None:
        record["before"] = [*earlier.get("before", ()), {name: earlier[name] for name in step}]
    model.conversion = record
    names = [] if blocks is None else getattr(model, "attention", "softmax").split(" and ")
    model.attention = " and ".join(dict.fromkeys((*names, attention)))
    if cfg:
        # a copy: networks may share one
        model.pretrained_cfg = model.default_cfg = {**cfg, "architecture": "converted"}


@register_model
def converted(
    pretrained: bool = False,
    base: str = "",
    attention: str = "seqnorm",
    attn_options: Mapping[str, Any] | None = None,
    blocks: Sequence[int] | None = None,
    before: Sequence[Mapping[str, Any]] = (),
    **kwargs: Any,
) -> nn.Module:
    """The network `base` of timm after `convert(model, attention, blocks=blocks, **attn_options)`.

    `before` holds the same three arguments of conversions that came first. All others go to `base`. With `pretrained`
    the weights of `base` are loaded before the conversion; those of a saved network ("local-dir:...", "hf-hub:...")
    after it.
    """
    if not base:
        raise ValueError(
            'the network "converted" needs the name of the one to convert, such as base="vit_small_patch16_224"'
        )
    own = kwargs.pop("pretrained_cfg", None)
    steps = [*before, {"attention": attention, "attn_options": attn_options, "blocks": blocks}]
    make = partial(_converted, base, steps, pretrained and not own, kwargs.get("cache_dir"))
    of_base = timm.get_pretrained_cfg(base)
    cfg = own or {**(of_base.to_dict(remove_source=True) if of_base else {}), "architecture": "converted"}
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(
        make, "converted", pretrained and bool(own), pretrained_cfg=cfg, feature_cfg=feature_cfg, **kwargs
    )


def _converted(
    base: str, steps: Sequence[Mapping[str, Any]], pretrained: bool, cache_dir: str | None, **kwargs: Any
) -> nn.Module:
    model = timm.create_model(base, pretrained=pretrained, cache_dir=cache_dir, **kwargs)
    for step in steps:
        convert(model, step["attention"], blocks=step["blocks"], **(step["attn_options"] or {}))
    return model
