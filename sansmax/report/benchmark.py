"""What the benchmark found: tables with ratios, a picture for each case, a page."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sansmax.report.scaling import scaling, time_text
from sansmax.report.summary import bullets, cell_text, figure_text, table, write_summary
from sansmax.report.tables import write_rows

if TYPE_CHECKING:
    from rich.console import Console

LIMIT = "products alone"
# what the others are compared with, where it is there
BASES = ("softmax", "normalise, then multiply", "formula written out")
CHOSEN = ":auto"
ALLOWED = 1.1
Row = Mapping[str, Any]
GROUP = ("case", "tokens", "batch", "dim", "heads", "depth", "direction", "dtype", "device")
# what is the same within one table
ONE_TABLE = ("case", "batch", "dim", "heads", "depth", "direction", "dtype", "device")
HOW = (
    "Seconds are medians; contestants of one size take turns in one process, so compare within a line of sizes, and "
    "ratios between machines. Ratios are of the best number of threads of each. Memory is the largest of a process "
    "during one pass beyond what it held before, network and tokens; empty below 1 MiB. "
    f'"{LIMIT}" is no contestant but the same matrix products written into given memory: X^T X and X M of a layer by '
    "second moments, and the products of the MLPs in an encoder."
)


class Part(NamedTuple):
    """A table of the page."""

    title: str
    headers: list[str]
    lines: list[list[Any]]
    text: str = ""


def ratios(rows: Sequence[Row]) -> dict[tuple[Any, ...], dict[str, float | None]]:
    """For each group and contestant (`GROUP`, then the name): best `seconds`, times as `fast` as the one compared with,
    and `products`, how many times the products alone.

    The best is that of the number of threads with the smallest median; what was not measured is None.
    """
    best: dict[tuple[Any, ...], float | None] = {}
    for row in rows:
        key = key_of(row)
        values = [v for v in (best.get(key), row["seconds"]) if v is not None]
        best[key] = min(values) if values else None
    found = {}
    for key, seconds in best.items():
        base = next((best[(*key[:-1], n)] for n in BASES if (*key[:-1], n) in best), None)
        products = best.get((*key[:-1], LIMIT))
        found[key] = {
            "seconds": seconds,
            "fast": base / seconds if base and seconds else None,
            "products": seconds / products if products and seconds else None,
        }
    return found


def key_of(row: Row) -> tuple[Any, ...]:
    """Group and contestant of a row."""
    return (*(row[name] for name in GROUP), row["contestant"])


def parts(rows: Sequence[Row]) -> list[Part]:
    """The tables, one for each case, direction and type."""
    found, numbers = [], ratios(rows)
    for own in split(rows, ONE_TABLE):
        threads = sorted({row["threads"] for row in own})
        names = {row["contestant"] for row in own}
        base = next((n for n in BASES if n in names), "")
        headers = ["tokens", "contestant"]
        headers += [f"{t} thread{'s' if t > 1 else ''}" for t in threads]
        headers += [f"times as fast as {base}"] if base else []
        headers += [f"times {LIMIT}"] if LIMIT in names else []
        lines = []
        for same in split(own, ("tokens", "contestant")):
            ratio = numbers[key_of(same[0])]
            by_threads = {row["threads"]: row["seconds"] for row in same}
            line: list[Any] = [same[0]["tokens"], same[0]["contestant"], *(timed(by_threads.get(t)) for t in threads)]
            line += [three(ratio["fast"])] if base else []
            line += [three(ratio["products"])] if LIMIT in names else []
            peaks = [row["peak_mib"] for row in same if row["peak_mib"] is not None]
            reasons = dict.fromkeys(str(row["reason"]) for row in same if row["reason"])
            lines.append([*line, round(peaks[0]) if peaks else None, "; ".join(reasons)])
        found.append(Part(title_of(own[0]), [*headers, "MiB", ""], lines))
    return found


def three(value: float | None) -> str:
    """Three digits, and no more."""
    if value is None:
        return ""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def timed(seconds: float | None) -> str:
    """A time with its unit."""
    return "" if seconds is None else time_text(seconds)


def split(rows: Iterable[Row], names: Sequence[str]) -> list[list[Row]]:
    """Rows that agree in `names`, in the order in which they first come."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.values())


def title_of(row: Row) -> str:
    """What a table is of, in words."""
    size = f"{row['dim']} channels, {row['heads']} head{'s' if row['heads'] > 1 else ''}"
    size += f", {row['depth']} blocks" if row["depth"] > 1 else ""
    size += f", batch {row['batch']}" if row["batch"] > 1 else ""
    return f"{row['case']}, {row['direction']}: {size}, {row['dtype']}, {row['device']}"


