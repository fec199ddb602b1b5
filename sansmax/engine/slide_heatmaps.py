"""Heat maps of slides and bags as files: picture, array, pyramidal TIFF, and tiles for QuPath."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sansmax.data.bags.folder import open_bags
from sansmax.data.images import read_image
from sansmax.data.slides.opening import find_slides, open_slide, slide_id
from sansmax.engine.bag_run import BagRun
from sansmax.engine.faithfulness import Faithfulness, bag_answer, faithfulness, write_faithfulness
from sansmax.engine.predict import Predictor, pick_device
from sansmax.engine.predict_slide import SlideOptions
from sansmax.engine.progress import Bar, Reporter
from sansmax.engine.run import Run
from sansmax.engine.slide_explain import Asked, explain_bag, explain_slide, tensors
from sansmax.engine.sources import is_slide
from sansmax.errors import InputError, unknown_name
from sansmax.report.heatmap_array import write_scores_h5
from sansmax.report.heatmap_geojson import MOST_TILES, write_heatmap_geojson
from sansmax.report.heatmap_tiff import write_heatmap_tiff
from sansmax.report.slide_heatmap import slide_heatmap
from sansmax.report.slide_scores import SlideScores

FORMATS = ("png", "h5", "tiff", "geojson")
THUMBNAIL_SIDE = 2048


@dataclass(frozen=True)
class Drawing:
    """Which files are written for each slide, and how.

    `downsample` (level-0 pixels per pixel) is that of the TIFF, `transparent` leaves its background open, and
    `most_tiles` is the number of QuPath tiles above which tokens are gathered.
    """

    formats: tuple[str, ...] = ("png", "h5")
    downsample: float | None = None
    transparent: bool = False
    most_tiles: int = MOST_TILES

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise unknown_name("format", name, FORMATS, hint="(--format)")
        if not self.formats:
            raise InputError(f"give one format at least: {', '.join(FORMATS)}")


def write_heatmaps(
    scores: SlideScores,
    stem: Path,
    drawing: Drawing,
    *,
    thumbnail: np.ndarray | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Path]:
    """Writes STEM_heatmap.png, STEM_scores.h5, STEM_heatmap.tiff and STEM_tiles.geojson, those of `drawing.formats`.

    Scores without coordinates can only be an array: the others are left out and `say` is told, and where the array was
    not asked for it is an InputError.
    """
    formats = drawing.formats
    if scores.xy is None:
        if "h5" not in formats:
            raise InputError(
                f"{scores.slide_id}: the tokens have no coordinates in level-0 pixels, so only the array can be "
                "written: add h5 to --format. For bags in micrometres give the slide (--slide) or --mpp"
            )
        if len(formats) > 1:
            say(f"{scores.slide_id}: no coordinates in level-0 pixels, so only the array is written (order of the bag)")
        formats = ("h5",)
    if "png" in formats:
        yield slide_heatmap(scores, _beside(stem, "_heatmap.png"), thumbnail)
    if "h5" in formats:
        yield write_scores_h5(scores, _beside(stem, "_scores.h5"))
    if "tiff" in formats:
        options = {"downsample": drawing.downsample, "transparent": drawing.transparent}
        below = None if drawing.transparent else thumbnail
        yield write_heatmap_tiff(scores, _beside(stem, "_heatmap.tiff"), thumbnail=below, **options)
    if "geojson" in formats:
        path, note = write_heatmap_geojson(scores, _beside(stem, "_tiles.geojson"), most_tiles=drawing.most_tiles)
        say(f"{path.name}: {note}")
        yield path


def _beside(stem: Path, end: str) -> Path:
    return stem.with_name(stem.name + end)


def slide_heatmaps(
    run: str | Path | Run,
    paths: Sequence[str | Path],
    folder: str | Path,
    drawing: Drawing,
    *,
    class_name: str | None = None,
    options: SlideOptions | None = None,
    reporter: Reporter | None = None,
) -> Iterator[Path]:
    """Heat maps of slides (and pictures) at their own resolution by a run on images; gives paths.

    Every patch of a plain picture is looked at; of a slide those with tissue. Raises InputError as `predict_slide`.
    """
    reporter = reporter or Reporter(quiet=True)
    predictor = Predictor.of(run)
    if class_name is not None:
        predictor.class_index(class_name)
    how = options or SlideOptions()
    for path in find_slides(paths):
        mine = how if is_slide(path) else replace(how, tissue=False)
        with reporter.bar(f"explaining {path.name}") as bar, open_slide(path, mpp=how.slide_mpp) as slide:
            scores = explain_slide(predictor, slide, mine, class_name=class_name, progress=bar)
            picture = slide.thumbnail(THUMBNAIL_SIDE)
            yield from write_heatmaps(
                scores, Path(folder) / slide.name, drawing, thumbnail=picture, say=_say(reporter, bar)
            )


def bag_heatmaps(
    run: str | Path | BagRun,
    paths: Sequence[str | Path],
    folder: str | Path,
    drawing: Drawing,
    *,
    bags: str | Path | None = None,
    slide: str | Path | None = None,
    thumbnail: str | Path | None = None,
    mpp: float | None = None,
    class_name: str | None = None,
    check_faithfulness: bool = False,
    reporter: Reporter | None = None,
) -> Iterator[Path]:
    """Heat maps of bags of features by a run on bags, one after the other; gives paths.

    `paths` are bags and folders of them; or, where `bags` names their folder, slides or slide ids, and none is all.
    `slide` is the slide, or a folder of slides, whose thumbnails lie below the scores; `thumbnail` is a picture of the
    one whole slide. `mpp` is that of level 0 where bag and slide do not say. With `check_faithfulness` a page is added
    that compares scores with tokens truly removed.

    Raises InputError for bags of another encoder or width, unknown slides, and bags that lie outside their slide.
    """
    run = run if isinstance(run, BagRun) else BagRun.open(run)
    reporter = reporter or Reporter(quiet=True)
    asked = Asked(run.load_model(pick_device(run.config.device)), run.classes, run.task, class_name)
    slides = slides_by_id(slide)
    chosen = chosen_bags(run, paths, bags, mpp, slides)
    if thumbnail is not None and len(chosen) != 1:
        raise InputError(f"--thumbnail is the picture of one slide, {len(chosen)} bags are given; use --slide FOLDER")
    results: list[Faithfulness] = []
    for name, read in chosen.items():
        bag = read()
        with reporter.bar(f"explaining {name}") as bar, _opened(slides.get(name)) as found:
            scores = explain_bag(asked, bag, slide=found, progress=bar)
            picture = _picture_below(found, thumbnail)
            if check_faithfulness:
                results.append(bag_faithfulness(asked, bag, scores))
            yield from write_heatmaps(scores, Path(folder) / name, drawing, thumbnail=picture, say=_say(reporter, bar))
    if results:
        yield write_faithfulness(folder, results, title="Are the scores true of the network?")


def slides_by_id(slide: str | Path | None) -> dict[str, Path]:
    """The slides of a file or folder by their ids."""
    return {} if slide is None else {slide_id(path): path for path in find_slides([slide])}


def chosen_bags(
    run: BagRun,
    paths: Sequence[str | Path],
    bags: str | Path | None,
    mpp: float | None,
    slides: dict[str, Path],
) -> dict[str, Callable[[], Any]]:
    """Functions that read the bags that were asked for, by slide id; slides among `paths` are added to `slides`."""
    if bags is None and not paths:
        raise InputError("give bags of features, or their folder with --bags DIR")
    chosen: dict[str, Callable[[], Any]] = {}
    for place in [bags] if bags is not None else paths:
        found = open_bags(place, mpp=mpp)
        run.check_features(found.encoder, found.width, place)
        ids = found.ids
        if bags is not None and paths:
            slides |= {slide_id(p): Path(p) for p in paths if Path(p).is_file()}
            ids = [slide_id(p) for p in paths]
        for name in ids:
            if name not in found.ids:
                raise unknown_name("slide", name, found.ids, hint=f"(bags in {place})")
            if name in chosen:
                raise InputError(f"two bags are of the slide {name}; explain them one after the other")
            chosen[name] = lambda name=name, found=found: found.read(name)
    return chosen


def bag_faithfulness(asked: Asked, bag: Any, scores: SlideScores) -> Faithfulness:
    """The two tests of a bag's scores (`sansmax.engine.faithfulness`)."""
    features, coords = tensors(asked.network, bag)
    answer = bag_answer(asked.network, features, coords, asked.classes.index(scores.class_name), asked.task)
    return faithfulness(scores.slide_id, answer, scores.scores, device=features.device)


def _say(reporter: Reporter, bar: Bar) -> Callable[[str], None]:
    return (lambda text: None) if reporter.quiet else bar.say


def _opened(path: Path | None) -> AbstractContextManager[Any]:
    return nullcontext() if path is None else open_slide(path)


def _picture_below(slide: Any, given: str | Path | None) -> np.ndarray | None:
    if given is not None:
        return read_image(given)
    return None if slide is None else slide.thumbnail(THUMBNAIL_SIDE)
