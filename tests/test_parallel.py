"""Tokens shared out over processes give what one process gives, forwards and backwards, by one short sum per layer."""

import copy
import itertools
import re
from functools import reduce

import pytest
import timm
import torch
import torch.distributed as dist
from gloo import in_processes
from networks import perturbed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sansmax  # noqa: F401  (registers the networks)
from sansmax.engine.parallel import Members, sequence_mesh, shard_sequence, sharded_logits
from sansmax.errors import InputError
from sansmax.models.gated import GatedPool
from sansmax.ops import (
    L1State,
    LandmarkSums,
    Mean,
    Moments,
    ProjectedL1State,
    SoftLayerState,
    SoftState,
)

VIT, C, HEADS, DEPTH = "seqnorm_vit_pico_patch8_128", 24, 3, 2
SMALL = {"depth": DEPTH, "embed_dim": C, "num_heads": HEADS, "num_classes": 5}
CLASS = {"class_token": True, "global_pool": "token"}
SOFT = {"attention": "soft", "attn_options": {"num_landmarks": 5}}
REGISTERS = {"class_token": True, "reg_tokens": 2, "pos_embed": "learn", "pool_include_prefix": True}

# network, its changes, (grid of patches, or tokens of bags), and what is special
IMAGES = {
    "seqnorm": ({}, (3, 5), ""),
    "seqnorm class mask": ({**CLASS, "pos_embed": "learn"}, (3, 5), "bool"),
    "seqnorm registers weights": (REGISTERS, (3, 5), "float"),
    "seqnorm empty": ({**CLASS, "qkv_bias": True, "init_values": 0.5}, (1, 3), ""),
    "seqnorm again": ({"pos_embed": "learn"}, (3, 5), "bool again"),
    "seqnorm resampled": ({"pos_embed": "learn", "img_size": 32}, (3, 5), "bool"),
    "sima": ({"attention": "sima"}, (3, 5), ""),
    "sima one head": ({"attention": "sima", "num_heads": 1, "qkv_bias": True}, (3, 5), "float"),
    "sima class reference": ({**CLASS, "attention": "sima", "attn_options": {"reference_tokens": 9}}, (3, 5), "bool"),
    "sima empty": ({"attention": "sima", "qkv_bias": True}, (1, 3), "float"),
    "soft": (SOFT, (3, 5), ""),
    "soft class weights": ({**SOFT, **CLASS, "qkv_bias": True}, (3, 5), "float"),
    "soft empty again": ({**SOFT, **CLASS}, (1, 3), "bool again"),
}
BAGS = {
    "seqnorm bag": ("seqnorm_slide_small", {"pos_embed": "sincos"}, (2, 17), "bool"),
    "seqnorm bags": ("seqnorm_slide_small", {"pos_embed": "sincos"}, (9, 1, 3), "lengths float"),
    "sima bags": ("sima_slide_small", {}, (9, 1, 3), "lengths again"),
    "soft bag": ("soft_slide_small", {"attn_options": {"num_landmarks": 5}}, (2, 17), "float"),
    "soft bags": ("soft_slide_small", {"attn_options": {"num_landmarks": 5}}, (9, 1, 3), "lengths bool"),
    "gated bags": ("abmil_slide_small", {"attn_dim": 7}, (9, 1, 3), "lengths float"),
}
# positions are resampled in float32, whatever the network's type
CASES = [case for case in (*IMAGES, *BAGS) if case != "seqnorm resampled"]
NARROW = ["seqnorm resampled", *CASES[::3]]


def made(case, dtype=torch.float64, **more):
    """The network of a case and what it is given, the same in every process."""
    torch.manual_seed(len(case))
    if case in IMAGES:
        changes, grid, how = IMAGES[case]
        size = (8 * grid[0], 8 * grid[1])
        network = timm.create_model(VIT, **{**SMALL, "img_size": size, "dtype": dtype, **changes, **more})
        x = torch.randn(2, 1, *size, dtype=dtype)
        given, lead = {}, (2, grid[0] * grid[1])
    else:
        name, changes, sizes, how = BAGS[case]
        if name.startswith("abmil"):
            network = timm.create_model(name, in_features=6, embed_dim=C, num_classes=5, dtype=dtype, **changes)
        else:
            network = timm.create_model(name, **{**SMALL, "in_features": 6, "dtype": dtype, **changes, **more})
        lead = (1, sum(sizes)) if "lengths" in how else sizes
        x = torch.randn(*lead, 6, dtype=dtype)
        given = {"coords": torch.randint(0, 50, (*lead, 2)).to(dtype)}
        if "lengths" in how:
            given["lengths"] = sizes
    if "bool" in how:
        given["mask"] = torch.rand(lead) < 0.7
        given["mask"][:, 0] = True
    if "float" in how:
        given["mask"] = torch.rand(lead, dtype=dtype)
    network = perturbed(network).train()
    network.set_grad_checkpointing("again" in how)
    return network, x, given


