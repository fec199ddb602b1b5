"""One slide of a job: tissue, tiles, features, and the files they are written to.

The tissue that is used is always the one in the file, so a run that is taken up and one that never stopped give the
same tiles, and a file that was edited counts.
"""

import errno
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sansmax.data.bags.bag import Bag
from sansmax.data.bags.finite import all_finite, bad_rows
from sansmax.data.bags.layouts import layout_named
from sansmax.data.bags.writing import write_bag
from sansmax.data.slides.geojson import read_tissue, write_tissue
from sansmax.data.slides.opening import open_slide
from sansmax.data.slides.scaled import required_mpp
from sansmax.data.slides.slide import Slide, SlideError
from sansmax.data.slides.tiles import tile_grid
from sansmax.data.slides.tissue import Tissue, find_tissue, working_downsample
from sansmax.engine.encoders import Encoder
from sansmax.engine.stopping import Stopped
from sansmax.engine.tile_batches import TileBatches, Unreadable, reading
from sansmax.engine.tokenize_records import Record, read_record, record_path, sha256_of
from sansmax.engine.tokenize_settings import Plan, differences
from sansmax.errors import InputError
from sansmax.report.tissue import draw_tissue

THUMBNAIL_SIDE = 1536
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Step = Callable[[int, int], None]


@dataclass(frozen=True)
class SlideJob:
    """One slide to be done.

    `mpp`, in micrometres per level-0 pixel, goes before what the slide says; `mpp_missing` counts where neither says.
    """

    slide_id: str
    path: Path
    mpp: float | None = None
    mpp_missing: float | None = None


def tokenize_slide(job: SlideJob, plan: Plan, encoder: Encoder | None, step: Step | None = None) -> Record:
    """Does one slide: writes its tissue, thumbnail, features and record, and gives the record.

    `step(done, total)` is called after each batch of tiles; a `Stopped` that it raises ends the slide, and nothing of
    its features is left. Without an encoder only tissue is found. A slide that cannot be done gives a record that says
    why; only what would meet every slide is raised: a full disk, and a GPU without memory for the batch.
    """
    started = time.monotonic()
    if is_done(job, plan, encoder)[0] and (there := read_record(plan.output, job.slide_id)) is not None:
        # by another process that shares the folder
        return there
    if encoder is not None:
        _clear(job, plan)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            record = _done(job, plan, encoder, step or (lambda done, total: None))
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"there is no memory for {plan.batch_size} tiles at a time on {encoder and encoder.device}; give a "
                f"smaller --batch-size. What is finished stays ({str(error).splitlines()[0]})"
            ) from error
        except Exception as error:
            if isinstance(error, Stopped) or (isinstance(error, OSError) and error.errno in DISK_FULL):
                raise
            # a fault of ours or of a library in one slide is no reason to leave the others
            reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            record = Record(job.slide_id, str(job.path), "failed", mpp=job.mpp, reason=" ".join(reason.split()))
    told = (*record.warnings, *(str(w.message) for w in said if issubclass(w.category, UserWarning)))
    record = replace(record, warnings=tuple(dict.fromkeys(told)), seconds=round(time.monotonic() - started, 3))
    # features that are there are worth more than the word that tissue was found
    old = read_record(plan.output, job.slide_id)
    if encoder is not None or old is None or old.state not in ("done", "empty"):
        record.write(plan.output)
    return record


def is_done(job: SlideJob, plan: Plan, encoder: Encoder | None) -> tuple[bool, list[str]]:
    """Whether a slide needs nothing more, and what of its settings differs from those of the features that are there.

    Features whose slide or tissue changed since, or that are not as long as they were, are not done.
    """
    record = read_record(plan.output, job.slide_id)
    if record is None or record.state == "failed":
        return False, []
    if encoder is None:
        return tissue_path(job, plan).is_file() and thumbnail_path(job, plan).is_file(), []
    if record.state == "masked" or not record.is_whole(plan.output):
        return False, []
    # what a slide that says its own resolution was made with does not depend on the one for those that do not
    missing = job.mpp_missing if record.settings.get("mpp") is not None else None
    if changed := differences(record.settings, plan.settings(encoder, job.mpp or missing)):
        return False, changed
    return tissue_path(job, plan).is_file() and record.inputs == _inputs(job, plan), []


def tissue_path(job: SlideJob, plan: Plan) -> Path:
    """The tissue that counts for a slide: the edited file where a folder of such was given."""
    return (plan.tissue or plan.output / "tissue") / f"{job.slide_id}.geojson"


def thumbnail_path(job: SlideJob, plan: Plan) -> Path:
    """The picture of a slide with its tissue outlined."""
    return plan.output / "thumbnails" / f"{job.slide_id}.jpg"


