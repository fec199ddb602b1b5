"""Time and memory of contestants, measured in a process apart; started and read by `sansmax.engine.workers`.

    python -m sansmax.engine.timing

reads a request per line and answers with lines of JSON. It only loads the libraries; each request is done by a copy of
it, so that its memory is its own and its death is an answer, too.
"""

import dataclasses
import gc
import json
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import torch

from sansmax.engine.cases import Case
from sansmax.engine.contestants import Step, network_step
from sansmax.engine.memory import forget_peak, give_back, limit_memory, peak_mib
from sansmax.engine.targets import chunked_step, operation_step
from sansmax.errors import InputError

PREPARE: dict[str, Callable[[Case, str], Step]] = {
    "layer": network_step,
    "encoder": network_step,
    "block": network_step,
    "seqnorm": operation_step,
    "sima": operation_step,
    "soft": operation_step,
    "chunked": chunked_step,
}
# a sample of less than this is of several calls
SAMPLE_SECONDS = 0.004
SMALL = 64
OUT_OF_MEMORY = "not enough memory"
Say = Callable[[dict[str, Any]], None]


def measure_memory(case: Case, name: str, say: Say) -> None:
    """Answers `peak_mib`, the memory of one pass beyond network and tokens, and the `seconds` of that pass."""
    prepare = PREPARE[case.kind]
    on_gpu = case.device == "cuda"
    say({"begin": name, "pid": os.getpid()})
    # libraries set themselves up at a first pass, which is no memory of this one
    small = prepare(dataclasses.replace(case, tokens=min(SMALL, case.tokens), batch=1, depth=1), name)
    small()
    del small
    step = prepare(case, name)
    gc.collect()
    give_back()
    forget_peak()
    before = peak_mib(now=True)
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    start = time.perf_counter()
    kept = step()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else peak_mib()
    del kept
    say({"name": name, "seconds": seconds, "peak_mib": peak - before})


def measure_times(case: Case, names: Sequence[str], budget: float, repeats: int, say: Say) -> None:
    """Answers `samples`, seconds per call of each contestant; the contestants take turns.

    A contestant leaves the round when it has `repeats` samples, or when its samples have taken `budget` seconds.
    """
    wait = torch.cuda.synchronize if case.device == "cuda" else _nothing
    steps, calls = {}, {}
    for name in names:
        say({"begin": name, "pid": os.getpid()})
        try:
            step = PREPARE[case.kind](case, name)
            seconds = _seconds(step, 1, wait)
            if seconds < budget / 4:
                # the first call also sets up what later ones find there
                seconds = _seconds(step, 1, wait)
        except _OUTCOMES as error:
            say({"name": name, "reason": reason_of(error)})
            continue
        steps[name] = step
        calls[name] = max(1, round(SAMPLE_SECONDS / max(seconds, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    spent = dict.fromkeys(steps, 0.0)
    gc.collect()
    gc.disable()
    waiting, draw = list(steps), random.Random(0)
    while waiting:
        # drawn anew each time: whoever always follows one that fills the caches or gives memory back pays for it
        for name in draw.sample(waiting, len(waiting)):
            say({"begin": name, "pid": os.getpid()})
            seconds = _seconds(steps[name], calls[name], wait)
            samples[name].append(seconds)
            spent[name] += seconds * calls[name]
        waiting = [n for n in waiting if len(samples[n]) < repeats and spent[n] < budget]
    say({"samples": samples})


def _seconds(step: Step, calls: int, wait: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    wait()
    return (time.perf_counter() - start) / calls


def _nothing() -> None:
    return None


# what a contestant may answer instead of a time; anything else is a fault of ours
_OUTCOMES = (InputError, RuntimeError, NotImplementedError, MemoryError, TypeError, ValueError)


def reason_of(error: Exception) -> str:
    """Why a contestant cannot run, in one line."""
    if isinstance(error, InputError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        return OUT_OF_MEMORY
    return f"fails: {text[:120]}{'...' if len(text) > 120 else ''} ({type(error).__name__})"


def work(request: dict[str, Any], say: Say) -> None:
    """Does one request; the last line of its answer is `ended`, or `fault` where the fault is ours."""
    try:
        case = Case(**{**request["case"], "contestants": tuple(request["case"]["contestants"])})
        torch.set_num_threads(case.threads)
        if request["what"] == "memory":
            if case.device == "cpu":
                limit_memory(request["memory_mib"])
            try:
                measure_memory(case, request["name"], say)
            except _OUTCOMES as error:
                say({"name": request["name"], "reason": reason_of(error)})
        else:
            measure_times(case, request["names"], request["budget"], request["repeats"], say)
        say({"ended": 0})
    except BaseException:
        say({"fault": traceback.format_exc()})


def serve(lines: TextIO, say: Say, fork: bool) -> None:
    """Does one request per line until there are no more."""
    # what the libraries made is never looked at again, so copies of this process share it
    gc.collect()
    gc.freeze()
    for line in lines:
        if not fork:
            work(json.loads(line), say)
            return
        pid = os.fork()
        if pid == 0:
            work(json.loads(line), say)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code:
            say({"ended": code})


def main() -> None:
    """Answers on what was the standard output, which what is measured may not write to."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")

    serve(sys.stdin, say, fork=sys.platform == "linux")


if __name__ == "__main__":
    main()
