"""The demo in short: every file it promises, figures that agree, and only what is missing done again."""

import contextlib
import io
import json
import re
import shutil
import subprocess

import pytest
from runs import sansmax

from sansmax.engine import demo, scaling
from sansmax.engine.demo import Plan, run_demo
from sansmax.engine.run import Run
from sansmax.report.metrics import Metrics
from sansmax.report.summary import score_text

IN_CHILD = scaling._in_child


def measured_here(case):
    """What a process of its own would print, without its start."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        scaling._measure({**case, "threads": None})
    return [json.loads(line) for line in said.getvalue().splitlines()]


@pytest.fixture(scope="module")
def short():
    """A demo that is short even for a test."""
    patched = pytest.MonkeyPatch()
    patched.setattr(scaling, "_in_child", measured_here)
    quick = Plan(40, 20, 20, 1, 2, 24, 3, (64, 128), 1.0)
    patched.setattr(Plan, "quick", classmethod(lambda cls: quick))
    yield quick
    patched.undo()


@pytest.fixture(scope="module")
def done(short, tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "run", quick=True)


FILES = {
    *("demo.json", "summary.md", "model.safetensors", "metrics.csv", "curves.png", "roc.png", "confusion.png"),
    *("accuracy.png", "examples.png", "heatmap.png", "heatmap_large.png", "scaling.png"),
}


def test_every_file_is_there_and_shown(done):
    assert {p.name for p in done.iterdir()} >= FILES
    for name in ("softmax_twin", "reduced"):
        assert Run.open(done / name).info["state"] == "finished"
    summary = (done / "summary.md").read_text()
    shown = re.findall(r"!\[.*?\]\((.*?)\)", summary)
    assert set(shown) >= {"examples.png", "accuracy.png", "heatmap.png", "heatmap_large.png", "scaling.png"}
    assert all((done / name).read_bytes().startswith(b"\x89PNG") for name in shown)


def test_the_networks_differ_in_what_they_are_compared_by(done):
    whole, twin, reduced = (Run.open(done / name).config for name in (".", "softmax_twin", "reduced"))
    assert twin.model.options == {**whole.model.options, "attention": "softmax"}
    assert reduced.model == whole.model
    assert twin.augment == reduced.augment == whole.augment
    assert twin.data == whole.data and twin.optim == whole.optim and twin.seed == whole.seed
    assert (whole.data.image_size, reduced.data.image_size) == (128, 32)


def test_the_page_says_what_the_file_of_figures_says(done, short):
    record = json.loads((done / "demo.json").read_text())
    summary = (done / "summary.md").read_text()
    assert set(record["metrics"]) == {"sequence norm", "softmax twin", "logistic regression", "reduced to 32 px"}
    for name, plain in record["metrics"].items():
        measured = Metrics.from_dict(plain)
        assert measured.images == short.test
        line = next(text for text in summary.splitlines() if text.startswith(f"| {name} |"))
        for score in ("accuracy", "auc", "log_loss"):
            assert score_text(score, measured[score]) in line, (name, score)
    assert f"**{record['pointing_auc']:.3f}**" in summary
    assert len(record["large"]) == short.large
    right = sum(a["label"] == a["predicted"] for a in record["large"])
    assert re.search(rf"\b{right} of (the )?{short.large}\b", summary)
    for row in record["scaling"]:
        assert f"{row['image_px']:,} px" in summary
        assert row["reason"] or f"{row['seconds']:.3f} s" in summary
    assert {r["mechanism"] for r in record["scaling"]} == set(scaling.MECHANISMS.values())
    assert {r["tokens"] for r in record["scaling"]} == {64, 256}


@pytest.mark.slow
def test_only_what_is_missing_is_done_again(done, short, tmp_path, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(done, copy)
    before = json.loads((copy / "demo.json").read_text())
    (copy / "demo.json").unlink()
    shutil.rmtree(copy / "reduced")
    trained = []
    original = demo.train
    monkeypatch.setattr(
        demo, "train", lambda config, folder, **how: trained.append(folder) or original(config, folder, **how)
    )
    # its figures are times, which nothing has to repeat
    monkeypatch.setattr(demo, "measure_scaling", lambda *args, **how: before["scaling"])
    said = sansmax("demo", "--output", copy, "--quick", "--resume", "--quiet")
    assert said == (0, "", ""), said
    assert trained == [copy / "reduced"]
    after = json.loads((copy / "demo.json").read_text())
    for part in ("metrics", "accuracy_differences", "pointing_auc", "plan"):
        assert after[part] == before[part], part
    assert [a["predicted"] for a in after["large"]] == [a["predicted"] for a in before["large"]]


def test_another_run_in_the_folder_is_kept(done, short):
    before = (done / "summary.md").read_bytes()
    said = sansmax("demo", "--output", done, "--quick")
    assert said.status == 2 and "holds another run" in said.err
    assert (done / "summary.md").read_bytes() == before


@pytest.mark.slow
def test_cost_is_measured_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(scaling, "_in_child", IN_CHILD)
    rows = scaling.measure_scaling(demo.MODEL, (32, 64), mechanisms=("seqnorm",), options={"depth": 1}, threads=1)
    assert [(r["image_px"], r["tokens"], r["mechanism"]) for r in rows] == [
        (32, 16, "sequence norm"),
        (64, 64, "sequence norm"),
    ]
    assert all(0 < r["seconds"] < 10 and r["peak_mib"] >= 0 and r["reason"] is None for r in rows)


def test_a_size_that_would_take_too_long_is_left_out_with_the_reason():
    case = {"model": demo.MODEL, "options": {"depth": 1}, "mechanism": "softmax", "sizes": [32, 64, 128]}
    first, second = measured_here({**case, "budget_seconds": 1e-9})
    assert first["seconds"] > 0
    assert second["seconds"] is None and second["reason"].startswith("would take about ")


def test_a_process_that_the_system_ended_is_told_from_one_that_failed(monkeypatch):
    def ended(code):
        row = json.dumps({"tokens": 16, "image_px": 32, "seconds": 1.0, "peak_mib": 1.0, "reason": None})
        monkeypatch.setattr(
            scaling.subprocess,
            "run",
            lambda *a, **k: subprocess.CompletedProcess(a, code, stdout=row + "\n", stderr="no such model"),
        )
        return IN_CHILD({"mechanism": "softmax", "sizes": [32, 64]})

    assert ended(-9)[1] == {
        "tokens": 64,
        "image_px": 64,
        "seconds": None,
        "peak_mib": None,
        "reason": "ended by the system (SIGKILL), probably for want of memory",
    }
    with pytest.raises(RuntimeError, match="measuring softmax failed:\nno such model"):
        ended(1)
