"""Damaged files, thousands of them, read one after the other in a process of their own.

``python tests/fuzzing.py READER FIRST LAST`` prints what goes wrong: an exception that is none of ours, more than five
seconds, more than a gigabyte, or, where it prints no line for the last number, the end of the process.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

import napari_calvae as calvae
from napari_calvae.formats._pickles import load_dicts
from napari_calvae.formats.movies import read_labels, read_movie

#: Limits of one file: seconds, and bytes beyond what the process had before.
SECONDS, BYTES = 5, 10**9


def small() -> calvae.Traces:
    values = 100 + np.random.default_rng(0).normal(size=(3, 90)).cumsum(1)
    labels = np.zeros((8, 9), int)
    labels[1:3, 1:3], labels[4:6, 2:4], labels[6:8, 6:9] = 1, 2, 3
    rois = calvae.RoiMasks.from_labels(labels)
    return calvae.Traces(values, 30.0, unit="raw", rois=rois, accepted=np.array([True, False, True]))


def result() -> calvae.SpikeInference:
    from test_recording import a_result

    return a_result()


def written(name: str, value: Callable[[], Any] = small) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        calvae.write(value(), folder / name)
        return folder / name

    return make


def numbers(folder: Path) -> Path:
    np.save(folder / "a.npy", small().values)
    return folder / "a.npy"


def frames(folder: Path) -> Path:
    np.save(folder / "movie.npy", np.random.default_rng(0).integers(0, 500, (12, 16, 18)).astype(np.uint16))
    return folder / "movie.npy"


def suite2p(folder: Path, version: str = "0.10") -> Path:
    from test_formats_suite2p import a_plane

    return a_plane(folder / "plane0", version=version)


def caiman(folder: Path) -> Path:
    from test_formats_caiman import a_file

    return a_file(folder / "a.hdf5")


def movie(folder: Path, suffix: str) -> Path:
    frames = np.random.default_rng(0).integers(0, 500, (12, 16, 18)).astype(np.uint16)
    path = folder / f"movie{suffix}"
    if suffix == ".tif":
        import tifffile

        tifffile.imwrite(path, frames, compression="zlib", imagej=True, metadata={"axes": "TYX", "finterval": 0.1})
    elif suffix == ".h5":
        import h5py

        with h5py.File(path, "w") as file:
            file.create_dataset("mov", data=frames, chunks=(4, 16, 18), compression="gzip")
    else:
        import zarr

        zarr.save_array(path, frames)
    return path


def image(folder: Path) -> Path:
    import tifffile

    tifffile.imwrite(folder / "rois.tif", small().rois.to_labels().astype(np.uint16))
    return folder / "rois.tif"


def spikes(folder: Path) -> Path:
    np.savez(folder / "spikes.npz", spike_times_1=np.arange(5.0), spike_times_2=np.arange(3.0))
    return folder / "spikes.npz"


def pulses(folder: Path) -> Path:
    (folder / "pulses.csv").write_text("onset;duration;x;y\n1;0.1;9;2\n2;0.1;4;3\n")
    return folder / "pulses.csv"


def model(folder: Path) -> Path:
    """A small one: what a forger could gain is in the header, not in the weights."""
    from napari_calvae.generative import MODELS, SpikePrior
    from napari_calvae.recognition import NETWORKS
    from napari_calvae.vae import SpikeVAE

    network = NETWORKS["factorized"](widths=(4, 6), max_count=3, gain_scale=1.5)
    vae = SpikeVAE(network, MODELS["linear_ar"](), SpikePrior(rate=0.7, max_count=3), theta={"tau_decay": 0.4})
    return vae.save(folder / "model.safetensors")


def dicts(folder: Path) -> Path:
    """A dictionary as suite2p keeps it, with everything that is let through."""
    import datetime

    value = {
        "fs": 15.0, "text": "a", "array": np.arange(3), "texts": np.array(["a", None], object), "path": Path("a/b"),
        "date": datetime.datetime(2021, 5, 6, tzinfo=datetime.UTC), "set": {1, 2}, "number": np.float32(3),
        "slice": slice(1, 2), "complex": 1j, "list": [(1, 2), {"a": b"c"}],
    }  # fmt: skip
    np.save(folder / "ops.npy", np.array(value, object), allow_pickle=True)
    return folder / "ops.npy"


def bruker(folder: Path) -> Path:
    from test_movies import a_bruker_folder

    images = np.random.default_rng(0).integers(0, 500, (4, 6, 7)).astype(np.uint16)
    return a_bruker_folder(folder / "series", [[[image] for image in images]])


def video(folder: Path) -> Path:
    from test_movies import GREY, a_video

    return a_video(folder / "movie.avi", GREY, "rawvideo", "gray")


def growing_pages(folder: Path, bigtiff: bool) -> Path:
    import tifffile

    with tifffile.TiffWriter(folder / "growing.tif", bigtiff=bigtiff) as file:
        for image in np.random.default_rng(0).integers(0, 500, (4, 6, 7)).astype(np.uint16):
            file.write(image, contiguous=False, metadata=None)
    return folder / "growing.tif"


def look_at_movie(path: Path) -> None:
    found, _ = read_movie(path)
    np.asarray(found)


def look_at_growing(path: Path) -> None:
    found = calvae.open_growing(path)
    found.read(0, found.poll())


def look_at_result(path: Path) -> None:
    calvae.open_result(path).load()


def look_at_traces(path: Path) -> None:
    calvae.read(path, frame_rate=30.0)


def plain(folder: Path) -> Path:
    (folder / "file").write_bytes(bytes(100))
    return folder / "file"


def trouble(path: Path) -> None:
    """Everything that must not happen, once each; for the test of this survey."""
    number = trouble.calls - 1  # the first call is that on the intact file
    trouble.calls += 1
    if number == 0:
        raise ZeroDivisionError
    if number == 1:
        time.sleep(2 * SECONDS)
    if number == 2:
        np.ones(4 * BYTES, np.uint8)
    if number == 3:
        os._exit(7)


trouble.calls = 0


#: Per reader: how an intact file comes about, and how it is read.
READERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "npy": (numbers, look_at_traces),
    "npz": (written("a.npz"), look_at_traces),
    "csv": (written("a.csv"), look_at_traces),
    "mat": (written("a.mat"), look_at_traces),
    "h5": (written("a.h5"), look_at_traces),
    "parquet": (written("a.parquet"), look_at_traces),
    "nwb": (written("a.nwb"), look_at_traces),
    "zarr": (written("a.zarr"), look_at_traces),
    "result": (written("result.zarr", result), look_at_result),
    "suite2p": (suite2p, look_at_traces),
    "suite2p 1.1": (lambda folder: suite2p(folder, "1.1"), look_at_traces),
    "dicts": (dicts, load_dicts),
    "caiman": (caiman, look_at_traces),
    "movie.tif": (lambda folder: movie(folder, ".tif"), look_at_movie),
    "movie.h5": (lambda folder: movie(folder, ".h5"), look_at_movie),
    "movie.zarr": (lambda folder: movie(folder, ".zarr"), look_at_movie),
    "movie.npy": (frames, look_at_movie),
    "movie.avi": (video, look_at_movie),
    "bruker": (bruker, look_at_movie),
    "growing.tif": (lambda folder: growing_pages(folder, False), look_at_growing),
    "growing big.tif": (lambda folder: growing_pages(folder, True), look_at_growing),
    "growing.zarr": (lambda folder: movie(folder, ".zarr"), look_at_growing),
    "labels": (image, read_labels),
    "spikes": (spikes, calvae.read_spikes),
    "pulses": (pulses, calvae.read_stimulation),
    "model": (model, lambda path: calvae.SpikeVAE.load(path)),
}


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with some of its bytes changed, moved, doubled or lost."""
    found = np.frombuffer(data, np.uint8).copy()
    for _ in range(int(rng.choice([1, 1, 1, 2, 4, 16]))):
        n = len(found)
        if not n:
            break
        # Headers are short, and are where the harm is.
        place = int(rng.integers(min(n, 512))) if rng.random() < 0.5 else int(rng.integers(n))
        length = int(rng.integers(1, max(2, min(64, n - place))))
        kind = rng.integers(8)
        if kind == 0:
            found[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            found[place] = rng.integers(256)
        elif kind == 2:
            found = found[:place]
        elif kind == 3:
            found[place : place + length] = rng.integers(0, 256, len(found[place : place + length]))
        elif kind == 4:
            found = np.delete(found, slice(place, place + length))
        elif kind == 5:
            found = np.insert(found, place, found[place : place + length])
        elif kind == 6:
            value = rng.choice([0, 255, 127, 128])
            found[place : place + length] = value
        else:
            digits = np.flatnonzero((found >= 48) & (found <= 57))
            if len(digits):  # shapes, sizes and counts in text
                found[rng.choice(digits)] = rng.integers(48, 58)
    return found.tobytes()


def refusals(name: str) -> tuple[type[Exception], ...]:
    """What a reader may raise."""
    if name == "model":
        from napari_calvae.vae import ModelError

        return (ModelError,)
    return calvae.RecordingError, FileNotFoundError, FileExistsError


def attempt(name: str, first: int, last: int, say: Callable[[dict[str, Any]], None]) -> None:
    """Read damaged files of one kind, by number, and say what goes wrong."""
    warnings.simplefilter("ignore")
    make, read = READERS.get(name, (plain, trouble))
    errors = refusals(name)
    with tempfile.TemporaryDirectory() as place:
        whole = make(Path(place))
        read(whole)
        files = sorted(p for p in ([whole] if whole.is_file() else whole.rglob("*")) if p.is_file())
        intact = {path: path.read_bytes() for path in files}
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (now + BYTES, most))

        def too_long(*_: object) -> None:
            raise TimeoutError("took too long")

        signal.signal(signal.SIGALRM, too_long)
        for number in range(first, last):
            rng = np.random.default_rng([number, *name.encode()])
            path = files[int(rng.integers(len(files)))]
            path.write_bytes(damage(intact[path], rng))
            say({"number": number, "file": path.name})
            signal.alarm(SECONDS)
            try:
                read(whole)
            except errors:
                pass
            except BaseException as error:  # noqa: BLE001 - whatever it is, it should have been one of ours
                say({"number": number, "file": path.name, "error": f"{type(error).__name__}: {error}"[:300]})
            finally:
                signal.alarm(0)
                path.write_bytes(intact[path])
        say({"number": last})


def survey(name: str, first: int, last: int) -> list[str]:
    """What went wrong, in words, in a process that is begun anew where it ended."""
    found: list[str] = []
    context = multiprocessing.get_context("spawn")
    while first < last:
        queue = context.SimpleQueue()
        child = context.Process(target=attempt, args=(name, first, last, queue.put))
        child.start()
        at: dict[str, Any] = {"number": first}
        while True:
            while queue.empty() and child.is_alive():
                child.join(0.02)
            if queue.empty():
                break
            at = queue.get()
            if "error" in at:
                found.append(f"{name} {at['number']} ({at['file']}): {at['error']}")
        child.join()
        if at["number"] != last:
            found.append(f"{name} {at['number']}: the process ended ({child.exitcode})")
        first = at["number"] + 1
    return found


if __name__ == "__main__":
    reader, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps(survey(reader, start, stop), indent=1))  # noqa: T201
