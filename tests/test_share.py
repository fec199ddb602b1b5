"""What is saved is loaded by name, by timm and transformers, with the same answers; or it is not written at all."""

import base64
import http.server
import json
import threading
from functools import partial

import pytest
import safetensors.torch
import timm
import torch
import yaml
from networks import perturbed
from runs import tiny
from torch import nn

from sansmax.engine.run import Run
from sansmax.engine.train import train
from sansmax.models import cvt, deit, soft, xcit  # noqa: F401  (registers the networks)
from sansmax.models.card import MARK
from sansmax.models.convert import convert
from sansmax.models.share import ModelCard, push_to_hub, save_pretrained
from sansmax.models.vit import VisionTransformer
from sansmax.models.weights import load_checkpoint

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 2, "img_size": 32, "num_classes": 3}
NETWORKS = {
    "seqnorm_vit_tiny_patch16_224": SMALL,
    "seqnorm_vit_pico_conv4_28": {"in_chans": 2},
    "sima_deit_tiny_patch16_224": {**SMALL, "init_values": 1.0, "global_pool": "avg"},
    "sima_nano_12_p16": {"depth": 1, "embed_dim": 16, "num_heads": 2, "num_classes": 3},
    "soft_tiny": {"img_size": (64, 96), "num_classes": 3},
    "sima_cvt_13": {"img_size": 64, "depths": (1, 1, 1), "embed_dims": (8, 12, 24), "num_heads": (1, 1, 2)},
    "resnet18": {"num_classes": 3},
}


def built(name, **arguments):
    """The network; with older timm, which does not record them, its arguments are written down here."""
    return recorded(timm.create_model(name, **arguments), arguments)


def recorded(model, arguments):
    if not hasattr(model, "_model_args"):
        model._model_args = arguments
    return model


def small(**changes):
    return perturbed(built("seqnorm_vit_tiny_patch16_224", **{**SMALL, **changes}))


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def images(folder, b=2):
    return torch.randn(b, *config_of(folder)["pretrained_cfg"]["input_size"])


def reloaded(folder, **changes):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **changes).eval()


def untouched(folder):
    return not folder.exists() or not list(folder.iterdir())


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


# The card


def head_and_text(folder):
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_says_what_the_network_is_and_how_to_load_it(tmp_path):
    model = perturbed(built("sima_nano_12_p16", depth=1, num_classes=3))
    save_pretrained(model, tmp_path / "net", labels=["a", "b|c", "d"])
    head, text = head_and_text(tmp_path / "net")
    # whose weights they are, only their owner knows
    assert head["license"] == "unknown" and head["library_name"] == "timm"
    assert "| published code | https://github.com/UCDvision/sima (mit) |" in text
    assert {"timm", "transformers", "sansmax"} <= set(head["tags"])
    assert text.index("import sansmax\n") < text.index("import timm\n") < text.index("timm.create_model(")
    assert 'timm.create_model("local-dir:net", pretrained=True)' in text
    assert "SimA: Simple Softmax-free Attention for Vision Transformers, https://arxiv.org/abs/2206.08898" in text
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in text
    assert "3: a, b\\|c, d" in text and "For research only" in text
    # where the folder lies is nobody's business
    assert str(tmp_path) not in text


def test_what_the_author_knows_is_on_the_card(tmp_path):
    rows = [{"set": "test", "patients": 40, "accuracy": 0.91234}, {"set": "other", "AUC": 0.5}]
    card = ModelCard("Breast", "Tiles: of biopsies.", "cc-by-4.0", rows, ["me/set"], "me/base", ["x"], "@a{b}")
    save_pretrained(small(), tmp_path, card=card)
    head, text = head_and_text(tmp_path)
    assert (head["license"], head["datasets"], head["base_model"]) == ("cc-by-4.0", ["me/set"], "me/base")
    assert "x" in head["tags"]
    assert "# Breast\n\nTiles: of biopsies.\n" in text
    assert "| set | patients | accuracy | AUC |\n| --- | --- | --- | --- |\n| test | 40 | 0.9123 |  |\n" in text
    assert "@a{b}" in text


