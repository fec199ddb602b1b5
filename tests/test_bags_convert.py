"""Folders are converted whole: resumed, killed and completed, with every failure and every loss said."""

import os
import random
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from bag_files import attributes, drawn, write_clam, write_stamp, write_trident
from runs import sansmax

from sansmax.data.bags.convert import convert_bags
from sansmax.data.bags.folder import open_bags
from sansmax.data.bags.reading import read_bag
from sansmax.data.bags.resolutions import read_mpp_table
from sansmax.errors import InputError


@pytest.fixture
def source(tmp_path):
    """Three slides of TRIDENT, one of them without tissue."""
    for number, tokens in enumerate((5, 0, 7)):
        write_trident(tmp_path / "in" / f"s{number}.h5", *drawn(tokens, seed=number))
    return tmp_path / "in"


def test_done_slides_are_skipped_and_new_ones_written(source, tmp_path):
    first = convert_bags(source, tmp_path / "out", "sansmax")
    assert (first.written, first.skipped, first.failed) == (["s0", "s1", "s2"], [], {})
    stamps = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.h5")}
    write_trident(source / "s3.h5", *drawn(9, seed=3))
    again = convert_bags(source, tmp_path / "out", "sansmax")
    assert (again.written, again.skipped) == (["s3"], ["s0", "s1", "s2"])
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in stamps} == stamps
    assert "1 slide written to" in again.text() and "3 were there" in again.text()


def test_a_slide_that_was_extracted_again_is_converted_again(source, tmp_path):
    convert_bags(source, tmp_path / "out", "sansmax")
    features, xy = drawn(5, seed=9)
    path = write_trident(source / "s0.h5", features, xy)
    later = time.time() + 10
    os.utime(path, (later, later))
    assert convert_bags(source, tmp_path / "out", "sansmax").written == ["s0"]
    np.testing.assert_array_equal(read_bag(tmp_path / "out" / "s0.h5").features, features)


def test_other_settings_are_not_mixed_into_one_folder(source, tmp_path):
    convert_bags(source, tmp_path / "out", "sansmax")
    with pytest.raises(InputError, match=r"converted otherwise: mpp was None, is 0.25.*--overwrite"):
        convert_bags(source, tmp_path / "out", "sansmax", mpp=0.25)
    assert convert_bags(source, tmp_path / "out", "sansmax", mpp=0.25, overwrite=True).written == ["s0", "s1", "s2"]
    assert read_bag(tmp_path / "out" / "s0.h5").mpp == 0.25
    with pytest.raises(InputError, match="layout was sansmax, is trident"):
        convert_bags(source, tmp_path / "out", "trident")


def test_files_of_others_are_not_taken_for_results(source, tmp_path):
    write_trident(tmp_path / "out" / "s0.h5", *drawn(4))
    later = time.time() + 10
    os.utime(tmp_path / "out" / "s0.h5", (later, later))
    report = convert_bags(source, tmp_path / "out", "sansmax")
    assert report.written == ["s1", "s2"]
    assert "is there already: 4 tiles of 8 numbers" in report.failed["s0"]


def test_one_bad_file_does_not_stop_the_rest(source, tmp_path):
    os.truncate(source / "s0.h5", 3000)
    features, xy = drawn(6)
    features[2] = np.nan
    write_trident(source / "s3.h5", features, xy)
    write_trident(source / "s4.h5", features[:2], xy[:1])
    report = convert_bags(source, tmp_path / "out", "sansmax")
    assert report.written == ["s1", "s2"] and set(report.failed) == {"s0", "s3", "s4"}
    assert sorted(p.name for p in (tmp_path / "out").glob("*.h5")) == ["s1.h5", "s2.h5"]
    listed = (tmp_path / "out" / "failed.txt").read_text().splitlines()
    assert len(listed) == 3 and "damaged" in listed[0] and "1 of 6 tiles" in listed[1] and "(1, 2) for 2" in listed[2]
    # mended, the list goes
    for number in (0, 3, 4):
        write_trident(source / f"s{number}.h5", *drawn(5))
    assert convert_bags(source, tmp_path / "out", "sansmax").written == ["s0", "s3", "s4"]
    assert not (tmp_path / "out" / "failed.txt").exists()


