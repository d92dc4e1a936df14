"""Extraction of traces from a movie larger than memory: its speed beside that of the disk, its memory, and rivals.

Everything that is measured runs in a process of its own, which is this file as a script: so that its memory is its own,
and PyTorch is not in it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.formats import read_movie, whole_files
from napari_calvae.preprocess import extract
from napari_calvae.recording import RecordingError
from napari_calvae.roi_masks import RoiMasks

#: Pixels along each side of the movie and diameter of its ROIs; frames per second; bytes that are read at a time to
#: measure the disk.
_SIDE, _DIAMETER, _RATE, _READ = 512, 12, 30.0, 8 << 20
#: How many times shorter the movie is on which rivals are run.
_SHORTER = 10
_FORMATS = ("tiff", "hdf5", "zarr")
_METHODS = ("calvae", "numpy loop", "suite2p")


def extraction(
    gigabytes: float = 10.0, n_rois: int = 200, folder: Path | None = None, formats: Sequence[str] = _FORMATS
) -> dict[str, Any]:
    """Generate a movie in each format in turn, extract its traces, remove it again; gives the record.

    Parameters
    ----------
    gigabytes
        Size of the movie (10⁹ bytes).
    n_rois
        ROIs on a grid, with a neuropil ring each.
    folder
        Where the movie is written; by default the system's folder for temporary files. Its disk is what is measured.
    formats
        Some of ``tiff``, ``hdf5``, ``zarr``.
    """
    n_frames = max(round(gigabytes * 1e9 / (2 * _SIDE**2)), 64)
    where = Path(folder or tempfile.gettempdir())
    needed = 2.2 * _SIDE**2 * n_frames
    if shutil.disk_usage(where).free < needed:
        raise RecordingError(f"{where}: expected {needed / 1e9:.1f} GB free, got less. Choose another folder.")
    rows = [row for name in formats for row in _measure(name, _METHODS[:1], n_frames, n_rois, where)]
    # Rivals read arrays, whatever the format, and take long: one, and a part of the frames, will do.
    rows += _measure("tiff", _METHODS, max(n_frames // _SHORTER, 64), n_rois, where)
    return {
        "made_by": "calvae benchmark extraction",
        "frames": n_frames,
        "pixels": [_SIDE, _SIDE],
        "dtype": "uint16",
        "rois": n_rois,
        "caches dropped before each measurement": hasattr(os, "posix_fadvise"),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "rows": rows,
    }


def _measure(name: str, methods: Sequence[str], n_frames: int, n_rois: int, where: Path) -> list[dict[str, Any]]:
    """Generate a movie, run methods on it, remove it; gives a row for each."""
    rows = []
    size = 2 * _SIDE**2 * n_frames
    with tempfile.TemporaryDirectory(dir=where, prefix="calvae-extraction-") as scratch:
        movie = _GENERATORS[name](Path(scratch), n_frames)
        files = sorted(path for path in [movie, *movie.rglob("*")] if path.is_file())
        for method in methods:
            before = _disk_speed(files)
            _forget(files)
            found = _in_a_process(method, movie, n_rois, Path(scratch))
            if found is None:
                continue
            disk = max(before, _disk_speed(files))
            speed = size / found["seconds"] / 1e6
            rows.append(
                {
                    "format": name,
                    "method": method,
                    "GB": size / 1e9,
                    "disk (MB/s)": disk,
                    "extraction (MB/s)": speed,
                    "extraction / disk": speed / disk,
                    "peak memory (MB)": found["peak"],
                    "largest difference from calvae": found["difference"],
                }
            )
    return rows


def write_extraction(record: Mapping[str, Any], out: Path) -> None:
    """Write ``extraction.json`` and ``extraction.md`` into a folder."""
    from napari_calvae.benchmark.paper.record import to_table

    out.mkdir(parents=True, exist_ok=True)
    dropped = record["caches dropped before each measurement"]
    text = f"""# Speed of extraction

Made by `calvae benchmark extraction`; do not edit by hand. {record["frames"]} frames of {record["pixels"][0]} ×
{record["pixels"][1]} pixels, {record["dtype"]}, uncompressed; {record["rois"]} ROIs with a neuropil ring each;
{record["cores"]} cores; {record["system"]}. MB are 10⁶ bytes. File caches were
{"dropped (posix_fadvise) before each measurement; those of a host or a drive cannot be" if dropped else "not dropped"}.
The disk's speed is that of reading the same files from beginning to end, {_READ >> 20} MiB at a time in one thread: the
faster of a run before and one after each extraction. Peak memory is that of the whole process, the libraries included.

