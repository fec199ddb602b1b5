"""A job that is stopped, killed or shared goes on by the same command, and no half file is ever taken for whole."""

import errno
import os
import re
import shlex
import signal
import stat
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
from runs import refused, sansmax, start
from tokenized import QUICK, bag, features, record, slides_in, tokenize, write_slide

from sansmax.engine import tokenize as module
from sansmax.engine import tokenize_slide
from sansmax.engine.tokenize_records import all_records


@pytest.fixture(scope="module")
def slides(tmp_path_factory):
    return slides_in(tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="module")
def whole(slides, tmp_path_factory):
    """The feature files of a job that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    tokenize(slides, "--output", folder)
    return features(folder)


def forked(work):
    """Runs `work` in a process of its own, which is killed hard or ends with its status; gives its number."""
    with warnings.catch_warnings():
        # newer Pythons warn of threads that a copy does not have; it does not wait for one
        warnings.simplefilter("ignore", DeprecationWarning)
        number = os.fork()
    if number == 0:
        status = 70
        try:
            status = work()
        finally:
            os._exit(status)
    return number


def ended(number):
    """How a process ended: its status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def killed_at_write(count, *words):
    """The command in a process that is killed at its `count`-th write: the file is complete, and not in its place."""
    left = [count]

    def fsync(descriptor):
        # that of the folder comes when the file is in its place
        left[0] -= not stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        os.fsync = fsync
        return sansmax("tokenize", *words, *QUICK).status

    return ended(forked(work))


def test_killed_at_any_write_the_same_command_completes_it(slides, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    ends = []
    while 0 not in ends:
        # at the first write, at the second, ... of what is left to do
        ends.append(killed_at_write(1 + len(ends) % 5, slides, "--output", out))
        assert ends[-1] in (0, -signal.SIGKILL) and len(ends) < 60
        there = features(out)
        assert all(whole[name] == content for name, content in there.items())
        # what is said to be done is there
        assert {f"{r.slide_id}.h5" for r in all_records(out) if r.state == "done"} <= set(there)
    assert len(ends) > 5
    assert features(out) == whole
    half = [p for p in out.rglob(".*") if p.is_file()]
    assert half, "nothing was killed while it wrote"
    # what was left half written goes when it is old, with the next job on these slides
    (out / "slides" / "s0.json").unlink()
    monkeypatch.setattr(module, "ABANDONED", -1)
    tokenize(slides, "--output", out)
    assert not [p for p in half if p.exists() and p.name.startswith(".s0.")]
    assert features(out) == whole


def test_killed_at_any_time_the_same_command_completes_it(slides, whole, tmp_path):
    out = tmp_path / "out"
    words = ("tokenize", slides, "--output", out, *QUICK)
    for k in range(6):
        number = forked(lambda: sansmax(*words).status)
        time.sleep(0.12 * (k + 1))
        os.kill(number, signal.SIGKILL)
        ended(number)
        assert all(whole[name] == content for name, content in features(out).items())
    tokenize(slides, "--output", out)
    assert features(out) == whole
    assert "3 slides: 3 tokenized" in (out / "summary.md").read_text()


def wait_for(path, process):
    end = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.05)


def ended_by(number, command, out):
    """Waits for the first slide, sends a signal to the command and its readers, and gives what it wrote."""
    try:
        wait_for(out / "slides" / "s0.json", command)
        if number == signal.SIGKILL:
            command.kill()
        else:
            os.killpg(command.pid, number)
        return command.communicate(timeout=120)
    finally:
        command.kill()
        command.communicate()


def test_processes_ended_by_ctrl_c_and_kill_go_on_as_if_nothing_had_been(tmp_path):
    # long enough to be in the middle of it
    folder = slides_in(tmp_path / "a b", count=1)
    write_slide(folder / "s1.tif", 1, size=(1792, 1024))
    words = ("tokenize", folder, *QUICK, "--tile-px", "96", "--workers", "2")
    signals = (signal.SIGINT, signal.SIGKILL)
    outs = [tmp_path / number.name for number in signals]
    commands = [start(*words, "--output", out) for out in outs]
    with ThreadPoolExecutor() as pool:
        said = list(pool.map(ended_by, signals, commands, outs))
    assert [c.returncode for c in commands] == [130, -signal.SIGKILL]
    stdout, stderr = said[0]
    message = stderr.splitlines()[-1]
    assert stdout == "" and "Traceback" not in stderr and "\x1b" not in stderr and "Warning" not in stderr
    assert message.startswith("stopped by SIGINT after 1 of 2 slides; they are kept. Go on with: sansmax tokenize ")
    assert shlex.split(message.partition("Go on with: ")[2]) == ["sansmax", *map(str, words), "--output", str(outs[0])]
    assert not list(outs[0].rglob(".*")), "half a file is left"
    assert sansmax(*words, "--output", tmp_path / "whole").status == 0
    wanted = features(tmp_path / "whole")
    assert set(wanted) == {"s0.h5", "s1.h5"} and bag(tmp_path / "whole", "s1")[0].shape[0] > 120
    for out in outs:
        assert features(out) == {"s0.h5": wanted["s0.h5"]}
        said = sansmax(*words, "--output", out)
        assert said.status == 0 and "2 slides, 1 of them done" in said.err, said
        assert features(out) == wanted


