"""Movies that are still being written: a frame counts once it is complete, and what goes wrong is said plainly."""

from __future__ import annotations

import os
import pickle
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

import napari_calvae as calvae
from napari_calvae import RecordingError
from napari_calvae.formats import growing

MOVIE = np.random.default_rng(0).integers(1, 4000, (40, 16, 10)).astype(np.uint16)


def follow(movie: calvae.GrowingMovie, write, pieces) -> list[int]:
    """Write piece by piece; what is there after each is as it was written, to the last pixel."""
    counts = [movie.poll()]
    for piece in pieces:
        write(piece)
        movie.poll()  # some formats say so at the second look
        counts.append(movie.poll())
        np.testing.assert_array_equal(movie.read(counts[-2], counts[-1]), MOVIE[counts[-2] : counts[-1]])
    return counts


def an_array(path: Path, version: int, chunks: int, n_frames: int, **options):
    return zarr.create_array(
        str(path),
        shape=(n_frames, 16, 10),
        chunks=(chunks, 8, 10),
        dtype="u2",
        zarr_format=version,
        attributes={"frame_rate": 20.0},
        **options,
    )


def settle(folder: Path) -> None:
    """Let it look as if nobody had written for a while."""
    for file in folder.rglob("*"):
        os.utime(file, (time.time() - 5,) * 2)


# Zarr


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("chunks", [1, 4])
def test_a_zarr_that_is_resized(tmp_path, version, chunks):
    array = an_array(tmp_path / "a.zarr", version, chunks, 0)
    movie = calvae.open_growing(tmp_path / "a.zarr")
    assert (movie.image_shape, movie.dtype, movie.frame_rate) == ((16, 10), np.uint16, 20.0)
    counts = follow(movie, array.append, [MOVIE[:1], MOVIE[1:7], MOVIE[7:8], MOVIE[8:16], MOVIE[16:17]])
    assert counts == [0, 1, 7, 8, 16, 17]
    # One that was made longer, and not written yet.
    array.resize((20, 16, 10))
    movie.poll()
    assert movie.poll() == 17 if chunks == 1 else 20


@pytest.mark.parametrize("version", [2, 3])
def test_a_zarr_of_full_length_whose_frames_come_one_by_one(tmp_path, version):
    array = an_array(tmp_path / "a.zarr", version, 1, 12)
    counts = follow(calvae.open_growing(tmp_path / "a.zarr"), lambda k: array.__setitem__(k, MOVIE[k]), range(12))
    assert counts == list(range(13))


@pytest.mark.parametrize(("version", "options"), [(2, {}), (3, {}), (3, {"shards": (4, 16, 10)})])
def test_the_newest_chunk_of_full_length_counts_when_a_later_one_is_there(tmp_path, version, options):
    path = tmp_path / "a.zarr"
    array = an_array(path, version, 2 if options else 4, 12, **options)
    movie = calvae.open_growing(path)
    counts = follow(movie, lambda k: array.__setitem__(k, MOVIE[k]), range(12))
    assert counts == [0] * 5 + [4] * 4 + [8] * 4
    settle(path)
    assert movie.poll() == 12
    np.testing.assert_array_equal(movie.read(8, 12), MOVIE[8:12])


def test_a_chunk_of_zeros_that_is_never_written_is_passed(tmp_path):
    array = an_array(tmp_path / "a.zarr", 3, 1, 12)
    dark = MOVIE[:12].copy()
    dark[2], dark[:, :8] = 0, 0  # a frame, and half of all frames
    movie = calvae.open_growing(tmp_path / "a.zarr")
    array[:3] = dark[:3]
    assert movie.poll() == 1
    array[3:6] = dark[3:6]
    assert movie.poll() == 5
    np.testing.assert_array_equal(movie.read(0, 5), dark[:5])


