"""The losses of slide-level tasks against their definitions, and steps over packs against steps at once."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bags import TASKS, config, toy

from sansmax.data.bag_loading import BagLoader, PatientBags
from sansmax.engine.bag_losses import Objective, cox_loss
from sansmax.engine.bag_module import BagModule, in_units
from sansmax.engine.bag_run import build_slide_network
from sansmax.errors import InputError


def partial_likelihood(risk, time, event, ties):
    """Cox's negative log-likelihood as the sums stand in the papers, without the division by the events."""
    total = 0.0
    for t in sorted(set(time.tolist())):
        at_risk = [math.exp(r) for r, u in zip(risk, time, strict=True) if u >= t]
        dying = [float(r) for r, u, e in zip(risk, time, event, strict=True) if u == t and e]
        for k in range(len(dying)):
            taken = k / len(dying) * sum(map(math.exp, dying)) if ties == "efron" else 0.0
            total += math.log(sum(at_risk) - taken)
        total -= sum(dying)
    return total


@pytest.mark.parametrize("ties", ["efron", "breslow"])
@pytest.mark.parametrize("times", [3, 1000])
def test_the_loss_of_survival_is_the_partial_likelihood(ties, times):
    risk = torch.randn(40, dtype=torch.float64)
    time, event = torch.randint(1, times, (40,)).double(), torch.rand(40) < 0.6
    expected = partial_likelihood(risk, time, event, ties) / int(event.sum())
    assert float(cox_loss(risk, time, event, ties)) == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda r: cox_loss(r, time, event, ties), risk.requires_grad_())


def test_the_loss_of_survival_is_that_of_lifelines():
    lifelines = pytest.importorskip("lifelines")
    pandas = pytest.importorskip("pandas")
    x, time = torch.randn(60, dtype=torch.float64), torch.randint(1, 8, (60,)).double()
    event = torch.rand(60) < 0.7
    table = pandas.DataFrame({"x": x.numpy(), "time": time.numpy(), "event": event.numpy().astype(int)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = lifelines.CoxPHFitter().fit(table, "time", "event")
    found = float(cox_loss(x * fitted.params_["x"], time, event, "efron")) * int(event.sum())
    assert found == pytest.approx(-fitted.log_likelihood_, rel=1e-9)


def test_risks_of_any_size_and_no_event_are_defined():
    time, event = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([True, True, False])
    small = torch.tensor([0.1, 0.2, 0.3])
    for shift in (-2000.0, 2000.0):
        torch.testing.assert_close(
            cox_loss(small + shift, time, event), cox_loss(small, time, event), rtol=0, atol=1e-3
        )
    risk = small.requires_grad_()
    nothing = cox_loss(risk, time, torch.zeros(3, dtype=torch.bool))
    assert nothing == 0
    assert (torch.autograd.grad(nothing, risk)[0] == 0).all()


def test_unknown_labels_count_nowhere():
    y = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, np.nan]])
    objective = Objective.of("multilabel", y, 2, False, 0.0, "efron")
    out = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    known = [(0, 0, 1.0), (1, 0, 0.0), (1, 1, 1.0)]
    expected = sum(math.log1p(math.exp(-out[i, j].item() * (2 * t - 1))) for i, j, t in known) / 3
    loss = objective.loss(out, torch.from_numpy(y))
    assert float(loss.detach()) == pytest.approx(expected)
    (by,) = torch.autograd.grad(loss, out)
    assert (by[2] == 0).all() and by[0, 1] == 0 and by[0, 0] != 0
    assert objective.loss(out[2:], torch.from_numpy(y[2:])) == 0


def test_measurements_are_learned_in_units_of_their_spread_and_given_in_their_own():
    y = np.array([[100.0, 1e-3], [120.0, np.nan], [140.0, 3e-3]])
    objective = Objective.of("regression", y, 2, False, 0.0, "efron")
    standard = torch.tensor([[-(1.5**0.5), -1.0], [0.0, 7.0], [1.5**0.5, 1.0]], dtype=torch.float64)
    assert float(objective.loss(standard, torch.from_numpy(y))) == pytest.approx(0, abs=1e-12)
    known = np.isfinite(y)
    np.testing.assert_allclose(objective.answers(standard).numpy()[known], y[known], rtol=1e-6)
    network = build_slide_network(config().model, 12, 2)
    x = torch.randn(1, 5, 12)
    torch.testing.assert_close(in_units(network, objective)(x).double(), objective.answers(network(x)))


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_class_weights_count_every_class_alike(task):
    y = np.array([0] * 9 + [1] * 3) if task == "classification" else np.array([[0.0]] * 9 + [[1.0]] * 3)
    objective = Objective.of(task, y, 2 if task == "classification" else 1, True, 0.0, "efron")
    targets = torch.from_numpy(y)
    out = torch.zeros(12, 2 if task == "classification" else 1, dtype=torch.float64, requires_grad=True)
    (by,) = torch.autograd.grad(objective.loss(out, targets), out)
    assert float(by[:9, -1].sum()) == pytest.approx(-float(by[9:, -1].sum()))


