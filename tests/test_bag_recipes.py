"""Recipes for bags: several batches, the focal loss, given weights, another attention, frozen parts."""

import pytest
import torch
from bags import config, toy
from safetensors.torch import load_file

from sansmax.engine.bag_config import load_bag_config
from sansmax.engine.bag_losses import Objective
from sansmax.engine.bag_run import BagRun, start_slide_network
from sansmax.engine.bag_train import fit_bags, predict_bags
from sansmax.errors import InputError


def fit(folder, task="classification", **keys):
    bags, cases = toy(task)
    return fit_bags(config(**keys), None, bags, cases, cases.ids[:18], cases.ids[18:], folder)


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    fit(folder, "multilabel", epochs=1)
    return folder


def test_batches_of_a_step_are_one_batch_and_one_risk_set(tmp_path):
    assert config(batch_size=3, optim__grad_accum_steps=2).patients("classification") == 6
    for name, keys in (("two", {"batch_size": 3, "optim__grad_accum_steps": 2}), ("one", {"batch_size": 6})):
        fit(tmp_path / name, "survival", epochs=1, **keys)
    assert same(weights(tmp_path / "two"), weights(tmp_path / "one"))


def test_a_run_starts_from_another_with_another_head_and_attention(plain, tmp_path):
    keys = {"model__initial_checkpoint": str(plain), "model__convert": "sima", "model__freeze": "embed", "epochs": 1}
    run = fit(tmp_path / "run", optim__loss="focal", optim__class_weights=True, **keys)
    report = (tmp_path / "run" / "initial_checkpoint.txt").read_text()
    assert "a new classifier of 2 classes" in report and "attention: sima" in report and "frozen: " in report
    old, new = weights(plain), weights(tmp_path / "run")
    assert torch.equal(old["embed.weight"], new["embed.weight"])
    assert not torch.equal(old["blocks.0.mlp.fc1.weight"], new["blocks.0.mlp.fc1.weight"])
    # opened again it is the network that was trained
    network = BagRun.open(tmp_path / "run").load_model()
    assert network.attention == "sima"
    bags, cases = toy()
    val = cases.take(cases.ids[18:])
    lines = (tmp_path / "run" / "predictions_val.csv").read_text().splitlines()[1:]
    said = predict_bags(run.load_model(), bags, val, max_tokens=80)
    assert [line.split(",")[2:] for line in lines] == [list(map(repr, map(float, row))) for row in said]
    # and fits where its own attention is there already
    again = config(model__initial_checkpoint=str(tmp_path / "run"), model__convert="sima").model
    assert same(start_slide_network(again, 12, 2).state_dict(), new)


def test_the_focal_loss_of_bags_is_its_definition():
    torch.manual_seed(0)
    outputs = 2 * torch.randn(6, 3, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 0])
    objective = Objective.of("classification", labels.numpy(), 3, True, 0.0, "efron", 1.5)
    p = outputs.softmax(1)[torch.arange(6), labels]
    w = torch.tensor([6 / 9, 6 / 6, 6 / 3], dtype=torch.float32).double()[labels]
    exact = -(w * (1 - p) ** 1.5 * p.log()).sum() / w.sum()
    torch.testing.assert_close(objective.loss(outputs, labels), exact, rtol=1e-6, atol=0)
    y = torch.tensor([[1.0, 0.0, float("nan")], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)
    objective = Objective.of("multilabel", y.numpy(), 3, True, 0.0, "efron", 2.0)
    s, total = outputs[:3].sigmoid(), 0.0
    ratio = [1 / 2, 2 / 1, 1 / 1]
    for i in range(3):
        for c in range(3):
            if y[i, c] == 1:
                total -= ratio[c] * (1 - s[i, c]) ** 2 * s[i, c].log()
            elif y[i, c] == 0:
                total -= s[i, c] ** 2 * (1 - s[i, c]).log()
    torch.testing.assert_close(objective.loss(outputs[:3], y), total / 8, rtol=1e-6, atol=0)


def test_losses_that_are_none_of_a_task_are_refused():
    with pytest.raises(InputError, match="the focal loss is of classes, and the task is survival"):
        Objective.of("survival", torch.tensor([[1.0, 1.0]]).numpy(), 1, False, 0.0, "efron", 2.0)
    with pytest.raises(InputError, match="bce is the loss of several labels already"):
        load_bag_config(None, ["loss=bce"])
