"""What processes that share the tokens of one image send each other, per layer: sums of states, or keys and values.

    OMP_NUM_THREADS=1 python -m benchmarks.communication

Counts by formula, for 10^4 to 10^8 tokens and 2 to 64 processes, and measures with 2 and 4 processes over gloo on this
machine: one attention layer of each kind, forward and backward, the bytes read from the network interface (in a network
namespace of its own, where nothing else sends), the time beside them. The three ways to share out softmax are in
`benchmarks.sequence_rivals`. All are first checked against one process. Writes communication.csv, .md and .png.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.machine import do_it_again
from benchmarks.sequence_rivals import RIVALS
from sansmax.engine.parallel import Members
from sansmax.engine.run import environment
from sansmax.models.attention import attend_among
from sansmax.models.attention_soft import Place
from sansmax.models.blocks import ATTENTIONS
from sansmax.report.style import COLOURS, INK, MUTED, look, new_figure, save
from sansmax.report.summary import table, write_summary
from sansmax.report.tables import write_rows

LANDMARKS, FLOAT = 49, 4
WIDTHS = {192: 3, 768: 12}
PROCESSES = (2, 4, 8, 64)
TOKENS = tuple(10**e for e in range(4, 9))
# where it runs here: width, tokens; softmax takes the square of them in time
MEASURED = {"ours": ((192, 10_000), (192, 100_000), (768, 10_000)), "rivals": ((192, 2_000), (768, 1_000))}
QUICK = {"ours": ((192, 400),), "rivals": ((192, 400), (768, 400))}
OURS = ("seqnorm", "sima", "soft")
COLUMNS = ("kind", "method", "width", "heads", "processes", "tokens", "pass", "bytes", "wire_bytes", "seconds")


def state_numbers(method: str, width: int, processes: int) -> int:
    """Numbers of float32 that the sums of a layer hold for one image."""
    c, d = width, width // WIDTHS[width]
    if method == "seqnorm":
        return processes * (c + 1) + c * (c + 1) // 2
    if method == "sima":
        return 2 * c + c * d + WIDTHS[width]
    return LANDMARKS * (c + 1) + LANDMARKS * c


def sent(method: str, width: int, processes: int, tokens: int) -> tuple[float, float] | None:
    """Bytes that each process sends in a layer's forward and backward pass; None where the method cannot be.

    A sum over p processes in a ring sends 2 (p - 1) / p times its size, an all-gather (p - 1) / p times what everyone
    has in the end, an all-to-all (p - 1) / p times what one has.
    """
    p, others = processes, (processes - 1) / processes
    own = FLOAT * tokens * width / p
    if method in OURS:
        each = 2 * others * FLOAT * state_numbers(method, width, p)
        return each, each
    if method == "ring attention":
        return 2 * own * (p - 1), 2 * own * (p - 1) + 2 * own * p
    if method == "all-gather of K and V":
        return 2 * own * (p - 1), 2 * own * (p - 1)
    return None if WIDTHS[width] % p else (4 * own * others, 4 * own * others)


# Measuring


def layer_of(method: str, width: int, dtype: torch.dtype) -> Any:
    """The layer, or the projections that softmax has."""
    torch.manual_seed(width)
    options = {"num_landmarks": LANDMARKS} if method == "soft" else {}
    name = method if method in OURS else "softmax"
    return cast(nn.Module, ATTENTIONS[name](width, WIDTHS[width], **options, dtype=dtype))


def over_processes(method: str, layer: Any, x: Tensor, total: int) -> Tensor:
    """The layer's output for one's own tokens (1, n, c)."""
    if method in OURS:
        first = dist.get_rank() * x.shape[1]
        place = Place(*(torch.tensor([n]) for n in (first, total))) if method == "soft" else None
        return attend_among(layer, x, None, Members(None, place))
    q, k, v = layer.qkv(x)[0].unflatten(-1, (3, layer.num_heads, -1)).permute(1, 2, 0, 3).unbind(0)
    return layer.proj(RIVALS[method](q, k, v).transpose(0, 1).flatten(1))[None]


def check(method: str, width: int) -> None:
    """Raises AssertionError unless output and gradient of the tokens are those of one process, in float64."""
    rank, world = dist.get_rank(), dist.get_world_size()
    layer = layer_of(method, width, torch.float64)
    x = torch.randn(1, 16 * world, width, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    expected = layer(x)
    (by_x,) = torch.autograd.grad((expected * weights).sum(), x)
    mine = slice(16 * rank, 16 * (rank + 1))
    own = x[:, mine].detach().requires_grad_()
    found = over_processes(method, layer, own, x.shape[1])
    (by_own,) = torch.autograd.grad((found * weights[:, mine]).sum(), own)
    for a, b in ((found, expected[:, mine]), (by_own, by_x[:, mine])):
        error = float(((a - b).abs().max() / b.abs().max()).detach())
        assert error < 1e-10, f"{method} differs from one process by {error:.2g}"


def interface_bytes() -> int:
    """What the loopback interface of this namespace has sent so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[8])