def test_the_code_on_the_card_runs_beside_the_folder(tmp_path, monkeypatch, assert_same):
    model = small()
    save_pretrained(model, tmp_path / "net")
    code = (tmp_path / "net" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    x = torch.randn(1, 3, 32, 32)
    assert_same(found["model"](x), model(x))
    assert "Resize" in repr(found["transform"])


def test_a_card_that_somebody_wrote_is_kept(tmp_path):
    save_pretrained(small(), tmp_path)
    readme = tmp_path / "README.md"
    assert MARK in readme.read_text()
    first = readme.read_text()
    save_pretrained(small(depth=1), tmp_path)
    assert readme.read_text() != first
    readme.write_text("mine")
    save_pretrained(small(), tmp_path)
    assert readme.read_text() == "mine"
    save_pretrained(small(), tmp_path, card=ModelCard(title="new"))
    assert "# new\n" in readme.read_text()


# What cannot be saved is not written


def test_a_model_that_nobody_could_build_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Linear was not built by timm.create_model"):
        save_pretrained(nn.Linear(1, 1), tmp_path)
    with pytest.raises(ValueError, match="VisionTransformer was not built by"):
        save_pretrained(VisionTransformer(depth=1, embed_dim=24, num_heads=2), tmp_path)
    pyramid = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **SMALL)
    with pytest.raises(ValueError, match="features_only=True"):
        save_pretrained(pyramid, tmp_path)
    assert untouched(tmp_path)


def test_a_network_changed_by_hand_is_refused(tmp_path):
    model = small(attention="relu")
    model.blocks[0].attn = small(attention="squared_relu").blocks[0].attn
    with pytest.raises(ValueError, match="gives other outputs with the same weights"):
        save_pretrained(model, tmp_path)
    model.blocks[0].attn = small(attention="seqnorm").blocks[0].attn
    with pytest.raises(ValueError, match=r"another network, which differs at blocks.0.attn.gamma_q"):
        save_pretrained(model, tmp_path)
    assert untouched(tmp_path)
    save_pretrained(model, tmp_path, check=False)
    assert not untouched(tmp_path)


def test_arguments_that_are_no_plain_values_need_a_replacement(tmp_path, assert_same):
    model = small(act_layer=nn.SiLU)
    with pytest.raises(ValueError, match=r"the argument act_layer=.* model_args=\{'act_layer': \.\.\.\}"):
        save_pretrained(model, tmp_path)
    assert untouched(tmp_path)
    folder = save_pretrained(model, tmp_path, model_args={"act_layer": "silu"})
    x = images(folder)
    assert_same(reloaded(folder)(x), model(x))
    with pytest.raises(ValueError, match="gives other outputs"):
        save_pretrained(model, tmp_path / "wrong", model_args={"act_layer": "relu"})
    assert untouched(tmp_path / "wrong")


def test_arguments_that_timm_did_not_record_are_asked_for(tmp_path):
    model = small()
    vars(model).pop("_model_args", None)
    with pytest.raises(ValueError, match=r"does not record .* model_args=\{\.\.\.\}"):
        save_pretrained(model, tmp_path)
    with pytest.raises(ValueError, match="differs at"):
        save_pretrained(model, tmp_path, model_args={})
    assert untouched(tmp_path)
    save_pretrained(model, tmp_path, model_args={k: v for k, v in SMALL.items() if k != "num_classes"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"labels": ["a", "b"]}, "name the 3 classes in order, got 2: a, b"),
        ({"labels": "abc"}, "name the 3 classes"),
        ({"labels": ["a", "b", "a"]}, "a stands more than once"),
        ({"data_config": {"men": 0.5}}, r"unknown key of data_config 'men'.*mean"),
        ({"data_config": {"resize_mode": "crpo"}}, r"unknown resize_mode 'crpo'.*'crop'"),
        ({"data_config": {"mean": (0.5, 0.5)}}, "mean must have 1 value or 3"),
        ({"data_config": {"input_size": (1, 32, 32)}}, "with the 3 channels of the model, got"),
        ({"model_args": {"depth": 3}}, "builds another network"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        save_pretrained(small(), tmp_path, **options)
    assert untouched(tmp_path)


def test_a_file_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "x").write_text("mine")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        save_pretrained(small(), tmp_path / "x")
    assert (tmp_path / "x").read_text() == "mine"


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


