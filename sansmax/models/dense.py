"""Detection and segmentation on any of timm's networks that give maps: `timm.create_model(name, features_only=True)`.

    from sansmax.models.dense import mask_rcnn, retinanet, segmenter
    detector = retinanet("soft_tiny", num_classes=91)

The detectors are torchvision's; what is here is the backbone they ask for: maps at several strides joined by a feature
pyramid network (FPN, https://arxiv.org/abs/1612.03144). Each level is resized to the size of the next finer one, not
by a factor of two, so images may have any size that the network takes.

Networks with one stride throughout (plain vision transformers) give maps of several depths, which are resized to the
strides that a pyramid would have.

Shapes: b images, c channels, (h, w) pixels.
"""

import inspect
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.norm_act import freeze_batch_norm_2d
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

from sansmax.errors import unknown_name

__all__ = ["FpnBackbone", "Segmenter", "fpn_backbone", "mask_rcnn", "retinanet", "segmenter"]

# the finest stride that is read, and how many levels a network of one stride is spread over
FIRST_STRIDE: dict[str | None, int] = {"maxpool": 4, "p6p7": 8, None: 4}
PLAIN_LEVELS: dict[str | None, int] = {"maxpool": 4, "p6p7": 3, None: 4}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class _Level(NamedTuple):
    # which of the network's maps, its channels, the stride it has and the stride it shall have
    map: int
    channels: int
    given: int
    stride: int


