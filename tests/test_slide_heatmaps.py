"""Heat maps of slides and bags by the command line: which files there are, and that they are true."""

import csv
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bags import KEYS
from PIL import Image
from runs import refused, sansmax, tiny, train_only

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.writing import write_bag
from sansmax.engine.bag_run import BagRun
from sansmax.engine.explain import bag_scores
from sansmax.engine.predict import Predictor
from sansmax.engine.predict_slide import SlideOptions
from sansmax.engine.slide_explain import Asked, explain_bag
from sansmax.engine.slide_heatmaps import Drawing, write_heatmaps
from sansmax.errors import InputError
from sansmax.models.slide import SlideNetwork
from sansmax.report.heatmap_array import read_scores_h5
from sansmax.report.slide_scores import SlideScores

pytest.importorskip("h5py")
SIZE, SIDE = (2560, 1920), 256
DATA = Path(os.environ.get("SANSMAX_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def place(n, seed):
    """Corners of `n` tiles of a slide of 10 x 7."""
    cells = np.random.default_rng(seed).permutation(70)[:n]
    return np.stack((cells % 10, cells // 10), axis=1) * SIDE


def toy_bag(name, seed, n=40, **changes):
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((n, 12)).astype(np.float32)
    features[:5] += 3 * (seed % 2)
    about = {"xy": place(n, seed), "tile_level0": float(SIDE), "slide_size": SIZE, "mpp": 0.5, "encoder": "toy"}
    return Bag(name, features, **{**about, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a run on bags, its bags, and the slides of two of them."""
    root = tmp_path_factory.mktemp("bags")
    rows = []
    for i in range(16):
        write_bag(toy_bag(f"s{i:02}", i), root / "bags" / f"s{i:02}.h5")
        rows.append((f"p{i:02}", f"s{i:02}", ("benign", "tumour")[i % 2]))
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("case_id", "slide_id", "label"), *rows])
    (root / "slides").mkdir()
    for i in (0, 1):
        Image.new("RGB", SIZE, (200, 120, 180)).save(root / "slides" / f"s{i:02}.png")
    words = [w for k, v in {**KEYS, "tokens.batch_tokens": 200}.items() for w in ("--set", f"{k}={v}")]
    said = sansmax("train", root / "labels.csv", "--bags", root / "bags", "--output", root / "run", *words, "--quiet")
    assert said.status == 0, said
    return root


def test_every_format_of_a_bag_is_written_and_says_the_same(world, tmp_path):
    words = ("--class", "tumour", "--format", "png,h5,tiff,geojson", "--output", tmp_path, "--quiet")
    said = sansmax("heatmap", world / "run", world / "bags" / "s03.h5", *words)
    assert said.status == 0, said
    names = ["s03_heatmap.png", "s03_heatmap.tiff", "s03_scores.h5", "s03_tiles.geojson"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    assert sorted(said.out.split()) == sorted(str(tmp_path / n) for n in names)

    found = read_scores_h5(tmp_path / "s03_scores.h5")
    run, bag = BagRun.open(world / "run"), toy_bag("s03", 3)
    model = run.load_model()
    features = torch.from_numpy(bag.features)
    expected = bag_scores(model, features, torch.from_numpy(bag.grid), 1).double().numpy()
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(found.xy, bag.xy)
    assert (found.side, found.mpp, found.slide_size, found.class_name) == (SIDE, 0.5, SIZE, "tumour")
    with torch.no_grad():
        assert found.probability == pytest.approx(model(features[None]).softmax(1)[0, 1].item(), rel=1e-4)
    tiles = json.loads((tmp_path / "s03_tiles.geojson").read_text())["features"]
    values = [tile["properties"]["measurements"]["score_tumour"] for tile in tiles]
    np.testing.assert_allclose(values, found.scores, rtol=1e-8)


def test_without_a_class_the_predicted_one_is_explained(world, tmp_path):
    said = sansmax("heatmap", world / "run", world / "bags" / "s01.h5", "--output", tmp_path, "--quiet")
    assert said.status == 0, said
    found = read_scores_h5(tmp_path / "s01_scores.h5")
    assert found.probability is not None and found.probability >= 0.5
    other = {"benign": "tumour", "tumour": "benign"}[found.class_name]
    sansmax("heatmap", world / "run", world / "bags" / "s01.h5", "--output", tmp_path / "b", "--class", other)
    again = read_scores_h5(tmp_path / "b" / "s01_scores.h5")
    # of two classes one speaks for what the other speaks against
    np.testing.assert_allclose(again.scores, -found.scores, rtol=1e-4, atol=1e-9)
    assert again.probability == pytest.approx(1 - found.probability)


def test_slides_are_drawn_from_the_bags_of_their_ids(world, tmp_path):
    words = ("--bags", world / "bags", "--slide", world / "slides", "--output", tmp_path, "--faithfulness", "--quiet")
    said = sansmax("heatmap", world / "run", "s00", "s01", *words)
    assert said.status == 0, said
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"faithfulness.csv", "faithfulness.md", "faithfulness.png"} | {
        f"s0{i}_{end}" for i in (0, 1) for end in ("heatmap.png", "scores.h5")
    }
    page = (tmp_path / "faithfulness.md").read_text()
    assert "| s00 | 40 | 40 |" in page and "| s01 | 40 | 40 |" in page
    # the slide itself, given as what is to be explained
    said = sansmax(
        "heatmap", world / "run", world / "slides" / "s01.png", "--bags", world / "bags", "-o", tmp_path / "b"
    )
    assert said.status == 0, said
    with Image.open(tmp_path / "b" / "s01_heatmap.png") as with_slide, Image.open(tmp_path / "s01_heatmap.png") as same:
        assert np.array_equal(np.asarray(with_slide), np.asarray(same))


def test_wrong_words_are_refused_and_name_the_way_out(world, tmp_path):
    run, bags = world / "run", world / "bags"
    out = ("--output", tmp_path / "maps")
    assert "unknown class 'tumor': did you mean 'tumour'?" in refused("heatmap", run, bags, "--class", "tumor", *out)
    assert "unknown format 'tif': did you mean 'tiff'?" in refused("heatmap", run, bags, "--format", "tif", *out)
    assert "unknown slide 's99'" in refused("heatmap", run, "s99", "--bags", bags, *out)
    assert "give bags of features" in refused("heatmap", run, *out)
    thumbnail = ("--thumbnail", world / "slides" / "s00.png")
    assert "16 bags are given" in refused("heatmap", run, bags, *thumbnail, *out)
    assert not (tmp_path / "maps").exists()


def test_a_bag_of_another_encoder_or_width_is_refused(world, tmp_path):
    rng = np.random.default_rng(0)
    write_bag(Bag("x", rng.standard_normal((4, 13)).astype(np.float32), encoder="toy"), tmp_path / "x.h5")
    message = refused("heatmap", world / "run", tmp_path / "x.h5")
    assert "width 13" in message and "width 12" in message


def test_a_bag_of_another_slide_is_refused_with_numbers(world, tmp_path):
    Image.new("RGB", (1000, 750)).save(tmp_path / "s00.png")
    message = refused("heatmap", world / "run", world / "bags" / "s00.h5", "--slide", tmp_path / "s00.png")
    assert "of 40 tokens lie outside the slide of 1,000 x 750 level-0 px" in message


def test_an_empty_bag_is_refused_with_the_reason(world):
    run = BagRun.open(world / "run")
    asked = Asked(run.load_model(), run.classes)
    empty = toy_bag("none", 0, n=0)
    with pytest.raises(InputError, match=r"none: the bag is empty.*without tissue has no answer"):
        explain_bag(asked, empty)


def test_networks_that_cannot_stream_are_explained_in_memory():
    torch.manual_seed(0)
    small = {"in_features": 12, "num_classes": 2, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = SlideNetwork(attention="softmax", **small).eval()
    assert model.stream_obstacle is not None
    bag = toy_bag("a", 1)
    found = explain_bag(Asked(model, ("a", "b"), class_name="b"), bag)
    expected = bag_scores(model, torch.from_numpy(bag.features), torch.from_numpy(bag.grid), 1)
    np.testing.assert_allclose(found.scores, expected.double().numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("task", "classes", "quantity"),
    [("regression", ("age", "size"), "value"), ("survival", ("risk",), "risk"), ("multilabel", ("a", "b"), "log-odds")],
)
def test_each_task_says_what_its_scores_change(task, classes, quantity):
    torch.manual_seed(0)
    small = {"in_features": 12, "num_classes": len(classes), "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = SlideNetwork(**small).eval()
    found = explain_bag(Asked(model, classes, task, classes[-1]), toy_bag("a", 1))
    assert found.quantity == quantity and found.class_name == classes[-1]
    assert (found.probability is None) == (task != "multilabel")
    expected = bag_scores(model, torch.from_numpy(toy_bag("a", 1).features), None, len(classes) - 1, task)
    np.testing.assert_allclose(found.scores, expected.double().numpy(), rtol=1e-3, atol=1e-8)
    with pytest.raises(InputError, match="unknown task"):
        Asked(model, classes, "guess")
    with pytest.raises(InputError, match="need at least 2 classes"):
        Asked(model, ("one",))


def test_a_bag_without_coordinates_is_an_array_and_says_so(tmp_path):
    said = []
    bare = SlideScores("a", np.arange(3.0), None, None, "tumour")
    paths = list(write_heatmaps(bare, tmp_path / "a", Drawing(("png", "h5", "tiff")), say=said.append))
    assert [p.name for p in paths] == ["a_scores.h5"]
    assert "only the array is written" in said[0]
    with pytest.raises(InputError, match="add h5 to --format"):
        list(write_heatmaps(bare, tmp_path / "a", Drawing(("png",))))


def test_a_slide_gives_what_the_bag_lacks():
    model = SlideNetwork(in_features=12, num_classes=2, embed_dim=16, depth=1, num_heads=2).eval()
    bag = toy_bag("a", 1, slide_size=None, mpp=None)
    slide = SimpleNamespace(size=SIZE, mpp=0.25)
    found = explain_bag(Asked(model, ("a", "b")), bag, slide=slide)
    assert (found.slide_size, found.mpp) == (SIZE, 0.25)
    # corners in micrometres become level-0 pixels by the slide's resolution
    microns = Bag("a", bag.features, xy_um=bag.xy * 0.25, tile_um=SIDE * 0.25)
    placed = explain_bag(Asked(model, ("a", "b")), microns, slide=slide)
    np.testing.assert_array_equal(placed.xy, bag.xy)
    assert explain_bag(Asked(model, ("a", "b")), microns).xy is None


# Runs on images


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    return train_only(tiny(epochs=1), tmp_path_factory.mktemp("images") / "run")


def test_a_picture_with_formats_is_read_at_its_own_resolution(image_run, tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (48, 88), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    said = sansmax("heatmap", image_run, tmp_path / "a.png", "--format", "h5,tiff,geojson,png", "-o", tmp_path / "m")
    assert said.status == 0, said
    found = read_scores_h5(tmp_path / "m" / "a_scores.h5")
    native = Predictor.of(image_run)(picture, image_size="native", scores=found.class_name)
    assert found.side == 8 and found.slide_size == (88, 48) and len(found.scores) == 66
    order = np.lexsort((found.xy[:, 0], found.xy[:, 1]))
    np.testing.assert_allclose(found.scores[order], native.scores.ravel(), rtol=1e-3, atol=1e-6)


def test_options_of_bags_are_refused_for_runs_on_images(image_run, tmp_path):
    message = refused("heatmap", image_run, tmp_path / "a.png", "--bags", tmp_path)
    assert "is a run on images, --bags belong to runs on bags" in message
    assert "give pictures or slides" in refused("heatmap", image_run)


@pytest.mark.real_data
def test_a_real_slide_has_a_score_for_every_patch_of_its_tissue(image_run, tmp_path):
    slide = DATA / "wsi" / "CMU-1-Small-Region.svs"
    if not slide.exists():
        pytest.skip(f"{slide} is not there; name the folder of the real data by SANSMAX_TEST_DATA")
    openslide = pytest.importorskip("openslide")
    words = ("--mpp", "4", "--class", "7", "--format", "png,h5,tiff,geojson", "--output", tmp_path)
    said = sansmax("heatmap", image_run, slide, *words)
    assert said.status == 0, said
    found = read_scores_h5(tmp_path / "CMU-1-Small-Region_scores.h5")
    assert found.slide_size == (2220, 2967) and found.mpp == pytest.approx(0.499)
    assert found.side == pytest.approx(8 * 4 / 0.499)
    # half of the picture is tissue: patches of empty glass have no score
    assert 0.3 < len(found.scores) * found.side**2 / (2220 * 2967) < 0.8
    options = SlideOptions(mpp=4)
    same = Predictor.of(image_run)(slide, slide=options, scores="7")
    np.testing.assert_allclose(found.scores, same.scores, rtol=1e-5, atol=1e-9)
    np.testing.assert_array_equal(found.xy, same.xy_level0)
    with openslide.OpenSlide(tmp_path / "CMU-1-Small-Region_heatmap.tiff") as tiff:
        width, height = tiff.dimensions
        mpp = float(tiff.properties["openslide.mpp-x"])
        assert (width * mpp, height * mpp) == pytest.approx((2220 * 0.499, 2967 * 0.499), rel=0.002)
