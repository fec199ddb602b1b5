"""16 bit: no attention loses more than rounding must cost, no sum leaves the range, and float16 trains."""

import pytest
import torch
from bags import config as bag_config
from bags import toy
from runs import sansmax, tiny, train_only
from safetensors.torch import load_file
from torch import nn

from sansmax.engine import numerics
from sansmax.engine.bag_train import fit_bags
from sansmax.engine.callbacks import Recorder
from sansmax.engine.doctor import examine_numerics
from sansmax.engine.loss_scale import LossScale
from sansmax.engine.module import Classifier
from sansmax.errors import InputError
from sansmax.models.attention import SimAAttention
from sansmax.models.attention_soft import SoftAttention
from sansmax.models.gated import GatedPool
from sansmax.ops import L1State, LandmarkSums, Mean, Moments, PointwiseState, SeqNormState, SoftState, projected_l1
from sansmax.report.tables import read_rows

MANY = 200_000


@pytest.mark.parametrize("name", numerics.MECHANISMS)
def test_no_attention_loses_more_than_rounding_must_cost(name):
    inputs = ["normal", "background"] + ["outliers"] * (name != "softmax")
    for row in numerics.measure([name], inputs=inputs, tokens=[131], repeats=0):
        assert row.state != "FAIL", row
        if row.precision != "float32" and row.inputs == "normal":
            eps = torch.finfo(numerics.PRECISIONS[row.precision][0]).eps
            assert 0 < row.output <= 4 * eps, row


