"""A network over more tokens than fit: the same numbers as in memory, in the memory of a chunk."""

import subprocess
import sys
import tempfile

import pytest
import torch
from networks import images, small

from sansmax.engine.explain import token_scores
from sansmax.engine.stream import STORES, stream_tokens
from sansmax.errors import InputError

PICO = "seqnorm_vit_pico_patch8_128"
GRID = (7, 5)

VARIANTS = {
    "mean of tokens": {},
    "class token": {"class_token": True, "global_pool": "token"},
    "registers": {"class_token": True, "reg_tokens": 2},
    "registers alone": {"reg_tokens": 3},
    "prefix in the mean": {"class_token": True, "pool_include_prefix": True},
    "norm after pooling": {"fc_norm": True, "class_token": True},
    "layer scale, norm before": {"init_values": 0.5, "pre_norm": True, "class_token": True},
    "positions": {"pos_embed": "learn", "img_size": (56, 40), "class_token": True},
    "sima": {"attention": "sima", "qkv_bias": True, "class_token": True, "attn_options": {"reference_tokens": 5}},
    "positions of patches": {"pos_embed": "learn", "img_size": (56, 40), "class_token": True, "no_embed_class": True},
}

every_store = pytest.mark.parametrize("store", STORES)


class Picture:
    """A picture in memory as rows of patches."""

    def __init__(self, pixels, patch, stop_at=None):
        self.pixels, self.patch, self.stop_at = pixels, patch, stop_at

    @property
    def grid(self):
        return self.pixels.shape[-2] // self.patch, self.pixels.shape[-1] // self.patch

    def read(self, first_row, last_row):
        assert 0 <= first_row < last_row <= self.grid[0]
        if self.stop_at is not None and last_row > self.stop_at:
            raise OSError("the disk is gone")
        return self.pixels[..., first_row * self.patch : last_row * self.patch, :]


def in_memory(model, x, classes):
    """Logits and scores as one forward and backward pass gives them."""
    scores = torch.stack([token_scores(model, x, [c])[0].flatten() for c in classes], dim=1)
    with torch.no_grad():
        return model(x), scores


