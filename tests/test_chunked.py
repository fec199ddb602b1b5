"""A stack of blocks in chunks equals the blocks called one after the other: result, gradients, whatever the chunk."""

import pytest
import torch
from networks import perturbed

from sansmax.engine.chunked import run_chunked
from sansmax.models.blocks import Block

N, C = 29, 22
ATTENTIONS = {
    "seqnorm": {},
    "sima": {"attn_options": {"reference_tokens": 5}},
    "soft": {"attn_options": {"num_landmarks": 5}},
    "soft over values": {"order": "linear", "attn_options": {"num_landmarks": 5}},
}
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)


def stack(attention, depth=2, dtype=torch.float64, **options):
    blocks = [Block(C, 2, attention=attention.split()[0], **ATTENTIONS[attention], **options) for _ in range(depth)]
    return perturbed(torch.nn.ModuleList(blocks)).to(dtype)


def in_order(blocks, x, mask=None):
    for block in blocks:
        x = block(x, mask)
    return x


def draw(kind, b=2):
    x = torch.randn(b, N, C, dtype=torch.float64, requires_grad=True)
    if kind == "mask":
        return x, (torch.rand(b, N) < 0.6).index_fill(1, torch.tensor(0), True)
    return x, torch.rand(b, N, dtype=torch.float64, requires_grad=True) if kind == "weight" else None


@every_attention
@pytest.mark.parametrize("keep", ["inputs", "recompute"])
@pytest.mark.parametrize("kind", [None, "mask", "weight"])
@pytest.mark.parametrize("chunk_tokens", [7, 1000])
def test_result_and_gradients_are_those_of_the_blocks(attention, keep, kind, chunk_tokens, assert_same):
    blocks, (x, mask) = stack(attention), draw(kind)
    found = run_chunked(blocks, x, mask=mask, chunk_tokens=chunk_tokens, keep=keep)
    expected = in_order(blocks, x, mask)
    real = mask if kind == "mask" else torch.ones(2, N, dtype=torch.bool)
    assert_same(found[real], expected[real], "result")
    by = torch.randn_like(expected[real])
    inputs = {"x": x, **dict(blocks.named_parameters())} | ({"weight": mask} if kind == "weight" else {})
    pairs = (
        torch.autograd.grad(out[real], list(inputs.values()), by, allow_unused=True, materialize_grads=True)
        for out in (found, expected)
    )
    for name, a, b in zip(inputs, *pairs, strict=True):
        # some biases cancel: beside gradients of 1 and more theirs is 0
        assert_same(a, b, f"gradient of {name}", scale=max(1.0, b.abs().max().item()))


@every_attention
def test_a_token_at_a_time_gives_the_same(attention, assert_same):
    blocks, (x, mask) = stack(attention), draw("mask")
    found = run_chunked(blocks, x[:, :9], mask=mask[:, :9], chunk_tokens=1)
    expected = in_order(blocks, x[:, :9], mask[:, :9])
    assert_same(found[mask[:, :9]], expected[mask[:, :9]], "result")
    pairs = (torch.autograd.grad(out[mask[:, :9]].square().sum(), x)[0] for out in (found, expected))
    assert_same(*pairs, "gradient")


@every_attention
@pytest.mark.parametrize("in_place", [False, True])
def test_without_gradients_the_tokens_are_overwritten_where_asked(attention, in_place, assert_same):
    blocks, (x, mask) = stack(attention), draw("mask")
    x = x.detach()
    before, expected = x.clone(), in_order(blocks, x, mask)
    with torch.no_grad():
        found = run_chunked(blocks, x, mask=mask, chunk_tokens=7, in_place=in_place)
    assert_same(found[mask], expected[mask])
    assert (found is x) == in_place
    assert in_place or torch.equal(x, before)


@every_attention
def test_float32_equals_the_blocks_too(attention, assert_same):
    blocks, x = stack(attention, dtype=torch.float32), torch.randn(2, N, C)
    with torch.no_grad():
        assert_same(run_chunked(blocks, x, chunk_tokens=7), in_order(blocks, x))


