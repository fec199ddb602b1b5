"""Folders of the neighbours are found by looking; what does not belong together is refused with both named."""

import os

import h5py
import numpy as np
import pytest
import torch
from bag_files import (
    drawn,
    write_clam,
    write_clam_patches,
    write_stamp,
    write_trident,
    write_trident_patches,
    write_trident_slide,
)

from sansmax.data.bags.folder import open_bags
from sansmax.errors import InputError
from sansmax.optional import need

JOB = "20x_256px_0px_overlap"


def trident_job(folder, encoders=("uni_v2",), slides=3):
    for number in range(slides):
        features, xy = drawn(5 + number, seed=number)
        write_trident_patches(folder / JOB / "patches" / f"s{number}_patches.h5", xy)
        for encoder in encoders:
            write_trident(folder / JOB / f"features_{encoder}" / f"s{number}.h5", features, xy, encoder)
    return folder


def test_a_job_of_trident_is_found_from_its_root(tmp_path):
    trident_job(tmp_path / "job")
    for path in (tmp_path / "job", tmp_path / "job" / JOB, tmp_path / "job" / JOB / "features_uni_v2"):
        bags = open_bags(path)
        assert bags.ids == ("s0", "s1", "s2") and len(bags) == 3
        assert (bags.layout, bags.width, bags.encoder) == ("trident", 8, "uni_v2")
        assert [bags.length(i) for i in bags.ids] == [5, 6, 7]
        np.testing.assert_array_equal(bags.read("s1").features, drawn(6, seed=1)[0])
    assert open_bags(tmp_path / "job").note == (
        "TRIDENT: coordinates in level-0 pixels with their attributes; 3 bags in TRIDENT's folder "
        f"{JOB}/features_uni_v2, 18 tiles of 8 numbers, encoder uni_v2"
    )


def test_a_job_with_several_encoders_asks_which(tmp_path):
    trident_job(tmp_path, ("uni_v2", "conch_v15"))
    with pytest.raises(InputError, match=rf"several sets of features: {JOB}/features_conch_v15, {JOB}/features_uni_v2"):
        open_bags(tmp_path)
    assert open_bags(tmp_path / JOB / "features_conch_v15").encoder == "conch_v15"


def test_a_job_with_embeddings_of_slides_only_is_refused(tmp_path):
    trident_job(tmp_path, ())
    with pytest.raises(InputError, match="coordinates of tiles, no features"):
        open_bags(tmp_path)
    write_trident_slide(tmp_path / JOB / "slide_features_titan" / "s0.h5")
    with pytest.raises(InputError, match=r"embeddings of whole slides.*--task feat"):
        open_bags(tmp_path)
    with pytest.raises(InputError, match="one embedding of the whole slide"):
        open_bags(tmp_path / JOB / "slide_features_titan")
    # and beside features of tiles they do not disturb
    trident_job(tmp_path)
    assert open_bags(tmp_path).encoder == "uni_v2"


def test_clams_folder_of_features_prefers_the_files_with_places(tmp_path):
    for number in range(2):
        features, xy = drawn(40 + number, seed=number)
        write_clam(tmp_path / "features", f"s{number}", features, xy)
        write_clam_patches(tmp_path / "patches" / f"s{number}.h5", xy, patch_size=512, downsample=1.0)
    (tmp_path / "features" / "h5_files" / "s0.h5").rename(tmp_path / "features" / "h5_files" / "t0.h5")
    (tmp_path / "patches" / "s0.h5").rename(tmp_path / "patches" / "t0.h5")
    bags = open_bags(tmp_path / "features")
    assert bags.ids == ("s1", "t0") and bags.layout == "clam"
    assert "CLAM's h5_files (1 slides are in pt_files only and left out: s0)" in bags.note
    assert bags.read("s1").tile_level0 == 512
    assert open_bags(tmp_path / "features" / "pt_files").read("s1").xy is None
    with pytest.raises(InputError, match="no features"):
        open_bags(tmp_path / "patches")


def test_stamps_nested_folders_are_searched(tmp_path):
    features, xy = drawn(4)
    write_stamp(tmp_path / "out" / "mahmood-uni2-0a1b2c3d" / "site 1" / "s1.h5", features, xy)
    write_stamp(tmp_path / "out" / "mahmood-uni2-0a1b2c3d" / "site 2" / "s2.h5", features, xy)
    (tmp_path / "out" / "mahmood-uni2-0a1b2c3d" / "site 2" / "s2.jpg").touch()
    bags = open_bags(tmp_path / "out")
    assert bags.ids == ("s1", "s2") and bags.encoder == "mahmood-uni2"