def module_for(task, pack_tokens, **keys):
    bags, cases = toy(task, n=20)
    made = config(**keys)
    o = made.optim
    objective = Objective.of(task, cases.targets, cases.outputs, o.class_weights, o.smoothing, o.ties)
    torch.manual_seed(1)
    network = build_slide_network(made.model, 12, cases.outputs).double()
    module = BagModule(network, o, made.tokens, objective, cases.targets, 2, 3, 0)
    module.manual_backward = lambda loss: loss.backward()
    (step,) = BagLoader(PatientBags(bags, cases.slides), batch_size=20, pack_tokens=pack_tokens)
    return module, [p._replace(features=p.features.double(), coords=p.coords.double()) for p in step]


@pytest.mark.parametrize("task", TASKS)
def test_a_step_in_packs_has_the_loss_and_gradients_of_one_at_once(task, assert_same, monkeypatch):
    # float64 to the end
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    found = []
    for budget in (10**6, 60, 1):
        weighted = task in ("classification", "multilabel")
        module, step = module_for(task, budget, optim__class_weights=weighted, optim__smoothing=0.1 * weighted)
        assert (len(step) == 1) == (budget > 60)
        loss = module.accumulate(step)
        found.append((loss, [p.grad for p in module.network.parameters()]))
    largest = max(g.abs().max().item() for g in found[0][1])
    for loss, by in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-12)
        for a, b in zip(by, found[0][1], strict=True):
            assert_same(a, b, scale=largest)


def test_random_numbers_of_a_pack_are_the_same_when_it_is_run_again():
    keys = {"tokens__noise": 0.5, "tokens__drop": 0.3, "model__options__proj_drop_rate": 0.5}
    module, step = module_for("survival", 60, **keys)
    step = [p._replace(features=p.features.float(), coords=p.coords.float()) for p in step]
    module.network.float()
    again = [module.outputs(step[1], 1), module.outputs(step[0], 0), module.outputs(step[1], 1)]
    assert torch.equal(again[0], again[2])
    assert not torch.equal(module.outputs(step[1], 2), again[0])


def test_targets_of_which_nothing_can_be_learned_are_refused():
    for task, y, message in (
        ("classification", np.zeros(5, np.int64), "all of one class, of 2"),
        ("survival", np.array([[1.0, 0.0], [2.0, 0.0]]), "no event was seen"),
        ("multilabel", np.array([[1.0, np.nan], [0.0, np.nan]]), "1 of 2 targets are not known"),
    ):
        with pytest.raises(InputError, match=message):
            Objective.of(task, y, 2, False, 0.0, "efron")
    with pytest.raises(InputError, match="class_weights weights classes, and the task is regression"):
        Objective.of("regression", np.ones((2, 1)), 1, True, 0.0, "efron")


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression"])
def test_the_loss_of_a_mixed_bag_is_that_of_mixed_targets(task):
    outputs = torch.randn(6, 3, dtype=torch.float64)
    shares = torch.rand(6, dtype=torch.float64)
    if task == "classification":
        a, b = torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([1, 2, 0, 0, 0, 1])
        o = Objective.of(task, a.numpy(), 3, False, 0.0, "efron")
        soft = shares[:, None] * F.one_hot(a, 3) + (1 - shares[:, None]) * F.one_hot(b, 3)
        expected = F.cross_entropy(outputs, soft, reduction="sum")
    else:
        a, b = (torch.randint(2, (6, 3)).double().index_fill(0, torch.tensor(0), v) for v in (0, 1))
        a[1], a[2] = 1, 0
        o = Objective.of(task, a.numpy(), 3, False, 0.0, "efron")
        mix = shares[:, None] * a + (1 - shares[:, None]) * b
        if task == "multilabel":
            expected = F.binary_cross_entropy_with_logits(outputs, mix, reduction="sum")
        else:
            # up to what does not depend on the outputs: the spread of the two targets
            spread = (shares * (1 - shares))[:, None] * ((a - b) / o.scale).square()
            expected = ((outputs - (mix - o.mean) / o.scale).square() + spread).sum()
    found = o.total(outputs, a, shares) + o.total(outputs, b, 1 - shares)
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-6)
    assert float(o.weight(a, shares) + o.weight(b, 1 - shares)) == pytest.approx(float(o.weight(a)))