def test_remarks_and_losses_are_counted(source, tmp_path):
    features, xy = drawn(5)
    xy[0] = 40000
    write_trident(source / "s0.h5", features, xy)
    report = convert_bags(source, tmp_path / "out", "clam")
    assert report.lost["name of the encoder"] == 3 and report.lost["attributes of trident"] == 3
    assert report.remarks == {
        "s0": ("1 of 5 tiles begin outside the slide of 30000 x 20000 px",),
        "s1": ("no tiles",),
    }
    text = report.text()
    assert "lost, which clam does not hold: name of the encoder (3 slides)" in text
    assert "remark: s0: 1 of 5 tiles begin outside" in text


def test_bags_do_not_replace_themselves(source):
    with pytest.raises(InputError, match="replace themselves"):
        convert_bags(source, source, "trident")
    with pytest.raises(InputError, match="replace themselves"):
        convert_bags(source / "s0.h5", source, "sansmax")


def test_micrometres_come_from_a_table(source, tmp_path):
    # as TRIDENT's lists: folders and suffixes; s1 is not in it
    (tmp_path / "mpp.csv").write_text("wsi,mpp\nsite/s0.ome.tiff,0.25\ns2.svs,0.5\n")
    report = convert_bags(source, tmp_path / "out", "stamp", mpp=read_mpp_table(tmp_path / "mpp.csv"))
    assert report.written == ["s0", "s2"] and "--mpp-table" in report.failed["s1"]
    for name, tokens, mpp in (("s0", 5, 0.25), ("s2", 7, 0.5)):
        with h5py.File(tmp_path / "out" / f"{name}.h5") as file:
            xy = drawn(tokens, seed=int(name[1]))[1]
            np.testing.assert_array_equal(file["coords"][()], (xy * mpp).astype(np.float32))
            assert attributes(file)["tile_size_um"] == 512 * mpp


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slide_id,um\ns0,1\n", "columns slide_id, um"),
        ("slide_id,mpp\ns0,40x\n", r"line 2: mpp is micrometres per pixel such as 0.25, got '40x'"),
        ("slide_id,mpp\ns0,0.25\ns0,0.5\n", "line 3: s0 has two resolutions, 0.25 and 0.5"),
    ],
)
def test_tables_of_resolutions_are_checked(tmp_path, text, words):
    (tmp_path / "mpp.csv").write_text(text)
    with pytest.raises(InputError, match=words):
        read_mpp_table(tmp_path / "mpp.csv")


def test_points_in_names_of_slides_are_no_suffixes(tmp_path):
    (tmp_path / "mpp.csv").write_text("slide_id,mpp\nTCGA-DX1.83F0,0.25\nTCGA-DX1.91A7,0.5\n007.svs,1\n")
    known = read_mpp_table(tmp_path / "mpp.csv")
    assert known["TCGA-DX1.83F0"] == 0.25 and known["TCGA-DX1.91A7"] == 0.5 and known["007"] == 1
    assert "TCGA-DX1" not in known


