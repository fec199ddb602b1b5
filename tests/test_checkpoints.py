"""Checkpoints: whole at every moment, damage noticed, and a run that goes on from them whatever ended it."""

import os
import shutil
import signal
import time
import zipfile

import numpy as np
import pytest
import torch
from bags import config as bag_config
from bags import toy
from commands import Commands
from runs import KEYS, RANDOM, options, refused, result_of, tiny, train_only

from sansmax.data.loading import TensorImages
from sansmax.engine.bag_module import BagModule
from sansmax.engine.bag_train import fit_bags
from sansmax.engine.callbacks import Recorder
from sansmax.engine.checkpoints import (
    LAST,
    PREVIOUS,
    SEAL,
    Checkpoint,
    WholeFiles,
    check_conditions,
    conditions,
    find_checkpoint,
)
from sansmax.engine.module import NotFinite
from sansmax.engine.progress import Reporter
from sansmax.engine.stopping import Stopped
from sansmax.errors import InputError

NAMES = (LAST, PREVIOUS)
DAMAGE = "its checksum does not fit|it cannot be read|its end is missing"


def same(a, b):
    """Whether two checkpoints are equal bit for bit, but for what a clock measured."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(k == "seconds" or same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def loaded(run, name=LAST):
    return torch.load(run / name, weights_only=True)


def stop_at(patched, step):
    """Has a run asked to stop when it comes to a step."""
    original = Recorder.on_train_batch_end

    def stopping(self, trainer, *args):
        if trainer.global_step == step:
            self.stop.name = "SIGTERM"
        return original(self, trainer, *args)

    patched.setattr(Recorder, "on_train_batch_end", stopping)


class Lines(Reporter):
    """Keeps what is said."""

    def __init__(self):
        super().__init__(quiet=True)
        self.lines = []

    def say(self, text, style=""):
        self.lines.append(text)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run with everything random that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_only(tiny(**RANDOM, checkpoint_steps=1), folder)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped before its last step, with a checkpoint of each of the last two steps."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patched:
        stop_at(patched, 7)
        with pytest.raises(Stopped):
            train_only(tiny(**RANDOM, checkpoint_steps=1), folder)
    assert [Checkpoint.read(folder / name).place for name in NAMES] == [(1, 3), (1, 2)]
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "copy")


# Killed


def test_killed_anywhere_it_ends_bit_for_bit_as_the_run_that_was_not(whole, tmp_path, seed):
    words = options({**KEYS, **RANDOM, "data.workers": 2, "checkpoint_steps": 1})
    rng = np.random.default_rng(seed)
    run, notes = tmp_path / "run", tmp_path / "killed"
    trace = notes / "trace"
    begin, resume = ["train", "--output", run, *words], ["train", "--resume", "--output", run]
    with Commands() as commands:
        for kill in range(3):
            before = trace.read_text().count("\n") if kill else 0
            # a checkpoint makes four writes to the disk; the start of a run some twenty, before there is any
            plan = {"at_write": int(rng.integers(24, 40) if kill == 0 else rng.integers(8))} if kill % 2 == 0 else {}
            process = commands.start(resume if kill else begin, notes, **plan)
            if not plan:
                while trace.read_text().count("\n") == before:
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.03))
                (os.killpg if kill == 1 else os.kill)(process, signal.SIGKILL)
            status, said = commands.ended()
            assert status == -signal.SIGKILL, said
        status, said = commands.run(resume, notes, worker_at=7)
        # the system may end a process that loads images, too
        assert status == 2 and "Traceback" not in said, said
        message = said[said.index("error: ") :]
        assert message.startswith("error: a process that loads images ended before its work (DataLoader worker (pid")
        assert message.endswith(f"go on with: sansmax train --resume --output {run}\n")
        assert commands.run(resume, notes)[0] == 0
    steps = [line.split() for line in trace.read_text().splitlines()]
    # a step that was trained twice had the same loss both times
    assert len(steps) > 8 and len(set(map(tuple, steps))) == len(dict(steps)) == 8
    assert result_of(run) == result_of(whole)
    assert same(loaded(run), loaded(whole))
    assert not list(run.glob(".*")), "half a file is left"


class Killed(BaseException):
    """The process is gone: nothing after it has an effect."""


def killed_at(patched, number):
    """Nothing that changes the disk has an effect from this call on."""
    calls = []

    def counted(name):
        call = getattr(os, name)

        def counting(*args, **kwargs):
            calls.append(name)
            if len(calls) > number:
                raise Killed
            return call(*args, **kwargs)

        patched.setattr(os, name, counting)

    for name in ("fsync", "replace", "unlink"):
        counted(name)
    return calls


def test_one_of_the_two_is_whole_at_every_moment(tmp_path, monkeypatch):
    def checkpoint(number):
        state = {"next_batch": [0, number], "finished": False, "conditions": {}}
        return {"callbacks": {"Recorder": state}, "w": torch.full((50,), number)}

    seen, calls, done, number = [], [], False, 0
    while not done:
        folder = tmp_path / str(number)
        for older in (1, 2):
            WholeFiles().save_checkpoint(checkpoint(older), folder / LAST)
        with monkeypatch.context() as patched:
            calls = killed_at(patched, number)
            try:
                WholeFiles().save_checkpoint(checkpoint(3), folder / LAST)
                done = True
            except Killed:
                pass
        said = []
        found = find_checkpoint(folder, said.append)
        assert found is not None
        seen.append(found.place[1])
        assert bool(said) == (found.path.name == PREVIOUS)
        # and the next one is written as ever, with one before it
        WholeFiles().save_checkpoint(checkpoint(4), folder / LAST)
        assert [Checkpoint.read(folder / name).place[1] for name in NAMES] == [4, seen[-1]]
        number += 1
    assert calls == ["fsync", "replace", "replace", "fsync", "unlink"]
    # bytes, the older name, the name, the names on the disk
    assert seen == [2, 2, 2, 3, 3, 3]


# Damaged


def damaged(data, rng, count=40):
    """The bytes of a file cut at several lengths, and with a byte changed here and there."""
    for length in (0, 1, 100, len(data) // 2, len(data) - SEAL - 1, len(data) - SEAL, len(data) - 1):
        yield data[:length]
    yield bytes(len(data))
    yield data + b"\0"
    places = [0, len(data) - 1, len(data) - SEAL, len(data) - SEAL - 1, *rng.integers(len(data), size=count)]
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        yield bytes(changed)


def test_any_damage_is_noticed_and_the_one_before_is_used(copy, whole, seed):
    data = (copy / LAST).read_bytes()
    for broken in damaged(data, np.random.default_rng(seed)):
        (copy / LAST).write_bytes(broken)
        said = []
        found = find_checkpoint(copy, said.append)
        assert found is not None and found.path == copy / PREVIOUS
        (line,) = said
        assert line.startswith(f"warning: the checkpoint {copy / LAST} is damaged (")
        assert line.split("(")[1].split(")")[0].split(":")[0] in DAMAGE
        assert "going back to previous.ckpt, written before epoch 2, batch 3. " in line
        # it must not take the place of the whole one when the next is written
        assert not (copy / LAST).exists()
    # training again from the one before makes the same run
    (copy / LAST).write_bytes(data[:-1])
    reporter = Lines()
    train_only(None, copy, resume=True, reporter=reporter)
    at = next(i for i, line in enumerate(reporter.lines) if line.startswith("warning: "))
    assert reporter.lines[at + 1] == "going on at epoch 2, batch 3 of 4"
    assert result_of(copy) == result_of(whole)
    assert same(loaded(copy), loaded(whole))


def test_back_before_the_best_epoch_its_weights_are_written_again(whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    assert Checkpoint.read(run / LAST).state["best_epoch"] == 1
    assert Checkpoint.read(run / PREVIOUS).place == (1, 3)
    (run / LAST).write_bytes(b"torn")
    (run / "model.safetensors").write_bytes(b"of another time")
    train_only(None, run, resume=True)
    assert result_of(run) == result_of(whole)


def test_two_damaged_checkpoints_are_refused_and_stay(copy):
    for name in NAMES:
        (copy / name).write_bytes(b"torn")
    message = refused("train", "--resume", "--output", copy)
    assert f"the checkpoint {copy / LAST} is damaged" in message and f"{copy / PREVIOUS} is damaged" in message
    assert "--overwrite" in message
    assert [(copy / name).read_bytes() for name in NAMES] == [b"torn", b"torn"]


def test_a_checkpoint_is_an_archive_that_anything_opens_and_nothing_is_unpickled_from(copy, tmp_path):
    assert zipfile.ZipFile(copy / LAST).testzip() is None
    assert loaded(copy)["state_dict"].keys() == torch.load(copy / LAST, mmap=True)["state_dict"].keys()

    class Stranger:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    for name in NAMES:
        WholeFiles().save_checkpoint({**loaded(copy, name), "more": Stranger()}, copy / name)
    with pytest.raises(InputError, match="it cannot be read: UnpicklingError"):
        find_checkpoint(copy, print)
    with pytest.raises(Exception, match="Weights only load failed"):
        WholeFiles().load_checkpoint(copy / LAST, weights_only=False)
    assert not (tmp_path / "owned").exists()


# Other conditions


def rewritten(run, change):
    """Changes the conditions that both checkpoints of a run keep."""
    for name in NAMES[::-1]:
        state = loaded(run, name)
        change(state["callbacks"]["Recorder"])
        (run / name).unlink()
        WholeFiles().save_checkpoint(state, run / name)


@pytest.mark.parametrize("what", ["processes", "sequence_parallel"])
def test_another_number_of_processes_is_refused(what, copy):
    rewritten(copy, lambda state: state["conditions"].update({what: 2}))
    before = (copy / LAST).read_bytes()
    message = refused("train", "--resume", "--output", copy)
    assert f"{what.split('_')[0]}" in message.replace("share the tokens", "sequence")
    assert "the run was trained with 2, and now it would be 1" in message and "initial_checkpoint" in message
    assert (copy / LAST).read_bytes() == before


def test_what_changes_the_last_digits_alone_is_told(stopped):
    before = Checkpoint.read(stopped / LAST).state["conditions"]
    now = conditions(1, 1, "32-true", torch.device("cpu"))
    said = []
    check_conditions(before, now, said.append)
    assert said == []
    check_conditions(before, {**now, "torch": "3.0.0", "threads": 99, "device": "cuda"}, said.append)
    (line,) = said
    changes = {f"torch {before['torch']} -> 3.0.0", f"threads {before['threads']} -> 99", "device cpu -> cuda"}
    assert set(line.split(": ")[2].split(", ")) == changes
    with pytest.raises(InputError, match="precision: the run was trained with 32-true, and now it would be bf16-mixed"):
        check_conditions(before, {**now, "precision": "bf16-mixed"}, said.append)


def test_a_checkpoint_without_seal_and_conditions_is_of_an_earlier_version(copy, whole):
    state = loaded(copy)
    for name in ("conditions", "step", "row_step"):
        del state["callbacks"]["Recorder"][name]
    torch.save(state, copy / LAST)
    reporter = Lines()
    train_only(None, copy, resume=True, reporter=reporter)
    assert any("of an earlier version" in line for line in reporter.lines)
    assert result_of(copy) == result_of(whole)


# What else has a state


def test_the_scale_of_float16_travels(tmp_path, monkeypatch):
    scalers, made = [], torch.amp.GradScaler

    def scaler(device):
        # grows at every other step, and is halved by what overflows
        scalers.append(made(device, init_scale=2.0**20, growth_interval=2))
        return scalers[-1]

    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    config = tiny(precision="16", device="cpu")
    train_only(config, tmp_path / "whole")
    with monkeypatch.context() as patched:
        stop_at(patched, 3)
        with pytest.raises(Stopped):
            train_only(config, tmp_path / "run")
    train_only(None, tmp_path / "run", resume=True)
    whole, first, second = (kept.state_dict() for kept in scalers)
    assert second == whole != first
    assert loaded(tmp_path / "run")["LossScale"] == whole
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


def test_gradients_that_wait_for_their_step_are_in_no_checkpoint(tmp_path, monkeypatch):
    config = tiny(**RANDOM, epochs=1, batch_size=6, optim__grad_accum_steps=4, checkpoint_steps=1)
    # 10 batches, so steps of 4, 4 and 2
    train_only(config, tmp_path / "whole")
    places, original = [], Recorder._checkpoint
    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "_checkpoint", lambda s, t: (places.append(s.next_batch), original(s, t))[1])
        # asked to stop with a gradient waiting
        patched.setattr(Recorder, "speed", lambda s, b: setattr(s.stop, "name", "SIGTERM") if s.loss_count == 5 else "")
        with pytest.raises(Stopped, match="before epoch 1, batch 9 of 10"):
            train_only(config, tmp_path / "run")
    assert places == [(0, 4), (0, 8)]
    train_only(None, tmp_path / "run", resume=True)
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")
    assert same(loaded(tmp_path / "run"), loaded(tmp_path / "whole"))


# Numbers that are none


def test_a_batch_with_nan_is_named_and_is_the_next_one_again(whole, tmp_path, monkeypatch):
    original = TensorImages.__getitem__

    def poisoned(self, key):
        image, label, index = original(self, key)
        return (image * torch.nan if key[:2] == (1, 5) and self.augment else image), label, index

    run = tmp_path / "run"
    messages = []
    with monkeypatch.context() as patched:
        patched.setattr(TensorImages, "__getitem__", poisoned)
        for how in ({}, {"resume": True}):
            with pytest.raises(NotFinite) as failed:
                train_only(None if how else tiny(**RANDOM, checkpoint_steps=1), run, **how)
            messages.append(str(failed.value))
            Checkpoint.read(run / LAST)
    assert messages[0] == messages[1]
    name = "train[5]"
    assert "not finite at step" in messages[0] and "Its batch held the images " in messages[0]
    assert f"; NaN or infinity is in {name} before the network sees it" in messages[0], messages[0]
    assert messages[0].count("train[") == 17
    train_only(None, run, resume=True)
    assert result_of(run) == result_of(whole)


def test_slides_that_break_a_step_are_named(tmp_path, monkeypatch):
    bags, cases = toy(n=12)

    def fit(folder, **how):
        made = bag_config(epochs=2, batch_size=4, checkpoint_steps=1)
        return fit_bags(made, None, bags, cases, cases.ids[:8], cases.ids[8:], folder, **how)

    original = BagModule.outputs
    with monkeypatch.context() as patched:
        broken = lambda s, p, n: original(s, p, n) * (torch.nan if s.global_step == 3 else 1)  # noqa: E731
        patched.setattr(BagModule, "outputs", broken)
        with pytest.raises(NotFinite, match=r"at step 4 \(epoch 2\).*Its batch held the slides .*; all their numbers"):
            fit(tmp_path / "run")
    assert Checkpoint.read(tmp_path / "run" / LAST).place == (1, 1)
    (tmp_path / "run" / LAST).write_bytes(b"torn")
    fit(tmp_path / "run", resume=True)
    fit(tmp_path / "whole")
    assert same(loaded(tmp_path / "run"), loaded(tmp_path / "whole"))
    names = ("model.safetensors", "predictions_val.csv")
    assert [(tmp_path / "run" / n).read_bytes() for n in names] == [
        (tmp_path / "whole" / n).read_bytes() for n in names
    ]
