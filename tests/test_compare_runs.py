"""Runs side by side: differences and tests are what their definitions say, and only like is compared with like."""

import csv
import itertools

import numpy as np
import pytest
from runs import MODEL, refused, sansmax, tiny

from sansmax.engine.build import build_model, build_preprocess
from sansmax.engine.compare_runs import compare_runs
from sansmax.engine.run import save_weights, write_json, write_start
from sansmax.errors import InputError
from sansmax.report.case_predictions import CasePredictions, write_case_predictions
from sansmax.report.delong import delong_test
from sansmax.report.paired import compare_models, holm, mcnemar_test
from sansmax.report.resample import draw_weights
from sansmax.report.tables import append_row, write_predictions

CLASSES = ("benign", "malig|nant <b>")
LABELS = np.random.default_rng(5).integers(0, 2, 61)


def answers(seed, strength=1.0):
    """Probabilities that know the labels as well as `strength` says."""
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-strength * (2 * LABELS - 1) - rng.normal(size=len(LABELS))))
    return np.column_stack([1 - p, p])


def make_run(folder, probabilities, labels=LABELS, classes=CLASSES, order=None, groups=None):
    """The folder that a run leaves, without the training."""
    folder.mkdir(parents=True)
    config = tiny()
    network = build_model(config.model, config.data, len(classes), 1)
    write_start(folder, config, classes, build_preprocess(network, config.data, 1), "sansmax train")
    save_weights(network, folder / "model.safetensors")
    names = np.array([f"i{i:02}.png" for i in range(len(labels))])
    rows = np.arange(len(labels)) if order is None else order
    write_predictions(folder / "predictions_test.csv", names[rows], labels[rows], probabilities[rows], classes)
    with (folder / "splits.csv").open("w", newline="") as file:
        patients = [""] * len(names) if groups is None else groups
        rows = [(name, "", patient, "test") for name, patient in zip(names, patients, strict=True)]
        csv.writer(file).writerows([("name", "label", "group", "split"), *rows])
    for epoch in (1, 2):
        loss = {"train_loss": 1 / epoch, "val_loss": 1.5 / epoch, "val_accuracy": 0.5, "val_auc": 0.5 + 0.1 * epoch}
        clock = {"seconds": 30.0 * epoch, "images_per_second": 100.0}
        append_row(folder / "metrics.csv", {"epoch": epoch, "step": 4 * epoch, "lr": 1e-3, **loss, **clock})
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs on the same images: one that knows little, one that knows more, and the first again."""
    top = tmp_path_factory.mktemp("compared")
    return [
        make_run(top / "weak", answers(1, 0.4)),
        make_run(top / "strong", answers(2, 2.0)),
        make_run(top / "again", answers(1, 0.4), order=np.random.default_rng(0).permutation(len(LABELS))),
    ]


@pytest.fixture(scope="module")
def found(runs, tmp_path_factory):
    """Their comparison, and where it was written."""
    folder = tmp_path_factory.mktemp("comparison") / "out"
    return compare_runs(runs, folder), folder


# The tests


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (3, 3), (5, 1), (0, 7), (2, 8)])
def test_mcnemar_counts_every_way_that_chance_could_share_the_images(only_a, only_b):
    right_a = np.array([True] * only_a + [False] * only_b + [True, False])
    right_b = np.array([False] * only_a + [True] * only_b + [True, False])
    said = mcnemar_test(right_a, right_b)
    assert (said.only_a, said.only_b) == (only_a, only_b)
    n, uneven = only_a + only_b, abs(only_a - only_b)
    ways = [abs(2 * sum(way) - n) >= uneven for way in itertools.product((0, 1), repeat=n)]
    assert said.p == pytest.approx(np.mean(ways), rel=1e-12)
    assert mcnemar_test(right_b, right_a).p == said.p


def test_mcnemar_needs_the_same_images():
    with pytest.raises(InputError, match="needs the same images"):
        mcnemar_test(np.ones(3, bool), np.ones(1, bool))


def test_holm_steps_down():
    p = [0.01, 0.04, 0.03, 0.005, 0.9]
    # the definition: the k-th smallest is multiplied by how many are not smaller, and never falls below one before it
    slow = []
    for value in p:
        before = sorted(p)[: sorted(p).index(value) + 1]
        slow.append(min(1.0, max((len(p) - k) * q for k, q in enumerate(before))))
    assert holm(p) == pytest.approx(slow, rel=1e-14)
    assert holm(p)[:4] == pytest.approx([0.04, 0.09, 0.09, 0.025])
    assert holm([]) == [] and holm([0.2]) == [0.2]


def test_differences_and_intervals_are_those_of_images_drawn_again():
    a, b = answers(1, 0.4), answers(2, 2.0)
    (pair,), notes = compare_models(LABELS, [a, b], CLASSES, resamples=300, seed=7)
    assert notes == []
    (weights,) = draw_weights(np.arange(len(LABELS)), 300, 7, 300)
    slow = []
    for column in weights.T:
        drawn = np.repeat(np.arange(len(LABELS)), column.astype(int))
        right = [(p[drawn].argmax(1) == LABELS[drawn]).mean() for p in (a, b)]
        slow.append(right[1] - right[0])
    gap = pair.differences["accuracy"]
    assert gap.value == pytest.approx((b.argmax(1) == LABELS).mean() - (a.argmax(1) == LABELS).mean(), abs=1e-14)
    assert (gap.low, gap.high) == pytest.approx(tuple(np.percentile(slow, [2.5, 97.5])), abs=1e-13)


def test_the_tests_stand_beside_the_differences():
    models = [answers(1, 0.4), answers(2, 2.0), answers(3, 0.5)]
    pairs, _ = compare_models(LABELS, models, CLASSES, resamples=200)
    right = [p.argmax(1) == LABELS for p in models]
    tests = [delong_test(LABELS == 1, p[:, 1], models[0][:, 1]) for p in models[1:]]
    assert [pair.delong[CLASSES[1]] for pair in pairs] == tests
    assert [pair.mcnemar for pair in pairs] == [mcnemar_test(r, right[0]) for r in right[1:]]
    assert [pair.mcnemar_adjusted for pair in pairs] == holm([pair.mcnemar.p for pair in pairs])
    assert [pair.delong_adjusted[CLASSES[1]] for pair in pairs] == holm([test.p for test in tests])


def test_patients_with_several_images_are_drawn_whole_and_not_tested_as_independent():
    patients = [f"p{i // 6}" for i in range(len(LABELS))]
    models = [answers(1, 0.4), answers(2, 2.0)]
    (pair,), notes = compare_models(LABELS, models, CLASSES, patients, resamples=200)
    assert pair.mcnemar is None and pair.delong == {} and len(notes) == 1 and "patients have several" in notes[0]
    (alone,), _ = compare_models(LABELS, models, CLASSES, [f"p{i}" for i in range(len(LABELS))], resamples=200)
    assert alone.mcnemar is not None
    # the images of one patient twice over tell nothing new
    twice = np.concatenate([LABELS, LABELS])
    groups = [f"p{i}" for i in range(len(LABELS))] * 2
    doubled = [np.concatenate([p, p]) for p in models]
    (same,), _ = compare_models(twice, doubled, CLASSES, groups, resamples=200)
    assert same.differences["accuracy"].low == pytest.approx(alone.differences["accuracy"].low, abs=1e-12)


# The comparison of runs


def test_a_run_compared_with_itself_does_not_differ(found):
    pair = found[0].pairs["again"]
    assert all((d.value, d.low, d.high) == (0, 0, 0) for d in pair.differences.values())
    assert pair.mcnemar.p == pair.delong[CLASSES[1]].p == 1


def test_a_better_run_is_found_better(found):
    pair = found[0].pairs["strong"]
    assert pair.differences["auc"].low > 0 and pair.mcnemar_adjusted < 0.05
    assert list(found[0].metrics) == ["weak", "strong", "again"]


def test_the_order_of_rows_and_of_classes_changes_nothing(runs, found, tmp_path):
    order = np.random.default_rng(3).permutation(len(LABELS))
    mixed = make_run(tmp_path / "strong", answers(2, 2.0), order=order)
    flipped = make_run(tmp_path / "again", answers(1, 0.4)[:, ::-1], 1 - LABELS, CLASSES[::-1])
    said = compare_runs([runs[0], mixed, flipped], tmp_path / "out")
    assert said.pairs == found[0].pairs
    for name in ("compare.csv", "compare.md", "compare.html", "compare_curves.png"):
        assert (tmp_path / "out" / name).read_bytes() == (found[1] / name).read_bytes(), name


def test_what_is_written_says_the_same_everywhere(found):
    facts, folder = found
    with (folder / "compare.csv").open(newline="") as file:
        rows = {(row["run"], row["score"]): row for row in csv.DictReader(file)}
    for run, metrics in facts.metrics.items():
        for score, value in metrics.items():
            assert float(rows[run, score]["value"]) == value.value
    pair, row = facts.pairs["strong"], rows["strong", "accuracy"]
    assert [float(row[k]) for k in ("difference", "difference_low", "p_mcnemar", "p_mcnemar_holm")] == [
        *(pair.differences["accuracy"].value, pair.differences["accuracy"].low, pair.mcnemar.p, pair.mcnemar_adjusted)
    ]
    assert rows["weak", "accuracy"]["difference"] == rows["strong", "auc"]["p_mcnemar"] == ""
    gap = f"{100 * pair.differences['accuracy'].value:+.1f} points"
    for text in (facts.text(), *((folder / name).read_text() for name in ("compare.md", "compare.html"))):
        assert gap in text and "1 min 0 s" in text and f"{pair.mcnemar.p:.3g}" in text
    assert "malig|nant <b>" in facts.text() and "malig\\|nant <b>" in (folder / "compare.md").read_text()
    assert "malig|nant &lt;b&gt;" in (folder / "compare.html").read_text()


def test_the_verb_prints_the_tables(runs, tmp_path):
    said = sansmax("compare", runs[0], runs[1], "--output", tmp_path / "out", "--quiet")
    assert said.status == 0 and said.err == ""
    assert "2 runs on the same 61 test images" in said.out and "McNemar" in said.out and MODEL in said.out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        *("compare.csv", "compare.html", "compare.md", "compare_curves.png", "compare_differences.png")
    ]


def test_runs_on_bags_are_compared_case_by_case(tmp_path):
    ids, names = tuple(f"c{i:02}" for i in range(len(LABELS))), ("benign", "tumour")
    folders = [tmp_path / name for name in ("one", "two", "three")]
    models = [answers(1, 0.4), answers(2, 2.0), answers(3, 0.5)]
    for folder, p in zip(folders, models, strict=True):
        folder.mkdir()
        (folder / "config.yaml").touch()
        write_json(folder / "run.json", {"kind": "bags", "task": "classification", "target": ["y"], "classes": names})
        zeros = np.zeros(len(ids), int)
        preds = CasePredictions("classification", ("y",), names, ids, LABELS, p, zeros)
        write_case_predictions(folder / "patient-preds.csv", preds)
    said = sansmax("compare", *folders, "--output", tmp_path / "out")
    assert said.status == 0, said
    tests = [delong_test(LABELS == 1, p[:, 1], models[0][:, 1]) for p in models[1:]]
    cells = [f"{test.p:.3g} ({p:.3g})" for test, p in zip(tests, holm([test.p for test in tests]), strict=True)]
    assert f"| AUROC of tumour, DeLong p | {cells[0]} | {cells[1]} |" in (tmp_path / "out" / "compare.md").read_text()
    with (tmp_path / "out" / "compare.csv").open(newline="") as file:
        rows = {(row["run"], row["score"]): float(row["difference"]) for row in csv.DictReader(file)}
    for folder, test in zip(folders[1:], tests, strict=True):
        assert rows[str(folder), "auc"] == pytest.approx(test.difference.value, abs=1e-12)


def test_patients_are_those_that_the_run_was_split_by(runs, tmp_path):
    groups = [f"p{i // 6}" for i in range(len(LABELS))]
    first = make_run(tmp_path / "first", answers(1, 0.4), groups=groups)
    said = compare_runs([first, runs[1]], tmp_path / "out", resamples=200)
    pairs, notes = compare_models(LABELS, [answers(1, 0.4), answers(2, 2.0)], CLASSES, groups, resamples=200)
    assert said.patients == 11 and [*said.pairs.values()] == pairs and said.notes == notes
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "61 test images of 11 patients" in page and notes[0] in page and "Tests against" not in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": 1 - LABELS}, "61 images have another label in other than in weak: i00.png, i01.png"),
        ({"labels": LABELS[:50]}, "11 are in weak alone (i50.png, i51.png, i52.png and 8 more), 0 in other alone"),
        ({"classes": ("benign", "healthy")}, "different classes: benign, malig|nant <b> in weak, benign, healthy in"),
    ],
)
def test_what_is_not_alike_is_refused(runs, tmp_path, change, words):
    labels = change.get("labels", LABELS)
    other = make_run(tmp_path / "other", answers(2)[: len(labels)], **{"labels": labels, **change})
    assert words in refused("compare", runs[0], other, "--output", tmp_path / "out", "--quiet")
    assert not (tmp_path / "out").exists()


def test_wrong_calls_say_what_to_do(runs, tmp_path):
    out = ("--output", tmp_path / "out")
    assert "needs two runs or more" in refused("compare", runs[0], *out)
    assert "each run is to be given once" in refused("compare", runs[0], runs[1], runs[0], *out)
    assert "--split must be test or val, got 'train'" in refused("compare", *runs, *out, "--split", "train")
    assert "predictions_val.csv is not there" in refused("compare", *runs, *out, "--split", "val")
    bags = tmp_path / "bags"
    bags.mkdir()
    write_json(bags / "cross_validation.json", {})
    assert "compare like with like" in refused("compare", runs[0], bags, *out)
    with (runs[1] / "predictions_test.csv").open() as file:
        text = file.read()
    broken = make_run(tmp_path / "broken", answers(2))
    (broken / "predictions_test.csv").write_text(text[:-20])
    assert "is damaged" in refused("compare", runs[0], broken, *out)
    (broken / "predictions_test.csv").write_text(text.replace("i01.png", "i00.png"))
    assert "images of one name, which cannot be told apart: i00.png" in refused("compare", broken, runs[0], *out)
