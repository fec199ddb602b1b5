"""The command line in processes of their own, each copied from one that has the libraries loaded and computed nothing.

A start so costs a tenth of a second, and the process may be killed as any other.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent


class Commands:
    """Runs commands one at a time; `with Commands() as commands`."""

    def __enter__(self):
        paths = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.source = subprocess.Popen(
            [sys.executable, "-c", "import commands; commands.serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # threads as here: their number, and who sets it, changes the last digits
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        return self

    def __exit__(self, *error):
        self.source.kill()
        self.source.communicate()

    def start(self, words, folder, **plan):
        """Starts `sansmax` with these words and gives its process id; `plan` is for `prepared`."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        json.dump([[*map(str, words)], str(folder), plan], self.source.stdin)
        self.source.stdin.write("\n")
        self.source.stdin.flush()
        return int(self.source.stdout.readline())

    def ended(self):
        """Status of the command, minus the signal that ended it, and what it wrote to the terminal."""
        return int(self.source.stdout.readline()), (self.folder / "err").read_text()

    def run(self, words, folder, **plan):
        """Starts a command and waits for its end."""
        self.start(words, folder, **plan)
        return self.ended()


def serve():
    """Copies this process for each line of the standard input; what is imported here is there in each copy."""
    import lightning.pytorch  # noqa: F401
    import timm.optim  # noqa: F401

    import sansmax.cli
    import sansmax.engine.bag_train
    import sansmax.engine.callbacks
    import sansmax.engine.train  # noqa: F401

    for line in sys.stdin:
        words, folder, plan = json.loads(line)
        child = os.fork()
        if child == 0:
            _command(words, Path(folder), plan)
        print(child, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(status, flush=True)


def _command(words, folder, plan):
    os.setsid()
    status = 70
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        prepared(folder, **plan)
        sys.argv = ["sansmax", *words]
        from sansmax.cli import main

        main()
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def prepared(folder, at_write=None, worker_at=None):
    """Has every step note its loss in the file `trace`, and no report written.

    `at_write` kills the process when so many of its writes to the disk were made (a file or a folder that is synced,
    a file that is renamed); `worker_at` kills a process that loads images at a step.
    """
    import sansmax.engine.train
    from sansmax.engine.callbacks import Recorder

    sansmax.engine.train.finish_run = lambda output, data, reporter: sansmax.engine.train.Run.open(output)
    original = Recorder.on_train_batch_end

    def noted(self, trainer, module, *args):
        with (folder / "trace").open("a") as file:
            file.write(f"{trainer.global_step} {module.last_loss.hex()}\n")
        if trainer.global_step == worker_at:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return original(self, trainer, module, *args)

    Recorder.on_train_batch_end = noted
    if at_write is not None:
        left = [at_write]

        def counted(call):
            def counting(*args):
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)

            return counting

        os.fsync, os.replace = counted(os.fsync), counted(os.replace)
