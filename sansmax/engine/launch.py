"""Starts the processes of one machine that train together, and ends them together: what `--devices` does.

Each runs this module with a task file and what torchrun would tell it (RANK, WORLD_SIZE, ...). The one that ends the
run writes why beside the task; here it is raised again, so that the caller sees what one process would raise.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sansmax.engine.config import TrainConfig
from sansmax.engine.progress import Reporter
from sansmax.engine.stopping import Stopped, StopSignal, resume_command
from sansmax.errors import InputError

T = TypeVar("T")
# seconds the others get to end by themselves when one has ended badly, and to write a checkpoint when asked to stop
GRACE, TO_STOP = 10.0, 120.0


def spread(kind: str, config: Any, output: Path, reporter: Reporter, work: Callable[..., T], **how: Any) -> T | None:
    """What `work(config, output, processes, reporter, **how)` gives in each of the processes that train together.

    None where they had to be started here, and have ended; `kind` and `how` are those of `launch`. Only the first
    process speaks.
    """
    from sansmax.engine.place import processes_to_start
    from sansmax.engine.processes import joined
    from sansmax.engine.run import check_folder

    if count := processes_to_start(config.parallel):
        # each of them says it too, but it takes them seconds to start
        check_folder(output, overwrite=how["overwrite"], resume=how["resume"])
        launch(kind, config, output, count, reporter, **how)
        return None
    with joined(config.parallel, config.device) as processes:
        return work(config, output, processes, reporter if processes.is_first else Reporter(quiet=True), **how)


def launch(kind: str, config: Any, output: Path, count: int, reporter: Reporter, **how: Any) -> None:
    """Trains in `count` processes of this machine; `kind` is "images" or "bags", `how` the arguments of training.

    Raises what training raises: InputError, also where a process was killed, and `Stopped`.
    """
    with tempfile.TemporaryDirectory(prefix="sansmax-") as folder:
        task = Path(folder) / "task.json"
        what = {"kind": kind, "config": config.model_dump(mode="json"), "output": str(output), "quiet": reporter.quiet}
        task.write_text(json.dumps({**what, "how": how}), encoding="utf-8")
        statuses = _run(task, count)
        words = sorted(Path(folder).glob("*.said"))
        if words:
            said = json.loads(words[0].read_text(encoding="utf-8"))
            if said["kind"] == "Stopped":
                stopped = Stopped("", output)
                stopped.args, stopped.what = (said["text"],), said["what"]
                raise stopped
            raise (InputError if said["kind"] == "InputError" else RuntimeError)(said["text"])
        if bad := [rank for rank, status in enumerate(statuses) if status]:
            status = statuses[bad[0]]
            how_ended = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            raise InputError(
                f"process {bad[0]} of {count} {how_ended}; what was written before is kept. Go on with: "
                f"{resume_command(output)}"
            )


def _run(task: Path, count: int) -> list[int]:
    """The exit statuses of the processes: all end when one has ended badly, or when asked to stop."""
    processes: list[subprocess.Popen[bytes]] = []
    port = _free_port()
    stop = StopSignal()
    ended_badly: float | None = None
    asked: float | None = None
    try:
        for rank in range(count):
            environment = {**_environment(rank, count), "MASTER_PORT": str(port)}
            # a session of their own: Ctrl-C reaches them once, from here
            processes.append(subprocess.Popen(_command(task), env=environment, start_new_session=True))
        with stop.listening():
            while any(p.poll() is None for p in processes):
                now = time.monotonic()
                if stop.name is not None and asked is None:
                    asked = now
                    _send(processes, signal.Signals[stop.name])
                if ended_badly is None and any(p.returncode for p in processes):
                    ended_badly = now
                late = (ended_badly is not None and now > ended_badly + GRACE) or (
                    asked is not None and now > asked + TO_STOP
                )
                if late:
                    _send(processes, signal.SIGKILL)
                time.sleep(0.05)
        return [p.returncode for p in processes]
    finally:
        # also when asked a second time to stop
        _send(processes, signal.SIGKILL)
        for p in processes:
            p.wait()


def _send(processes: list[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for p in processes:
        if p.poll() is None:
            p.send_signal(number)


def _command(task: Path) -> list[str]:
    return [sys.executable, "-m", "sansmax.engine.launch", str(task)]


def _environment(rank: int, count: int) -> dict[str, str]:
    """What torchrun would say, and a share of the cores for each process."""
    of_run = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    named = {name: str(value) for name, value in of_run.items()}
    return {**os.environ, **named, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": threads}


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def main(task: Path) -> int:
    """What each of the processes does; the exit status."""
    from sansmax.engine.place import place_of
    from sansmax.engine.processes import speaks

    what = json.loads(task.read_text(encoding="utf-8"))
    place = place_of()
    assert place is not None, "started by `launch`"
    try:
        _train(what, Reporter(quiet=what["quiet"] or place.rank > 0))
        return 0
    except Exception as error:
        kind = next((k.__name__ for k in (Stopped, InputError) if isinstance(error, k)), type(error).__name__)
        text = str(error) if kind in ("Stopped", "InputError") else f"{kind} in process {place.rank}: {error}"
        if speaks():
            said = {"kind": kind, "text": text, "what": getattr(error, "what", "")}
            task.with_suffix(f".{place.rank}.said").write_text(json.dumps(said), encoding="utf-8")
        return 130 if isinstance(error, Stopped) else 2


def _train(what: dict[str, Any], reporter: Reporter) -> None:
    output = Path(what["output"])
    if what["kind"] == "bags":
        from sansmax.engine.bag_config import BagConfig
        from sansmax.engine.bag_experiment import train_bags

        train_bags(BagConfig.model_validate(what["config"]), output, reporter=reporter, **what["how"])
        return
    from sansmax.engine.train import train

    train(TrainConfig.model_validate(what["config"]), output, reporter=reporter, **what["how"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
