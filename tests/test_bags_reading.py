"""Bags of the neighbours are read as their formats are defined, and what is no bag is refused with words."""

import json
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

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.contents import open_contents
from sansmax.data.bags.finite import all_finite
from sansmax.data.bags.reading import read_bag, read_header, recognise
from sansmax.data.bags.writing import write_bag
from sansmax.errors import InputError


def test_trident_says_everything_in_level0_pixels(tmp_path):
    features, xy = drawn(37)
    bag = read_bag(write_trident(tmp_path / "s.one.h5", features, xy))
    np.testing.assert_array_equal(bag.features, features)
    np.testing.assert_array_equal(bag.xy, xy)
    assert bag.xy.dtype == np.int64
    # 512 at level 0, though the tiles are 256 pixels at their magnification
    assert (bag.slide_id, bag.tile_level0, bag.encoder, bag.layout) == ("s.one", 512, "uni_v2", "trident")
    assert bag.slide_size == (30000, 20000)
    np.testing.assert_array_equal(bag.grid, xy // 512)
    # magnifications are binned: no resolution follows from them
    assert bag.mpp is None and bag.xy_um is None
    known = read_bag(tmp_path / "s.one.h5", mpp=0.2528)
    np.testing.assert_allclose(known.xy_um, xy * 0.2528, rtol=1e-12)
    assert known.tile_um == 512 * 0.2528


def test_tridents_none_is_a_word(tmp_path):
    path = write_trident(tmp_path / "s.h5", *drawn(3), encoder="None", level0_width=None, level0_height="None")
    bag = read_bag(path)
    assert bag.slide_size is None and bag.encoder is None
    assert bag.attributes["trident"]["coords"]["level0_width"] is None


@pytest.mark.parametrize("shape", [(0,), (0, 8)])
def test_tridents_slide_without_tissue_is_an_empty_bag(tmp_path, shape):
    path = write_trident(tmp_path / "s.h5", *drawn(0))
    with h5py.File(path, "a") as file:
        said = dict(file["features"].attrs)
        del file["features"]
        file["features"] = np.zeros(shape, np.float32)
        file["features"].attrs.update(said)
    bag = read_bag(path)
    assert bag.features.shape == (0, shape[-1]) and bag.xy.shape == (0, 2)
    assert bag.remarks == ("no tiles",)
    assert read_header(path)[1:4] == (0, 8 if len(shape) == 2 else None, "uni_v2")


@pytest.mark.parametrize("tile", [512, 2048], ids=["beside the features", "in a folder of their own"])
def test_clams_tiles_are_sized_by_its_patches(tmp_path, tile):
    features, xy = drawn(40, side=2048)
    path = write_clam(tmp_path / "features", "s1", features, xy)
    place = tmp_path / "features" / "patches" if tile == 512 else tmp_path / "elsewhere"
    # patch_size is of a level of the pyramid, level 0 is what counts
    write_clam_patches(place / "s1.h5", xy, patch_size=tile // 4, downsample=4.0)
    bag = read_bag(path, patches=None if tile == 512 else place)
    np.testing.assert_array_equal(bag.features, features)
    np.testing.assert_array_equal(bag.xy, xy)
    assert bag.tile_level0 == tile and bag.layout == "clam" and not bag.remarks


def test_clams_tiles_without_patches_are_sized_by_their_spacing(tmp_path):
    features, xy = drawn(300, side=448)
    # a second piece of tissue, with a grid of its own
    xy[150:] += [13, 101]
    bag = read_bag(write_clam(tmp_path, "s", features, xy))
    assert bag.tile_level0 == 448
    assert "spacing" in bag.remarks[0]
    assert read_bag(tmp_path / "h5_files" / "s.h5", tile_level0=512).tile_level0 == 512


def test_pieces_of_tissue_that_meet_by_chance_do_not_make_small_tiles(tmp_path):
    left = np.array([[x, y] for x in range(10) for y in range(12)]) * 448
    # the same rows, and one column begins within the last of the other piece
    right = left + [9 * 448 + 100, 0]
    features, xy = drawn(240)[0], np.concatenate([left, right])
    assert read_bag(write_clam(tmp_path, "s", features, xy)).tile_level0 == 448


def test_clams_killed_extraction_is_noticed_by_its_patches(tmp_path):
    features, xy = drawn(64)
    path = write_clam(tmp_path, "s", features[:32], xy[:32])
    write_clam_patches(tmp_path / "patches" / "s.h5", xy)
    with pytest.raises(InputError, match=r"features of 32 tiles.*lists 64.*Extract this slide again"):
        read_bag(path)


def test_clams_tensor_has_no_places(tmp_path):
    features, xy = drawn(20)
    write_clam(tmp_path, "s", features, xy)
    bag = read_bag(tmp_path / "pt_files" / "s.pt")
    np.testing.assert_array_equal(bag.features, features)
    assert bag.xy is None and bag.grid is None and bag.layout == "pt"


def test_stamp_is_in_micrometres(tmp_path):
    features, xy = drawn(25)
    bag = read_bag(write_stamp(tmp_path / "s.h5", features, xy * 0.5))
    np.testing.assert_array_equal(bag.features, features.astype(np.float16))
    np.testing.assert_array_equal(bag.xy_um, xy * 0.5)
    assert (bag.tile_um, bag.encoder, bag.mpp, bag.xy) == (256, "mahmood-uni2", None, None)
    np.testing.assert_array_equal(bag.grid, xy // 512)
    known = read_bag(tmp_path / "s.h5", mpp=0.5)
    np.testing.assert_array_equal(known.xy, xy)
    assert known.tile_level0 == 512


def test_stamps_version_2_0_calls_the_tile_otherwise(tmp_path):
    features, xy = drawn(25)
    path = write_stamp(tmp_path / "s.h5", features, xy * 0.5, tile_size_um=None, tile_size=224.0, feat_type=None)
    bag = read_bag(path)
    assert bag.tile_um == 224
    np.testing.assert_array_equal(bag.xy_um, xy * 0.5)


@pytest.mark.parametrize("said", [None, 224], ids=["by its spacing", "by its attribute"])
def test_stamps_version_1_is_in_pixels_of_224_per_tile(tmp_path, said):
    features, cells = drawn(25, side=1)
    path = write_stamp(tmp_path / "s.h5", features, cells * 224, unit=None, tile_size_um=None, tile_size=said)
    bag = read_bag(path)
    assert bag.tile_um == 256
    np.testing.assert_array_equal(bag.xy_um, cells * 256.0)


def test_stamps_coordinates_of_no_unit_are_refused(tmp_path):
    features, xy = drawn(25)
    path = write_stamp(tmp_path / "s.h5", features, xy, unit=None, tile_size_um=None)
    with pytest.raises(InputError, match=r"does not say the unit.*512 apart"):
        read_bag(path)


def test_stamps_patch_embeddings_have_no_places(tmp_path):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["patch_embeddings"] = drawn(9)[0]
    bag = read_bag(tmp_path / "s.h5")
    assert bag.features.shape == (9, 8) and bag.xy_um is None and bag.layout == "stamp"


@pytest.mark.parametrize("kind", ["slide", "patient"])
@pytest.mark.parametrize("shape", [(16,), (1, 16)])
def test_stamps_embeddings_of_slides_and_patients_are_refused(tmp_path, kind, shape):
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["feats"] = np.ones(shape)
        file.attrs.update({"feat_type": kind, "encoder": "titan", "version": "2.5.0"})
    with pytest.raises(InputError, match=f"one embedding of a whole {kind}.*stamp preprocess"):
        recognise(tmp_path / "s.h5")


def test_gigapath_has_features_and_places_only(tmp_path):
    features, xy = drawn(30, width=16, side=256)
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file["features"], file["coords"] = features, xy
    bag = read_bag(tmp_path / "s.h5")
    np.testing.assert_array_equal(bag.features, features)
    np.testing.assert_array_equal(bag.xy, xy)
    assert bag.layout == "gigapath" and bag.tile_level0 == 256


def test_slideflow_gives_centres(tmp_path):
    features, corners = drawn(30, side=600)
    torch.save(torch.from_numpy(features), tmp_path / "s.pt")
    np.savez(tmp_path / "s.index.npz", corners + 300)
    said = {"extractor": {"class": "resnet50_imagenet", "kwargs": {}}, "num_features": 8, "tile_um": 302}
    (tmp_path / "bags_config.json").write_text(json.dumps(said))
    bag = read_bag(tmp_path / "s.pt")
    assert (bag.layout, bag.encoder, bag.tile_level0) == ("slideflow", "resnet50_imagenet", 600)
    np.testing.assert_array_equal(bag.xy, corners)
    # with the resolution the side follows from micrometres: 302 / 0.5
    np.testing.assert_array_equal(read_bag(tmp_path / "s.pt", mpp=0.5).xy, corners - 2)


@pytest.mark.parametrize("name", ["tensor", "bfloat16", "dictionary", "before zip", "npy", "npz", "batch of one"])
def test_plain_files_are_read(tmp_path, name):
    features, xy = drawn(12)
    expected, places = features, None
    path = tmp_path / ("s.npz" if name == "npz" else "s.npy" if name == "npy" else "s.pt")
    tensor = torch.from_numpy(features)
    if name == "bfloat16":
        tensor = tensor.bfloat16()
        expected = tensor.float().numpy()
    if name == "npy":
        np.save(path, features)
    elif name == "npz":
        np.savez_compressed(path, features=features, coords=xy)
        places = xy
    elif name == "dictionary":
        torch.save({"features": tensor, "coords": torch.from_numpy(xy), "name": "s"}, path)
        places = xy
    else:
        torch.save(
            tensor[None] if name == "batch of one" else tensor,
            path,
            _use_new_zipfile_serialization=name != "before zip",
        )
    bag = read_bag(path)
    np.testing.assert_array_equal(bag.features, expected)
    if places is None:
        assert bag.xy is None
    else:
        np.testing.assert_array_equal(bag.xy, places)
    assert read_header(path)[1:3] == (12, 8)


def test_files_are_told_by_their_contents_not_their_names(tmp_path):
    features, xy = drawn(5)
    write_trident(tmp_path / "s.pt", features, xy)
    torch.save(torch.from_numpy(features), tmp_path / "s.h5")
    assert recognise(tmp_path / "s.pt").layout == "trident"
    assert recognise(tmp_path / "s.h5").layout == "pt"
    with pytest.raises(InputError, match=r"not of the layout clam but trident"):
        read_bag(tmp_path / "s.pt", layout="clam")


def refused(tmp_path, kind):
    """A file that is no bag of tiles, and what is said of it."""
    features, xy = drawn(50, width=64)
    path = tmp_path / "s.h5"
    if kind == "torn":
        write_trident(path, features, xy)
        os.truncate(path, path.stat().st_size // 2)
        return path, r"damaged, or was not written to its end.*truncated"
    if kind == "torn tensor":
        torch.save(torch.from_numpy(features), path)
        os.truncate(path, path.stat().st_size // 2)
        return path, "damaged, or was not written to its end"
    if kind == "torn array":
        path = tmp_path / "s.npy"
        np.save(path, features)
        os.truncate(path, path.stat().st_size // 2)
        return path, "damaged, or was not written to its end"
    if kind == "empty":
        path.touch()
        return path, "is empty"
    if kind == "text":
        path.write_text("slide_id,label\n")
        return path, "neither HDF5, nor of torch.save"
    if kind == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
        return path, "git lfs pull"
    if kind == "CLAM's patches":
        return write_clam_patches(path, xy), r"coordinates of tiles \(CLAM's patches\), no features.*sansmax tokenize"
    if kind == "TRIDENT's patches":
        write_trident_patches(path, xy)
        return path, "TRIDENT's coordinates of tiles, no features.*--task feat"
    if kind == "TRIDENT's slide":
        write_trident_slide(path)
        return path, "one embedding of the whole slide.*slide_features_"
    if kind == "row":
        torch.save(torch.ones(16), path)
        return path, "an embedding of a whole slide"
    if kind == "counts":
        return write_trident(path, features, xy[:-1]), r"\(49, 2\) for 50 features.*Run it again"
    if kind == "integers":
        np.save(tmp_path / "s.npy", xy)
        return tmp_path / "s.npy", "int64; features are floating-point"
    with h5py.File(path, "w") as file:
        file["images"] = np.zeros((3, 4))
    return path, r"images \(3, 4\).*named features"


KINDS = ["torn", "torn tensor", "torn array", "empty", "text", "pointer", "CLAM's patches", "TRIDENT's patches"]
KINDS += ["TRIDENT's slide", "row", "counts", "integers", "other"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_bag_is_refused_with_words(tmp_path, kind):
    path, words = refused(tmp_path, kind)
    with pytest.raises(InputError, match=words):
        read_bag(path)


def test_a_file_that_is_torn_between_its_chunks_is_refused(tmp_path):
    features, xy = drawn(600, width=64)
    path = write_trident(tmp_path / "s.h5", features, xy)
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(b"\0" * (path.stat().st_size // 2))
    with pytest.raises(InputError, match="damaged"):
        read_bag(path)


class Stranger:
    """What would run on loading."""

    def __reduce__(self):
        return os.mkdir, (os.environ["BAGS_STRANGER"],)


@pytest.mark.parametrize("trust", [False, True])
def test_code_in_a_tensor_file_is_never_run(tmp_path, monkeypatch, trust):
    monkeypatch.setenv("BAGS_STRANGER", str(tmp_path / "ran"))
    torch.save({"features": torch.ones(3, 2), "more": Stranger()}, tmp_path / "s.pt")
    with pytest.raises(InputError, match="asks for code to be run"):
        read_bag(tmp_path / "s.pt", trust_numpy=trust)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_numpy_in_a_tensor_file_is_read_only_when_it_is_allowed(tmp_path, dtype):
    features, _ = drawn(7, dtype=dtype)
    torch.save(features, tmp_path / "s.pt")
    with pytest.raises(InputError, match="--trust-numpy"):
        read_bag(tmp_path / "s.pt")
    np.testing.assert_array_equal(read_bag(tmp_path / "s.pt", trust_numpy=True).features, features)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_no_numbers_are_counted_and_refused(tmp_path, dtype, bad):
    features, _ = drawn(70, width=5, dtype=dtype)
    features[[3, 68], [0, 4]] = bad
    np.save(tmp_path / "s.npy", features)
    with pytest.raises(InputError, match=r"2 of 70 tiles.*rows 3, 68.*--allow-nan"):
        read_bag(tmp_path / "s.npy")
    np.testing.assert_array_equal(read_bag(tmp_path / "s.npy", allow_nan=True).features, features)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_place_of_every_block_is_searched_for_nan(dtype):
    features = np.zeros((300, 521), dtype)
    features.flat[:] = np.finfo(dtype).max
    assert all_finite(features) and all_finite(features[:0])
    for place in (0, (1 << 16) - 1, 1 << 16, features.size - 1):
        spoilt = features.copy()
        spoilt.flat[place] = np.nan
        assert not all_finite(spoilt)


def test_given_facts_must_agree_with_the_file(tmp_path):
    path = write_trident(tmp_path / "s.h5", *drawn(4), level0_mpp=0.25)
    assert read_bag(path).mpp == 0.25
    # the same resolution, rounded otherwise
    assert read_bag(path, mpp=0.2505).mpp == 0.25
    with pytest.raises(InputError, match=r"says 0.25 micrometres per level-0 pixel, 0.5 was given.*--mpp"):
        read_bag(path, mpp=0.5)
    with pytest.raises(InputError, match=r"of the encoder uni_v2, and conch was given"):
        read_bag(path, encoder="conch")
    with pytest.raises(InputError, match=r"tiles are 512 level-0 pixels, and 256 was given"):
        read_bag(path, tile_level0=256)
    with pytest.raises(InputError, match="mpp must be a positive number"):
        read_bag(path, mpp=float("nan"))


def test_tiles_outside_the_slide_are_reported(tmp_path):
    features, xy = drawn(10)
    # a tile that begins inside and ends outside is none of them
    xy[:4] = [[29999, 0], [30000, 0], [0, 20000], [-512, 0]]
    bag = read_bag(write_trident(tmp_path / "s.h5", features, xy))
    assert bag.outside() == 3
    assert bag.remarks == ("3 of 10 tiles begin outside the slide of 30000 x 20000 px",)


def test_mapped_features_are_the_same_numbers(tmp_path):
    features, xy = drawn(200, width=32)
    write_bag(Bag("s", features, xy=xy, tile_level0=512), tmp_path / "s.h5")
    bag = read_bag(tmp_path / "s.h5", mmap=True)
    assert isinstance(bag.features, np.memmap) and not bag.features.flags.writeable
    np.testing.assert_array_equal(bag.features, features)


@pytest.mark.parametrize("mmap", [False, True])
def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(tmp_path, mmap):
    old, new = drawn(50, seed=1)[0], drawn(50, seed=2)[0]
    write_bag(Bag("s", old), tmp_path / "s.h5")
    with open_contents(tmp_path / "s.h5", mmap=mmap) as contents:
        # more attributes: the features begin elsewhere
        write_bag(Bag("s", new, attributes={"long": "x" * 5000}), tmp_path / "s.h5")
        np.testing.assert_array_equal(contents.features("features"), old)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"features": np.ones(4)}, r"float64 \(4,\)"),
        ({"features": np.ones((4, 2), int)}, "floating"),
        ({"xy": np.ones((3, 2))}, r"\(3, 2\) for 4 features"),
        ({"xy_um": np.full((4, 2), np.nan)}, "hold NaN"),
        ({"tile_level0": 0.0}, "tile_level0 must be a positive number, it is 0"),
    ],
)
def test_bags_whose_parts_do_not_belong_together_are_refused(parts, words):
    with pytest.raises(InputError, match=words):
        Bag("s", **{"features": np.ones((4, 2), np.float32), **parts})