# imports once, then makes a process for every line that it is told; that one says when it is in the midst of a file
CHILD = """
import os, sys, time
import h5py
from sansmax.data.bags.convert import convert_bags

create = h5py.Group.create_dataset
def slowly(group, name, *args, **how):
    made = create(group, name, *args, **how)
    group.file.flush()
    print("within", name, flush=True)
    time.sleep(0.05)
    return made
h5py.Group.create_dataset = slowly

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        source, target, layout = line.rstrip("\\n").split("\\t")
        print(os.getpid(), flush=True)
        convert_bags(source, target, layout)
        os._exit(0)
    print("ended", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def child():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", CHILD], **pipes) as process:
        yield process
        process.kill()


def start_and_kill(child, words, parts):
    """Kills a conversion in the midst of a file, when it has written so many parts of files; how it ended."""
    child.stdin.write("\t".join(map(str, words)) + "\n")
    child.stdin.flush()
    pid = int(child.stdout.readline())
    for _ in range(parts):
        assert child.stdout.readline().startswith("within")
    os.kill(pid, signal.SIGKILL)
    while not (line := child.stdout.readline()).startswith("ended"):
        assert line
    return int(line.split()[1])


@pytest.mark.parametrize("layout", ["sansmax", "clam"])
def test_killed_at_any_moment_it_is_completed_by_running_again(tmp_path, layout, seed, child):
    truth = {}
    for number in range(16):
        features, xy = drawn(300, width=256, seed=number)
        truth[f"s{number:02}"] = (features, xy)
        write_trident(tmp_path / "in" / f"s{number:02}.h5", features, xy)
    draw, out = random.Random(seed), tmp_path / "out"
    done = 0
    for _ in range(4):
        # of two parts a slide
        ended = start_and_kill(child, (tmp_path / "in", out, layout), draw.randint(3, 6))
        assert ended == -signal.SIGKILL
        left = open_bags(out)
        assert done < len(left) < 16
        done = len(left)
        for slide_id in left.ids:
            np.testing.assert_array_equal(left.read(slide_id).features, truth[slide_id][0])
    report = convert_bags(tmp_path / "in", out, layout)
    assert report.skipped == list(left.ids) and len(report.written) == 16 - done
    whole = open_bags(out)
    assert whole.ids == tuple(truth)
    tensors = open_bags(out / "pt_files") if layout == "clam" else whole
    for slide_id, (features, xy) in truth.items():
        bag = whole.read(slide_id)
        np.testing.assert_array_equal(bag.features, features)
        np.testing.assert_array_equal(bag.xy, xy)
        np.testing.assert_array_equal(tensors.read(slide_id).features, features)


def test_the_way_through_every_tool_and_back(tmp_path):
    """TRIDENT to STAMP to CLAM to TRIDENT: places exact, features to halves."""
    features, xy = drawn(64)
    write_trident(tmp_path / "a" / "s.h5", features, xy)
    said = sansmax("convert-bags", tmp_path / "a", tmp_path / "b", "--layout", "stamp", "--mpp", "0.2527")
    assert said.status == 0, said
    said = sansmax("convert-bags", tmp_path / "b", tmp_path / "c", "--layout", "clam", "--mpp", "0.2527")
    assert said.status == 0 and "lost, which clam does not hold: name of the encoder" in said.out, said
    words = ("--layout", "trident", "--encoder", "uni_v2", "--tile-level0", "512")
    said = sansmax("convert-bags", tmp_path / "c", tmp_path / "d", *words)
    assert said.status == 0, said
    bag = read_bag(tmp_path / "d" / "s.h5")
    assert (bag.layout, bag.encoder, bag.tile_level0) == ("trident", "uni_v2", 512)
    np.testing.assert_array_equal(bag.xy, xy)
    np.testing.assert_array_equal(bag.features, features.astype(np.float16).astype(np.float32))


def test_the_command_line_says_what_was_found(source, tmp_path):
    said = sansmax("bags", source)
    assert said.status == 0
    assert said.out.startswith("TRIDENT: coordinates in level-0 pixels with their attributes; 3 bags")
    said = sansmax("bags", source, "--each", "--check")
    assert "s2\t7\ttrident\t" in said.out and "remark: s1: no tiles" in said.out
    os.truncate(source / "s2.h5", 3000)
    said = sansmax("bags", source)
    assert said.status == 1 and "failed: s2: " in said.out
    said = sansmax("bags", tmp_path / "none")
    assert said.status == 2 and "no file or folder" in said.err


def test_the_command_line_ends_with_1_where_slides_failed(source, tmp_path):
    said = sansmax("convert-bags", source, tmp_path / "out", "--layout", "stamp")
    assert said.status == 1 and said.out.count("give --mpp or --mpp-table") == 3
    said = sansmax("convert-bags", source, tmp_path / "out2", "--mpp", "0.5", "--mpp-table", "t.csv")
    assert said.status == 2 and "give one of them" in said.err
    said = sansmax("convert-bags", source, tmp_path / "out3", "--layout", "stemp")
    assert said.status == 2 and "did you mean 'stamp'" in said.err


def test_clam_and_stamp_become_own_files(tmp_path):
    features, xy = drawn(50)
    write_clam(tmp_path / "clam", "s", features, xy)
    write_stamp(tmp_path / "stamp" / "s.h5", features, xy * 0.5)
    for name, how in (("clam", {"encoder": "resnet50"}), ("stamp", {"mpp": 0.5})):
        report = convert_bags(tmp_path / name, tmp_path / f"own-{name}", "sansmax", **how)
        assert not report.lost and report.written == ["s"]
        bag = read_bag(tmp_path / f"own-{name}" / "s.h5")
        np.testing.assert_array_equal(bag.xy, xy)
        assert bag.tile_level0 == 512
        assert bag.encoder == ("resnet50" if name == "clam" else "mahmood-uni2")
