"""Encoders of tiles: their own transform, weights that are named, no sum that depends on the batch, no hidden fetch."""

import json
import socket

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from sansmax.engine.build import weights_sha256
from sansmax.engine.encoders import EncoderSpec, load_encoder
from sansmax.errors import InputError
from sansmax.models import share

SMALL = EncoderSpec("test_vit", pretrained=False)


@pytest.fixture(scope="module")
def tiles():
    return np.random.default_rng(0).integers(0, 256, (7, 128, 128, 3), dtype=np.uint8)


@pytest.fixture
def no_network(monkeypatch):
    """Any attempt to reach another machine is an error of its own."""

    def refused(*args, **kwargs):
        raise AssertionError("the network was asked")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refused)
    monkeypatch.setattr(socket.socket, "connect", refused)


def refusal(**how):
    with pytest.raises(InputError) as caught:
        load_encoder(EncoderSpec(**how))
    return str(caught.value)


@pytest.mark.parametrize("crop_pct", [1.0, 0.875])
def test_a_tile_is_prepared_as_timm_prepares_it(tiles, crop_pct):
    encoder = load_encoder(EncoderSpec("test_resnet", pretrained=False, crop_pct=crop_pct))
    config = timm.data.resolve_model_data_config(encoder.network)
    whole = timm.data.create_transform(**{**config, "crop_pct": crop_pct}, is_training=False)
    images = torch.stack([whole(Image.fromarray(tile)) for tile in tiles])
    with torch.inference_mode():
        wanted = torch.cat([encoder.network(image[None]) for image in images]).numpy()
    found = encoder.encode(torch.stack([encoder.to_input(tile) for tile in tiles]))
    np.testing.assert_array_equal(found, wanted)
    assert found.shape == (7, encoder.width)
    assert json.loads(encoder.transform)["crop_pct"] == crop_pct


def test_the_corner_of_a_tile_is_seen():
    encoder = load_encoder(EncoderSpec("test_resnet", pretrained=False))
    grey = np.full((256, 256, 3), 128, np.uint8)
    marked = grey.copy()
    marked[:6, :6] = 0
    assert (encoder.to_input(grey) != encoder.to_input(marked)).any()


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_features_do_not_depend_on_the_tiles_beside(name, tiles):
    encoder = load_encoder(EncoderSpec(name, pretrained=False))
    inputs = torch.stack([encoder.to_input(tile) for tile in tiles])
    whole = encoder.encode(inputs)
    for size in (1, 2, 5):
        parts = [encoder.encode(part, pad_to=size) for part in inputs.split(size)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    np.testing.assert_array_equal(encoder.encode(inputs.flip(0))[::-1], whole)


def test_bf16_is_autocast(tiles):
    plain, half = (load_encoder(EncoderSpec("test_vit", False, precision=p)) for p in ("fp32", "bf16"))
    inputs = torch.stack([plain.to_input(tile) for tile in tiles])
    images = (inputs.float() / 255 - half.mean) / half.std
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        wanted = torch.cat([half.network(image[None]).float() for image in images]).numpy()
    found = half.encode(inputs)
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == np.float32
    assert (found != plain.encode(inputs)).any()


def test_random_weights_follow_from_their_seed_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    first, again, other = (load_encoder(EncoderSpec("test_vit", False, seed=s)) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.revision == "random weights, seed 3"


def test_the_digest_is_of_every_weight():
    network = timm.create_model("test_resnet", num_classes=0)
    before = weights_sha256(network)
    assert weights_sha256(network) == before
    buffer = next(b for name, b in network.named_buffers() if name.endswith("running_var"))
    buffer[-1] = torch.nextafter(buffer[-1], torch.tensor(2.0))
    assert weights_sha256(network) != before


def test_an_encoder_in_a_folder_is_the_one_that_was_saved(tmp_path, tiles, no_network):
    network = timm.create_model("test_vit", num_classes=5).eval()
    share.save_pretrained(network, tmp_path / "encoder")
    encoder = load_encoder(EncoderSpec(f"local-dir:{tmp_path / 'encoder'}"))
    inputs = torch.stack([encoder.to_input(tile) for tile in tiles])
    network.reset_classifier(0)
    with torch.inference_mode():
        wanted = torch.cat([network((i[None].float() / 255 - encoder.mean) / encoder.std) for i in inputs])
    np.testing.assert_array_equal(encoder.encode(inputs), wanted.numpy())
    assert encoder.sha256 == weights_sha256(network)


def test_weights_that_are_here_are_used_without_asking_the_network(tmp_path, monkeypatch, no_network):
    network = timm.create_model("test_vit", num_classes=1000)
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "models--timm--test_vit.r160_in1k"
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    save_file(network.state_dict(), cache / "snapshots" / commit / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    told = []
    encoder = load_encoder(EncoderSpec("test_vit.r160_in1k"), told.append)
    network.reset_classifier(0)
    assert encoder.sha256 == weights_sha256(network)
    assert encoder.revision == commit
    assert told == []


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "hf-hub:someone/encoder"])
def test_offline_nothing_is_fetched_and_the_ways_out_are_named(name, tmp_path, monkeypatch, no_network):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    said = refusal(name=name, offline=True)
    assert f"the encoder {name} has no pretrained weights here, --offline forbids to fetch them" in said
    assert "--encoder local-dir:FOLDER" in said and "--no-pretrained" in said


def test_a_fetch_is_said_before_it_is_tried(monkeypatch):
    told, asked = [], []
    real = timm.create_model

    def create(name, **how):
        asked.append(len(told))
        if len(asked) == 1:
            raise OSError("not in the cache")
        return real(name, **{**how, "pretrained": False})

    monkeypatch.setattr("sansmax.engine.encoders.timm.create_model", create)
    load_encoder(EncoderSpec("test_vit.r160_in1k"), told.append)
    assert asked == [0, 1] and told == ["fetching test_vit.r160_in1k, which is not on this machine"]


def test_wrong_encoders_say_what_is_allowed(tmp_path):
    assert "did you mean 'resnet50'" in refusal(name="resnet5o", pretrained=False)
    assert "unknown weights of resnet50 'a7_in1k': did you mean 'ra_in1k'" in refusal(name="resnet50.a7_in1k")
    assert "timm knows no pretrained weights of test_mambaout" in refusal(name="test_mambaout")
    assert f"{tmp_path} is no folder with a config.json" in refusal(name=f"local-dir:{tmp_path}")
    assert "reads 1 channels; tiles have three" in refusal(name="seqnorm_vit_pico_patch8_128", pretrained=False)
    assert "unknown precision 'fp16': did you mean 'bf16' or 'fp32'" in refusal(name="test_vit", precision="fp16")
    assert "--crop-pct is a share" in refusal(name="test_vit", crop_pct=1.5)
    assert "--device is auto, cpu, cuda" in refusal(name="test_vit", pretrained=False, device="gpu")


def test_a_network_that_gives_no_vector_is_refused(monkeypatch):
    real = timm.create_model
    monkeypatch.setattr("sansmax.engine.encoders.timm.create_model", lambda *a, **k: real(*a, **k, global_pool=""))
    with pytest.raises(InputError, match=r"test_vit gives \(1, 101, 64\) for a tile and no vector"):
        load_encoder(SMALL)
