"""Figures: the files decode, the artists say what the data say, the colours mean what they should."""

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread
from sklearn import metrics as sk

from sansmax.errors import InputError
from sansmax.report import bars, confusion, curves, grid, heatmap, pictures, roc, scaling
from sansmax.report.resample import Interval
from sansmax.report.style import POSITIVE


def draw(n, k, seed=0, sharp=2.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    e = np.exp(rng.normal(size=(n, k)) + sharp * np.eye(k)[labels])
    return labels, e / e.sum(1, keepdims=True)


def texts(figure):
    """Every text of a figure."""
    return [t.get_text() for t in figure.findobj(matplotlib.text.Text) if t.get_text()]


def epochs(n, **changes):
    rows = [
        {
            "epoch": i + 1,
            "step": 10 * i,
            "seconds": 2.0 * i,
            "lr": 1e-3 / (i + 1),
            "train_loss": 1 / (i + 1),
            "val_loss": 1.5 / (i + 1),
            "val_accuracy": 0.5 + 0.01 * i,
            "val_auc": 0.9 - 0.01 * (i - 3) ** 2,
            "images_per_second": 100.0,
        }
        for i in range(n)
    ]
    return [row | changes for row in rows]


def scaling_rows():
    rows = []
    for n in (256, 1024, 4096, 16384):
        rows.append(
            {"mechanism": "sima", "tokens": n, "image_px": 16 * int(n**0.5), "seconds": 1e-6 * n, "peak_mib": n / 64}
        )
        over = n > 4096
        rows.append(
            {
                "mechanism": "softmax",
                "tokens": n,
                "image_px": 16 * int(n**0.5),
                "seconds": None if over else 1e-8 * n**2,
                "peak_mib": None if over else n**2 / 2**14,
                "reason": "over 24 GiB" if over else None,
            }
        )
    return rows


def test_every_figure_is_a_png_and_leaves_matplotlib_as_it_was(tmp_path):
    before = dict(matplotlib.rcParams)
    y, p = draw(60, 3)
    picture = np.zeros((40, 64, 3), np.uint8)
    written = [
        curves.learning_curves(epochs(5), tmp_path / "curves.png"),
        curves.learning_curves(epochs(1), tmp_path / "curves1.png"),
        curves.learning_curves(epochs(4, val_auc="", lr=None), tmp_path / "curves2.png"),
        roc.roc_curves({"a": (y, p)}, ["x", "y", "z"], tmp_path / "roc.png"),
        confusion.confusion_matrix(y, p, ["x", "y", "z" * 60], tmp_path / "confusion.png"),
        heatmap.heatmap(picture, np.eye(4), tmp_path / "heat.png", np.eye(4) > 0, title="t", note="n"),
        heatmap.heatmap(picture[:8], np.full((1, 8), np.nan), tmp_path / "flat.png"),
        scaling.scaling(scaling_rows(), tmp_path / "scaling.png"),
        scaling.scaling(scaling_rows()[:1], tmp_path / "one.png"),
        bars.bars({"": {"a": Interval(0.5, 0.4, 0.6), "b": Interval(float("nan"))}}, tmp_path / "bars.png", chance=0.1),
        grid.sample_grid([picture, np.ones((8, 8))], ["a", "b"], tmp_path / "sub" / "grid.png"),
    ]
    for path in written:
        assert min(imread(path).shape[:2]) > 100
    assert dict(matplotlib.rcParams) == before
    assert not list(tmp_path.glob(".*"))


def test_learning_curves_mark_the_best_epoch_and_skip_gaps():
    rows = epochs(9)
    rows[2]["val_loss"] = ""
    figure = curves.learning_figure(rows)
    assert any("Best epoch 4 of 9: validation AUC 0.900" in t for t in texts(figure))
    loss, score, rate = figure.axes
    validation = next(line for line in loss.lines if line.get_label() == "validation")
    assert 3 not in validation.get_xdata()
    assert len(validation.get_xdata()) == 8
    for axes in (loss, score, rate):
        assert any(list(line.get_xdata()) == [4, 4] for line in axes.lines)


def test_learning_curves_fall_back_on_what_was_recorded():
    by_loss = curves.learning_figure(epochs(4, val_auc="", val_accuracy=None))
    assert any("Best epoch 4 of 4: validation loss" in t for t in texts(by_loss))
    assert len(by_loss.axes) == 2
    with pytest.raises(InputError, match="at least one epoch"):
        curves.learning_figure([])


def test_learning_curves_mark_the_epoch_that_was_kept():
    rows = epochs(9)
    by_loss = min(rows, key=lambda row: row["val_loss"])["epoch"]
    for monitor, words, epoch in (
        ("val_loss", f"Best epoch {by_loss} of 9: validation loss", by_loss),
        ("last", "Last epoch", 9),
    ):
        figure = curves.learning_figure(rows, monitor=monitor)
        assert any(words in t for t in texts(figure))
        assert all(any(list(line.get_xdata()) == [epoch, epoch] for line in axes.lines) for axes in figure.axes)


@pytest.mark.parametrize("seconds, words", [(3.14, "3.1 s"), (42, "42 s"), (190, "3 min 10 s"), (7500, "2 h 5 min")])
def test_durations_are_words(seconds, words):
    assert curves.duration(seconds) == words


def test_roc_points_are_those_of_scikit_learn():
    y, p = draw(200, 2, sharp=1.0)
    scores = np.round(p[:, 1], 1)
    x, t, _ = sk.roc_curve(y, scores, drop_intermediate=False)
    ours = roc.roc_points(y, scores, 1)
    np.testing.assert_allclose(ours[0], x)
    np.testing.assert_allclose(ours[1], t)


def test_the_mean_curve_has_the_macro_area():
    y, p = draw(300, 4, sharp=1.0)
    x, t = roc.mean_curve(y, p)
    assert np.trapezoid(t, x) == pytest.approx(sk.roc_auc_score(y, p, multi_class="ovr"), abs=0.01)
    assert (np.diff(t) >= -1e-12).all()


def test_roc_has_a_line_per_model_and_thin_lines_for_classes():
    y, p = draw(80, 2)
    two = roc.roc_figure({"one": (y, p), "other": (y, p[:, ::-1])}, ["a", "b"])
    area = sk.roc_auc_score(y, p[:, 1])
    assert len(two.axes[0].lines) == 3
    assert any(f"one  {area:.3f} (" in t for t in texts(two))
    assert any(f"other  {1 - area:.3f} (" in t for t in texts(two))
    y, p = draw(80, 5)
    assert len(roc.roc_figure({"one": (y, p)}, list("abcde")).axes[0].lines) == 1 + 5 + 1


def test_roc_of_one_class_says_so():
    figure = roc.roc_figure({"one": (np.zeros(4, int), np.full((4, 2), 0.5))}, ["a", "b"])
    assert any("one  not defined" in t for t in texts(figure))


def test_confusion_counts_and_percent():
    y = np.array([0, 0, 0, 0, 1, 1])
    p = np.eye(2)[[0, 0, 0, 1, 1, 1]]
    figure = confusion.confusion_figure(y, p, ["benign", "malignant"])
    cells = [t.get_text() for t in figure.axes[0].texts]
    assert cells == ["3", "75 %", "1", "25 %", "2", "100 %"]
    assert any("benign taken\nfor malignant, 1 of 4" in t for t in texts(figure))
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["benign", "malignant"]


def test_the_overlay_is_red_where_positive_and_blue_where_negative(tmp_path):
    pixels = np.full((60, 90, 3), 128, np.uint8)
    scores = np.zeros((2, 3))
    scores[0, 0], scores[1, 2], scores[0, 2] = 5, -5, np.nan
    out = imread(heatmap.heatmap_overlay(pixels, scores, tmp_path / "overlay.png"))[..., :3]
    assert out.shape == (60, 90, 3)
    red, blue, none, unknown = out[15, 15], out[45, 75], out[45, 15], out[15, 75]
    assert red[0] > red[2] + 0.25
    assert blue[2] > blue[0] + 0.25
    assert np.ptp(none) < 0.02
    assert np.ptp(unknown) < 0.02


def test_the_overlay_does_not_depend_on_its_bands(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    pixels, scores = rng.integers(0, 255, (53, 31, 3), dtype=np.uint8), rng.normal(size=(7, 5))
    whole = imread(heatmap.heatmap_overlay(pixels, scores, tmp_path / "a.png"))
    monkeypatch.setattr(heatmap, "BAND", 8)
    np.testing.assert_array_equal(whole, imread(heatmap.heatmap_overlay(pixels, scores, tmp_path / "b.png")))


def test_the_heatmap_shows_picture_scores_and_truth_at_the_same_places():
    pixels = np.zeros((2100, 1050), np.uint16)
    pixels[:1050] = 65535
    scores = np.zeros((64, 32))
    scores[:8, :8], scores[-8:, -8:] = 3, -3
    truth = np.zeros((64, 32), bool)
    truth[:8, :8] = True
    figure = heatmap.heatmap_figure(pixels, scores, truth, class_name="grade 4")
    picture, tint, mark = (figure.axes[i].images[0].get_array() for i in range(3))
    assert picture.shape == (1024, 512, 3)
    assert picture[100, 100].min() == 1
    assert picture[900, 100].max() == 0
    assert tint[20, 20, 0] > tint[20, 20, 2] + 0.25
    assert tint[-20, -20, 2] > tint[-20, -20, 0] + 0.25
    assert np.ptp(mark[20, 20]) > 0.25
    assert np.ptp(mark[-20, -20]) < 0.01
    assert any("log-odds of 'grade 4'" in t.replace("\n", " ") for t in texts(figure))
    assert any("speaks for it" in t for t in texts(figure))
    assert len(heatmap.heatmap_figure(pixels, scores).axes) == 3


def test_one_outlier_does_not_take_the_colour_from_the_rest():
    scores = np.linspace(-1, 1, 10_000).reshape(100, 100)
    scores[0, 0] = 1e6
    assert heatmap.robust_limit(scores) == pytest.approx(0.99, abs=0.01)
    assert heatmap.robust_limit(np.zeros((3, 3))) == 1
    lone = np.zeros((200, 200))
    lone[5, 5] = -4
    assert heatmap.robust_limit(lone) == 4


@pytest.mark.parametrize("shape", [(12, 20), (7, 9, 3)])
def test_area_means_are_means(shape):
    array = np.random.default_rng(0).random(shape)
    small = pictures.area_mean(array, 3, 4)
    h, w = shape[:2]
    tops, lefts = [i * h // 3 for i in range(4)], [j * w // 4 for j in range(5)]
    for i in range(3):
        for j in range(4):
            block = array[tops[i] : tops[i + 1], lefts[j] : lefts[j + 1]]
            np.testing.assert_allclose(small[i, j], block.mean(axis=(0, 1)), rtol=1e-5)


def test_pictures_of_every_kind_become_rgb():
    assert pictures.as_rgb(np.full((2, 2), 65535, np.uint16)).min() == 1
    assert pictures.as_rgb(np.full((2, 2, 4), 51, np.uint8)).shape == (2, 2, 3)
    assert pictures.as_rgb(np.ones((2, 2), bool)).max() == 1
    with pytest.raises(InputError, match="undo the normalisation"):
        pictures.as_rgb(np.full((2, 2), -2.0))
    with pytest.raises(InputError, match=r"\(2, 2, 2\)"):
        pictures.as_rgb(np.zeros((2, 2, 2)))
    with pytest.raises(InputError, match="must be a grid"):
        heatmap.heatmap_figure(np.zeros((4, 4)), np.zeros(16))


def test_scaling_measures_slopes_and_says_why_softmax_stops():
    figure = scaling.scaling_figure(scaling_rows(), note="two cores")
    said = texts(figure)
    assert any("softmax\nslope 2.00\nover 24 GiB" in t for t in said)
    assert any("sima\nslope 1.00" in t for t in said)
    # 1e-8 * 4096^2 against 1e-6 * 4096 seconds; 4096^2 / 2^14 against 4096 / 64 MiB
    assert any("At 4,096 tokens sima is 41 times as fast as softmax\nand needs 16 times less memory" in t for t in said)
    assert any("goes on to 16,384 tokens" in t for t in said)
    assert {"linear", "quadratic", "1,024"} <= set(said)
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "X"]
    assert len(crosses) == 1
    assert crosses[0].get_xdata()[0] == 4096


def test_names_of_lines_do_not_cover_each_other():
    rows = scaling_rows()
    rows += [
        row | {"mechanism": "soft", "seconds": row["seconds"] * 1.02} for row in rows if row["mechanism"] == "sima"
    ]
    figure = scaling.scaling_figure(rows)
    figure.draw_without_rendering()
    for axes in figure.axes[:2]:
        boxes = [t.get_window_extent() for t in axes.texts]
        assert not [1 for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


def test_bars_show_values_and_chance():
    groups = {
        "one": {"ours": Interval(0.984, 0.976, 0.991), "twin": Interval(0.978)},
        "two": {"ours": Interval(0.5, 0.4, 0.6)},
    }
    figure = bars.bars_figure(groups, chance=0.1)
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.984, 0.978, 0.5]
    said = texts(figure)
    assert {"98.4 % (97.6 to 99.1)", "97.8 %", "chance 10 %", "one", "two"} <= set(said)
    assert "ours: accuracy 98.4 %" in said
    with pytest.raises(InputError, match="at least one model"):
        bars.bars_figure({})


def test_a_grid_shows_every_picture_with_its_title():
    figure = grid.grid_figure(
        [np.zeros((8, 8))] * 7, [f"n {i}" for i in range(7)], columns=3, wrong=[True] + [False] * 6
    )
    assert sum(bool(axes.images) for axes in figure.axes) == 7
    assert len(figure.axes) == 9
    assert {f"n {i}" for i in range(7)} <= set(texts(figure))
    red = [t for t in figure.findobj(matplotlib.text.Text) if t.get_color() == POSITIVE]
    assert [t.get_text() for t in red] == ["n 0"]
    with pytest.raises(InputError, match="2 images, 1 titles"):
        grid.grid_figure([np.zeros((8, 8))] * 2, ["a"])
