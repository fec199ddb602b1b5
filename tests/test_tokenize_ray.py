"""A Ray cluster makes the files that one machine makes."""

import sys

import pytest
from runs import refused
from tokenized import QUICK, features, record, slides_in, tokenize


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    folder = slides_in(tmp_path_factory.mktemp("slides"))
    (folder / "s2.tif").write_bytes(b"II*\0 no slide")
    return folder


def test_what_is_missing_for_a_cluster_is_named(slides, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray.data", None)
    message = refused("tokenize", slides, "--output", tmp_path / "out", *QUICK, "--engine", "ray")
    assert 'it comes with: pip install "sansmax[ray]"' in message


# what the cluster's own parts warn of is not ours to judge
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_cluster_writes_the_files_that_one_machine_writes(slides, tmp_path):
    pytest.importorskip("pyarrow", reason="ray's data sets need pyarrow")
    pytest.importorskip("ray.data")
    out, alone = tmp_path / "cluster", tmp_path / "alone"
    said = tokenize(slides, "--output", out, "--engine", "ray", "--concurrency", "1", status=1)
    assert "s2: failed: " in said.err and "1 slides failed" in said.err
    tokenize(slides, "--output", alone, status=1)
    assert features(out) == features(alone) and len(features(out)) == 2
    for name in ("s0", "s1", "s2"):
        # all but the seconds
        assert {**record(out, name), "seconds": 0} == {**record(alone, name), "seconds": 0}
    # either engine goes on with what the other one made
    (slides / "s2.tif").unlink()
    assert "2 slides, 2 of them done" in tokenize(slides, "--output", out).err
    assert "2 slides, 2 of them done" in tokenize(slides, "--output", alone, "--engine", "ray").err