# The hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for; `asked` are the requests, `files` what was committed."""

    def __init__(self, state, *arguments):
        self.state = state
        super().__init__(*arguments)

    def log_message(self, *arguments):
        pass

    def reply(self, status, body=None, **headers):
        data = json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state["asked"].append((self.command, self.path))
        address = f"http://{self.headers['Host']}/me/net"
        if self.headers.get("Authorization") != "Bearer right":
            self.reply(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            self.state["created"] = json.loads(body)
            self.reply(200, {"url": address})
        elif self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            self.reply(200, {"errors": [], "warnings": []})
        elif "/branch/" in self.path:
            self.reply(200)
        elif "/preupload/" in self.path:
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.reply(200, {"files": [{"path": f["path"], **modes} for f in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.state["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply(200, {"commitUrl": f"{address}/commit/abc", "commitOid": "abc"})
        elif "/resolve/" in self.path and self.path.rpartition("/")[2] in self.state["files"]:
            self.reply(200, X_Repo_Commit="abc", ETag='"abc"')
        else:
            self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")

    do_GET = do_POST = do_HEAD = do_PUT = handle_request


@pytest.fixture
def hub():
    """A hub on this machine: its state, and its address under "endpoint"."""
    pytest.importorskip("huggingface_hub")
    state = {"asked": [], "files": {}}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, state))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield {**state, "state": state, "endpoint": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_pushed_is_what_is_saved(hub, tmp_path, assert_same):
    model = small()
    address = push_to_hub(model, "me/net", labels=["a", "b", "c"], token="right", endpoint=hub["endpoint"])
    assert address == f"{hub['endpoint']}/me/net/commit/abc"
    assert hub["state"]["created"]["name"] == "net"
    assert hub["state"]["created"]["visibility"] == "public"
    for name, content in hub["files"].items():
        (tmp_path / name).write_bytes(content)
    assert sorted(hub["files"]) == ["README.md", "config.json", "model.safetensors"]
    x = images(tmp_path)
    assert_same(reloaded(tmp_path)(x), model(x))
    assert 'timm.create_model("hf-hub:me/net", pretrained=True)' in (tmp_path / "README.md").read_text()
    assert 'model="me/net"' in (tmp_path / "README.md").read_text()


def test_a_card_on_the_hub_is_kept_unless_another_is_given(hub):
    hub["files"]["README.md"] = b"mine"
    options = {"token": "right", "endpoint": hub["endpoint"]}
    push_to_hub(small(), "me/net", **options)
    assert hub["files"]["README.md"] == b"mine" and "config.json" in hub["files"]
    push_to_hub(small(), "me/net", card=ModelCard(title="New"), **options)
    assert b"# New\n" in hub["files"]["README.md"]


def test_a_branch_is_made_and_a_private_repository_asked_for(hub):
    push_to_hub(small(), "me/net", private=True, revision="next", token="right", endpoint=hub["endpoint"])
    assert hub["state"]["created"]["visibility"] == "private"
    assert ("POST", "/api/models/me/net/branch/next") in hub["asked"]
    assert ("POST", "/api/models/me/net/commit/next") in hub["asked"]


def test_the_hub_says_no_and_what_to_do(hub):
    options = {"endpoint": hub["endpoint"], "check": False}
    with pytest.raises(ValueError, match=r"does not let you write to me/net \(401\); log in once with `hf auth login`"):
        push_to_hub(small(), "me/net", token="wrong", **options)
    with pytest.raises(ValueError, match=r"no name of a repository.*Give OWNER/NAME"):
        push_to_hub(small(), "me/a net", token="right", **options)
    assert not hub["files"]


def test_no_network_is_explained():
    with pytest.raises(ValueError, match=r"could not be reached .*save_pretrained"):
        push_to_hub(small(), "me/net", token="x", endpoint="http://127.0.0.1:9", check=False)


def test_what_cannot_be_saved_is_not_pushed(hub):
    model = small(attention="relu")
    model.blocks[0].attn = small(attention="squared_relu").blocks[0].attn
    with pytest.raises(ValueError, match="gives other outputs"):
        push_to_hub(model, "me/net", token="right", endpoint=hub["endpoint"])
    assert hub["asked"] == []
