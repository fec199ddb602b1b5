"""Slides in a stream: only tissue is read, at a resolution in micrometres, and the numbers are those in memory."""

import numpy as np
import pytest
import torch
from networks import small

from sansmax.data.slide_tokens import SlideTokens
from sansmax.data.slides.opening import open_slide
from sansmax.data.slides.tissue import Tissue
from sansmax.data.tokens import PixelSource
from sansmax.engine.explain import log_odds
from sansmax.engine.predict import Predictor
from sansmax.engine.predict_slide import SlideOptions
from sansmax.engine.sources import is_slide
from sansmax.engine.stores import STORES
from sansmax.engine.stream import stream, stream_tokens
from sansmax.errors import InputError

PICO = "seqnorm_vit_pico_patch8_128"
ROWS, COLUMNS, PATCH = 9, 14, 8


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (ROWS * PATCH, COLUMNS * PATCH, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def tissue():
    mask = np.random.default_rng(1).random((ROWS, COLUMNS)) < 0.4
    mask[3:5] = mask[:, 6] = False
    return Tissue(mask, float(PATCH))


def network(**changes):
    return small(PICO, in_chans=3, **changes)


def masked(model, pixels, mask):
    """Logits, and scores of class 2, of one forward and backward pass over the whole picture with a mask."""
    x = PixelSource(pixels, PATCH, mean=(0.5,), std=(0.5,)).read(0, len(pixels) // PATCH).double()
    weight = torch.from_numpy(mask).flatten()[None].double().requires_grad_()
    logits = model(x, mask=weight)
    (scores,) = torch.autograd.grad(log_odds(logits, 2).sum(), weight)
    return logits.detach(), scores[0].view(mask.shape).detach()


def on_grid(result, shape):
    """Scores of tokens where they lie; zero where none does."""
    out = np.zeros(shape)
    x, y = (result.xy // PATCH).T
    out[y, x] = result.scores[:, 0]
    return torch.from_numpy(out)


@pytest.mark.parametrize("changes", [{}, {"pos_embed": "learn", "img_size": (72, 112), "class_token": True}], ids=str)
@pytest.mark.parametrize("attention", ["seqnorm", "sima"])
@pytest.mark.parametrize("store", STORES)
def test_a_slide_gives_what_a_mask_of_its_tissue_gives(store, attention, changes, pixels, tissue, assert_same):
    model = network(attention=attention, **changes)
    logits, scores = masked(model, pixels, tissue.mask)
    found = stream(model, open_slide(pixels), tissue=tissue, scores=[2], store=store, chunk_tokens=9)
    assert_same(found.logits, logits, "logits")
    assert_same(on_grid(found, tissue.mask.shape), scores.where(torch.from_numpy(tissue.mask), 0.0), "scores")
    assert len(found.xy) == tissue.mask.sum()
    assert found.side == PATCH


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("chunk_tokens", [1, 11, 1000])
def test_blocks_and_chunks_of_any_size_give_the_same(block, chunk_tokens, pixels, tissue, assert_same):
    model, slide = network(), open_slide(pixels)
    logits, scores = masked(model, pixels, tissue.mask)
    source = SlideTokens(slide, PATCH, tissue=tissue, block=block)
    found = stream_tokens(model, source, scores=[2], chunk_tokens=chunk_tokens, keep_every=2)
    assert_same(found.logits, logits, "logits")
    assert_same(on_grid(found, tissue.mask.shape), scores.where(torch.from_numpy(tissue.mask), 0.0), "scores")


def test_every_patch_of_tissue_is_a_token_once_and_no_other(pixels, tissue):
    source = SlideTokens(open_slide(pixels), PATCH, tissue=tissue, block=4)
    assert {tuple(i) for i in source.index.tolist()} == {tuple(i) for i in np.argwhere(tissue.mask).tolist()}
    assert source.count == len({tuple(i) for i in source.index.tolist()})
    for block in source.blocks:
        window = pixels[block.row * 8 : (block.row + block.rows) * 8, block.column * 8 :][:, : block.columns * 8]
        np.testing.assert_array_equal(source.pixels(block), window)


def test_a_resolution_in_micrometres_is_that_of_the_pixels_read(pixels, assert_same):
    model = network()
    halved = pixels.reshape(36, 2, 56, 2, 3).mean((1, 3))
    near = open_slide(np.rint(halved).astype(np.uint8), mpp=1.0)
    fine = stream(model, open_slide(pixels, mpp=0.5), mpp=1.0, tissue=False)
    assert_same(fine.logits, stream(model, near, mpp=1.0, tissue=False).logits)
    assert fine.side == 2 * PATCH
    assert (fine.xy % 16 == 0).all()


def test_the_share_of_tissue_that_a_patch_needs_is_the_one_asked_for(pixels):
    half = np.zeros((ROWS * 8, COLUMNS * 8), bool)
    half[:4] = True  # half of the first row of patches
    slide, tissue = open_slide(pixels), Tissue(half, 1.0)
    assert SlideTokens(slide, PATCH, tissue=tissue, min_tissue=0.5).count == COLUMNS
    with pytest.raises(InputError, match="has no tissue: none of its 126 patches of 8 px is covered by 51 %"):
        SlideTokens(slide, PATCH, tissue=tissue, min_tissue=0.51)


def test_a_slide_without_resolution_is_an_error_that_names_the_flag(pixels):
    with pytest.raises(InputError, match="--slide-mpp"):
        stream(network(), open_slide(pixels), mpp=1.0, tissue=False)


def test_a_blank_slide_has_no_answer():
    with pytest.raises(InputError, match="has no tissue"):
        stream(network(), open_slide(np.full((640, 640, 3), 245, np.uint8), mpp=0.5))


def test_a_region_that_cannot_be_read_is_the_error_of_the_slide(pixels, tissue):
    slide = open_slide(pixels)

    class Torn:
        name, path, kind, size, levels, mpp = "torn", None, "test", slide.size, slide.levels, None

        def read(self, xy, level, size):
            if xy[1] + size[1] > 40:
                raise InputError("torn at row 40")
            return slide.read(xy, level, size)

        def thumbnail(self, max_side=1024):
            return slide.thumbnail(max_side)

    with pytest.raises(InputError, match="torn at row 40"):
        stream(network(), Torn(), tissue=tissue)


@pytest.fixture
def pyramid(tmp_path, pixels):
    import tifffile

    path = tmp_path / "slide.tif"
    large = np.kron(pixels, np.ones((4, 4, 1), np.uint8))
    options = {"tile": (64, 64), "photometric": "rgb", "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(large, subifds=1, resolution=(40000, 40000), **options)
        tiff.write(large[::2, ::2], subfiletype=1, resolution=(20000, 20000), **options)
    return path


def test_a_file_of_several_levels_is_a_slide_and_a_plain_one_is_not(pyramid, tmp_path, pixels):
    import tifffile

    tifffile.imwrite(tmp_path / "plain.tif", pixels, tile=(64, 64))
    assert is_slide(pyramid)
    assert not is_slide(tmp_path / "plain.tif")


def test_predict_reads_a_slide_in_micrometres_and_says_where_its_scores_lie(pyramid, pixels):
    model = network().float()
    predictor = Predictor.of(model, device="cpu")
    options = SlideOptions(mpp=1.0, tissue=False)
    found = predictor(pyramid, scores=True, slide=options)
    same = stream(model, pyramid, mpp=1.0, tissue=False, scores="predicted")
    np.testing.assert_allclose(found.probabilities, same.logits.double().softmax(1)[0].numpy(), rtol=1e-6)
    assert found.predicted == found.score_class
    np.testing.assert_array_equal(found.xy_level0, same.xy)
    assert found.side == 4 * PATCH
    # 4 level-0 pixels hold one of the small picture, so the resolution of 1 micrometre gives it back
    whole = predictor(pixels, image_size="native")
    np.testing.assert_allclose(found.probabilities, whole.probabilities, rtol=1e-5)