def test_one_file_is_a_folder_of_one(tmp_path):
    path = write_trident(tmp_path / "s.h5", *drawn(4))
    assert open_bags(path).ids == ("s",)


def test_empty_bags_have_the_width_of_the_others(tmp_path):
    trident_job(tmp_path)
    write_trident(tmp_path / JOB / "features_uni_v2" / "empty.h5", *drawn(0))
    bags = open_bags(tmp_path)
    assert bags.length("empty") == 0 and bags.read("empty").features.shape == (0, 8)
    assert bags.note.endswith("1 without tiles")


def test_duplicate_slides_are_named_with_both_files(tmp_path):
    features, xy = drawn(4)
    write_trident(tmp_path / "a.h5", features, xy)
    torch.save(torch.from_numpy(features), tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"slide ids that are there twice: .*a\.h5 and .*a\.pt"):
        open_bags(tmp_path)


def test_features_of_several_widths_are_refused(tmp_path):
    for name, width in (("a", 8), ("b", 8), ("c", 9)):
        np.save(tmp_path / f"{name}.npy", drawn(4, width)[0])
    with pytest.raises(InputError, match=r"several widths: 8 in 2 \(a, b\); 9 in 1 \(c\)"):
        open_bags(tmp_path)


def test_features_of_several_encoders_are_refused(tmp_path):
    for name, encoder in (("a", "uni_v1"), ("b", "conch_v15")):
        write_trident(tmp_path / f"{name}.h5", *drawn(4), encoder)
    with pytest.raises(InputError, match=r"several encoders: uni_v1 in 1 \(a\); conch_v15 in 1 \(b\)"):
        open_bags(tmp_path)


def test_all_files_that_cannot_be_read_are_listed(tmp_path):
    for number in range(14):
        path = write_trident(tmp_path / f"s{number:02}.h5", *drawn(40))
        if number != 5:
            os.truncate(path, 3000)
    with pytest.raises(InputError, match=r"13 of 14 files(?s:.*)s00\.h5 is damaged(?s:.*)s10\.h5(?s:.*)and 3 more"):
        open_bags(tmp_path)
    bags = open_bags(tmp_path, skip_bad=True)
    assert bags.ids == ("s05",) and len(bags.bad) == 13 and "13 unreadable" in bags.note
    with pytest.raises(InputError, match=r"s00\.h5 is damaged"):
        bags.read("s00")


def test_half_files_of_a_killed_writer_are_not_taken_for_bags(tmp_path):
    features, xy = drawn(4)
    write_trident(tmp_path / "s.h5", features, xy)
    (tmp_path / ".t.0a1b2c3d.h5").write_bytes((tmp_path / "s.h5").read_bytes()[:2000])
    assert open_bags(tmp_path).ids == ("s",)


def test_missing_folders_and_slides_name_the_nearest(tmp_path):
    trident_job(tmp_path / "features")
    with pytest.raises(InputError, match=r"no file or folder .*featurs; did you mean .*features'"):
        open_bags(tmp_path / "featurs")
    with pytest.raises(InputError, match="unknown slide 's9': did you mean 's"):
        open_bags(tmp_path / "features").path("s9")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match=r"holds no bags: no file \*\.h5"):
        open_bags(tmp_path / "nothing")


def test_lengths_do_not_read_features(tmp_path, monkeypatch):
    for number in range(3):
        write_trident(tmp_path / f"s{number}.h5", *drawn(5))

    def refused(*args, **how):
        raise AssertionError("features were read")

    monkeypatch.setattr(h5py.Dataset, "__getitem__", refused)
    monkeypatch.setattr(np, "fromfile", refused)
    assert [open_bags(tmp_path).length(f"s{k}") for k in range(3)] == [5, 5, 5]


def test_progress_counts_headers(tmp_path):
    trident_job(tmp_path)
    steps = []
    open_bags(tmp_path, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_a_missing_package_is_named_with_the_line_that_installs_it():
    assert need("json", "slides").loads("1") == 1
    with pytest.raises(InputError, match=r'no_such_package is not installed.*pip install "sansmax\[slides\]"'):
        need("no_such_package.part", "slides")
