"""Inference out of core: memory, what kills cost and change, and what a Dask cluster costs and gives."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import dask
import numpy as np

from napari_calvae.benchmark.records import Row, iter_record, row
from napari_calvae.formats.store import create_traces, rois_per_block
from napari_calvae.inference import iter_batch
from napari_calvae.inference.cluster import SETTINGS
from napari_calvae.simulation import simulate
from napari_calvae.trace_source import TraceSource

FRAME_RATE = 30.0
#: Different traces that are simulated; the others are these with noise of their own.
_SIMULATED = 200


@dataclass(frozen=True)
class Size:
    """How much to infer.

    ``rois`` and ``frames`` are those of the large recording, ``cluster_rois`` of the one for the cluster; ``kills`` is
    how often the process is killed at a random instant, ``samples`` how many spike trains are drawn per ROI.
    """

    rois: int = 20_000
    frames: int = 20_000
    samples: int = 10
    kills: int = 10
    cluster_rois: int = 800


def iter_batch_rows(
    folder: Path, size: Size, out: Path | None = None, seed: int = 0, parts: Sequence[str] = ("cluster", "large")
) -> Iterator[Row]:
    """Rows of the table, as they are measured, of some ``parts``.

    Recordings and results go into ``folder`` and are removed. The record goes into ``out``, where that of the parts
    which are not measured now stays.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def made_by(part: str) -> str:
        return (
            f"calvae benchmark batch {part} --rois {size.rois} --frames {size.frames} --samples {size.samples} "
            f"--kills {size.kills} --cluster-rois {size.cluster_rois} --seed {seed}"
        )

    with tempfile.TemporaryDirectory(dir=folder, prefix="calvae-batch-") as work:
        measured = {name: partial(part, Path(work), size, seed) for name, part in _PARTS.items()}
        yield from iter_record(measured, parts, ("batch", _PAGE), made_by, out)


def _large(work: Path, size: Size, seed: int) -> Iterator[Row]:
    """The large recording: inferred undisturbed, and killed again and again."""
    source = work / "large.zarr"
    write_recording(source, size.rois, size.frames, seed)
    yield row("recording written", f"{size.rois} × {size.frames} frames", _bytes(source) / 1e9, "GB")
    seconds, peak, _ = _child(source, work / "whole.zarr", size.samples)
    yield row("undisturbed", f"time, {size.samples} samples per ROI", seconds, "s")
    yield row("undisturbed", "trace-frames per second", size.rois * size.frames / seconds, "1/s")
    yield row("undisturbed", "peak memory", peak, "GB")
    yield row("undisturbed", "size of the store", _bytes(work / "whole.zarr") / 1e9, "GB")
    whole = digest(work / "whole.zarr")
    shutil.rmtree(work / "whole.zarr")
    rng = np.random.default_rng(seed)
    total, most, kills = 0.0, 0.0, 0
    for _ in range(size.kills):
        spent, peak, finished = _child(
            source, work / "killed.zarr", size.samples, kill_after=rng.uniform(0, 1) * seconds / (size.kills + 1)
        )
        total, most, kills = total + spent, max(most, peak), kills + (not finished)
    spent, peak, _ = _child(source, work / "killed.zarr", size.samples)
    yield row("killed", "kills at random instants, before it was finished", kills, "")
    yield row("killed", "time in all, against undisturbed", (total + spent) / seconds, "×")
    yield row("killed", "peak memory", max(most, peak), "GB")
    yield row("killed", "files and bytes as undisturbed", digest(work / "killed.zarr") == whole, "")


