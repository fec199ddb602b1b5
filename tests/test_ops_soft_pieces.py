"""SOFT in pieces: their size changes nothing, nor do values left out, and the operators keep their contracts."""

import pytest
import torch
from soft_definition import HEADS, B, D, M, attend, compare, draw, draw_weight, every_kind, kernel, some_kind
from torch.library import opcheck

from sansmax.ops import soft_pieces
from sansmax.ops.soft import SoftLayerState, landmark_inverse, soft_affine, soft_attention, soft_layer_rows
from sansmax.ops.soft_pieces import soft_apply, soft_mix, soft_rows, soft_summarise


@pytest.fixture(params=[(1, 1), (60, 4), (300, 1)], ids=str)
def piece(request, monkeypatch):
    """One token of one image at a time, some tokens of one, and some images whole."""
    monkeypatch.setattr(soft_pieces, "CPU_PIECE", request.param[0])
    monkeypatch.setattr(soft_pieces, "LEAST_TOKENS", request.param[1])


@pytest.mark.parametrize("way", ["blocks", "state"])
@pytest.mark.parametrize("m", [5, 11])
@some_kind
def test_the_size_of_pieces_and_the_layout_change_nothing(piece, way, m, kind, assert_same):
    inputs, weight = draw(m=m), draw_weight(kind)
    with_weight = [*inputs, weight] if kind == "weight" else inputs
    # as drawn, and with the heads of a token side by side, as a projection gives them
    aside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:2]]
    for q, v in (inputs[:2], aside):
        expected = attend("torch", *inputs, weight)
        compare(assert_same, attend(way, q, v, inputs[2], weight), expected, with_weight)


@some_kind
def test_the_layer_without_values_equals_the_layer_with_them(piece, kind, assert_same):
    n, c, e = 13, 11, HEADS * D
    x = torch.randn(B, n, c, dtype=torch.float64, requires_grad=True)
    shapes = [(e, c), (e,), (e, c), (e,), (17, e)]
    w_q, b_q, w_v, b_v, w_out = p = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    landmarks, weight = draw()[2], draw_weight(kind)

    def heads(w, b):
        return (x @ w.mT + b).unflatten(-1, (HEADS, D)).transpose(1, 2)

    rows = soft_layer_rows(heads(w_q, b_q), landmarks, weight)
    pieces = zip(*(t.split((3, 0, 10), 1) for t in (rows, x, weight)), strict=True)
    first, *rest = (SoftLayerState.of(*piece) for piece in pieces)
    for state in rest:
        first = first.merge(state)
    found = rows @ soft_affine(first, landmark_inverse(landmarks), w_v, b_v, w_out)
    out = attend("torch", heads(w_q, b_q), heads(w_v, b_v), landmarks, weight)
    expected = out.transpose(1, 2).flatten(2) @ w_out.mT
    compare(assert_same, found, expected, [x, *p, landmarks, *([weight] if kind == "weight" else [])])


def test_a_second_derivative_of_pieces_is_an_error():
    q, v, landmarks = draw()
    (grad,) = torch.autograd.grad(soft_attention(q, v, landmarks).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(grad.sum(), q)


# opcheck looks at the gradient of its own copies
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@every_kind
def test_the_operators_keep_their_contracts(kind):
    q, v, landmarks = draw()
    weight, z = draw_weight(kind), landmark_inverse(landmarks.detach()).requires_grad_()
    right = torch.randn_like(landmarks).requires_grad_()
    opcheck(soft_summarise, (q, v, landmarks, weight))
    opcheck(soft_apply, (q, landmarks, right, weight))
    opcheck(soft_mix, (q, v, landmarks, z, weight))
    opcheck(soft_rows, (q, landmarks, weight))


@some_kind
def test_both_results_of_a_mix_have_gradients_for_any_matrix(kind, assert_same):
    (q, v, landmarks), weight = draw(), draw_weight(kind)
    z = torch.randn(B, HEADS, M, M, dtype=torch.float64, requires_grad=True)
    p, w = kernel(q, landmarks), weight.double()[:, None, :, None]
    p = p * w if kind == "mask" else p
    total = p.mT @ (w * v)
    inputs = [q, v, landmarks, z] + ([weight] if kind == "weight" else [])
    both = (torch.cat(pair, dim=2) for pair in (soft_mix(q, v, landmarks, z, weight), (p @ z @ total, total)))
    compare(assert_same, *both, inputs)


def test_backward_keeps_the_inputs_and_small_matrices_only():
    inputs, kept = draw(1009), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        soft_attention(*inputs)
    storages = {x.untyped_storage().data_ptr() for x in inputs}
    others = [x for x in kept if x.untyped_storage().data_ptr() not in storages]
    assert others
    assert max(x.numel() for x in others) <= B * HEADS * M * max(M, D)
