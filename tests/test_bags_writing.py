"""Bags are written as the neighbours define their files, there and back without loss, and losses are said."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from bag_files import attributes, drawn, write_clam, write_stamp, write_trident

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.layouts import WRITTEN, layout_named
from sansmax.data.bags.reading import read_bag, recognise
from sansmax.data.bags.writing import write_bag
from sansmax.errors import InputError


def full(tokens=40, width=24, **changed):
    """A bag of which everything is known, at 40x with tiles of 256 pixels at half a micrometre."""
    features, xy = drawn(tokens, width)
    said = {"xy": xy, "tile_level0": 512.0, "mpp": 0.25, "slide_size": (30000, 20000), "encoder": "uni_v2"}
    more = {"encoder_revision": "abc1", "transform": "Resize(224)", "tile_px": 256, "settings": {"overlap": [0, 1.5]}}
    return Bag("s", features, **{**said, "attributes": more, **changed})


def test_own_files_hold_both_families_of_attributes(tmp_path):
    bag = full()
    assert write_bag(bag, tmp_path / "s.h5") == []
    with h5py.File(tmp_path / "s.h5") as file:
        assert set(file) == {"features", "coords", "coords_um"}
        # in one piece: an offset, and no chunks
        assert file["features"].chunks is None and file["features"].id.get_offset() > 0
        np.testing.assert_array_equal(file["features"][()], bag.features)
        np.testing.assert_array_equal(file["coords"][()], bag.xy)
        assert file["coords"].dtype == np.int64 and file["coords_um"].dtype == np.float64
        np.testing.assert_array_equal(file["coords_um"][()], bag.xy * 0.25)
        root, coords = attributes(file), attributes(file["coords"])
    assert root.pop("format_version") == 1
    kept = json.loads(root.pop("attributes"))
    assert kept == bag.attributes
    assert root == {
        "format": "sansmax bag",
        "slide_id": "s",
        "encoder": "uni_v2",
        "encoder_revision": "abc1",
        "transform": "Resize(224)",
        "level0_mpp": 0.25,
        "level0_width": 30000,
        "level0_height": 20000,
        "tile_level0": 512.0,
        "tile_size_um": 128.0,
        "tile_size_px": 256,
        "extractor": "mahmood-uni2",
        "feat_type": "tile",
    }
    # unit 'um' is for STAMP's coords, and these are pixels
    assert "unit" not in root
    assert coords == {
        "patch_size": 256,
        "patch_size_level0": 512,
        "level0_magnification": 40,
        "target_magnification": 20,
        "overlap": 0,
        "name": "s",
        "savetodir": "None",
        "level0_width": 30000,
        "level0_height": 20000,
        "level0_mpp": 0.25,
    }


def same(a, b, *names):
    for name in names:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, np.ndarray):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y, err_msg=name)
        else:
            assert x == y, name


EVERYTHING = ("slide_id", "features", "xy", "xy_um", "tile_level0", "tile_um", "mpp", "slide_size", "encoder")


@pytest.mark.parametrize("tokens", [40, 1, 0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_own_files_give_back_everything(tmp_path, tokens, dtype):
    features, xy = drawn(tokens, dtype=dtype)
    bag = Bag(
        "s", features, xy=xy, tile_level0=447.5, mpp=0.2263, slide_size=(9, 7), encoder="e", attributes={"a": [1, None]}
    )
    write_bag(bag, tmp_path / "s.h5")
    same(read_bag(tmp_path / "s.h5"), bag, *EVERYTHING, "attributes")


def test_micrometres_without_resolution_stay_micrometres(tmp_path):
    features, xy = drawn(9)
    bag = Bag("s", features, xy_um=xy * 0.3137, tile_um=256.0)
    assert write_bag(bag, tmp_path / "s.h5") == []
    back = read_bag(tmp_path / "s.h5")
    same(back, bag, *EVERYTHING)
    assert back.xy is None
    np.testing.assert_array_equal(read_bag(tmp_path / "s.h5", mpp=0.3137).xy, xy)


def test_trident_files_are_tridents(tmp_path):
    bag = full(tokens=3000)
    assert write_bag(bag, tmp_path / "s.h5", "trident") == ["attributes encoder_revision, settings, tile_px, transform"]
    with h5py.File(tmp_path / "s.h5") as file:
        features, coords = file["features"], file["coords"]
        assert features.dtype == np.float32 and coords.dtype == np.int64
        # many tiles in a chunk, and still one that can be appended to
        assert features.chunks == (1024, 24) and features.maxshape == (None, 24)
        np.testing.assert_array_equal(features[()], bag.features)
        np.testing.assert_array_equal(coords[()], bag.xy)
        assert attributes(features) == {"name": "s", "savetodir": "None", "encoder": "uni_v2"}
        said = attributes(coords)
    assert said["patch_size_level0"] == 512 and said["level0_width"] == 30000 and said["target_magnification"] == 20


@pytest.mark.parametrize(
    ("mpp", "magnification"),
    [(0.1, 80), (0.19, 60), (0.2, 40), (0.25, 40), (0.5, 20), (1.0, 10), (2.0, 5), (4.0, "None")],
)
def test_tridents_magnifications_are_binned(tmp_path, mpp, magnification):
    write_bag(full(mpp=mpp), tmp_path / "s.h5", "trident")
    with h5py.File(tmp_path / "s.h5") as file:
        assert attributes(file["coords"])["level0_magnification"] == magnification


def test_clam_files_are_clams(tmp_path):
    bag = full()
    said = write_bag(bag, tmp_path / "h5_files" / "s.h5", "clam")
    assert said == [
        "side of a tile in level-0 pixels",
        "side of a tile in micrometres",
        "micrometres per pixel",
        "size of the slide",
        "name of the encoder",
        "attributes encoder_revision, settings, tile_px, transform",
    ]
    with h5py.File(tmp_path / "h5_files" / "s.h5") as file:
        assert (file["features"].dtype, file["features"].chunks) == (np.float32, (32, 24))
        assert (file["coords"].dtype, file["coords"].chunks) == (np.int32, (32, 2))
        assert not file.attrs and not file["features"].attrs and not file["coords"].attrs
        np.testing.assert_array_equal(file["features"][()], bag.features)
        np.testing.assert_array_equal(file["coords"][()], bag.xy)
    tensor = torch.load(tmp_path / "pt_files" / "s.pt", weights_only=True)
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), bag.features)


def test_stamp_files_are_stamps(tmp_path):
    bag = full()
    said = write_bag(bag, tmp_path / "s.h5", "stamp")
    assert "digits of the features (float32 to float16)" in said and "micrometres per pixel" in said
    with h5py.File(tmp_path / "s.h5") as file:
        assert set(file) == {"feats", "coords"}
        assert file["feats"].dtype == np.float16 and file["coords"].dtype == np.float32
        assert file["feats"].chunks is None and file["coords"].chunks is None
        np.testing.assert_array_equal(file["feats"][()], bag.features.astype(np.float16))
        np.testing.assert_array_equal(file["coords"][()], (bag.xy * 0.25).astype(np.float32))
        assert attributes(file) == {
            "stamp_version": "2.1.0",
            "extractor": "mahmood-uni2",
            "unit": "um",
            "tile_size_um": 128.0,
            "tile_size_px": 256,
            "feat_type": "tile",
        }


def test_extractors_that_stamp_does_not_know_are_said(tmp_path):
    words = "name of the encoder in STAMP's words (resnet50 is none of them, and its slide encoders refuse it)"
    assert words in write_bag(full(encoder="resnet50"), tmp_path / "s.h5", "stamp")
    assert not [said for said in write_bag(full(), tmp_path / "t.h5", "stamp") if "words" in said]


def test_gigapath_files_hold_two_arrays(tmp_path):
    bag = full()
    write_bag(bag, tmp_path / "s.h5", "gigapath")
    with h5py.File(tmp_path / "s.h5") as file:
        assert set(file) == {"features", "coords"} and file["features"].dtype == np.float32
        np.testing.assert_array_equal(file["features"][()], bag.features)
        np.testing.assert_array_equal(file["coords"][()], bag.xy)


def test_plain_files_hold_the_features(tmp_path):
    bag = full()
    assert "coordinates in level-0 pixels" in write_bag(bag, tmp_path / "s.pt", "pt")
    write_bag(bag, tmp_path / "s.npy", "npy")
    tensor = torch.load(tmp_path / "s.pt", weights_only=True)
    np.testing.assert_array_equal(tensor.numpy(), bag.features)
    # the tensor's own numbers, not those of a larger storage
    assert tensor.untyped_storage().nbytes() == bag.features.nbytes
    np.testing.assert_array_equal(np.load(tmp_path / "s.npy"), bag.features)


def contents(path):
    """All that lies in an HDF5 file: arrays with their dtypes, and every attribute."""
    with h5py.File(path) as file:
        parts = {name: (file[name].dtype, file[name][()].tolist(), attributes(file[name])) for name in file}
        return parts, attributes(file)


def test_trident_survives_the_way_through_own_files(tmp_path):
    features, xy = drawn(33)
    old = write_trident(tmp_path / "job" / "s.h5", features, xy, level0_width=None)
    write_bag(read_bag(old), tmp_path / "own" / "s.h5")
    assert write_bag(read_bag(tmp_path / "own" / "s.h5"), tmp_path / "back" / "s.h5", "trident") == []
    assert contents(tmp_path / "back" / "s.h5") == contents(old)


def test_stamp_survives_the_way_through_own_files(tmp_path):
    features, xy = drawn(33)
    old = write_stamp(tmp_path / "in" / "s.h5", features, xy * 0.2273)
    # a resolution makes pixels, rounded; the micrometres stay as they were
    for mpp in (None, 0.2273):
        write_bag(read_bag(old, mpp=mpp), tmp_path / "own" / "s.h5")
        write_bag(read_bag(tmp_path / "own" / "s.h5"), tmp_path / "back" / "s.h5", "stamp")
        assert contents(tmp_path / "back" / "s.h5") == contents(old)


def test_clam_survives_the_way_through_own_files(tmp_path):
    features, xy = drawn(70)
    old = write_clam(tmp_path / "in", "s", features, xy)
    write_bag(read_bag(old), tmp_path / "own" / "s.h5")
    write_bag(read_bag(tmp_path / "own" / "s.h5"), tmp_path / "back" / "h5_files" / "s.h5", "clam")
    assert contents(tmp_path / "back" / "h5_files" / "s.h5") == contents(old)
    tensors = [torch.load(tmp_path / name / "pt_files" / "s.pt", weights_only=True) for name in ("in", "back")]
    assert torch.equal(*tensors)


def test_pixels_of_micrometres_are_rounded_and_that_is_said(tmp_path):
    features, xy = drawn(20)
    bag = Bag("s", features.astype(np.float16), xy_um=(xy + 0.25) * 0.5, tile_um=128.0, mpp=0.5, encoder="e")
    said = write_bag(bag, tmp_path / "s.h5", "trident")
    assert said == ["parts of pixels of the coordinates (up to 0.25 px)"]
    np.testing.assert_array_equal(read_bag(tmp_path / "s.h5").xy, xy)


@pytest.mark.parametrize("layout", WRITTEN)
@pytest.mark.parametrize("tokens", [0, 1, 50])
def test_every_layout_reads_what_it_wrote(tmp_path, layout, tokens):
    bag = full(tokens)
    path = tmp_path / layout_named(layout).place.format("s")
    write_bag(bag, path, layout)
    back = read_bag(path)
    assert recognise(path).layout == layout
    names = {"xy", "xy_um", "tile_level0", "tile_um", "mpp", "slide_size", "encoder"} & layout_named(layout).holds
    np.testing.assert_allclose(back.features, bag.features, atol=2e-3)
    if layout != "stamp":
        np.testing.assert_array_equal(back.features, bag.features)
        same(back, bag, *names)
    else:
        np.testing.assert_array_equal(back.xy_um, bag.xy_um)
        assert back.encoder == "mahmood-uni2"


@pytest.mark.parametrize(
    ("layout", "changed", "words"),
    [
        ("stamp", {"mpp": None}, "not in its file; give --mpp or --mpp-table"),
        ("stamp", {"tile_level0": None}, "give --tile-level0 and --mpp"),
        ("stamp", {"encoder": None}, "give --encoder NAME"),
        ("trident", {"tile_level0": None}, "side of a tile.*give --tile-level0 or --patches"),
        ("trident", {"xy": None, "mpp": None}, "needs coordinates in level-0 pixels"),
        ("clam", {"xy": None, "mpp": None, "xy_um": np.zeros((40, 2))}, "--mpp or --mpp-table"),
        ("gigapath", {"xy": None, "mpp": None}, "--layout pt"),
        ("clam", {"xy": np.full((40, 2), 2**31)}, "beyond 2"),
        ("slideflow", {}, "only read; written are sansmax"),
        ("trydent", {}, "did you mean 'trident'"),
    ],
)
def test_what_a_layout_needs_is_asked_for(tmp_path, layout, changed, words):
    with pytest.raises(InputError, match=words):
        write_bag(full(**changed), tmp_path / "h5_files" / "s.h5", layout)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_numbers_beyond_float16_are_refused(tmp_path):
    bag = full()
    bag.features[2, 3] = 70000
    with pytest.raises(InputError, match=r"1 numbers.*up to 70000.*float16.*--dtype float32"):
        write_bag(bag, tmp_path / "s.h5", dtype="float16")
    with pytest.raises(InputError, match="clam keeps features as float32, got 'float16'"):
        write_bag(bag, tmp_path / "s.h5", "clam", dtype="float16")
    write_bag(bag, tmp_path / "s.h5", dtype="float32")
    assert read_bag(tmp_path / "s.h5").features[2, 3] == 70000


def test_nan_is_not_written_unless_it_is_allowed(tmp_path):
    bag = full()
    bag.features[0] = np.nan
    with pytest.raises(InputError, match="1 of 40 tiles"):
        write_bag(bag, tmp_path / "s.h5")
    write_bag(bag, tmp_path / "s.h5", allow_nan=True)
    assert np.isnan(read_bag(tmp_path / "s.h5", allow_nan=True).features[0]).all()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    write_bag(full(), tmp_path / "s.h5")
    before = (tmp_path / "s.h5").read_bytes()
    monkeypatch.setattr("sansmax.data.bags.trident.coords_attributes", lambda bag: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_bag(full(7), tmp_path / "s.h5")
    assert (tmp_path / "s.h5").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["s.h5"]


def test_float64_becomes_float32_and_that_is_said(tmp_path):
    features, xy = drawn(6, dtype=np.float64)
    assert write_bag(Bag("s", features, xy=xy), tmp_path / "s.h5") == ["digits of the features (float64 to float32)"]
    np.testing.assert_array_equal(read_bag(Path(tmp_path / "s.h5")).features, features.astype(np.float32))