def feature_paths(job: SlideJob, plan: Plan) -> list[Path]:
    """The files that hold the features of a slide, the one with the coordinates first."""
    kind = layout_named(plan.layout)
    return [plan.output / "features" / place.format(job.slide_id) for place in (kind.place, *kind.beside)]


def _inputs(job: SlideJob, plan: Plan) -> dict[str, Any]:
    return {"slide_bytes": job.path.stat().st_size, "tissue_sha256": sha256_of(tissue_path(job, plan))}


def _done(job: SlideJob, plan: Plan, encoder: Encoder | None, step: Step) -> Record:
    by_hand = _mpp_by_hand(job)
    with open_slide(job.path, mpp=by_hand) as slide:
        if encoder is not None:
            # before minutes are spent on it
            required_mpp(slide)
        tissue = _tissue(job, plan, slide)
        inputs = _inputs(job, plan)
        cells = (slide.size[0] / tissue.downsample, slide.size[1] / tissue.downsample)
        draw_tissue(slide.thumbnail(THUMBNAIL_SIDE), tissue.mask, cells, thumbnail_path(job, plan))
        share = round(tissue.share, 6)
        record = Record(job.slide_id, str(job.path), "masked", tissue_share=share, mpp=slide.mpp)
        if encoder is None:
            return record
        tiles = tile_grid(slide, tissue, **vars(plan.tiles))
        size, mpp = slide.size, required_mpp(slide)
    batches = TileBatches(job.path, tiles, encoder.to_input, plan.batch_size, mpp=by_hand)
    features, told = _features(batches, plan, encoder, step)
    settings = plan.settings(encoder, by_hand)
    known = {"tissue_share": share, "settings": settings, "inputs": inputs}
    bag = Bag(
        job.slide_id,
        features,
        xy=tiles.xy,
        tile_level0=float(tiles.side),
        mpp=mpp,
        slide_size=size,
        encoder=encoder.spec.name,
        attributes=_attributes(plan, encoder) | known,
    )
    files = feature_paths(job, plan)
    write_bag(bag, files[0], plan.layout, dtype=plan.stored_dtype)
    return replace(
        record,
        state="done" if len(tiles) else "empty",
        tiles=len(tiles),
        width=encoder.width,
        warnings=told,
        settings=settings,
        inputs=inputs,
        files={p.relative_to(plan.output).as_posix(): p.stat().st_size for p in files},
    )


def _attributes(plan: Plan, encoder: Encoder) -> dict[str, Any]:
    """What a file says of its features; `tile_px` and `overlap_px` are the words that other layouts are made from."""
    return {
        "encoder_revision": encoder.revision,
        "encoder_sha256": encoder.sha256,
        "transform": encoder.transform,
        "precision": encoder.spec.precision,
        "tile_px": plan.tiles.tile_px,
        "overlap_px": plan.tiles.overlap_px,
    }


def _tissue(job: SlideJob, plan: Plan, slide: Slide) -> Tissue:
    path = tissue_path(job, plan)
    if not path.is_file():
        if plan.tissue is not None:
            raise InputError(f"there is no {path}; put the tissue of this slide there, or leave --tissue away")
        write_tissue(find_tissue(slide), path)
    return read_tissue(path, slide.size, working_downsample(slide))


def _mpp_by_hand(job: SlideJob) -> float | None:
    """The resolution to be set; None where the slide says its own and none goes before."""
    if job.mpp is not None or job.mpp_missing is None:
        return job.mpp
    with open_slide(job.path) as slide:
        return job.mpp_missing if slide.mpp is None else None


def _features(batches: TileBatches, plan: Plan, encoder: Encoder, step: Step) -> tuple[np.ndarray, tuple[str, ...]]:
    """The features of all tiles in float32, and what was said while they were read."""
    count = len(batches.tiles)
    features = np.empty((count, encoder.width), np.float32)
    told: dict[str, None] = {}
    if count == 0:
        return features, ()
    with reading(batches, plan.workers) as iterator:
        for batch in iterator:
            if isinstance(batch, Unreadable):
                raise SlideError(batch.reason)
            made = encoder.encode(batch.tiles, pad_to=plan.batch_size)
            features[batch.first : batch.first + len(made)] = made
            told.update(dict.fromkeys(batch.warnings))
            step(batch.first + len(made), count)
    if not all_finite(features):
        raise InputError(
            f"{len(bad_rows(features))} of {count} tiles have features that are NaN or infinite; give --precision "
            "fp32, or another encoder"
        )
    return features, tuple(told)


def _clear(job: SlideJob, plan: Plan) -> None:
    """Takes away what was made with other settings or from other tissue: it must not stay beside what comes now."""
    old = read_record(plan.output, job.slide_id)
    # the record first: features without one are made again, a record without features would be believed
    record_path(plan.output, job.slide_id).unlink(missing_ok=True)
    for path in {*feature_paths(job, plan), *(plan.output / name for name in (old.files if old else ()))}:
        path.unlink(missing_ok=True)
