"""Speed, always beside a rival on the same traces in the same run, and beside what the machine can do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from napari_calvae.benchmark.ground_truth import oasis_method
from napari_calvae.benchmark.records import Row, iter_record, row
from napari_calvae.fitting import fit
from napari_calvae.inference import infer
from napari_calvae.live import stream
from napari_calvae.recording import Traces
from napari_calvae.simulation import simulate
from napari_calvae.vae import SpikeVAE, load_model

FRAME_RATE = 30.0
#: Traces of which a rival's speed is measured; it infers one after the other, whatever their number.
_RIVALS = 50
#: Sizes relative to the usual one at which cost is measured to see how it grows.
_GROWTH = (0.25, 0.5, 1.0, 2.0)

_PAGE = """# Speed

Simulated traces at 30 Hz. *One core* is one thread, for ours and for OASIS, which estimates its parameters from each
trace as users let it. *Inference* is what `calvae.infer` does: ΔF/F, network, samples, parameters of the cell,
reconstruction with its spread, quality; *mean rate* is the network alone, as OASIS gives spikes alone."""


@dataclass(frozen=True)
class Size:
    """How much to infer: frames of the single trace, ROIs and frames of the recording, repeats of each measurement."""

    frames: int = 54_000
    rois: int = 1000
    roi_frames: int = 10_000
    repeats: int = 5


def iter_speed(
    size: Size, model: str = "universal", out: Path | None = None, parts: Sequence[str] = ()
) -> Iterator[Row]:
    """Rows of the table, as they are measured, of some ``parts`` or all; the record goes into ``out``."""

    def made_by(part: str) -> str:
        return (
            f"calvae benchmark speed {part} --model {model} --frames {size.frames} --rois {size.rois} "
            f"--roi-frames {size.roi_frames} --repeats {size.repeats}"
        )

    measured = {name: partial(part, size, model) for name, part in PARTS.items()}
    yield from iter_record(measured, parts or tuple(PARTS), ("speed", _PAGE), made_by, out)


def _trace(size: Size, model: str) -> Iterator[Row]:
    """One long trace on one core."""
    traces = recording(1, size.frames)
    vae = load_model(model)
    seen = torch.from_numpy(traces.values.copy())

    def mean_rate() -> None:
        with torch.inference_mode():
            _ = vae.recognition(seen, FRAME_RATE).mean

    tasks: dict[str, Callable[[], object]] = {
        "mean rate": mean_rate,
        "inference, 0 samples": lambda: infer(traces, vae, n_samples=0),
        "inference, 50 samples": lambda: infer(traces, vae, n_samples=50),
        **{f"OASIS AR{order}": partial(_rival, order, traces) for order in (1, 2)},
    }
    with cores(1):
        for name, task in tasks.items():
            seconds = median_seconds(task, size.repeats)
            yield row("one trace, one core", f"{name}, {size.frames} frames", seconds, "s")
            yield row("one trace, one core", f"{name}, trace-frames per second", size.frames / seconds, "1/s")


def _rois(size: Size, model: str) -> Iterator[Row]:
    """Many traces on one core, and on all."""
    part = f"{size.rois} ROIs × {size.roi_frames} frames"
    traces = recording(size.rois, size.roi_frames)
    vae = load_model(model)
    infer(traces.select(range(min(4, size.rois))), vae)
    rivals = traces.select(range(min(_RIVALS, size.rois)))
    per_roi = {}
    with cores(1):
        for name, n_samples in (("mean", 0), ("mean and 90 % intervals, of 50 samples", 50)):
            per_roi[name] = seconds_of(partial(_with_intervals, traces, vae, n_samples)) / size.rois
            yield row(part, f"{name}, one core, per ROI", 1e3 * per_roi[name], "ms")
        for order in (1, 2):
            spent = median_seconds(partial(_rival, order, rivals), size.repeats) / rivals.n_rois
            yield row(part, f"OASIS AR{order}, one core, per ROI", 1e3 * spent, "ms")
            for name, own in per_roi.items():
                yield row(part, f"speed against OASIS AR{order}: {name}", spent / own, "×")
    if (n_cores := os.cpu_count() or 1) > 1:
        with cores(2):
            both = seconds_of(partial(_with_intervals, traces, vae, 50)) / size.rois
        yield row(part, f"two threads against one, {n_cores} cores", per_roi[name] / both, "×")


def _growth(size: Size, model: str) -> Iterator[Row]:
    """How cost grows: the slope of log time over log number, 1 where it is proportional."""
    vae = load_model(model)
    base = {"ROIs": max(size.rois // 20, 4), "frames": size.roi_frames, "samples": 50}
    infer(recording(2, size.roi_frames), vae)
    for name in base:
        spent = []
        for factor in _GROWTH:
            n = {**base, name: max(round(base[name] * factor), 1)}
            traces = recording(n["ROIs"], n["frames"])
            with cores(1):
                task = partial(infer, traces, vae, n_samples=n["samples"])
                spent.append(min(seconds_of(task) for _ in range(size.repeats)))
        slope = np.polyfit(np.log(_GROWTH), np.log(spent), 1)[0]
        yield row("growth", f"exponent of time over the number of {name}", float(slope))


def _machine(size: Size, model: str) -> Iterator[Row]:
    """What the network needs, beside what one core can do."""
    network = load_model(model).recognition
    seen = torch.randn(1, size.roi_frames)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(seen, FRAME_RATE)
    needed = counter.get_total_flops()
    a = torch.randn(1024, 1024)
    numbers = torch.randn(1 << 25)
    copied = torch.empty_like(numbers)
    with torch.inference_mode(), cores(1):
        peak = 2 * 1024**3 / min(seconds_of(lambda: a @ a) for _ in range(4 * size.repeats))
        copy = 8 * len(numbers) / min(seconds_of(lambda: copied.copy_(numbers)) for _ in range(2 * size.repeats))
        spent = min(seconds_of(lambda: network(seen, FRAME_RATE)) for _ in range(4 * size.repeats))
    yield row("machine", "peak of one core, product of 1024 × 1024 matrices", peak / 1e9, "GFLOP/s")
    if (os.cpu_count() or 1) > 1:
        with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool, cores(1):
            both = min(seconds_of(lambda: list(pool.map(a.matmul, [a] * 20))) for _ in range(size.repeats))
        yield row("machine", "two threads of such products against one", 20 * 2 * 1024**3 / peak / both, "×")
    yield row("machine", "bandwidth of one core, copying 128 MiB", copy / 1e9, "GB/s")
    yield row("machine", "the network needs, per frame", needed / size.roi_frames / 1e3, "kFLOP")
    yield row("machine", f"forward pass, {size.roi_frames} frames", 1e3 * spent, "ms")
    yield row("machine", "share of the peak that the forward pass reaches", 100 * needed / spent / peak, "%")


def _latency(size: Size, model: str) -> Iterator[Row]:
    """What one has to wait for a trace, and for a frame of a recording that is going on."""
    traces = recording(1, size.frames)
    vae = load_model(model)
    infer(traces, vae)
    waits = [1e3 * seconds_of(partial(infer, traces, vae, n_samples=50)) for _ in range(4 * size.repeats)]
    yield from _percentiles(f"a trace of {size.frames} frames with 50 samples, all cores", waits)
    values = recording(size.rois, 900).values
    with cores(1):
        live = stream(frame_rate=FRAME_RATE)
        live.push(values[:, :200])
        waits = [1e3 * seconds_of(partial(live.push, values[:, k])) for k in range(200, 900)]
    yield from _percentiles(f"a frame of {size.rois} ROIs that are recorded, one core", waits)


def _fit(size: Size, model: str) -> Iterator[Row]:
    """Fitting the model to a recording of fifty cells, ten minutes long, on all cores."""
    n_rois = min(50, size.rois)
    traces = recording(n_rois, min(round(600 * FRAME_RATE), size.frames))
    spent = seconds_of(partial(fit, traces, base=model))
    yield row("fit", f"{n_rois} cells, {traces.duration / 60:.3g} min, by default settings", spent, "s")


#: What can be measured by itself.
PARTS: dict[str, Callable[[Size, str], Iterator[Row]]] = {
    "trace": _trace,
    "rois": _rois,
    "growth": _growth,
    "machine": _machine,
    "latency": _latency,
    "fit": _fit,
}


def recording(n_rois: int, n_frames: int, seed: int = 0) -> Traces:
    """Simulated traces."""
    return simulate(n_rois, n_frames / FRAME_RATE, FRAME_RATE, seed=seed).traces


@contextmanager
def cores(n: int) -> Iterator[None]:
    """Let torch use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_of(task: Callable[[], object]) -> float:
    """How long a task takes."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def median_seconds(task: Callable[[], object], repeats: int) -> float:
    """How long a task takes that has been done before."""
    task()
    return float(np.median([seconds_of(task) for _ in range(repeats)]))


def _with_intervals(traces: Traces, vae: SpikeVAE, n_samples: int) -> None:
    found = infer(traces, vae, n_samples=n_samples)
    if n_samples:
        found.interval(0.9, 1.0)


def _rival(order: int, traces: Traces) -> None:
    for values in traces.values:
        oasis_method(order)(values, FRAME_RATE)


def _percentiles(what: str, waits: Sequence[float]) -> Iterator[Row]:
    for share in (50, 90, 99):
        yield row("latency", f"{what}: {share} of 100 come within", float(np.percentile(waits, share)), "ms")
