"""What 16 bit costs each attention: digits of outputs and gradients, whether they stay finite, and the time.

A layer is run in float32, under autocast, and wholly in bfloat16, and compared with itself in float64. Beside the error
stands the one that rounding alone must cost: the layer in float64, with its weights, and what enters and leaves its
projections, rounded to the type. An error far above that is a fault of the arithmetic; one that is large though
rounding alone costs as much is a fault of the type for such tokens.

Errors are the largest difference over the largest entry, of gradients the worst of all parameters and the input.
Gradients of float16 come through a scaled loss, as in training.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from sansmax.models.attention import AffineAttention
from sansmax.models.attention_soft import SoftAttention
from sansmax.models.blocks import ATTENTIONS

MECHANISMS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax": ("softmax", {}),
    "sima": ("sima", {}),
    "seqnorm": ("seqnorm", {}),
    "soft": ("soft", {"inverse": "newton"}),
    "soft++": ("soft", {"inverse": "halved", "normalized": True}),
    "soft exact": ("soft", {"inverse": "cholesky"}),
    "relu": ("relu", {}),
    "squared_relu": ("squared_relu", {}),
    "polynomial": ("polynomial", {"degree": 2}),
    "sigmoid": ("sigmoid", {}),
}
# those whose cost is the square of the tokens
QUADRATIC = ("softmax", "relu", "squared_relu", "sigmoid")
# the type of the arithmetic, and whether the whole layer is of it
PRECISIONS: dict[str, tuple[torch.dtype, bool]] = {
    "float32": (torch.float32, True),
    "bfloat16 autocast": (torch.bfloat16, False),
    "float16 autocast": (torch.float16, False),
    "bfloat16": (torch.bfloat16, True),
}
TOKENS, QUADRATIC_TOKENS = (1024, 8192, 65536), (1024, 2048)
# of more tokens than this only the inputs whose sums grow with their number
FEW_TOKENS, LONG_INPUTS = 8192, ("normal", "background")
DIM, HEADS = 32, 2
# the scale that the gradients of float16 begin with, in training too, and the least that is tried
SCALE, LEAST_SCALE = 2.0**16, 2.0**-24
# an error may be so many times that of rounding, which is one draw of many
FACTOR, ROOM = 8.0, 8.0
# where a slope jumps at 0, rounding turns a few of the tokens' signs, now and then
KINKED, TURNED = ("sima", "relu"), 8.0
# beyond this share of the largest entry a result has lost its sense
LARGE = 0.1
# and of float32, which should have seven digits, beyond this share
FEW_DIGITS = 1e-2


@dataclass(frozen=True)
class Row:
    """One layer on one kind of tokens in one precision.

    `output` and `gradient` are the errors, `output_rounding` and `gradient_rounding` what rounding alone costs;
    `finite` whether both are numbers; `scale` that of the loss; `time_ratio` the time forward and backward over that of
    float32, None where it was not taken.
    """

    mechanism: str
    precision: str
    inputs: str
    tokens: int
    output: float
    output_rounding: float
    gradient: float
    gradient_rounding: float
    finite: bool
    scale: float
    time_ratio: float | None = None

    @property
    def state(self) -> str:
        """PASS, WARN (the type does not fit the tokens) or FAIL (the arithmetic loses more than the type must)."""
        if not self.finite:
            return "FAIL"
        if self.precision == "float32":
            worst = max(self.output, self.gradient)
            return "FAIL" if worst > LARGE else "WARN" if worst > FEW_DIGITS else "PASS"
        eps = torch.finfo(PRECISIONS[self.precision][0]).eps
        turned = TURNED / self.tokens if self.mechanism in KINKED else 0.0
        output_room, gradient_room = FACTOR * self.output_rounding + ROOM * eps, FACTOR * self.gradient_rounding
        if self.output > output_room or self.gradient > gradient_room + ROOM * eps + turned:
            # the kernel of softmax is PyTorch's
            return "WARN" if self.mechanism == "softmax" else "FAIL"
        return "WARN" if max(self.output, self.gradient) > LARGE else "PASS"

    @property
    def fix(self) -> str:
        """What to do where the state is not PASS."""
        if self.state == "PASS":
            return ""
        if self.precision == "float32":
            return "centre and scale the tokens" if self.state == "WARN" else "this should not be: report the table"
        if self.precision == "float16 autocast" and self.state == "FAIL":
            return "use precision=bf16 or 32"
        if self.precision == "bfloat16":
            return "leave the weights in float32 (precision=bf16 does), or use precision=32"
        return "use precision=32"


def _plain(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(1, n, DIM, generator=generator, dtype=torch.float64)


def _moved(n: int, generator: torch.Generator) -> Tensor:
    return _plain(n, generator) + 100 * torch.randn(DIM, generator=generator, dtype=torch.float64).sign()


def _background(n: int, generator: torch.Generator) -> Tensor:
    x = _plain(n, generator)
    first = n // 20
    x[:, first:] = x[:, :1] + 1e-3 * x[:, first:]
    return x


def _outliers(n: int, generator: torch.Generator) -> Tensor:
    x = _plain(n, generator)
    x[..., :2] *= 50
    return x


INPUTS: dict[str, tuple[str, Callable[[int, torch.Generator], Tensor]]] = {
    "normal": ("normal tokens", _plain),
    "mean": ("a mean of 100 standard deviations", _moved),
    "background": ("95 % of the tokens alike to a thousandth", _background),
    "outliers": ("two channels 50 times as large", _outliers),
}


def measure(
    mechanisms: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    inputs: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    repeats: int = 3,
    progress: Callable[[int, int], object] | None = None,
) -> list[Row]:
    """All rows; `tokens` are by default 1,024 to 65,536, and up to 2,048 of what costs their square.

    `repeats` times are taken of each precision, one after the other, on normal tokens; 0 takes none.
    """
    names, kinds = list(mechanisms or MECHANISMS), list(inputs or INPUTS)
    which = list(precisions or PRECISIONS)
    cases = [
        (name, kind, n)
        for name in names
        for n in (tokens or (QUADRATIC_TOKENS if name in QUADRATIC else TOKENS))
        for kind in kinds
        if n <= FEW_TOKENS or tokens or inputs or kind in LONG_INPUTS
    ]
    rows: list[Row] = []
    for done, (name, kind, n) in enumerate(cases):
        if progress is not None:
            progress(done, len(cases))
        rows += _case(name, kind, n, which, torch.device(device), repeats if kind == "normal" else 0)
    if progress is not None:
        progress(len(cases), len(cases))
    return rows


def _case(name: str, kind: str, n: int, precisions: Sequence[str], device: torch.device, repeats: int) -> list[Row]:
    generator = torch.Generator().manual_seed(n)
    x = INPUTS[kind][1](n, generator).to(device)
    # that of a loss which is a mean over tokens and channels
    by_out = (torch.randn(x.shape, generator=generator, dtype=torch.float64) / x[0].numel()).to(device)
    layer = _layer(name, generator).to(device)
    exact = _passes(layer, x, by_out)
    ratios = _time_ratios(layer, x, by_out, precisions, repeats)
    rows, costs = [], {}
    for precision in precisions:
        dtype = PRECISIONS[precision][0]
        if dtype not in costs:
            costs[dtype] = _errors(_passes(_rounding(layer, dtype), _rounded(x, dtype), by_out), exact)
        found, scale = _attempt(layer, x, by_out, precision)
        output, gradient = _errors(found, exact)
        finite = math.isfinite(output) and math.isfinite(gradient)
        errors = (output, costs[dtype][0], gradient, costs[dtype][1])
        rows.append(Row(name, precision, kind, n, *errors, finite, scale, ratios.get(precision)))
    return rows


def _layer(name: str, generator: torch.Generator) -> nn.Module:
    """A layer in float64 whose weights are as large as trained ones: queries are of the size of their input."""
    kind, options = MECHANISMS[name]
    layer = ATTENTIONS[kind](DIM, num_heads=HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * DIM**-0.5)
            elif name == "seqnorm":
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(1 + 0.1 * noise)
    return layer


def _passes(
    layer: nn.Module, x: Tensor, by_out: Tensor, context: torch.autocast | None = None, scale: float = 1.0
) -> tuple[Tensor, ...]:
    """The output, and the gradients by the input and all parameters, in float64; forward alone in the `context`."""
    x = x.detach().requires_grad_()
    with context or nullcontext():
        out = layer(x)
    wanted = [x, *layer.parameters()]
    # a scaled loss is in float32, and its gradient takes the type of the output
    found = torch.autograd.grad((out.to(by_out.dtype) * (by_out * scale)).sum(), wanted)
    return out.detach().double(), *(g.double() / scale for g in found)


def _in(precision: str, layer: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, torch.autocast | None]:
    dtype, whole = PRECISIONS[precision]
    if whole:
        return copy.deepcopy(layer).to(dtype), x.to(dtype), None
    return copy.deepcopy(layer).float(), x.float(), torch.autocast(x.device.type, dtype=dtype)


def _attempt(layer: nn.Module, x: Tensor, by_out: Tensor, precision: str) -> tuple[tuple[Tensor, ...], float]:
    """Output and gradients, and the largest scale of the loss, from that of training down, that leaves them finite."""
    narrow, tokens, context = _in(precision, layer, x)
    scaled = PRECISIONS[precision][0] == torch.float16
    scale = SCALE if scaled else 1.0
    while True:
        found = _passes(narrow, tokens, by_out.float(), context, scale)
        finite = [bool(g.isfinite().all()) for g in found]
        # no scale of the loss mends an output
        if all(finite) or not finite[0] or not scaled or scale <= LEAST_SCALE:
            return found, scale
        scale /= 2


def _errors(found: Iterable[Tensor], exact: Iterable[Tensor]) -> tuple[float, float]:
    errors = [
        float((a - b).abs().max() / b.abs().max().clamp_min(torch.finfo(b.dtype).tiny))
        for a, b in zip(found, exact, strict=True)
    ]
    worst = max(errors[1:], key=lambda e: math.inf if math.isnan(e) else e)
    return errors[0], worst


class _Rounded(torch.autograd.Function):
    """Digits of the type, forward and backward, whatever its range."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return _round(x, dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _round(grads[0], ctx.dtype), None


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    size = x.abs().max().clamp_min(torch.finfo(x.dtype).tiny)
    return (x / size).to(dtype).to(x.dtype) * size


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return _Rounded.apply(x, dtype)  # pyright: ignore[reportReturnType]


