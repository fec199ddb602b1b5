"""Tables of patients and slides: every layout is recognised, ids stay strings, what does not fit is named."""

import numpy as np
import pytest

from sansmax.data.bags.cases import Cases, read_cases
from sansmax.data.bags.tables import excel_cell
from sansmax.errors import InputError


@pytest.fixture
def write(tmp_path):
    """Writes a table, lines given, and returns its path."""

    def write(name, *lines):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


CLAM = ("case_id,slide_id,label", "007,0071,tumor", "010,0101,normal", "007,0072,tumor", "002,0021,normal")


def test_a_table_of_clam_keeps_zeros_and_groups_slides_that_are_not_adjacent(write):
    cases = read_cases(write("labels.csv", *CLAM), ["0021", "0071", "0072", "0101"])
    assert cases.ids == ("007", "010", "002")
    assert cases.slides == (("0071", "0072"), ("0101",), ("0021",))
    assert cases.classes == ("normal", "tumor")
    assert cases.targets.tolist() == [1, 0, 0]
    assert "a table of CLAM" in cases.notes[0]
    assert "'case_id'" in cases.notes[0]
    assert cases.notes[-1] == "classification: 4 slides of 3 patients, 2 normal, 1 tumor"


def test_ids_match_with_and_without_suffix_and_folder(write):
    lines = ["slide_id,label", "a.b.svs,x", "centre/c.ome.tif,y", "d.h5,x", "e,y", r"f\g.ndpi,x"]
    cases = read_cases(write("labels.csv", *lines), ["a.b", "c", "d", "e.svs", "g"])
    assert cases.ids == ("a.b", "c", "d", "e.svs", "g")
    assert read_cases(write("labels.csv", *lines), None).ids == ("a.b", "centre/c", "d", "e", r"f\g")


@pytest.mark.parametrize("form", ["csv", "semicolon", "xlsx"])
def test_stamp_tables_join_patients_and_files(write, tmp_path, form):
    clini = [["PATIENT", "isMSIH", "AGE"], ["P1", "MSIH", "50"], ["P2", "MSS", "60"], ["P3", "NA", "70"]]
    clini.append(["P4", "MSS", "1"])
    files = [["PATIENT", "FILENAME"], ["P1", "x/a.h5"], ["P2", "b.h5"], ["P1", "c.h5"], ["P3", "d.h5"], ["P9", "z.h5"]]
    suffix = "xlsx" if form == "xlsx" else "csv"
    for name, rows in (("clini_table", clini), ("slide_table", files)):
        if form == "xlsx":
            openpyxl = pytest.importorskip("openpyxl")
            book = openpyxl.Workbook()
            for row in rows:
                book.active.append(row)
            book.save(tmp_path / f"{name}.xlsx")
        else:
            write(f"{name}.csv", *[(";" if form == "semicolon" else ",").join(row) for row in rows])
    cases = read_cases(tmp_path / f"clini_table.{suffix}", ["a", "b", "c", "d"], label="isMSIH")
    assert cases.ids == ("P1", "P2")
    assert cases.slides == (("a", "c"), ("b",))
    assert cases.classes == ("MSIH", "MSS")
    assert cases.target == ("isMSIH",)
    words = "\n".join(cases.notes)
    assert "a clini table of STAMP with the slide table" in words
    assert "1 patients of clini_table" in words
    assert "P4" in words
    assert "P9" in words
    assert "1 slides left out, their target is missing: x/a.h5" not in words
    assert "1 slides left out, their target is missing: d.h5" in words


@pytest.mark.parametrize("word", ["NA", "NaN", "None", "N/A", "NULL", "", "?", "-", "--", "#N/A", "=#VALUE!", "nan"])
def test_every_spelling_of_missing_leaves_a_row_out(write, word):
    cases = read_cases(write("t.csv", "slide_id,label", "a,x", f"b,{word}", "c,y"), ["a", "b", "c"])
    assert cases.ids == ("a", "c")
    assert any("1 slides left out" in note and "b" in note for note in cases.notes)


@pytest.mark.parametrize(
    ("word", "event"),
    [(w, 1) for w in ("dead", "Deceased", "event", "YES", "1", "true", "1:DECEASED")]
    + [(w, 0) for w in ("alive", "Living", "censored", "no", "0", "False", "0:LIVING")],
)
def test_every_word_of_status_is_read(write, word, event):
    lines = ["PATIENT,slide_id,OS_MONTHS,OS_STATUS", f"p,a,12.5,{word}", "q,b,3,alive", "r,c,,dead"]
    cases = read_cases(write("t.csv", *lines), ["a", "b", "c"], task="survival")
    assert cases.targets.tolist() == [[12.5, event], [3.0, 0.0]]
    assert cases.classes == ("risk",)
    assert cases.target == ("OS_MONTHS", "OS_STATUS")
    assert cases.ids == ("p", "q")


def test_named_columns_of_survival_say_the_task(write):
    path = write("t.csv", "case,img,followup_d,gone", "p,a,10,yes", "q,b,4,no")
    cases = read_cases(path, ["a", "b"], slide_column="img", time_column="followup_d", status_column="gone")
    assert cases.task == "survival"
    assert cases.targets.tolist() == [[10, 1], [4, 0]]


