"""The command line: the same words as the Python interface. What is slow to import is imported in the commands."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from napari_calvae.cli._benchmark import benchmark
from napari_calvae.cli._support import (
    Commands,
    Unit,
    fail,
    finish,
    lazy_traces_of,
    parameters,
    progress,
    show,
    traces_of,
)


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Objective(StrEnum):
    """What to train for."""

    sleep = "sleep"
    vimco = "vimco"
    wake_sleep = "wake_sleep"
    elbo = "elbo"
    info_vae = "info_vae"
    supervised = "supervised"
    semi_supervised = "semi_supervised"


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Spike posteriors from calcium imaging.",
)

#: Formats of results and traces that can be written.
WRITTEN = ".zarr, .nwb, .npz, .csv, .parquet, .mat, .h5, spks.npy"
Input = Annotated[
    Path,
    typer.Argument(
        help="Traces (suite2p folder, .nwb, CaImAn's .hdf5, .zarr, .npy, .npz, .csv, .parquet, .mat, .h5) or a movie"
    ),
]
Rois = Annotated[Path | None, typer.Option(help="Label image of the ROIs (.tif, .npy); needed for a movie")]
Append = Annotated[bool, typer.Option("--append", help="Add to the NWB file that is there")]
FrameRate = Annotated[float | None, typer.Option(help="Frames per second (Hz), if the file does not say")]
UnitOption = Annotated[Unit | None, typer.Option(help="What the numbers are; by default what the file says, else dff")]
Neuropil = Annotated[
    float | None,
    typer.Option(help="Share of the neuropil to subtract, 0 for none; by default 0.7 for a movie, for suite2p its own"),
]
Seed = Annotated[int, typer.Option(min=0, help="Of every random number")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there")]


def _version(wanted: bool) -> None:
    if wanted:
        from napari_calvae import __version__

        typer.echo(f"calvae {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit")
    ] = False,
) -> None:
    """Spike posteriors from calcium imaging."""
    import logging

    # What tifffile has to say of a damaged file is said by our own error.
    logging.getLogger("tifffile").addHandler(logging.NullHandler())


@app.command()
def infer(  # noqa: PLR0913 - every option is a word of the documented command line
    source: Annotated[Path, typer.Argument(metavar="INPUT", help=Input.__metadata__[0].help)],
    output: Annotated[Path, typer.Option("-o", "--output", help=f"Result to write: {WRITTEN}; or a folder")],
    rois: Rois = None,
    frame_rate: FrameRate = None,
    model: Annotated[str, typer.Option(help="Name of a shipped model (see `calvae models`) or a file")] = "universal",
    samples: Annotated[int, typer.Option(min=0, max=1000, help="Spike trains to draw per ROI")] = 50,
    device: Annotated[
        Device, typer.Option(help="Where to compute: the best there is, or cuda or mps where the machine has it")
    ] = Device.auto,
    seed: Seed = 0,
    unit: UnitOption = None,
    neuropil: Neuropil = None,
    amplitude: Annotated[
        float | None, typer.Option(help="ΔF/F that one spike typically makes, where it is known")
    ] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Dask cluster: local[:N], tcp://HOST:PORT, slurm[:N], pbs, lsf or sge")
    ] = None,
    block_rois: Annotated[int | None, typer.Option(min=1, help="ROIs that are inferred and written together")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="INPUT is a folder: infer all in it that match, as in '*/suite2p'")
    ] = None,
    suffix: Annotated[str, typer.Option(help="Of the results in the folder, with --pattern")] = ".zarr",
    append: Append = False,
    overwrite: Overwrite = False,
) -> None:
    """Infer spikes from a movie with its ROIs, from traces, or from a folder full of recordings.

    A result that ends in .zarr may be larger than memory, and goes on where it stopped when the same is asked again.
    """
    from napari_calvae.cli import _batch

    if scheduler is None and device is not Device.auto:
        from napari_calvae.inference import pick_device

        pick_device(device.value)
    settings = {"n_samples": samples, "seed": seed, "device": device.value, "amplitude": amplitude}
    settings |= {"scheduler": scheduler, "block_rois": block_rois}
    order = _batch.Order(model, settings, (frame_rate, unit, neuropil), overwrite, append)
    if pattern is None:
        typer.echo(str(_batch.infer_one(source, rois, output, order)))
        return
    rows = _batch.infer_many(source, pattern, rois, output, suffix, order)
    show([{name: row[name] for name in ("recording", "rois", "spikes_expected", "seconds", "error")} for row in rows])
    failed = sum(bool(row["error"]) for row in rows)
    typer.echo(f"{len(rows) - failed} of {len(rows)} recordings inferred; {output / 'summary.csv'}")
    if failed:
        raise typer.Exit(1)


@app.command()
def check(
    source: Annotated[Path, typer.Argument(metavar="INPUT", help=Input.__metadata__[0].help)],
    rois: Rois = None,
    frame_rate: FrameRate = None,
    unit: UnitOption = None,
    neuropil: Neuropil = None,
) -> None:
    """Tell what looks wrong with traces although spikes can be inferred from them; exit code 1 if something does."""
    from napari_calvae import doubts

    with progress() as report:
        traces = lazy_traces_of(source, rois, (frame_rate, unit, neuropil), report)
        found = doubts.check(traces)
    for doubt in found:
        typer.echo(str(doubt))
    if found:
        raise typer.Exit(1)
    typer.echo(f"{source}: nothing looks wrong with {traces.n_rois} ROIs.")


@app.command()
def repeat(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="Result of `calvae infer` (.zarr or .npz)")],
    source: Annotated[Path, typer.Argument(metavar="INPUT", help=Input.__metadata__[0].help)],
    rois: Rois = None,
    frame_rate: FrameRate = None,
    unit: UnitOption = None,
    neuropil: Neuropil = None,
    model: Annotated[Path | None, typer.Option(help="File of the model, unless it is one that ships")] = None,
) -> None:
    """Infer again what a result was inferred from, and prove that it is the same; exit code 1 if it is not."""
    from napari_calvae import inference

    with progress() as report:
        traces = lazy_traces_of(source, rois, (frame_rate, unit, neuropil), report)
        report("Inferring again", None)
        found = inference.repeat(result, traces, model)
    typer.echo(str(found))
    if not found.same:
        raise typer.Exit(1)


@app.command()
def extract(
    source: Annotated[Path, typer.Argument(metavar="MOVIE", help="Movie (.tif, .h5, .zarr, .nwb, .avi, .npy)")],
    output: Annotated[Path, typer.Option("-o", "--output", help=f"Traces to write: {WRITTEN}")],
    rois: Rois = None,
    frame_rate: FrameRate = None,
    neuropil: Neuropil = None,
    overwrite: Overwrite = False,
) -> None:
    """Read the traces of ROIs from a movie, which may be larger than memory."""
    from napari_calvae.formats import check_result, is_movie, outputs_of, write
    from napari_calvae.formats._files import check_apart

    check_apart(outputs_of(output), source, rois)
    check_result(output, overwrite)
    if not is_movie(source, with_rois=rois is not None):
        fail(f"{source.name}: expected a movie, got something else. Traces need no extraction.")
    with progress() as report:
        traces = traces_of(source, rois, (frame_rate, None, neuropil), report)
        report("Writing", None)
        write(traces, output, overwrite)
    typer.echo(f"{output}: {traces.n_rois} ROIs, {traces.duration:.1f} s at {traces.frame_rate:g} Hz")


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="RESULT", help="Zarr store that `calvae infer` wrote")],
    output: Annotated[Path, typer.Option("-o", "--output", help=f"File to write: {WRITTEN}")],
    append: Append = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a result in another format."""
    from napari_calvae.formats import check_result, open_result, outputs_of, write
    from napari_calvae.formats._files import check_apart

    check_apart(outputs_of(output), source)
    check_result(output, overwrite, append)
    with progress() as report:
        report("Reading", None)
        result = open_result(source).load()
        report("Writing", None)
        write(result, output, overwrite, append)
    typer.echo(f"{output}: {result.traces.n_rois} ROIs")


