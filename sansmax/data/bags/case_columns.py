"""What the columns of a table of patients and slides are, whoever wrote it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sansmax.data.bags.tables import Table, plain_name, read_table
from sansmax.data.bags.targets import guess_task
from sansmax.errors import InputError, listed

CASE = ("case_id", "patient", "patient_id", "pat_id", "case", "patientid", "caseid", "subject", "subject_id")
SLIDE = ("slide_id", "wsi", "slide", "filename", "slideid", "slide_name", "image_id", "file", "wsi_id", "sample_id")
LABEL = ("label", "class", "target", "diagnosis", "grade", "category", "isup_grade", "y")
TIME = ("time", "survival_months", "os_months", "os_time", "days", "months", "survival_days", "followup", "os.time")
STATUS = ("status", "event", "os_status", "vital_status", "os_event", "censorship_event", "os")
SITE = ("site", "center", "centre", "institution", "hospital", "tissue_source_site")
# columns of others' tables that hold neither ids nor labels
OTHER = ("mpp", "source", "split", "wsi_dir", "path", "column_1")


@dataclass(frozen=True)
class Columns:
    """Which column is what, which task that makes, and a line that says so.

    `case` and `slide` are None where the table has none. `slides` is a second table that names the slides of a
    patient. `folds` are columns of train, val and test.
    """

    case: str | None
    slide: str | None
    labels: tuple[str, ...]
    site: str | None
    folds: tuple[str, ...]
    task: str
    slides: Table | None
    note: str


def recognise_columns(
    table: Table,
    given: Mapping[str, str | None],
    label: str | Sequence[str] | None,
    task: str | None,
    slide_table: str | Path | None,
) -> Columns:
    """Finds the columns of a table by the names that were given, else by those that are usual."""
    case = table.column("patient", "--group-column NAME", given["case"], CASE)
    slide = None if slide_table else table.column("slide", "--set data.slide_column=NAME", given["slide"], SLIDE)
    folds = fold_columns(table)
    site = table.column("site", "--set data.site_column=NAME", given["site"])
    slides = _slide_table(table, case, slide, slide_table)
    ids = {c for c in (case, slide, given["site"], *folds) if c}
    labels = _labels(table, given, label, task, ids)
    task = task or guess_task(table, labels, given)
    note = f"{table.path.name}: {_layout(table, case, slide, folds, slides)}; "
    note += f"patients from {case or slide!r}, slides from {(slides.path.name if slides else slide)!r}, "
    note += f"{'target' if len(labels) == 1 else 'targets'} {listed(labels, 10)}"
    return Columns(case, slide, labels, site, folds, task, slides, note)


def fold_columns(table: Table) -> tuple[str, ...]:
    """The columns `fold_0`, `fold_1` ... of train, val and test, by number; else a column `split`."""
    found = [c for c in table.columns if plain_name(c).startswith("fold_") and c.rpartition("_")[2].isdigit()]
    if found:
        return tuple(sorted(found, key=lambda c: int(c.rpartition("_")[2])))
    return tuple(c for c in table.columns if plain_name(c) in ("split", "partition", "subset"))[:1]


def _layout(table: Table, case: str | None, slide: str | None, folds: tuple[str, ...], slides: Table | None) -> str:
    """Whose layout it is, in words."""
    names = {plain_name(c) for c in table.columns}
    if slides is not None:
        return f"a clini table of STAMP with the slide table {slides.path.name}"
    if plain_name(slide or "") == "wsi":
        return "a list of TRIDENT"
    if "pat_id" in names and "slide_id" in names:
        return "a table of GigaPath"
    if {"case_id", "slide_id"} <= names and any(plain_name(f).startswith("fold_") for f in folds):
        return "a table of Patho-Bench"
    if {"case_id", "slide_id"} <= names:
        return "a table of CLAM"
    return "a table of slides" if case is None else "a table of patients and slides"


def _slide_table(table: Table, case: str | None, slide: str | None, given: str | Path | None) -> Table | None:
    """STAMP's second table: the one given, or the one that lies beside a table without a column of slides."""
    if given is not None:
        found = read_table(given)
    elif slide is not None:
        return None
    else:
        beside = [p for p in sorted(table.path.parent.iterdir()) if _is_slide_table(p, table.path)]
        if len(beside) != 1:
            what = f"several lie beside it: {listed([p.name for p in beside], 10)}" if beside else "none lies beside it"
            raise InputError(
                f"{table.path} has no column of slides; its columns are {', '.join(table.columns)}. Name one with "
                "--set data.slide_column=NAME, or give the table that names each patient's slides with "
                f"--set data.slide_table=FILE ({what})"
            )
        found = read_table(beside[0])
    if case is None:
        raise InputError(
            f"{table.path} has no column of patients to be joined with {found.path.name}; name it with "
            "--group-column NAME"
        )
    return found


def _is_slide_table(path: Path, clini: Path) -> bool:
    named = "slide" in path.stem.lower() and path.suffix.lower() in (".csv", ".xlsx", ".tsv")
    return named and path != clini and not path.name.startswith((".", "~"))


def _labels(
    table: Table, given: Mapping[str, str | None], label: str | Sequence[str] | None, task: str | None, ids: set[str]
) -> tuple[str, ...]:
    """The columns of the targets: one for classes, time and status for survival, one or more otherwise."""
    if task == "survival" or (task is None and (given["time"] or given["status"])):
        time = table.required("time", "--set data.time_column=NAME", given["time"], TIME)
        return time, table.required("status", "--set data.status_column=NAME", given["status"], STATUS)
    if label is not None:
        names = [label] if isinstance(label, str) else list(label)
        found = [table.required("target", "--label-column NAME", name, ()) for name in names]
        if again := [name for name in found if name in ids]:
            raise InputError(
                f"{table.path}: column {again[0]!r} names patients, slides or parts; give another --label-column"
            )
        return tuple(dict.fromkeys(found))
    usual = [c for c in table.columns if plain_name(c) in LABEL and c not in ids]
    if len(usual) == 1:
        return tuple(usual)
    known = set(CASE) | set(SLIDE) | set(SITE) | set(OTHER)
    rest = [c for c in table.columns if c not in ids and plain_name(c) not in known]
    if len(rest) == 1 or (rest and task == "multilabel" and not usual):
        return tuple(rest)
    may = usual or rest
    raise InputError(
        f"{table.path}: which column is the target is not clear"
        + (f", it may be {listed(may, 10)}" if may else f"; its columns are {', '.join(table.columns)}")
        + "; name it with --label-column NAME, "
        "several with --set data.label=[NAME,NAME]"
    )
