"""What could not be loaded with the same answers is not written at all."""

import pytest
import timm
from saved import SMALL, images, reloaded, small
from torch import nn

from sansmax.models.share import save_pretrained
from sansmax.models.vit import VisionTransformer


def untouched(folder):
    return not folder.exists() or not list(folder.iterdir())


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