def test_processes_that_share_a_folder_do_not_disturb_each_other(slides, whole, tmp_path):
    out = tmp_path / "out"
    shared = [("--shard", "1/2"), ("--shard", "2/2"), (), ()]
    numbers = [forked(lambda s=s: sansmax("tokenize", slides, "--output", out, *QUICK, *s).status) for s in shared]
    assert [ended(number) for number in numbers] == [0, 0, 0, 0]
    assert features(out) == whole
    assert "3 slides: 3 tokenized" in (out / "summary.md").read_text()
    assert not list(out.rglob(".*"))


def times(folder):
    return {p.name: p.stat().st_mtime_ns for p in (folder / "features").iterdir()}


def test_what_is_done_stays_and_what_is_missing_is_made(slides, whole, tmp_path):
    out = tmp_path / "out"
    tokenize(slides / "s1.tif", "--output", out)
    before = times(out)
    said = tokenize(slides, "--output", out)
    assert "3 slides, 1 of them done" in said.err and "1 were done before" in said.out
    assert times(out)["s1.h5"] == before["s1.h5"]
    before = times(out)
    # a file that was cut short, one that is gone, a record that is gone, one that is torn
    path = out / "features" / "s0.h5"
    for spoil in (
        lambda: path.write_bytes(path.read_bytes()[:1000]),
        path.unlink,
        (out / "slides" / "s0.json").unlink,
        lambda: (out / "slides" / "s0.json").write_text("{"),
    ):
        spoil()
        assert "3 slides, 2 of them done" in tokenize(slides, "--output", out).err
        assert features(out) == whole
    assert {n: t for n, t in times(out).items() if n != "s0.h5"} == {n: t for n, t in before.items() if n != "s0.h5"}


def test_a_slide_that_was_replaced_is_made_again(tmp_path):
    path = write_slide(tmp_path / "s.tif", 0)
    tokenize(path, "--output", tmp_path / "out")
    before = features(tmp_path / "out")
    write_slide(path, 1, size=(1024, 512))
    (tmp_path / "out" / "tissue" / "s.geojson").unlink()
    assert "1 slides, 0 of them done" in tokenize(path, "--output", tmp_path / "out").err
    assert features(tmp_path / "out") != before


def test_other_settings_are_an_error_that_says_which_and_are_replaced_when_told(slides, whole, tmp_path):
    out = tmp_path / "out"
    tokenize(slides, "--output", out, "--min-tissue", "0.5")
    tokenize(write_slide(tmp_path / "more" / "t.tif", 7), "--output", out)
    message = refused(
        "tokenize", slides, tmp_path / "more", "--output", out, *QUICK, "--seed", "4", "--batch-size", "9"
    )
    assert f"4 slides in {out} have features of other settings, such as s0:\n  encoder: test_vit (weights " in message
    assert "\n  min_tissue: 0.5 -> 0.25\n" in message and "batch" not in message and "--overwrite" in message
    before = times(out)
    said = tokenize(slides, tmp_path / "more", "--output", out, "--overwrite")
    assert "4 slides, 1 of them done" in said.err
    assert {n: c for n, c in features(out).items() if n != "t.h5"} == whole
    assert times(out)["t.h5"] == before["t.h5"]
    # a layout whose files lie elsewhere leaves nothing of the one before
    tokenize(slides, "--output", out, "--layout", "clam", "--overwrite")
    assert sorted(p.name for p in (out / "features").iterdir()) == ["h5_files", "pt_files", "t.h5"]
    # a slide that fails keeps no features of other settings
    (slides / "s0.tif").rename(tmp_path / "away.tif")
    try:
        (slides / "s0.tif").write_bytes(b"II*\0 no slide")
        tokenize(slides, "--output", out, "--overwrite", status=1)
    finally:
        (tmp_path / "away.tif").rename(slides / "s0.tif")
    assert record(out, "s0")["state"] == "failed"
    assert not (out / "features" / "h5_files" / "s0.h5").exists() and not (out / "features" / "s0.h5").exists()


def test_a_full_disk_ends_the_work_and_says_so(slides, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    real_write = tokenize_slide.write_bag

    def write(bag, path, *args, **how):
        if bag.slide_id == "s1":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_write(bag, path, *args, **how)

    with monkeypatch.context() as patched:
        patched.setattr(tokenize_slide, "write_bag", write)
        said = sansmax("tokenize", slides, "--output", out, *QUICK)
    assert said.status == 2 and "Traceback" not in said.err
    assert re.search(r"error: the disk is full: .* could not be written \(No space left on device\)", said.err)
    assert said.err.rstrip().endswith(f"--output {out} {' '.join(QUICK)}")
    assert set(features(out)) == {"s0.h5"}
    tokenize(slides, "--output", out)
    assert features(out) == whole


def test_progress_is_plain_lines_away_from_a_terminal(slides, tmp_path, monkeypatch):
    monkeypatch.setattr("sansmax.engine.progress._LineBar.__init__", line_a_step)
    said = tokenize(slides, "--output", tmp_path / "out", "--batch-size", "2")
    lines = re.findall(
        r"^tokenizing: (\d+) %  (\d)/3 slides  \d+ tiles/s  [\d.]+ slides/min  left \d+ s$", said.err, re.M
    )
    shares = [int(share) for share, _ in lines]
    assert len(lines) > 6 and shares == sorted(shares) and lines[-1] == ("100", "3")
    assert "\x1b" not in said.err and "\r" not in said.err
    quiet = tokenize(slides, "--output", tmp_path / "quiet", "--quiet")
    assert quiet == (0, "", "")


def line_a_step(self, reporter, title):
    reporter.seconds = 0.0
    self.reporter, self.title, self.started = reporter, title, time.monotonic()
    self.printed = self.started
