"""Slides: from pixels to bags of features."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sansmax.cli.app import QuietOption, app, command_line, say
from sansmax.errors import InputError


@app.command()
def tokenize(
    slides: Annotated[
        list[Path] | None, typer.Argument(metavar="SLIDES...", help="Slides, or folders of slides.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the results.")] = None,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", "-e", help="A name of timm's, hf-hub:OWNER/NAME, or local-dir:FOLDER."),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained/--no-pretrained", help="Its weights, or random ones drawn by --seed.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Seed of random weights.")] = 0,
    offline: Annotated[bool, typer.Option("--offline", help="Take weights from this machine only.")] = False,
    tile_px: Annotated[int, typer.Option(help="Side of a tile in pixels as it is read.")] = 256,
    tile_um: Annotated[float | None, typer.Option(help="Side of a tile in micrometres.")] = None,
    tile_mpp: Annotated[float | None, typer.Option(help="Micrometres per pixel of a tile [0.5].")] = None,
    overlap: Annotated[int, typer.Option(help="Pixels of a tile that its neighbour has, too.")] = 0,
    min_tissue: Annotated[float, typer.Option(help="Least share of tissue in a tile.")] = 0.25,
    crop_pct: Annotated[float, typer.Option(help="Share of the tile's side that the encoder sees.")] = 1.0,
    mpp: Annotated[
        float | None, typer.Option(help="Micrometres per pixel at level 0, for slides that do not say.")
    ] = None,
    list_: Annotated[
        Path | None, typer.Option("--list", help="CSV of slides: column wsi (path), and mpp if wanted.")
    ] = None,
    tissue: Annotated[Path | None, typer.Option(help="Folder of edited NAME.geojson files to use.")] = None,
    mask_only: Annotated[bool, typer.Option("--mask-only", help="Find tissue, make no features.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Tiles at a time.")] = 32,
    workers: Annotated[int | None, typer.Option(help="Processes that read tiles [one per processor].")] = None,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    dtype: Annotated[
        str | None, typer.Option(help="Of stored features: float32 or float16 [float16 with bf16].")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:NUMBER or mps.")] = "auto",
    layout: Annotated[str, typer.Option(help="Of the feature files: sansmax, trident, clam or stamp.")] = "sansmax",
    shard: Annotated[
        str | None, typer.Option(help="i/n: the slides of the i-th of n processes, counted from 1.")
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for a Ray cluster.")] = "local",
    concurrency: Annotated[int | None, typer.Option(help="Slides at a time on the cluster [what it holds].")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Make anew what was made with other settings.")
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Find tissue in slides, cut it into tiles, and write their features, a file per slide; go on where it stopped."""
    from sansmax.engine.encoders import EncoderSpec
    from sansmax.engine.progress import Reporter
    from sansmax.engine.tokenize import tokenize as tokenize_slides
    from sansmax.engine.tokenize_jobs import parse_shard
    from sansmax.engine.tokenize_settings import Plan, TileSettings, default_workers

    if output is None:
        raise InputError("give the folder of the results: --output DIR")
    if encoder is None and not mask_only:
        raise InputError("give the network that makes the features: --encoder NAME; or --mask-only to find tissue only")
    spec = encoder and EncoderSpec(encoder, pretrained, seed, precision, crop_pct, device, offline)
    plan = Plan(
        output,
        None if mask_only or not spec else spec,
        TileSettings.of(tile_px, tile_um, tile_mpp, overlap_px=overlap, min_tissue=min_tissue),
        layout,
        dtype,
        tissue,
        batch_size,
        default_workers() if workers is None else workers,
    )
    done = tokenize_slides(
        slides or [],
        plan,
        table=list_,
        mpp=mpp,
        shard=None if shard is None else parse_shard(shard),
        overwrite=overwrite,
        engine=engine,
        concurrency=concurrency,
        command=command_line(),
        reporter=Reporter(quiet=quiet),
    )
    say(f"{done.text()}\nread: {done.output / 'summary.md'}", quiet)
    if done.failed:
        # said already as they came, but for --quiet
        lines = [f"{r.slide_id}: failed: {r.reason}" for r in done.failed if quiet]
        lines.append(
            f"{len(done.failed)} slides failed; the same command tries them again: {done.output / 'failed.csv'}"
        )
        sys.stderr.write("\n".join(lines) + "\n")
        raise typer.Exit(1)
