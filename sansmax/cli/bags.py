"""Bags of features: bags says what was found, convert-bags makes them into another layout."""

from pathlib import Path
from typing import Annotated

import typer

from sansmax.cli.app import QuietOption, app, say
from sansmax.errors import InputError

BagsArgument = Annotated[Path, typer.Argument(help="A folder of bags, a job's folder, or one file.")]
MppOption = Annotated[float | None, typer.Option("--mpp", help="Micrometres per level-0 pixel of all slides.")]
TileOption = Annotated[
    float | None, typer.Option("--tile-level0", help="Side of a tile in level-0 pixels, where files do not say it.")
]
EncoderOption = Annotated[str | None, typer.Option("--encoder", help="Name of the encoder, where files do not say it.")]
PatchesOption = Annotated[Path | None, typer.Option("--patches", help="CLAM's folder of patches, for sides of tiles.")]
NanOption = Annotated[bool, typer.Option("--allow-nan", help="Take features that are NaN or infinite.")]
TrustOption = Annotated[bool, typer.Option("--trust-numpy", help="Take numpy arrays inside .pt files.")]


@app.command()
def bags(
    path: BagsArgument,
    tile_level0: TileOption = None,
    patches: PatchesOption = None,
    trust_numpy: TrustOption = False,
    each: Annotated[bool, typer.Option("--each", help="A line for each slide.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Read all features: NaN, places, sizes.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Say what lies in a folder of bags: layout, slides, tiles, width, encoder, and what is wrong."""
    from sansmax.data.bags.folder import open_bags
    from sansmax.engine.progress import Reporter

    reporter = Reporter(quiet=quiet)
    with reporter.bar("bags") as bar:
        known = {"tile_level0": tile_level0, "patches": patches, "trust_numpy": trust_numpy}
        found = open_bags(path, **known, skip_bad=True, progress=bar)
    say(found.note, quiet)
    wrong = dict(found.bad)
    if check:
        with reporter.bar("check") as bar:
            for done, slide_id in enumerate(found.ids, 1):
                try:
                    for remark in found.read(slide_id).remarks:
                        say(f"remark: {slide_id}: {remark}", quiet)
                except InputError as e:
                    wrong[slide_id] = str(e)
                bar(done, len(found.ids))
    if each:
        say(
            "\n".join(f"{i}\t{found.length(i)}\t{found.header(i).found.layout}\t{found.path(i)}" for i in found.ids),
            quiet,
        )
    if wrong:
        say("\n".join(f"failed: {slide_id}: {reason}" for slide_id, reason in wrong.items()), False)
        raise typer.Exit(1)


@app.command("convert-bags")
def convert_bags(
    source: BagsArgument,
    target: Annotated[Path, typer.Argument(help="Folder of the result.")],
    layout: Annotated[
        str, typer.Option("--layout", help="sansmax, trident, clam, stamp, gigapath, pt or npy.")
    ] = "sansmax",
    mpp: MppOption = None,
    mpp_table: Annotated[
        Path | None, typer.Option("--mpp-table", help="CSV with slide_id (or wsi) and mpp, for slides one by one.")
    ] = None,
    tile_level0: TileOption = None,
    encoder: EncoderOption = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float16 or float32 [that of the features, where the layout takes it]."),
    ] = None,
    patches: PatchesOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write slides again that are there.")] = False,
    allow_nan: NanOption = False,
    trust_numpy: TrustOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write bags in another layout; slides that are done are skipped, and what is lost is said."""
    from sansmax.data.bags.convert import convert_bags as convert
    from sansmax.data.bags.resolutions import read_mpp_table
    from sansmax.engine.progress import Reporter

    if mpp is not None and mpp_table is not None:
        raise InputError("--mpp is for all slides and --mpp-table for single ones; give one of them")
    with Reporter(quiet=quiet).bar("convert") as bar:
        report = convert(
            source,
            target,
            layout,
            mpp=mpp if mpp_table is None else read_mpp_table(mpp_table),
            tile_level0=tile_level0,
            encoder=encoder,
            dtype=dtype,
            patches=patches,
            overwrite=overwrite,
            allow_nan=allow_nan,
            trust_numpy=trust_numpy,
            progress=bar,
        )
    say(report.text(), quiet and not report.failed)
    if report.failed:
        raise typer.Exit(1)