class FpnBackbone(nn.Module):
    """Maps of equal width at growing strides, as torchvision's detectors and `Segmenter` read them.

    `features` is a network of timm built with `features_only=True`. `out_channels` is the width of every map,
    `strides` how many pixels a cell of each is wide, coarsest last, those of `extra` included. `mean` and `std` are
    what the network expects its images to be normalised with.
    """

    def __init__(self, features: nn.Module, levels: Sequence[_Level], out_channels: int, extra: str | None) -> None:
        super().__init__()
        self.features, self.levels, self.out_channels = features, list(levels), out_channels
        self.channels_last = getattr(features, "output_fmt", "NCHW") == "NHWC"
        channels = [level.channels for level in levels]
        block = {
            "maxpool": LastLevelMaxPool,
            "p6p7": lambda: LastLevelP6P7(channels[-1], out_channels),
            None: lambda: None,
        }[extra]()
        self.fpn = FeaturePyramidNetwork(channels, out_channels, block)
        added = {"maxpool": 1, "p6p7": 2, None: 0}[extra]
        last = levels[-1].stride
        self.strides = [level.stride for level in levels] + [last * 2 ** (i + 1) for i in range(added)]
        self.mean, self.std = _normalisation(features)

    def forward(self, x: Float[Tensor, "b c h w"]) -> OrderedDict[str, Tensor]:
        """The maps by name, finest first: "0", "1", ... and then "pool" or "p6" and "p7"."""
        maps = self.features(x)
        named = OrderedDict()
        for i, level in enumerate(self.levels):
            found = maps[level.map]
            found = found.permute(0, 3, 1, 2) if self.channels_last else found
            if level.given != level.stride:
                found = _resized(found, (-(-x.shape[-2] // level.stride), -(-x.shape[-1] // level.stride)))
            named[str(i)] = found
        return OrderedDict(self.fpn(named))


def fpn_backbone(
    name_or_model: str | nn.Module,
    out_channels: int = 256,
    out_indices: Sequence[int] | None = None,
    pretrained: bool = False,
    extra: str | None = "maxpool",
    freeze_norm: bool = False,
    **model_arguments: Any,
) -> FpnBackbone:
    """The network with an FPN on top: a backbone for torchvision's detectors.

    `name_or_model` is a name that timm knows, built with `model_arguments`; or a network that is built already, with
    weights loaded into it, from which `fpn_backbone` takes the classifier away. `out_indices` are the maps to read,
    by default all with a stride of 4 or more ("p6p7": 8 or more). `extra` adds coarser levels: "maxpool" every second
    cell of the last one (Mask R-CNN), "p6p7" two by convolutions of the network's last map (RetinaNet), None none.
    `freeze_norm` fixes the statistics and weights of batch norms: for pretrained networks and a few images at a time.

    Raises ValueError for a name that timm does not know, a network without maps, maps that are not there or not in
    order, another `extra`, and arguments for a network that is built already.
    """
    if extra not in FIRST_STRIDE:
        raise ValueError(f'extra must be "maxpool", "p6p7" or None, got {extra!r}')
    wanted = None if out_indices is None else tuple(out_indices)
    if isinstance(name_or_model, nn.Module):
        if model_arguments or pretrained:
            given = ", ".join([*model_arguments, *(["pretrained"] if pretrained else [])])
            raise ValueError(f"{given} cannot be given for a network that is built already; build it with them")
        features = _features_of(name_or_model, wanted, extra)
    else:
        features = _features_by_name(name_or_model, wanted, extra, pretrained, model_arguments)
    levels = _levels(features, wanted, extra)
    if freeze_norm:
        features = freeze_batch_norm_2d(features)
    return FpnBackbone(features, levels, out_channels, extra)


def retinanet(
    name_or_model: str | nn.Module,
    num_classes: int,
    *,
    out_channels: int = 256,
    out_indices: Sequence[int] | None = None,
    pretrained: bool = False,
    freeze_norm: bool = False,
    anchor_scale: float = 4.0,
    model_arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> RetinaNet:
    """torchvision's RetinaNet (https://arxiv.org/abs/1708.02002) on a network of timm, strides 8 to 128.

    `num_classes` counts the background, whose label is 0. Anchors are squares and 1:2 rectangles of `anchor_scale`
    strides, in three sizes per octave. The network's own mean and std normalise the images, which lie in 0 to 1;
    `options` go to torchvision's class: `min_size` and `max_size` (images are resized: 800 and 1333), `score_thresh`.

    Raises ValueError as `fpn_backbone` does, and for an option that torchvision does not have.
    """
    _check_options(RetinaNet, options)
    arguments = dict(model_arguments or {})
    backbone = fpn_backbone(
        name_or_model, out_channels, out_indices, pretrained, "p6p7", freeze_norm=freeze_norm, **arguments
    )
    sizes = [tuple(anchor_scale * stride * 2 ** (k / 3) for k in range(3)) for stride in backbone.strides]
    own = {"image_mean": backbone.mean, "image_std": backbone.std, "anchor_generator": _anchors(sizes)}
    return RetinaNet(backbone, num_classes, **{**own, **options})


def mask_rcnn(
    name_or_model: str | nn.Module,
    num_classes: int,
    *,
    out_channels: int = 256,
    out_indices: Sequence[int] | None = None,
    pretrained: bool = False,
    freeze_norm: bool = False,
    anchor_scale: float = 8.0,
    model_arguments: Mapping[str, Any] | None = None,
    **options: Any,
) -> MaskRCNN:
    """torchvision's Mask R-CNN (https://arxiv.org/abs/1703.06870) on a network of timm, strides 4 to 64.

    Arguments and errors are those of `retinanet`; anchors have one size per level, `anchor_scale` strides.
    """
    _check_options(MaskRCNN, options)
    arguments = dict(model_arguments or {})
    backbone = fpn_backbone(
        name_or_model, out_channels, out_indices, pretrained, "maxpool", freeze_norm=freeze_norm, **arguments
    )
    sizes = [(anchor_scale * stride,) for stride in backbone.strides]
    own = {"image_mean": backbone.mean, "image_std": backbone.std, "rpn_anchor_generator": _anchors(sizes)}
    return MaskRCNN(backbone, num_classes, **{**own, **options})


def segmenter(
    name_or_model: str | nn.Module,
    num_classes: int,
    *,
    out_channels: int = 256,
    head_channels: int = 128,
    out_indices: Sequence[int] | None = None,
    pretrained: bool = False,
    freeze_norm: bool = False,
    model_arguments: Mapping[str, Any] | None = None,
) -> "Segmenter":
    """A class for every pixel, from a network of timm: `Segmenter` on `fpn_backbone`, with the errors of the latter."""
    arguments = dict(model_arguments or {})
    backbone = fpn_backbone(
        name_or_model, out_channels, out_indices, pretrained, None, freeze_norm=freeze_norm, **arguments
    )
    return Segmenter(backbone, num_classes, head_channels)


class Segmenter(nn.Module):
    """Semantic FPN: every level is brought to the finest one's size, and their sum is classified.

    A level climbs one octave at a time by a 3 x 3 convolution, group norm, ReLU and bilinear interpolation
    (https://arxiv.org/abs/1901.02446, figure 3). Images lie in 0 to 1; the network's mean and std are applied here.
    """

    def __init__(self, backbone: FpnBackbone, num_classes: int, head_channels: int = 128) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.backbone, self.num_classes = backbone, num_classes
        widths = [backbone.out_channels, head_channels]
        # the finest level has one convolution, level i has one for each octave that it climbs
        self.climbs = nn.ModuleList(
            nn.ModuleList(_conv_norm(widths[k > 0], head_channels) for k in range(max(1, i)))
            for i in range(len(backbone.strides))
        )
        self.classifier = nn.Conv2d(head_channels, num_classes, 1)
        for name, values in (("mean", backbone.mean), ("std", backbone.std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes h w"]:
        """Logits of every pixel."""
        maps = list(self.backbone((x - self.mean) / self.std).values())
        sizes = [m.shape[-2:] for m in maps]
        levels = []
        for i, (level, convs) in enumerate(zip(maps, self.climbs, strict=True)):
            # to the sizes of the finer levels, one after the other; the finest has nowhere to climb
            for conv, size in zip(cast(nn.ModuleList, convs), reversed(sizes[: max(1, i)]), strict=True):
                level = conv(level)
                if i > 0:
                    level = F.interpolate(level, size=size, mode="bilinear", align_corners=False)
            levels.append(level)
        total = sum(levels[1:], start=levels[0])
        return F.interpolate(self.classifier(total), size=x.shape[-2:], mode="bilinear", align_corners=False)


def _conv_norm(before: int, channels: int) -> nn.Sequential:
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0)
    conv = nn.Conv2d(before, channels, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.GroupNorm(groups, channels), nn.ReLU(inplace=True))


# The maps of a network


def _features_by_name(
    name: str, wanted: tuple[int, ...] | None, extra: str | None, pretrained: bool, arguments: dict[str, Any]
) -> nn.Module:
    # "hf-hub:..." and "local-dir:..." are not in the registry
    if ":" not in name and not timm.is_model(name):
        raise unknown_name("model", name, timm.list_models())
    chosen = {} if wanted is None else {"out_indices": wanted}
    features: Any = timm.create_model(name, features_only=True, pretrained=pretrained, **chosen, **arguments)
    if wanted is None and _is_plain(features.feature_info.info):
        spread = _spread(len(features.feature_info.info), PLAIN_LEVELS[extra])
        features = timm.create_model(name, features_only=True, pretrained=pretrained, out_indices=spread, **arguments)
    return features


def _features_of(model: nn.Module, wanted: tuple[int, ...] | None, extra: str | None) -> nn.Module:
    info: Any = getattr(model, "feature_info", None)
    if hasattr(info, "out_indices"):
        return model
    if not info or not hasattr(model, "forward_intermediates"):
        raise ValueError(
            f"{type(model).__name__} gives no maps (it has no feature_info and forward_intermediates); give a name "
            "that timm knows, or a network built with timm.create_model(name, features_only=True)"
        )
    if wanted is None:
        wanted = _spread(len(info), PLAIN_LEVELS[extra]) if _is_plain(info) else tuple(range(len(info)))
    features = FeatureGetterNet(model, out_indices=wanted)
    # the wrapper that timm makes by itself has it too
    features.pretrained_cfg = getattr(model, "pretrained_cfg", None)  # pyright: ignore[reportArgumentType]
    return features


def _is_plain(info: Sequence[Mapping[str, Any]]) -> bool:
    return len(info) > 1 and len({i["reduction"] for i in info}) == 1


def _spread(depth: int, count: int) -> tuple[int, ...]:
    # the last of each of `count` equal parts
    return tuple(sorted({max(0, (i + 1) * depth // count - 1) for i in range(count)}))


def _levels(features: Any, wanted: tuple[int, ...] | None, extra: str | None) -> list[_Level]:
    info = features.feature_info
    channels, reductions = list(info.channels()), [int(r) for r in info.reduction()]
    strides = reductions
    if _is_plain(info.info):
        strides = [FIRST_STRIDE[extra] * 2**i for i in range(len(reductions))]
    elif wanted is not None and sorted(set(strides)) != strides:
        raise ValueError(f"out_indices must name maps of growing strides, {wanted} have {strides}")
    # of maps of one stride the last, which has seen most layers
    last = {stride: i for i, stride in enumerate(strides)}
    first = 1 if wanted is not None else FIRST_STRIDE[extra]
    levels = [_Level(i, channels[i], reductions[i], stride) for stride, i in sorted(last.items()) if stride >= first]
    if not levels:
        raise ValueError(
            f"the network has maps of strides {reductions}, none of {first} or more; name the ones to read: out_indices"
        )
    return levels


def _normalisation(features: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    cfg: Any = getattr(features, "pretrained_cfg", None) or {}
    in_chans = next((m.in_channels for m in features.modules() if isinstance(m, nn.Conv2d)), 3)
    found = (cfg.get("mean", IMAGENET[0]), cfg.get("std", IMAGENET[1]))
    # networks for colour may have been built for another number of channels
    mean, std = (tuple(v) if len(v) == in_chans else (sum(v) / len(v),) * in_chans for v in found)
    return mean, std


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    if size[0] >= x.shape[-2]:
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    return F.adaptive_avg_pool2d(x, size)


# What the detectors ask for


def _anchors(sizes: Sequence[tuple[float, ...]]) -> AnchorGenerator:
    ratios = ((0.5, 1.0, 2.0),) * len(sizes)
    return AnchorGenerator(tuple(sizes), ratios)  # pyright: ignore[reportArgumentType]


def _check_options(detector: type[nn.Module], options: Mapping[str, Any]) -> None:
    # torchvision takes any keyword, and forgets those it does not know
    taken = {*inspect.signature(detector).parameters, *inspect.signature(GeneralizedRCNNTransform).parameters}
    allowed = sorted(taken - {"backbone", "num_classes", "kwargs"})
    for name in options:
        if name not in allowed:
            raise unknown_name(f"option of {detector.__name__}", name, allowed)
