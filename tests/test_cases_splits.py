"""Given splits in the form of others, and our own written so that others read them."""

import csv
import json

import numpy as np
import pytest

from sansmax.data.bags.cases import Cases, read_cases
from sansmax.data.bags.fold import Fold
from sansmax.data.bags.split_files import read_splits, write_splits
from sansmax.errors import InputError

IDS = ("p1", "p2", "p3", "p4")


@pytest.fixture
def cases():
    slides = (("s1", "s1b"), ("s2",), ("s3",), ("s4",))
    return Cases("classification", IDS, slides, np.array([0, 1, 0, 1]), ("x", "y"))


EXPECTED = (Fold(("p1", "p2"), ("p3",), ("p4",)), Fold(("p3", "p4"), ("p1",), ("p2",)))


def test_splits_of_clam_are_ragged_columns_of_slides(tmp_path, cases):
    (tmp_path / "splits_0.csv").write_text(",train,val,test\n0,s1,s3,s4\n1,s1b,,\n2,s2,,\n")
    (tmp_path / "splits_1.csv").write_text(",train,val,test\n0,s3,s1,s2\n1,s4,s1b,\n")
    (tmp_path / "splits_0_bool.csv").write_text(",train,val,test\ns1,True,False,False\n")
    assert read_splits(tmp_path, cases) == EXPECTED
    assert read_splits(tmp_path / "splits_1.csv", cases) == EXPECTED[1:]


def test_ten_folds_are_in_the_order_of_their_numbers(tmp_path, cases):
    for k in range(11):
        test = IDS[k % 4]
        train = [n for n in IDS if n != test]
        (tmp_path / f"fold{k}.csv").write_text("train,test\n" + "\n".join([f"{train[0]},{test}", f"{train[1]},"]))
    assert [f.test[0] for f in read_splits(tmp_path, cases)] == [IDS[k % 4] for k in range(11)]


def test_splits_of_stamp_are_patients(tmp_path, cases):
    entries = [
        {"train_patients": ["p1", "p2"], "val_patients": ["p3"], "test_patients": ["p4"]},
        {"train_patients": ["p3", "p4"], "test_patients": ["p2"]},
    ]
    (tmp_path / "splits.json").write_text(json.dumps({"splits": entries}))
    first, second = read_splits(tmp_path / "splits.json", cases)
    assert first == EXPECTED[0]
    assert second == Fold(("p3", "p4"), (), ("p2",))


def test_splits_of_gigapath_are_three_tables(tmp_path, cases):
    for part, names in (("train", ["s1", "s1b", "s2"]), ("val", ["s3"]), ("test", ["s4"])):
        (tmp_path / f"{part}_0.csv").write_text("slide_id,pat_id,label\n" + "".join(f"{n},q,1\n" for n in names))
    assert read_splits(tmp_path, cases) == EXPECTED[:1]


def test_written_splits_read_back_from_each_of_the_three_forms(tmp_path, cases):
    write_splits(EXPECTED, cases, tmp_path)
    for form in ("splits.csv", "splits.json", ""):
        assert read_splits(tmp_path / form, cases) == EXPECTED, form
    with (tmp_path / "splits_0.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["", "train", "val", "test"]
    assert [r[1] for r in rows[1:]] == ["s1", "s1b", "s2"]
    entry = json.loads((tmp_path / "splits.json").read_text())["splits"][0]
    assert entry["train_patients"] == ["p1", "p2"]
    assert entry["test_patients"] == ["p4"]


def test_a_name_that_is_a_slide_and_another_patient_is_read_by_the_form(tmp_path):
    """CLAM's files name slides, STAMP's name patients."""
    mixed = Cases("classification", ("1", "2"), (("2",), ("1",)), np.array([0, 1]), ("x", "y"))
    (tmp_path / "splits_0.csv").write_text("train,test\n1,2\n")
    (tmp_path / "splits.json").write_text('{"splits": [{"train_patients": ["1"], "test_patients": ["2"]}]}')
    assert read_splits(tmp_path / "splits_0.csv", mixed) == (Fold(("2",), (), ("1",)),)
    assert read_splits(tmp_path / "splits.json", mixed) == (Fold(("1",), (), ("2",)),)


def test_patients_in_two_parts_are_refused(tmp_path, cases):
    (tmp_path / "splits_0.csv").write_text("train,val,test\ns1,s3,s4\ns2,,s1b\n")
    with pytest.raises(InputError, match="1 patients are both in train and in test: p1"):
        read_splits(tmp_path, cases)
    by_slide = Cases("classification", ("a", "b"), (("a",), ("b",)), np.array([0, 1]), ("x", "y"), patients=("p", "p"))
    (tmp_path / "splits_0.csv").write_text("train,test\na,b\n")
    with pytest.raises(InputError, match="both in train and in test: p"):
        read_splits(tmp_path, by_slide)


def test_unknown_names_are_listed_unless_allowed(tmp_path, cases):
    (tmp_path / "splits_0.csv").write_text("train,test\ns1,s4\ns9,\n")
    with pytest.raises(InputError, match="1 names are no case with a target and a bag: s9"):
        read_splits(tmp_path, cases)
    assert read_splits(tmp_path, cases, allow_missing=True) == (Fold(("p1",), (), ("p4",)),)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("splits.json", '{"folds": []}', "is no file of splits"),
        ("splits.json", "{", "is no file of splits"),
        ("t.csv", "case_id,x\np1,train\n", "holds no splits; it needs columns train, val and test"),
        ("t.csv", "case_id,fold_0\np1,learn\n", r"'learn' \(of 'p1'\) is no part"),
        ("t.csv", "case_id,fold_0\np1,test\n", "its part 'train' is empty"),
    ],
)
def test_files_that_are_no_splits_are_explained(tmp_path, cases, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        read_splits(tmp_path / name, cases)


def test_a_folder_without_splits_says_which_are_known(tmp_path, cases):
    with pytest.raises(InputError, match=r"holds no splits; known are splits_0.csv \(CLAM\)"):
        read_splits(tmp_path, cases)


def test_a_table_is_read_with_its_splits(tmp_path):
    (tmp_path / "t.csv").write_text("case_id,slide_id,label\np1,s1,x\np2,s2,y\np3,s3,x\n")
    (tmp_path / "splits_0.csv").write_text("train,val,test\ns1,s2,s3\n")
    cases = read_cases(tmp_path / "t.csv", None, splits=tmp_path / "splits_0.csv")
    assert cases.splits == {"train": ("p1",), "val": ("p2",), "test": ("p3",)}
