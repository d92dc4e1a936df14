"""Extraction from movies larger than memory: each chunk read once, the same traces whatever the way, little memory."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter

import dask.array as da
import h5py
import numpy as np
import pytest
import tifffile
import zarr
from test_preprocess import plain_extract
from typer.testing import CliRunner

from napari_calvae import _extraction, _reading
from napari_calvae.benchmark import extraction as benchmark
from napari_calvae.cli import app
from napari_calvae.formats import read_movie
from napari_calvae.preprocess import extract, iter_extract
from napari_calvae.recording import RecordingError
from napari_calvae.roi_masks import RoiMasks

SIZE = (48, 64)
ROIS = RoiMasks.from_discs([(y, x) for y in (8, 24, 40) for x in (8, 24, 40, 56)], 7, SIZE)
MOVIE = np.random.default_rng(0).integers(100, 4000, (130, *SIZE)).astype(np.uint16)
WHOLE = extract(MOVIE, ROIS, 30.0).values


class Counting:
    """An array in chunks of (time, y, x), as lengths, that notes which of them are read, and by which thread."""

    ndim = 3

    def __init__(self, array, chunks=None):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype
        self.sizes = chunks or (1, *array.shape[1:])
        if chunks is not None:
            self.chunks = chunks
        self.read: Counter = Counter()
        self.threads: set[str] = set()

    def __getitem__(self, key):
        self.threads.add(threading.current_thread().name)
        spans = [range(part.start // size, -(-part.stop // size)) for part, size in zip(key, self.sizes, strict=True)]
        self.read.update((t, y, x) for t in spans[0] for y in spans[1] for x in spans[2])
        return self.array[key]


CHUNKS = [None, (1, 48, 64), (7, 48, 64), (40, 48, 64), (7, 16, 20), (130, 16, 20), (130, 48, 64), (64, 5, 64)]


@pytest.mark.parametrize("chunks", CHUNKS)
@pytest.mark.parametrize("frames", [3, 25, 1000])
@pytest.mark.parametrize("kind", ["zarr", "dask"])
def test_each_chunk_is_read_once_and_no_block_is_larger_than_it_must_be(chunks, frames, kind, monkeypatch):
    n_bytes = frames * 2 * SIZE[0] * SIZE[1]
    monkeypatch.setattr(_extraction, "READ_BYTES", n_bytes)
    movie = source = Counting(MOVIE, chunks)
    if kind == "dask":
        movie = da.from_array(source, chunks=chunks or (1, *SIZE), asarray=False, name=False)
    blocks = []
    add = _extraction._Means.add
    monkeypatch.setattr(
        _extraction._Means,
        "add",
        lambda self, piece, block, w: blocks.append(block.nbytes) or add(self, piece, block, w),
    )
    values = extract(movie, ROIS, 30.0).values
    np.testing.assert_allclose(values, WHOLE, rtol=2e-6)
    if chunks is None or chunks[1:] == SIZE:
        np.testing.assert_array_equal(values, WHOLE)  # nothing is added up in another order
    assert set(source.read.values()) == {1}
    assert len(source.read) == np.prod([-(-n // m) for n, m in zip(MOVIE.shape, source.sizes, strict=True)])
    largest = 2 * np.prod(source.sizes)
    assert max(blocks) <= max(2 * n_bytes, largest * 4)  # a row of chunks with less than that left in x
    if len(blocks) > 1 and kind == "zarr":
        assert threading.current_thread().name not in source.threads


@pytest.mark.parametrize(("frame_pixels", "n_workers"), [(0, 1), (0, 3), (1 << 30, 1)])
@pytest.mark.parametrize("read_bytes", [1, 50_000])
@pytest.mark.parametrize("dtype", ["u2", ">u2", "f4", "f8", "u1", "i4", "?"])
def test_traces_do_not_depend_on_how_they_are_computed(frame_pixels, n_workers, read_bytes, dtype, monkeypatch):
    movie = (MOVIE[:40] % 200).astype(dtype)
    expected = extract(movie, ROIS, 30.0).values
    for name, value in {"FRAME_PIXELS": frame_pixels, "N_WORKERS": n_workers, "READ_BYTES": read_bytes}.items():
        monkeypatch.setattr(_extraction, name, value)
    np.testing.assert_array_equal(extract(movie, ROIS, 30.0).values, expected)
    np.testing.assert_allclose(expected, plain_extract(movie, ROIS, 0.7), rtol=4e-6, atol=1e-5)


@pytest.mark.parametrize("n_rois", [2, 12])
@pytest.mark.parametrize("chunks", [(130, 48, 64), (130, 10, 13)])
def test_missing_pixels_in_movies_that_are_cut_in_space(n_rois, chunks, monkeypatch):
    rois = ROIS.select(range(n_rois))
    movie = MOVIE.astype(np.float32)
    movie[10, 8, 8] = np.nan  # in ROI 1
    movie[20] = np.nan
    movie[30:40, 12:20, 12:20] = np.nan  # in rings
    movie[50, 8, 24] = np.inf
    monkeypatch.setattr(_extraction, "READ_BYTES", 1)
    values = extract(Counting(movie, chunks), rois, 30.0).values
    means = {}
    for roi, pixels, ring in zip(rois.ids, rois.pixels, _extraction._rings(rois, rois), strict=True):
        flat = movie.reshape(len(movie), -1).astype(float)
        flat[~np.isfinite(flat)] = np.nan
        with np.testing.suppress_warnings() as quiet:
            quiet.filter(RuntimeWarning)
            around = np.nanmean(flat[:, ring], axis=1)
        means[roi] = flat[:, pixels].mean(axis=1) - 0.7 * (around - np.nanmedian(around))
    np.testing.assert_allclose(values, np.array([means[roi] for roi in rois.ids]), rtol=1e-5)
    assert np.isnan(values[:, 20]).all()


def test_few_rois_of_a_movie_in_small_tiles(monkeypatch):
    monkeypatch.setattr(_extraction, "READ_BYTES", 1)
    source = Counting(MOVIE, (130, 16, 20))
    values = extract(source, ROIS, 30.0, wanted=(1, 12)).values
    np.testing.assert_allclose(values, WHOLE[[0, 11]], rtol=2e-6)
    assert set(source.read.values()) == {1}
    corner = Counting(MOVIE, (130, 4, 4))
    extract(corner, ROIS, 30.0, neuropil_coefficient=0, wanted=(1,))
    assert set(corner.read) == {(0, y, x) for y in (1, 2) for x in (1, 2)}  # the others stay in the file


@pytest.mark.parametrize("kind", ["plain.tif", "packed.tif", "a.npy", "plain.h5", "packed.h5", "a.zarr"])
def test_traces_from_files(tmp_path, kind, monkeypatch):
    path = tmp_path / kind
    if kind == "packed.tif":
        tifffile.imwrite(path, MOVIE, photometric="minisblack", compression="zlib")
    elif kind == "plain.tif":
        tifffile.imwrite(path, MOVIE, photometric="minisblack", bigtiff=True)
    elif kind == "a.npy":
        np.save(path, MOVIE)
    elif kind == "a.zarr":
        zarr.create_array(str(path), data=MOVIE, chunks=(9, 20, 64), shards=(18, 40, 64))
    else:
        packing = {} if kind == "plain.h5" else {"chunks": (9, 20, 64), "compression": "gzip"}
        with h5py.File(path, "w") as file:
            file.create_dataset("mov", data=MOVIE, **packing)
    monkeypatch.setattr(_extraction, "READ_BYTES", 100_000)
    monkeypatch.setattr(_reading, "MAPPED_BYTES", 200_000)
    movie, _ = read_movie(path)
    np.testing.assert_array_equal(extract(movie, ROIS, 30.0).values, WHOLE)


def test_what_was_written_to_a_private_copy_of_a_file_is_not_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(_reading, "MAPPED_BYTES", 1)
    np.save(tmp_path / "a.npy", MOVIE)
    movie = np.load(tmp_path / "a.npy", mmap_mode="c")
    movie[:] += 1
    np.testing.assert_allclose(extract(movie, ROIS, 30.0).values, WHOLE + 1, rtol=3e-6)
    np.testing.assert_array_equal(movie, MOVIE + 1)


def test_errors_of_reading_ahead_arrive_and_cancelling_stops_it(monkeypatch):
    monkeypatch.setattr(_extraction, "READ_BYTES", 1)

    class Broken(Counting):
        def __getitem__(self, key):
            if key[0].start >= 20:
                raise RecordingError("frame 20 cannot be read")
            return super().__getitem__(key)

    with pytest.raises(RecordingError, match="frame 20 cannot be read"):
        extract(Broken(MOVIE), ROIS, 30.0)
    source = Counting(MOVIE)
    steps = iter_extract(source, ROIS, 30.0)
    for _ in range(5):
        next(steps)
    steps.close()
    assert len(source.read) <= 5 + _reading.N_READERS + 1  # those that were used, and those ahead
    assert not [t for t in threading.enumerate() if t.name.startswith("movie")]


_PEAK = """
import sys, numpy as np
from napari_calvae.formats import read_movie
from napari_calvae.preprocess import extract
from napari_calvae.roi_masks import RoiMasks
import dask.array
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = kilobytes("VmRSS")
movie, _ = read_movie(sys.argv[1])
rois = RoiMasks.from_discs([(y, x) for y in (20, 60, 100) for x in range(20, 240, 20)], 9, (256, 256))
extract(movie, rois, 30.0)
print((kilobytes("VmHWM") - before) * 1024, movie.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for its memory")
@pytest.mark.parametrize("kind", ["tif", "h5", "zarr"])
def test_memory_stays_below_that_of_the_movie(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    shape, block = (2500, 256, 256), np.arange(50 * 65536, dtype=np.uint16).reshape(50, 256, 256)
    if kind == "tif":
        with tifffile.TiffWriter(path) as writer:
            frames = (image for _ in range(50) for image in block)
            writer.write(frames, shape=shape, dtype=np.uint16, photometric="minisblack")
    elif kind == "h5":
        with h5py.File(path, "w") as file:
            dataset = file.create_dataset("mov", shape, np.uint16, chunks=(50, 64, 256))
            for start in range(0, 2500, 50):
                dataset[start : start + 50] = block
    else:
        array = zarr.create_array(str(path), shape=shape, dtype=np.uint16, chunks=(50, 256, 256), compressors=None)
        for start in range(0, 2500, 50):
            array[start : start + 50] = block
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    peak, size = (int(word) for word in done.stdout.split())
    assert size == 327_680_000
    assert peak < 250e6


def test_the_benchmark_measures_and_writes(tmp_path, monkeypatch):
    # Six processes take long; one is started below.
    monkeypatch.setattr(
        benchmark, "_in_a_process", lambda method, movie, *rest: benchmark._child(method, str(movie), *rest)
    )
    command = ["benchmark", "extraction", "--gigabytes", "0.03", "--rois", "9", "--folder", str(tmp_path)]
    done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "extraction.json").read_text(encoding="utf-8"))
    rows = {(row["format"], row["method"]): row for row in record["rows"]}
    assert {("tiff", "calvae"), ("hdf5", "calvae"), ("zarr", "calvae"), ("tiff", "numpy loop")} <= set(rows)
    for row in rows.values():
        assert min(row["disk (MB/s)"], row["extraction (MB/s)"], row["peak memory (MB)"]) > 0
        assert row["largest difference from calvae"] < 0.01
    text = (tmp_path / "out" / "extraction.md").read_text(encoding="utf-8")
    assert "| tiff | numpy loop |" in text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # the movies are gone


def test_what_is_measured_runs_in_a_process_without_torch(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((64, 512, 512), np.uint16))
    with pytest.raises(RecordingError, match=r"calvae: expected traces, got .*frame_rate: expected"):
        benchmark._in_a_process("calvae", tmp_path / "a.npy", 4, tmp_path)
    tifffile.imwrite(tmp_path / "a.tif", np.ones((64, 512, 512), np.uint16), metadata={"frame_rate": 30.0})
    found = benchmark._in_a_process("calvae", tmp_path / "a.tif", 4, tmp_path)
    assert found is not None
    assert found["difference"] == 0
    assert 0 < found["seconds"] < 60
    assert 30 < found["peak"] < 300  # PyTorch alone would need as much


def test_the_benchmark_needs_room(tmp_path):
    with pytest.raises(RecordingError, match=r"expected .* GB free, got less"):
        benchmark.extraction(1e6, folder=tmp_path)