{to_table(record["rows"])}
"""
    with whole_files(out / "extraction.json", out / "extraction.md") as (data, table):
        data.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        table.write_text(text, encoding="utf-8")


def _blocks(n_frames: int) -> Iterator[np.ndarray]:
    """Noise around a mean that changes, in blocks of 64 frames."""
    noise = np.random.default_rng(0).poisson(400, (64, _SIDE, _SIDE)).astype(np.uint16)
    for start in range(0, n_frames, 64):
        yield noise[: n_frames - start] + np.uint16(start // 64 % 97)


def _tiff(folder: Path, n_frames: int) -> Path:
    import tifffile

    shape = (n_frames, _SIDE, _SIDE)
    frames = (frame for block in _blocks(n_frames) for frame in block)
    file = folder / "movie.tif"
    tifffile.imwrite(
        file,
        frames,
        bigtiff=True,
        shape=shape,
        dtype=np.uint16,
        photometric="minisblack",
        metadata={"frame_rate": _RATE},
    )
    return file


def _hdf5(folder: Path, n_frames: int) -> Path:
    import h5py

    with h5py.File(folder / "movie.h5", "w") as file:
        movie = file.create_dataset("mov", (n_frames, _SIDE, _SIDE), np.uint16, chunks=(16, _SIDE, _SIDE))
        movie.attrs["frame_rate"] = _RATE
        for i, block in enumerate(_blocks(n_frames)):
            movie[64 * i : 64 * i + len(block)] = block
    return folder / "movie.h5"


def _zarr(folder: Path, n_frames: int) -> Path:
    import zarr

    movie = zarr.create_array(
        str(folder / "movie.zarr"),
        shape=(n_frames, _SIDE, _SIDE),
        dtype=np.uint16,
        chunks=(32, _SIDE, _SIDE),
        compressors=None,
        attributes={"frame_rate": _RATE},
    )
    for i, block in enumerate(_blocks(n_frames)):
        movie[64 * i : 64 * i + len(block)] = block
    return folder / "movie.zarr"


_GENERATORS: dict[str, Callable[[Path, int], Path]] = {"tiff": _tiff, "hdf5": _hdf5, "zarr": _zarr}


def _forget(files: Sequence[Path]) -> None:
    """Drop files from the system's cache, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        for file in files:
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _disk_speed(files: Sequence[Path]) -> float:
    """Speed (MB/s) of reading files one after the other."""
    _forget(files)
    buffer, size = bytearray(_READ), 0
    start = time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as opened:
            while n := opened.readinto(buffer):
                size += n
    return size / (time.perf_counter() - start) / 1e6


def _in_a_process(method: str, movie: Path, n_rois: int, folder: Path) -> dict[str, float] | None:
    """Run a method on a movie in a process of its own; None if it is not installed."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", __file__, method, str(movie), str(n_rois), str(folder)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RecordingError(f"{method}: expected traces, got {(done.stderr or 'nothing').strip().splitlines()[-1]}.")
    return json.loads(done.stdout.splitlines()[-1])


def _child(method: str, movie: str, n_rois: int, folder: Path) -> dict[str, float] | None:
    """Extract traces; gives the seconds, the peak memory (MB) and how far they are from those of calvae."""
    side = int(np.ceil(np.sqrt(n_rois)))
    centres = (np.arange(side) + 0.5) * _SIDE / side
    rois = RoiMasks.from_discs([(y, x) for y in centres for x in centres][:n_rois], _DIAMETER, (_SIDE, _SIDE))
    task = {"calvae": _ours, "numpy loop": _loop, "suite2p": _suite2p}[method]
    try:  # what a method needs is imported before its time begins
        for name in (
            "dask.array",
            "h5py",
            "tifffile",
            "zarr",
            *(["suite2p.extraction.extract"] * (method == "suite2p")),
        ):
            importlib.import_module(name)
    except ImportError:
        return None
    start = time.perf_counter()
    values = task(movie, rois)
    seconds = time.perf_counter() - start
    if method == "calvae":
        np.save(folder / "calvae.npy", values)
    difference = np.abs(values - np.load(folder / "calvae.npy")).max()
    return {"seconds": seconds, "peak": _peak_memory(), "difference": float(difference)}


def _ours(path: str, rois: RoiMasks) -> np.ndarray:
    movie, rate = read_movie(path)
    return extract(movie, rois, rate).values  # type: ignore[arg-type]


def _masks(rois: RoiMasks) -> list[np.ndarray]:
    """Flat pixels of each ROI, then of each ring."""
    from napari_calvae._extraction import _rings

    return [*rois.pixels, *_rings(rois, rois)]


def _corrected(inside: np.ndarray, around: np.ndarray) -> np.ndarray:
    """Traces as ``extract`` defines them, of the means of ROIs and rings (roi, time)."""
    return inside - 0.7 * (around - np.median(around, axis=1, keepdims=True))


def _loop(path: str, rois: RoiMasks) -> np.ndarray:
    """Frame by frame, ROI by ROI, the mean of the pixels."""
    movie, _ = read_movie(path)
    masks = _masks(rois)
    means = np.empty((len(masks), len(movie)))
    for t in range(len(movie)):
        frame = np.asarray(movie[t]).ravel()
        for i, pixels in enumerate(masks):
            means[i, t] = frame[pixels].mean()
    return _corrected(*np.split(means, 2))


def _suite2p(path: str, rois: RoiMasks) -> np.ndarray:
    """What suite2p's function makes of the same masks and the memory-mapped movie, on the CPU."""
    import torch
    from suite2p.extraction.extract import extract_traces

    movie, _ = read_movie(path)
    cells = [(pixels, weights / weights.sum()) for pixels, weights in zip(rois.pixels, rois.weights, strict=True)]
    device = {"device": torch.device("cpu")} if "device" in inspect.signature(extract_traces).parameters else {}
    return _corrected(*extract_traces(movie, cells, _masks(rois)[len(rois) :], **device)[:2])


def _peak_memory() -> float:
    """Most memory (MB) that this process has held."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6
    except (OSError, StopIteration):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_child(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))))