def found(network, forward, x, given):
    """Logits and every gradient of a loss: of parameters, of what goes in, of weights of tokens."""
    leaves = {"x": x.requires_grad_()}
    if "mask" in given and given["mask"].is_floating_point():
        leaves["mask"] = given["mask"].requires_grad_()
    logits = forward(x, **given)
    (logits.sin() * torch.arange(1, logits.shape[1] + 1)).sum().backward()
    leaves |= dict(network.named_parameters())
    # a parameter without gradient would make DDP wait for ever
    return logits.detach(), {name: p.grad.clone() for name, p in leaves.items()}


def on_rank(rank, cases, dtype):
    answers = {}
    for case in cases:
        network, x, given = made(case, dtype)
        sharded = shard_sequence(network)
        assert [n for n, _ in sharded.named_parameters()] == [n for n, _ in network.named_parameters()]
        answers[case] = found(network, sharded, x, given)
    return answers


@pytest.fixture(scope="module")
def answers():
    return {
        (2, torch.float64): in_processes(2, on_rank, CASES[::2], torch.float64),
        (4, torch.float64): in_processes(4, on_rank, CASES, torch.float64),
        (4, torch.float32): in_processes(4, on_rank, NARROW, torch.float32),
    }


@pytest.mark.parametrize(
    ("case", "world", "dtype"),
    [
        *((case, 4, torch.float64) for case in CASES),
        *((case, 2, torch.float64) for case in CASES[::2]),
        *((case, 4, torch.float32) for case in NARROW),
    ],
    ids=str,
)
def test_logits_and_the_average_of_the_gradients_are_those_of_one_process(answers, case, world, dtype, assert_same):
    network, x, given = made(case, dtype)
    logits, gradients = found(network, network, x, given)
    ranks = [rank[case] for rank in answers[world, dtype]]
    for each, _ in ranks:
        assert torch.equal(each, ranks[0][0])
        assert_same(each, logits, "logits")
    largest = max(g.abs().max().item() for g in gradients.values())
    for name, gradient in gradients.items():
        mean = sum(g[name] for _, g in ranks) / world
        assert_same(mean, gradient, name, scale=largest)


# Parts that no process has as a whole

PARTS = {
    "seqnorm class mask": (2, 0, 1),
    "soft class weights": (0, 2, 1),
    "soft bag": (9, 0, 8),
    "gated bags": (5, 0, 8),
}
PARTS |= {"seqnorm bags": ((0, 1, 2), (5, 0, 1), (4, 0, 0)), "seqnorm bag": (1, 16, 0)}


def pieces(case, given, x, rank):
    """What process `rank` is given of a case: rows of patches, or some tokens of each bag."""
    parts, given = PARTS[case], dict(given)
    if case in IMAGES:
        columns = IMAGES[case][1][1]
        first, many = sum(parts[:rank]), parts[rank]
        if "mask" in given:
            given["mask"] = given["mask"][:, first * columns : (first + many) * columns]
        return x[:, :, 8 * first : 8 * (first + many)], given
    if "lengths" not in given:
        where = slice(sum(parts[:rank]), sum(parts[: rank + 1]))
        return x[:, where], {name: value[:, where] for name, value in given.items()}
    if isinstance(parts[0], int):
        # bags in stretches: a process has the end of one and the start of the next
        ends = [0, *(sum(given["lengths"][: i + 1]) for i in range(3))]
        low, high = sum(parts[:rank]), sum(parts[: rank + 1])
        own = [slice(max(a, low), max(a, low, min(b, high))) for a, b in itertools.pairwise(ends)]
    else:
        starts = [sum(given["lengths"][:i]) for i in range(3)]
        before = [sum(p[i] for p in parts[:rank]) for i in range(3)]
        own = [slice(s + b, s + b + n) for s, b, n in zip(starts, before, parts[rank], strict=True)]
    cut = {name: torch.cat([given[name][:, w] for w in own], 1) for name in ("coords", "mask") if name in given}
    return torch.cat([x[:, w] for w in own], 1), {**cut, "lengths": [w.stop - w.start for w in own]}


