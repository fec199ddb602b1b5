"""Completes the splits that a source has: laws that every source must keep, and the splits it lacks drawn."""

from typing import NamedTuple

import numpy as np

from sansmax.data.sets import SPLITS, ImageSet, LabelledImages
from sansmax.data.splits import draw_parts
from sansmax.errors import InputError, listed


class Split(NamedTuple):
    """How to draw the splits that a source lacks."""

    val_fraction: float
    test_fraction: float
    seed: int


def assemble(
    source: str,
    classes: tuple[str, ...],
    given: dict[str, ImageSet],
    split: Split,
    *,
    origin: str,
    known_classes: bool,
    colour: bool,
) -> LabelledImages:
    """The splits of one source, from its own (`train`, `val`, `test`) or from one undivided set (`all`).

    Without a validation split one is drawn from train; an undivided set is drawn into three. `known_classes`: the
    classes are those of a finished run, so the source need not have them all.
    """
    given = {name: images for name, images in given.items() if len(images)}
    if not given:
        raise InputError(f"{source} has no images; {'give at least two classes of them'}")
    if len(classes) < 2:
        raise InputError(f"{source} has one class, {listed(classes)}; to tell apart, at least two are needed")
    _refuse_shared_groups(source, given)
    parts: dict[str, ImageSet] = {}
    if "all" in given:
        whole = given["all"]
        if len(given) > 1:
            raise InputError(f"{source} gives a split for some images and none for others; give it for all")
        drawn = draw_parts(
            whole.names,
            whole.labels,
            whole.groups,
            val_fraction=split.val_fraction,
            test_fraction=split.test_fraction,
            seed=split.seed,
        )
        parts = {s: whole.subset(i) for s, i in zip(SPLITS, drawn, strict=True) if len(i)}
        train_share = 1 - split.val_fraction - split.test_fraction
        shares = f"{train_share:.0%} / {split.val_fraction:.0%} / {split.test_fraction:.0%}"
        note = f"train / val / test drawn {shares} by class{_by(whole)}, seed {split.seed}"
    else:
        parts, note = _with_val(given, split, origin)
    if not known_classes:
        _refuse_unlearnt(source, classes, parts)
    return LabelledImages(
        source,
        classes,
        parts.get("train"),
        parts.get("val"),
        parts.get("test"),
        colour=colour,
        explicit_split="all" not in given,
        split_note=note + _thin(classes, parts),
    )


def _with_val(given: dict[str, ImageSet], split: Split, origin: str) -> tuple[dict[str, ImageSet], str]:
    train = given.get("train")
    if train is None or "val" in given or split.val_fraction == 0:
        return dict(given), origin
    if split.val_fraction >= 1:
        raise InputError(f"val_fraction {split.val_fraction:g} of train leaves no image to learn from; lower it")
    drawn = draw_parts(
        train.names, train.labels, train.groups, val_fraction=split.val_fraction, test_fraction=0.0, seed=split.seed
    )
    parts = {**given, "train": train.subset(drawn.train), "val": train.subset(drawn.val)}
    note = f"val drawn from train ({split.val_fraction:.0%}) by class{_by(train)}, seed {split.seed}"
    return parts, f"{origin}; {note}"


def _by(images: ImageSet) -> str:
    return "" if images.groups is None else ", whole groups"


def _thin(classes: tuple[str, ...], parts: dict[str, ImageSet]) -> str:
    """Says which classes a part cannot speak of."""
    notes = []
    for name, images in parts.items():
        counts = np.bincount(images.labels, minlength=len(classes))
        absent = [c for c, n in zip(classes, counts, strict=True) if n == 0]
        if absent:
            notes.append(f"; {name} has no image of {listed(absent)}")
    return "".join(notes)


def _refuse_shared_groups(source: str, given: dict[str, ImageSet]) -> None:
    where: dict[str, set[str]] = {}
    for name, images in given.items():
        for group in images.groups or ():
            where.setdefault(group, set()).add(name)
    shared = {g: names for g, names in where.items() if len(names) > 1}
    if shared:
        first = [f"{g} ({', '.join(s for s in SPLITS if s in names)})" for g, names in sorted(shared.items())]
        raise InputError(
            f"{source} has {len(shared)} groups in more than one split: {listed(first)}; images of one group "
            "(patient) must stay together"
        )


def _refuse_unlearnt(source: str, classes: tuple[str, ...], parts: dict[str, ImageSet]) -> None:
    if "train" not in parts:
        return
    learnt = set(parts["train"].labels.tolist())
    for name in ("test", "val"):
        if name in parts:
            only = sorted(set(parts[name].labels.tolist()) - learnt)
            if only:
                raise InputError(
                    f"{source} has classes in {name} that train has not: {listed([classes[k] for k in only])}; "
                    f"add training images of them or remove them from {name}"
                )