def _rounding(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The layer in float64, its weights and what enters and leaves its projections rounded to the type."""
    rounding: Any = copy.deepcopy(layer)
    if isinstance(rounding, AffineAttention | SoftAttention):
        # queries, keys and values are made, as in the formula
        rounding.order = "linear"
    with torch.no_grad():
        for parameter in rounding.parameters():
            parameter.copy_(_round(parameter, dtype))
    for module in rounding.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (_rounded(inputs[0], dtype),))
            module.register_forward_hook(lambda _, inputs, output: _rounded(cast(Tensor, output), dtype))
    return rounding


def _time_ratios(
    layer: nn.Module, x: Tensor, by_out: Tensor, precisions: Sequence[str], repeats: int
) -> dict[str, float]:
    """The time forward and backward over that of float32, the median of runs that take turns."""
    if not repeats or "float32" not in precisions:
        return {}
    ready = {precision: _in(precision, layer, x) for precision in precisions}
    taken: dict[str, list[float]] = {precision: [] for precision in precisions}
    for _ in range(repeats + 1):
        for precision, (narrow, tokens, context) in ready.items():
            start = time.perf_counter()
            _passes(narrow, tokens, by_out.float(), context)
            if x.is_cuda:
                torch.cuda.synchronize()
            taken[precision].append(time.perf_counter() - start)
    # the first round warms up
    return {p: median(seconds[1:]) / median(taken["float32"][1:]) for p, seconds in taken.items()}
