"""What a stream may read, recognised and opened: pictures, slides, bags of features, sources of your own."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from sansmax.data.slide_tokens import SlideTokens
from sansmax.data.tokens import PixelSource, TokenSource, open_pixels
from sansmax.engine.embedding import Embedder, embed_features, embed_picture, embed_slide
from sansmax.errors import InputError
from sansmax.models.slide_positions import centred_coords

BAG_SUFFIXES = frozenset({".h5", ".hdf5", ".pt", ".npy", ".npz"})
# formats of slide scanners
SCANNER_SUFFIXES = frozenset({".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide"})
# a TIFF without levels is a picture up to this side, a slide from there on
LARGE = 10_000


@dataclass(frozen=True)
class Opened:
    """A source that is open: where its tokens lie, and how a network embeds them.

    `embedder(network, chunk_tokens)` is a context, since reading ahead takes a thread.
    """

    embedder: Callable[[Any, int], AbstractContextManager[Embedder]]
    grid: tuple[int, int] | None = None
    xy: np.ndarray | None = None
    side: float | None = None


def opened_tokens(source: TokenSource | SlideTokens) -> Opened:
    """A source of tokens that is there already."""
    if isinstance(source, SlideTokens):
        return Opened(lambda network, n: embed_slide(network, source, n), None, source.xy, source.side)
    return Opened(lambda network, n: nullcontext(embed_picture(network, source, n)), source.grid)


@contextmanager
def open_source(
    model: Any, source: Any, *, mpp: float | None, slide_mpp: float | None, tissue: Any, min_tissue: float
) -> Iterator[Opened]:
    """Opens whatever `sansmax.stream` takes; files are closed when the block ends.

    Raises InputError where source and network do not go together.
    """
    if hasattr(model, "embed_tokens"):
        yield _features(model, source)
    elif is_bag(source):
        raise InputError(
            f"{type(model).__name__} reads pixels, and this is a bag of features; give a slide or a picture, or a "
            "network of features such as seqnorm_slide_small"
        )
    elif is_slide(source) or (mpp is not None and isinstance(source, str | Path)):
        from sansmax.data.slides.opening import open_slide

        where = partial(slide_tokens, model, mpp=mpp, tissue=tissue, min_tissue=min_tissue)
        if isinstance(source, str | Path):
            with open_slide(source, mpp=slide_mpp) as slide:
                yield opened_tokens(where(slide))
        else:
            yield opened_tokens(where(source))
    else:
        yield opened_tokens(_picture(model, source))


def _picture(model: Any, source: Any) -> TokenSource | SlideTokens:
    if isinstance(source, str | Path):
        source = open_pixels(source)
    if isinstance(source, np.ndarray):
        mean, std = (per_channel(model, key) for key in ("mean", "std"))
        return PixelSource(source, model.patch_embed.patch_size, in_chans=model.in_chans, mean=mean, std=std)
    if not hasattr(source, "read"):
        raise InputError(
            f"{type(source).__name__} is nothing that a network of patches reads; give the path of a picture or slide, "
            "pixels, or a TokenSource"
        )
    return source


def per_channel(model: Any, key: str) -> tuple[float, ...]:
    """The mean or standard deviation of the model's configuration, for as many channels as it has."""
    cfg: dict[str, Any] = model.pretrained_cfg
    values = tuple(cfg.get(key, (0.5,)))
    return values if len(values) in (1, model.in_chans) else (sum(values) / len(values),)


def slide_tokens(
    model: Any,
    slide: Any,
    *,
    mpp: float | None = None,
    tissue: Any = True,
    min_tissue: float = 0.5,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> SlideTokens:
    """The tokens of an opened slide for a network of patches; `tissue` as in `sansmax.stream`."""
    if tissue is True:
        from sansmax.data.slides.tissue import find_tissue

        tissue = find_tissue(slide)
    return SlideTokens(
        slide,
        model.patch_embed.patch_size,
        tissue=tissue or None,
        mpp=mpp,
        min_tissue=min_tissue,
        in_chans=model.in_chans,
        mean=mean or per_channel(model, "mean"),
        std=std or per_channel(model, "std"),
    )


def is_slide(source: Any) -> bool:
    """Whether this is a slide: one that is open, a file of a scanner's format, or a TIFF of several levels or huge."""
    if not isinstance(source, str | Path):
        return hasattr(source, "levels") and hasattr(source, "thumbnail")
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".tif", ".tiff"):
        return _is_pyramid(path)
    return suffix in SCANNER_SUFFIXES


def _is_pyramid(path: Path) -> bool:
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            page: Any = tiff.pages.first
            levels = len(tiff.series[0].levels) > 1 or bool(page.subifds)
            return levels or (page.is_tiled and max(page.imagelength, page.imagewidth) > LARGE)
    except (tifffile.TiffFileError, OSError, ValueError, IndexError, KeyError):
        return False


def is_bag(source: Any) -> bool:
    """Whether this is a bag of features: an object or a file of one."""
    if isinstance(source, str | Path):
        return Path(source).suffix.lower() in BAG_SUFFIXES - {".npy", ".npz"}
    return hasattr(source, "features")


def _features(model: Any, source: Any) -> Opened:
    if isinstance(source, str | Path):
        if Path(source).suffix.lower() not in BAG_SUFFIXES:
            raise InputError(
                f"{type(model).__name__} reads features of tiles, and {source} is no bag of them; make one with "
                f"`sansmax tokenize {source} --output DIR`"
            )
        from sansmax.data.bags.reading import read_bag

        source = read_bag(Path(source), mmap=True)
    bag = source if hasattr(source, "features") else None
    features = source.features if bag is not None else source
    coords = None if bag is None or bag.grid is None else _centred(bag.grid)
    if getattr(features, "ndim", 0) != 2:
        raise InputError(f"features must be an array (tokens, width), got shape {np.shape(features)}")
    if not len(features):
        raise InputError("the bag is empty: a slide without tissue has no answer; leave it out")
    if features.shape[1] != model.in_features:
        raise InputError(
            f"the network reads features of width {model.in_features}, these have {features.shape[1]}: they are of "
            "another encoder; tokenize with the encoder of training"
        )
    xy = None if bag is None else cast(Any, bag).xy
    side = None if bag is None else cast(Any, bag).tile_level0
    return Opened(lambda network, n: nullcontext(embed_features(network, features, coords, n)), None, xy, side)


def _centred(grid: np.ndarray) -> np.ndarray:
    """Coordinates from the middle of the whole bag, as the network takes them before it sees a chunk."""
    return centred_coords(torch.from_numpy(np.asarray(grid, np.float64))[None])[0].numpy()
