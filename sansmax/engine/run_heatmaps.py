"""Which kind of heat map a run and its input ask for: of pictures, of slides, or of bags."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sansmax.engine.bag_run import is_bag_run
from sansmax.engine.heatmaps import heatmaps
from sansmax.engine.predict_slide import SlideOptions
from sansmax.engine.progress import Reporter
from sansmax.engine.run import Run
from sansmax.engine.sources import is_slide
from sansmax.errors import InputError


@dataclass(frozen=True)
class Wanted:
    """What `sansmax heatmap` was asked for; None is the default of the kind of input."""

    formats: tuple[str, ...] | None = None
    class_name: str | None = None
    image_size: int | str | None = None
    bags: Path | None = None
    slide: Path | None = None
    thumbnail: Path | None = None
    downsample: float | None = None
    transparent: bool = False
    faithfulness: bool = False
    options: SlideOptions | None = None


def run_heatmaps(
    run: str | Path,
    paths: Sequence[Path],
    wanted: Wanted,
    *,
    output: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Iterator[Path]:
    """Writes the heat maps of pictures, slides or bags and gives the paths of the files.

    A run on bags explains bags. A run on images explains slides at their own resolution, and pictures too where formats
    or options of slides are given; other pictures are explained at the size of training. Raises InputError for options
    that do not belong to the run.
    """
    from sansmax.engine.slide_heatmaps import Drawing, bag_heatmaps, slide_heatmaps

    folder = Path(output) if output is not None else Path(run) / "heatmaps"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file; give a folder")
    drawing = Drawing(wanted.formats or ("png", "h5"), wanted.downsample, wanted.transparent)
    if is_bag_run(run):
        places = {"bags": wanted.bags, "slide": wanted.slide, "thumbnail": wanted.thumbnail}
        mpp = wanted.options.slide_mpp or wanted.options.mpp if wanted.options else None
        how = {"mpp": mpp, "class_name": wanted.class_name, "check_faithfulness": wanted.faithfulness}
        yield from bag_heatmaps(run, paths, folder, drawing, **places, **how, reporter=reporter)
        return
    _check_for_images(run, paths, wanted)
    if wanted.formats or wanted.options or any(is_slide(path) for path in paths):
        if wanted.image_size not in (None, "native"):
            raise InputError(
                "--image-size is for pictures; slides are read at their own resolution, choose it by --mpp"
            )
        how = {"class_name": wanted.class_name, "options": wanted.options}
        yield from slide_heatmaps(run, paths, folder, drawing, **how, reporter=reporter)
        return
    size = wanted.image_size
    yield from heatmaps(
        Run.open(run), paths, output=folder, class_name=wanted.class_name, image_size=size, reporter=reporter
    )


def _check_for_images(run: str | Path, paths: Sequence[Path], wanted: Wanted) -> None:
    Run.open(run)
    if not paths:
        raise InputError("give pictures or slides to explain")
    places = {"--bags": wanted.bags, "--slide": wanted.slide, "--thumbnail": wanted.thumbnail}
    given = {name: place is not None for name, place in places.items()} | {"--faithfulness": wanted.faithfulness}
    if wrong := [name for name, there in given.items() if there]:
        raise InputError(f"{run} is a run on images, {', '.join(wrong)} belong to runs on bags; leave them out")
