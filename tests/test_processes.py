"""Several processes train what one trains: the same batches, gradients, metrics, and the same end after any stop."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from bags import config as bag_config
from bags import toy
from gloo import in_processes
from runs import KEYS, options, rows_of, tiny, train_only
from safetensors.torch import load_file

from sansmax.data.bag_loading import shared_out
from sansmax.data.sampling import EpochSampler, Share
from sansmax.engine.bag_train import fit_bags
from sansmax.engine.batch_norm import synchronise
from sansmax.engine.callbacks import Recorder
from sansmax.engine.config import ParallelConfig
from sansmax.engine.place import Place, check_shared_out, place_of, processes_to_start
from sansmax.engine.processes import Processes
from sansmax.engine.stopping import Stopped
from sansmax.errors import InputError
from sansmax.report.tables import read_rows

# Sharing out


@pytest.mark.parametrize("pairs", [False, True])
def test_the_shares_of_a_batch_are_the_batch_and_what_is_mixed_stays_together(pairs):
    for n, of in itertools.product(range(14), range(1, 6)):
        parts = [Share(number, of).positions(n, pairs) for number in range(of)]
        assert sorted(i for part in parts for i in part) == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= (3 if pairs else 1)
        for part in parts if pairs else ():
            # mixing pairs a batch with itself in the opposite order
            assert [n - 1 - i for i in part] == part[::-1]


def test_an_epoch_is_the_same_however_it_is_shared_out():
    whole = list(EpochSampler(23, 6, seed=5))
    shares = [list(EpochSampler(23, 6, seed=5, share=Share(number, 4))) for number in range(4)]
    assert [[key for part in parts for key in part] for parts in zip(*shares, strict=True)] == whole
    resumed = EpochSampler(23, 6, seed=5, share=Share(2, 4))
    resumed.start_at(0, 2)
    assert list(resumed) == shares[2][2:]


def test_bags_are_shared_out_by_their_tokens():
    rng = np.random.default_rng(0)
    for n, of in itertools.product(range(7), range(1, 4)):
        lengths = rng.integers(1, 50, n).tolist()
        parts = shared_out(lengths, of)
        assert sorted(i for part in parts for i in part) == list(range(n))
        assert all(part == sorted(part) for part in parts)
        fullest = max(sum(lengths[i] for i in part) for part in parts)
        ways = itertools.product(range(of), repeat=n)
        best = min(
            max(sum(w for w, at in zip(lengths, way, strict=True) if at == k) for k in range(of)) for way in ways
        )
        assert fullest <= (4 / 3) * best


# Which process this is


def test_who_started_a_process_says_which_one_it_is():
    assert place_of({}) is None
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert place_of(torchrun) == Place(5, 8, 1, 4)
    # in a batch script the variables of the job are there, and no step has begun
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert place_of(job) is None
    step = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"}
    assert place_of({**job, **step}) == Place(6, 8, 2, 4)
    assert place_of({**job, **step, **torchrun}) == Place(5, 8, 1, 4)
    with pytest.raises(InputError, match="7 tasks on 2 machines"):
        place_of({**step, "SLURM_STEP_NUM_TASKS": "7"})


def test_what_is_asked_for_and_what_was_started_have_to_fit(monkeypatch):
    assert processes_to_start(ParallelConfig()) == 0
    assert processes_to_start(ParallelConfig(devices=3)) == 3
    with pytest.raises(InputError, match=r"2 does not divide the 1 process of the run.*torchrun"):
        processes_to_start(ParallelConfig(sequence_parallel=2))
    with pytest.raises(InputError, match=r"3 does not divide the 4 processes of the run; it can be 1, 2, 4$"):
        processes_to_start(ParallelConfig(devices=4, sequence_parallel=3))
    with pytest.raises(InputError, match=r"cannot start the processes of another.*torchrun on each"):
        processes_to_start(ParallelConfig(devices=2, num_nodes=2))
    for name, value in {"RANK": 0, "WORLD_SIZE": 4}.items():
        monkeypatch.setenv(name, str(value))
    assert processes_to_start(ParallelConfig()) == processes_to_start(ParallelConfig(devices=2, num_nodes=2)) == 0
    with pytest.raises(InputError, match=r"for 2 processes .* and 4 were started"):
        processes_to_start(ParallelConfig(devices=2))


def test_what_cannot_be_shared_out_is_refused(tmp_path):
    with pytest.raises(InputError, match="packs of bags differ in number"):
        check_shared_out("fsdp", "32", 1, packs=True)
    with pytest.raises(InputError, match="leave the strategy at ddp, or --sequence-parallel at 1"):
        check_shared_out("fsdp", "32", 2)
    with pytest.raises(InputError, match="cannot scale the loss for float16; use precision=bf16 or 32"):
        train_only(tiny(parallel__strategy="fsdp", precision="16"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _words(**keys):
    return options({**KEYS, **{name.replace("__", "."): value for name, value in keys.items()}})


# What they tell each other


def _talk(rank):
    found = Processes.of_group(Place(rank, 3, rank, 3), 1, "cpu")
    rows = torch.arange(2.0 * rank).reshape(rank, 2) + 10 * rank
    said = []

    def failing():
        raise InputError("no such folder")

    for act in (lambda: found.first(failing), lambda: found.check_same("the images", str(rank // 2))):
        try:
            act()
        except InputError as error:
            said.append(str(error))
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = None if rank == 1 else torch.full((2,), 1.0 + rank)
    found.sum_gradients([weight])
    return {
        "gathered": found.gathered(rows).tolist(),
        "none": found.gathered(rows[:0]).tolist(),
        "highest": found.highest([rank, -rank]),
        "summed": float(found.summed(torch.tensor(1.0 + rank))),
        "lists": found.joined_lists(["x"] * rank),
        "first": found.first(lambda: 7),
        "turn": found.in_turn(lambda: rank),
        "gradient": weight.grad.tolist(),
        "said": said,
    }


def test_processes_gather_sum_and_fail_together():
    said = in_processes(3, _talk)
    rows = [[10.0, 11.0], [20.0, 21.0], [22.0, 23.0]]
    for rank, found in enumerate(said):
        assert found["gathered"] == rows and found["none"] == []
        assert found["highest"] == [2, 0] and found["summed"] == 6
        assert found["lists"] == ["x"] * 3
        assert found["first"] == (7 if rank == 0 else None) and found["turn"] == rank
        assert found["gradient"] == [4.0, 4.0]
        assert found["said"] == [
            "no such folder",
            "the images differ between process 0 and [2]: give all machines the same files",
        ]


def _norms(kind, momentum):
    torch.manual_seed(0)
    size = (7, 3, 4, 2) if kind is torch.nn.BatchNorm2d else (7, 3)
    x = (torch.randn(size, dtype=torch.float64) * 0.1 + 1e4).requires_grad_()
    norm = kind(3, momentum=momentum).double()
    torch.nn.init.normal_(norm.weight)
    return x, torch.nn.Sequential(norm), torch.randn(size, dtype=torch.float64)


def _normalise(rank, kind, momentum):
    """Rank 0 has five of the seven images, and rank 1 two."""
    found = Processes.of_group(Place(rank, 2, rank, 2), 1, "cpu")
    x, network, by = _norms(kind, momentum)
    names = list(network.state_dict())
    network = synchronise(network, found, 7, "cpu")
    assert list(network.state_dict()) == names
    own = slice(0, 5) if rank == 0 else slice(5, 7)
    for _ in range(2):
        network.zero_grad()
        x.grad = None
        out = network(x[own])
        (out * by[own]).sum().backward()
    found.sum_gradients(list(network.parameters()))
    said = None
    try:
        synchronise(_norms(kind, momentum)[1], found, 1, "cpu")
    except InputError as error:
        said = str(error)
    gradients = [p.grad for p in network.parameters()]
    return out.detach(), x.grad[own], gradients, list(network.buffers()), said


@pytest.mark.parametrize(("kind", "momentum"), [(torch.nn.BatchNorm2d, 0.1), (torch.nn.BatchNorm1d, None)])
def test_batch_norm_sees_the_images_of_all_processes(kind, momentum):
    x, network, by = _norms(kind, momentum)
    for _ in range(2):
        network.zero_grad()
        x.grad = None
        out = network(x)
        (out * by).sum().backward()
    found = in_processes(2, _normalise, kind, momentum)
    close = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(torch.cat([f[0] for f in found]), out, **close)
    torch.testing.assert_close(torch.cat([f[1] for f in found]), x.grad, **close)
    for _, _, gradients, buffers, said in found:
        torch.testing.assert_close(gradients, [p.grad for p in network.parameters()], **close)
        torch.testing.assert_close(buffers, list(network.buffers()), **close)
        assert "a batch of 1 leaves some of 2 processes without an image" in said


# Training

IMAGES = {
    "data__source": "mosaics:grid=4,share=0.4,train=30,val=13,test=4",
    "batch_size": 10,
    "augment__hflip": 0.5,
    "augment__noise": 0.05,
    # Adam would make steps of the rounding of gradients that are 0
    "optim__opt": "sgd",
    "optim__lr": 0.05,
}
CASES = {
    # shares of 3, 3 and 4 images; groups of two batches and of one
    "weights": {"optim__class_weights": True, "optim__smoothing": 0.1, "optim__grad_accum_steps": 2},
    "mixed": {"optim__mixup": 0.4, "optim__cutmix": 0.4, "optim__model_ema_decay": 0.9, "balanced": True},
    # one of three processes never has an image
    "empty": {"batch_size": 2, "epochs": 1, "data__source": "mosaics:grid=4,share=0.4,train=10,val=7,test=4"},
}


def _train(rank, folder, cases):
    torch.set_num_threads(1)
    for name, keys in cases.items():
        train_only(tiny(**{**IMAGES, **keys}), Path(folder, name))


def _bags(rank, folder, cases):
    torch.set_num_threads(1)
    for name, (task, keys) in cases.items():
        bags, cases_ = toy(task)
        parts = cases_.ids[:17], cases_.ids[17:]
        fit_bags(
            bag_config(**{"optim__opt": "sgd", "optim__lr": 0.02, **keys}),
            None,
            bags,
            cases_,
            *parts,
            Path(folder, name),
        )


def same(one, other, clocks=("seconds", "images_per_second", "tokens_per_second")):
    """Two runs have the same rows and weights but for rounding."""
    pairs = zip(read_rows(one / "metrics.csv"), read_rows(other / "metrics.csv"), strict=True)
    for a, b in pairs:
        for name in set(a) - set(clocks):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), name
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """What one process gives."""
    folder = tmp_path_factory.mktemp("one")
    in_processes(1, _train, folder, CASES)
    return folder


def test_three_processes_train_what_one_does(one, tmp_path):
    in_processes(3, _train, tmp_path, CASES)
    for name in CASES:
        same(one / name, tmp_path / name)


# four processes: two pairs, each of which shares the tokens of its images
OTHERS = {"fsdp": (2, {"parallel__strategy": "fsdp"}), "tokens": (4, {"parallel__sequence_parallel": 2})}


@pytest.mark.parametrize("name", OTHERS)
def test_parameters_and_tokens_are_shared_out_and_nothing_changes(name, one, tmp_path):
    world, keys = OTHERS[name]
    in_processes(world, _train, tmp_path, {name: {**CASES["mixed"], **keys}})
    same(one / "mixed", tmp_path / name)


def _interrupted(rank, folder, keys):
    torch.set_num_threads(1)
    config = tiny(**keys)
    train_only(config, Path(folder, "whole"))
    original = Recorder.on_train_batch_end

    def stopping(self, trainer, *args):
        if rank == 0 and trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, trainer, *args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Recorder, "on_train_batch_end", stopping)
        with pytest.raises(Stopped, match=r"before epoch 2, batch 2 of 3"):
            train_only(config, Path(folder, "stopped"))
    train_only(None, Path(folder, "stopped"), resume=True)


def test_with_parameters_shared_out_a_stopped_run_ends_as_one_that_never_was(tmp_path):
    # states of the optimiser that are shared out, too
    keys = {**IMAGES, **CASES["mixed"], **OTHERS["fsdp"][1], "optim__opt": "adamw", "optim__lr": 1e-3}
    in_processes(2, _interrupted, tmp_path, keys)
    assert rows_of(tmp_path / "stopped") == rows_of(tmp_path / "whole")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert weights[0] == weights[1]


BAGS = {
    "uneven": ("classification", {"tokens__mix": 0.5, "tokens__keep": [0.4, 0.9], "optim__class_weights": True}),
    "survival": ("survival", {}),
    # the last step has one patient, for two processes
    "empty": ("regression", {"batch_size": 1, "epochs": 1}),
}


def test_uneven_bags_over_two_processes_train_what_one_does(tmp_path):
    for world in (1, 2):
        in_processes(world, _bags, tmp_path / str(world), BAGS)
    for name in BAGS:
        same(tmp_path / "1" / name, tmp_path / "2" / name)


# Ends

LONG = {
    **IMAGES,
    "data__source": "mosaics:grid=4,share=0.4,train=400,val=8,test=4",
    "model__options__drop_path_rate": 0.3,
    "optim__mixup": 0.4,
    "checkpoint_steps": 3,
}


def _whole(rank, folder):
    torch.set_num_threads(1)
    train_only(tiny(**LONG), Path(folder))


def _go_on(rank, folders):
    torch.set_num_threads(1)
    for folder in folders:
        train_only(None, Path(folder), resume=True)


def started(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=environment,
    )


def wait_for_an_epoch(process, run):
    end = time.monotonic() + 200
    while not ((run / "metrics.csv").exists() and (run / "previous.ckpt").exists()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_torchrun_stopped_and_a_process_killed_go_on_as_if_nothing_had_been(tmp_path):
    words = [*_words(**LONG), "--output"]
    asked, killed = tmp_path / "asked", tmp_path / "killed"
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "sansmax", "train", *words, asked)
    commands = [started(*torchrun), started("sansmax", "train", "--devices", 2, *words, killed)]
    try:
        wait_for_an_epoch(commands[0], asked)
        commands[0].send_signal(signal.SIGTERM)
        wait_for_an_epoch(commands[1], killed)
        children = Path(f"/proc/{commands[1].pid}/task/{commands[1].pid}/children").read_text().split()
        assert len(children) == 2
        os.kill(int(children[1]), signal.SIGKILL)
        said = [command.communicate(timeout=200) for command in commands]
    finally:
        for command in commands:
            if command.poll() is None:
                os.killpg(command.pid, signal.SIGKILL)
                command.communicate()
    assert commands[0].returncode != 0 and said[0][0] == ""
    (message,) = [line for line in said[0][1].splitlines() if line.startswith("stopped by ")]
    assert message.startswith("stopped by SIGTERM before epoch 2, batch") and str(asked) in message
    assert commands[1].returncode == 2 and said[1][0] == ""
    assert said[1][1].count("error: ") == 1 and "Traceback" not in said[1][1]
    assert "process 1 of 2 was ended by SIGKILL" in said[1][1] or "another process of this run ended" in said[1][1]
    in_processes(2, _whole, tmp_path / "whole", seconds=200)
    in_processes(2, _go_on, [asked, killed], seconds=200)
    for run in (asked, killed):
        assert rows_of(run) == rows_of(tmp_path / "whole")
        weights = [(folder / "model.safetensors").read_bytes() for folder in (run, tmp_path / "whole")]
        assert weights[0] == weights[1]


def test_slurm_leaves_signals_to_training(tmp_path, monkeypatch):
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "er", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    for name, value in {**job, "SLURM_NODEID": "0", "SLURM_NTASKS_PER_NODE": "2"}.items():
        monkeypatch.setenv(name, value)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    seen = []

    def look(self, trainer, *args):
        seen.append([trainer.world_size, *(signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1))])
        return original(self, trainer, *args)

    original = Recorder.on_train_epoch_end
    monkeypatch.setattr(Recorder, "on_train_epoch_end", look)
    train_only(tiny(**CASES["empty"]), tmp_path / "run")
    (world, on_term, on_usr1) = seen[0]
    # Lightning would hand the job back to SLURM by itself
    assert world == 1 and on_term.__name__ == on_usr1.__name__ == "_request"
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
