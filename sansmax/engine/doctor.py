"""What of this machine and installation works, what does not, and the mend."""

import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from sansmax.report.benchmark import do_again
from sansmax.report.numerics import errors_text, grouped, worst_first

OPTIONAL = {
    "datasets": ("data sets of the Hugging Face hub, hfds/NAME", "pip install 'sansmax[datasets]'"),
    "tensorflow_datasets": ("TensorFlow data sets, tfds/NAME", "pip install tensorflow-datasets tensorflow"),
}


@dataclass(frozen=True)
class Finding:
    """`state` is PASS, WARN or FAIL; `fix` says what to do where it is not PASS."""

    state: str
    what: str
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """All findings, the worst first within each group left in reading order."""
    return [*_versions(), *_device(), *_arithmetic(), *_optional()]


def _versions() -> list[Finding]:
    python = platform.python_version()
    ok = sys.version_info >= (3, 11)
    findings = [Finding("PASS" if ok else "FAIL", "Python", python, "" if ok else "use Python 3.11 or newer")]
    for requirement in requires("sansmax") or []:
        if "extra ==" in requirement:
            continue
        name, least = _split(requirement)
        try:
            have = version(name)
        except PackageNotFoundError:
            findings.append(Finding("FAIL", name, "missing", f"pip install '{name}>={least}'"))
            continue
        good = _key(have) >= _key(least)
        fix = "" if good else f"pip install --upgrade '{name}>={least}'"
        findings.append(Finding("PASS" if good else "FAIL", name, f"{have} (needs {least} or newer)", fix))
    return findings


def _split(requirement: str) -> tuple[str, str]:
    name, _, rest = requirement.partition(">=")
    return name.strip(), rest.split(",")[0].split(";")[0].strip() or "0"


def _key(text: str) -> tuple[int, ...]:
    parts = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        parts.append(int(digits or 0))
    return tuple(parts)


def _device() -> list[Finding]:
    if torch.cuda.is_available():
        index = torch.cuda.current_device()
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found = [Finding("PASS", "device", f"cuda: {torch.cuda.get_device_name(index)}, {memory:.0f} GiB")]
    elif torch.backends.mps.is_available():
        found = [Finding("PASS", "device", "mps")]
    else:
        found = [Finding("PASS", "device", "cpu (no accelerator: training is slower, results are the same)")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    if threads > cores:
        fix = f"set OMP_NUM_THREADS={cores}: more threads than cores make every step slower"
        return [*found, Finding("WARN", "threads", f"{threads} threads on {cores} cores", fix)]
    return [*found, Finding("PASS", "threads", f"{threads} threads on {cores} cores")]


def _arithmetic() -> list[Finding]:
    """Whether 16 bit products work here, and whether they are faster than 32 bit."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        ratio = _seconds(torch.float32, device) / _seconds(torch.bfloat16, device)
    except RuntimeError as error:
        return [Finding("WARN", "bfloat16", f"does not work: {error}", "train with precision=32, the default")]
    text = f"matrix products {ratio:.1f} times as fast as float32"
    if ratio < 1:
        return [Finding("WARN", "bfloat16", text, "keep precision=32, the default: 16 bit is slower here")]
    return [Finding("PASS", "bfloat16", text)]


def examine_numerics(
    output: Path | None = None,
    command: str = "sansmax doctor --numerics",
    progress: Callable[[int, int], object] | None = None,
    **cases: Any,
) -> list[Finding]:
    """What each attention loses in each precision on this machine, the worst of all tokens; one finding for each pair.

    `output` is a folder for the whole table (numerics.csv, numerics.md) with the `command` that made it. `cases` are
    those of `sansmax.engine.numerics.measure`, all by default.
    """
    from sansmax.engine.numerics import INPUTS, measure
    from sansmax.report.numerics import write_numerics

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = [
        {**asdict(row), "state": row.state, "fix": row.fix}
        for row in measure(device=device, progress=progress, **cases)
    ]
    words = {kind: said for kind, (said, _) in INPUTS.items()}
    if output is not None:
        machine = {"processor": platform.processor() or platform.machine(), "device": _device()[0].detail}
        machine |= {"threads": torch.get_num_threads(), "torch": version("torch"), "sansmax": version("sansmax")}
        write_numerics(output, rows, words, do_again(command, machine))
    return [_finding(some, words) for some in grouped(rows, "mechanism", "precision").values()]


def _finding(rows: list[Any], words: dict[str, str]) -> Finding:
    """The worst of the rows of one mechanism in one precision."""
    worst = worst_first(rows)[0]
    detail = errors_text(worst)
    if worst["state"] != "PASS":
        detail += f" on {words[worst['inputs']]}"
    times = [row["time_ratio"] for row in rows if row["time_ratio"] is not None]
    if times and worst["precision"] != "float32":
        detail += f"; {median(times):.1f} times the time of float32"
    return Finding(worst["state"], f"{worst['mechanism']}, {worst['precision']}", detail, worst["fix"])


def _seconds(dtype: torch.dtype, device: str, size: int = 768) -> float:
    a = torch.randn(size, size, device=device).to(dtype)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        _finished(a @ a)
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _finished(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def _optional() -> list[Finding]:
    findings = []
    for module, (use, install) in OPTIONAL.items():
        if importlib.util.find_spec(module) is not None:
            findings.append(Finding("PASS", module, f"for {use}"))
        else:
            findings.append(Finding("WARN", module, f"not installed; only for {use}", install))
    return findings
