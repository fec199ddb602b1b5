"""Every operation and layer compiles whole and exports for any batch and number of tokens, with the same numbers.

In interpreters of their own, since checked shapes break the graph.
"""

import pytest
from apart import assert_nothing_wrong

SETUP = """
import json, sys, traceback
import torch
from torch import Tensor, nn
from sansmax.models.blocks import ATTENTIONS
from sansmax.ops import seqnorm_attention, sima_attention, softmax_attention

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
wrong = {}

class Operation(nn.Module):
    def __init__(self, f, **options):
        super().__init__()
        self.f, self.options = f, options

    def forward(self, q, mask=None):
        return self.f(q, q.roll(1, -1) + 0.3, q.roll(2, -1), mask=mask, **self.options)

OPERATIONS = {
    "softmax": (softmax_attention, ["auto"]),
    "seqnorm": (seqnorm_attention, ["linear"]),
    "sima": (sima_attention, ["linear"]),
}

def subjects():
    for name, (f, orders) in OPERATIONS.items():
        for order in orders:
            yield f"{name}_attention {order}", Operation(f, order=order), lambda b, n: torch.randn(b, 3, n, 6)
    for name, build in ATTENTIONS.items():
        if name in ("squared_relu", "sigmoid"):
            # the graph of relu but for one function of each number
            continue
        layer = build(18, num_heads=3, qkv_bias=True)
        with torch.no_grad():
            for p in layer.parameters():
                p += 0.2 * torch.randn_like(p)
        # the direct orders are those of the operations
        for order in {"auto", *layer.orders} & {"auto", "moments"}:
            layer.order = order
            yield f"layer {name} {order}", layer, lambda b, n: torch.randn(b, n, 18)

def draw(make, b, n, masked):
    x = make(b, n).requires_grad_()
    return (x, (torch.rand(b, n) < 0.7).index_fill(1, torch.tensor(0), True)) if masked else (x,)

def same(name, found, expected):
    for a, e in zip(found, expected, strict=True):
        if not (a - e).abs().max() <= 1e-10 * max(1.0, e.abs().max()):
            wrong[name] = f"differs by {(a - e).abs().max()}"
"""

COMPILE = """
for name, subject, make in subjects():
    try:
        torch._dynamo.reset()
        # the gradient is made a graph of its own by aot_eager; that of masked tokens is the same but for their zeros
        make_graph = {"fullgraph": True, "dynamic": True}
        compiled, other = (torch.compile(subject, backend=b, **make_graph) for b in ("aot_eager", "eager"))
        for b, n, masked in ((2, 13, False), (3, 23, False), (2, 13, True)):
            arguments, results = draw(make, b, n, masked), []
            inputs = [arguments[0], *subject.parameters()]
            for f in (other if masked else compiled, subject):
                out = f(*arguments)
                grads = torch.autograd.grad(out.square().sum(), inputs, allow_unused=True, materialize_grads=True)
                results.append([out, *grads])
            same(f"{name}, masked: {masked}", *results)
    except Exception:
        wrong[name] = traceback.format_exc()
print(json.dumps(wrong))
"""

EXPORT = """
for name, subject, make in subjects():
    subject.eval()
    for masked in (False, True):
        try:
            b, n = torch.export.Dim("b", min=2), torch.export.Dim("n", min=2)
            arguments = draw(make, 3, 29, masked)
            token_axis = 2 if arguments[0].ndim == 4 else 1
            shapes = [{0: b, token_axis: n}, {0: b, 1: n}][: len(arguments)]
            with torch.no_grad():
                program = torch.export.export(subject, arguments, dynamic_shapes=tuple(shapes)).module()
                for size in ((3, 29), (2, 5), (5, 211)):
                    some = draw(make, *size, masked)
                    same(f"{name}, masked: {masked}, size {size}", [program(*some)], [subject(*some)])
        except Exception:
            wrong[f"{name}, masked: {masked}"] = traceback.format_exc()
print(json.dumps(wrong))
"""


@pytest.mark.slow
@pytest.mark.parametrize("script", [COMPILE, EXPORT], ids=["compile", "export"])
def test_graphs_are_whole_and_hold_for_any_size(script):
    assert_nothing_wrong(SETUP + script)
