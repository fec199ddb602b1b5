"""Slides are found by name, and opened once in each process that reads them."""

import pickle
from multiprocessing import get_context

import numpy as np
import pytest
import tifffile
from PIL import Image

from sansmax.data.slides.handles import SlideHandles
from sansmax.data.slides.opening import SLIDE_SUFFIXES, find_slides, slide_id
from sansmax.errors import InputError


def picture(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


RGB = picture(60, 70)


def test_ids_are_names_without_whole_suffixes():
    assert slide_id("/x/a.b.ome.TIFF") == "a.b" and slide_id("scan.nii.gz") == "scan"
    assert slide_id("TCGA-01-DX1.4F.svs") == "TCGA-01-DX1.4F" and slide_id("007.txt") == "007.txt"
    assert slide_id(".svs") == ".svs"
    assert all(slide_id(f"a{suffix}") == "a" for suffix in SLIDE_SUFFIXES)


def test_slides_are_found_in_folders_by_id(tmp_path):
    for name in ("b/two.svs", "one.ome.tif", "b/c/three.PNG", "b/notes.txt", ".hidden.svs"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in find_slides(tmp_path)] == ["one.ome.tif", "three.PNG", "two.svs"]
    # one file named twice is one slide
    assert len(find_slides([tmp_path / "b", tmp_path / "b/two.svs"])) == 2
    (tmp_path / "two.tif").write_bytes(b"x")
    with pytest.raises(InputError, match=r"share one(.|\n)*two: .*two\.svs, .*two\.tif"):
        find_slides(tmp_path)
    with pytest.raises(InputError, match=r"notes\.txt has not the suffix of a slide; allowed are .*\.svs"):
        find_slides([tmp_path / "b/notes.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no slides"):
        find_slides([tmp_path / "empty"])
    with pytest.raises(InputError, match="no such file"):
        find_slides([tmp_path / "gone.svs"])


def test_handles_are_few_and_closed_when_let_go(tmp_path):
    for k in range(4):
        Image.fromarray(RGB).save(tmp_path / f"{k}.png")
    with SlideHandles(max_open=2) as handles:
        slides = [handles.get(tmp_path / f"{k}.png") for k in range(3)]
        assert len(handles) == 2 and handles.get(tmp_path / "2.png") is slides[2]
        with pytest.raises(InputError, match="closed"):
            slides[0].read((0, 0), 0, (3, 3))
        slides[1].read((0, 0), 0, (3, 3))
        # the one used last stays
        handles.get(tmp_path / "1.png")
        handles.get(tmp_path / "3.png")
        assert handles.get(tmp_path / "1.png") is slides[1]
        again = pickle.loads(pickle.dumps(handles))
        assert len(again) == 0 and again.max_open == 2
    with pytest.raises(InputError, match="closed"):
        slides[1].read((0, 0), 0, (3, 3))


def _read_in_child(handles, path, parents, pipe):
    slide = handles.get(path)
    pipe.send((id(slide) == parents, [slide.read((k, k), 0, (60, 50)).tobytes() for k in range(0, 100, 10)]))


def test_a_forked_worker_opens_its_own_handle(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", picture(512, 512), tile=(64, 64), compression="zlib", metadata=None)
    handles = SlideHandles()
    slide = handles.get(tmp_path / "a.tif")
    context = get_context("fork")
    ours, theirs = context.Pipe()
    child = context.Process(target=_read_in_child, args=(handles, tmp_path / "a.tif", id(slide), theirs))
    child.start()
    mine = [slide.read((k, k), 0, (60, 50)).tobytes() for k in range(0, 100, 10)]
    assert ours.poll(60)
    shared, read = ours.recv()
    child.join()
    assert not shared and read == mine and child.exitcode == 0
    assert handles.get(tmp_path / "a.tif") is slide
    handles.close()
