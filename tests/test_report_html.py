"""The page of a run: one file that shows everything and fetches nothing, and the facts on it are right."""

import base64
import csv
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image
from runs import TINY, folder_of_pictures, sansmax
from torch import nn

from sansmax.data.loading import Preprocess
from sansmax.engine.config import load_config
from sansmax.engine.predict import Predictor
from sansmax.engine.run import Run
from sansmax.engine.run_facts import multiply_adds, settings_of, worst_errors
from sansmax.report import html as page
from sansmax.report.calibration import calibration_figure, finding, reliability, wilson
from sansmax.report.error_cases import coloured, error_case
from sansmax.report.metrics import measure

NASTY = "<b>&\"'</b>"
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Reader(html.parser.HTMLParser):
    """Tags, attributes and text of a page whose every tag is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)

    @property
    def pictures(self):
        """Kind and bytes of each picture."""
        found = [re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", a["src"]) for tag, a in self.tags if tag == "img"]
        assert all(found)
        return [(m[1], base64.b64decode(m[2], validate=True)) for m in found]


def read(path):
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    reader = Reader(text)
    # nothing is fetched: no address but those of pictures inside, no script, and the browser is told so
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<script|javascript:", re.sub(r"base64,[^\"]+", "", text), re.I)
    assert {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "form"} == set()
    policy = [a["content"] for tag, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    return reader


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one epoch on pictures whose class and file names are hard to write."""
    top = tmp_path_factory.mktemp("page")
    data = folder_of_pictures(top / "data", classes=("benign", "it's <i>&amp;"), count=10)
    said = sansmax("train", data, "--output", top / "run", *TINY, "--image-size", "32", "--quiet")
    assert said == (0, "", ""), said
    return top / "run"


def test_every_text_is_escaped(tmp_path):
    blocks = [
        page.Text(NASTY, strong=NASTY),
        page.Text(NASTY, note=True),
        page.Lines([NASTY]),
        page.Table([NASTY, "n"], [[NASTY, 1234.5], ["a|b", None]], note=NASTY),
        page.Tiles([(NASTY, NASTY, NASTY)]),
        page.Cases([page.Case(NASTY, NASTY, [np.zeros((4, 5), np.uint8)])]),
        page.Code(NASTY, title=NASTY),
    ]
    found = read(page.write_page(tmp_path / "p.html", NASTY, blocks, [(NASTY, blocks), ("left out", [])]))
    assert "left out" not in found.text
    # the title twice, the heading once, and what the blocks hold
    assert found.text.count(NASTY) == 3 + 2 * 14
    assert [a["alt"] for tag, a in found.tags if tag == "img"] == [NASTY] * 2
    assert "a|b" in found.text and "1234" in found.text


def test_small_pictures_are_kept_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    (source, small) = page.picture_source(pixels)
    assert small
    back = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
    assert np.array_equal(np.asarray(back), pixels)
    source, small = page.picture_source(np.zeros((200, 100)))
    assert not small and source.startswith("data:image/jpeg")


def test_the_page_of_a_run_holds_what_the_run_holds(run):
    found = read(run / "report.html")
    opened = Run.open(run)
    inside = [data for kind, data in found.pictures if kind == "png"]
    for name in ("curves.png", "roc.png", "confusion.png", "calibration.png"):
        assert (run / name).read_bytes() in inside, name
    with (run / "predictions_test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = [row for row in rows if row["label"] != row["predicted"]]
    cases = re.findall(r'<div class="case">.*?</p>', (run / "report.html").read_text(), re.S)
    assert len(cases) == len(wrong)
    # the picture, and beside it what speaks for the answer
    assert all(case.count("<img") == 2 for case in cases)
    metrics = measure(
        [opened.classes.index(row["label"]) for row in rows],
        np.array([[float(row[f"probability_{c}"]) for c in opened.classes] for row in rows]),
        opened.classes,
    )
    assert f"{100 * metrics['accuracy'].value:.1f} %" in found.text
    network = opened.load_model()
    for words in (f"{sum(p.numel() for p in network.parameters()):,}", "it's <i>&amp;", "16 of 8 x 8 px (4 x 4)"):
        assert words in found.text, words
    assert opened.info["command"] in found.text and "model.options.depth" in found.text
    with (run / "splits.csv").open(newline="") as file:
        splits = [(row["label"], row["split"]) for row in csv.DictReader(file)]
    for name in opened.classes:
        cells = [str(splits.count((name, split))) for split in ("train", "val", "test")]
        assert re.search(r"\s*".join([re.escape(name), *cells]), found.text), name


def test_the_summary_tells_of_model_and_settings(run):
    text = (run / "summary.md").read_text()
    assert "## Model" in text and "| model.options.depth | 1 |" in text and "calibration.png" in text


# Facts


def test_multiplications_are_those_of_the_layers():
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 5 * 7, 2))
    predictor = Predictor(network, ("a", "b"), Preprocess((5, 7), 3, (0.5,), (0.5,)))
    assert multiply_adds(predictor, (3, 5, 7)) == 5 * 7 * 4 * (3 * 9) + 140 * 2