@every_attention
def test_bfloat16_is_as_accurate_as_the_blocks(attention, assert_as_accurate):
    blocks, x = stack(attention, dtype=torch.bfloat16), torch.randn(2, N, C, dtype=torch.bfloat16)
    with torch.no_grad():
        found, plain = run_chunked(blocks, x, chunk_tokens=7), in_order(blocks, x)
        exact = in_order(blocks.double(), x.double())
    assert_as_accurate(found, plain, exact)


@pytest.mark.parametrize("garbage", [7.0, float("nan"), float("inf")])
@every_attention
def test_padding_may_hold_anything(attention, garbage, assert_same):
    blocks, (x, mask) = stack(attention), draw("mask", b=1)
    padded = x.detach().masked_fill(~mask[..., None], garbage).requires_grad_()
    alone = x.detach()[:, mask[0]].requires_grad_()
    inside, bag = run_chunked(blocks, padded, mask=mask, chunk_tokens=7)[mask], run_chunked(blocks, alone)[0]
    assert_same(inside, bag)
    by = torch.randn_like(bag)
    parameters = list(blocks.parameters())
    (a, *of_inside), (b, *of_bag) = (
        torch.autograd.grad(out, [inp, *parameters], by) for out, inp in ((inside, padded), (bag, alone))
    )
    assert_same(a[mask], b[0], "gradient of the tokens")
    assert (a[~mask] == 0).all()
    for one, other in zip(of_inside, of_bag, strict=True):
        assert_same(one, other, "gradient", scale=max(1.0, other.abs().max().item()))


def test_frozen_parameters_have_no_gradient_and_the_others_theirs(assert_same):
    blocks, (x, _) = stack("seqnorm"), draw(None)
    for p in blocks[1].parameters():
        p.requires_grad_(False)
    run_chunked(blocks, x.detach(), chunk_tokens=7).sum().backward()
    assert all(p.grad is None for p in blocks[1].parameters())
    found = [p.grad for p in blocks[0].parameters()]
    blocks.zero_grad()
    in_order(blocks, x.detach()).sum().backward()
    for a, p in zip(found, blocks[0].parameters(), strict=True):
        assert_same(a, p.grad, scale=max(1.0, p.grad.abs().max().item()))


@every_attention
def test_progress_counts_to_its_total(attention):
    seen = []
    with torch.no_grad():
        run_chunked(stack(attention), draw(None)[0], chunk_tokens=7, progress=lambda *now: seen.append(now))
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
        ({"keep": "all"}, "keep must be one of inputs, recompute, got 'all'"),
        ({"in_place": True}, "in_place overwrites the tokens that gradients need"),
        ({"tokens": torch.randn(2, 0, C, dtype=torch.float64)}, r"there are no tokens, shape \(2, 0, 22\)"),
        (
            {"tokens": torch.randn(3, C, dtype=torch.float64)},
            r"takes tokens \(batch, tokens, channels\), got shape \(3, 22\)",
        ),
        ({"mask": torch.ones(2, N, dtype=torch.int64)}, r"mask\.bool\(\)"),
        ({"mask": torch.ones(2, N + 1, dtype=torch.bool)}, r"one value per image and token, \(2, 29\), got \(2, 30\)"),
        ({"blocks": [torch.nn.Identity()]}, r"block 0 \(Identity\) cannot run in chunks"),
        ({"blocks": [Block(C, 2, attention="relu")]}, r"block 0 \(PointwiseAttention\) cannot run in chunks"),
        ({"blocks": [Block(C, 2, proj_drop=0.1)]}, "block 0 draws random numbers in training"),
        ({"blocks": [Block(C, 2, drop_path=0.1)]}, "block 0 draws random numbers in training"),
    ],
)
def test_what_does_not_fit_is_an_error(change, message):
    arguments = {"blocks": stack("seqnorm"), "tokens": draw(None)[0], **change}
    with pytest.raises(ValueError, match=message):
        run_chunked(arguments.pop("blocks"), arguments.pop("tokens"), **arguments)
