"""The configuration: every key by its name or its end, what it was is what is read back, and clear errors."""

import re

import pytest

from sansmax.engine.config import (
    TrainConfig,
    differences,
    dotted_names,
    dump_config,
    full_name,
    load_config,
    parse_value,
)
from sansmax.errors import InputError


def test_the_file_that_is_written_is_read_back(tmp_path):
    config = load_config(
        None,
        {
            "data.source": "a: strange, 'name'.csv",
            "data.image_size": [384, 512],
            "data.mean": [0.1, 0.2, 0.3],
            "augment.crop_scale": [0.5, 1.0],
            "augment.auto": "rand-m9",
            "model.options.drop_rate": 0.1,
            "optim.lr": 3e-4,
            "optim.clip_grad": None,
            "patience": 3,
            "precision": "16",
            "data.val_fraction": 0.1 + 0.2,
        },
    )
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert differences(config, load_config(tmp_path / "config.yaml")) == []


def test_every_key_can_be_set_by_its_name_and_by_its_end_where_that_is_unique():
    names = dotted_names()
    assert {"epochs", "optim.lr", "data.image_size", "model.name", "augment.hflip"} <= set(names)
    ends = [name.rsplit(".", 1)[-1] for name in names]
    for name, end in zip(names, ends, strict=True):
        assert full_name(name) == name
        if ends.count(end) == 1:
            assert full_name(end) == name
    assert load_config(None, ["lr=0.5", "model.options.depth=3", "epochs=7"]) == load_config(
        None, {"optim.lr": 0.5, "model.options.depth": 3, "epochs": 7}
    )


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1e3", 1000.0), ("7", 7), ("true", True), ("null", None), ("[1, 2]", [1, 2]), ("abc", "abc")],
)
def test_values_are_read_as_they_look(text, value):
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lrr=1", "unknown key 'lrr': did you mean"),
        ("optim.learningrate=1", "unknown key 'optim.learningrate'"),
        ("zzzz=1", "the keys are data.source"),
        ("epochs=0", "epochs: Input should be greater than or equal to 1, got 0"),
        ("epochs=2.5", "epochs: .*, got 2.5"),
        ("monitor=val_f1", "monitor: Input should be 'val_loss', 'val_auc', 'val_accuracy' or 'last', got 'val_f1'"),
        ("optim.lr=-1", "optim.lr: Input should be greater than 0, got -1"),
        ("optim.lr=fast", "optim.lr: Input should be a valid number, .*got 'fast'"),
        ("image_size=[0, 3]", "data.image_size: .*at least 1 pixel, got"),
        ("epochs", "takes key=value, got 'epochs'; for example"),
        ("epochs=[", "the value '\\[' is not valid YAML"),
        ("batch_size=[3]", "batch_size: Input should be a valid integer, got \\[3\\]"),
    ],
)
def test_a_wrong_change_says_what_is_allowed(change, message):
    with pytest.raises(InputError, match=message):
        load_config(None, [change])


def test_several_mistakes_of_a_file_are_all_named(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 0\noptim: {lrr: 3}\n")
    with pytest.raises(InputError) as stopped:
        load_config(tmp_path / "c.yaml")
    assert re.search(r"^epochs: ", str(stopped.value), re.M) and "unknown key 'optim.lrr'" in str(stopped.value)


def test_a_configuration_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().epochs = 3  # pyright: ignore[reportAttributeAccessIssue]
