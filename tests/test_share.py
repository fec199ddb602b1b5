"""What is saved is loaded by name, by timm and transformers, with the same answers."""

import pytest
import safetensors.torch
import timm
import torch
from networks import perturbed
from runs import tiny
from saved import SMALL, built, config_of, images, recorded, reloaded, small

from sansmax.engine.run import Run
from sansmax.engine.train import train
from sansmax.models.convert import convert
from sansmax.models.share import save_pretrained
from sansmax.models.weights import load_checkpoint

NETWORKS = {
    "seqnorm_vit_tiny_patch16_224": SMALL,
    "seqnorm_vit_pico_conv4_28": {"in_chans": 2},
    "sima_deit_tiny_patch16_224": {**SMALL, "init_values": 1.0, "global_pool": "avg"},
    "sima_nano_12_p16": {"depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3},
    "soft_tiny": {"img_size": (64, 96), "num_classes": 3},
    "sima_cvt_13": {"img_size": 64, "depths": (1, 1, 1), "embed_dims": (8, 12, 24), "num_heads": (1, 1, 2)},
    "resnet18": {"num_classes": 3},
}


# Round trips


@pytest.mark.parametrize("name", list(NETWORKS))
def test_every_family_comes_back_by_name(name, tmp_path, assert_same):
    model = perturbed(built(name, **NETWORKS[name]), by=0.02)
    folder = save_pretrained(model, tmp_path / "saved")
    again, x = reloaded(folder), images(folder)
    assert_same(again(x), model(x))
    assert again.state_dict().keys() == model.state_dict().keys()
    assert again.pretrained_cfg["architecture"] == name
    assert [p.name for p in sorted(folder.iterdir())] == ["README.md", "config.json", "model.safetensors"]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "sima", "attn_options": {"eps": 100.0}},
        {"attention": "soft", "attn_options": {"num_landmarks": 2}},
        {"attention": "polynomial", "mlp_ratio": 2.0, "class_token": True, "global_pool": "token"},
        {"img_size": (32, 48), "stem": "conv", "reg_tokens": 2},
        {"num_classes": 0},
    ],
    ids=str,
)
def test_arguments_of_the_network_survive(changes, tmp_path, assert_same):
    model = small(**changes)
    folder = save_pretrained(model, tmp_path)
    again, x = reloaded(folder), images(folder)
    assert_same(again(x), model(x))
    if "attn_options" in changes:
        # and they matter
        plain = timm.create_model("seqnorm_vit_tiny_patch16_224", **{**SMALL, "attention": changes["attention"]}).eval()
        plain.load_state_dict(model.state_dict())
        assert not torch.allclose(plain(x), model(x))


def test_a_converted_network_comes_back_converted(tmp_path, assert_same):
    model = perturbed(built("vit_tiny_patch16_224", **SMALL))
    model = convert(convert(model, "sima"), "relu", blocks=[1])
    folder = save_pretrained(model.eval(), tmp_path)
    config = config_of(folder)
    assert config["architecture"] == "converted"
    assert config["model_args"]["base"] == "vit_tiny_patch16_224"
    assert config["model_args"]["embed_dim"] == 24
    again, x = reloaded(folder), images(folder)
    assert_same(again(x), model(x))
    twice = save_pretrained(recorded(again, config["model_args"]), tmp_path / "twice")
    assert config_of(twice)["model_args"] == config["model_args"]


def test_a_loaded_network_is_adapted_to_other_classes_and_channels(tmp_path, assert_same):
    model = small()
    folder = save_pretrained(model, tmp_path)
    other, x = reloaded(folder, num_classes=7), images(folder)
    assert other(x).shape == (2, 7)
    assert_same(other.forward_features(x), model.forward_features(x))
    # the sum of the channels' weights: a grey picture is what it was in colours
    grey, x = reloaded(folder, in_chans=1), x[:, :1]
    assert_same(grey(x), model(x.expand(-1, 3, -1, -1)))


def test_another_number_of_channels_and_classes_is_saved(tmp_path, assert_same):
    model = small(in_chans=5)
    model.reset_classifier(4)
    folder = save_pretrained(perturbed(model), tmp_path)
    config = config_of(folder)
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 4
    assert config["pretrained_cfg"]["input_size"] == [5, 32, 32]
    assert len(config["pretrained_cfg"]["mean"]) == len(config["pretrained_cfg"]["std"]) == 5
    x = images(folder)
    assert_same(reloaded(folder)(x), model(x))


def test_the_number_of_classes_is_not_among_the_arguments(tmp_path):
    # transformers passes it beside them
    config = config_of(save_pretrained(small(), tmp_path, labels=["a", "b", "c"]))
    assert "num_classes" not in config["model_args"]
    assert {"in_chans", "global_pool", "img_size"} <= set(config["model_args"])
    assert (config["num_classes"], config["label_names"]) == (3, ["a", "b", "c"])