def test_an_ome_zarr_and_an_array_in_a_group(tmp_path):
    group = zarr.create_group(str(tmp_path / "a.ome.zarr"))
    array = group.create_array("0", shape=(0, 1, 16, 10), chunks=(1, 1, 16, 10), dtype="u2")
    axes = [{"name": "t", "type": "time", "unit": "second"}, {"name": "c"}, {"name": "y"}, {"name": "x"}]
    scale = [{"type": "scale", "scale": [0.1, 1, 1, 1]}]
    about = {"axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [about]}
    movie = calvae.open_growing(tmp_path / "a.ome.zarr")
    assert movie.frame_rate == pytest.approx(10)
    assert follow(movie, lambda k: array.append(MOVIE[k : k + 1, None]), range(3)) == [0, 1, 2, 3]
    about["axes"] = [axes[1], axes[0], *axes[2:]]
    group.attrs["ome"] = {"version": "0.5", "multiscales": [about]}
    with pytest.raises(calvae.RecordingError, match="with time first"):
        calvae.open_growing(tmp_path / "a.ome.zarr")

    group = zarr.create_group(str(tmp_path / "b.zarr"), attributes={"fs": 30}, zarr_format=2)
    array = group.create_array("movie", shape=(0, 16, 10), chunks=(1, 16, 10), dtype="u2")
    zarr.consolidate_metadata(str(tmp_path / "b.zarr"), zarr_format=2)  # which says ever after that it is empty
    movie = calvae.open_growing(tmp_path / "b.zarr")
    assert movie.frame_rate == 30
    assert follow(movie, lambda k: array.append(MOVIE[k : k + 1]), range(3)) == [0, 1, 2, 3]


def test_a_zarr_that_vanishes_shrinks_or_changes(tmp_path):
    array = an_array(tmp_path / "a.zarr", 3, 1, 0)
    array.append(MOVIE[:5])
    movie = calvae.open_growing(tmp_path / "a.zarr")
    assert movie.poll() == 5
    array.resize((3, 16, 10))
    with pytest.raises(calvae.RecordingError, match=r"a\.zarr: expected at least the 5 frames that were there, got 3"):
        movie.poll()
    array.resize((5, 16, 12))
    with pytest.raises(calvae.RecordingError, match=r"frames of 16 × 10 pixels .* as before, got 16 × 12"):
        movie.poll()
    shutil.rmtree(tmp_path / "a.zarr")
    with pytest.raises(calvae.RecordingError, match="found nothing there any more"):
        movie.poll()


def test_what_is_just_being_written_is_read_again(tmp_path, monkeypatch):
    array = an_array(tmp_path / "a.zarr", 3, 1, 0)
    movie = calvae.open_growing(tmp_path / "a.zarr")
    array.append(MOVIE[:2])
    about = tmp_path / "a.zarr" / "zarr.json"
    whole = about.read_text()
    about.write_text(whole[:100])
    monkeypatch.setattr("napari_calvae.formats.growing.time.sleep", lambda _: about.write_text(whole))
    assert movie.poll() == 2
    chunk = tmp_path / "a.zarr" / "c" / "1" / "0" / "0"
    data = chunk.read_bytes()
    chunk.write_bytes(data[:20])
    monkeypatch.setattr("napari_calvae.formats.growing.time.sleep", lambda _: chunk.write_bytes(data))
    np.testing.assert_array_equal(movie.read(0, 2), MOVIE[:2])
    monkeypatch.setattr("napari_calvae.formats.growing.time.sleep", lambda _: None)
    chunk.write_bytes(data[:20])
    with pytest.raises(calvae.RecordingError, match="cannot be read"):
        movie.read(0, 2)
    about.write_text(whole[:100])
    with pytest.raises(calvae.RecordingError, match="cannot be read"):
        movie.poll()


# TIFF


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}], ids=str)
@pytest.mark.parametrize("page", [{}, {"compression": "zlib"}, {"rowsperstrip": 5}, {"tile": (16, 16)}], ids=str)
def test_a_tiff_that_grows_page_by_page(tmp_path, options, page):
    path = tmp_path / "a.tif"

    def write(k):
        tifffile.imwrite(path, MOVIE[k], append=k > 0, metadata=None, **page, **(options if k == 0 else {}))

    write(0)
    movie = calvae.open_growing(path)
    assert (movie.image_shape, movie.frame_rate) == ((16, 10), None)
    assert follow(movie, write, range(1, 9)) == list(range(1, 10))


@pytest.mark.parametrize("imagej", [True, False])
def test_a_tiff_that_grows_as_one_block(tmp_path, imagej):
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path, imagej=imagej) as writer:

        def write(k):
            writer.write(MOVIE[k], contiguous=True, metadata={"finterval": 0.05} if imagej else {"frame_rate": 20.0})
            writer._fh.flush()

        write(0)
        movie = calvae.open_growing(path)
        assert movie.frame_rate == pytest.approx(20)
        assert follow(movie, write, range(1, 9)) == list(range(1, 10))
    # Closing it adds links to all pages: these are no frames.
    assert [movie.poll() for _ in range(3)] == [9] * 3
    assert calvae.open_growing(path).poll() == 9
    np.testing.assert_array_equal(movie.read(0, 9), MOVIE[:9])