def local_parts(rank):
    answers = {}
    for case in PARTS:
        network, x, given = made(case)
        x, given = pieces(case, given, x, rank)
        sharded = shard_sequence(network, local=True)
        logits = sharded(x, **given)
        logits.square().sum().backward()
        answers[case] = logits.detach(), [p.grad for p in network.parameters()]
    return answers


def test_parts_of_any_size_that_no_process_has_as_a_whole_give_what_the_whole_gives(assert_same):
    ranks = in_processes(3, local_parts)
    for case in PARTS:
        network, x, given = made(case)
        logits = network(x, **given)
        logits.square().sum().backward()
        gradients = [p.grad for p in network.parameters()]
        largest = max(g.abs().max().item() for g in gradients)
        for rank in ranks:
            assert_same(rank[case][0], logits.detach(), f"logits of {case}")
        for (name, _), g, *each in zip(
            network.named_parameters(), gradients, *(r[case][1] for r in ranks), strict=True
        ):
            assert_same(sum(each) / 3, g, f"{case}: {name}", scale=largest)


# What travels


def counted(rank, cases):
    sent, send = [], dist.all_reduce

    def all_reduce(tensor, *arguments, **options):
        sent.append((tensor.numel(), tensor.dtype))
        return send(tensor, *arguments, **options)

    dist.all_reduce = all_reduce
    answers = {}
    for case in cases:
        network, x, given = made(case, torch.float32)
        network.set_grad_checkpointing(False)
        with torch.autocast("cpu", torch.bfloat16):
            logits = shard_sequence(network)(x, **given)
        forward, sent[:] = list(sent), []
        logits.float().sum().backward()
        answers[case] = forward, list(sent)
        sent.clear()
    return answers


