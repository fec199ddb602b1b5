"""A run folder is written by one run at a time, and is free as soon as that one has ended, however it ends."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest
from runs import KEYS, options, refused, sansmax, start

from sansmax.engine.locking import LOCK, sole_writer
from sansmax.engine.processes import Processes
from sansmax.errors import InputError

HOLD = """
import multiprocessing, sys, time
from pathlib import Path
from sansmax.engine.locking import sole_writer
from sansmax.engine.processes import Processes

with sole_writer(Path(sys.argv[1]), Processes.alone()):
    # as loaders of images do, it outlives the run a little
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(20,), daemon=True)
    child.start()
    print(child.pid, flush=True)
    time.sleep(60)
"""
COUNT = """
import os, sys
from pathlib import Path
from sansmax.engine.locking import sole_writer
from sansmax.engine.processes import Processes
from sansmax.errors import InputError

folder, mine = Path(sys.argv[1]), 0
while mine < 40:
    try:
        with sole_writer(folder, Processes.alone()):
            (folder / "inside").mkdir()
            (folder / "inside").rmdir()
            mine += 1
    except InputError as error:
        assert "is being trained by another run (" in str(error), error
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has the folder `run`, and the number of its child."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process, child
    # which has the pipe open, too
    os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()


def test_a_folder_is_held_by_one_and_free_when_that_one_was_killed(holder, tmp_path):
    process, child = holder
    with (
        pytest.raises(InputError, match=rf"run is being trained by another run \(process {process.pid} on [^)]+\)"),
        sole_writer(tmp_path / "run", Processes.alone()),
    ):
        pass
    process.kill()
    process.wait()
    os.kill(child, 0)  # still there
    with sole_writer(tmp_path / "run", Processes.alone()):
        assert (tmp_path / "run" / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert list((tmp_path / "run").iterdir()) == []


def test_of_many_that_come_and_go_only_one_is_ever_inside(tmp_path):
    many = [subprocess.Popen([sys.executable, "-c", COUNT, str(tmp_path)], stderr=subprocess.PIPE) for _ in range(3)]
    errors = [process.communicate(timeout=120)[1].decode() for process in many]
    assert [process.returncode for process in many] == [0] * 3, errors
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_being_trained_is_neither_resumed_nor_replaced(tmp_path):
    run = tmp_path / "run"
    words = options({**KEYS, "epochs": 500, "checkpoint_minutes": 0.005})
    process = start("train", "--output", run, *words)
    try:
        end = time.monotonic() + 120
        while not (run / "last.ckpt").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.05)
        for how in (["--resume"], ["--overwrite", *words]):
            said = refused("train", *how, "--output", run)
            assert f"is being trained by another run (process {process.pid} on " in said
            assert said.endswith("wait until it has ended, or give another --output")
        assert process.poll() is None and (run / "last.ckpt").exists()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    assert process.returncode == 130
    assert not (run / LOCK).exists()


def test_a_run_is_replaced_whole_and_what_a_kill_left_of_its_lock_is_no_obstacle(tmp_path):
    run = tmp_path / "run"
    words = options({**KEYS, "epochs": 1, "data.source": "mosaics:grid=4,share=0.4,train=16,val=8,test=4"})
    run.mkdir()
    (run / LOCK).write_text("process 1 on another")
    assert sansmax("train", "--output", run, *words).status == 0
    (run / LOCK).write_text("process 1 on another")
    (run / "heatmaps").mkdir()
    (run / "worst-1.png").write_bytes(b"")
    assert sansmax("train", "--overwrite", "--output", run, *words).status == 0
    assert not (run / "heatmaps").exists() and not (run / "worst-1.png").exists()
    assert (run / "summary.md").exists() and not (run / LOCK).exists()


def test_a_lock_whose_file_went_with_the_run_before_is_taken_again(tmp_path, monkeypatch):
    lockf, calls = fcntl.lockf, []

    def late(number, how):
        # the run before ended after this one had opened its file
        if not calls:
            (tmp_path / "run" / LOCK).unlink()
        calls.append(number)
        lockf(number, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    with sole_writer(tmp_path / "run", Processes.alone()):
        assert (tmp_path / "run" / LOCK).exists() and len(calls) == 2


def test_without_locks_in_the_file_system_nothing_is_locked(tmp_path, monkeypatch):
    def none_here(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none_here)
    with sole_writer(tmp_path / "run", Processes.alone()):
        assert (tmp_path / "run").is_dir()
