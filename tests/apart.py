"""Scripts in an interpreter of their own: shapes are not checked there, and checked shapes break a compiler's graph."""

import json
import subprocess
import sys


def answer_of(script):
    """What the last printed line of the script says, as JSON."""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def assert_nothing_wrong(script):
    """The script prints a JSON object of cases that went wrong, with the reason: none may."""
    wrong = answer_of(script)
    assert not wrong, "\n".join(f"{name}: {why}" for name, why in wrong.items())