@pytest.mark.parametrize("page", [{}, {"compression": "zlib"}, {"rowsperstrip": 5}, {"tile": (16, 16)}], ids=str)
def test_a_page_that_is_half_written_is_still_to_come(tmp_path, page):
    path, whole = tmp_path / "a.tif", tmp_path / "whole.tif"
    sizes = []
    for k in range(3):
        tifffile.imwrite(whole, MOVIE[k], append=k > 0, metadata=None, **page)
        sizes.append(whole.stat().st_size)
    data = whole.read_bytes()
    path.write_bytes(data[: sizes[0]])
    movie = calvae.open_growing(path)
    for size in range(sizes[0], sizes[2] + 1, 3):  # the link to a page is there before the page
        path.write_bytes(data[:size])
        there = movie.poll()
        whole_pages = 1 + (size >= sizes[1]) + (size == sizes[2])
        assert whole_pages - 1 <= there <= whole_pages  # what pads its end may be missing, or be awaited
        np.testing.assert_array_equal(movie.read(there - 1, there), MOVIE[there - 1 : there])
    path.write_bytes(data)
    assert movie.poll() == 3
    np.testing.assert_array_equal(movie.read(0, 3), MOVIE[:3])


def test_a_tiff_that_vanishes_shrinks_or_changes(tmp_path):
    path = tmp_path / "a.tif"
    for k in range(4):
        tifffile.imwrite(path, MOVIE[k], append=k > 0, metadata=None)
    movie = calvae.open_growing(path)
    assert movie.poll() == 4
    whole = path.read_bytes()
    path.write_bytes(whole[:-400])
    with pytest.raises(calvae.RecordingError, match=r"a\.tif: expected at least the 4 frames that were there, got 3"):
        movie.poll()
    path.write_bytes(whole)
    tifffile.imwrite(path, MOVIE[0, :8], append=True, metadata=None)
    with pytest.raises(calvae.RecordingError, match=r"got 8 × 10 .*open it again"):
        movie.poll()
    path.unlink()
    with pytest.raises(calvae.RecordingError, match="found nothing there any more"):
        movie.poll()


# What both have in common


def test_an_array_in_memory_that_grows():
    class Growing:
        dtype, shape = MOVIE.dtype, (3, 16, 10)

        def __getitem__(self, key):
            return MOVIE[: self.shape[0]][key]

    array = Growing()
    movie = calvae.open_growing(array)
    assert movie.poll() == 3
    array.shape = (7, 16, 10)
    assert movie.poll() == 7
    np.testing.assert_array_equal(movie.read(3, 7), MOVIE[3:7])
    array.shape = (2, 16, 10)
    with pytest.raises(calvae.RecordingError, match="expected at least the 7 frames"):
        movie.poll()
    array.shape = (8, 16, 9)
    with pytest.raises(calvae.RecordingError, match="got 16 × 9"):
        movie.poll()


def test_a_zarr_array_that_was_opened_already_is_looked_up_in_its_folder(tmp_path):
    writer = an_array(tmp_path / "a.zarr", 3, 1, 0)
    movie = calvae.open_growing(zarr.open_array(str(tmp_path / "a.zarr"), mode="r"))
    writer.append(MOVIE[:3])
    assert movie.poll() == 3
    assert movie.frame_rate == 20.0
    in_memory = zarr.create_array(zarr.storage.MemoryStore(), shape=(2, 16, 10), dtype="u2")
    assert calvae.open_growing(in_memory).poll() == 2


@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 5, 0), (3, 5), (2, 3, 4, 5)])
def test_arrays_that_are_no_frames_are_refused(shape):
    with pytest.raises(calvae.RecordingError, match=r"expected frames \(time, y, x\)"):
        calvae.open_growing(np.zeros(shape))


def test_frames_so_far_are_an_array_that_reads_what_is_asked_for(tmp_path):
    array = an_array(tmp_path / "a.zarr", 3, 4, 0)
    array.append(MOVIE)
    movie = calvae.open_growing(tmp_path / "a.zarr")
    frames = movie.so_far(30)
    assert (frames.shape, frames.ndim, frames.dtype, len(frames)) == ((30, 16, 10), 3, np.uint16, 30)
    for key in (3, -1, np.int64(5), slice(2, 9), slice(9, 2), slice(1, 20, 3), slice(None, None, -7), [3, 1],
                [2, 1, 3], [4], ...,
                (4, slice(2, 5), 3), (slice(2, 5), slice(None), slice(1, 4)), (..., 2)):  # fmt: skip
        np.testing.assert_array_equal(frames[key], MOVIE[:30][key], err_msg=str(key))
    np.testing.assert_array_equal(np.asarray(frames), MOVIE[:30])
    with pytest.raises(IndexError):
        frames[30]
    labels = np.zeros((16, 10), np.int32)
    labels[4:8, 2:6] = 1
    np.testing.assert_array_equal(
        calvae.extract(frames, labels, 20.0).values, calvae.extract(MOVIE[:30], labels, 20.0).values
    )
    sent = pickle.dumps(frames)
    assert len(sent) < 4000  # where it lies, not what is in it
    np.testing.assert_array_equal(pickle.loads(sent)[3:5], MOVIE[3:5])
    # The newest frame needs no file.
    movie.read(38, 40)
    shutil.rmtree(tmp_path / "a.zarr")
    np.testing.assert_array_equal(movie.so_far(40)[39], MOVIE[39])
    with pytest.raises(calvae.RecordingError, match="found nothing there any more"):
        frames[20]