def order_parts(rows: Sequence[Row]) -> list[Part]:
    """How near the chosen order is to the best: a table for each mechanism, direction, type and number of threads."""
    found = []
    mechanisms = [{**row, "mechanism": str(row["contestant"]).partition(":")[0]} for row in rows]
    for own in split(mechanisms, ("mechanism", "direction", "dtype", "threads", "device")):
        tokens = sorted({row["tokens"] for row in own})
        lines, cells = [], []
        for same in split(own, ("batch", "dim")):
            by_tokens = {group[0]["tokens"]: cell_of(group) for group in split(same, ("tokens",))}
            cells += [cell for cell in by_tokens.values() if cell[0] is not None]
            texts = [by_tokens[n][1] if n in by_tokens else "" for n in tokens]
            lines.append([same[0]["batch"], same[0]["dim"], *texts])
        row = own[0]
        threads = f"{row['threads']} thread{'s' if row['threads'] > 1 else ''}"
        title = f"{row['mechanism']}, {row['direction']}: {row['dtype']}, {row['device']}, {threads}"
        found.append(Part(title, ["batch", "channels", *(f"{n:,} tokens" for n in tokens)], lines, verdict(cells)))
    return found


def cell_of(rows: Sequence[Row]) -> tuple[float | None, str]:
    """Median of the chosen order over that of the best, and how it stands in the table."""
    seconds = {str(row["contestant"]).partition(":")[2]: row["seconds"] for row in rows}
    chosen = seconds.pop(CHOSEN[1:], None)
    there = {name: value for name, value in seconds.items() if value is not None}
    if chosen is None or not there:
        why = next((row["reason"] for row in rows if str(row["contestant"]).endswith(CHOSEN)), None)
        return None, str(why or "no order ran")
    best = min(there, key=lambda name: there[name])
    ratio = chosen / there[best]
    return ratio, f"{ratio:.2f} {best}" if ratio <= ALLOWED else f"**{ratio:.2f}** {best}"


def verdict(cells: Sequence[tuple[float | None, str]]) -> str:
    """The table in one sentence."""
    values = [ratio for ratio, _ in cells if ratio is not None]
    if not values:
        return "No cell was measured."
    within = sum(value <= ALLOWED for value in values)
    return (
        f"Each cell: time of the chosen order over that of the fastest forced one, which is named. Within 10 % in "
        f"{within} of {len(values)} cells; worst {max(values):.2f}, median {statistics.median(values):.2f}."
    )


def pictures(rows: Sequence[Row], folder: Path, stem: str) -> list[tuple[str, str]]:
    """A picture for each table over two or more sizes: title and file name. The first one is named `stem` alone."""
    found = []
    for own in split(rows, ONE_TABLE):
        drawn = best_rows(own)
        if len({row["tokens"] for row in drawn if row["seconds"] is not None}) < 2:
            continue
        row = own[0]
        name = f"{stem}.png" if not found else f"{stem}_{slug(row)}.png"
        passed = "Time of one forward pass" if row["direction"] == "forward" else "Time of forward and backward pass"
        scaling(drawn, folder / name, note=title_of(row), limit=LIMIT, heading=passed)
        found.append((title_of(row), name))
    return found


def slug(row: Row) -> str:
    """A table's place in a file name."""
    direction = "forward" if row["direction"] == "forward" else "training"
    dtype = "" if row["dtype"] == "float32" else f"_{row['dtype']}"
    return f"{str(row['case']).replace(' ', '_')}_{direction}{dtype}"


def best_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """For each contestant and size the row of its best number of threads, as `scaling` draws it."""
    found = []
    for same in split(rows, ("contestant", "tokens")):
        timed = [row for row in same if row["seconds"] is not None]
        row = min(timed, key=lambda r: r["seconds"]) if timed else same[0]
        found.append({**row, "mechanism": row["contestant"], "reason": row["reason"] if not timed else None})
    return found


def write_benchmark(
    folder: Path, stem: str, title: str, columns: Sequence[str], rows: Sequence[Row], again: str, note: str = ""
) -> list[Path]:
    """Writes table, page and pictures of the rows; `again` is the section that says how to do it again."""
    written = [write_rows(folder / f"{stem}.csv", columns, rows)]
    orders = is_orders(rows)
    shown = [] if orders else pictures(rows, folder, stem)
    written += [folder / name for _, name in shown]
    images = {title: figure_text(title, name) for title, name in shown}
    sections = [("", "\n\n".join(part for part in (note, "" if orders else HOW) if part))]
    for part in order_parts(rows) if orders else parts(rows):
        body = "\n\n".join(
            text for text in (part.text, table(part.headers, part.lines), images.get(part.title)) if text
        )
        sections.append((part.title, body))
    sections.append(("Do it again", again))
    return [*written, write_summary(folder / f"{stem}.md", title, sections)]


def is_orders(rows: Sequence[Row]) -> bool:
    """Whether these are rows of chosen and forced orders."""
    return bool(rows) and all(row["case"] == "orders" for row in rows)


def do_again(command: str, environment: Mapping[str, Any]) -> str:
    """The section that says how the figures come about again, and where they came about."""
    return f"```sh\n{command}\n```\n\n" + bullets([f"{name}: {value}" for name, value in environment.items()])


def draw(console: "Console", rows: Sequence[Row]) -> None:
    """Prints the tables."""
    from rich.markup import escape
    from rich.table import Table

    for part in order_parts(rows) if is_orders(rows) else parts(rows):
        shown = Table(title=escape(part.title), title_justify="left", box=None, pad_edge=False)
        for header in part.headers:
            shown.add_column(escape(header), justify="left" if header in ("contestant", "") else "right")
        for line in part.lines:
            shown.add_row(*(escape(cell_text(value).replace("**", "")) for value in line))
        console.print(shown)
        console.print(part.text + "\n", markup=False)
