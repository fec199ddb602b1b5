"""Folders and tables: what is found, how it is split, and what every mistake is answered with."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sansmax.data.open import open_data
from sansmax.data.sets import ImageSet
from sansmax.errors import InputError

REAL = Path(os.environ.get("SANSMAX_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


def picture(path, value=0, colour=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 6, 3) if colour else (4, 6), value, np.uint8)
    pixels.flat[0] = 255 - value
    Image.fromarray(pixels).save(path)


def folder_of(root, classes=("cat", "dog"), n=10, suffix="png"):
    for k, name in enumerate(classes):
        for i in range(n):
            picture(root / name / f"{i:02}.{suffix}", 10 * k + i)
    return root


def table_of(path, rows, header="file,label", separator=",", encoding="utf-8"):
    lines = [header] + [separator.join(map(str, row)) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


@pytest.fixture
def images(tmp_path):
    for i in range(20):
        picture(tmp_path / f"{i:03}.png", i)
    return tmp_path


ROWS = [(f"{i:03}.png", "ab"[i % 2]) for i in range(20)]


def names(images: ImageSet | None) -> set[str]:
    assert images is not None
    return set(images.names)


# folders


def test_a_folder_of_classes_is_split_by_class(tmp_path):
    data = open_data(folder_of(tmp_path))
    assert data.classes == ("cat", "dog")
    assert not data.explicit_split
    assert not data.colour
    assert {s: len(x) for s, x in data.splits().items()} == {"train": 12, "val": 4, "test": 4}
    train = data.splits()["train"]
    for i, name in enumerate(train.names):
        assert data.classes[train.labels[i]] == name.split("/")[0]
        assert train.read(i)[1, 1] == 10 * train.labels[i] + int(name[4:6])


def test_folders_for_splits_are_kept(tmp_path):
    for split in ("train", "valid", "test"):
        folder_of(tmp_path / split)
    data = open_data(tmp_path)
    assert data.explicit_split
    assert names(data.val) == {f"valid/{c}/{i:02}.png" for c in ("cat", "dog") for i in range(10)}
    assert len(names(data.train)) == 20


def test_val_is_drawn_from_train_where_there_is_none(tmp_path):
    folder_of(tmp_path / "train", n=20)
    folder_of(tmp_path / "test", n=3)
    data = open_data(tmp_path, val_fraction=0.1)
    assert data.explicit_split
    assert len(names(data.val)) == 4
    assert not names(data.val) & names(data.train)
    assert all(name.startswith("train/") for name in names(data.val))
    assert "val drawn from train (10%)" in data.describe()
    assert open_data(tmp_path, val_fraction=0).val is None


def test_nested_and_hidden_files(tmp_path):
    folder_of(tmp_path)
    picture(tmp_path / "cat" / "deep" / "er" / "a.PNG")
    picture(tmp_path / "cat" / ".hidden.png")
    picture(tmp_path / "cat" / ".thumbs" / "b.png")
    picture(tmp_path / ".git" / "b.png")
    (tmp_path / "cat" / "notes.txt").write_text("x")
    data = open_data(tmp_path)
    everything = names(data.train) | names(data.val) | names(data.test)
    assert len(everything) == 21
    assert "cat/deep/er/a.PNG" in everything


def test_whole_number_classes_are_sorted_as_numbers(tmp_path):
    assert open_data(folder_of(tmp_path, ("10", "9", "1"))).classes == ("1", "9", "10")


def test_colour_is_found_wherever_it_is(tmp_path):
    picture(folder_of(tmp_path) / "dog" / "zz.png", colour=True)
    assert open_data(tmp_path).colour
    assert open_data(tmp_path, check=False).colour


def test_the_set_can_be_all_test(tmp_path):
    data = open_data(folder_of(tmp_path), val_fraction=0, test_fraction=1, classes=("cow", "dog", "cat"))
    assert data.train is None
    assert len(names(data.test)) == 20
    assert data.counts()["test"].tolist() == [0, 10, 10]
    with pytest.raises(InputError, match=r"none of the classes: dog .*; the classes are cat, cow"):
        open_data(tmp_path, classes=("cat", "cow"))


def test_mistakes_in_folders(tmp_path):
    (folder_of(tmp_path / "a") / "cow").mkdir()
    with pytest.raises(InputError, match=r"class folder .*cow has no image; remove it"):
        open_data(tmp_path / "a")
    (tmp_path / "a" / "cow" / "x.mha").write_text("x")
    with pytest.raises(InputError, match=r"it holds \.mha"):
        open_data(tmp_path / "a")
    with pytest.raises(InputError, match="one class, cat"):
        open_data(folder_of(tmp_path / "b", ("cat",)))
    picture(tmp_path / "c" / "0.png")
    with pytest.raises(InputError, match="has no class folders: a folder of images has one sub-folder per class"):
        open_data(tmp_path / "c")
    (tmp_path / "c" / "labels.csv").write_text("x")
    with pytest.raises(InputError, match=r"if .*labels\.csv lists the images, give that file"):
        open_data(tmp_path / "c")
    folder_of(tmp_path / "d" / "train")
    folder_of(tmp_path / "d" / "test", ("cat", "dog", "eel"), 2)
    with pytest.raises(InputError, match="classes in test that train has not: eel"):
        open_data(tmp_path / "d")
    for name in ("train", "val", "valid"):
        folder_of(tmp_path / "e" / name, n=2)
    with pytest.raises(InputError, match="several folders for val: val, valid"):
        open_data(tmp_path / "e")


def test_an_unknown_source_is_answered_with_what_is_allowed(tmp_path):
    (tmp_path / "fundus").mkdir()
    with pytest.raises(InputError, match=r"did you mean '.*fundus'\? Allowed are a folder with .* medmnist:NAME"):
        open_data(tmp_path / "fundsu")
    (tmp_path / "x.xlsx").write_text("x")
    with pytest.raises(InputError, match=r"x\.xlsx is a file of a kind that holds no data set"):
        open_data(tmp_path / "x.xlsx")
    with pytest.raises(InputError, match="does not exist either"):
        open_data(tmp_path / "no" / "where")
    with pytest.raises(InputError, match="--label-column is for tables"):
        open_data(folder_of(tmp_path / "f"), label_column="x")
    with pytest.raises(InputError, match=r"0\.8 and 0\.3 were given"):
        open_data(tmp_path / "f", val_fraction=0.8, test_fraction=0.3)


# bad images


def test_a_bad_image_stops_or_is_left_out(tmp_path):
    folder_of(tmp_path)
    (tmp_path / "cat" / "03.png").write_bytes(b"")
    (tmp_path / "dog" / "05.png").write_bytes((tmp_path / "dog" / "04.png").read_bytes()[:50])
    with pytest.raises(InputError, match=r"(?s)2 of 20 images .*cat/03\.png: the file is empty.*--skip-bad"):
        open_data(tmp_path)
    data = open_data(tmp_path, skip_bad=True)
    assert [b.name for b in data.bad] == ["cat/03.png", "dog/05.png"]
    assert "empty" in data.bad[0].reason
    assert sum(len(x) for x in data.splits().values()) == 18
    assert "left out: 2 images" in data.describe()
    for i in range(10):
        (tmp_path / "cat" / f"{i:02}.png").write_bytes(b"")
    with pytest.raises(InputError, match="no image of the class cat"):
        open_data(tmp_path, skip_bad=True)


def test_progress_counts_every_image(tmp_path):
    seen = []
    open_data(folder_of(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 20) for i in range(20)]


# tables


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_is_read_whatever_its_separator(images, separator, encoding):
    rows = [(f"{i:03}.png", "äb"[i % 2]) for i in range(20)]
    path = table_of(images / "t.csv", rows, f"Image Path{separator}Diagnosis", separator, encoding)
    data = open_data(path)
    assert data.classes == ("b", "ä")
    train = data.splits()["train"]
    assert all((int(n[:3]) % 2 == 1) == (k == 0) for n, k in zip(train.names, train.labels, strict=True))


def test_splits_and_groups_of_a_table_are_kept(images):
    rows = [(*row, ["Training", "VAL", "test", "train"][i // 5], f"{i // 2:03}") for i, row in enumerate(ROWS)]
    rows = [(*r[:3], f"{i // 5:03}") for i, r in enumerate(rows)]
    data = open_data(table_of(images / "t.csv", rows, "file,label,SPLIT,PATIENT"))
    assert data.explicit_split
    assert names(data.val) == {f"{i:03}.png" for i in range(5, 10)}
    assert data.test is not None
    assert data.test.groups == ["002"] * 5


def test_groups_of_a_table_are_drawn_whole(images):
    rows = [(*row, f"{i // 2:03}") for i, row in enumerate(ROWS)]
    data = open_data(table_of(images / "t.csv", rows, "file,label,patient_id"))
    seen = [set(x.groups or ()) for x in data.splits().values()]
    assert len(seen) == 3
    assert sum(map(len, seen)) == len(set.union(*seen)) == 10
    # val alone is drawn by whole groups, too
    rows = [(*r, "test" if i >= 16 else "train") for i, r in enumerate(rows)]
    data = open_data(table_of(images / "t.csv", rows, "file,label,patient_id,split"))
    seen = [set(x.groups or ()) for x in data.splits().values()]
    assert sum(map(len, seen)) == len(set.union(*seen)) == 10


def test_columns_can_be_named(images):
    rows = [(i, "x", *row) for i, row in enumerate(ROWS)]
    path = table_of(images / "t.csv", rows, "number,label,where,what")
    with pytest.raises(InputError, match=r"no path column .* columns are number, label, where, what; .*--path-column"):
        open_data(path)
    assert open_data(path, path_column="where", label_column="what").classes == ("a", "b")
    with pytest.raises(InputError, match=r"no column 'whta'.*--label-column NAME; did you mean 'what'\?"):
        open_data(path, path_column="where", label_column="whta")
    with pytest.raises(InputError, match=r"no label column .*--label-column"):
        open_data(table_of(images / "u.csv", ROWS, "file,x"))
    with pytest.raises(InputError, match="several label columns: label, class; choose one with --label-column"):
        open_data(table_of(images / "v.csv", [(*r, 1) for r in ROWS], "file,label,class"))


def test_a_column_that_only_sounds_like_a_split_is_named_and_not_used(images):
    data = open_data(table_of(images / "t.csv", [(*r, i % 5) for i, r in enumerate(ROWS)], "file,label,fold"))
    assert not data.explicit_split
    assert "column 'fold' not used, its values are 0, 1, 2, 3, 4" in data.describe()
    with pytest.raises(InputError, match="unknown split '0' in column 'fold'; allowed are train"):
        open_data(images / "t.csv", split_column="fold")


def test_files_are_found_where_tables_usually_have_them(tmp_path):
    for i in range(12):
        picture(tmp_path / ["images", "train", "elsewhere"][i % 3] / f"{i:02}.PNG", i)
    rows = [(f"{i:02}", "ab"[i // 3 % 2], "train") for i in range(12) if i % 3 < 2]
    rows += [(tmp_path / "elsewhere" / f"{i:02}.PNG", "ab"[i // 3 % 2], "train") for i in range(2, 12, 3)]
    data = open_data(table_of(tmp_path / "t.csv", rows, "image_id,label,split"), val_fraction=0)
    assert "images/00.PNG" in names(data.train)
    assert "train/01.PNG" in names(data.train)
    assert "elsewhere/02.PNG" in names(data.train)
    table = table_of(tmp_path / "sub.csv", [(f"{i:02}.PNG", "ab"[i // 3 % 2]) for i in range(2, 12, 3)])
    with pytest.raises(InputError, match=r"line 2: there is no file '02.PNG' .*\(3 further files are missing\)"):
        open_data(table)
    data = open_data(table, root=tmp_path / "elsewhere", val_fraction=0, test_fraction=0.5)
    assert names(data.train) | names(data.test) == {f"{i:02}.PNG" for i in range(2, 12, 3)}


def test_missing_files_can_be_left_out(images):
    (images / "004.png").unlink()
    path = table_of(images / "t.csv", ROWS)
    with pytest.raises(InputError, match=r"line 6: there is no file '004.png'.*--skip-bad"):
        open_data(path)
    data = open_data(path, skip_bad=True)
    assert data.bad == (("004.png", "no such file (line 6)"),)


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        ([("000.png", "a"), ("001.png", "")], "file,label", r"line 3: the label \(column 'label'\) is missing"),
        ([("000.png", "a"), ("001.png", "b", "c")], "file,label", "line 3: 3 fields where the header has 2"),
        ([], "file,label", "has a header line and no rows"),
        ([], "", "has no header line"),
        ([("000.png", "a", "b")], "file,label,label", "two columns 'label'"),
        ([("000.png", "a"), ("000.png", "b")], "file,label", r"lists '000.png' twice \(line 2 and line 3\)"),
        (
            [("000.png", "a", "train"), ("000.png", "a", "test")],
            "file,label,split",
            r"lists '000.png' twice of train and test \(line 2 and line 3\)",
        ),
        ([("000.png", "a", "train"), ("001.png", "b", "exam")], "file,label,split", "line 3: unknown split 'exam'"),
        (
            [("000.png", "a", "train", "p1"), ("001.png", "b", "test", "p1"), ("002.png", "b", "train", "p2")],
            "file,label,split,patient",
            r"1 groups in more than one split: p1 \(train, test\)",
        ),
        (
            [("000.png", "a", "train"), ("001.png", "b", "train"), ("002.png", "c", "val")],
            "file,label,split",
            "classes in val that train has not: c",
        ),
        ([("000.png", "a"), ("001.png", "a")], "file,label", "one class, a"),
    ],
)
def test_mistakes_in_tables(images, rows, header, message):
    with pytest.raises(InputError, match=message):
        open_data(table_of(images / "t.csv", rows, header))


def test_a_table_in_another_encoding_is_refused(images):
    path = table_of(images / "t.csv", [("000.png", "ä")], encoding="latin-1")
    with pytest.raises(InputError, match="not UTF-8"):
        open_data(path)


def test_written_splits_open_as_the_same_splits(images, tmp_path):
    rows = [(*row, f"p{i // 2}") for i, row in enumerate(ROWS)]
    data = open_data(table_of(images / "t.csv", rows, "file,label,patient"), seed=3)
    data.write_splits(tmp_path / "splits.csv")
    with (tmp_path / "splits.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert set(written[0]) == {"name", "label", "group", "split"}
    again = open_data(tmp_path / "splits.csv", root=images)
    for split, part in data.splits().items():
        assert names(again.splits()[split]) == set(part.names)
        assert again.splits()[split].groups == part.groups
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".splits")]


def test_the_description_has_every_count(images):
    data = open_data(table_of(images / "t.csv", ROWS))
    assert data.describe().splitlines()[1:] == [
        "train: 12 images (a 6, b 6)",
        "val:   4 images (a 2, b 2)",
        "test:  4 images (a 2, b 2)",
        "split: train / val / test drawn 70% / 15% / 15% by class, seed 0",
    ]


@pytest.mark.real_data
def test_the_idrid_table_keeps_same_names_apart():
    table = REAL / "idrid_512" / "labels.csv"
    if not table.is_file():
        pytest.skip(f"{table} is not here; set SANSMAX_TEST_DATA to the folder of real data")
    with pytest.raises(InputError, match=r"no label column .*retinopathy_grade"):
        open_data(table, check=False)
    data = open_data(table, label_column="retinopathy_grade", check=False)
    assert data.classes == ("0", "1", "2", "3", "4")
    assert data.colour
    assert {s: len(x) for s, x in data.splits().items()} == {"train": 352, "val": 61, "test": 103}
    everything = names(data.train) | names(data.val) | names(data.test)
    assert len(everything) == 516
    assert {"train/IDRiD_001.jpg", "test/IDRiD_001.jpg"} <= everything
    assert data.splits()["test"].read(0).shape == (512, 771, 3)
