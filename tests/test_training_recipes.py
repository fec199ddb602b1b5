"""Losses are their definitions, several batches are one, and timm's optimisers do what a recipe asks of them."""

import math
import re
import warnings

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from torchvision.ops import sigmoid_focal_loss

import sansmax  # noqa: F401  (registers the networks)
from sansmax.data.loading import Batch
from sansmax.engine.config import OptimConfig, load_config
from sansmax.engine.losses import focal_losses, image_losses
from sansmax.engine.module import Classifier
from sansmax.engine.optimisers import classifier_parameters, make_optimizer, outer
from sansmax.errors import InputError

WEIGHTS = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)


def pico(**options):
    torch.manual_seed(0)
    return timm.create_model("seqnorm_vit_pico_patch8_128", depth=2, img_size=16, num_classes=3, **options)


def batches(*sizes, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    whole = [(torch.randn(n, 1, 16, 16, dtype=dtype), torch.randint(3, (n,)), torch.arange(n)) for n in sizes]
    return [Batch(*parts) for parts in whole]


def trained(module, data, clip=None, epochs=2):
    """The module after Lightning has trained it, as a run does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning.*")
        trainer = pl.Trainer(
            accelerator="cpu",
            precision="64-true",
            max_epochs=epochs,
            gradient_clip_val=clip,
            accumulate_grad_batches=module.batches_per_step,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(data, batch_size=None))
    return module


# Losses


def definition(logits, target, loss, smoothing, weights, gamma=2.0):
    """Loss of one image and what it counts, term by term; `target` is a class, or shares of the classes."""
    c = len(logits)
    p = [float(torch.exp(x) / torch.exp(logits).sum()) for x in logits]
    mixed = not isinstance(target, int)
    t = list(target) if mixed else [1.0 if k == target else 0.0 for k in range(c)]
    counts = sum(a * w for a, w in zip(t, weights, strict=True))
    if not mixed:
        t = [a * (1 - smoothing) + smoothing / c for a in t]
    log = [math.log(x) for x in p]
    if loss == "cross_entropy":
        return -sum(a * w * x for a, w, x in zip(t, weights, log, strict=True)), counts
    if loss == "focal":
        return counts * -((1 - p[target]) ** gamma) * log[target], counts
    yes = [1 / (1 + float(torch.exp(-x))) for x in logits]
    terms = [-(a * math.log(s) + (1 - a) * math.log(1 - s)) for a, s in zip(t, yes, strict=True)]
    return counts * sum(terms) / c, counts


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("loss", "smoothing", "mixed"),
    [
        ("cross_entropy", 0.0, False),
        ("cross_entropy", 0.1, False),
        ("cross_entropy", 0.1, True),
        ("bce", 0.1, False),
        ("bce", 0.0, True),
        ("focal", 0.0, False),
    ],
)
def test_the_loss_of_each_image_is_its_definition(loss, smoothing, mixed, weighted):
    torch.manual_seed(1)
    logits = 3 * torch.randn(7, 3, dtype=torch.float64)
    targets = torch.rand(7, 3, dtype=torch.float64).softmax(1) if mixed else torch.randint(3, (7,))
    weights = WEIGHTS if weighted else None
    said = image_losses(logits, targets, OptimConfig(loss=loss, smoothing=smoothing), weights)
    for i in range(7):
        target = targets[i].tolist() if mixed else int(targets[i])
        exact = definition(logits[i], target, loss, smoothing, WEIGHTS.tolist() if weighted else [1.0] * 3)
        assert (said.losses[i].item(), said.weights[i].item()) == pytest.approx(exact, rel=1e-12)
    if loss == "cross_entropy" and not mixed:
        mean = F.cross_entropy(logits, targets, weight=weights, label_smoothing=smoothing)
        torch.testing.assert_close(said.losses.sum() / said.weights.sum(), mean, rtol=1e-12, atol=0)


def test_the_focal_loss_of_two_classes_is_that_of_their_difference():
    torch.manual_seed(2)
    logits, labels = 4 * torch.randn(50, 2, dtype=torch.float64), torch.randint(2, (50,))
    for gamma in (0.0, 1.5, 2.0):
        theirs = sigmoid_focal_loss(logits[:, 1] - logits[:, 0], labels.double(), alpha=-1, gamma=gamma)
        torch.testing.assert_close(focal_losses(logits, labels, gamma), theirs, rtol=1e-10, atol=1e-14)


def test_an_image_that_is_certain_has_a_finite_gradient():
    logits = torch.tensor([[200.0, 0.0], [-200.0, 0.0]], requires_grad=True)
    focal_losses(logits, torch.tensor([0, 0]), 0.5).sum().backward()
    assert logits.grad is not None and logits.grad.isfinite().all()
    assert logits.grad[1].tolist() == pytest.approx([-1.0, 1.0])


def test_half_precision_logits_are_summed_in_full():
    logits, labels = torch.randn(5, 3, dtype=torch.bfloat16), torch.randint(3, (5,))
    for loss in ("cross_entropy", "bce", "focal"):
        optim = OptimConfig(loss=loss)
        said = image_losses(logits, labels, optim)
        assert said.losses.dtype == torch.float32
        assert torch.equal(said.losses, image_losses(logits.float(), labels, optim).losses)


@pytest.mark.parametrize("change", ["mixup=0.2", "cutmix=1", "smoothing=0.1"])
def test_the_focal_loss_asks_for_hard_labels(change):
    with pytest.raises(InputError, match="the focal loss cannot be combined with mixup, cutmix or smoothing"):
        load_config(None, ["loss=focal", change])


def test_mixing_ends_after_its_epochs():
    module = Classifier(pico(), OptimConfig(mixup=0.5, mixup_off_epoch=1), 3, 2, 1, 0)
    images, labels, _ = batches(4)[0]
    module.on_train_batch_start(batches(4)[0], 0)
    mixed, shares = module.mixed(images.clone(), labels)
    assert shares.shape == (4, 3) and not torch.equal(mixed, images)
    off = Classifier(pico(), OptimConfig(mixup=0.5, mixup_off_epoch=1), 3, 2, 1, 0)
    # one epoch is over
    off._trainer = type("Trainer", (), {"current_epoch": 1})()
    same, classes = off.mixed(images.clone(), labels)
    assert torch.equal(same, images) and torch.equal(classes, labels)


# Several batches


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_several_batches_are_one_batch_of_all_their_images(opt):
    # groups of 4 + 2 images and of 3, classes weighted, clipped, with a schedule
    parts = batches(4, 2, 3)
    joined = Batch(*(torch.cat(pair) for pair in zip(parts[0], parts[1], strict=True)))
    small = OptimConfig(opt=opt, grad_accum_steps=2, lr=0.05, class_weights=True, smoothing=0.1, warmup_epochs=1)
    large = small.model_copy(update={"grad_accum_steps": 1})
    several = trained(Classifier(pico().double(), small, 3, 2, 3, 0, WEIGHTS), parts, clip=0.1)
    one = trained(Classifier(pico().double(), large, 3, 2, 2, 0, WEIGHTS), [joined, parts[2]], clip=0.1)
    assert several.updates_per_epoch == one.updates_per_epoch == 2
    assert several.global_step == one.global_step == 4
    start = pico().double().state_dict()
    moved = 0.0
    for name, value in one.network.state_dict().items():
        torch.testing.assert_close(several.network.state_dict()[name], value, rtol=1e-9, atol=1e-11)
        moved = max(moved, (value - start[name]).abs().max().item())
    assert moved > 1e-3


def test_batches_of_a_step_draw_other_random_numbers():
    drawn = []
    for n, number in ((1, 0), (2, 0), (2, 1), (2, 2)):
        module = Classifier(pico(), OptimConfig(grad_accum_steps=n), 3, 1, 4, 7)
        module.on_train_batch_start(batches(2)[0], number)
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[1] == drawn[3] != drawn[2]


# Optimisers

NAMES = {
    "vit": ("seqnorm_vit_pico_patch8_128", {"depth": 2, "class_token": True, "reg_tokens": 2}),
    "soft": ("soft_tiny", {"depths": (1, 1, 2, 1)}),
    "xcit": ("sima_nano_12_p16", {"depth": 2}),
    "cvt": ("sima_cvt_13", {"depths": (1, 1, 2)}),
    "slide": ("seqnorm_slide_small", {"in_features": 12}),
}


@pytest.fixture(scope="module", params=NAMES)
def network(request):
    """A small network of each family."""
    name, options = NAMES[request.param]
    options = options if request.param == "slide" else {"img_size": 32, **options}
    return timm.create_model(name, num_classes=3, **options)


def test_layers_learn_half_as_fast_as_the_one_after_them(network):
    optimizer = make_optimizer(network, OptimConfig(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    scales = {n: scale[id(p)] for n, p in network.named_parameters()}
    head = classifier_parameters(network)
    assert {"head.weight", "head.bias"} == set(head) and {scales[n] for n in head} == {1.0}
    # in the order of the network: blocks, and blocks of class attention behind them
    blocks = {}
    for n, s in scales.items():
        if found := re.match(r"(.*blocks\.\d+)\.", n):
            blocks.setdefault(found[1], set()).add(s)
    depth = len(blocks)
    assert list(blocks.values()) == [{0.5 ** (depth - i)} for i in range(depth)]
    stem = re.compile(r"(stages\.0\.)?(patch_embed|pos_embed|embed)\b")
    first = {s for n, s in scales.items() if stem.match(n)}
    assert first == {min(scales.values())} == {0.5 ** (depth + 1)}


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_gains_biases_positions_and_tokens_do_not_decay(network, layer_decay):
    optimizer = make_optimizer(network, OptimConfig(weight_decay=0.3, layer_decay=layer_decay))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    decays = {n: decay[id(p)] for n, p in network.named_parameters()}
    for n, p in network.named_parameters():
        last = n.rsplit(".", 1)[-1]
        kept = p.ndim <= 1 or last in ("pos_embed", "cls_token", "reg_token")
        assert decays[n] == (0.0 if kept else 0.3), n
    assert {0.0, 0.3} == set(decays.values())


def test_a_constant_rate_keeps_the_decay_of_layers():
    network = pico()
    optimizer = make_optimizer(network, OptimConfig(layer_decay=0.5, sched="constant", lr=0.8))
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(network.head.weight)] == 0.8
    assert rates[id(network.patch_embed.proj.weight)] == pytest.approx(0.8 * 0.5**3)


def test_muon_learns_the_matrices_inside_and_adamw_the_rest():
    # so many classes that the classifier looks like a matrix inside
    network = pico(class_token=True, global_pool="token")
    network.reset_classifier(64)
    optimizer = make_optimizer(network, OptimConfig(opt="muon", lr=0.01))
    network(torch.randn(2, 1, 16, 16)).square().sum().backward()
    optimizer.step()
    names = {id(p): n for n, p in network.named_parameters()}
    by_adamw = {names[id(p)] for p, state in optimizer.state.items() if "exp_avg_sq" in state}
    by_muon = {names[id(p)] for p, state in optimizer.state.items() if "exp_avg_sq" not in state}
    inside = {n for n in names.values() if n.startswith("blocks.") and n.endswith("weight") and "norm" not in n}
    assert by_muon == inside and by_adamw == set(names.values()) - inside
    assert {"pos_embed", "cls_token", "head.weight", "patch_embed.proj.weight"} <= outer(network)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["opt=adamww"], "unknown optimiser optim.opt 'adamww': did you mean 'adamw"),
        (["opt=sgd", "opt_betas=[0.9, 0.99]"], "sgd has no betas; leave out optim.opt_betas"),
        (["opt=lion", "opt_eps=1e-6"], "lion has no eps; leave out optim.opt_eps"),
        (["opt=adamw", "opt_betas=[0.9]"], "adamw has 2 betas, optim.opt_betas has 1"),
    ],
)
def test_a_setting_that_an_optimiser_has_not_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(pico(), load_config(None, changes).optim)


@pytest.mark.parametrize("opt", ["adamw", "lamb", "nadamuon", "lion", "sgd", "lookahead_adamw"])
def test_settings_reach_the_optimiser_where_it_has_them(opt):
    info = timm.optim.get_optimizer_info(opt.rsplit("_", 1)[-1])
    optim = OptimConfig(
        opt=opt,
        opt_betas=(0.8, 0.95) if info.has_betas else None,
        opt_eps=1e-5 if info.has_eps else None,
        momentum=0.7,
    )
    group = make_optimizer(pico(), optim).param_groups[0]
    if info.has_betas:
        assert tuple(group["betas"]) == (0.8, 0.95)
    if info.has_eps:
        assert group["eps"] == 1e-5
    if info.has_momentum:
        assert group["momentum"] == 0.7
