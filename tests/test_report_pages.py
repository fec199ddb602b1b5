"""Tables and pages: what is written can be read again, and a failure on the way leaves the old file."""

import csv
import json
import os

import numpy as np
import pytest

from sansmax import files
from sansmax.errors import InputError
from sansmax.report import tables
from sansmax.report.metrics import Interval, measure
from sansmax.report.style import new_figure, save
from sansmax.report.summary import interval_text, run_summary, table, write_summary


def test_rows_come_back_as_they_were(tmp_path):
    path = tmp_path / "metrics.csv"
    tables.append_row(path, {"epoch": 1, "step": 30, "train_loss": 0.1 + 0.2, "val_auc": float("nan")})
    tables.append_row(path, {"step": 60, "epoch": 2, "lr": np.float32(0.001), "val_loss": None})
    first, second = tables.read_rows(path)
    assert first["train_loss"] == 0.1 + 0.2
    assert first["val_auc"] is None
    assert (second["epoch"], second["step"]) == (2, 60)
    assert isinstance(second["step"], int)
    assert second["lr"] == float(np.float32(0.001))
    assert path.read_text().splitlines()[0] == ",".join(tables.COLUMNS)


def test_the_header_is_stable(tmp_path):
    path = tmp_path / "metrics.csv"
    tables.append_row(path, {"epoch": 1})
    with pytest.raises(InputError, match=r"train_los.*did you mean 'train_loss'"):
        tables.append_row(path, {"train_los": 1.0})
    assert len(tables.read_rows(path)) == 1


def test_resuming_drops_the_rows_after_the_step(tmp_path):
    path = tmp_path / "metrics.csv"
    assert tables.truncate_rows(path, 10) == []
    for step in (10, 20, 30):
        tables.append_row(path, {"step": step})
    assert [row["step"] for row in tables.truncate_rows(path, 20)] == [10, 20]
    assert [row["step"] for row in tables.read_rows(path)] == [10, 20]
    tables.append_row(path, {"step": 25})
    assert [row["step"] for row in tables.read_rows(path)] == [10, 20, 25]


@pytest.mark.parametrize("broken", ["replace", "fsync", "write"])
def test_a_failure_half_way_leaves_the_old_table(tmp_path, monkeypatch, broken):
    path = tmp_path / "metrics.csv"
    tables.append_row(path, {"step": 1})
    before = path.read_bytes()

    def fail(*_args, **_kwargs):
        raise OSError("no space left")

    if broken == "replace":
        monkeypatch.setattr(files.Path, "replace", fail)
    elif broken == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(files.Path, "write_text", lambda self, text, **_: (self.write_bytes(b"half a l"), fail()))
    with pytest.raises(OSError, match="no space"):
        tables.append_row(path, {"step": 2})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.csv"]


def test_the_new_table_is_on_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    done = []
    synced, moved = os.fsync, files.Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("sync"), synced(fd))[1])
    monkeypatch.setattr(files.Path, "replace", lambda self, to: (done.append("move"), moved(self, to))[1])
    tables.append_row(tmp_path / "metrics.csv", {"step": 1})
    # and the name before it is said to be written
    assert done == ["sync", "move", "sync"]


def test_a_figure_that_fails_leaves_the_old_picture(tmp_path, monkeypatch):
    path = save(new_figure(1, 1, "a"), tmp_path / "a.png")
    before = path.read_bytes()
    figure = new_figure(1, 1, "b")
    monkeypatch.setattr(figure, "savefig", lambda *_a, **_k: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        save(figure, path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_torn_table_is_refused_with_its_line(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step\n1,10\n2")
    with pytest.raises(InputError, match="line 3: 1 cells"):
        tables.read_rows(path)
    path.write_text("")
    with pytest.raises(InputError, match="is empty"):
        tables.read_rows(path)


def test_predictions_are_written_as_csv_and_json(tmp_path):
    p = np.array([[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]])
    names = ['a, "first".png', "b.png", "c.png"]
    table_path, json_path = tables.write_predictions(
        tmp_path / "predictions.csv", names, [1, None, 0], p, ["no", "yes"]
    )
    with table_path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "label", "predicted", "probability_no", "probability_yes"]
    assert [r["name"] for r in rows] == names
    assert [r["label"] for r in rows] == ["yes", "", "no"]
    assert [r["predicted"] for r in rows] == ["yes", "no", "no"]
    assert float(rows[0]["probability_yes"]) == 0.75
    plain = json.loads(json_path.read_text())
    assert plain["classes"] == ["no", "yes"]
    assert plain["predictions"][1] == {
        "name": "b.png",
        "label": None,
        "predicted": "no",
        "probabilities": {"no": 0.9, "yes": 0.1},
    }
    with pytest.raises(InputError, match=r"shape \(2, 2\)"):
        tables.write_predictions(tmp_path / "x.csv", names[:2], None, p, ["no", "yes"])


def test_intervals_are_words():
    assert interval_text(Interval(0.984, 0.976, 0.991)) == "98.4 % (97.6 to 99.1)"
    assert interval_text(Interval(0.984, 0.976, 0.991), percent=False) == "0.984 (0.976 to 0.991)"
    assert interval_text(Interval(0.5)) == "50.0 %"
    assert interval_text(Interval(float("nan"), note="why")) == "not defined"


def test_tables_align_numbers_and_survive_bars():
    lines = table(["name", "images"], [["a|b", 1234], ["c\nd", 5]]).splitlines()
    assert lines == ["| name | images |", "| --- | ---: |", "| a\\|b | 1,234 |", "| c d | 5 |"]


def test_a_page_has_its_sections_in_order(tmp_path):
    path = write_summary(tmp_path / "s.md", "Run", [("", "first"), ("Empty", " "), ("Second", "text")])
    assert path.read_text() == "# Run\n\nfirst\n\n## Second\n\ntext\n"


def test_the_summary_of_a_run_holds_its_numbers(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 60)
    p = np.where(np.eye(2)[y] == 1, 0.8, 0.2)
    p[:9] = p[:9, ::-1]
    metrics = measure(y, p, ["benign", "malignant"], [f"p{i // 2}" for i in range(60)], resamples=100)
    twin = measure(y, p[:, ::-1], ["benign", "malignant"], resamples=100)
    path = run_summary(
        tmp_path / "summary.md",
        title="sima on moles",
        command="sansmax train moles/ --seed 3",
        data_lines=["train: 200 images of 100 patients"],
        model_name="sima_tiny",
        parameters=1_234_567,
        cost={"time": "3 min", "peak memory": "512 MiB"},
        metrics=metrics,
        others={"softmax twin": twin},
        figures=[("Learning curves", "figures/learning curves.png")],
        notes=["stopped early"],
        environment={"sansmax": "0.1.0", "seed": 3},
    )
    text = path.read_text()
    assert "**sima_tiny** (1.2 million parameters) reaches" in text
    assert f"accuracy {interval_text(metrics['accuracy'])}" in text
    assert "85.0 %" in text
    assert "on 60 test images of 30 patients" in text
    assert "100 resamples of the test patients" in text
    assert "|  | sima_tiny | softmax twin |" in text
    assert interval_text(twin["accuracy"]) in text
    assert interval_text(metrics.classes[1].recall) in text
    assert "![Learning curves](figures/learning%20curves.png)" in text
    for part in (
        "sansmax train moles/ --seed 3",
        "stopped early",
        "512 MiB",
        "- seed: 3",
        "research use",
        "100 patients",
    ):
        assert part in text
