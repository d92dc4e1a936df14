"""Inference out of core: block of ROIs by block of ROIs into a Zarr store, here or on a Dask cluster.

A block that is in the store is never inferred again, so that work goes on where it stopped, for whatever reason. Blocks
come out the same, byte by byte, wherever and in whatever order they are inferred.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout

from napari_calvae.formats import open_traces
from napari_calvae.formats._files import check_apart, check_output, plain
from napari_calvae.formats.store import Layout, StoredInference, create_store, rois_per_block
from napari_calvae.inference.blocks import InferConfig, iter_infer, pick_device, provenance_of
from napari_calvae.inference.cluster import check_main_script, connected
from napari_calvae.preprocess import with_signal
from napari_calvae.recording import EVENT_DTYPE, RecordingError, SpikeInference, Traces
from napari_calvae.trace_source import TraceSource
from napari_calvae.vae import SpikeVAE, shared_model

#: ROIs whose unit is looked at before any work.
_LOOKED_AT = 50
#: Seconds after which a cluster that is silent is reported, too.
_HEARTBEAT = 1.0


@dataclass(frozen=True)
class Progress:
    """How far a batch has come.

    Parameters
    ----------
    done, total
        ROIs.
    seconds_left
        At the pace of this run so far; None before there is one.
    dashboard
        Address of the cluster's dashboard, if there is one.
    """

    done: int
    total: int
    seconds_left: float | None = None
    dashboard: str = ""

    @property
    def fraction(self) -> float:
        """Share of the ROIs that is there."""
        return self.done / self.total


def iter_batch(
    traces: Traces | TraceSource | str | Path,
    out: str | Path,
    model: str | Path | SpikeVAE = "universal",
    *,
    scheduler: str | None = None,
    block_rois: int | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Generator[Progress, None, StoredInference]:
    """Infer any number of ROIs into a store; stop consuming it to stop, start it again to go on.

    Parameters
    ----------
    traces
        A file or folder of traces, traces opened with ``open_traces``, or traces in memory. ROIs without data or
        without any change get NaN, and so do raw ones whose baseline is not above 0, and numbers beyond 1e15.
    out
        Folder to write (``.zarr``). If it is there and was begun with the same traces, model and settings, what is
        missing in it is inferred.
    model
        Name of a shipped model, a file, or a ``SpikeVAE``.
    scheduler
        Where to compute: by default in this process; ``"local"`` or ``"local:N"``, N processes of this machine
        (in a script only below ``if __name__ == "__main__":``, since each reads the script anew);
        ``"tcp://HOST:PORT"``, a Dask scheduler that runs there, whose workers see ``traces`` and ``out`` under the same
        names; ``"slurm"``, ``"pbs"``, ``"lsf"``, ``"sge"`` or ``"slurm:N"``, N jobs of a queue, which are laid out in
        the configuration of dask-jobqueue.
    block_rois
        ROIs that are inferred, written and, after a crash, redone together; by default sixteen blocks or more, of some
        seconds of work each.
    overwrite
        Replace what is there.
    **settings
        Fields of ``InferConfig``, as in ``infer``.

    Yields
    ------
    Progress
        Whenever a block has been written, and on a cluster every second, so that one can stop before there are workers.

    Returns
    -------
    StoredInference
        Results, read from the store ROI by ROI.

    Raises
    ------
    RecordingError
        If traces cannot be read, or another run is writing ``out``.
    OSError
        If ``out`` holds results of something else, or cannot be written; blocks that were written stay.
    """
    if block_rois is not None and block_rois < 1:
        raise RecordingError(f"block_rois: expected 1 or more ROIs, got {block_rois}.")
    if isinstance(traces, str | Path):
        check_apart([Path(out)], Path(traces))
    if scheduler is not None:
        check_main_script()
    source = _source(traces)
    config = InferConfig(**settings)
    if scheduler is None:  # workers elsewhere have devices of their own
        pick_device(config.device)
    vae = shared_model(model, coupled=False)
    provenance = provenance_of(vae, source, config)
    where = Path(out).expanduser().absolute()
    with _owned(where):
        store = _begin(where, source, vae, config, (provenance, block_rois, overwrite))
        computing = model if isinstance(model, SpikeVAE) else str(model)
        yield from _iter_blocks(source, (vae, computing), config, store, scheduler)
    return store


@contextmanager
def _owned(out: Path) -> Iterator[None]:
    """Keep other processes from writing the same store; the lock ends with this process, however that ends."""
    there = next(parent for parent in out.parents if parent.is_dir())
    lock = FileLock(there / f".{out.name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RecordingError(
            f"{out.name}: expected a store that nothing else writes, got one that another run is writing now. Wait "
            "until it has ended, or choose another name."
        ) from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _iter_blocks(
    source: TraceSource,
    models: tuple[SpikeVAE, str | SpikeVAE],
    config: InferConfig,
    store: StoredInference,
    scheduler: str | None,
) -> Iterator[Progress]:
    """Infer what is missing in a store, here with the first of the ``models``, on a cluster with the second."""
    vae, named = models
    todo = np.flatnonzero(~store.done).tolist()
    there, begun = store.n_rois - _n_rois(store, todo), time.monotonic()
    yield Progress(there, store.n_rois)
    finished = there
    blocks = (
        _here(source, vae, config, store, todo)
        if scheduler is None
        else _elsewhere(source, named, config, store, todo, scheduler)
    )
    for block, dashboard in blocks:
        left = None
        if block is not None:
            finished += _n_rois(store, [block])
        if finished > there:
            left = (time.monotonic() - begun) / (finished - there) * (store.n_rois - finished)
        yield Progress(finished, store.n_rois, left, dashboard)
    store.tidy()


def _source(traces: Traces | TraceSource | str | Path) -> TraceSource:
    if isinstance(traces, TraceSource):
        return traces
    return open_traces(traces) if isinstance(traces, str | Path) else TraceSource.of(traces)


def _n_rois(store: StoredInference, blocks: list[int]) -> int:
    return sum(rows.stop - rows.start for rows in map(store.rows, blocks))


def _begin(
    out: Path, source: TraceSource, vae: SpikeVAE, config: InferConfig, wishes: tuple[dict[str, Any], int | None, bool]
) -> StoredInference:
    """A store for these results: the one that is there, if it was begun for them, or a new one."""
    provenance, block_rois, overwrite = wishes
    if out.exists() and not overwrite:
        store = StoredInference(out)
        differing = _differences(store.about["provenance"]["inference"], plain(provenance))
        if differing:
            raise FileExistsError(
                f"{out.name}: expected results of the same traces, model and settings, to go on with, got others: "
                f"{'; '.join(differing)}. Choose another name or say overwrite (--overwrite)."
            )
        store.tidy()
        return store
    check_output(out, overwrite, folder=True)
    _check_unit(source, vae)
    # What the model says of a cell is known from a second of noise, before anything has been inferred.
    noise = np.random.default_rng(0).standard_normal((1, min(source.n_frames, max(64, round(2 * source.frame_rate)))))
    probe = Traces(0.1 * noise, source.frame_rate, "dff")
    (example,) = iter_infer(probe, vae, **config.model_dump() | {"n_samples": 0})
    layout = Layout(config.n_samples, example.quality.dtype.names or (), tuple(example.theta), tuple(example.theta_std))
    rows = block_rois or rois_per_block(source.n_frames, source.chunk_rows, source.n_rois)
    return create_store(out, source, layout, provenance, min(rows, source.n_rois))


def _check_unit(source: TraceSource, vae: SpikeVAE) -> None:
    """Refuse raw traces most of which have no baseline above 0, of some spread evenly: that is no accident of a few."""
    rows = np.unique(np.linspace(0, source.n_rois - 1, min(source.n_rois, _LOOKED_AT)).round().astype(int))
    some = source.select(rows)
    if (alive := with_signal(some)).any() and vae.preprocessing.usable(some.select(alive)).mean() < 0.5:
        vae.preprocessing.apply(some.select(alive))  # says what is wrong


def _differences(there: Any, wanted: Any, name: str = "") -> list[str]:
    """What differs between two JSON-like values, in words; where it is computed, and by which Python, may."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        keys = [key for key in {**there, **wanted} if key not in ("device", "python")]
        return [text for key in keys for text in _differences(there.get(key), wanted.get(key), key)]
    return [] if there == wanted else [f"{name} {there} instead of {wanted}"]


