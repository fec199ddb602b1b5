"""Short runs on real images; where they lie is said by SANSMAX_TEST_DATA, or they are beside the checkout."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from runs import MODEL, read_csv, sansmax

DATA = Path(os.environ.get("SANSMAX_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")

pytestmark = pytest.mark.real_data


def real(name):
    """A file of the real data, or a skipped test with the reason."""
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there; name the folder of the real data by SANSMAX_TEST_DATA")
    return DATA / name


def trained(source, folder, *words):
    """The test scores of a run."""
    said = sansmax("train", source, "--output", folder, *words)
    assert said.status == 0, said
    return json.loads((folder / "metrics.json").read_text())["test"]


def scores(measured):
    return {name: v["value"] for name, v in measured["scores"].items()}


def test_pneumonia_is_learnt_from_the_official_file(tmp_path):
    source = real("medmnist/pneumoniamnist.npz")
    words = ("--model", "seqnorm_vit_pico_conv4_28", "--image-size", "28", "--epochs", "1", "--batch-size", "64")
    words += ("--set", "model.options.depth=2", "--set", "lr=0.003")
    measured = trained(source, tmp_path / "run", *words)
    rows = read_csv(tmp_path / "run" / "splits.csv")
    assert Counter(r["split"] for r in rows) == {"train": 4708, "val": 524, "test": 624}
    labels = np.load(source)["test_labels"].ravel()
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["classes"] == ["normal", "pneumonia"]
    assert [r["label"] for r in rows if r["split"] == "test"] == [run["classes"][k] for k in labels]
    assert measured["images"] == 624
    assert scores(measured)["auc"] > 0.8, scores(measured)
    said = sansmax("evaluate", tmp_path / "run", source, "--output", tmp_path / "again")
    assert said.status == 0, said
    assert scores(json.loads((tmp_path / "again" / "metrics.json").read_text())) == scores(measured)


def test_grades_of_fundus_photographs_from_a_table(tmp_path):
    source = real("idrid_512/labels.csv")
    words = ("--label-column", "retinopathy_grade", "--image-size", "64x96", "--epochs", "1", "--model", MODEL)
    words += ("--set", "model.options={depth: 1, patch_size: 16}")
    measured = trained(source, tmp_path / "run", *words)
    rows = read_csv(tmp_path / "run" / "splits.csv")
    counts = Counter(r["split"] for r in rows)
    # validation images are drawn from the official training set, none from the test set
    assert (counts["train"] + counts["val"], counts["test"]) == (413, 103) and 55 <= counts["val"] <= 69
    official = {f"{r['split']}/{r['file']}": r["retinopathy_grade"] for r in read_csv(source)}
    assert {r["name"]: r["label"] for r in rows} == official
    assert all((r["split"] == "test") == r["name"].startswith("test/") for r in rows)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["classes"] == ["0", "1", "2", "3", "4"] and run["preprocess"]["in_chans"] == 3
    assert run["preprocess"]["image_size"] == [64, 96]
    # grades have an order
    assert "kappa" in measured["scores"]
    assert "quadratic kappa" in (tmp_path / "run" / "summary.md").read_text().lower()
    assert 0 <= scores(measured)["auc"] <= 1

    said = sansmax("evaluate", tmp_path / "run", source, "--output", tmp_path / "again")
    assert said.status == 0, said
    assert scores(json.loads((tmp_path / "again" / "metrics.json").read_text())) == scores(measured)

    (first, *_) = read_csv(tmp_path / "run" / "predictions_test.csv")
    picture = source.parent / first["name"]
    said = sansmax("predict", tmp_path / "run", picture, "--json")
    assert said.status == 0, said
    (answer,) = json.loads(said.out)["predictions"]
    known = [float(first[f"probability_{c}"]) for c in run["classes"]]
    np.testing.assert_allclose(list(answer["probabilities"].values()), known, rtol=1e-4)

    said = sansmax("heatmap", tmp_path / "run", picture, "--output", tmp_path / "maps")
    assert said.status == 0, said
    with np.load(tmp_path / "maps" / f"{picture.stem}_scores.npz") as arrays:
        assert arrays["scores"].shape == (4, 6)
        # the last patch begins where the last of 4 x 6 parts of 512 x 771 pixels begins
        np.testing.assert_allclose(arrays["xy_level0"][-1, -1], [771 * 5 / 6, 512 * 3 / 4])
    said = sansmax("heatmap", tmp_path / "run", picture, "--output", tmp_path / "maps", "--image-size", "native")
    assert said.status == 0, said
    with np.load(tmp_path / "maps" / f"{picture.stem}_scores.npz") as arrays:
        assert arrays["scores"].shape == (32, 49)