def _cluster(work: Path, size: Size, seed: int) -> Iterator[Row]:
    """A smaller recording here, on one worker, on two, and on two of which one is killed in the middle."""
    source = work / "cluster.zarr"
    write_recording(source, size.cluster_rois, size.frames, seed)
    rows = max(size.cluster_rois // 40, 1)
    begun = time.perf_counter()
    settings: dict[str, Any] = {"block_rois": rows, "device": "cpu"}
    for _ in iter_batch(source, work / "here.zarr", n_samples=size.samples, **settings):
        pass
    here = time.perf_counter() - begun
    yield row("cluster", f"this process, {size.cluster_rois} ROIs", here, "s")
    with _workers(1) as cluster:
        one = _seconds_on(cluster, source, work / "one", size.samples, settings)
    yield row("cluster", "one worker that is there", one, "s")
    with _workers(2) as cluster:
        two = _seconds_on(cluster, source, work / "two", size.samples, settings)
        yield row("cluster", "two workers that are there", two, "s")
        yield row("cluster", "throughput, two workers against one", one / two, "×")
        yield row("cluster", "throughput, two workers against this process", here / two, "×")
        settings["scheduler"] = cluster.scheduler_address
        lost = 0
        for number, _ in enumerate(iter_batch(source, work / "lost.zarr", n_samples=size.samples, **settings)):
            if number == 10:
                victim = next(iter(cluster.workers.values()))
                lost = victim.pid
                os.kill(lost, signal.SIGKILL)
    whole = digest(work / "here.zarr")
    same = digest(work / "two timed.zarr") == whole
    yield row("cluster", "files and bytes as in this process, two workers", same, "")
    if lost:
        same = digest(work / "lost.zarr") == whole
        yield row("cluster", "the same, one worker killed after ten of forty blocks", same, "")
    yield row("cluster", "overhead per block, one worker", 1e3 * _overhead(work, seed), "ms")


@contextmanager
def _workers(n: int) -> Iterator[Any]:
    """A cluster of so many processes on this machine."""
    from distributed import LocalCluster

    with dask.config.set(SETTINGS), LocalCluster(n_workers=n, threads_per_worker=1, dashboard_address=None) as cluster:
        yield cluster


def _seconds_on(cluster: Any, source: Path, out: Path, samples: int, settings: dict[str, Any]) -> float:
    """Seconds that a cluster takes to infer ``source``, after all of its workers have imported torch."""
    settings = {"scheduler": cluster.scheduler_address, **settings}
    for name, n_samples in (("warm", 0), ("timed", samples)):
        begun = time.perf_counter()
        for _ in iter_batch(source, out.with_name(f"{out.name} {name}.zarr"), n_samples=n_samples, **settings):
            pass
    return time.perf_counter() - begun


def _overhead(work: Path, seed: int, blocks: int = 60) -> float:
    """Seconds that a block costs more on one worker than in this process, for blocks of one short ROI."""
    source = work / "short.zarr"
    write_recording(source, blocks, 300, seed)
    spent = []
    with _workers(1) as cluster:
        for scheduler in (None, cluster.scheduler_address):
            for name in ("warm", "timed"):
                begun = time.perf_counter()
                out = work / f"short-{name}-{scheduler is None}.zarr"
                for _ in iter_batch(source, out, n_samples=0, block_rois=1, scheduler=scheduler, device="cpu"):
                    pass
                last = time.perf_counter() - begun
            spent.append(last)
    return (spent[1] - spent[0]) / blocks


def write_recording(path: Path, n_rois: int, n_frames: int, seed: int = 0) -> None:
    """Write simulated traces of any number as a Zarr store, a block at a time."""
    rng = np.random.default_rng(seed)
    known = simulate(min(n_rois, _SIMULATED), n_frames / FRAME_RATE, FRAME_RATE, seed=seed).traces.values
    noise = 0.5 * float(np.median(np.abs(np.diff(known))))
    rows = rois_per_block(n_frames)
    array = create_traces(path, TraceSource(known.__getitem__, n_rois, n_frames, FRAME_RATE))
    for start in range(0, n_rois, rows):
        stop = min(start + rows, n_rois)
        block = known[np.arange(start, stop) % len(known)]
        array[start:stop] = block + noise * rng.standard_normal(block.shape, dtype=np.float32)


def digest(path: Path) -> str:
    """SHA-256 of all files of a store: their names and their bytes."""
    found = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        found.update(file.relative_to(path).as_posix().encode())
        found.update(file.read_bytes())
    return found.hexdigest()


def _child(source: Path, out: Path, samples: int, kill_after: float | None = None) -> tuple[float, float, bool]:
    """Run ``calvae infer`` in a process of its own: seconds, peak memory (GB), and whether it came to its end."""
    code = "from napari_calvae.cli import app; app()"
    words: Sequence[str] = ("infer", str(source), "-o", str(out), "--samples", str(samples), "--device", "cpu")
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL, stderr=said)
        while True:
            ended, status, used = os.wait4(child.pid, os.WNOHANG)
            if ended:
                break
            if kill_after is not None and time.perf_counter() - begun > kill_after:
                child.send_signal(signal.SIGKILL)
                kill_after = None
            time.sleep(0.02)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode not in (0, -signal.SIGKILL):
            said.seek(0)
            raise RuntimeError(f"calvae infer failed: {said.read().decode()}")
    return time.perf_counter() - begun, used.ru_maxrss * 1024 / 1e9, child.returncode == 0


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


#: What can be measured by itself.
_PARTS = {"cluster": _cluster, "large": _large}

_PAGE = """# Inference out of core

Traces are simulated. The large recording is inferred by processes of its own (`calvae infer`), which SIGKILL ends at
random instants; the cluster is Dask's, on the same machine."""
