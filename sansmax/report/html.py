"""One page in one HTML file: every picture inside it, no script, nothing fetched from anywhere.

A page is made of blocks, whose texts are escaped: names of files and classes may hold any character. It is readable on
a telephone, in the dark, and on paper.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.files import write_text
from sansmax.report.pictures import as_rgb
from sansmax.report.summary import cell_text, is_number

# pictures narrower than this are shown with sharp pixels, and kept without loss
SMALL = 96


@dataclass(frozen=True)
class Text:
    """A paragraph; `strong` comes first and stands out, `note` is small print."""

    text: str
    strong: str = ""
    note: bool = False


@dataclass(frozen=True)
class Lines:
    """A list."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Columns whose cells are all numbers are aligned at the right; `note` stands below."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass(frozen=True)
class Tiles:
    """The figures that a reader looks for first: name, value, and what is behind it."""

    tiles: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Figures:
    """PNG files with captions; wide ones take a row of their own."""

    figures: Sequence[tuple[str, Path]]


@dataclass(frozen=True)
class Case:
    """A picture, what speaks in it for its answer where that is known, and what is said of it."""

    name: str
    text: str
    pictures: Sequence[np.ndarray]


@dataclass(frozen=True)
class Cases:
    """Pictures side by side with their texts."""

    cases: Sequence[Case]


@dataclass(frozen=True)
class Code:
    """What may be typed or read as it is; with a `title` it is folded away."""

    text: str
    title: str = ""


Block = Text | Lines | Table | Tiles | Figures | Cases | Code
Section = tuple[str, Sequence[Block]]

TEMPLATES = {
    Text: '<p{% if note %} class="note"{% endif %}>'
    "{% if strong %}<strong>{{ strong }}</strong> {% endif %}{{ text }}</p>",
    Lines: "<ul>{% for line in lines %}<li>{{ line }}</li>{% endfor %}</ul>",
    Table: '<div class="scroll"><table>{% if named %}<thead><tr>'
    "{% for cell in headers %}<th{{ side(loop.index0) }}>{{ cell }}</th>{% endfor %}</tr></thead>{% endif %}<tbody>"
    "{% for row in rows %}<tr>{% for cell in row %}<td{{ side(loop.index0) }}>{{ cell }}</td>{% endfor %}</tr>"
    '{% endfor %}</tbody></table></div>{% if note %}<p class="note">{{ note }}</p>{% endif %}',
    Tiles: '<div class="tiles">{% for name, value, note in tiles %}<div class="tile"><span>{{ name }}</span>'
    "<b>{{ value }}</b><span>{{ note }}</span></div>{% endfor %}</div>",
    Figures: '<div class="figures">{% for caption, source, wide in figures %}<figure{% if wide %} class="wide"'
    '{% endif %}><img src="{{ source }}" alt="{{ caption }}"><figcaption>{{ caption }}</figcaption></figure>'
    "{% endfor %}</div>",
    Cases: '<div class="cases">{% for case in cases %}<div class="case"><div>{% for source, small in case.pictures %}'
    '<img src="{{ source }}" alt="{{ case.name }}"{% if small %} class="small"{% endif %}>{% endfor %}</div>'
    "<p><strong>{{ case.name }}</strong><br>{{ case.text }}</p></div>{% endfor %}</div>",
    Code: "{% if title %}<details><summary>{{ title }}</summary>{% endif %}<pre>{{ text }}</pre>"
    "{% if title %}</details>{% endif %}",
}


def write_page(path: str | Path, title: str, lead: Sequence[Block], sections: Sequence[Section]) -> Path:
    """Writes the page: `lead` stands under the title; a section without blocks is left out."""
    from jinja2 import Environment
    from markupsafe import Markup

    environment = Environment(autoescape=True, trim_blocks=True)

    def shown(block: Block) -> Any:
        template = environment.from_string(TEMPLATES[type(block)])
        return Markup(template.render(**values_of(block)))

    page = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    full = [(heading, blocks) for heading, blocks in sections if blocks]
    return write_text(path, page.render(title=title, lead=lead, sections=full, shown=shown) + "\n")


def values_of(block: Block) -> dict[str, Any]:
    """What the template of a block is filled with."""
    if isinstance(block, Table):
        return table_values(block)
    if isinstance(block, Figures):
        return {"figures": [(caption, *png_source(path)) for caption, path in block.figures]}
    if isinstance(block, Cases):
        cases = [
            {"name": c.name, "text": c.text, "pictures": list(map(picture_source, c.pictures))} for c in block.cases
        ]
        return {"cases": cases}
    return dict(vars(block))


def table_values(block: Table) -> dict[str, Any]:
    """Cells as text, and the side of each column."""
    from markupsafe import Markup

    # what Markdown needs escaped is plain text here
    rows = [[value if isinstance(value, str) else cell_text(value) for value in row] for row in block.rows]
    columns = list(zip(*rows, strict=True))
    right = [bool(column) and all(map(is_number, column)) for column in columns]
    side = [Markup(' class="number"') if r else "" for r in right] or [""] * len(block.headers)
    return {
        "headers": block.headers,
        "named": any(block.headers),
        "rows": rows,
        "note": block.note,
        "side": side.__getitem__,
    }


def png_source(path: Path) -> tuple[str, bool]:
    """A PNG file as the address of an image, and whether it is wide."""
    from PIL import Image

    with Image.open(path) as picture:
        wide = picture.width > 1.6 * picture.height
    return address("png", path.read_bytes()), wide


def picture_source(pixels: np.ndarray) -> tuple[str, bool]:
    """Pixels as the address of an image, and whether it is small: those are kept as they are, others as JPEG."""
    from PIL import Image

    small = max(pixels.shape[:2]) < SMALL
    written = io.BytesIO()
    picture = Image.fromarray(np.round(255 * as_rgb(pixels)).astype(np.uint8))
    kind = "png" if small else "jpeg"
    picture.save(written, kind, **({} if small else {"quality": 88}))
    return address(kind, written.getvalue()), small


def address(kind: str, data: bytes) -> str:
    """The picture itself as an address."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