def compare(model, x, assert_same, classes=(0, 3), **options):
    logits, scores = in_memory(model, x, classes)
    found = stream_tokens(model, Picture(x, model.patch_embed.patch_size[0]), scores=classes, **options)
    assert_same(found.logits, logits, "logits")
    assert_same(torch.from_numpy(found.scores), scores, "scores")
    assert found.grid == (x.shape[-2] // 8, x.shape[-1] // 8)
    alone = stream_tokens(model, Picture(x, model.patch_embed.patch_size[0]), **options)
    assert alone.scores is None
    assert_same(alone.logits, logits, "logits without scores")


@every_store
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_scores_equal_those_in_memory(store, variant, assert_same):
    model = small(PICO, **VARIANTS[variant])
    compare(model, images(model, b=1, grid=GRID), assert_same, store=store, chunk_tokens=10)


@every_store
@pytest.mark.parametrize("chunk_tokens", [1, 5, 14, 35, 10**6])
def test_chunks_of_any_size_give_the_same(store, chunk_tokens, assert_same):
    model = small(PICO, class_token=True)
    compare(model, images(model, b=1, grid=GRID), assert_same, store=store, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("grid", [(1, 1), (1, 13), (13, 1), (11, 3)])
def test_grids_of_any_shape_give_the_same(grid, assert_same):
    model = small(PICO, class_token=True)
    compare(model, images(model, b=1, grid=grid), assert_same, chunk_tokens=4)


@every_store
def test_float32_equals_memory_too(store, assert_same):
    model = small(PICO, class_token=True, dtype=torch.float32)
    compare(model, images(model, b=1, grid=(23, 17)), assert_same, store=store, chunk_tokens=40)


@every_store
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_keep_their_tokens_exactly(store, dtype):
    model = small(PICO, dtype=dtype)
    source = Picture(images(model, b=1, grid=GRID), 8)
    # one band in every store: nothing is merged, so every bit must survive the store
    found, expected = (stream_tokens(model, source, store=s, scores=[0], chunk_tokens=99) for s in (store, "memory"))
    assert found.logits.dtype == dtype
    assert torch.equal(found.logits, expected.logits)
    assert (found.scores == expected.scores).all()


@every_store
def test_autocast_is_as_exact_as_in_memory(store):
    model = small(PICO).float()
    x = images(model, b=1, grid=GRID)
    exact, exact_scores = in_memory(model.double(), x.double(), (0, 3))
    model.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole, whole_scores = in_memory(model, x, (0, 3))
        found = stream_tokens(model, Picture(x, 8), scores=(0, 3), store=store, chunk_tokens=11)
    for a, b, c in ((found.logits, whole, exact), (torch.from_numpy(found.scores), whole_scores, exact_scores)):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max()
        assert (a - c).abs().max() <= 0.05 * c.abs().max()


@pytest.mark.parametrize("changes", [{}, {"class_token": True}, {"class_token": True, "no_embed_class": True}], ids=str)
@pytest.mark.parametrize("grid", [(7, 5), (2, 9), (1, 2)])
def test_positions_are_resampled_as_timm_does(changes, grid, assert_same):
    model = small(PICO, pos_embed="learn", **changes)
    x = images(model, b=1, grid=grid)
    logits, scores = in_memory(model, x, (0, 3))
    found = stream_tokens(model, Picture(x, 8), scores=(0, 3), chunk_tokens=10)
    # timm resamples in float32, whatever the type of the table
    assert_same(found.logits.float(), logits.float(), "logits")
    assert_same(torch.from_numpy(found.scores).float(), scores.float(), "scores")


def test_scores_true_asks_for_every_class(assert_same):
    model = small(PICO)
    x = images(model, b=1, grid=GRID)
    found = stream_tokens(model, Picture(x, 8), scores=True)
    assert_same(torch.from_numpy(found.scores), in_memory(model, x, range(7))[1])


@every_store
@pytest.mark.parametrize("scores", [False, [2], [0, 1, 2]])
@pytest.mark.parametrize("class_token", [False, True])
def test_progress_counts_to_its_total(store, scores, class_token):
    model, calls = small(PICO, class_token=class_token), []
    source = Picture(images(model, b=1, grid=GRID), 8)
    stream_tokens(model, source, store=store, scores=scores, chunk_tokens=10, progress=lambda *call: calls.append(call))
    done, totals = zip(*calls, strict=True)
    assert list(done) == list(range(1, totals[0] + 1))
    assert set(totals) == {totals[0]}


@pytest.mark.parametrize("scores", [False, True])
def test_temporary_files_are_removed(scores, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, files = small(PICO), []
    source = Picture(images(model, b=1, grid=GRID), 8)

    def look(done, total):
        files.extend(p for p in tmp_path.rglob("*") if p.is_file())

    stream_tokens(model, source, store="disk", scores=scores, progress=look)
    # one place for the tokens between two layers, or one for each layer and the pool, and the gradients
    assert len(set(files)) == (2 + 1 + 7 if scores else 1)
    assert list(tmp_path.iterdir()) == []
    source.stop_at = 4
    files.clear()
    with pytest.raises(OSError, match="the disk is gone"):
        stream_tokens(model, source, store="disk", scores=scores, chunk_tokens=5, progress=look)
    assert files
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stop_at", [None, 4])
def test_the_modes_of_training_and_the_gradients_are_left_alone(stop_at):
    model = small(PICO, proj_drop_rate=0.9).train()
    model.blocks[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    source = Picture(images(model, b=1, grid=GRID), 8, stop_at)
    if stop_at is None:
        found, again = (stream_tokens(model, source, scores=[0]) for _ in range(2))
        assert torch.equal(found.logits, again.logits), "drops in evaluation"
        assert not found.logits.requires_grad
    else:
        with pytest.raises(OSError, match="the disk is gone"):
            stream_tokens(model, source, chunk_tokens=5)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(p.grad is None for p in model.parameters())


def test_the_gradient_stays_off_where_the_caller_has_it_off(assert_same):
    model = small(PICO)
    x = images(model, b=1, grid=GRID)
    expected = stream_tokens(model, Picture(x, 8), scores=[0]).scores
    with torch.no_grad():
        found = stream_tokens(model, Picture(x, 8), scores=[0]).scores
        assert not torch.is_grad_enabled()
    assert (found == expected).all()


MEMORY = """
import numpy as np, timm, torch
import sansmax
from sansmax.engine.stream import stream_tokens

class Picture:
    grid = (256, 256)
    pixels = np.random.default_rng(0).integers(0, 256, (2048, 2048), dtype=np.uint8)
    def read(self, first, last):
        return torch.from_numpy(self.pixels[first * 8 : last * 8]).float().div_(255)[None, None]

# not getrusage: its peak includes that of the process that started this one
def mebibytes(field):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[field].split()[0]) / 1024

def peak():
    return mebibytes("VmHWM")

torch.set_num_threads(1)
model, picture = timm.create_model("seqnorm_vit_pico_patch8_128").eval(), Picture()
picture.grid = (4, 256)
stream_tokens(model, picture, store="recompute", scores=[0])
picture.grid = (256, 256)
start = mebibytes("VmRSS")
found = []
for store in ("recompute", "memory"):
    found.append(stream_tokens(model, picture, store=store, chunk_tokens=1024).logits)
    print(peak() - start)
with torch.no_grad():
    whole = model(picture.read(0, 256))
print(peak() - start)
for logits in found:
    assert (logits - whole).abs().max() <= 1e-5 * whole.abs().max()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")
def test_memory_is_that_of_a_chunk():
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    recompute, memory, whole = map(float, run.stdout.split())
    print(f"MiB beyond the start: {recompute:.0f} recompute, {memory:.0f} memory, {whole:.0f} whole")
    # 65,536 tokens of 64 channels are 16 MiB; the forward pass holds some ten times that, the store one layer's
    assert recompute < whole / 6
    assert memory < recompute + 2 * 16


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        (
            {"attention": "softmax"},
            {},
            r"chunks: softmax attention has no summary of fixed size.*seqnorm_vit_tiny_patch16_224",
        ),
        ({"global_pool": "max"}, {}, r"cannot run in chunks: it pools by 'max'.*\(\"avg\" and \"token\" are\)"),
        ({"stem": "conv"}, {}, r"cannot run in chunks: its convolutional stem needs the pixels of neighbouring rows"),
        ({}, {"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
        ({}, {"store": "tape"}, "store must be one of memory, disk, recompute, got 'tape'"),
        ({}, {"scores": [7]}, "class 7 does not exist: the network has classes 0 to 6"),
        ({}, {"scores": [-1]}, "class -1 does not exist"),
        ({"num_classes": 1}, {"scores": True}, "log-odds of a class and need at least 2 classes; the network has 1"),
    ],
)
def test_what_cannot_be_streamed_is_an_error(changes, options, message):
    model = small(PICO, **changes)
    with pytest.raises(InputError, match=message):
        stream_tokens(model, Picture(images(model, b=1), 8), **options)


def test_a_network_of_another_package_is_an_error():
    with pytest.raises(InputError, match="Linear cannot run in chunks: it is not a network of this package"):
        stream_tokens(torch.nn.Linear(3, 3), Picture(torch.zeros(1, 1, 8, 8), 8))
