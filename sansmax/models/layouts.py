"""What a checkpoint calls its weights: unwrapped, recognised, and under the names of a model.

A file may wrap its tensors (`{"model": ...}`), put a prefix before each name (`module.`), and name them as the code
that wrote it did. Each file of networks, here as in timm, has a `checkpoint_filter_fn(state_dict, model)` that knows
the names others published; this file finds it, and finds out what it left out.
"""

import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from sansmax.errors import InputError

State = dict[str, Tensor]
WRAPPERS = ("state_dict", "model", "model_state_dict")
AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
# what DistributedDataParallel, torch.compile, Lightning modules and this package's runs put before a name
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
AVERAGED_PREFIXES = ("ema.module.", "ema.", "model_ema.module.", "model_ema.", "ema_model.module.", "ema_model.")

# plain words, a name that must be there, and one that must not
LAYOUTS = (
    ("SOFT or SOFT++ as its authors published it", r"^block\d\.\d+\.att\.mha\.", None),
    ("XCiT as its authors published it", r"^blocks\.\d+\.attn\.temperature$", r"^pos_embed\."),
    ("XCiT of timm", r"^blocks\.\d+\.attn\.temperature$", None),
    ("SimA on XCiT as its authors published it", r"^pos_embeder\.token_projection\.", None),
    ("CvT as its authors published it", r"^stage\d\.blocks\.\d+\.attn\.(conv_)?proj_q", None),
    ("DeiT III as its authors published it", r"^blocks\.\d+\.gamma_1$", None),
    ("DeiT with a distillation token", r"^dist_token$", None),
    ("a vision transformer named as DeiT's and timm's are", r"^blocks\.\d+\.attn\.qkv\.weight$", r"gamma_q|^stages\."),
)


class Renamed(NamedTuple):
    """Tensors under a model's names, the names of the file that became none of them, and what went wrong if so."""

    state: State
    dropped: tuple[str, ...]
    trouble: str


def recognise(names: Collection[str], own: Collection[str]) -> str:
    """The layout in plain words, from the names of the file and those of the model."""

    def some(pattern: str) -> bool:
        return any(re.search(pattern, name) for name in names)

    for words, there, absent in LAYOUTS:
        if some(there) and not (absent and some(absent)):
            return words
    return "the model's own names" if set(names) & set(own) else "names of no known layout"


def unwrap(checkpoint: Any, own: Collection[str], use_ema: bool = False) -> tuple[State, tuple[str, ...]]:
    """The tensors by name, without wrappers and prefixes, and which those were.

    `use_ema` asks for the moving average of the weights. Raises InputError where there is none, and for a file that
    holds no tensors by name.
    """
    found, taken = checkpoint, []
    for _ in range(3):
        if not isinstance(found, Mapping):
            raise InputError(
                f"a checkpoint is a dictionary of tensors by name, got {_kind(found)}"
                + (f" under {'.'.join(taken)!r}" if taken else "")
                + ("; give its state_dict()" if isinstance(found, nn.Module) else "")
            )
        keys = (*AVERAGED, *WRAPPERS) if use_ema else WRAPPERS
        key = next((k for k in keys if isinstance(found.get(k), Mapping | nn.Module)), None)
        if key is None:
            break
        taken.append(key)
        found = found[key]
    assert isinstance(found, Mapping)
    state, prefixes = _without_prefixes(_tensors(found), own, use_ema)
    if use_ema and not any(t in AVERAGED or t in AVERAGED_PREFIXES for t in (*taken, *prefixes)):
        there = ", ".join(map(str, list(checkpoint)[:8]))
        raise InputError(
            f"there is no moving average of the weights ({' or '.join(AVERAGED[:2])}), only {there}; leave out use_ema"
        )
    return state, (*taken, *prefixes)


def _tensors(found: Mapping[Any, Any]) -> State:
    others = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    state = {name: x for name, x in found.items() if isinstance(x, Tensor) and isinstance(name, str)}
    if not state:
        raise InputError(f"no tensors by name were found, only {', '.join(others[:8]) or 'an empty dictionary'}")
    if others:
        kinds = ", ".join(f"{name} ({_kind(found[name])})" for name in others[:8])
        raise InputError(f"beside tensors there are {kinds}; give the dictionary of the tensors alone")
    return state


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _without_prefixes(state: State, own: Collection[str], use_ema: bool) -> tuple[State, tuple[str, ...]]:
    taken: list[str] = []
    averaged = {name: x for name, x in state.items() if name.startswith(AVERAGED_PREFIXES)}
    if averaged and len(averaged) < len(state) and not any(name.startswith(AVERAGED_PREFIXES) for name in own):
        # two copies of the weights; their counters (`n_averaged`) belong to neither
        state = averaged if use_ema else {name: x for name, x in state.items() if name not in averaged}
    for _ in range(4):
        prefixes = (*AVERAGED_PREFIXES, *PREFIXES) if use_ema else PREFIXES
        for prefix in prefixes:
            # a wrapper stands before nearly every name, and a model's own part before some of its names
            inside = sum(name.startswith(prefix) for name in state)
            if 2 * inside > len(state) and not any(name.startswith(prefix) for name in own):
                state = {name.removeprefix(prefix): x for name, x in state.items() if name != "n_averaged"}
                taken.append(prefix)
                break
        else:
            break
    return state, tuple(taken)


