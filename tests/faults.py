"""Processes that are killed at random instants, and disks that fill up: what is left is whole or absent, never wrong.

``python tests/faults.py WORK KILLS`` forks a child per kill, which therefore has torch imported already, and prints how
often it was killed in the middle and what was wrong afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

import napari_calvae as calvae
from napari_calvae.fitting import fit
from napari_calvae.formats import write_movie
from napari_calvae.generative import MODELS, SpikePrior
from napari_calvae.recognition import FactorizedNetwork
from napari_calvae.training import TrainConfig, iter_train, load_optimizer

#: Formats that are written over an earlier file.
SUFFIXES = (".npz", ".h5", ".csv", ".parquet", ".nwb", ".zarr")


def traces(n_rois: int = 8, seconds: float = 20.0) -> calvae.Traces:
    return calvae.simulate(n_rois, seconds, 30.0, rate=1.0, seed=0).traces


def digest(path: Path) -> str:
    """Of all bytes of a file or folder, with their names in it."""
    found = hashlib.sha256()
    for file in sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()):
        found.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return found.hexdigest()


class Kills:
    """Runs a task again and again in children that are killed at a random instant, and keeps count."""

    def __init__(self, n: int, seed: int = 0) -> None:
        self.left, self.done, self.rng = n, 0, np.random.default_rng(seed)

    def each(self, task: Callable[[], object]) -> Iterator[bool]:
        """Whether the child came to its end, once for every child."""
        begun = time.perf_counter()
        _in_child(task, None)
        usual = time.perf_counter() - begun
        yield True
        while self.left > 0:
            finished = _in_child(task, self.rng.uniform(0, 1.1 * usual))
            self.left -= not finished
            self.done += not finished
            yield finished


def _in_child(task: Callable[[], object], kill_after: float | None) -> bool:
    child = os.fork()
    if not child:
        status = 1
        try:
            task()
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the child failed with {code}")
    return code == 0


def infer(work: Path, kills: Kills) -> Iterator[str]:
    """Into a store: blocks that are marked are right, and a run that goes on ends with the same bytes."""
    seen, out, whole = traces(), work / "killed.zarr", work / "whole.zarr"
    settings = {"n_samples": 3, "block_rois": 1, "device": "cpu"}
    expected = calvae.infer(seen, out=whole, **settings).load()
    right = digest(whole)
    for finished in kills.each(lambda: calvae.infer(seen, out=out, **settings)):
        if finished:
            if digest(out) != right:
                yield "a store that was resumed differs"
            calvae.infer(seen, out=out, overwrite=True, n_samples=0, device="cpu")  # another one, to be replaced
            _remove(out)
        elif out.exists():
            store = calvae.open_result(out)
            rows = np.flatnonzero(np.repeat(store.done, store.block_rois)[: store.n_rois])
            if len(rows) and not np.array_equal(store.select(rows).rate, expected.rate[rows]):
                yield "a block that is marked as done is wrong"


def export(work: Path, kills: Kills) -> Iterator[str]:
    """Over an earlier file: it is the old one or the new one."""
    old, new = (calvae.infer(traces(3, s), n_samples=5, device="cpu") for s in (10.0, 20.0))
    share = kills.left // len(SUFFIXES)
    rest = kills.left - share * len(SUFFIXES)
    for suffix in SUFFIXES:
        path = work / f"result{suffix}"

        def write(path: Path = path) -> None:
            calvae.write(new, path, overwrite=True)

        kills.left = share
        for _ in kills.each(write):
            n_frames = _frames(path)
            if n_frames not in (old.traces.n_frames, new.traces.n_frames):
                yield f"{suffix}: neither the old file nor the new one"
            calvae.write(old, path, overwrite=True)
    kills.left = rest


def _frames(path: Path) -> int:
    if path.suffix == ".zarr":
        return calvae.open_result(path).n_frames
    if path.suffix in (".csv", ".parquet"):
        import pandas as pd

        table = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
        return table["frame"].nunique()
    return calvae.read(path).n_frames


def train(work: Path, kills: Kills) -> Iterator[str]:
    """A fit that resumes from its checkpoint ends with the same weights; the model file is whole or absent."""
    torch.manual_seed(0)
    network = FactorizedNetwork(widths=(4, 6), max_count=3)
    base = calvae.SpikeVAE(network, MODELS["linear_ar"](), SpikePrior(rate=1.0, max_count=3))
    config = TrainConfig(n_steps=12, window=128, batch=2, checkpoint_every=2)
    seen, checkpoint, out = traces(4, 10.0), work / "fit", work / "model.safetensors"

    def run(checkpoint: Path | None = checkpoint) -> None:
        fit(seen, base, "elbo", config=config, checkpoint=checkpoint).save(out)

    run(None)
    right = out.read_bytes()
    out.unlink()
    for finished in kills.each(run):
        if out.exists() and out.read_bytes() != right:
            yield "a model that was resumed, or its file, differs"
        if finished:
            for path in work.iterdir():
                _remove(path)


def full_disk(tiny: Path) -> Iterator[str]:
    """On a file system that fills up: an error that says so, earlier blocks intact, the rest when there is room."""
    seen = traces(12, 60.0)
    room = tiny / "ballast"
    settings = {"n_samples": 20, "block_rois": 1, "device": "cpu"}
    right = digest_of_store(seen, settings)
    free = os.statvfs(tiny).f_bavail * os.statvfs(tiny).f_frsize
    for left in (1_000, 60_000, 200_000, 400_000):
        room.write_bytes(bytes(max(0, free - left)))
        out = tiny / "result.zarr"
        try:
            calvae.infer(seen, out=out, **settings)
            yield f"{left} bytes were enough"
        except OSError as error:
            if "space" not in str(error).lower():
                yield f"the error does not say what is the matter: {error}"
        if out.exists():
            store = calvae.open_result(out)
            rows = np.flatnonzero(store.done)
            if len(rows):
                store.select(rows)
        room.unlink()
        calvae.infer(seen, out=out, **settings)
        if digest(out) != right:
            yield f"after {left} bytes and more room: another result"
        _remove(out)


def little_memory(place: Path) -> Iterator[str]:
    """Where memory runs out between two blocks: an error that says so, the first block intact, the rest when it may."""
    seen, out = traces(3, 6_000.0), place / "result.zarr"
    settings = {"n_samples": 50, "block_rois": 1, "device": "cpu"}
    right = digest_of_store(seen, settings)
    steps = calvae.iter_batch(seen, out, **settings)
    for step in steps:
        if step.done:
            break
    used = int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_DATA, (used + 20_000_000, resource.RLIM_INFINITY))
    try:
        list(steps)
        yield "20 MB were enough"
    except MemoryError as error:
        if not str(error).startswith("memory: expected enough for ROI ") or "results that are written stay" not in str(
            error
        ):
            yield f"the error does not say what is the matter: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if not calvae.open_result(out).done.any():
        yield "nothing was kept"
    calvae.infer(seen, out=out, **settings)
    if digest(out) != right:
        yield "with more memory, another result"


def short_files(place: Path) -> Iterator[str]:
    """Where a file may not grow beyond some size, as on a disk that is full: an error, and all that was there before.

    The limit is the operating system's, so that whatever a library does in C fails as well.
    """
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for name, write in _writers().items():
        folder = place / name
        folder.mkdir()
        write(folder / name, 0)
        write(folder / name, 1)
        longest = max(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        _remove(folder)
        folder.mkdir()
        write(folder / name, 0)
        before = digest(folder)
        for limit in np.unique(np.linspace(0, longest - 1, 12).astype(int)).tolist():
            with _no_longer_than(limit):
                try:
                    write(folder / name, 1)
                    yield f"{name}: written although no file may be longer than {limit} bytes"
                except OSError:
                    pass
            if digest(folder) != before:
                yield f"{name}: something else than before after a file could not be longer than {limit} bytes"
                return
        write(folder / name, 1)  # when there is room


def _writers() -> dict[str, Callable[[Path, int], object]]:
    """All that writes files, each with a small and a larger version of what it writes."""
    results = [calvae.infer(traces(3, seconds), n_samples=5, device="cpu") for seconds in (10.0, 20.0)]
    movies = [np.random.default_rng(0).integers(0, 4000, (n, 16, 16)).astype(np.uint16) for n in (10, 30)]
    networks = [FactorizedNetwork(widths=widths, max_count=3) for widths in ((4, 6), (8, 12))]
    models = [calvae.SpikeVAE(network, MODELS["linear_ar"](), SpikePrior(1.0, max_count=3)) for network in networks]
    names = [f"a{suffix}" for suffix in (*SUFFIXES, ".mat")] + ["spks.npy"]

    def append(path: Path, version: int) -> None:
        calvae.write(results[1] if version else results[1].traces, path, append=bool(version))

    def train(path: Path, version: int) -> None:
        network, config = networks[0], TrainConfig(n_steps=1 + version)
        list(iter_train(network, lambda _: (sum(p.square().sum() for p in network.parameters()), {}), config, path))

    return {name: lambda path, k: calvae.write(results[k], path, overwrite=True) for name in names} | {
        "added.nwb": append,
        "movie.tif": lambda path, k: write_movie(movies[k], path, 30.0, overwrite=True),
        "model.safetensors": lambda path, k: models[k].save(path),
        "checkpoint": train,
    }


@contextmanager
def _no_longer_than(n_bytes: int) -> Iterator[None]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def digest_of_store(seen: calvae.Traces, settings: dict[str, object]) -> str:
    with tempfile.TemporaryDirectory() as place:
        calvae.infer(seen, out=Path(place) / "result.zarr", **settings)
        return digest(Path(place) / "result.zarr")


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


WORK = {"infer": infer, "export": export, "train": train}
FAULTS = {"full_disk": full_disk, "short_files": short_files, "little_memory": little_memory}


def survey(name: str, n_kills: int) -> tuple[int, list[str]]:
    """How often a child was killed in the middle, and what was wrong."""
    torch.set_num_threads(1)
    load_optimizer()
    kills = Kills(n_kills)
    with tempfile.TemporaryDirectory() as place:
        wrong = list(WORK[name](Path(place), kills))
    return kills.done, wrong


if __name__ == "__main__":
    if sys.argv[1] in FAULTS:
        print(json.dumps([0, list(FAULTS[sys.argv[1]](Path(sys.argv[2])))]))  # noqa: T201
    else:
        print(json.dumps(survey(sys.argv[1], int(sys.argv[2]))))  # noqa: T201
