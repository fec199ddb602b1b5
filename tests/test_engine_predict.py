"""Evaluation, prediction and heat maps: the figures of the run again, from whatever they are asked for."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import TINY, folder_of_pictures, picture, read_csv, sansmax, save
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss, roc_auc_score

import sansmax as package
from sansmax.data.images import read_image
from sansmax.engine.explain import token_scores
from sansmax.engine.heatmaps import stems
from sansmax.engine.predict import Predictor

CLASSES = ("benign", "malignant")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on grey pictures of 24 x 20 px without splits of their own."""
    top = tmp_path_factory.mktemp("predict")
    folder_of_pictures(top / "data", count=20)
    said = sansmax("train", top / "data", "--output", top / "run", *TINY, "--image-size", "32")
    assert said.status == 0, said
    return top / "run"


@pytest.fixture(scope="module")
def cnn(run):
    folder = run.parent / "cnn"
    words = ("--model", "resnet10t", "--epochs", "1", "--batch-size", "8", "--image-size", "32")
    said = sansmax("train", run.parent / "data", "--output", folder, *words)
    assert said.status == 0, said
    return folder


def of_split(run, split):
    return [row for row in read_csv(run / "splits.csv") if row["split"] == split]


# evaluate


def test_figures_are_those_of_scikit_learn(run, tmp_path):
    said = sansmax("evaluate", run, run.parent / "data", "--split", "all", "--output", tmp_path / "all")
    assert said.status == 0, said
    assert {p.name for p in (tmp_path / "all").iterdir()} == {
        *("metrics.json", "predictions.csv", "predictions.json", "roc.png", "confusion.png")
    }
    rows = read_csv(tmp_path / "all" / "predictions.csv")
    y = [CLASSES.index(r["label"]) for r in rows]
    p = np.array([[float(r[f"probability_{c}"]) for c in CLASSES] for r in rows])
    found = {n: v["value"] for n, v in json.loads((tmp_path / "all" / "metrics.json").read_text())["scores"].items()}
    assert found["auc"] == pytest.approx(roc_auc_score(y, p[:, 1]))
    assert found["accuracy"] == pytest.approx(accuracy_score(y, p.argmax(1)))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    assert found["log_loss"] == pytest.approx(log_loss(y, p))
    assert f"auc                  {found['auc']:.3f} (" in said.out


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_of_the_images_it_was_trained_with_only_those_kept_apart_are_measured(split, run, tmp_path):
    said = sansmax("evaluate", run, run.parent / "data", "--split", split, "--output", tmp_path / "e")
    assert said.status == 0, said
    names = {r["name"] for r in read_csv(tmp_path / "e" / "predictions.csv")}
    assert names == {r["name"] for r in of_split(run, split)}
    assert f"that the run kept apart as {split}" in said.out or split == "train"


def test_new_images_are_measured_as_a_whole(run, tmp_path):
    for i, name in enumerate(CLASSES):
        (tmp_path / "new" / name).mkdir(parents=True)
        for k in range(5):
            save(tmp_path / "new" / name / f"new{k}.png", picture(i, 1000 + k))
    said = sansmax("evaluate", run, tmp_path / "new", "--output", tmp_path / "e")
    assert said.status == 0, said
    assert f"all 10 images of {tmp_path}/new" in said.out
    assert len(read_csv(tmp_path / "e" / "predictions.csv")) == 10


def test_a_split_of_the_source_is_the_one_that_is_measured(run, tmp_path):
    data = folder_of_pictures(tmp_path / "data", splits=("train", "test"), count=4)
    shutil.rmtree(data / "test" / "benign")
    said = sansmax("evaluate", run, data, "--output", tmp_path / "e")
    assert said.status == 0, said
    rows = read_csv(tmp_path / "e" / "predictions.csv")
    assert [r["label"] for r in rows] == ["malignant"] * 4 and all(r["name"].startswith("test/") for r in rows)
    assert "not defined" in said.out
    said = sansmax("evaluate", run, data, "--split", "val")
    assert said.status == 2 and "has no val images; it has train, test. Choose with --split" in said.err


def test_classes_that_the_run_does_not_have_are_named(run, tmp_path):
    data = folder_of_pictures(tmp_path / "data", classes=("benign", "other"), count=2)
    said = sansmax("evaluate", run, data)
    assert said.status == 2
    assert "has labels that are none of the classes: other" in said.err
    assert "the classes are benign, malignant" in said.err


# predict


