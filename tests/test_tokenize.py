"""`sansmax tokenize`: features are those of the tiles, whatever order, share and speed they are made in."""

import csv
import json
import re
import shutil
import warnings

import h5py
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from runs import refused, sansmax
from tokenized import QUICK, bag, features, pixels, real, record, slides_in, tokenize, write_slide

from sansmax.data.bags.folder import open_bags
from sansmax.data.slides.geojson import read_tissue
from sansmax.data.slides.opening import open_slide
from sansmax.data.slides.tissue import find_tissue
from sansmax.engine import tokenize_slide
from sansmax.engine.encoders import Encoder
from sansmax.engine.tokenize_jobs import SlideJob, parse_shard, shard_of
from sansmax.engine.tokenize_records import all_records
from sansmax.errors import InputError

SVS = "wsi/CMU-1-Small-Region.svs"


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return slides_in(tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="module")
def whole(slides, tmp_path_factory):
    """Three slides, done at once."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    tokenize(slides, "--output", folder)
    return folder


# What is in the files


def by_definition(array, xy, side, px, seed=0):
    """Features of squares of a picture: cut, averaged to `px` pixels, prepared by timm, through the network."""
    torch.manual_seed(seed)
    network = timm.create_model("test_vit", num_classes=0).eval()
    prepare = timm.data.create_transform(**{**timm.data.resolve_model_data_config(network), "crop_pct": 1.0})
    padded = np.pad(array, ((0, side), (0, side), (0, 0)), constant_values=255)
    made = []
    for x, y in xy:
        tile = padded[y : y + side, x : x + side].reshape(px, side // px, px, side // px, 3).mean((1, 3))
        made.append(network(prepare(Image.fromarray(np.rint(tile).astype(np.uint8)))[None])[0])
    return torch.stack(made).detach().numpy()


@pytest.mark.parametrize(("mpp", "side"), [(0.5, 128), (0.25, 256)])
def test_features_are_those_of_the_tiles(mpp, side, tmp_path):
    write_slide(tmp_path / "s.tif", mpp=mpp, size=(1024, 768))
    tokenize(tmp_path / "s.tif", "--output", tmp_path / "out")
    made, xy, said, coords = bag(tmp_path / "out", "s")
    assert len(xy) > 5 and (xy % side == 0).all()
    with torch.inference_mode():
        wanted = by_definition(pixels(0, (1024, 768)), xy, side, 128)
    np.testing.assert_array_equal(made, wanted)
    # both unit systems
    with h5py.File(tmp_path / "out" / "features" / "s.h5") as file:
        np.testing.assert_allclose(file["coords_um"][()], xy * mpp)
    assert coords["patch_size_level0"] == side and coords["patch_size"] == 128
    assert said["tile_size_um"] == 64 and said["level0_mpp"] == mpp
    assert (coords["level0_width"], coords["level0_height"]) == (1024, 768)
    # every tile has tissue enough, and no other one has
    with open_slide(tmp_path / "s.tif") as slide:
        tissue = find_tissue(slide)
    grid = np.array([(x, y) for y in range(0, 768, side) for x in range(0, 1024, side)])
    np.testing.assert_array_equal(xy, grid[tissue.covered(grid, side) >= 0.25])


def test_the_file_says_what_made_it(whole):
    _, _, said, _ = bag(whole, "s0")
    known = json.loads(said["attributes"])
    encoder = timm.create_model("test_vit", num_classes=0)
    assert said["encoder"] == "test_vit" and said["encoder_revision"] == "random weights, seed 0"
    assert json.loads(said["transform"])["input_size"] == [3, 160, 160]
    assert known["precision"] == "fp32" and len(known["encoder_sha256"]) == 64
    assert known["settings"]["tile_px"] == 128 and known["settings"]["min_tissue"] == 0.25
    run = json.loads((whole / "run.json").read_text())
    assert run["encoder"]["weights sha256"] == known["encoder_sha256"]
    assert run["encoder"]["width"] == encoder.num_features
    assert {"torch", "timm", "python", "h5py", "tifffile"} <= set(run["environment"])
    assert [s["slide_id"] for s in run["slides"]] == ["s0", "s1", "s2"]
    assert all(s["tiles"] > 0 and s["seconds"] > 0 and 0 < s["tissue_share"] < 1 for s in run["slides"])
    summary = (whole / "summary.md").read_text()
    assert "3 slides: 3 tokenized" in summary and "| s1 | done |" in summary


@pytest.mark.real_data
def test_on_a_real_slide_nothing_depends_on_batch_size_workers_or_shard(tmp_path):
    slide = real(SVS)
    ways = {
        "plain": (),
        "small": ("--batch-size", "3"),
        "read ahead": ("--batch-size", "5", "--workers", "2"),
        "shard": ("--shard", "1/1", "--batch-size", "64"),
    }
    files = []
    for name, words in ways.items():
        said = sansmax("tokenize", slide, "--output", tmp_path / name, *QUICK, "--tile-px", "256", *words)
        assert said.status == 0, said
        files.append(features(tmp_path / name))
    assert len(files[0]) == 1
    assert all(found == files[0] for found in files)
    made = bag(tmp_path / "plain", "CMU-1-Small-Region")[0]
    assert len(made) > 30 and np.isfinite(made).all()
    assert len(np.unique(made[:, 0])) > 0.9 * len(made)


@pytest.mark.real_data
def test_a_pyramid_without_a_resolution_needs_one_and_takes_it(tmp_path):
    slide = real("wsi/cptac_C3L-00601-26_pyramid_derived.tif")
    said = tokenize(slide, "--output", tmp_path / "out", "--tile-mpp", "4", status=1)
    assert "--mpp" in said.err
    tokenize(slide, "--output", tmp_path / "out", "--tile-mpp", "4", "--mpp", "0.5")
    made, _, said, coords = bag(tmp_path / "out", "cptac_C3L-00601-26_pyramid_derived")
    assert len(made) > 5 and coords["patch_size_level0"] == 1024 and said["level0_mpp"] == 0.5
    assert record(tmp_path / "out", "cptac_C3L-00601-26_pyramid_derived")["state"] == "done"
    assert (tmp_path / "out" / "failed.csv").read_text() == "slide_id,path,reason\n"


def test_half_precision_is_stored_as_half(slides, whole, tmp_path):
    tokenize(slides / "s0.tif", "--output", tmp_path / "out", "--precision", "bf16")
    half, plain = (bag(folder, "s0")[0] for folder in (tmp_path / "out", whole))
    assert half.dtype == np.float16 and plain.dtype == np.float32
    error = np.abs(half.astype(float) - plain).max() / np.abs(plain).max()
    assert 0 < error < 0.05


@pytest.mark.parametrize("layout", ["trident", "clam", "stamp"])
def test_the_neighbours_layouts_hold_the_same_features(layout, slides, whole, tmp_path):
    tokenize(slides, "--output", tmp_path / "out", "--layout", layout)
    plain, xy, _, _ = bag(whole, "s1")
    place = {"clam": "features/h5_files/s1.h5"}.get(layout, "features/s1.h5")
    with h5py.File(tmp_path / "out" / place) as file:
        if layout == "stamp":
            np.testing.assert_array_equal(file["feats"][()], plain.astype(np.float16))
            np.testing.assert_array_equal(file["coords"][()], (xy * 0.5).astype(np.float32))
            assert file.attrs["unit"] == "um" and file.attrs["tile_size_um"] == 64
        else:
            np.testing.assert_array_equal(file["features"][()], plain)
            np.testing.assert_array_equal(file["coords"][()], xy)
    if layout == "clam":
        tensor = torch.load(tmp_path / "out" / "features" / "pt_files" / "s1.pt", weights_only=True)
        np.testing.assert_array_equal(tensor.numpy(), plain)
        # a file that went missing is made again
        (tmp_path / "out" / "features" / "pt_files" / "s1.pt").unlink()
    else:
        assert open_bags(tmp_path / "out" / "features").ids == ("s0", "s1", "s2")
    said = tokenize(slides, "--output", tmp_path / "out", "--layout", layout)
    assert f"3 slides, {2 if layout == 'clam' else 3} of them done" in said.err


def test_the_outline_is_drawn_where_the_tissue_ends(whole, slides):
    drawn = np.asarray(Image.open(whole / "thumbnails" / "s0.jpg")).astype(int)
    assert drawn.shape == (512, 768, 3)
    blue = (drawn[..., 2] > 180) & (drawn[..., 0] < 90)
    with open_slide(slides / "s0.tif") as slide:
        tissue = find_tissue(slide)
    rows, columns = np.nonzero(blue)
    for found, cells, side in ((columns, tissue.mask.any(0), 768), (rows, tissue.mask.any(1), 512)):
        first, last = np.nonzero(cells)[0][[0, -1]] * tissue.downsample
        assert abs(found.min() - first) <= 3 and abs(found.max() - min(last + tissue.downsample, side)) <= 4
    # a line, and nothing inside it
    assert not blue[200:300, 300:500].any()


# Which slides, and what of them


def test_shards_divide_the_slides_whatever_else_there_is():
    jobs = [SlideJob(f"slide {k}", None) for k in range(300)]
    for n in (1, 2, 7):
        parts = [shard_of(jobs, (i, n)) for i in range(1, n + 1)]
        assert sorted(j.slide_id for part in parts for j in part) == sorted(j.slide_id for j in jobs)
        assert all(abs(len(part) - 300 / n) < 5 * (300 / n) ** 0.5 for part in parts)
        assert [j.slide_id for j in shard_of(jobs[::-1], (1, n))] == [j.slide_id for j in parts[0]][::-1]
        # slides that others do not see move nothing
        assert shard_of(jobs[:100], (1, n)) == [j for j in parts[0] if j in jobs[:100]]


def test_two_shards_make_what_one_process_makes(slides, whole, tmp_path):
    for part in ("2/2", "1/2"):
        said = tokenize(slides, "--output", tmp_path / "out", "--shard", part)
        assert f"of shard {part} (3 in all)" in said.err
    assert features(tmp_path / "out") == features(whole)
    assert [r.slide_id for r in all_records(tmp_path / "out")] == ["s0", "s1", "s2"]
    assert "3 slides: 3 tokenized" in (tmp_path / "out" / "summary.md").read_text()


def test_a_table_names_slides_and_resolutions(tmp_path, slides, whole):
    folder = slides_in(tmp_path / "slides", mpp=None)
    write_slide(folder / "own.tif", 9, mpp=0.5)
    table = tmp_path / "list.csv"
    table.write_text("wsi,mpp\ns0.tif,0.5\ns1.tif,\nown.tif,0.25\n")
    tokenize(folder, "--list", table, "--output", tmp_path / "out", "--mpp", "1")
    assert sorted(features(tmp_path / "out")) == ["own.h5", "s0.h5", "s1.h5"]
    # the table's word, then the slide's, then --mpp
    assert [bag(tmp_path / "out", n)[2]["level0_mpp"] for n in ("s0", "s1", "own")] == [0.5, 1.0, 0.25]
    np.testing.assert_array_equal(bag(tmp_path / "out", "s0")[0], bag(whole, "s0")[0])
    # the slide that says its own resolution does not take that of --mpp
    tokenize(folder / "own.tif", "--output", tmp_path / "more", "--mpp", "1")
    assert bag(tmp_path / "more", "own")[2]["level0_mpp"] == 0.5
    said = tokenize(folder / "own.tif", "--output", tmp_path / "more", "--mpp", "2")
    assert "1 slides, 1 of them done" in said.err


def test_tables_that_cannot_be_understood_are_refused(tmp_path, slides):
    table = tmp_path / "list.csv"
    words = (slides, "--list", table, "--output", tmp_path / "out", *QUICK)
    for text, message in (
        ("path,mpp\ns0.tif,1\n", "needs a column wsi; its columns are path, mpp"),
        ("wsi\nmissing.tif\n", "1 slides of"),
        ("wsi,mpp\ns0.tif,-1\n", "line 2: mpp is a positive number of micrometres per pixel, got '-1'"),
        ("wsi\n", "names no slides"),
    ):
        table.write_text(text)
        assert message in refused("tokenize", *words)
    table.unlink()
    assert "cannot be read: No such file" in refused("tokenize", *words)
    assert not (tmp_path / "out").exists()


def test_the_side_of_a_tile_is_given_in_micrometres_or_by_resolution(slides, whole, tmp_path):
    tokenize(slides / "s0.tif", "--output", tmp_path / "um", "--tile-um", "64")
    np.testing.assert_array_equal(bag(tmp_path / "um", "s0")[0], bag(whole, "s0")[0])
    tokenize(slides / "s0.tif", "--output", tmp_path / "more", "--tile-um", "32", "--overlap", "64")
    _, xy, said, coords = bag(tmp_path / "more", "s0")
    assert said["tile_size_um"] == 32 and coords["patch_size_level0"] == 64 and coords["overlap"] == 64
    assert set(np.diff(np.unique(xy[:, 0]))) == {32}
    message = refused("tokenize", slides, "--output", tmp_path / "x", *QUICK, "--tile-um", "64", "--tile-mpp", "1")
    assert "128 px of 1.0 um are 128 um and not --tile-um 64" in message


# Tissue


def test_tissue_alone_is_found_edited_and_used(slides, whole, tmp_path):
    out = tmp_path / "out"
    said = sansmax("tokenize", slides, "--output", out, "--mask-only")
    assert said.status == 0 and "3 with their tissue found" in said.out, said
    assert features(out) == {} and record(out, "s0")["state"] == "masked"
    with open_slide(slides / "s1.tif") as slide:
        found = find_tissue(slide)
        known = read_tissue(out / "tissue" / "s1.geojson", slide.size, found.downsample)
    np.testing.assert_array_equal(known.mask, found.mask)
    said = sansmax("tokenize", slides, "--output", out, "--mask-only")
    assert "3 slides, 3 of them done" in said.err
    tokenize(slides, "--output", out)
    assert features(out) == features(whole)
    # as a pathologist leaves it
    square = [[256, 128], [512, 128], [512, 384], [256, 384], [256, 128]]
    drawn = {"type": "Polygon", "coordinates": [square]}
    edited = {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": drawn, "properties": {}}]}
    (out / "tissue" / "s1.geojson").write_text(json.dumps(edited))
    said = tokenize(slides, "--output", out)
    assert "3 slides, 2 of them done" in said.err
    _, xy, _, _ = bag(out, "s1")
    assert xy.tolist() == [[256, 128], [384, 128], [256, 256], [384, 256]]
    # finding tissue again takes neither the edited outline nor the features
    (out / "thumbnails" / "s1.jpg").unlink()
    assert sansmax("tokenize", slides, "--output", out, "--mask-only").status == 0
    assert json.loads((out / "tissue" / "s1.geojson").read_text()) == edited
    assert record(out, "s1")["state"] == "done"
    assert "3 slides, 3 of them done" in tokenize(slides, "--output", out).err

    # the same from a folder of its own
    shutil.copytree(out / "tissue", tmp_path / "edited")
    tokenize(slides, "--output", tmp_path / "other", "--tissue", tmp_path / "edited")
    assert features(tmp_path / "other") == features(out)
    (tmp_path / "edited" / "s2.geojson").unlink()
    said = tokenize(slides, "--output", tmp_path / "third", "--tissue", tmp_path / "edited", status=1)
    assert f"s2: failed: there is no {tmp_path}/edited/s2.geojson" in said.err


def test_a_slide_without_tissue_gives_an_empty_bag(tmp_path):
    write_slide(tmp_path / "blank.tif", tissue=False)
    said = tokenize(tmp_path / "blank.tif", "--output", tmp_path / "out")
    made, xy, _, _ = bag(tmp_path / "out", "blank")
    assert made.shape == (0, 64) and xy.shape == (0, 2)
    assert "blank: no tissue, an empty bag" in said.err
    assert "1 without tissue" in said.out and "| blank | empty | 0 |" in (tmp_path / "out" / "summary.md").read_text()
    assert "1 slides, 1 of them done" in tokenize(tmp_path / "blank.tif", "--output", tmp_path / "out").err


# One bad slide


def test_bad_slides_are_listed_and_the_others_done(slides, whole, tmp_path):
    folder = tmp_path / "slides"
    shutil.copytree(slides, folder)
    bytes_ = (slides / "s1.tif").read_bytes()
    (folder / "s1.tif").write_bytes(bytes_[: len(bytes_) // 2])
    (folder / "t.png").write_bytes(b"no picture")
    write_slide(folder / "u.tif", 5, mpp=None)
    said = tokenize(folder, "--output", tmp_path / "out", status=1)
    assert "Traceback" not in said.err and "3 slides failed; the same command tries them again" in said.err
    with (tmp_path / "out" / "failed.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["slide_id"] for r in rows] == ["s1", "t", "u"]
    assert all(
        r["path"] == str(folder / f"{r['slide_id']}{s}") for r, s in zip(rows, (".tif", ".png", ".tif"), strict=True)
    )
    assert all(r["reason"] for r in rows) and "--mpp" in rows[2]["reason"]
    assert set(features(tmp_path / "out")) == {"s0.h5", "s2.h5"}
    assert features(tmp_path / "out")["s2.h5"] == features(whole)["s2.h5"]
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert "5 slides: 2 tokenized" in summary and "3 failed" in summary
    # mended, they are done, and only they
    (folder / "s1.tif").write_bytes(bytes_)
    (folder / "t.png").unlink()
    said = tokenize(folder, "--output", tmp_path / "out", "--mpp", "0.5")
    assert "4 slides, 2 of them done" in said.err
    assert features(tmp_path / "out")["s1.h5"] == features(whole)["s1.h5"]


def test_a_fault_in_one_slide_does_not_end_the_others(slides, tmp_path, monkeypatch):
    real_grid = tokenize_slide.tile_grid

    def grid(slide, *args, **how):
        if slide.name == "s0":
            raise IndexError("surprise")
        warnings.warn(f"{slide.name}: level 1 cannot be read", stacklevel=1)
        return real_grid(slide, *args, **how)

    monkeypatch.setattr(tokenize_slide, "tile_grid", grid)
    said = tokenize(slides, "--output", tmp_path / "out", status=1)
    assert "s0: failed: IndexError: surprise" in said.err
    assert set(features(tmp_path / "out")) == {"s1.h5", "s2.h5"}
    # what libraries warn of is in the records
    assert record(tmp_path / "out", "s1")["warnings"] == ["s1: level 1 cannot be read"]
    assert "s1: s1: level 1 cannot be read" in said.err


def test_features_that_are_no_numbers_are_refused(slides, tmp_path, monkeypatch):
    real_encode = Encoder.encode

    def encode(self, tiles, pad_to=0):
        made = real_encode(self, tiles, pad_to)
        made[:1] *= 1e6 if large else np.nan
        return made

    monkeypatch.setattr(Encoder, "encode", encode)
    large = False
    said = tokenize(slides / "s0.tif", "--output", tmp_path / "out", status=1)
    assert re.search(r"1 of \d+ tiles have features that are NaN or infinite; give --precision fp32", said.err)
    large = True
    said = tokenize(slides / "s0.tif", "--output", tmp_path / "out", "--dtype", "float16", status=1)
    assert "do not fit into float16" in said.err and "--dtype float32" in said.err
    assert features(tmp_path / "out") == {}


# Wrong input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shard", "0/2"), "counted from 1"),
        (("--shard", "3/2"), "counted from 1"),
        (("--overlap", "128"), "--overlap is from 0 to less than the 128 px"),
        (("--min-tissue", "2"), "--min-tissue is a share from 0 to 1"),
        (("--tile-mpp", "0"), "a resolution above 0"),
        (("--mpp", "-1"), "--mpp is a positive number"),
        (("--layout", "tridnet"), "did you mean 'trident'"),
        (("--layout", "clam", "--dtype", "float16"), "the layout clam keeps features as float32, got --dtype float16"),
        (("--engine", "spark"), "unknown engine 'spark': allowed are local, ray"),
        (("--batch-size", "0"), "--batch-size is at least 1"),
        (("--tissue", "nowhere"), "--tissue nowhere is no folder"),
        (("--precision", "fp16"), "did you mean 'bf16' or 'fp32'"),
    ],
)
def test_wrong_options_are_named_before_anything_is_done(words, message, slides, tmp_path):
    assert message in refused("tokenize", slides, "--output", tmp_path / "out", *QUICK, *words)
    assert not (tmp_path / "out").exists()


def test_folders_that_hold_something_else_are_left_alone(slides, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert "is not empty and holds no tokenized slides" in refused("tokenize", slides, "--output", tmp_path, *QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    message = refused("tokenize", slides, "--output", tmp_path / "notes.txt", *QUICK)
    assert "is a file; give a folder" in message
    assert "--encoder NAME" in refused("tokenize", slides, "--output", tmp_path / "out")
    assert "--output DIR" in refused("tokenize", slides)
    assert "name slides" in refused("tokenize", "--output", tmp_path / "out", *QUICK)


def test_slides_of_one_name_are_both_listed(slides, tmp_path):
    shutil.copy(slides / "s0.tif", tmp_path / "s0.tif")
    message = refused("tokenize", slides, tmp_path / "s0.tif", "--output", tmp_path / "out", *QUICK)
    assert str(slides / "s0.tif") in message and str(tmp_path / "s0.tif") in message


def test_shards_are_parsed():
    assert parse_shard("2/8") == (2, 8)
    for text in ("2", "a/b", "", "1/0", "-1/3"):
        with pytest.raises(InputError):
            parse_shard(text)
