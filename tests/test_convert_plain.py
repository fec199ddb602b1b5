"""A plain transformer of timm becomes one of this package: masks, images of other sizes, chunks."""

import pytest
import torch
from networks import small
from originals import PLAIN, build, pictures
from timm.models import vision_transformer as timm_vit

from sansmax.engine.stream import stream_tokens
from sansmax.errors import InputError
from sansmax.models.attention import SeqNormAttention, SimAAttention
from sansmax.models.attention_terms import SimAWithTerms
from sansmax.models.blocks import Block
from sansmax.models.convert import convert
from sansmax.models.vit import VisionTransformer


@pytest.mark.parametrize("which", PLAIN)
def test_a_plain_transformer_takes_masks_and_images_of_other_sizes(which, assert_same):
    model = convert(build(which), "seqnorm")
    assert isinstance(model, VisionTransformer)
    assert all(isinstance(block, Block) for block in model.blocks)
    assert (type(model.blocks[0].attn) is SeqNormAttention) == (which != "norms of queries and keys")
    x = pictures()
    mask = torch.tensor([[True] * 6, [True, True, False, True, False, True], [False] * 5 + [True]])
    logits = model(x, mask)
    assert_same(logits[:1], model(x[:1]), "nothing masked")
    assert (logits[1:] - model(x)[1:]).abs().max() > 1e-3
    layer, tokens = model.blocks[0].attn, torch.randn(3, 6, 48, dtype=torch.float64)
    for i in range(3):
        out = layer(tokens, mask)[i]
        assert_same(out[mask[i]], layer(tokens[i : i + 1, mask[i]])[0], "as without the masked tokens")
        assert not out[~mask[i]].any()
    other = x.clone()
    # the third patch is in the first row, the fifth in the second
    other[1, :, :16, 32:], other[1, :, 16:, 16:32] = 7.0, -3.0
    assert_same(model(other, mask)[1], logits[1], "pixels of masked patches")
    assert model(torch.randn(2, 3, 64, 16, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("which", [w for w in PLAIN if w != "norms of queries and keys"])
@pytest.mark.parametrize("attention", ["seqnorm", "sima"])
def test_a_plain_transformer_runs_in_chunks(which, attention, assert_same):
    class Picture:
        def __init__(self, pixels):
            self.pixels, self.grid = pixels, (pixels.shape[-2] // 16, pixels.shape[-1] // 16)

        def read(self, first, last):
            return self.pixels[..., first * 16 : last * 16, :]

    model = convert(build(which, img_size=(80, 48)), attention)
    for size in ((80, 48), (112, 32)):
        x = torch.randn(1, 3, *size, dtype=torch.float64)
        with torch.no_grad():
            found, expected = stream_tokens(model, Picture(x), chunk_tokens=6).logits, model(x)
        # positions of another grid are resampled in float32
        assert_same(*((found, expected) if size == (80, 48) else (found.float(), expected.float())))


def test_a_layer_with_terms_has_no_summary():
    model = convert(build("norms of queries and keys"), "sima")
    with pytest.raises(InputError, match="cannot run in chunks: sima attention has no summary of fixed size"):
        stream_tokens(model, None)
    assert convert(build("vit"), "sima").stream_obstacle is None


def test_timm_builds_the_dynamic_network_that_conversion_makes(assert_same):
    model = convert(build("vit"), "softmax")
    dynamic = build("vit", dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 16, dtype=torch.float64)
    # other sizes are resampled in float32
    assert_same(model(x).float(), dynamic(x).float())


def test_a_network_of_this_package_changes_its_mechanism(assert_same):
    model = small("seqnorm_vit_tiny_patch16_224", class_token=True)
    twin = small("seqnorm_vit_tiny_patch16_224", class_token=True, attention="sima")
    twin.load_state_dict({n: p for n, p in model.state_dict().items() if ".gamma_" not in n and ".beta_" not in n})
    assert convert(model, "sima") is model
    assert type(model.blocks[0].attn) is SimAAttention
    x, mask = torch.randn(2, 3, 48, 80, dtype=torch.float64), torch.rand(2, 15) < 0.6
    assert_same(model(x, mask), twin(x, mask))
    assert model.conversion["base"] == "seqnorm_vit_tiny_patch16_224"


def test_networks_with_methods_of_their_own_stay_what_they_are():
    class Own(timm_vit.VisionTransformer):
        pass

    model = Own(img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=3)
    assert type(convert(model, "sima")) is Own
    assert type(model.blocks[0]) is timm_vit.Block
    assert type(model.blocks[0].attn) is SimAWithTerms
    assert not model.blocks[0].attn.has_terms
    assert model.conversion["base"] is None