@app.command()
def simulate(  # noqa: PLR0913 - every option is one field of the simulation
    output: Annotated[Path, typer.Argument(help="File to write (.npz), or folder with --movie")],
    movie: Annotated[bool, typer.Option("--movie", help="A two-photon movie, with label image and spikes")] = False,
    cells: Annotated[int, typer.Option(min=1, help="Number of cells")] = 10,
    duration: Annotated[float, typer.Option(help="Length of the recording (s)")] = 60.0,
    frame_rate: Annotated[float, typer.Option(help="Frames per second (Hz)")] = 30.0,
    model: Annotated[str, typer.Option(help="Generative model: linear_ar or dye_binding")] = "dye_binding",
    rate: Annotated[float, typer.Option(help="Median firing rate of the cells (spikes/s)")] = 0.5,
    theta: Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="Median of a parameter of the model")] = [],  # noqa: B006
    size: Annotated[int, typer.Option(help="Width and height of the movie (pixels)")] = 96,
    diameter: Annotated[float, typer.Option(help="Diameter of the somata (pixels)")] = 10.0,
    photons: Annotated[float, typer.Option(help="Photons of a resting soma, per pixel and frame")] = 6.0,
    gain: Annotated[float, typer.Option(help="Grey values per photon")] = 20.0,
    neuropil: Annotated[float, typer.Option(help="Brightness of the neuropil, relative to a resting soma")] = 0.4,
    motion: Annotated[float, typer.Option(help="Standard deviation of the shifts (pixels)")] = 0.4,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Simulate traces or a movie whose spikes are known."""
    values = parameters(theta)
    from napari_calvae import simulation

    common: dict[str, Any] = {"model": model, "rate": rate, "theta": values, "seed": seed}
    with progress() as report:
        report("Simulating", None)
        if movie:
            look: dict[str, Any] = {"size": size, "diameter": diameter, "photons": photons, "gain": gain}
            look |= {"n_cells": cells, "duration": duration, "frame_rate": frame_rate}
            recording = simulation.simulate_movie(neuropil=neuropil, motion=motion, **look, **common)
            files = simulation.write_simulation(recording, output, overwrite)
        else:
            traces = simulation.simulate(cells, duration, frame_rate, **common)
            files = simulation.write_simulation(traces, output, overwrite)
    for file in files:
        typer.echo(str(file))


@app.command()
def train(  # noqa: PLR0913 - every option is a word of the documented command line
    source: Annotated[Path, typer.Argument(metavar="INPUT", help=Input.__metadata__[0].help)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Model to write (.safetensors)")],
    spikes: Annotated[Path | None, typer.Option(help="True spikes (.npz) for the supervised objectives")] = None,
    objective: Annotated[
        Objective, typer.Option(help="What to train for; only the supervised ones need spikes")
    ] = Objective.sleep,
    base: Annotated[str, typer.Option(help="Model to start from: a shipped name or a file")] = "universal",
    generative: Annotated[
        str | None,
        typer.Option(
            help="Generative model, by default the base's; with gcamp6f and its like a fit takes many minutes"
        ),
    ] = None,
    noise: Annotated[str | None, typer.Option(help="Its noise, drift for one, by default the base's")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates of the parameters, by default as is good")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the updates, by default as is good")] = None,
    rois: Rois = None,
    frame_rate: FrameRate = None,
    unit: UnitOption = None,
    neuropil: Neuropil = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Train a model further on a recording."""
    from napari_calvae.formats import check_output, read_spikes
    from napari_calvae.formats._files import check_apart
    from napari_calvae.preprocess import bin_spikes
    from napari_calvae.recording import RecordingError

    if output.suffix != ".safetensors":
        raise RecordingError(f"output: expected a name that ends in .safetensors, got {output.name!r}.")
    if objective.value.endswith("supervised") != (spikes is not None):
        raise RecordingError(
            f"spikes: expected a file with --objective supervised or semi_supervised and none otherwise, "
            f"got {spikes} for {objective.value}."
        )
    check_apart([output], Path(base))  # the only input of that suffix
    check_output(output, overwrite)
    with progress() as report:
        traces = traces_of(source, rois, (frame_rate, unit, neuropil), report)
        counts = None
        if spikes is not None:
            import numpy as np

            times = read_spikes(spikes)
            missing = [roi for roi in traces.roi_ids if roi not in times]
            if missing and objective is Objective.supervised:
                raise RecordingError(f"{spikes.name}: expected spikes of every ROI, got none of ROI {missing[0]}.")
            clock = (traces.t0, traces.frame_rate, traces.n_frames)
            unknown = np.full(traces.n_frames, np.nan)
            counts = np.stack([bin_spikes(times[r], *clock) if r in times else unknown for r in traces.roi_ids])
        report("Preparing the fit", None)
        from napari_calvae.fitting import DEFAULTS, iter_fit
        from napari_calvae.training import TrainConfig

        given = {"n_steps": steps, "learning_rate": learning_rate, "seed": seed}
        settings = DEFAULTS[objective.value].model_dump() | {k: v for k, v in given.items() if v is not None}
        config = TrainConfig(**settings)
        records = iter_fit(
            traces, base, objective.value, spikes=counts, generative=generative, noise=noise, config=config
        )
        model = finish(records, lambda r: report(f"Training, loss {r.loss:.4g}", r.step / r.n_steps))
        model.save(output)
    typer.echo(f"{output}: trained for {config.n_steps} steps on {traces.n_rois} ROIs")
    typer.echo(model.description)