def sums_of(x, other):
    """Every sum over the tokens that there is, of tokens in one head."""
    q, k, v = x[None, None], other[None, None], other[None, None]
    landmarks = other[None, None, :3]
    return {
        "mean": Mean.of(x),
        "moments": Moments.of(x),
        "l1": L1State.of(q, k, v),
        "seqnorm": SeqNormState.of(q, k, v),
        "landmarks": LandmarkSums.of(x, torch.zeros(len(x), dtype=torch.int64), 1),
        "soft": SoftState.of(q, v, landmarks),
        "pointwise": PointwiseState.of(k, v),
        "gated": GatedPool.of(x[None], other[None, :, 0]),
        "projected l1": (projected_l1(x[None], torch.eye(x.shape[1], dtype=x.dtype), None),),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_of_200_000_tokens_are_those_of_float64(dtype):
    # nearly alike, as background is: sums are beyond 65,504, and a token is less than their last digit in 16 bit
    x, other = ((2 + 0.1 * torch.randn(MANY, 4)).to(dtype) for _ in "xy")
    exact = sums_of(x.double(), other.double())
    for name, state in sums_of(x, other).items():
        for found, wanted in zip(state, exact[name], strict=True):
            assert found.dtype == torch.float32
            error = (found - wanted).abs().max() / wanted.abs().max()
            # the plain product of centred tokens is added token by token
            times = 64 if name == "seqnorm" else 4
            assert error <= times * MANY**0.5 * torch.finfo(torch.float32).eps, f"{name}: {error:.1e}"


# one over the second lies in the middle of two numbers of float16
@pytest.mark.parametrize(("layer", "n"), [(SoftAttention, 70_001), (SimAAttention, 277_309)])
def test_float16_autocast_keeps_what_grows_or_shrinks_with_the_tokens(layer, n):
    x = 1 + 1e-3 * torch.randn(1, n, 8)
    layer = layer(8, num_heads=1, order="linear")
    nn.init.eye_(layer.proj.weight)
    nn.init.zeros_(layer.proj.bias)
    parts = [p for name, p in layer.named_parameters() if "proj" not in name and p.ndim == 2]
    for weight in parts:
        for part in weight.detach().split(8):
            nn.init.eye_(part)
    found, exact = {}, {}
    for into, cast, autocast in ((exact, torch.float64, False), (found, torch.float32, True)):
        narrow, tokens = layer.to(cast), x.to(cast).requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            into["out"] = narrow(tokens)
        (into["out"] * 2.0**16 / x.numel()).sum().backward()
        into["grad"] = narrow.proj.weight.grad.double().clone()
        narrow.zero_grad()
    # SOFT sums values of 1, SimA gives what has two digits in float16
    size = exact["out"].abs().max()
    assert size > 65504 or size < 2.0**-14
    for name, value in found.items():
        error = (value - exact[name]).abs().max() / exact[name].abs().max()
        assert error <= 4 * torch.finfo(torch.float16).eps, f"{name}: {error:.1e}"


def test_gradients_of_norms_in_float16_are_finite_where_those_of_float32_are():
    x = (50 * torch.randn(4096, 8)).half()[None]
    w = torch.randn(5, 8)
    found = {}
    for dtype in (torch.float16, torch.float64):
        tokens = x.to(dtype).requires_grad_()
        weight = w.to(torch.promote_types(dtype, torch.float32)).detach().clone().requires_grad_()
        # a scaled gradient of the norms, within the range; summed over the tokens it is not
        (projected_l1(tokens, weight, None) * 100.0).sum().backward()
        assert weight.grad is not None
        found[dtype] = weight.grad.double()
    wanted = found[torch.float64]
    assert wanted.abs().max() > 65504
    error = (found[torch.float16] - wanted).abs().max() / wanted.abs().max()
    assert error <= 8 * torch.finfo(torch.float16).eps


# Training


def states(module):
    """Copies of all that a step may change."""
    optimizer = module.trainer.optimizers[0].state_dict()["state"]
    held = {f"optimiser {i} {k}": v for i, of in optimizer.items() for k, v in of.items()}
    held |= {name: value for name, value in module.state_dict().items() if "num_batches" not in name}
    return {name: torch.as_tensor(value).clone() for name, value in held.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run in float32, one in float16, and one whose third step has gradients that are not finite."""
    folder = tmp_path_factory.mktemp("runs")
    keys = {"optim__opt": "sgd", "optim__lr": 0.05, "optim__clip_grad": 0.1, "optim__model_ema_decay": 0.5}
    keys |= {"optim__sched": "constant", "monitor": "last"}
    train_only(tiny(precision="32", **keys), folder / "32")
    seen, types = [], set()
    with pytest.MonkeyPatch.context() as patch:
        step, end = Classifier.training_step, Recorder.on_train_batch_end

        def poisoned(module, *arguments):
            types.add(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
            loss = step(module, *arguments)
            if module.global_step == 2 and "poisoned" in str(module.trainer.default_root_dir):
                loss.register_hook(lambda grad: grad * torch.inf)
            return loss

        def watched(recorder, trainer, module, *arguments):
            seen.append((states(module), trainer.precision_plugin.scaler.get_scale()))
            end(recorder, trainer, module, *arguments)

        patch.setattr(Classifier, "training_step", poisoned)
        patch.setattr(Recorder, "on_train_batch_end", watched)
        train_only(tiny(precision="16", **keys), folder / "16")
        seen.clear()
        train_only(tiny(precision="16", **keys), folder / "poisoned")
    assert types == {torch.float16}
    return folder, seen


def test_float16_follows_float32_with_clipped_gradients(runs):
    folder, _ = runs
    start = read_rows(folder / "32" / "metrics.csv")
    for wide, half in zip(start, read_rows(folder / "16" / "metrics.csv"), strict=True):
        for name in ("train_loss", "val_loss"):
            assert half[name] == pytest.approx(wide[name], rel=2e-3)
            assert half[name] != wide[name]
    wide, half = (load_file(folder / run / "model.safetensors") for run in ("32", "16"))
    for name, value in wide.items():
        # clipped before it was unscaled, a gradient would be 65,536 times too small
        assert (half[name] - value).abs().max() <= 2e-3 * value.abs().max().clamp_min(0.05), name
    moved = [(half[name] - value).abs().max() for name, value in wide.items()]
    assert max(moved) > 0


def test_a_skipped_step_changes_nothing_but_the_scale(runs):
    folder, seen = runs
    (before, scale), (after, halved), (later, kept) = seen[1:4]
    assert (scale, halved, kept) == (65536.0, 32768.0, 32768.0)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert any(not torch.equal(later[name], value) for name, value in before.items())
    # the run goes on to its end, and takes its scale along
    assert [row["step"] for row in read_rows(folder / "poisoned" / "metrics.csv")] == [4, 8]
    stored = torch.load(folder / "poisoned" / "last.ckpt", weights_only=True)
    assert stored["LossScale"]["scale"] == 32768.0 and stored["LossScale"]["_growth_tracker"] == 5


def test_gradients_that_no_scale_makes_finite_end_the_run_with_advice(tmp_path, monkeypatch):
    step = Classifier.training_step

    def poisoned(module, *arguments):
        loss = step(module, *arguments)
        loss.register_hook(lambda grad: grad * torch.inf)
        return loss

    monkeypatch.setattr(Classifier, "training_step", poisoned)
    monkeypatch.setattr("sansmax.engine.loss_scale.LEAST_SCALE", 2.0**14)
    with pytest.raises(
        InputError, match=r"however small the loss is made \(scale 1.6e\+04\); train with precision=bf16"
    ):
        train_only(tiny(precision="16"), tmp_path / "run")


def test_bags_in_float16_follow_float32_with_clipped_gradients(tmp_path):
    bags, cases = toy(n=12)
    weights, types = {}, []
    original = LossScale.unscale
    with pytest.MonkeyPatch.context() as patch:
        # from 65,536 on a step is left out, as it should be
        scaler = torch.amp.GradScaler
        patch.setattr(torch.amp, "GradScaler", lambda device: scaler(device, init_scale=4096.0))
        patch.setattr(LossScale, "unscale", lambda self, o: (types.append(self.device), original(self, o)))
        for precision in ("32", "16"):
            keys = {"optim__opt": "sgd", "optim__lr": 0.3, "optim__clip_grad": 0.1, "optim__sched": "constant"}
            made = bag_config(monitor="last", precision=precision, tokens__mix=0.0, **keys)
            fit_bags(made, None, bags, cases, cases.ids, (), tmp_path / precision)
            weights[precision] = load_file(tmp_path / precision / "model.safetensors")
    assert types == ["cpu"] * 4
    # biases start at 0, and four clipped steps of 0.03 move the weights of all layers
    assert weights["32"]["head.bias"].abs().max() > 1e-3
    for name, value in weights["32"].items():
        assert (weights["16"][name] - value).abs().max() <= 1e-3 * value.abs().max() + 1e-5, name


# What the doctor says

CASES = {"precisions": ["float32", "bfloat16 autocast"], "inputs": ["background"], "tokens": [1031], "repeats": 0}


def test_the_doctor_finds_an_inverse_in_16_bit(monkeypatch):
    assert "FAIL" not in [f.state for f in examine_numerics(mechanisms=["soft"], **CASES)]
    # as autocast would have it, were it not kept out
    narrow = {torch.float32: torch.bfloat16}
    monkeypatch.setattr("sansmax.ops.inverse.at_least_float32", lambda a: a.to(narrow.get(a.dtype, a.dtype)))
    failed = [f for f in examine_numerics(mechanisms=["soft"], **CASES) if f.state == "FAIL"]
    assert "soft, bfloat16 autocast" in [f.what for f in failed]
    assert failed[-1].fix == "use precision=32" and "on 95 % of the tokens" in failed[-1].detail


def test_doctor_numerics_prints_and_writes_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(numerics, "MECHANISMS", {"seqnorm": ("seqnorm", {})})
    monkeypatch.setattr(numerics, "TOKENS", (97,))
    said = sansmax("doctor", "--numerics", "--output", tmp_path / "out")
    lines = [line for line in said.out.splitlines() if "seqnorm," in line]
    assert [line.split()[0] for line in lines].count("PASS") >= 2
    assert all("times the time of float32" in line for line in lines[1:]) and said.status == 0
    rows = read_rows(tmp_path / "out" / "numerics.csv")
    assert {(row["precision"], row["inputs"]) for row in rows} == {
        (p, kind) for p in numerics.PRECISIONS for kind in numerics.INPUTS
    }
    assert all(row["output"] > 0 and row["tokens"] == 97 for row in rows)
    page = (tmp_path / "out" / "numerics.md").read_text()
    assert "sansmax doctor --numerics --output" in page and "| seqnorm | 97 |" in page
    assert "--numerics" in sansmax("doctor", "--output", tmp_path).err