def _here(
    source: TraceSource, vae: SpikeVAE, config: InferConfig, store: StoredInference, todo: list[int]
) -> Iterator[tuple[int | None, str]]:
    """Infer in this process; one block is written while the next is inferred."""
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1) as writer:
        for place, block in enumerate(todo):
            result = infer_rows(source.part(store.rows(block)).load(), vae, config, store.layout)
            if pending is not None:
                pending.result()
                yield todo[place - 1], ""
            pending = writer.submit(store.write_block, block, result)
        if pending is not None:
            pending.result()
            yield todo[-1], ""


def _elsewhere(
    source: TraceSource,
    model: str | SpikeVAE,
    config: InferConfig,
    store: StoredInference,
    todo: list[int],
    scheduler: str,
) -> Iterator[tuple[int | None, str]]:
    """Infer on the workers of a Dask cluster, a block per task; what a lost worker had in hand another one does.

    Yields the blocks as they are done, None when nothing has happened for a while, and the address of the dashboard.
    """
    with connected(scheduler, len(todo)) as client:
        yield None, client.dashboard_link
        futures = [
            client.submit(_run, source.part(store.rows(block)), model, config, str(store.path), block, pure=False)
            for block in todo
        ]
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for future in futures:
            future.add_done_callback(done.put)
        try:
            missing = len(futures)
            while missing:
                try:
                    future = done.get(timeout=_HEARTBEAT)
                except queue.Empty:
                    yield None, client.dashboard_link
                    continue
                missing -= 1
                yield future.result(), client.dashboard_link
                future.release()
        finally:
            client.cancel(futures)


