"""The report of a folder of tokenized slides: run.json, summary.md and failed.csv.

They are made from the records of all slides in the folder, so any process that shares it may write them. Whoever
writes looks again afterwards: the last one leaves a report of everything.
"""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sansmax.engine.encoders import Encoder
from sansmax.engine.run import environment, write_json
from sansmax.engine.tokenize_records import FOLDER, Record, all_records
from sansmax.engine.tokenize_settings import Plan
from sansmax.files import write_text
from sansmax.report.tables import as_csv

FAILED = "failed.csv"


def write_report(plan: Plan, encoder: Encoder | None, command: str) -> None:
    """Writes the three files for all slides that have a record."""
    facts = _facts(plan, encoder, command)
    while True:
        seen = _stamp(plan.output)
        records = list(all_records(plan.output))
        failed = [r for r in records if r.state == "failed"]
        write_text(plan.output / FAILED, as_csv([["slide_id", "path", "reason"], *map(_failed_row, failed)]))
        write_json(plan.output / "run.json", {**facts, "slides": [_row(r) for r in records]})
        write_text(plan.output / "summary.md", summary(facts, records))
        if _stamp(plan.output) == seen:
            return


def counted(records: Sequence[Record]) -> str:
    """How many slides ended how, in words."""
    states = Counter(r.state for r in records)
    words = {"done": "tokenized", "empty": "without tissue", "masked": "with their tissue found", "failed": "failed"}
    tiles = sum(r.tiles for r in records)
    parts = [f"{states[s]} {word}" + (f" ({tiles:,} tiles)" if s == "done" else "") for s, word in words.items()]
    return ", ".join(p for s, p in zip(words, parts, strict=True) if states[s]) or "none"


def summary(facts: dict[str, Any], records: Sequence[Record]) -> str:
    """The page of a folder of tokenized slides."""
    lines = ["# Tokenized slides", "", f"{len(records)} slides: {counted(records)}.", ""]
    if facts["encoder"]:
        lines += [f"* {name}: {value}" for name, value in facts["encoder"].items()]
        lines += [f"* {name}: {value}" for name, value in facts["tiles"].items()]
        lines += [f"* layout: {facts['layout']}, features as {facts['dtype']}", ""]
    lines += ["| slide | state | tiles | tissue | um per pixel | seconds | remarks |", "| --- " * 7 + "|"]
    for r in records:
        share = "" if r.tissue_share is None else f"{100 * r.tissue_share:.1f} %"
        mpp = "" if r.mpp is None else f"{r.mpp:.4g}"
        remarks = "; ".join([r.reason, *r.warnings] if r.reason else r.warnings).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {r.slide_id} | {r.state} | {r.tiles} | {share} | {mpp} | {r.seconds:.1f} | {remarks} |")
    return "\n".join([*lines, "", f"Made by `{facts['command']}`." if facts["command"] else "", ""])


def _facts(plan: Plan, encoder: Encoder | None, command: str) -> dict[str, Any]:
    known = encoder and {
        "encoder": encoder.spec.name,
        "revision": encoder.revision,
        "weights sha256": encoder.sha256,
        "transform": encoder.transform,
        "precision": encoder.spec.precision,
        "width": encoder.width,
    }
    return {
        "command": command,
        "environment": {**environment(), **_readers()},
        "encoder": known,
        "tiles": vars(plan.tiles),
        "layout": plan.layout,
        "dtype": plan.stored_dtype,
        "tissue": str(plan.tissue or "found"),
        "batch_size": plan.batch_size,
        "workers": plan.workers,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _readers() -> dict[str, str]:
    names = ("openslide-python", "openslide-bin", "tifffile", "pydicom", "nibabel", "pillow", "h5py", "ray")
    found = {}
    for name in names:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _row(record: Record) -> dict[str, Any]:
    names = ("slide_id", "path", "state", "tiles", "tissue_share", "mpp", "seconds", "reason", "warnings")
    return {name: getattr(record, name) for name in names}


def _failed_row(record: Record) -> list[str]:
    return [record.slide_id, record.path, record.reason]


def _stamp(output: Path) -> dict[str, int]:
    found = {}
    for path in (output / FOLDER).glob("*.json"):
        try:
            found[path.name] = path.stat().st_mtime_ns
        except FileNotFoundError:
            # another process takes up this slide
            continue
    return found