def test_gigapath_has_a_column_per_label(write):
    lines = ["slide_id,pat_id,EGFR,KRAS", "s1,p1,1,0", "s2,p2,,1", "s3,p3,0,NA"]
    cases = read_cases(write("t.csv", *lines), ["s1", "s2", "s3"], task="multilabel")
    assert "a table of GigaPath" in cases.notes[0]
    assert cases.classes == ("EGFR", "KRAS")
    np.testing.assert_array_equal(cases.targets, [[1, 0], [np.nan, 1], [0, np.nan]])
    again = read_cases(write("t.csv", *lines), None, label=["KRAS", "EGFR"])
    assert again.task == "multilabel"
    assert again.classes == ("KRAS", "EGFR")


def test_a_list_of_trident_has_wsi_and_mpp_and_any_label(write):
    lines = ["wsi,mpp,response", "one.svs,0.25,yes", "two.ndpi,0.5,no"]
    cases = read_cases(write("list.csv", *lines), ["one", "two"])
    assert "a list of TRIDENT" in cases.notes[0]
    assert cases.ids == ("one", "two")
    assert cases.classes == ("no", "yes")


def test_patho_bench_brings_its_folds_along(write):
    head = "case_id\tslide_id\tgrade\tfold_0\tfold_1\tfold_10"
    rows = ["p1\ts1\t2\ttrain\ttest\tval", "p2\ts2\t10\ttest\ttrain\ttrain", "p3\ts3\t1\ttrain\ttrain\ttest"]
    cases = read_cases(write("k=all.tsv", head, *rows), ["s1", "s2", "s3"])
    assert "a table of Patho-Bench" in cases.notes[0]
    assert cases.classes == ("1", "2", "10")
    assert cases.targets.tolist() == [1, 2, 0]
    assert [f.test for f in cases.folds] == [("p2",), ("p1",), ("p3",)]
    assert cases.folds[2].val == ("p1",)
    assert cases.splits is None


def test_a_column_of_parts_is_one_split(write):
    lines = ["slide_id,label,split", "a,x,training", "b,y,train", "c,x,valid", "d,y,test"]
    cases = read_cases(write("t.csv", *lines), None)
    assert cases.splits == {"train": ("a", "b"), "val": ("c",), "test": ("d",)}


def test_regression_reads_numbers_and_missing_ones(write):
    lines = ["slide_id,age,bmi", "a,50.5,NA", "b,61,22"]
    cases = read_cases(write("t.csv", *lines), None, task="regression", label=["age", "bmi"])
    np.testing.assert_array_equal(cases.targets, [[50.5, np.nan], [61, 22]])
    assert cases.outputs == 2


def test_labels_without_bag_and_bags_without_label_are_both_listed(write):
    lines = ["slide_id,label", *(f"s{i:02d},{'xy'[i % 2]}" for i in range(30))]
    there = [f"s{i:02d}" for i in range(15, 30)] + [f"other{i:02d}" for i in range(12)]
    path = write("t.csv", *lines)
    with pytest.raises(InputError, match="15 labelled slides have no bag: s00, s01") as error:
        read_cases(path, there)
    assert "s09 and 5 more" in str(error.value)
    assert "12 bags have no label: other00, " in str(error.value)
    assert "other09 and 2 more" in str(error.value)
    assert "--skip-bad" in str(error.value)
    cases = read_cases(path, there, allow_missing=True)
    assert len(cases) == 15
    assert any("15 labelled slides have no bag" in note for note in cases.notes)
    assert any("12 bags have no label" in note for note in cases.notes)


def test_a_bag_whose_label_is_na_is_no_stranger(write):
    cases = read_cases(write("t.csv", "slide_id,label", "a,x", "b,NA", "c,y"), ["a", "b", "c"])
    assert cases.ids == ("a", "c")


def test_slides_of_one_patient_may_differ_only_where_slides_are_cases(write):
    path = write("t.csv", "case_id,slide_id,label", "p,a,x", "q,b,y", "p,c,y")
    with pytest.raises(InputError, match=r"1 patients have different targets: p .*'a' x, 'c' y.*--set data.per=slide"):
        read_cases(path, None)
    cases = read_cases(path, None, per="slide")
    assert cases.ids == ("a", "b", "c")
    assert cases.patients == cases.groups == ("p", "q", "p")


def test_the_order_of_classes_can_be_given(write):
    path = write("t.csv", "slide_id,label", "a,low", "b,high", "c,mid")
    assert read_cases(path, None, classes=["low", "mid", "high"]).targets.tolist() == [0, 2, 1]
    with pytest.raises(InputError, match="mid are in column 'label' and not among the classes"):
        read_cases(path, None, classes=["low", "high"])


