"""``calvae benchmark``: accuracy and speed, beside rivals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from napari_calvae.cli._support import Commands, show

benchmark = typer.Typer(cls=Commands, no_args_is_help=True, help="Measure accuracy and speed beside rivals.")

Model = Annotated[str, typer.Option(help="Name of a shipped model or a file")]
ModelOrFolder = Annotated[str, typer.Option(help="Model, or a folder of those that leave out a fold each")]
Data = Annotated[Path, typer.Option(help="Ground truth: folder or file, .npz or CASCADE's .mat")]
Only = Annotated[str, typer.Option(help="Data sets to use, by prefix, comma-separated")]
GainScale = Annotated[float | None, typer.Option(min=0, help="That of the models; by default their own")]


@benchmark.command()
def accuracy(
    data: Data,
    model: ModelOrFolder = "universal",
    only: Only = "",
    out: Annotated[Path | None, typer.Option(help="Folder for the table, its figure and the record (JSON)")] = None,
) -> None:
    """Correlation with true spikes, numbers of spikes, intervals and timing, beside OASIS on the same traces."""
    from napari_calvae import benchmark as measure

    record = measure.study(data, model, only)
    if out is not None:
        measure.write_study(record, out)
    typer.echo(f"Model: {record['model']}.")
    show(measure.summary_rows(record))
    show(measure.other_rows(record))


@benchmark.command()
def adaptation(
    data: Data,
    model: ModelOrFolder = "universal",
    only: Only = "",
    gain_scale: GainScale = None,
) -> None:
    """What adapting to each data set without its spikes gains."""
    from napari_calvae import benchmark as measure

    sweeps = measure.read_ground_truth(data, only=only)
    show(measure.adaptation_rows(_models(model, gain_scale), sweeps), summary="mean")


@benchmark.command()
def amplitude(
    data: Data,
    model: ModelOrFolder = "universal",
    only: Only = "",
    gain_scale: GainScale = None,
    spread: Annotated[float | None, typer.Option(min=0.01, max=3, help="How much cells are taken to differ")] = None,
) -> None:
    """What it is worth to know the amplitude that is typical of the other cells of each data set."""
    from napari_calvae import benchmark as measure

    sweeps = measure.read_ground_truth(data, only=only)
    models = _models(model, gain_scale)
    show(measure.amplitude_rows(models, sweeps, spread))


@benchmark.command()
def kernels(
    data: Data,
) -> None:
    """When fluorescence follows a spike, data set by data set."""
    from napari_calvae import benchmark as measure

    show(measure.kernel_rows(list(measure.read_ground_truth(data, min_duration=2.0))))


@benchmark.command()
def ablation(
    data: Data,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the record (JSON)")],
    steps: Annotated[int, typer.Option(min=1, help="Updates of each variant")] = 2500,
    fold: Annotated[int, typer.Option(min=1, max=5, help="Fold to leave out")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of every random number")] = 0,
) -> None:
    """Train the universal model's variants for a short time, and score them on the data sets of a fold left out."""
    from napari_calvae import benchmark as measure
    from napari_calvae.pretrained.train import Recipe

    sweeps = list(measure.read_ground_truth(data, min_duration=2.0))
    show(measure.ablation_rows(sweeps, out, Recipe(n_steps=steps, seed=seed), fold))


@benchmark.command("movie")
def movie_accuracy(
    movie: Annotated[Path, typer.Argument(help="Movie (.tif)")],
    rois: Annotated[Path, typer.Argument(help="Label image")],
    spikes: Annotated[Path, typer.Argument(help="True spikes: .npz with spike_times_<ROI id> (s)")],
    sigma: Annotated[float, typer.Option(help="Width of the smoothing (s)")] = 0.05,
) -> None:
    """Correlation with true spikes, per cell of a movie."""
    from napari_calvae import benchmark as measure
    from napari_calvae.formats import read_labels, read_spikes
    from napari_calvae.recording import RecordingError

    known = read_spikes(spikes)
    missing = [roi for roi in sorted(set(read_labels(rois).ravel().tolist()) - {0}) if roi not in known]
    if missing:
        raise RecordingError(
            f"{spikes.name}: expected spike_times_<ROI id> (s) of every ROI in {rois.name}, got none of ROI "
            f"{missing[0]}. Give the spikes of that movie, without spikes as an empty array."
        )
    show(measure.movie(movie, rois, spikes, sigma=sigma), summary="median")


@benchmark.command()
def speed(
    parts: Annotated[
        list[str] | None, typer.Argument(help="trace, rois, growth, machine, latency, fit; or all")
    ] = None,
    *,
    model: Model = "universal",
    frames: Annotated[int, typer.Option(min=100, help="Length of the single trace")] = 54_000,
    rois: Annotated[int, typer.Option(min=1, help="ROIs of the recording")] = 1000,
    roi_frames: Annotated[int, typer.Option(min=100, help="Frames of the recording")] = 10_000,
    repeats: Annotated[int, typer.Option(min=1, help="The median of so many runs is shown")] = 5,
    out: Annotated[Path | None, typer.Option(help="Folder for the record (JSON) and its table")] = None,
) -> None:
    """Seconds per trace and per ROI beside OASIS, how they grow, waiting times, and the share of the machine's peak."""
    from napari_calvae.benchmark.speed import Size, iter_speed

    show(iter_speed(Size(frames, rois, roi_frames, repeats), model, out, parts or ()))


