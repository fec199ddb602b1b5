"""The model card of shared weights: what the network is, how it is loaded, and what it is not for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

MARK = "<!-- written by sansmax; a card without this line is kept when the model is saved again -->"
TAGS = ("image-classification", "timm", "transformers", "sansmax", "vision-transformer", "softmax-free-attention")
RESEARCH_USE = (
    "For research only. The network and its numbers have not been reviewed for diagnosis or treatment, and it is no "
    "medical device."
)


@dataclass(frozen=True)
class ModelCard:
    """What the author of the weights knows of them; everything else on the card is read from the model.

    `results` are rows of a table, such as `{"set": "breast, test", "patients": 40, "accuracy": 0.91}`. `license` is
    that of the weights, "unknown" if none is given. `base_model` and `datasets` are names on the hub.
    """

    title: str = ""
    description: str = ""
    license: str = ""
    results: Sequence[Mapping[str, str | int | float]] = ()
    datasets: Sequence[str] = ()
    base_model: str = ""
    tags: Sequence[str] = ()
    citation: str = ""


def card_text(card: ModelCard, config: Mapping[str, Any], num_parameters: int, address: str) -> str:
    """The card as Markdown with its YAML head; `address` is what `timm.create_model` takes."""
    cfg = config["pretrained_cfg"]
    sections = (
        f"---\n{_head(card, cfg)}---\n{MARK}\n",
        f"# {card.title or _title(config, address)}\n",
        f"{card.description}\n" if card.description else "",
        "## Use\n",
        _usage(address),
        "## What it is\n",
        _facts(config, num_parameters),
        "" if not card.results else f"## Results\n\n{_table(card.results)}",
        "## Paper\n" if cfg.get("paper_name") else "",
        f"{_paper(cfg)}\n" if cfg.get("paper_name") else "",
        f"```bibtex\n{card.citation.strip()}\n```\n" if card.citation else "",
        "## Research use\n",
        f"{RESEARCH_USE}\n",
    )
    return "\n".join(section for section in sections if section)


def _head(card: ModelCard, cfg: Mapping[str, Any]) -> str:
    head: dict[str, Any] = {
        "library_name": "timm",
        "license": card.license or "unknown",
        "pipeline_tag": "image-classification",
        "tags": list(dict.fromkeys((*TAGS, *card.tags))),
    }
    if card.datasets:
        head["datasets"] = list(card.datasets)
    if card.base_model:
        head["base_model"] = card.base_model
    return yaml.safe_dump(head, sort_keys=False, allow_unicode=True)


def _title(config: Mapping[str, Any], address: str) -> str:
    return address.rsplit("/", 1)[-1] if address.startswith("hf-hub:") else config["architecture"]


def _usage(address: str) -> str:
    transformers = address.removeprefix("hf-hub:").removeprefix("local-dir:")
    return f"""`import sansmax` registers the network. Without it, timm and transformers say that its architecture is
unknown, or that timm should be upgraded.

```python
import sansmax
import timm

model = timm.create_model({_quoted(address)}, pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```

`num_classes=` makes another classifier for fine-tuning. With transformers:

```python
import sansmax
from transformers import pipeline

classify = pipeline("image-classification", model={_quoted(transformers)})
```
"""


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _facts(config: Mapping[str, Any], num_parameters: int) -> str:
    cfg, names = config["pretrained_cfg"], config.get("label_names")
    arguments = ", ".join(f"{k}={v!r}" for k, v in config.get("model_args", {}).items())
    rows = [
        ("network", f"`{config['architecture']}`"),
        ("parameters", f"{num_parameters:,}"),
        ("images", " x ".join(map(str, cfg["input_size"])) + " (channels, height, width)"),
        ("mean, standard deviation", f"{_numbers(cfg['mean'])}; {_numbers(cfg['std'])}"),
        ("classes", _classes(config["num_classes"], names)),
        ("arguments", f"`{arguments}`" if arguments else ""),
        ("published code", _published(cfg)),
    ]
    return "| | |\n| --- | --- |\n" + "".join(f"| {name} | {_cell(value)} |\n" for name, value in rows if value)


def _published(cfg: Mapping[str, Any]) -> str:
    licence = f" ({cfg['license']})" if cfg.get("license") else ""
    return f"{cfg['origin_url']}{licence}" if cfg.get("origin_url") else ""


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _classes(count: int, names: Sequence[str] | None, shown: int = 20) -> str:
    if not names:
        return str(count)
    more = f", and {len(names) - shown} more" if len(names) > shown else ""
    return f"{count}: {', '.join(names[:shown])}{more}"


def _table(rows: Sequence[Mapping[str, str | int | float]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(_cell(value) for value in line)} |\n" for line in lines)


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _paper(cfg: Mapping[str, Any]) -> str:
    ids = cfg.get("paper_ids") or ()
    links = [
        f"https://arxiv.org/abs/{i.partition(':')[2]}" if i.lower().startswith("arxiv:") else i
        for i in ((ids,) if isinstance(ids, str) else ids)
    ]
    return ", ".join((cfg["paper_name"], *links))