@app.command()
def models() -> None:
    """List the models that ship with the package."""
    from napari_calvae.vae import load_model
    from napari_calvae.vae import models as shipped

    def rows() -> Iterator[dict[str, object]]:
        for name, path in shipped().items():
            model = load_model(name)
            span = f"{model.preprocessing.min_frame_rate:g} to {model.preprocessing.max_frame_rate:g}"
            yield {
                "name": name,
                "network": model.recognition.name,
                "fluorescence": model.generative.name,
                "Hz": span,
                "MB": path.stat().st_size / 1e6,
                "description": model.description,
            }

    show(rows())


@app.command()
def demo(
    screenshot: Annotated[
        Path | None, typer.Option(help="Write a picture and exit, without a display if there is none")
    ] = None,
    tour: Annotated[
        Path | None, typer.Option(help="Take the whole tour instead, with a picture of every step in this folder")
    ] = None,
) -> None:
    """Open the sample movie in napari, click a cell and show its spikes."""
    if screenshot is not None:
        from napari_calvae.formats import check_output

        check_output(screenshot, overwrite=True)
    try:
        from napari_calvae._napari import demo as window
    except ImportError as error:
        fail(f"demo: expected napari to be installed, got {error}. Run: pip install 'napari-calvae[all]'")
    if tour is not None:
        for step in window.run_tour(tour):
            typer.echo(str(step))
        return
    picture = window.run(screenshot)
    if picture is not None:
        typer.echo(str(picture))


app.add_typer(benchmark, name="benchmark")