def test_load_checkpoint_takes_the_folder(tmp_path):
    model, other = small(), small()
    load_checkpoint(other, save_pretrained(model, tmp_path))
    assert all(torch.equal(x, other.state_dict()[name]) for name, x in model.state_dict().items())


def test_shared_and_strided_weights_are_saved(tmp_path, assert_same):
    model = small()
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    with torch.no_grad():
        model.head.weight.set_(torch.randn(24, 3).T)
    folder = save_pretrained(model, tmp_path)
    x = images(folder)
    assert_same(reloaded(folder)(x), model(x))


def test_saving_leaves_the_model_and_the_random_numbers_alone(tmp_path):
    model = small(proj_drop_rate=0.1).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    save_pretrained(model, tmp_path)
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_keep_their_type(dtype, tmp_path):
    model = small().to(dtype)
    folder = save_pretrained(model, tmp_path)
    found = safetensors.torch.load_file(folder / "model.safetensors")
    assert all(torch.equal(x, found[name]) and found[name].dtype == dtype for name, x in model.state_dict().items())


def test_preprocessing_is_said_in_timms_words(tmp_path):
    given = {"mean": [0.25], "std": (0.5, 0.25, 1.0), "interpolation": "bilinear", "crop_pct": 0.8}
    folder = save_pretrained(small(), tmp_path, data_config=given)
    found = timm.data.resolve_model_data_config(reloaded(folder))
    assert found["mean"] == [0.25, 0.25, 0.25] and found["std"] == [0.5, 0.25, 1.0]
    assert (found["interpolation"], found["crop_pct"], tuple(found["input_size"])) == ("bilinear", 0.8, (3, 32, 32))


@pytest.mark.parametrize(
    ("mode", "timms"), [("squash", ("squash", 1.0)), ("crop", ("center", 0.75)), ("pad", ("border", 1.0))]
)
def test_ways_to_resize_have_timms_names(mode, timms, tmp_path):
    # only the middle of a picture that is cut out has a share of it
    given = {"image_size": [32, 32], "in_chans": 3, "mean": [0.5], "std": [0.5], "resize_mode": mode, "crop_pct": 0.75}
    cfg = config_of(save_pretrained(small(), tmp_path, data_config=given, check=False))["pretrained_cfg"]
    assert (cfg["crop_mode"], cfg["crop_pct"]) == timms


# A training run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(tiny(epochs=1, optim__model_ema_decay=0.5), folder)
    return Run.open(folder)


def test_a_run_is_shared_with_its_classes_and_preprocessing(run, tmp_path, assert_same):
    model = recorded(run.load_model(), {**run.config.model.options, "img_size": (32, 32)})
    folder = save_pretrained(model, tmp_path, labels=run.classes, data_config=run.preprocess.to_dict())
    config = config_of(folder)
    assert config["label_names"] == list(run.classes)
    wanted = {"input_size": [1, 32, 32], "mean": list(run.preprocess.mean), "std": list(run.preprocess.std)}
    assert {name: config["pretrained_cfg"][name] for name in wanted} == wanted
    assert (config["pretrained_cfg"]["crop_mode"], config["pretrained_cfg"]["crop_pct"]) == ("squash", 1.0)
    x = images(folder)
    assert_same(reloaded(folder)(x), model(x))


def test_a_run_and_its_checkpoint_are_loaded(run):
    model, again = run.load_model(), run.load_model()
    for source in (run.folder, run.folder / "model.safetensors"):
        load_checkpoint(perturbed(again), source)
        assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    # the weights that were kept are the moving average
    report = load_checkpoint(perturbed(again), run.folder / "last.ckpt", use_ema=True)
    assert report.unwrapped == ("state_dict", "ema.module.")
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    assert load_checkpoint(again, run.folder / "last.ckpt").unwrapped == ("state_dict", "network.")
    assert not all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


def test_the_folder_of_a_run_is_not_written_to(run):
    before = {p.name: p.stat().st_mtime_ns for p in run.folder.iterdir()}
    with pytest.raises(ValueError, match="training run; give another"):
        save_pretrained(run.load_model(), run.folder)
    assert {p.name: p.stat().st_mtime_ns for p in run.folder.iterdir()} == before


# transformers


def test_transformers_loads_the_folder(tmp_path, assert_same):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    for name, model in (
        ("vit", small(attention="sima")),
        ("converted", convert(perturbed(built("vit_tiny_patch16_224", **SMALL)), "relu").eval()),
        ("soft", built("soft_tiny", img_size=64, num_classes=3).eval()),
    ):
        folder = save_pretrained(model, tmp_path / name, labels=["x", "y", "z"])
        again = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
        assert again.config.id2label == {0: "x", 1: "y", 2: "z"}
        x = images(folder)
        assert_same(again(x).logits, model(x), scale=1.0)
