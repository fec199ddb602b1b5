"""Arrays and data sets with a name: npz files, MedMNIST with its download, torchvision, timm."""

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import re
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from sansmax.data import medmnist
from sansmax.data.download import download
from sansmax.data.medmnist_facts import OFFICIAL, SIZES, Official, file_name
from sansmax.data.open import open_data
from sansmax.errors import InputError

REAL = Path(os.environ.get("SANSMAX_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
RNG = np.random.default_rng(2)


def arrays(splits=("train", "val", "test"), shape=(7, 5), n=12, dtype=np.uint8, classes=3, column=True):
    found = {}
    for split in splits:
        found[f"{split}_images"] = RNG.integers(0, np.iinfo(dtype).max, (n, *shape), dtype=dtype)
        labels = np.arange(n) % classes
        found[f"{split}_labels"] = labels[:, None].astype(np.uint8) if column else labels
    return found


# npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 3), (7, 5, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_an_npz_file_gives_its_own_pixels(tmp_path, save, shape, dtype):
    stored = arrays(shape=shape, dtype=dtype)
    save(tmp_path / "a.npz", **stored)
    data = open_data(tmp_path / "a.npz")
    assert data.classes == ("0", "1", "2")
    assert data.explicit_split
    assert data.colour == (shape == (7, 5, 3))
    for split, images in data.splits().items():
        assert images.names[3] == f"{split}[3]"
        for i in range(12):
            np.testing.assert_array_equal(images.read(i), stored[f"{split}_images"][i].squeeze())
            assert images.labels[i] == i % 3


def test_stored_arrays_are_not_read_into_memory(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    images = open_data(tmp_path / "a.npz").splits()["train"]
    assert isinstance(getattr(images, "images", None), np.memmap)


def test_missing_splits_of_an_npz_file_are_drawn(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays(("train",), n=60, column=False))
    data = open_data(tmp_path / "a.npz")
    assert {s: len(x) for s, x in data.splits().items()} == {"train": 51, "val": 9}


def test_labels_of_an_npz_file_are_mapped_to_the_classes_of_a_run(tmp_path):
    np.savez(tmp_path / "a.npz", **arrays())
    by_position = open_data(tmp_path / "a.npz", classes=("x", "y", "z", "w"))
    assert by_position.counts()["test"].tolist() == [4, 4, 4, 0]
    by_name = open_data(tmp_path / "a.npz", classes=("2", "1", "0"))
    assert by_name.splits()["test"].labels[:3].tolist() == [2, 1, 0]
    with pytest.raises(InputError, match=r"has the label 2, the classes are 0 \.\.\. 1"):
        open_data(tmp_path / "a.npz", classes=("x", "y"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": np.zeros((12, 7, 7, 7), np.uint8)}, "these are volumes, only pictures"),
        ({"train_labels": np.zeros((12, 14), np.uint8)}, "several labels per image are not supported: allowed are"),
        ({"train_labels": np.zeros(11, np.uint8)}, r"train_labels uint8 \(11,\); allowed are"),
        ({"train_labels": np.zeros(12)}, "train_labels float64"),
        ({"train_images": np.zeros((12, 7, 7))}, "train_images is float64"),
    ],
)
def test_other_arrays_are_refused(tmp_path, change, message):
    np.savez(tmp_path / "a.npz", **{**arrays(), **change})
    with pytest.raises(InputError, match=message):
        open_data(tmp_path / "a.npz")


def test_a_damaged_or_foreign_npz_file_is_named(tmp_path):
    np.savez(tmp_path / "a.npz", features=np.zeros(3))
    with pytest.raises(InputError, match=r"a\.npz has the arrays features; allowed are train_images"):
        open_data(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "b.npz", **arrays())
    whole = (tmp_path / "b.npz").read_bytes()
    for data in (whole[: len(whole) // 2], b"", b"text", whole[:200] + b"x" * 50 + whole[250:]):
        (tmp_path / "b.npz").write_bytes(data)
        with pytest.raises(InputError, match=r"cannot read .*b\.npz"):
            open_data(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match=r"cannot read .*c\.npz"):
        open_data(tmp_path / "c.npz")


# downloads


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, files, breaks=None, ranges=True):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.breaks, self.ranges, self.asked = files, breaks, ranges, []

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.asked.append(self.headers.get("Range"))
        data = self.server.files.get(self.path.strip("/"))
        if data is None:
            self.send_error(404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(asked[1]) if asked and self.server.ranges else 0
        if start and start >= len(data):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        breaks, self.server.breaks = self.server.breaks, None
        self.wfile.write(data[start : breaks or len(data)])

    def log_message(self, format, *args):  # noqa: A002
        pass


@contextlib.contextmanager
def serving(files, **options):
    with Server(files, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


CONTENT = RNG.bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


def test_a_file_is_downloaded_once_with_progress(tmp_path):
    seen = []
    with serving({"a": CONTENT}) as (server, url):
        for _ in range(2):
            path = download(f"{url}/a", tmp_path / "deep" / "a", MD5, lambda *p: seen.append(p))
        assert path.read_bytes() == CONTENT
        assert len(server.asked) == 1
    assert seen[-1] == (3_000_000, 3_000_000)
    assert len(seen) >= 3


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_is_continued(tmp_path, ranges):
    with serving({"a": CONTENT}, breaks=1_000_000, ranges=ranges) as (server, url):
        with pytest.raises(InputError, match=r"broke after 1000000 of 3000000 bytes.*try again, which continues"):
            download(f"{url}/a", tmp_path / "a", MD5)
        assert not (tmp_path / "a").exists()
        assert download(f"{url}/a", tmp_path / "a", MD5).read_bytes() == CONTENT
        assert server.asked == [None, "bytes=1000000-"]
    assert not (tmp_path / "a.part").exists()


def test_a_wrong_checksum_is_reported_and_removed(tmp_path):
    message = f"MD5 sum [0-9a-f]{{32}}, expected is {MD5}.*was removed"
    with serving({"a": CONTENT[:-1] + b"x"}) as (_, url), pytest.raises(InputError, match=message):
        download(f"{url}/a", tmp_path / "a", MD5)
    assert not (tmp_path / "a").exists()
    assert not (tmp_path / "a.part").exists()


def test_no_file_and_no_network_say_what_to_fetch_by_hand(tmp_path):
    by_hand = f"by hand and save it as {tmp_path}/a"
    with serving({}) as (_, url), pytest.raises(InputError, match=rf"{url}/a \(HTTP status 404\).*{by_hand}"):
        download(f"{url}/a", tmp_path / "a", MD5)
    with pytest.raises(InputError, match=f"cannot fetch {url}/a .*{by_hand}"):
        download(f"{url}/a", tmp_path / "a", MD5, timeout=2)


# MedMNIST


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A small file in the place of breastmnist at 64 px: its bytes, and the cache it goes to."""
    file = io.BytesIO()
    np.savez(file, **arrays(classes=2))
    facts = OFFICIAL["breastmnist"]
    md5 = (facts.md5[0], hashlib.md5(file.getvalue()).hexdigest(), *facts.md5[2:])
    monkeypatch.setitem(OFFICIAL, "breastmnist", Official(facts.classes, md5))
    monkeypatch.setenv("SANSMAX_CACHE", str(tmp_path / "cache"))
    return file.getvalue()


def test_a_medmnist_set_is_downloaded_into_the_cache(tmp_path, tiny, monkeypatch):
    with serving({"breastmnist_64.npz": tiny}) as (server, url):
        monkeypatch.setattr(medmnist, "URL", url + "/{file}")
        for _ in range(2):
            data = open_data("medmnist:breastmnist:64")
        assert len(server.asked) == 1
    assert (tmp_path / "cache" / "medmnist" / "breastmnist_64.npz").read_bytes() == tiny
    assert data.classes == ("malignant", "normal, benign")
    assert data.source == "medmnist:breastmnist:64"


def test_a_medmnist_file_at_hand_needs_no_network(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(medmnist, "URL", "http://127.0.0.1:1/{file}")
    with pytest.raises(InputError, match=r"no breastmnist_64\.npz in .*; fetch http://127.0.0.1:1/breastmnist_64"):
        open_data("medmnist:breastmnist:64", root=tmp_path)
    with pytest.raises(InputError, match=r"cannot fetch .*by hand"):
        open_data("medmnist:breastmnist:64")
    (tmp_path / "breastmnist_64.npz").write_bytes(tiny)
    assert len(open_data("medmnist:breastmnist:64", root=tmp_path).splits()) == 3
    (tmp_path / "breastmnist_64.npz").write_bytes(tiny + b"x")
    with pytest.raises(InputError, match=r"has the MD5 sum .*, the official file has"):
        open_data("medmnist:breastmnist:64", root=tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("medmnist:brestmnist", "unknown MedMNIST set 'brestmnist': did you mean 'breastmnist'"),
        ("medmnist:breastmnist:32", "there is no size '32'; allowed are 28, 64, 128, 224"),
        ("medmnist:chestmnist", "several labels per image.*allowed are pathmnist"),
        ("medmnist:adrenalmnist3d", "volumes, only pictures are supported"),
    ],
)
def test_other_medmnist_names_are_refused(source, message):
    with pytest.raises(InputError, match=message):
        open_data(source)


def test_the_facts_are_whole():
    assert len(OFFICIAL) == 12
    for facts in OFFICIAL.values():
        assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in facts.md5)
        assert len(facts.md5) == len(SIZES)
        assert len(set(facts.classes)) == len(facts.classes)
    assert len({md5 for facts in OFFICIAL.values() for md5 in facts.md5}) == 48
    assert file_name("pathmnist", 28) == "pathmnist.npz"


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "counts"),
    [("breastmnist", (546, 78, 156)), ("pneumoniamnist", (4708, 524, 624)), ("retinamnist", (1080, 120, 400))],
)
def test_the_official_files_have_their_checksum_and_splits(name, counts):
    folder = REAL / "medmnist"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here; set SANSMAX_TEST_DATA to the folder of real data")
    data = open_data(f"medmnist:{name}", root=folder)
    assert tuple(len(x) for x in data.splits().values()) == counts
    assert data.classes == OFFICIAL[name].classes
    assert open_data(folder / f"{name}.npz").classes == data.classes
    assert data.colour == (name == "retinamnist")


@pytest.mark.real_data
def test_official_volumes_are_refused():
    path = REAL / "medmnist" / "adrenalmnist3d.npz"
    if not path.is_file():
        pytest.skip(f"{path} is not here; set SANSMAX_TEST_DATA to the folder of real data")
    with pytest.raises(InputError, match="these are volumes, only pictures are supported"):
        open_data(path)


# torchvision and timm


def write_cifar10(root, monkeypatch):
    """The layout of CIFAR-10 with 20 images per file."""
    from torchvision.datasets import CIFAR10

    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    lists = {"train_list": [f"data_batch_{k}" for k in range(1, 6)], "test_list": ["test_batch"]}
    for attribute, files in lists.items():
        sums = []
        for name in files:
            batch = {"data": RNG.integers(0, 256, (20, 3072), np.uint8), "labels": list(range(10)) * 2}
            (folder / name).write_bytes(pickle.dumps(batch))
            sums.append([name, hashlib.md5((folder / name).read_bytes()).hexdigest()])
        monkeypatch.setattr(CIFAR10, attribute, sums)
    names = pickle.dumps({"label_names": [f"class {k}" for k in range(10)]})
    (folder / "batches.meta").write_bytes(names)
    meta = {"filename": "batches.meta", "key": "label_names", "md5": hashlib.md5(names).hexdigest()}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return folder


@pytest.mark.parametrize("source", ["torchvision:CIFAR10", "torchvision:cifar10", "torch/cifar10"])
def test_cifar10_opens_from_its_files(tmp_path, monkeypatch, source):
    write_cifar10(tmp_path, monkeypatch)
    data = open_data(source, root=tmp_path, val_fraction=0.2)
    assert {s: len(x) for s, x in data.splits().items()} == {"train": 80, "val": 20, "test": 20}
    assert data.classes == tuple(f"class {k}" for k in range(10))
    assert data.colour
    assert data.splits()["test"].read(3).shape == (32, 32, 3)
    assert data.splits()["test"].labels[3] == 3
    again = open_data(source, root=tmp_path, classes=data.classes[::-1])
    assert again.splits()["test"].labels[3] == 6


def test_files_that_are_missing_are_downloaded(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = write_cifar10(tmp_path / "made", monkeypatch)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    shutil.rmtree(folder)
    monkeypatch.setattr(CIFAR10, "filename", "c.tar.gz")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    (tmp_path / "new").mkdir()
    with serving({"c.tar.gz": packed.getvalue()}) as (_, url):
        monkeypatch.setattr(CIFAR10, "url", f"{url}/c.tar.gz")
        data = open_data("torchvision:CIFAR10", root=tmp_path / "new")
    assert len(data.splits()["test"]) == 20


def test_other_names_are_refused(tmp_path):
    with pytest.raises(InputError, match="unknown torchvision data set 'CIFAR11': did you mean 'CIFAR10"):
        open_data("torchvision:CIFAR11", root=tmp_path)
    with pytest.raises(InputError, match="needs a folder for its files; name it with --root"):
        open_data("torchvision:CIFAR10")
    with pytest.raises(InputError, match="cannot be opened by its name alone"):
        open_data("torchvision:CocoDetection", root=tmp_path)
    with pytest.raises(InputError, match="timm does not know the data set torch/cifar11"):
        open_data("torch/cifar11", root=tmp_path)
    with pytest.raises(InputError, match="torchvision cannot open or fetch torchvision:FER2013"):
        open_data("torchvision:FER2013", root=tmp_path)
