"""What `config.json` of the Hugging Face hub says of a network: enough for timm to build it again by name."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import timm

from sansmax.errors import InputError, unknown_name

# of `pretrained_cfg`: where other weights came from
SOURCES = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "state_dict", "custom_load", "tag", "label_offset")
DATA = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
# of this package's preprocessing, as `run.preprocess.to_dict()` gives it, and timm's word for it
CROP_MODES = {"squash": "squash", "crop": "center", "pad": "border"}


def describe(
    network: Any,
    labels: Sequence[str] | None = None,
    data_config: Mapping[str, Any] | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of `config.json`, in timm's words.

    The number of classes is not among `model_args`: transformers gives it beside them.
    """
    cfg = dict(network.pretrained_cfg)
    num_classes = int(network.num_classes)
    arguments = arguments_of(network, model_args)
    in_chans = int(arguments.get("in_chans", cfg["input_size"][0]))
    data = _data(cfg, data_config or {}, in_chans, arguments.get("img_size"))
    cfg = {k: v for k, v in cfg.items() if v is not None and k not in SOURCES and k not in DATA}
    architecture = cfg.pop("architecture")
    for name in ("test_input_size", "pool_size", "label_names", "label_descriptions"):
        cfg.pop(name, None)
    if "min_input_size" in cfg:
        cfg["min_input_size"] = [in_chans, *cfg["min_input_size"][1:]]
    if in_chans not in (1, 3):
        # older timm adapts the weights of any such network from three channels, and drops them where it cannot
        cfg.pop("first_conv", None)
    config: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": num_classes,
        "num_features": getattr(network, "num_features", None),
        "global_pool": arguments.get("global_pool"),
        "label_names": _labels(labels, num_classes),
        "model_args": arguments,
        "pretrained_cfg": {**cfg, **data, "num_classes": num_classes},
    }
    # as it will be read: lists for tuples
    return json.loads(json.dumps({k: v for k, v in config.items() if v is not None}))


def arguments_of(network: Any, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `timm.create_model` needs beside the name to build the network again.

    Raises ValueError where this timm does not record it and it is not given, and for what JSON cannot hold.
    """
    if given is None and not hasattr(network, "_model_args"):
        raise InputError(
            f"timm {timm.__version__} does not record with which arguments a network was built; give them, "
            "model_args={...} as they were given to create_model ({} for none), or use a newer timm"
        )
    arguments = _current_arguments(network, dict(given or {}))
    arguments |= getattr(network, "conversion", {})
    arguments.pop("num_classes", None)
    arguments = {name: value for name, value in arguments.items() if value is not None}
    for name, value in arguments.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            raise InputError(
                f"the argument {name}={value!r} cannot be written down; give a plain value for it that builds the same "
                f"network, model_args={{{name!r}: ...}} (timm takes names of layers, such as act_layer='gelu')"
            ) from None
    return arguments


def _current_arguments(network: Any, given: dict[str, Any]) -> dict[str, Any]:
    try:
        from timm.models import get_model_args
    except ImportError:
        arguments = {**getattr(network, "_model_args", {}), **given}
        for name in ("in_chans", "global_pool"):
            if isinstance(getattr(network, name, None), int | str):
                arguments[name] = getattr(network, name)
        return arguments
    try:
        return get_model_args(network, given)
    except ValueError as error:
        raise InputError(f"model_args do not agree with the model: {error}") from error


def _labels(labels: Sequence[str] | None, num_classes: int) -> list[str] | None:
    if labels is None:
        return None
    names = [str(name) for name in labels]
    if isinstance(labels, str) or len(names) != num_classes:
        raise InputError(
            f"labels must name the {num_classes} classes in order, got {len(names)}: {', '.join(names[:8])}"
        )
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InputError(f"each class needs a name of its own; {', '.join(twice)} stands more than once in labels")
    return names


def _data(cfg: Mapping[str, Any], given: Mapping[str, Any], in_chans: int, img_size: Any) -> dict[str, Any]:
    """How images are prepared, of what is given and the model's own configuration."""
    given = _in_timms_words(given, in_chans)
    for name in given:
        if name not in DATA:
            raise unknown_name("key of data_config", name, DATA)
    size = img_size or cfg["input_size"][-2:]
    size = (size, size) if isinstance(size, int) else tuple(size)
    found: dict[str, Any] = {name: cfg[name] for name in DATA if cfg.get(name) is not None}
    found |= {"input_size": (in_chans, *size), **given}
    if len(found["input_size"]) != 3 or found["input_size"][0] != in_chans:
        raise InputError(
            f"input_size must be (channels, height, width) with the {in_chans} channels of the model, got "
            f"{tuple(found['input_size'])}"
        )
    for name in ("mean", "std"):
        values = [float(x) for x in found.get(name, (0.5,))]
        if len(values) not in (1, in_chans):
            if name in given:
                raise InputError(f"{name} must have 1 value or {in_chans}, one a channel, got {values}")
            values = [sum(values) / len(values)]
        found[name] = values * in_chans if len(values) == 1 else values
    return found


def _in_timms_words(given: Mapping[str, Any], in_chans: int) -> dict[str, Any]:
    found = dict(given)
    if "image_size" in found:
        found["input_size"] = (found.pop("in_chans", in_chans), *found.pop("image_size"))
    if "resize_mode" in found:
        mode = found.pop("resize_mode")
        if mode not in CROP_MODES:
            raise unknown_name("resize_mode", str(mode), CROP_MODES)
        found["crop_mode"] = CROP_MODES[mode]
        # whole pictures, but where the middle was cut out
        found["crop_pct"] = found.get("crop_pct", 1.0) if mode == "crop" else 1.0
    return found