def test_predictions_are_those_of_the_test_in_the_run(run, tmp_path):
    # the mirrored view of a run that was trained with flips is part of both
    data = run.parent / "data"
    known = {r["name"]: r for r in read_csv(run / "predictions_test.csv")}
    paths = [data / name for name in known]
    said = sansmax("predict", run, *paths, "--output", tmp_path / "p.csv")
    assert said.status == 0, said
    printed = list(csv.DictReader(io.StringIO(said.out)))
    written = read_csv(tmp_path / "p.csv")
    read = json.loads((tmp_path / "p.json").read_text())
    assert [r["name"] for r in printed] == [r["name"] for r in written] == list(map(str, paths))
    assert read["classes"] == list(CLASSES)
    for name, line, row, item in zip(known, printed, written, read["predictions"], strict=True):
        p = np.array([float(row[f"probability_{c}"]) for c in CLASSES])
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert row["predicted"] == line["predicted"] == item["predicted"] == CLASSES[p.argmax()]
        assert [item["probabilities"][c] for c in CLASSES] == p.tolist()
        np.testing.assert_allclose([float(line[f"probability_{c}"]) for c in CLASSES], p, atol=6e-7)
        # one picture at a time instead of a batch
        np.testing.assert_allclose(p, [float(known[name][f"probability_{c}"]) for c in CLASSES], rtol=1e-5)


def test_json_and_folders(run):
    said = sansmax("predict", run, run.parent / "data", "--json", "--quiet")
    assert said.status == 0 and said.err == ""
    read = json.loads(said.out)
    names = [p["name"] for p in read["predictions"]]
    assert names == sorted(str(p) for p in (run.parent / "data").rglob("*.png")) and len(names) == 40
    for p in read["predictions"]:
        assert sum(p["probabilities"].values()) == pytest.approx(1)
        assert p["predicted"] == max(p["probabilities"], key=p["probabilities"].get)


def test_a_broken_picture_among_others_is_left_out_when_asked(run, tmp_path):
    save(tmp_path / "a.png", picture(0, 5))
    (tmp_path / "b.png").write_bytes(b"x")
    said = sansmax("predict", run, tmp_path, "--skip-bad")
    assert said.status == 0
    assert [r["name"] for r in csv.DictReader(io.StringIO(said.out))] == [str(tmp_path / "a.png")]
    assert f"left out: cannot read {tmp_path}/b.png" in said.err


def probabilities(run, words):
    said = sansmax("predict", run, *words, "--json")
    assert said.status == 0, said
    (one,) = json.loads(said.out)["predictions"]
    return np.array(list(one["probabilities"].values()))


def test_native_is_one_forward_pass_of_the_whole_picture(run, tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (72, 104), dtype=np.uint8)
    path = save(tmp_path / "large.png", pixels)
    predictor = Predictor.of(run)
    p = predictor.preprocess
    x = (torch.from_numpy(pixels)[None, None] / 255 - p.mean[0]) / p.std[0]
    with torch.no_grad():
        expected = predictor.network(x).double().softmax(1)[0].numpy()
    np.testing.assert_allclose(probabilities(run, [path, "--image-size", "native"]), expected, rtol=1e-4)
    assert not np.allclose(probabilities(run, [path]), expected, rtol=1e-4)


def test_another_size_is_resized_to(run, tmp_path):
    path = save(tmp_path / "p.png", picture(1, 7))
    large = Predictor.of(run)(path, image_size=64, scores=True)
    assert large.scores is not None and large.scores.shape == (8, 8)
    np.testing.assert_allclose(probabilities(run, [path, "--image-size", "64"]), large.probabilities)


def test_a_convolutional_network_has_no_native_size(cnn, tmp_path):
    path = save(tmp_path / "p.png", picture(1, 7))
    said = sansmax("predict", cnn, path, "--image-size", "native")
    assert said.status == 2 and "ResNet cannot read a picture at its own resolution" in said.err
    # but takes any size
    assert sansmax("predict", cnn, path, "--image-size", "48").status == 0


def test_the_package_predicts_trains_and_streams(run, tmp_path):
    path = save(tmp_path / "p.png", picture(0, 3))
    answer = package.predict(path, run)
    assert isinstance(answer, package.Prediction)
    np.testing.assert_array_equal(answer.probabilities, package.predict(read_image(path), run).probabilities)
    network = timm.create_model("seqnorm_vit_pico_patch8_128", depth=1, img_size=32, num_classes=3, in_chans=1)
    assert package.predict(path, network).classes == ("0", "1", "2")
    pixels = picture(0, 4, size=(32, 40))
    with torch.no_grad():
        expected = network.eval()((torch.from_numpy(pixels)[None, None] / 255 - 0.5) / 0.5)
    torch.testing.assert_close(package.stream(network, pixels).logits, expected)
    assert {"predict", "stream", "train", "evaluate", "Run"} <= set(dir(package))
    with pytest.raises(AttributeError, match="no attribute 'predikt'"):
        _ = package.predikt


# heatmap


