"""Patients with their slides and what is to be predicted of them: the labels of slide-level learning.

    cases = read_cases("labels.csv", bags.ids, task="classification")

A case is what one prediction is made for: a patient with all their slides, or with `per="slide"` a single slide.
Parts of a split never share a patient, whichever it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from sansmax.data.bags.case_columns import recognise_columns
from sansmax.data.bags.case_rows import join_tables
from sansmax.data.bags.fold import Fold
from sansmax.data.bags.matching import match_slides
from sansmax.data.bags.split_files import inline_folds, read_splits
from sansmax.data.bags.tables import CaseRow, read_table
from sansmax.data.bags.targets import TASKS, Targets, known_rows, make_targets
from sansmax.errors import InputError, listed, unknown_name

__all__ = ["TASKS", "Cases", "read_cases"]


@dataclass(frozen=True)
class Cases:
    """Cases with their slides and targets, in one order.

    ids: of the cases, unique: patients, or slides where each slide is a case.
    slides: the slide ids of each case.
    targets: classification `(n,)` integers that index `classes`; multilabel `(n, k)` floats 0 or 1, NaN = unknown;
    regression `(n, k)` floats, NaN = unknown; survival `(n, 2)`: time, and 1 where the event was seen, 0 censored.
    classes: names of the classes or of the targets; of survival one name, the risk.
    splits: the given split by part, where exactly one was given.
    patients: the patient of each case; None where cases are patients. sites: the site of each case, where given.
    folds: the splits that were given, in order. target: the columns that the targets come from; usual names by default.
    notes: lines that say what was found and what was left out.
    """

    task: str
    ids: tuple[str, ...]
    slides: tuple[tuple[str, ...], ...]
    targets: np.ndarray
    classes: tuple[str, ...]
    splits: Mapping[str, tuple[str, ...]] | None = None
    patients: tuple[str, ...] | None = None
    sites: tuple[str, ...] | None = None
    folds: tuple[Fold, ...] = ()
    target: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise unknown_name("task", self.task, TASKS)
        assert len(self.ids) == len(set(self.ids)) == len(self.slides) == len(self.targets)
        if not self.target:
            usual = {"classification": ("label",), "survival": ("time", "status")}
            object.__setattr__(self, "target", usual.get(self.task, self.classes))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def outputs(self) -> int:
        """How many numbers a network gives for a case: one per class or target, one risk for survival."""
        return len(self.classes)

    @property
    def groups(self) -> tuple[str, ...]:
        """The patient of each case."""
        return self.patients if self.patients is not None else self.ids

    def take(self, ids: Sequence[str]) -> "Cases":
        """The cases with these ids, in this order; InputError names those that are not there."""
        place = {name: i for i, name in enumerate(self.ids)}
        unknown = [name for name in ids if name not in place]
        if unknown:
            raise InputError(f"{len(unknown)} of {len(ids)} ids are no cases here: {listed(unknown, 10)}")
        rows = [place[name] for name in ids]
        pick = {"ids": tuple(ids), "slides": tuple(self.slides[i] for i in rows), "targets": self.targets[rows]}
        if self.patients is not None:
            pick["patients"] = tuple(self.patients[i] for i in rows)
        if self.sites is not None:
            pick["sites"] = tuple(self.sites[i] for i in rows)
        return replace(self, **pick)

    def without_targets(self) -> "Cases":
        """The same cases with nothing to be learned from: class 0, or NaN, for all; for predicting test cases."""
        blank = np.zeros_like(self.targets) if self.task == "classification" else np.full_like(self.targets, np.nan)
        return replace(self, targets=blank)


def read_cases(
    path: str | Path,
    bags_ids: Iterable[str] | None,
    *,
    task: str | None = None,
    label: str | Sequence[str] | None = None,
    case_column: str | None = None,
    slide_column: str | None = None,
    time_column: str | None = None,
    status_column: str | None = None,
    site_column: str | None = None,
    slide_table: str | Path | None = None,
    classes: Sequence[str] | None = None,
    splits: str | Path | None = None,
    per: str = "patient",
    allow_missing: bool = False,
) -> Cases:
    """Patients with slides, targets and given splits from a table: of CLAM, STAMP, GigaPath, Patho-Bench, or any.

    The layout is recognised by the names of its columns, which `case_column`, `slide_column`, `label`, `time_column`,
    `status_column` and `site_column` override; `notes` of the result says what was found. `slide_table` is STAMP's
    second table; one that lies beside a clini table is found. CSV, TSV or XLSX.

    `bags_ids` are the slides there are features of (None: not checked). A label without bag and a bag without label
    are an InputError that lists both, or left out with a note under `allow_missing`. Rows whose target is missing (NA)
    are left out with a note. `task` is recognised where it can be. `classes` gives the order of the classes.
    `splits` is a folder or file of splits in the form of CLAM, STAMP, GigaPath, Patho-Bench or of this package.
    """
    if per not in ("patient", "slide"):
        raise InputError(f"a case is one patient or one slide; per={per!r} is neither: give 'patient' or 'slide'")
    table = read_table(path)
    given = {"case": case_column, "slide": slide_column, "time": time_column, "status": status_column}
    columns = recognise_columns(table, {**given, "site": site_column}, label, task, slide_table)
    notes = [columns.note]
    rows = join_tables(table, columns, notes)
    known = known_rows(rows, columns.task, columns.labels, notes)
    found = match_slides(table.path, rows, known, bags_ids, allow_missing, notes)
    targets = make_targets(table.path, found, columns.task, columns.labels, classes)
    cases = _grouped(table.path, found, targets, columns.labels, per, notes)
    folds = (
        read_splits(splits, cases, allow_missing)
        if splits is not None
        else inline_folds(table.path, found, columns, cases)
    )
    if folds:
        notes.append(f"{len(folds)} given split{'s' * (len(folds) > 1)} of train, val and test")
    single = folds[0].as_mapping() if len(folds) == 1 else None
    return replace(cases, folds=folds, splits=single, notes=tuple(notes))


def _grouped(
    path: Path, rows: Sequence[CaseRow], targets: Targets, labels: tuple[str, ...], per: str, notes: list[str]
) -> Cases:
    """One case per patient or slide, in the order in which they first appear, whether rows are adjacent or not."""
    members: dict[str, list[CaseRow]] = {}
    for row in rows:
        members.setdefault(row.case if per == "patient" else row.slide, []).append(row)
    apart = [name for name, own in members.items() if len({targets.key(r) for r in own}) > 1]
    if apart:
        name = apart[0]
        lines = ", ".join(f"{r.slide!r} {targets.shown(r)}" for r in members[name][:4])
        raise InputError(
            f"{path}: the slides of {len(apart)} patients have different targets: {listed(apart, 10)} (of {name!r}: "
            f"{lines}); correct them, or predict each slide by itself with --set data.per=slide"
        )
    sites_of: dict[str, set[str | None]] = {}
    for row in rows:
        sites_of.setdefault(row.case, set()).add(row.site)
    mixed = [name for name, own in sites_of.items() if len(own) > 1]
    if mixed:
        raise InputError(
            f"{path}: {len(mixed)} patients have slides of several sites: {listed(mixed, 10)}; give one site"
        )
    if not members:
        raise InputError(f"{path}: no case is left that has both a target and a bag; check the ids of both")
    firsts = [own[0] for own in members.values()]
    slides = tuple(tuple(r.slide for r in own) for own in members.values())
    patients = None if per == "patient" else tuple(r.case for r in firsts)
    people = len({r.case for r in firsts})
    notes.append(f"{targets.task}: {len(rows):,} slides of {people:,} patients, {targets.counted(firsts)}")
    sites = tuple(r.site or "" for r in firsts) if firsts[0].site is not None else None
    return Cases(
        targets.task,
        tuple(members),
        slides,
        targets.of(firsts),
        targets.classes,
        patients=patients,
        sites=sites,
        target=labels,
    )
