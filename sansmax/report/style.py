"""One look for every figure: colours, type, grid, and how a figure reaches the disk.

Figures are built by the object interface on an Agg canvas, inside `look()`: no window system, no state of pyplot,
and the settings of the caller's matplotlib are as before when a function returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sansmax.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e8ec"
# after Paul Tol's vibrant scheme: told apart with every kind of colour blindness
COLOURS = ("#0077bb", "#ee7733", "#009988", "#cc3377", "#33bbee", "#997700", "#6b4fa0", "#999999")
NEGATIVE, POSITIVE = "#1460aa", "#c8351c"
DPI = 180

SETTINGS: Any = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 9.5,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
}


@contextmanager
def look() -> Iterator[None]:
    """The settings of the project inside the block, those of the caller after it."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        yield


def new_figure(width: float, height: float, title: str = "", subtitle: str = "") -> Figure:
    """An empty figure, sizes in inches, with the finding as its title and what it rests on below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    lines = [line for line in (title, subtitle) if line]
    if lines:
        head_lines = title.count("\n") + 1 if title else 0
        note_lines = subtitle.count("\n") + 1 if subtitle else 0
        head = (0.12 + 0.25 * head_lines + 0.19 * note_lines + 0.06) / height
        engine = figure.get_layout_engine()
        if engine is not None:
            engine.set(rect=(0, 0, 1, 1 - head))  # pyright: ignore[reportCallIssue]
        top = 1 - 0.12 / height
        if title:
            figure.text(0.1 / width, top, title, ha="left", va="top", fontsize=12.5, fontweight="bold")
        below = top - 0.25 * head_lines / height
        figure.text(0.1 / width, below, subtitle, ha="left", va="top", fontsize=9.2, color=MUTED)
    return figure


def bare(axes: Axes) -> None:
    """Takes ticks, grid and frame away: for pictures."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.spines[:].set_visible(False)


def save(figure: Figure, path: str | Path, dpi: int = DPI) -> Path:
    """Writes the figure as PNG, whole or not at all, without the date and the versions of the writer."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi, metadata={"Software": None})
    return Path(path)
