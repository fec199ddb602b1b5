"""Seconds and memory of one forward pass against the size of the picture, each mechanism in a process of its own.

    python -m sansmax.engine.scaling '{"model": "seqnorm_vit_pico_patch8_128", "mechanism": "softmax", ...}'

prints one JSON object per size. Sizes grow, and a mechanism stops where the next size would exceed its budget.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from sansmax.engine.memory import forget_peak, peak_mib
from sansmax.engine.progress import Reporter

MECHANISMS = {
    "softmax": "softmax (fused)",
    "seqnorm": "sequence norm",
    "streamed": "sequence norm, in chunks",
}
REPEATS = 5
CHUNK_TOKENS = 16384


def measure_scaling(
    model: str,
    sizes: Sequence[int],
    *,
    options: dict[str, Any] | None = None,
    mechanisms: Sequence[str] = tuple(MECHANISMS),
    budget_seconds: float = 20.0,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> list[dict[str, Any]]:
    """Rows `mechanism, tokens, image_px, seconds, peak_mib, reason` for `sansmax.report.scaling`.

    `seconds` is the median of up to five forward passes of one picture without gradients; `peak_mib` is the largest
    memory of the process during them beyond what it held after one pass of the smallest picture (so libraries, network
    and that picture are excluded; the pixels of the picture are subtracted), None below 1 MiB. The softmax twin has the
    same architecture with PyTorch's fused attention.
    """
    reporter = reporter or Reporter(quiet=True)
    rows: list[dict[str, Any]] = []
    with reporter.bar("measuring time and memory") as bar:
        for i, mechanism in enumerate(mechanisms):
            case = {
                "model": model,
                "options": options or {},
                "mechanism": mechanism,
                "sizes": list(sizes),
                "budget_seconds": budget_seconds,
                "threads": threads,
            }
            for done, row in enumerate(_in_child(case), start=1):
                rows.append({**row, "mechanism": MECHANISMS[mechanism]})
                bar.update(i * len(sizes) + done, len(mechanisms) * len(sizes), f"{mechanism} {row['image_px']} px")
    return rows


def _in_child(case: dict[str, Any]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "sansmax.engine.scaling", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode == 0:
        return rows
    if done.returncode > 0 or not rows:
        raise RuntimeError(f"measuring {case['mechanism']} failed:\n{done.stderr[-2000:]}")
    # that the system ended the process, mostly for want of memory, is a result, too
    side = case["sizes"][len(rows)]
    tokens = round(rows[-1]["tokens"] * (side / rows[-1]["image_px"]) ** 2)
    why = f"ended by the system ({signal.Signals(-done.returncode).name}), probably for want of memory"
    return [*rows, {"tokens": tokens, "image_px": side, "seconds": None, "peak_mib": None, "reason": why}]


def _measure(case: dict[str, Any]) -> None:
    import timm

    from sansmax import models  # noqa: F401 - registers them

    if case["threads"]:
        torch.set_num_threads(case["threads"])
    softmax = case["mechanism"] == "softmax"
    torch.manual_seed(0)
    options: dict[str, Any] = {**case["options"], **({"attention": "softmax"} if softmax else {})}
    network: Any = timm.create_model(case["model"], **options).eval()
    patch = network.patch_embed.patch_size[0]
    last: tuple[int, float] | None = None
    for _ in range(3):
        _forward(network, _picture(case["sizes"][0]), case["mechanism"])()
    base = peak_mib(now=True)
    for side in case["sizes"]:
        tokens = (side // patch) ** 2
        row = {"tokens": tokens, "image_px": side, "seconds": None, "peak_mib": None, "reason": None}
        growth = 2 if softmax else 1
        expected = 0.0 if last is None else last[1] * (tokens / last[0]) ** growth
        if expected > case["budget_seconds"]:
            row["reason"] = f"would take about {_rounded(expected)}"
            sys.stdout.write(json.dumps(row) + "\n")
            return
        pixels = _picture(side)
        row["seconds"], peak = _cost(_forward(network, pixels, case["mechanism"]), case["budget_seconds"])
        extra = peak - base - pixels.nbytes / 2**20
        row["peak_mib"] = extra if extra >= 1 else None
        last = (tokens, row["seconds"])
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


def _rounded(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _forward(network: Any, pixels: np.ndarray, mechanism: str) -> Callable[[], object]:
    from sansmax.data.tokens import PixelSource
    from sansmax.engine.stream import stream_tokens

    source = PixelSource(pixels, network.patch_embed.patch_size, in_chans=network.in_chans)
    if mechanism == "streamed":
        return lambda: stream_tokens(network, source, chunk_tokens=CHUNK_TOKENS)

    def whole() -> object:
        with torch.no_grad():
            return network(source.read(0, source.grid[0]))

    return whole


def _picture(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)


def _cost(forward: Callable[[], object], budget: float) -> tuple[float, float]:
    """Median seconds, and the largest memory of the process in MiB."""
    forget_peak()
    times: list[float] = []
    while len(times) < REPEATS and sum(times) < budget:
        start = time.perf_counter()
        forward()
        times.append(time.perf_counter() - start)
    return float(np.median(times)), peak_mib()


if __name__ == "__main__":
    _measure(json.loads(sys.argv[1]))