def write_nothing(path):
    path.write_bytes(b"")


def write_text(path):
    path.write_text("no image at all, just words")


def write_colours(path):
    tifffile.imwrite(path, np.zeros((8, 8, 3), np.uint8), photometric="rgb")


def write_channels(path):
    tifffile.imwrite(path, np.zeros((2, 2, 8, 8), np.uint16), ome=True, metadata={"axes": "TCYX"})


def write_tables(path):
    zarr.create_array(str(path), shape=(4, 5), dtype="f4")


def write_planes(path):
    zarr.create_array(str(path), shape=(4, 2, 8, 8), dtype="f4")


def write_complex(path):
    zarr.create_array(str(path), shape=(4, 8, 8), dtype="c8")


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("a.tif", write_nothing, "cannot be read .*only just begun, try again"),
        ("a.tif", write_text, "cannot be read"),
        ("a.tif", write_colours, "one plane and one channel"),
        ("a.ome.tif", write_channels, "one plane and one channel"),
        ("a.zarr", write_tables, "expected an array of numbers"),
        ("a.zarr", write_planes, r"one plane and one channel.*got shape \(4, 2, 8, 8\)"),
        ("a.zarr", write_complex, "expected an array of numbers"),
        ("a.mp4", write_text, "expected a Zarr folder or a TIFF file"),
    ],
)
def test_what_is_no_movie_is_said_at_once(tmp_path, name, write, said):
    write(tmp_path / name)
    with pytest.raises(calvae.RecordingError, match=said):
        calvae.open_growing(tmp_path / name)


def test_what_is_not_there_is_said_too(tmp_path):
    with pytest.raises(FileNotFoundError, match="Check the path"):
        calvae.open_growing(tmp_path / "none.zarr")
    for wrong in (3, np.zeros((4, 4)), np.zeros((2, 4, 4), complex)):
        with pytest.raises(calvae.RecordingError, match=r"expected frames \(time, y, x\) of real numbers"):
            calvae.open_growing(wrong)


@pytest.mark.parametrize("code", [257, 273, 279])
@pytest.mark.parametrize("what", ["count", "place"])
def test_a_tiff_that_claims_what_no_file_could_hold_has_no_frames(tmp_path, code, what):
    path = tmp_path / "movie.tif"
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for image in np.arange(4 * 6 * 7, dtype=np.uint16).reshape(4, 6, 7):
            file.write(image, contiguous=False, metadata=None)
    movie = calvae.open_growing(path)
    content = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<Q", content, 8)
    (n_tags,) = struct.unpack_from("<Q", content, first)
    at = next(
        t for t in range(first + 8, first + 8 + 20 * n_tags, 20) if struct.unpack_from("<H", content, t)[0] == code
    )
    struct.pack_into("<Q", content, at + 4, 2**63 - 1 if what == "count" else 2**20)
    struct.pack_into("<Q", content, at + 12, 2**63)
    path.write_bytes(content)
    assert movie.poll() == 0


def test_a_tiff_with_a_link_to_nowhere_has_the_frames_before_it(tmp_path):
    path = tmp_path / "movie.tif"
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for image in np.arange(4 * 6 * 7, dtype=np.uint16).reshape(4, 6, 7):
            file.write(image, contiguous=False, metadata=None)
    content = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<Q", content, 8)
    (n_tags,) = struct.unpack_from("<Q", content, first)
    struct.pack_into("<Q", content, first + 8 + 20 * n_tags, 2**64 - 1)
    path.write_bytes(content)
    movie = calvae.open_growing(path)
    assert movie.poll() == 1
    np.testing.assert_array_equal(movie.read(0, 1)[0], np.arange(42).reshape(6, 7))


def test_what_cannot_be_read_is_looked_at_a_few_times(monkeypatch):
    looks = []

    def look():
        looks.append(len(looks))
        raise RecordingError("half written")

    monkeypatch.setattr(growing, "_WAIT", 0.0)
    with pytest.raises(RecordingError, match="half written"):
        growing._patiently(look)
    assert len(looks) == growing._TRIES
    assert growing._patiently(lambda: 7) == 7
