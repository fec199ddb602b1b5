"""A run that was stopped, killed or starved goes on, and ends bit for bit as one that never was."""

import os
import re
import resource
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from runs import KEYS, RANDOM, options, refused, result_of, rows_of, sansmax, start, tiny, train_only
from safetensors.torch import load_file

from sansmax.engine.callbacks import Recorder
from sansmax.engine.checkpoints import Checkpoint
from sansmax.engine.module import Classifier, NotFinite
from sansmax.engine.run import Run, check_folder, prepare_folder
from sansmax.engine.stopping import Stopped
from sansmax.errors import InputError

STEPS = 8


def at_step(monkeypatch, step, act, hook="on_train_batch_end"):
    """Acts when training first comes to a hook after so many steps."""
    original = getattr(Recorder, hook, lambda self, trainer, *args: None)
    done = []

    def acting(self, trainer, *args):
        if trainer.global_step == step and not done:
            done.append(step)
            act()
        return original(self, trainer, *args)

    monkeypatch.setattr(Recorder, hook, acting, raising=False)


def send(*numbers):
    return lambda: [os.kill(os.getpid(), number) for number in numbers]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run with everything random gives that is never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_only(tiny(**RANDOM), folder)
    return result_of(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What a run with nothing random gives that is never stopped."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    train_only(tiny(), folder)
    return result_of(folder)


@pytest.fixture
def no_report():
    """Pictures and intervals take longer than training."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sansmax.engine.train.finish_run", lambda output, data, reporter: Run.open(output))
        yield


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_stopped_at_any_step_it_ends_the_same(step, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        at_step(patched, step, send(signal.SIGTERM if step % 2 else signal.SIGINT))
        epoch, batch = divmod(step, 4)
        where = "the evaluation" if step == STEPS else f"epoch {epoch + 1}, batch {batch + 1} of 4"
        with pytest.raises(Stopped, match=rf"^stopped by SIG\w+ before {where}; everything is saved"):
            train_only(tiny(**RANDOM), tmp_path / "run")
    assert len(rows_of(tmp_path / "run")) == epoch if step >= 4 else not (tmp_path / "run" / "metrics.csv").exists()
    train_only(None, tmp_path / "run", resume=True)
    assert rows_of(tmp_path / "run") == whole[0]
    assert result_of(tmp_path / "run") == whole


def test_stopped_while_validating_it_ends_the_same(whole, tmp_path, monkeypatch):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patched:
        at_step(patched, 4, send(signal.SIGTERM), "on_validation_batch_start")
        # the first of two batches: Lightning would break the validation off
        with pytest.raises(Stopped, match="by SIGTERM before epoch 2, batch 1 of 4"):
            train_only(tiny(**RANDOM), tmp_path / "run")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    train_only(None, tmp_path / "run", resume=True)
    assert result_of(tmp_path / "run") == whole


def test_the_second_signal_stops_at_once_and_the_checkpoint_stays(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        at_step(patched, 6, send(signal.SIGINT, signal.SIGINT))
        with pytest.raises(Stopped, match=r"^stopped at once; what was written before is kept"):
            train_only(tiny(**RANDOM), tmp_path / "run")
    train_only(None, tmp_path / "run", resume=True)
    assert result_of(tmp_path / "run") == whole


def test_stopped_before_the_first_checkpoint_it_starts_from_the_beginning(whole, tmp_path):
    train_only(tiny(**RANDOM), tmp_path / "run")
    (tmp_path / "run" / "last.ckpt").unlink()
    train_only(None, tmp_path / "run", resume=True)
    assert result_of(tmp_path / "run") == whole


def test_a_row_written_after_the_last_checkpoint_comes_once(whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        at_step(patched, 6, send(signal.SIGINT))
        with pytest.raises(Stopped):
            train_only(tiny(**RANDOM), run)
    earlier = (run / "last.ckpt").read_bytes()
    train_only(None, run, resume=True)
    # as if the end of the second epoch had come no further than its row
    (run / "last.ckpt").write_bytes(earlier)
    train_only(None, run, resume=True)
    assert result_of(run) == whole


def test_the_best_epoch_is_remembered(tmp_path, monkeypatch):
    # too low a rate for any later epoch to be better
    config = tiny(epochs=6, monitor="val_accuracy", patience=3, optim__lr=1e-7, optim__warmup_lr=1e-7)
    train_only(config, tmp_path / "whole")
    accuracies = [row["val_accuracy"] for row in rows_of(tmp_path / "whole")]
    assert len(accuracies) == 4 and max(accuracies) == accuracies[0]
    with monkeypatch.context() as patched:
        at_step(patched, 6, send(signal.SIGINT))
        with pytest.raises(Stopped):
            train_only(config, tmp_path / "run")
    train_only(None, tmp_path / "run", resume=True)
    assert result_of(tmp_path / "run") == result_of(tmp_path / "whole")


def test_ctrl_c_outside_of_training_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("sansmax.engine.report_run.report_run", interrupted)
        said = sansmax("train", "--output", tmp_path / "a run", *options({**KEYS, "epochs": 1}))
    assert said.status == 130
    assert said.err.endswith(f"Go on with: sansmax train --resume --output '{tmp_path}/a run'\n")
    weights = (tmp_path / "a run" / "model.safetensors").read_bytes()
    said = sansmax("train", "--resume", "--output", tmp_path / "a run")
    assert said.status == 0, said
    assert (tmp_path / "a run" / "summary.md").exists()
    assert (tmp_path / "a run" / "model.safetensors").read_bytes() == weights


LONG = {"data.source": "mosaics:grid=4,share=0.4,train=320,val=20,test=20", "data.workers": 2}


def wait_for(process, run, rows):
    """Waits until so many epochs are written, and into the one after."""

    def written():
        row, checkpoint = run / "metrics.csv", run / "last.ckpt"
        if not row.exists() or not checkpoint.exists() or row.read_text().count("\n") <= rows:
            return False
        return checkpoint.stat().st_mtime_ns > row.stat().st_mtime_ns

    end = time.monotonic() + 120
    while not written():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)
    time.sleep(0.1)


def ended_by(number, command, run):
    """Waits until a process is in its second epoch, sends it a signal, and gives what it wrote to the terminal."""
    try:
        wait_for(command, run, 1)
        checkpoint = (run / "last.ckpt").stat().st_mtime_ns
        if number == signal.SIGKILL:
            command.kill()
        else:
            # as a terminal does: to the processes that load images, too
            os.killpg(command.pid, number)
        out, err = command.communicate(timeout=120)
    finally:
        command.kill()
        command.communicate()
    assert "Traceback" not in err and "Warning" not in err and "\x1b" not in err
    assert out == ""
    # the process that was killed had no time for one
    assert number == signal.SIGKILL or (run / "last.ckpt").stat().st_mtime_ns > checkpoint
    return err


def test_processes_ended_by_ctrl_c_sigterm_and_kill_go_on_as_if_nothing_had_been(tmp_path):
    words = options({**KEYS, **RANDOM, **LONG, "checkpoint_minutes": 0.005, "augment.auto": "null"})
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
    runs = [tmp_path / number.name for number in signals]
    # at the same time, since starting takes longest
    commands = [start("train", "--output", run, *words) for run in runs]
    with ThreadPoolExecutor() as pool:
        said = dict(zip(signals, pool.map(ended_by, signals, commands, runs), strict=True))
    assert [command.returncode for command in commands] == [130, 130, -signal.SIGKILL]
    for number in (signal.SIGINT, signal.SIGTERM):
        message = said[number].splitlines()[-1]
        place = re.match(rf"stopped by {number.name} before epoch 2, batch (\d+) of 20; everything is saved. ", message)
        assert place, message
        assert 1 < int(place[1]) <= 20
        assert message.endswith(f" Go on with: sansmax train --resume --output {tmp_path / number.name}")
    whole = sansmax("train", "--output", tmp_path / "whole", *words)
    assert whole.status == 0, whole
    expected = result_of(tmp_path / "whole")
    for run in runs:
        with pytest.MonkeyPatch.context() as patched:
            if run != runs[-1]:
                patched.setattr("sansmax.engine.train.finish_run", lambda output, data, reporter: Run.open(output))
            resumed = sansmax("train", "--resume", "--output", run)
        assert resumed.status == 0, resumed
        assert re.search(r"going on at epoch 2, batch \d+ of 20", resumed.err)
        assert rows_of(run) == expected[0]
        assert result_of(run)[:2] == expected[:2]
    assert result_of(runs[-1]) == expected and len(expected[2]) == 4


def test_a_run_that_was_taken_up_can_be_stopped_again(whole, tmp_path, monkeypatch):
    for step, how in ((2, {}), (3, {"resume": True}), (6, {"resume": True})):
        with monkeypatch.context() as patched:
            at_step(patched, step, send(signal.SIGINT))
            with pytest.raises(Stopped, match=rf"batch {step % 4 + 1} of 4"):
                train_only(tiny(**RANDOM), tmp_path / "run", **how)
    train_only(None, tmp_path / "run", resume=True)
    assert result_of(tmp_path / "run") == whole


def test_a_finished_run_says_so_and_stays_as_it_is(tmp_path):
    run = tmp_path / "run"
    assert sansmax("train", "--output", run, *options({**KEYS, "epochs": 1})).status == 0
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir()}
    said = sansmax("train", "--resume", "--output", run)
    assert said.status == 0
    assert f"{run} is finished" in said.err
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in run.iterdir()} == before


def test_a_damaged_checkpoint_is_named(tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        at_step(patched, 2, send(signal.SIGINT))
        with pytest.raises(Stopped):
            train_only(tiny(), run)
    whole = (run / "last.ckpt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"x" * 1000):
        (run / "last.ckpt").write_bytes(damaged)
        message = refused("train", "--resume", "--output", run)
        assert f"the checkpoint {run / 'last.ckpt'} is damaged" in message
        assert "--overwrite" in message
        assert (run / "last.ckpt").read_bytes() == damaged


@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_loss_that_is_no_number_stops_and_what_was_good_stays(where, plain, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        if where == "training":
            original = Classifier.of_step

            def of_step(self, total, weight):
                return original(self, total * (1 if self.global_step < 6 else torch.nan), weight)

            patched.setattr(Classifier, "of_step", of_step)
        else:
            poison = lambda: [p.data.fill_(torch.inf) for p in networks[0].parameters()]  # noqa: E731
            networks = []
            original = Classifier.__init__
            patched.setattr(
                Classifier, "__init__", lambda self, n, *a, **k: (networks.insert(0, n), original(self, n, *a, **k))[1]
            )
            at_step(patched, 8, poison, "on_validation_batch_start")
        with pytest.raises(NotFinite, match=r"at step [78] \(epoch 2\).*optim.lr=0.00033.*clip_grad") as stopped:
            train_only(tiny(), run)
    assert isinstance(stopped.value, InputError)
    assert f"at step {7 if where == 'training' else 8} " in str(stopped.value)
    assert len(rows_of(run)) == 1
    assert all(w.isfinite().all() for w in load_file(run / "model.safetensors").values())
    Run.open(run).load_model()
    # without what made it break the run goes on from the last good checkpoint
    train_only(None, run, resume=True)
    assert result_of(run) == plain


def test_far_too_high_a_learning_rate_says_what_to_lower(tmp_path):
    run = tmp_path / "run"
    message = refused_after_saying(run, *options({**KEYS, "optim.lr": 1e30, "optim.clip_grad": "null"}))
    assert re.search(r"not finite at step \d+ \(epoch [12]\)", message)
    assert "--set optim.lr=3.3e+29" in message
    assert not (run / "model.safetensors").exists() or Run.open(run).load_model()


def refused_after_saying(run, *words):
    said = sansmax("train", "--output", run, *words)
    assert said.status == 2, said
    assert said.out == "" and "Traceback" not in said.err
    return said.err.partition("error: ")[2]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MiB, where the system lets this process make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.name != "posix" or os.geteuid() != 0 or mount is None:
        pytest.skip("only root can mount a small disk")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no small disk can be mounted here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(path, keep):
    """Fills the disk of a file but for so many bytes."""
    with path.open("wb") as file:
        free = os.statvfs(path.parent)
        file.write(bytes(max(0, free.f_bavail * free.f_bsize - keep)))


@pytest.mark.parametrize("what", ["the start", "model.safetensors", "last.ckpt"])
@pytest.mark.usefixtures("no_report")
def test_a_full_disk_says_so_and_the_run_goes_on_when_there_is_room(what, plain, small_disk, monkeypatch):
    run = small_disk / "run"
    words = ["--output", run, *options(KEYS)]
    if what == "the start":
        fill(small_disk / "other", 4096)
    else:
        # the first epoch was written; room for the weights is left, or not even that
        at_step(monkeypatch, 6, lambda: fill(small_disk / "other", 200_000 if what == "last.ckpt" else 8192))
    message = refused_after_saying(run, *words)
    assert message.startswith(f"the disk is full: {run} could not be written (No space left on device)")
    assert not list(small_disk.rglob(".*")), "half a file is left"
    (small_disk / "other").unlink()
    if what == "the start":
        assert not run.exists()
        said = sansmax("train", *words)
    else:
        assert f"sansmax train --resume --output {run}" in message
        assert len(rows_of(run)) == (1 if what == "model.safetensors" else 2)
        Run.open(run).load_model()
        # the one before is whole, and the new one is not there
        assert Checkpoint.read(run / "last.ckpt").place == (1, 0)
        monkeypatch.undo()
        said = sansmax("train", "--resume", "--output", run)
    assert said.status == 0, said
    assert result_of(run) == plain


def test_a_limit_on_the_size_of_files_is_a_full_disk_too(plain, tmp_path):
    run = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        message = refused_after_saying(run, *options(KEYS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert message.startswith(f"the disk is full: {run} could not be written (File too large)")
    Run.open(run).load_model()
    train_only(None, run, resume=True)
    assert result_of(run) == plain


@pytest.mark.usefixtures("no_report")
def test_the_configuration_of_a_run_cannot_change(tmp_path):
    run = tmp_path / "run"
    train_only(tiny(), run)
    message = refused("train", "--resume", "--output", run, "--epochs", "3", "--set", "lr=0.1")
    assert "  epochs: 2 -> 3\n  optim.lr: 0.001 -> 0.1\n" in message
    # what is said again and is the same does not disturb
    assert sansmax("train", KEYS["data.source"], "--resume", "--output", run, "--epochs", "2").status == 0


def test_what_a_kill_left_before_there_was_a_run_is_begun_again_and_nothing_else_is(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("splits.csv", "data.txt", "config.yaml", ".run.0123abcd.json"):
        (run / name).write_text("half")
    check_folder(run, overwrite=False, resume=False)
    prepare_folder(run, overwrite=False, resume=False)
    assert not any(run.iterdir())
    # a configuration or a table of one's own is no start of ours
    for names in (("config.yaml",), ("splits.csv",), ("splits.csv", "data.txt", "notes.txt")):
        for name in names:
            (run / name).write_text("mine")
        with pytest.raises(InputError, match="is not empty and holds no run"):
            prepare_folder(run, overwrite=False, resume=False)
        for name in names:
            (run / name).unlink()


def test_precision_may_be_written_as_a_number():
    assert [tiny(precision=p).precision for p in (16, 16.0, "16", "bf16")] == ["16", "16", "16", "bf16"]
    with pytest.raises(InputError, match="precision"):
        tiny(precision=16.5)