def test_settings_are_those_that_were_changed():
    assert settings_of(load_config()) == {}
    changed = load_config(None, {"optim.lr": 0.5, "model.options.depth": 3, "model.name": "x -> y"})
    assert settings_of(changed) == {"model.name": "'x -> y'", "model.options.depth": "3", "optim.lr": "0.5"}


def test_the_worst_errors_are_the_surest_ones():
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4], [0.05, 0.95]])
    assert worst_errors(np.array([1, 0, 1, 1, 0]), p).tolist() == [4, 0, 1, 3]


def test_what_speaks_for_the_answer_is_red():
    scores = np.array([[2.0, 0.0], [0.0, -2.0]])
    case = error_case("n", "t", np.full((40, 60), 128, np.uint8), scores)
    plain, shown = case.pictures
    assert shown.shape == plain.shape == (40, 60, 3)
    red = (shown[..., 0] - shown[..., 2])[[10, 10, 30, 30], [15, 45, 15, 45]]
    assert red[0] > 0.2 and abs(red[1]) < 1e-6 and abs(red[2]) < 1e-6 and red[3] < -0.2
    # scores finer than the picture are all there
    fine = np.zeros((8, 8))
    fine[3, 5] = 1
    out = coloured(np.full((4, 4, 3), 0.5, np.float32), fine)
    assert out.shape == (8, 8, 3) and np.argwhere(out[..., 0] - out[..., 2] > 0.1).tolist() == [[3, 5]]


# Calibration


def slow_reliability(labels, probabilities, bins):
    """By the definition: bins open below and closed above, one answer after the other."""
    held = [[] for _ in range(bins)]
    for label, p in zip(labels, probabilities, strict=True):
        confidence = p.max()
        place = next(b for b in range(bins) if confidence <= (b + 1) / bins or b == bins - 1)
        held[place].append((confidence, float(label == p.argmax())))
    filled = [np.mean(answers, axis=0) for answers in held if answers]
    counts = [len(answers) for answers in held if answers]
    error = sum(n * abs(c - a) for n, (c, a) in zip(counts, filled, strict=True)) / len(labels)
    return counts, [c for c, _ in filled], [a for _, a in filled], error


@pytest.mark.parametrize(("n", "k", "bins"), [(200, 3, 15), (7, 2, 4), (1, 5, 15)])
def test_calibration_is_that_of_its_definition(n, k, bins):
    rng = np.random.default_rng(n)
    p = rng.dirichlet(np.ones(k), n)
    y = rng.integers(0, k, n)
    said = reliability(y, p, bins)
    counts, confidence, accuracy, error = slow_reliability(y, p, bins)
    assert said.counts.tolist() == counts
    np.testing.assert_allclose(said.confidence, confidence, rtol=1e-13)
    np.testing.assert_allclose(said.accuracy, accuracy, rtol=1e-13)
    assert said.error == pytest.approx(error, abs=1e-14)
    mean = float(p.max(1).mean() - (p.argmax(1) == y).mean())
    assert said.excess == pytest.approx(mean, abs=1e-14)


def test_the_page_and_the_table_give_one_calibration_error():
    rng = np.random.default_rng(1)
    p, y = rng.dirichlet(np.ones(4), 150), rng.integers(0, 4, 150)
    found = measure(y, p, "abcd", resamples=20)["calibration_error"].value
    assert reliability(y, p).error == pytest.approx(found, abs=1e-14)


def test_calibration_where_all_is_one():
    sure = np.array([[1.0, 0.0]] * 3)
    said = reliability(np.zeros(3, int), sure)
    assert (said.counts.tolist(), said.confidence.tolist(), said.accuracy.tolist()) == ([3], [1.0], [1.0])
    assert said.error == 0 and finding(said) == "On the whole as right as it says"
    wrong = reliability(np.ones(3, int), sure)
    assert wrong.error == 1 and finding(wrong) == "Right less often than it says, by 100.0 %"
    # closed above: one third is of the fifth of 15 bins, with what is just below it
    edge = reliability(np.array([0, 0]), np.array([[1 / 3, 1 / 3, 1 / 3], [0.34, 0.33, 0.33]]))
    assert edge.counts.tolist() == [1, 1]
    figure = calibration_figure(np.zeros(3, int), sure, ("a", "b"))
    assert figure.axes[0].get_ylabel() == "accuracy"


def test_the_intervals_are_wilsons():
    from scipy.stats import binomtest

    for hits, n in ((0, 1), (3, 3), (2, 7), (40, 41)):
        low, high = wilson(np.array([hits]), np.array([n]))
        slow = binomtest(hits, n).proportion_ci(method="wilson")
        assert (low[0], high[0]) == pytest.approx((slow.low, slow.high), abs=1e-12)