def test_heat_maps_are_pictures_and_arrays(run, tmp_path):
    one = run.parent / "data" / "benign" / "b03.png"
    said = sansmax("heatmap", run, one, "--output", tmp_path / "maps")
    assert said.status == 0, said
    assert said.out.splitlines() == [
        str(tmp_path / "maps" / f"b03_{end}") for end in ("heatmap.png", "overlay.png", "scores.npz")
    ]
    for name in ("b03_heatmap.png", "b03_overlay.png"):
        with Image.open(tmp_path / "maps" / name) as drawn:
            assert min(drawn.size) > 50 or name == "b03_overlay.png"
            drawn.load()
    predictor = Predictor.of(run)
    with np.load(tmp_path / "maps" / "b03_scores.npz") as arrays:
        kept = dict(arrays)
    assert set(kept) == {"scores", "xy_level0", "score_class", "score_method", "classes", "probabilities"}
    answer = predictor(one)
    index = int(answer.probabilities.argmax())
    assert str(kept["score_class"]) == CLASSES[index] and str(kept["score_method"]) == "mask gradient"
    assert kept["classes"].tolist() == list(CLASSES)
    np.testing.assert_array_equal(kept["probabilities"], answer.probabilities)
    # the picture as it is; a mirrored view does not move the scores
    scores = token_scores(predictor.network, predictor.preprocess(read_image(one))[None], [index])[0]
    np.testing.assert_allclose(kept["scores"], scores.numpy(), rtol=1e-4, atol=1e-6 * float(scores.abs().max()))
    assert kept["scores"].dtype == np.float32


def test_the_class_to_explain_is_chosen(run, tmp_path):
    one = run.parent / "data" / "benign" / "b03.png"
    kept = {}
    for name in CLASSES:
        said = sansmax("heatmap", run, one, "--output", tmp_path / name, "--class", name)
        assert said.status == 0, said
        with np.load(tmp_path / name / "b03_scores.npz") as arrays:
            kept[name] = arrays["scores"]
            assert str(arrays["score_class"]) == name
    # of two classes, what speaks for one speaks against the other
    np.testing.assert_allclose(kept["benign"], -kept["malignant"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("mode", "corners"),
    [
        # 24 rows x 20 columns as 4 x 4 patches of 8 px of a square of 32 px
        ("squash", ([0, 5, 10, 15], [0, 6, 12, 18])),
        # the whole height, and 2 px left and right beside it
        ("pad", ([-2, 4, 10, 16], [0, 6, 12, 18])),
        # four fifths of the width, and as much of the height
        ("crop", ([2, 6, 10, 14], [4, 8, 12, 16])),
    ],
)
def test_places_of_the_tokens_are_those_in_the_file(mode, corners, run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    info = json.loads((copy / "run.json").read_text())
    info["preprocess"] |= {"resize_mode": mode, "crop_pct": 0.8}
    (copy / "run.json").write_text(json.dumps(info))
    one = run.parent / "data" / "benign" / "b03.png"
    said = sansmax("heatmap", copy, one)
    assert said.status == 0, said
    with np.load(copy / "heatmaps" / "b03_scores.npz") as arrays:
        places = arrays["xy_level0"]
    assert places.shape == (4, 4, 2)
    np.testing.assert_allclose(places[..., 0], np.tile(corners[0], (4, 1)), atol=1e-9)
    np.testing.assert_allclose(places[..., 1], np.tile(corners[1], (4, 1)).T, atol=1e-9)


def test_native_heat_maps_have_a_score_for_every_patch_of_the_file(run, tmp_path):
    path = save(tmp_path / "large.png", np.random.default_rng(0).integers(0, 256, (72, 104), dtype=np.uint8))
    said = sansmax("heatmap", run, path, "--image-size", "native", "--output", tmp_path / "maps")
    assert said.status == 0, said
    with np.load(tmp_path / "maps" / "large_scores.npz") as arrays:
        assert arrays["scores"].shape == (9, 13)
        rows, columns = np.indices((9, 13)) * 8
        np.testing.assert_array_equal(arrays["xy_level0"], np.stack([columns, rows], -1))


def test_a_convolutional_network_is_explained_by_occlusion_and_says_so(cnn, tmp_path):
    one = cnn.parent / "data" / "benign" / "b03.png"
    said = sansmax("heatmap", cnn, one, "--output", tmp_path)
    assert said.status == 0, said
    with np.load(tmp_path / "b03_scores.npz") as arrays:
        assert str(arrays["score_method"]) == "occlusion"
        assert np.isfinite(arrays["scores"]).all() and arrays["scores"].std() > 0


def test_pictures_of_one_name_do_not_overwrite_each_other(run, tmp_path):
    places = ["a/x.png", "b/x.png", "b/x.tif", "b/y.png"]
    for i, place in enumerate(places):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        Image.fromarray(picture(i % 2, i)).save(tmp_path / place)
    paths = [tmp_path / place for place in places]
    said = sansmax("heatmap", run, *paths, "--output", tmp_path / "maps")
    assert said.status == 0, said
    assert len(set(said.out.splitlines())) == 12 == len(list((tmp_path / "maps").iterdir()))
    assert stems(paths) == ["a-x-png", "b-x-png", "b-x-tif", "b-y-png"]
    assert stems([paths[0], paths[3]]) == ["x", "y"]