def measured(step: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Bytes sent per process and seconds of one step."""
    step()
    seconds = []
    dist.barrier()
    before = interface_bytes()
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    dist.barrier()
    # the other processes have sent their last before they come to the barrier
    return (interface_bytes() - before) / repeats / dist.get_world_size(), statistics.median(seconds)


def on_rank(rank: int, world: int, folder: str, sizes: dict[str, Any], repeats: int) -> None:
    """Measures every method with this number of processes; the first process writes."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(Path(folder, f"store{world}")), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    rows = []
    for method in (*OURS, *RIVALS):
        for width, tokens in sizes["ours" if method in OURS else "rivals"]:
            if sent(method, width, world, tokens) is None:
                continue
            check(method, width)
            rows += [{**row, "kind": "measured"} for row in passes(method, width, tokens, repeats)]
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def passes(method: str, width: int, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of a forward pass without gradients, and of a forward and backward pass."""
    world = dist.get_world_size()
    layer = layer_of(method, width, torch.float32)
    x = torch.randn(1, tokens // world, width)
    by = torch.randn_like(x)
    calculated = sent(method, width, world, tokens)
    assert calculated is not None

    def forward() -> None:
        with torch.no_grad():
            over_processes(method, layer, x, tokens)

    def both() -> None:
        over_processes(method, layer, x.detach().requires_grad_(), tokens).backward(by)

    rows = []
    for name, step, size in (("forward", forward, calculated[0]), ("forward and backward", both, sum(calculated))):
        wire, seconds = measured(step, repeats)
        row = row_of(method, width, world, tokens, name, size)
        rows.append({**row, "wire_bytes": wire, "seconds": seconds})
        if dist.get_rank() == 0:
            print(
                f"{method:24} {width} {world} {tokens:7} {name:21} {size:12.0f} {wire:12.0f} {seconds:.3f} s",
                flush=True,
            )
    return rows


def row_of(method: str, width: int, world: int, tokens: int, name: str, size: float) -> dict[str, Any]:
    """A line of the table without measurements."""
    line = {"method": method, "width": width, "heads": WIDTHS[width], "processes": world, "tokens": tokens}
    return {"kind": "calculated", **line, "pass": name, "bytes": size, "wire_bytes": "", "seconds": ""}


def inside(arguments: argparse.Namespace) -> None:
    """Measures with 2 and 4 processes, in a namespace where nothing else sends."""
    sizes = QUICK if arguments.quick else MEASURED
    for world in (2, 4):
        handed = (world, str(arguments.inside), sizes, arguments.repeats)
        torch.multiprocessing.spawn(on_rank, handed, nprocs=world)


def measurements(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Rows measured, and whether the interface was theirs alone."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.communication", "--inside", folder]
        command += ["--repeats", str(arguments.repeats), *(["--quick"] if arguments.quick else [])]
        alone = ["unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        possible = all(map(shutil.which, ("unshare", "ip"))) and not subprocess.run([*alone, "true"]).returncode
        subprocess.run([*(alone if possible else []), *command], check=True)
        rows = [row for world in (2, 4) for row in json.loads(Path(folder, f"{world}.json").read_text())]
    if not possible:
        # what others send would count
        rows = [{**row, "wire_bytes": ""} for row in rows]
    return rows, possible


def calculations() -> list[dict[str, Any]]:
    """Rows by formula for every width, number of processes and of tokens."""
    rows = []
    for width in WIDTHS:
        for world in PROCESSES:
            for tokens in TOKENS:
                for method in (*OURS, *RIVALS):
                    if (size := sent(method, width, world, tokens)) is not None:
                        rows.append(row_of(method, width, world, tokens, "forward", size[0]))
                        rows.append(row_of(method, width, world, tokens, "forward and backward", sum(size)))
    return rows


# The page


def size_text(size: float | None) -> str:
    """Bytes with the unit that suits them."""
    if size is None:
        return "not possible"
    unit = next(u for u in ("B", "kB", "MB", "GB", "TB", "PB") if size < 1000 or (size := size / 1000) == -1)
    return f"{size:.3g} {unit}"


def calculated_table(width: int) -> str:
    """Bytes of a forward pass by processes, methods as rows, and tokens of softmax as columns."""
    rows = []
    for world in PROCESSES:
        for method in (*OURS, *RIVALS):
            sizes = [sent(method, width, world, tokens) for tokens in TOKENS]
            rows.append([world, method, *(size_text(s and s[0]) for s in sizes)])
    return table(["processes", "attention", *(f"10^{len(str(t)) - 1} tokens" for t in TOKENS)], rows)


def measured_table(rows: list[dict[str, Any]]) -> str:
    """What was counted and what the interface saw."""
    lines = []
    for row in rows:
        wire = row["wire_bytes"]
        over = "" if wire == "" else f"{100 * (wire / row['bytes'] - 1):+.1f} %"
        size = (row["width"], row["processes"], row["tokens"])
        figures = (size_text(row["bytes"]), "" if wire == "" else size_text(wire), over, f"{row['seconds']:.3f} s")
        lines.append([row["method"], *size, row["pass"], *figures])
    heads = ["attention", "width", "processes", "tokens", "pass", "calculated", "on the wire", "more", "time"]
    return table(heads, lines)


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """Bytes over the tokens for 4 processes, dots where measured, and over the processes for a million tokens."""
    with look():
        softmax, ours = (sent(method, 768, 4, 10**8) for method in ("ring attention", "seqnorm"))
        assert softmax is not None
        assert ours is not None
        times = float(f"{softmax[0] / ours[0]:.1e}")
        title = f"What is sent does not grow with the tokens; at 100 million softmax sends {times:,.0f} times as much"
        note = "Bytes that each process sends in the forward pass of one layer, one image, float32. "
        figure = new_figure(10.5, 4.9, title, note + "Lines: by formula; dots: read from the network interface")
        left, right = figure.subplots(1, 2)
        tokens_panel(left, rows)
        processes_panel(right)
        save(figure, path)


STYLES = {
    "seqnorm": (COLOURS[0], "SeqNorm"),
    "sima": (COLOURS[2], "SimA"),
    "soft": (COLOURS[5], f"SOFT, {LANDMARKS} landmarks"),
    "ring attention": ("#cc3311", "softmax: ring, all-gather"),
    "all-to-all of heads": ("#e8836b", "softmax: all-to-all"),
}


def tokens_panel(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Width 768, 4 processes."""
    width, world = 768, 4
    for method, (colour, name) in STYLES.items():
        line = [(sent(method, width, world, n) or (float("nan"), 0))[0] for n in (10**3, *TOKENS)]
        axes.plot((10**3, *TOKENS), line, color=colour, label=name)
    for row in rows:
        if (row["width"], row["processes"], row["pass"]) == (width, world, "forward") and row["wire_bytes"] != "":
            colour = STYLES.get(row["method"], STYLES["ring attention"])[0]
            axes.plot(row["tokens"], row["wire_bytes"], "o", color=colour, markeredgecolor="white", markersize=6.5)
    axes.set(xscale="log", yscale="log", xlabel="tokens of the image")
    powers = [10**e for e in range(3, 9)]
    axes.set_xticks(powers, [f"{n // 10**6} million" if n >= 10**6 else f"{n:,}" for n in powers])
    axes.set_title(f"{width} channels, {WIDTHS[width]} heads, {world} processes")
    byte_ticks(axes)
    axes.legend(loc="upper left", labelcolor=INK)


def processes_panel(axes: Any) -> None:
    """Width 192, a million tokens; heads limit the all-to-all."""
    worlds = [2**i for i in range(1, 9)]
    for method, (colour, name) in STYLES.items():
        line = [(sent(method, 192, k, 10**6) or (float("nan"), 0))[0] for k in worlds]
        if method != "all-to-all of heads":
            axes.plot(worlds, line, color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="processes")
    axes.set_title("192 channels, 3 heads, a million tokens")
    axes.set_xticks(worlds, [str(k) for k in worlds])
    axes.minorticks_off()
    byte_ticks(axes)
    note = "all-to-all is not possible: the processes must divide the heads"
    axes.text(2, 3e8, note, color=MUTED, fontsize=8.5)


def byte_ticks(axes: Any) -> None:
    """Powers of ten in units people use."""
    low, high = axes.get_ylim()
    ticks = [10.0**e for e in range(3, 14) if low <= 10**e <= high * 1.01]
    axes.set_yticks(ticks, [size_text(t) for t in ticks])
    axes.minorticks_off()


def parse() -> argparse.Namespace:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="few tokens, for a test of the benchmark")
    parser.add_argument("--note", default="", help="a line for the page, such as what else ran")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measures, calculates and writes."""
    arguments = parse()
    if arguments.inside:
        inside(arguments)
        return
    rows, alone = measurements(arguments)
    write_rows(arguments.output / "communication.csv", COLUMNS, [*rows, *calculations()])
    picture(rows, arguments.output / "communication.png")
    how = "read from the loopback interface of a network namespace in which nothing else sends, headers included"
    seen = f"*On the wire*: {how}." if alone else "No network namespace could be made here: nothing is on the wire."
    sections = [
        ("", "Bytes that each process sends for one attention layer and one image, in float32; 1 kB is 1,000 bytes."),
        ("", "![Bytes sent per layer](communication.png)"),
        ("Measured, 2 and 4 processes over gloo", measured_table(rows)),
        ("", f"{seen} *Time*: median of {arguments.repeats} on one machine, projections included. {arguments.note}"),
        *((f"Calculated, forward, {c} channels and {h} heads", calculated_table(c)) for c, h in WIDTHS.items()),
        ("How it is counted", COUNTED),
        ("Do it again", do_it_again("benchmarks.communication", environment())),
    ]
    write_summary(arguments.output / "communication.md", "What processes that share an image send each other", sections)


COUNTED = """With p processes, n tokens, c channels, h heads of d = c / h, m landmarks, numbers of 4 bytes:

- seqnorm: one sum of p (c + 1) + c (c + 1) / 2 numbers; sima: of 2 c + c d + h; soft: two, of m (c + 1) and m c. A sum
  sends 2 (p - 1) / p times its size. Backward sends as much again.
- ring attention: K and V pass p - 1 times, 2 (p - 1) n c / p numbers; backward passes them again, and their gradients p
  times.
- all-gather of K and V: 2 (p - 1) n c / p numbers; backward a reduce-scatter of as many.
- all-to-all of heads: Q, K, V and the output, 4 (p - 1) n c / p^2 numbers; backward as many. Possible only if p divides
  h."""


if __name__ == "__main__":
    main()
