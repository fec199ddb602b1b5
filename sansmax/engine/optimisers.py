"""timm's optimisers and schedule for a network: what decays, what learns how fast, and which settings apply."""

from typing import Any

import timm.optim
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import Optimizer

from sansmax.engine.config import OptimConfig
from sansmax.errors import InputError, unknown_name

# last parts of the names of tables and tokens that are learned as they are, beside those that a network names itself
KEPT_LARGE = ("pos_embed", "cls_token", "dist_token", "reg_token")


def make_optimizer(network: nn.Module, optim: OptimConfig) -> Optimizer:
    """The optimiser `optim.opt` of timm for the parameters that are trained.

    Gains, biases and other parameters of one axis, positions and tokens do not decay. With `layer_decay` d a layer
    that is k layers before the classifier learns d^k as fast. Muon's own rule is for the matrices inside the network;
    the embedding, the classifier, positions and tokens, gains and biases learn by its AdamW.

    Raises InputError for a name timm does not have, and for a setting that the optimiser does not take.
    """
    given = _settings(optim)
    groups = _groups(network, optim)
    try:
        # every group says what decays
        optimizer = create_optimizer_v2(groups, opt=optim.opt, lr=optim.lr, weight_decay=0.0, **given)
    except (ValueError, AssertionError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"optim.opt={optim.opt!r} cannot be built with {given}: {error}") from None
    if optim.sched == "constant":
        # otherwise the schedule does it
        for group in optimizer.param_groups:
            group["lr"] *= group.get("lr_scale", 1.0)
    return optimizer


def _settings(optim: OptimConfig) -> dict[str, Any]:
    """The settings that are given and apply."""
    name = optim.opt.lower().rsplit("_", 1)[-1]
    try:
        info = timm.optim.get_optimizer_info(name)
    except ValueError:
        names = [str(known) for known in timm.optim.list_optimizers()]
        raise unknown_name("optimiser optim.opt", optim.opt, names, hint="(timm.optim.list_optimizers())") from None
    given: dict[str, Any] = {"momentum": optim.momentum}
    for key, value, takes in (("betas", optim.opt_betas, info.has_betas), ("eps", optim.opt_eps, info.has_eps)):
        if value is None:
            continue
        if not takes:
            raise InputError(f"{optim.opt} has no {key}; leave out optim.opt_{key}")
        given[key] = value
    if optim.opt_betas is not None and len(optim.opt_betas) != info.num_betas:
        raise InputError(f"{optim.opt} has {info.num_betas} betas, optim.opt_betas has {len(optim.opt_betas)}")
    return given


def _groups(network: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    names = [name for name, p in network.named_parameters() if p.requires_grad]
    if not names:
        raise InputError("every parameter is frozen, nothing is left to train; freeze fewer with model.freeze")
    how: dict[str, Any] = {"no_weight_decay_list": undecayed(network)}
    if "muon" in optim.opt.lower():
        how["fallback_list"] = outer(network)
    if optim.layer_decay is None:
        return param_groups_weight_decay(network, optim.weight_decay, **how)
    return param_groups_layer_decay(network, optim.weight_decay, layer_decay=optim.layer_decay, **how)


def undecayed(network: nn.Module) -> set[str]:
    """Names of parameters of several axes that do not decay."""
    own = getattr(network, "no_weight_decay", set)()
    return set(own) | {name for name, _ in network.named_parameters() if name.rsplit(".", 1)[-1] in KEPT_LARGE}


def outer(network: nn.Module) -> set[str]:
    """Names of the parameters that are no matrices between tokens: first layer, classifier, positions and tokens."""
    first = (getattr(network, "pretrained_cfg", None) or {}).get("first_conv") or ()
    prefixes = (first,) if isinstance(first, str) else tuple(first)
    # networks of features have a linear embedding, and no configuration of a first convolution
    prefixes = (*(f"{name}." for name in prefixes), "patch_embed.", "embed.")
    chosen = {name for name, _ in network.named_parameters() if name.startswith(prefixes)}
    return chosen | undecayed(network) | set(classifier_parameters(network))


def classifier_parameters(network: nn.Module) -> list[str]:
    """Names of the parameters of the classifier, of both where a network has two."""
    heads = getattr(network, "get_classifier", tuple)()
    heads = heads if isinstance(heads, tuple | list) else (heads,)
    of_heads = {id(p) for head in heads if isinstance(head, nn.Module) for p in head.parameters()}
    return [name for name, p in network.named_parameters() if id(p) in of_heads]


def make_schedule(optimizer: Optimizer, optim: OptimConfig, epochs: int, updates_per_epoch: int) -> Any:
    """timm's cosine with warm-up as a function of the optimiser's steps; None for a constant rate."""
    if optim.sched == "constant":
        return None
    warmup = epochs / 2 if optim.warmup_epochs >= epochs else optim.warmup_epochs
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=warmup,  # pyright: ignore[reportArgumentType] - a part of an epoch is fine
        warmup_lr=min(optim.warmup_lr, optim.lr),
        min_lr=min(optim.min_lr, optim.lr),
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )
    return scheduler