def floats(case, world):
    """Numbers of each sum of a forward pass over two images or three bags, by the formulas of the documentation."""
    b, m, d = (3 if "bags" in case else 2), 5, C // HEADS
    pool = [b * (C + 1)]
    if case.startswith("soft"):
        # how many real tokens each process has, then two sums per layer
        return [world * b, *([b * m * (C + 1), b * m * C] * DEPTH), *pool]
    if case == "sima one head":
        return [b * (world * (C + 1) + C * (C + 1) // 2 + 2 * C)] * DEPTH + pool
    if case.startswith("sima"):
        return [b * (2 * C + C * d + HEADS)] * DEPTH + pool
    if case.startswith("gated"):
        return [b * world * (C + 2)]
    return [b * (world * (C + 1) + C * (C + 1) // 2)] * DEPTH + pool


def test_each_layer_takes_one_sum_of_the_numbers_that_the_formula_says_in_float32_under_autocast_too():
    cases = [*list(IMAGES)[:1], "sima", "sima one head", "soft", "soft bags", "sima bags", "gated bags"]
    for world in (2, 4):
        for rank in in_processes(world, counted, cases):
            for case, (forward, backward) in rank.items():
                assert [n for n, _ in forward] == floats(case, world), case
                # counts of tokens have no gradients
                there = [n for n, dtype in forward if dtype.is_floating_point]
                assert [n for n, _ in backward] == there[::-1], case
                assert {dtype for _, dtype in forward + backward} <= {torch.float32, torch.int64}, case


# Laws of rows that add up


def states(x, weight, landmarks=5):
    """Every state of the same tokens (b, n, c)."""
    c = x.shape[-1]
    w = torch.linspace(-1, 1, 2 * c * c, dtype=x.dtype).view(2 * c, c).sin()
    heads = x.unflatten(-1, (2, -1)).transpose(1, 2)
    by_head = None if weight is None else weight.unsqueeze(1).expand(heads.shape[:3])
    group = (x[..., 0] > 0).long()
    points = torch.linspace(-1, 1, len(x) * 2 * landmarks * c // 2, dtype=x.dtype).view(len(x), 2, landmarks, -1)
    rows = (x @ w.mT).sigmoid()
    yield Moments.of(x, weight)
    yield Mean.of(x, weight)
    yield ProjectedL1State.of(x, w, None, weight)
    yield L1State.of(heads, heads.cos(), heads.sin(), by_head)
    yield LandmarkSums.of(x, group, landmarks, weight)
    yield SoftState.of(heads, heads.cos(), points, weight)
    yield SoftLayerState.of(rows, x, weight)
    yield GatedPool.of(x, x[..., 0], weight)


def summed(parts):
    total = sum(part.to_sum(i, len(parts)) for i, part in enumerate(parts))
    return parts[-1].of_sum(total, len(parts))


@pytest.mark.parametrize("weighted", ["none", "bool", "float"])
def test_the_sum_of_the_rows_is_the_merged_state(weighted, assert_same):
    x = torch.randn(3, 23, 6, dtype=torch.float64) + 2
    weight = {"none": None, "bool": torch.rand(3, 23) < 0.6, "float": torch.rand(3, 23, dtype=torch.float64)}[weighted]
    if weighted == "bool":
        weight[1] = False
    sizes = (9, 0, 1, 13)
    masks = [None] * 4 if weight is None else weight.split(sizes, 1)
    each = zip(*(states(p, w) for p, w in zip(x.split(sizes, 1), masks, strict=True)), strict=True)
    for parts, whole in zip(each, states(x, weight), strict=True):
        for name, a, b, c in zip(whole._fields, summed(parts), reduce(type(whole).merge, parts), whole, strict=True):
            assert_same(a, b, f"{type(whole).__name__}.{name} and merged", scale=max(1.0, b.abs().max().item()))
            assert_same(a, c, f"{type(whole).__name__}.{name} and whole", scale=max(1.0, c.abs().max().item()))


def test_a_large_mean_with_a_small_spread_loses_no_digits_of_the_scatter():
    exact = torch.randn(4000, 6, dtype=torch.float64) * 0.5 + 1e4
    x = exact.float()
    parts = [Moments.of(p[None]) for p in x.split((1, 1700, 0, 2299))]
    found = summed(parts).covariance()[0].double()
    true = x.double().T.cov(correction=0)
    assert (found - true).abs().max() < 1e-4 * true.abs().max()
    # and E[x^2] - E[x]^2 of the same numbers has none
    naive = (x.T @ x / len(x) - x.mean(0)[:, None] * x.mean(0)).double()
    assert (naive - true).abs().max() > 0.1 * true.abs().max()


# With others who have other images

# what drops out of the last block must reach the logits from every process: no class token, whose owner is the first
DROP = {"drop_path_rate": 0.4, "class_token": False, "global_pool": "avg"}
MIXED = {"seqnorm drop": DROP, "sima drop": {**DROP, "attention": "sima"}}


def mixed_made(case):
    torch.manual_seed(7)
    network = perturbed(timm.create_model(VIT, **{**SMALL, **CLASS, "img_size": (24, 40), **MIXED.get(case, {})}))
    return network.double(), torch.randn(4, 1, 24, 40, dtype=torch.float64), torch.tensor([1, 0, 3, 2])


def on_mesh(rank, fsdp):
    mesh = sequence_mesh(2)
    network, images, labels = mixed_made("")
    names = [name for name, _ in network.named_parameters()]
    sharded = shard_sequence(copy.deepcopy(network).train(), mesh["sequence"])
    own = slice(0, 2) if mesh["data"].get_local_rank() == 0 else slice(2, 4)
    if fsdp:
        from torch.distributed.fsdp import fully_shard

        for block in sharded.blocks:
            fully_shard(block, mesh=whole_mesh(mesh))
        model = fully_shard(sharded, mesh=whole_mesh(mesh))
    else:
        model = DistributedDataParallel(sharded)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(2):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(images[own]), labels[own])
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    weights = [p.full_tensor() if fsdp else p for p in model.parameters()]
    return losses, dict(zip(names, [w.detach() for w in weights], strict=True))


def whole_mesh(mesh):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (mesh.size(),))


@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_groups_of_two_processes_train_as_one_process_does_on_all_images(fsdp, assert_same):
    ranks = in_processes(4, on_mesh, fsdp)
    network, images, labels = mixed_made("")
    optimiser = torch.optim.SGD(network.parameters(), lr=0.5)
    for step in range(2):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(network.train()(images), labels)
        loss.backward()
        optimiser.step()
        assert_same(torch.tensor([rank[0][step] for rank in ranks]).mean(), loss.detach().float(), f"loss {step}")
    for losses, weights in ranks:
        assert losses in (ranks[0][0], ranks[2][0])
        for name, p in network.named_parameters():
            assert_same(weights[name], p.detach(), name)


def with_drop_path(rank):
    answers = []
    for case in MIXED:
        network, images, _ = mixed_made(case)
        sharded = shard_sequence(network.train())
        # each process by itself would draw other numbers
        torch.manual_seed(100 + rank)
        answers.append([sharded(images).detach() for _ in range(2)])
    return answers


def test_drop_path_leaves_out_the_same_images_on_all_processes_as_on_one(assert_same):
    ranks = in_processes(2, with_drop_path)
    for i, case in enumerate(MIXED):
        network, images, _ = mixed_made(case)
        network.train()
        torch.manual_seed(100)
        expected = [network(images).detach() for _ in range(2)]
        assert not torch.equal(*expected)
        for rank in ranks:
            for found_, wanted in zip(rank[i], expected, strict=True):
                assert_same(found_, wanted, case)


# Refusals, and what a shared network is beside its tokens


def refusals(rank):
    said = {}

    def refuse(what, make):
        try:
            make()
        except InputError as error:
            said[what] = str(error)

    def train(**changes):
        network = timm.create_model(VIT, **{**SMALL, "img_size": 32, **changes}).train()
        shard_sequence(network)(torch.randn(1, 1, 32, 32))

    refuse("softmax", lambda: train(attention="softmax"))
    refuse("stem", lambda: train(stem="conv"))
    refuse("size", lambda: train(dynamic_img_size=False))
    refuse("timm", lambda: shard_sequence(timm.create_model("vit_tiny_patch16_224", depth=1)))
    refuse("xcit", lambda: shard_sequence(timm.create_model("sima_nano_12_p16", depth=1)))
    refuse("tokens", lambda: train(proj_drop_rate=0.1))
    refuse("patches", lambda: train(patch_drop_rate=0.1))
    refuse("mesh", lambda: sequence_mesh(3))
    refuse("pixels", lambda: shard_sequence(timm.create_model(VIT, depth=1))(torch.randn(1, 1, 32, 30)))
    refuse("member", lambda: Members(dist.new_group([0])))
    network = timm.create_model(VIT, **SMALL)
    sharded = shard_sequence(network)
    shared = {
        "names": list(sharded.state_dict()) == list(network.state_dict()),
        "classes": sharded.num_classes,
        "training": (sharded.eval().training, network.training, sharded.blocks[0].training),
        "copy": copy.deepcopy(sharded).head.weight is not network.head.weight,
        "head": sharded.head.weight is network.head.weight,
    }
    return said, shared


def test_what_cannot_be_shared_out_is_refused_and_the_rest_is_the_networks_own():
    (said, shared), (other, _) = in_processes(2, refusals)
    words = {
        "softmax": "softmax attention has no summary of fixed size.*Use a network such as",
        "stem": "convolutional stem needs the pixels of neighbouring rows",
        "size": "built for one size of images",
        "timm": "no vision transformer or slide network of this package",
        "xcit": "no vision transformer or slide network of this package",
        "tokens": r"blocks.0.mlp.drop1: rate 0.1|blocks.0.attn.proj_drop: rate 0.1",
        "patches": "patch_drop: rate 0.1.*set proj_drop_rate",
        "mesh": "groups of 3; sequence_parallel must be one of 1, 2",
        "pixels": "whole patches of 8 x 8 pixels, got 32 x 30",
        "member": "process 1 is not a member",
    }
    for what, pattern in words.items():
        text = other[what] if what == "member" else said[what]
        assert re.search(pattern, text), f"{what}: {text}"
    assert shared == {
        "names": True,
        "classes": 5,
        "training": (False, False, False),
        "copy": True,
        "head": True,
    }


def test_without_processes_there_is_nothing_to_share_with():
    with pytest.raises(InputError, match=r"no group of processes: start with torchrun"):
        shard_sequence(timm.create_model(VIT, **SMALL))


def one_process(rank):
    network, x, given = made("soft class weights")
    tokens = network.embed_rows(x, 0, (3, 5))
    return sharded_logits(network, tokens, mask=given["mask"]).detach(), network(x, **given).detach()


def test_embedded_tokens_of_a_group_of_one_give_what_the_network_gives(assert_same):
    ((found_, expected),) = in_processes(1, one_process)
    assert_same(found_, expected)
