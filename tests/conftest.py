"""Shapes checked, draws that replay, and how near is near enough."""

import os
import zlib

import jaxtyping
import pytest

# before the first import of the package: every shape in its signatures is checked while the tests run
jaxtyping.install_import_hook(["sansmax.ops", "sansmax.models"], "beartype.beartype")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="draw other numbers in every test, to replay a failure")


@pytest.fixture(autouse=True)
def seed(request):
    """The seed of a test: its own name and `--seed`; printed, so that a failure says how to draw it again."""
    number = request.config.getoption("--seed")
    value = zlib.crc32(f"{request.node.nodeid} {number}".encode())
    print(f"torch.manual_seed({value}), by --seed {number}")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def deterministic():
    """Deterministic kernels, and NaN in every `torch.empty`."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def error(a, b):
    """The largest difference, in float64; NaN where either is not finite."""
    a, b = a.detach().double(), b.detach().double()
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return (a - b).abs().max().item() if a.numel() else 0.0


@pytest.fixture
def assert_same():
    """Equal but for rounding: within 1e-10 (float64) or 1e-5 (float32) of the largest entry."""

    def check(a, b, what="", scale=None):
        assert a.dtype == b.dtype, f"{what}: {a.dtype} and {b.dtype}"
        relative = {torch.float64: 1e-10, torch.float32: 1e-5}[b.dtype]
        size = scale if scale is not None else b.abs().max().item() if b.numel() else 0.0
        found = error(a, b)
        assert found <= relative * size, f"{what}: differs by {found:.3g}, allowed {relative * size:.3g}"

    return check


@pytest.fixture
def assert_as_accurate():
    """`x` may be at most twice as far from the float64 answer as plain torch in x's dtype."""

    def check(x, plain, exact, what=""):
        assert x.dtype == plain.dtype, f"{what}: {x.dtype} and {plain.dtype}"
        assert plain.isfinite().all(), f"{what}: plain torch is no measure, it is not finite"
        allowed = 2 * error(plain, exact) + torch.finfo(x.dtype).eps * exact.abs().max().item()
        found = error(x, exact)
        assert found <= allowed, f"{what}: error {found:.3g}, allowed {allowed:.3g}"

    return check