# Names


def filter_of(model: nn.Module) -> Callable[..., Mapping[str, Tensor]] | None:
    """The `checkpoint_filter_fn` that knows the published names of a model, or None.

    It is looked for beside the model's entry point, then beside its class and the classes that one is made of.
    """
    name = getattr(model, "conversion", {}).get("base") or (getattr(model, "pretrained_cfg", None) or {}).get(
        "architecture", ""
    )
    places = [timm.models.model_entrypoint(name).__module__] if name and timm.is_model(name) else []
    places += [cls.__module__ for cls in type(model).__mro__]
    found = (getattr(sys.modules.get(place), "checkpoint_filter_fn", None) for place in places)
    return next((function for function in found if function is not None), None)


def rename(state: State, model: nn.Module, own: Collection[str]) -> Renamed:
    """The tensors under the model's names; those that have them already are taken as they are.

    Nothing is resized: where the mapping of a timm model does that by itself, the tensor of the file is put back.
    """
    function = filter_of(model)
    if function is None or set(state) == set(own):
        return Renamed(state, (), "")
    # a mapping that resamples tables of positions by itself may fail at it; those named as the model's need no mapping
    positions = {name: x for name, x in state.items() if name in own and name.rsplit(".", 1)[-1] == "pos_embed"}
    for kept in ({}, positions):
        given = {name: x for name, x in state.items() if name not in kept}
        try:
            options = _options(function, given, own)
            # a mapping may change the dictionary it is given
            mapped = {**_call(function, dict(given), model, options), **kept}
            coloured = _call(function, _coloured(given), model, options)
            break
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            trouble = f"{function.__module__}.checkpoint_filter_fn failed: {type(error).__name__}: {error}"
    else:
        return Renamed(state, (), trouble)
    # a name that stays is the same tensor
    new = {name: x for name, x in coloured.items() if name not in state}
    sources = {name: (name,) for name in mapped if name in state} | _sources(new, list(given))
    for name, x in mapped.items():
        origin = sources.get(name, ())
        if len(origin) == 1 and _resized(name, state[origin[0]], x, getattr(model, "num_prefix_tokens", 0)):
            mapped[name] = state[origin[0]]
    used = {origin for origins in sources.values() for origin in origins}
    # buffers that a network computes itself, such as indices of windows, are no loss
    computed = {name for name, _ in model.named_buffers()} - set(own)
    return Renamed(mapped, tuple(name for name in state if name not in used | computed), "")


def _options(function: Callable[..., Any], state: State, own: Collection[str]) -> dict[str, bool]:
    # timm's DeiT III asks for it where it registers its models
    wanted = any(re.search(r"\.gamma_[12]$", name) for name in state) and any(".ls1.gamma" in name for name in own)
    return (
        {"adapt_layer_scale": True} if wanted and "adapt_layer_scale" in inspect.signature(function).parameters else {}
    )


def _call(function: Callable[..., Any], state: State, model: nn.Module, options: dict[str, bool]) -> Mapping[str, Any]:
    if len(inspect.signature(function).parameters) == 1:
        return function(state)
    return function(state, model, **options)


def _coloured(state: State) -> State:
    """Tensors of the same shapes, each with a number of its own everywhere, in no memory."""
    return {
        name: torch.tensor(float(i), dtype=torch.float64).expand(x.shape)
        for i, (name, x) in enumerate(state.items(), 1)
    }


def _sources(mapped: Mapping[str, Any], names: list[str]) -> dict[str, tuple[str, ...]]:
    """Which tensors of the file each mapped one is made of, by the numbers in it: split, joined or resized alike."""
    found = {}
    for name, x in mapped.items():
        flat = x.flatten()
        last = max(flat.numel() - 1, 0)
        some = flat[torch.linspace(0, last, min(flat.numel(), 1000), dtype=torch.float64).long()]
        colours = {round(value) for value in some.unique().tolist()}
        # zeros stand where a mapping filled in what the file lacks
        found[name] = tuple(names[c - 1] for c in sorted(colours) if 0 < c <= len(names))
    return found


def _resized(name: str, file: Tensor, mapped: Tensor, prefix: int) -> bool:
    """Whether a mapping resampled positions or patches; it may also take prefix tokens away, split or reshape."""
    if file.shape == mapped.shape or file.ndim != mapped.ndim:
        return False
    if name.rsplit(".", 1)[-1].startswith("pos_embed") and file.ndim == 3:
        return abs(file.shape[1] - mapped.shape[1]) > prefix
    return file.ndim == 4 and file.shape[:2] == mapped.shape[:2]