@benchmark.command()
def live(
    data: Data,
    model: Annotated[str, typer.Option(help="Causal model, or a folder of those that leave out a fold each")] = "live",
    whole: Annotated[str, typer.Option(help="The same of the model that sees whole traces")] = "universal",
    only: Only = "",
    out: Annotated[Path | None, typer.Option(help="Folder for the record (JSON) and its table")] = None,
) -> None:
    """Correlation with true spikes while a recording is going on, for every lag, beside that of whole traces."""
    from napari_calvae import benchmark as measure
    from napari_calvae.benchmark.live import iter_live, write_live

    sweeps = measure.read_ground_truth(data, only=only)
    rows = list(iter_live(sweeps, model, whole))
    if out is not None:
        chosen = f" --only {only}" if only else ""
        models = f"--model {Path(model).name} --whole {Path(whole).name}"
        write_live(rows, out, f"calvae benchmark live --data {data.name} {models}{chosen}")
    show([{name: value for name, value in row.items() if name != "cells"} for row in rows], summary="mean")


@benchmark.command()
def extraction(
    gigabytes: Annotated[float, typer.Option(min=0.01, max=1e6, help="Size of the movie (10⁹ bytes)")] = 10.0,
    rois: Annotated[int, typer.Option(min=1, help="ROIs on a grid, with a neuropil ring each")] = 200,
    folder: Annotated[Path | None, typer.Option(help="Where the movie is written and removed again")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the record (JSON) and its table")] = None,
) -> None:
    """Speed of extraction from TIFF, HDF5 and Zarr beside that of the disk, its memory, and rivals."""
    from napari_calvae.benchmark.extraction import extraction as measure
    from napari_calvae.benchmark.extraction import write_extraction

    record = measure(gigabytes, rois, folder)
    if out is not None:
        write_extraction(record, out)
    show(record["rows"])


@benchmark.command()
def paper(
    proofs: Annotated[list[str] | None, typer.Argument(help="Proofs to run, by name; all without")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of ground truth, for those on real recordings")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the records and the report")] = Path("paper"),
    seed: Annotated[int, typer.Option(min=0, help="Of every random number")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Only see that it runs: the numbers mean nothing")] = False,
) -> None:
    """Repeat the experiments of the paper and of its neighbours."""
    from napari_calvae.benchmark import paper as proof
    from napari_calvae.formats import whole_files

    unknown = sorted(set(proofs or ()) - set(proof.PROOFS))
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(proof.PROOFS)}, got {', '.join(unknown)}.")
    setting = proof.Setting(cache=out / "cache", data=data, seed=seed, quick=quick)
    for name in proofs or proof.PROOFS:
        typer.echo(proof.PROOFS[name].title)
        show(proof.run(proof.PROOFS[name], setting, out))
    with whole_files(out / "README.md") as (temporary,):
        temporary.write_text(proof.to_markdown(proof.PROOFS, proof.read_records(out)), encoding="utf-8")


@benchmark.command()
def click(
    frames: Annotated[int, typer.Option(min=300, help="Length of the movie")] = 54_000,
    clicks: Annotated[int, typer.Option(min=1, max=36, help="ROIs to click, each for the first time")] = 30,
) -> None:
    """Milliseconds from a mouse click in napari to the painted posterior, of cursor and zoom; needs a display."""
    from napari_calvae._napari.latency import iter_latency

    show(iter_latency(frames, clicks))


@benchmark.command()
def batch(  # noqa: PLR0913 - every option is a word of the documented command line
    parts: Annotated[list[str] | None, typer.Argument(help="cluster, large; both without")] = None,
    *,
    folder: Annotated[Path, typer.Option(help="Where the recordings are written; some 30 GB at the sizes below")],
    rois: Annotated[int, typer.Option(min=1, help="ROIs of the large recording")] = 20_000,
    frames: Annotated[int, typer.Option(min=100, help="Frames of the recordings")] = 20_000,
    samples: Annotated[int, typer.Option(min=0, help="Spike trains per ROI")] = 10,
    kills: Annotated[int, typer.Option(min=0, help="How often the process is killed")] = 10,
    cluster_rois: Annotated[int, typer.Option(min=40, help="ROIs of the recording for the cluster")] = 800,
    seed: Annotated[int, typer.Option(min=0, help="Of every random number")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the record (JSON) and its table")] = None,
) -> None:
    """Inference out of core: memory, what kills cost and change, what a Dask cluster costs and gives."""
    from napari_calvae.benchmark.batch import Size, iter_batch_rows

    size = Size(rois, frames, samples, kills, cluster_rois)
    show(iter_batch_rows(folder, size, out, seed, parts or ("cluster", "large")))


def _models(source: str, gain_scale: float | None) -> Any:
    """Models by data set, with another gain scale than their own if one is given."""
    from napari_calvae import benchmark as measure

    models = measure.Models(source)
    if gain_scale is not None:
        for network in models.networks.values():
            network.set_gain_scale(gain_scale)
    return models