def _run(part: TraceSource, model: str | SpikeVAE, config: InferConfig, out: str, block: int) -> int:
    """Infer and write one block, on a worker."""
    torch.set_num_threads(1)
    # Opened anew: a worker outlives a run, and the next one may lay out another store under the same name.
    store, vae = StoredInference(out), shared_model(model, coupled=False)
    store.write_block(block, infer_rows(part.load(), vae, config, store.layout))
    return block


def infer_rows(traces: Traces, vae: SpikeVAE, config: InferConfig, layout: Layout) -> SpikeInference:
    """Infer the rows from which spikes can be; the others are left NaN, for one of thousands must not stop all."""
    rows = np.flatnonzero(vae.preprocessing.usable(traces))
    found = (
        [SpikeInference.concatenate(list(iter_infer(traces.select(rows), vae, **config.model_dump())))]
        if len(rows)
        else []
    )
    if len(rows) == traces.n_rois:
        return found[0]

    def spread(name: str) -> np.ndarray:
        full = np.full(traces.values.shape, np.nan, np.float32)
        for result in found:
            full[rows] = result.traces.values if name == "dff" else getattr(result, name)
        return full

    def per_roi(group: str, name: str) -> np.ndarray:
        full = np.full(traces.n_rois, np.nan, np.float32)
        for result in found:
            full[rows] = getattr(result, group)[name]
        return full

    events = np.concatenate([np.empty(0, EVENT_DTYPE), *(result.events for result in found)])
    events["roi"] = rows[events["roi"]] if len(rows) else events["roi"]
    quality = np.zeros(traces.n_rois, [(name, "f4") for name in layout.quality])
    for name in layout.quality:
        quality[name] = per_roi("quality", name)
    return SpikeInference(
        traces=traces.replace(values=spread("dff"), unit="dff"),
        events=events,
        n_samples=config.n_samples,
        theta={name: per_roi("theta", name) for name in layout.theta},
        theta_std={name: per_roi("theta_std", name) for name in layout.theta_std},
        quality=quality,
        provenance={},
        **{name: spread(name) for name in ("rate", "reconstruction", "reconstruction_std")},
    )