def test_taking_cases_keeps_everything_that_belongs_to_them(write):
    path = write("t.csv", "case_id,slide_id,label,site", "p,a,x,1", "q,b,y,2", "p,c,x,1")
    cases = read_cases(path, None, per="slide", site_column="site").take(["c", "b"])
    assert (cases.ids, cases.slides) == (("c", "b"), (("c",), ("b",)))
    assert (cases.patients, cases.sites) == (("p", "q"), ("1", "2"))
    assert cases.targets.tolist() == [0, 1]
    with pytest.raises(InputError, match="1 of 2 ids are no cases here: a"):
        cases.take(["a", "b"])


def test_cases_without_targets_hold_none_of_them():
    y = np.array([[1.0, 0.0], [np.nan, 1.0]])
    cases = Cases("multilabel", ("a", "b"), (("a",), ("b",)), y, ("k", "l"))
    assert np.isnan(cases.without_targets().targets).all()
    nominal = Cases("classification", ("a", "b"), (("a",), ("b",)), np.array([1, 2]), ("k", "l", "m"))
    assert nominal.without_targets().targets.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        (["slide_id,label", "a,x", "a,y"], {}, r"1 slides are there twice: 'a' \(lines 2 and 3\)"),
        (["slide_id,label", "a,x", "a.svs,y"], {}, "1 rows name a slide that another names"),
        (["slide_id,label", "a,x", "b,x"], {}, "all 2 slides are 'x'; classification needs two classes"),
        (["slide_id,label", "a,x", ",y"], {}, "line 3: the slide has no name"),
        (["slide_id,label", "a,x,z", "b,y"], {}, "line 2: 3 cells where the header has 2"),
        (["slide_id,label"], {}, "has a header line and no rows"),
        (["slide_id,label,label", "a,x,y"], {}, "two columns 'label'"),
        (["slide_id,one,two", "a,x,y"], {}, "which column is the target is not clear, it may be one, two; name it"),
        (["slide_id,label", "a,x"], {"label": "labl"}, "no column 'labl' for the target.*did you mean 'label'"),
        (["name,label", "a,x"], {}, "no column of slides.*--set data.slide_column=NAME"),
        (["slide_id,label", "a,0.5", "b,1.5"], {}, "2 different numbers; say --task regression"),
        (["slide_id,k,l", "a,1,x", "b,0,y"], {"label": ["k", "l"]}, "several targets .*; l hold other values"),
        (["slide_id,k,l", "a,1,2", "b,0,1"], {"task": "multilabel"}, r"slide 'a' \(line 2\): '2' in 'l' is no label"),
        (["slide_id,age", "a,old"], {"task": "regression"}, "'old' in 'age' is no number"),
        (["slide_id,time,event", "a,-1,1"], {"task": "survival"}, "'-1' in 'time' is no time"),
        (["slide_id,time,event", "a,1,maybe"], {"task": "survival"}, "'maybe' in 'event' is no status; allowed are"),
        (["slide_id,label", "a,x", "b,y"], {"task": "sorting"}, "unknown task 'sorting'"),
        (["slide_id,label", "a,x", "b,y"], {"per": "tile"}, "per='tile'"),
        (["slide_id,label", "a,NA"], {}, "no case is left|needs two classes"),
    ],
)
def test_what_does_not_fit_is_named(write, lines, options, message):
    with pytest.raises(InputError, match=message):
        read_cases(write("t.csv", *lines), None, **options)


def test_bags_that_all_have_other_names_are_shown_beside_the_table(write):
    path = write("t.csv", "slide_id,label", "a,x", "b,y")
    with pytest.raises(
        InputError, match=r"none of its 2 slides has a bag .*a, b.*the bags are u, v.*--set data.slide_column=NAME"
    ):
        read_cases(path, ["u", "v"], allow_missing=True)


def test_stamp_refuses_pictures_and_patients_twice(write):
    clini = write("clini_table.csv", "PATIENT,y", "p,a", "q,b")
    slides = write("slide_table.csv", "PATIENT,FILENAME", "p,a.svs", "q,b.h5")
    with pytest.raises(InputError, match=r"line 2: FILENAME 'a.svs' does not end in .h5"):
        read_cases(clini, None)
    write("slide_table.csv", "PATIENT,FILENAME", "p,a.h5", "q,b.h5")
    write("clini_table.csv", "PATIENT,y", "p,a", "q,b", "p,b")
    with pytest.raises(InputError, match="patient 'p' is there twice, in lines 2 and 4"):
        read_cases(clini, None, slide_table=slides)


def test_a_torn_excel_file_is_refused(tmp_path):
    pytest.importorskip("openpyxl")
    path = tmp_path / "t.xlsx"
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(InputError, match="cannot be read as an Excel file"):
        read_cases(path, None)


def test_excel_numbers_stay_the_ids_they_look_like(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["slide_id", "label"], [12, "x"], [13.0, "y"], ["007", "x"]):
        book.active.append(row)
    book.save(tmp_path / "t.xlsx")
    assert read_cases(tmp_path / "t.xlsx", None).ids == ("12", "13", "007")


def test_whole_numbers_of_excel_lose_the_point_that_other_writers_give_them():
    assert [excel_cell(v) for v in (13.0, 0.5, 7, None, " 007 ")] == ["13", "0.5", "7", "", "007"]
