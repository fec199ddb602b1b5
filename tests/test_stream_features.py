"""Bags of features in a stream: the numbers of the network called at once, whatever the chunk and the store."""

import numpy as np
import pytest
import timm
import torch

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.writing import write_bag
from sansmax.engine.explain import log_odds
from sansmax.engine.stores import STORES
from sansmax.engine.stream import stream
from sansmax.engine.stream_training import streamed_logits
from sansmax.errors import InputError

WIDTH, N = 10, 53
NAMES = ("seqnorm_slide_small", "sima_slide_small", "soft_slide_small", "abmil_slide_small")


def network(name, **changes):
    arguments = {"in_features": WIDTH, "num_classes": 4, "embed_dim": 24, "dtype": torch.float64, **changes}
    if not name.startswith("abmil"):
        arguments = {"num_heads": 2, **arguments}
    model = timm.create_model(name, **arguments).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def bag(n=N, **changes):
    rng = np.random.default_rng(3)
    xy = np.stack([np.arange(n) % 9, np.arange(n) // 9], 1).astype(np.int64) * 448
    fields = {
        "slide_id": "a",
        "features": rng.standard_normal((n, WIDTH)).astype(np.float32),
        "xy": xy,
        "xy_um": None,
        "tile_level0": 448.0,
        "tile_um": None,
        "mpp": None,
        "slide_size": None,
        "encoder": "test",
        "layout": "sansmax",
        "attributes": {},
    }
    return Bag(**{**fields, **changes})


def at_once(model, one, c=2):
    """Logits and scores of class `c` by the network called once."""
    features = torch.from_numpy(one.features).double()[None]
    weight = torch.ones(1, len(one.features), dtype=torch.float64, requires_grad=True)
    coords = None if one.grid is None else torch.from_numpy(one.grid)[None].double()
    logits = model(features, coords, mask=weight)
    (scores,) = torch.autograd.grad(log_odds(logits, c).sum(), weight)
    return logits.detach(), scores[0]


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("positions", ["none", "sincos"])
@pytest.mark.parametrize("name", NAMES)
def test_a_bag_gives_what_the_network_gives_at_once(name, positions, store, assert_same):
    changes = {} if name.startswith("abmil") else {"pos_embed": positions}
    model = network(name, **changes)
    logits, scores = at_once(model, bag())
    found = stream(model, bag(), scores=[2], store=store, chunk_tokens=8, keep_every=2)
    assert_same(found.logits, logits, "logits")
    assert_same(torch.from_numpy(found.scores[:, 0]), scores, "scores")
    np.testing.assert_array_equal(found.xy, bag().xy)
    assert found.side == 448


def test_an_array_or_a_file_of_features_is_a_bag_too(tmp_path, assert_same):
    model, one = network("seqnorm_slide_small"), bag()
    expected = stream(model, one.features).logits
    np.save(tmp_path / "a.npy", one.features)
    write_bag(one, tmp_path / "a.h5")
    for source in (np.load(tmp_path / "a.npy", mmap_mode="r"), tmp_path / "a.npy", str(tmp_path / "a.h5")):
        assert_same(stream(model, source, chunk_tokens=20).logits, expected)


def test_where_a_bag_lies_does_not_matter(assert_same):
    model = network("seqnorm_slide_small", pos_embed="sincos")
    moved = bag(xy=bag().xy + np.array([448 * 100, 448 * 7]))
    assert_same(stream(model, moved, chunk_tokens=8).logits, stream(model, bag()).logits, scale=1e5)
    assert (stream(model, bag(tile_level0=224.0)).logits - stream(model, bag()).logits).abs().max() > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_gradients_through_a_bag_are_those_at_once(name, assert_same):
    model, one = network(name), bag(xy=None)
    found = streamed_logits(model, one.features, chunk_tokens=8, store="disk")
    expected = model(torch.from_numpy(one.features).double()[None])
    assert_same(found, expected, "logits")
    parameters = dict(model.named_parameters())
    pairs = (torch.autograd.grad(out[0, 1], list(parameters.values()), allow_unused=True) for out in (found, expected))
    for key, a, b in zip(parameters, *pairs, strict=True):
        a, b = (torch.zeros(()) if t is None else t for t in (a, b))
        assert_same(a.double(), b.double(), f"gradient of {key}", scale=max(1.0, b.abs().max().item()))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((5, WIDTH + 1), np.float32), "reads features of width 10, these have 11.*encoder of training"),
        (np.zeros((0, WIDTH), np.float32), "the bag is empty"),
        (np.zeros((3, 4, 5), np.float32), r"features must be an array \(tokens, width\), got shape \(3, 4, 5\)"),
        ("slide.svs", "reads features of tiles, and slide.svs is no bag.*sansmax tokenize slide.svs"),
    ],
)
def test_what_is_no_bag_for_the_network_is_an_error(source, message):
    with pytest.raises(InputError, match=message):
        stream(network("seqnorm_slide_small"), source)


def test_softmax_over_a_bag_does_not_stream_and_says_so():
    with pytest.raises(InputError, match="cannot run in chunks: softmax attention has no summary of fixed size"):
        stream(network("softmax_slide_small"), bag())


def test_pixels_for_a_network_of_features_and_a_bag_for_one_of_pixels_are_errors():
    with pytest.raises(InputError, match="reads pixels, and this is a bag of features"):
        stream(timm.create_model("seqnorm_vit_pico_patch8_128"), bag())


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_features_that_are_not_finite_are_an_error_that_says_where(number):
    features = np.zeros((N, WIDTH), np.float32)
    features[37, 2] = number
    with pytest.raises(InputError, match=r"features 30 to 39 hold NaN or infinity"):
        stream(network(NAMES[0]), features, chunk_tokens=10)
