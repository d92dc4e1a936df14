"""Movies of every format come lazily, with their frame rate, to any process; what is wrong with one is said plainly."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import dask.array as da
import h5py
import numpy as np
import pytest
import tifffile
import zarr

from napari_calvae.formats import _lazy, is_movie, read_movie, write_movie
from napari_calvae.preprocess import extract
from napari_calvae.recording import RecordingError

SHAPE = (12, 16, 10)
MOVIE = np.random.default_rng(0).integers(0, 4000, SHAPE).astype(np.uint16)


def same(opened, expected):
    """The same numbers as a whole, in parts, and after a journey to another process."""
    assert opened.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(opened), expected)
    np.testing.assert_array_equal(np.asarray(opened[2:9:3, ..., 1:5]), expected[2:9:3, ..., 1:5])
    np.testing.assert_array_equal(np.asarray(opened[7]), expected[7])
    sent = pickle.dumps(opened)
    assert len(sent) < 4000  # where it lies, not what is in it
    np.testing.assert_array_equal(np.asarray(pickle.loads(sent)[3:5]), expected[3:5])


# TIFF


def an_ome_series(folder: Path) -> Path:
    """Two files with half of the frames each, as OME describes them."""
    ids = ["urn:uuid:00000000-0000-0000-0000-00000000000" + i for i in "12"]
    names = ["a_0.ome.tif", "a_1.ome.tif"]
    planes = "".join(
        f'<TiffData FirstT="{t}" IFD="{t % 6}" PlaneCount="1"><UUID FileName="{names[t // 6]}">{ids[t // 6]}</UUID>'
        "</TiffData>"
        for t in range(12)
    )
    for i, name in enumerate(names):
        text = (
            f'<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{ids[i]}">'
            '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="10" SizeY="16" '
            'SizeZ="1" SizeC="1" SizeT="12" TimeIncrement="0.1"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>'
            f"{planes}</Pixels></Image></OME>"
        )
        with tifffile.TiffWriter(folder / name) as writer:
            for t in range(6):
                writer.write(MOVIE[6 * i + t], description=text if t == 0 else None, metadata=None, contiguous=False)
    return folder / names[0]


def test_ome_movies_in_several_files(tmp_path):
    movie, rate = read_movie(an_ome_series(tmp_path))
    same(movie, MOVIE)
    assert rate == pytest.approx(10.0)


def test_an_ome_movie_of_which_a_file_is_missing(tmp_path):
    first = an_ome_series(tmp_path)
    (tmp_path / "a_1.ome.tif").unlink()
    with pytest.raises(RecordingError, match=r"a_0\.ome\.tif: expected the other files of this OME-TIFF beside it"):
        read_movie(first)


def a_scanimage_file(path: Path, pages: np.ndarray, **values: object) -> Path:
    """Pages in the order of recording, with the lines that ScanImage puts into the software tag."""
    lines = {"VERSION_MAJOR": 2020, "hRoiManager.scanFrameRate": 30.0, "hScan2D.logAverageFactor": 1, **values}
    text = "\n".join(f"SI.{name} = {value}" for name, value in lines.items())
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for page in pages:
            writer.write(page, software=text, description="frameNumbers = 1", metadata=None, contiguous=False)
    return path


STACK = {"hStackManager.enable": "true", "hStackManager.numSlices": 2, "hStackManager.framesPerSlice": 1}
STACK |= {"hRoiManager.scanVolumeRate": 7.5}


@pytest.mark.parametrize(
    ("values", "take", "rate"),
    [
        ({"hChannels.channelSave": 1}, lambda p: p, 30.0),
        ({"hChannels.channelSave": "[1;2]"}, lambda p: p.reshape(6, 2, 16, 10), 30.0),
        (STACK, lambda p: p.reshape(6, 2, 16, 10), 7.5),
        (STACK | {"hChannels.channelSave": "[1 3]"}, lambda p: p.reshape(3, 2, 2, 16, 10), 7.5),
        # The image taken on the way back is left out, and so is what is left of a volume.
        (STACK | {"hStackManager.numFramesPerVolumeWithFlyback": 3}, lambda p: p.reshape(4, 3, 16, 10)[:, :2], 7.5),
        (
            STACK | {"hStackManager.numFramesPerVolumeWithFlyback": 5},
            lambda p: p[:10].reshape(2, 5, 16, 10)[:, :2],
            7.5,
        ),
        *(
            (
                STACK | {"hFastZ.discardFlybackFrames": said, "hFastZ.numDiscardFlybackFrames": 1},
                lambda p, n=n: p[: len(p) // n * n].reshape(-1, n, 16, 10)[:, :2],
                7.5,
            )
            for said, n in (("true", 3), ("1", 3), ("false", 2))
        ),
        # Several frames in each plane: a stack in space, whose images come as they were taken.
        (STACK | {"hStackManager.framesPerSlice": 6}, lambda p: p, 30.0),
    ],
)
def test_scanimage_says_which_page_is_what(tmp_path, values, take, rate):
    movie, found = read_movie(a_scanimage_file(tmp_path / "a.tif", MOVIE, **values))
    expected = take(MOVIE)
    assert movie.shape == expected.shape
    np.testing.assert_array_equal(np.asarray(movie), expected)
    np.testing.assert_array_equal(np.asarray(movie[1]), expected[1])
    assert found == pytest.approx(rate)


def test_a_scanimage_file_without_a_whole_volume(tmp_path):
    a_scanimage_file(tmp_path / "a.tif", MOVIE[:1], **STACK)
    with pytest.raises(RecordingError, match=r"a\.tif: expected at least one volume of 2 images"):
        read_movie(tmp_path / "a.tif")


def a_bruker_folder(folder: Path, sequences: list[list[list[np.ndarray]]], kind="TSeries Timed Element", clock=True):
    """Sequences of frames of channels, a file for each image, with the XML of PrairieView."""
    folder.mkdir()
    lines, time, n = [], 0.0, 0
    for cycle, frames in enumerate(sequences, 1):
        lines.append(f'<Sequence type="{kind}" cycle="{cycle}">')
        for index, channels in enumerate(frames, 1):
            stated = f'relativeTime="{time:.6f}" absoluteTime="{time + 2:.6f}"' if clock else ""
            lines.append(f'<Frame {stated} index="{index}">')
            time, n = time + 0.05, n + 1
            for channel, image in enumerate(channels, 1):
                name = f"t_Cycle{cycle:05d}_Ch{channel}_{index:06d}.ome.tif"
                tifffile.imwrite(folder / name, image, metadata=None)
                lines.append(f'<File channel="{channel}" channelName="Ch{channel}" page="1" filename="{name}" />')
            lines.append("</Frame>")
        lines.append("</Sequence>")
    (folder / "t.xml").write_text(
        '<?xml version="1.0" encoding="utf-8"?>\n<PVScan version="5.4.64.700" date="1/1/2020 1:00:00 PM" notes="">\n'
        '<PVStateShard><PVStateValue key="framePeriod" value="0.04" /></PVStateShard>\n'
        + "\n".join(lines)
        + "</PVScan>"
    )
    (folder / "another.xml").write_text("<nothing/>")
    return folder


def test_bruker_series(tmp_path):
    folder = a_bruker_folder(tmp_path / "a", [[[image] for image in MOVIE]])
    for path in (folder, folder / "t.xml"):
        assert is_movie(path)
        movie, rate = read_movie(path)
        same(movie, MOVIE)
        assert rate == pytest.approx(20.0)  # what the frames' times say, not the period that was asked for
    assert not is_movie(folder / "another.xml")
    assert not is_movie(tmp_path)
    timeless = a_bruker_folder(tmp_path / "b", [[[image] for image in MOVIE]], clock=False)
    assert read_movie(timeless)[1] == pytest.approx(25.0)
    (timeless / "t.xml").write_text((timeless / "t.xml").read_text().replace("framePeriod", "dwellTime"))
    assert read_movie(timeless)[1] is None


def test_bruker_channels_and_volumes(tmp_path):
    pairs = MOVIE.reshape(6, 2, 16, 10)
    movie, rate = read_movie(a_bruker_folder(tmp_path / "a", [[list(pair) for pair in pairs]]))
    np.testing.assert_array_equal(np.asarray(movie), pairs)
    assert rate == pytest.approx(20.0)
    volumes = [[[image] for image in volume] for volume in MOVIE.reshape(3, 4, 16, 10)]
    volumes.append(volumes[0][:2])  # stopped within a volume
    movie, rate = read_movie(a_bruker_folder(tmp_path / "b", volumes, "TSeries ZSeries Element"))
    np.testing.assert_array_equal(np.asarray(movie), MOVIE.reshape(3, 4, 16, 10))
    assert rate == pytest.approx(5.0)


def test_bad_bruker_series(tmp_path):
    folder = a_bruker_folder(tmp_path / "a", [[[image] for image in MOVIE]])
    (folder / "t_Cycle00001_Ch1_000007.ome.tif").write_bytes(b"II*\0junk")
    movie, _ = read_movie(folder)
    with pytest.raises(RecordingError, match=r"_000007\.ome\.tif: expected an image of a Bruker series, got one that"):
        movie[4:8].compute()
    tifffile.imwrite(folder / "t_Cycle00001_Ch1_000007.ome.tif", MOVIE[0, :4], metadata=None)
    with pytest.raises(RecordingError, match=r"_000007\.ome\.tif: expected an image of \(16, 10\) pixels, uint16"):
        read_movie(folder)[0][4:8].compute()
    (folder / "t_Cycle00001_Ch1_000007.ome.tif").unlink()
    with pytest.raises(RecordingError, match=r"t\.xml: expected 12 image files beside it, got none named .*000007"):
        read_movie(folder)
    text = (folder / "t.xml").read_text()
    (folder / "t.xml").write_text(text[: len(text) // 2])
    with pytest.raises(RecordingError, match=r"t\.xml: expected a Bruker series.*got one that cannot be read"):
        read_movie(folder)
    (folder / "t.xml").write_text(text.replace('<File channel="1"', '<Fil channel="1"', 1))
    with pytest.raises(RecordingError, match="expected the same planes and channels at all times"):
        read_movie(folder)
    with pytest.raises(RecordingError, match=r"another\.xml: expected a Bruker series"):
        read_movie(folder / "another.xml")


def test_tiff_movies_that_are_cut_short_or_coloured(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", MOVIE, photometric="minisblack")
    (tmp_path / "a.tif").write_bytes((tmp_path / "a.tif").read_bytes()[:2000])
    with pytest.raises(RecordingError, match=r"a\.tif: expected a whole TIFF movie, got a file that is cut off"):
        read_movie(tmp_path / "a.tif")
    tifffile.imwrite(tmp_path / "b.tif", np.zeros((5, 12, 10, 3), np.uint8), photometric="rgb")
    with pytest.raises(RecordingError, match=r"b\.tif: expected one grey image per frame"):
        read_movie(tmp_path / "b.tif")


# HDF5


@pytest.mark.parametrize("options", [{}, {"chunks": (5, 4, 10)}, {"chunks": (5, 16, 10), "compression": "gzip"}])
@pytest.mark.parametrize("dtype", ["u2", ">i2", "f4", "u1"])
def test_hdf5_movies(tmp_path, options, dtype):
    expected = (MOVIE % 250).astype(dtype)
    with h5py.File(tmp_path / "a.h5", "w", userblock_size=512) as file:
        file.create_dataset("group/mov", data=expected, **options).attrs["frame_rate"] = 12.5
        file["time"] = np.arange(12.0)
    assert is_movie(tmp_path / "a.h5")
    movie, rate = read_movie(tmp_path / "a.h5")
    assert isinstance(movie, da.Array if options else np.memmap)
    assert rate == 12.5
    same(movie, expected)


def test_hdf5_movies_by_name_and_by_shape(tmp_path):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["other"], file["data"] = MOVIE[:3], MOVIE
        file.attrs["fr"] = [30.0]
    movie, rate = read_movie(tmp_path / "a.hdf5")
    np.testing.assert_array_equal(movie, MOVIE)
    assert rate == 30
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["something"], file["volumes"] = MOVIE, np.zeros((3, 2, 4, 4))
        file["frame_rate"] = 9.0
    assert read_movie(tmp_path / "b.h5")[0].shape == SHAPE
    assert read_movie(tmp_path / "b.h5")[1] == 9
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["volumes"] = np.zeros((3, 2, 4, 4))
    movie, rate = read_movie(tmp_path / "c.h5")
    assert (movie.shape, rate) == ((3, 2, 4, 4), None)


def test_which_hdf5_files_are_movies(tmp_path):
    contents = {
        "traces": {"values": np.zeros((3, 50)), "interval": np.zeros((2, 3, 4))},
        "caiman": {"estimates/C": np.zeros((3, 50)), "images": MOVIE},
        "nothing": {"x": np.zeros(3)},
    }
    for name, arrays in contents.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            for key, array in arrays.items():
                file[key] = array
        assert not is_movie(tmp_path / f"{name}.h5")
    assert not is_movie(tmp_path / "absent.h5")


def test_bad_hdf5_movies(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["one"], file["two"] = MOVIE, MOVIE
    with pytest.raises(RecordingError, match=r"a\.h5: expected one movie.*got 2 arrays: one \(12, 16, 10\), two"):
        read_movie(tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["mov"] = MOVIE.astype(complex)
    with pytest.raises(RecordingError, match=r"b\.h5: expected a movie, an array of numbers .* got none with three"):
        read_movie(tmp_path / "b.h5")
    (tmp_path / "c.h5").write_bytes((tmp_path / "a.h5").read_bytes()[:-700])
    (tmp_path / "d.h5").write_bytes(b"junk")
    for name in ("c.h5", "d.h5"):
        with pytest.raises(RecordingError, match=rf"{name}: expected an HDF5 file.*got one that cannot be read"):
            read_movie(tmp_path / name)


def test_damage_within_an_hdf5_movie(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("mov", data=MOVIE, chunks=(1, 16, 10), compression="gzip")
        at = dataset.id.get_chunk_info(8)
    data = bytearray((tmp_path / "a.h5").read_bytes())
    data[at.byte_offset : at.byte_offset + at.size] = bytes(at.size)
    (tmp_path / "a.h5").write_bytes(data)
    movie, _ = read_movie(tmp_path / "a.h5")
    with pytest.raises(RecordingError, match=r"a\.h5: expected an HDF5 file with a movie, got one that cannot be read"):
        movie[8].compute()


def test_nwb_movies_are_left_to_their_module(tmp_path, monkeypatch):
    for name, kinds in {"a.nwb": ["TwoPhotonSeries"], "b.nwb": ["TwoPhotonSeries", "RoiResponseSeries"]}.items():
        with h5py.File(tmp_path / name, "w") as file:
            for kind in kinds:
                file.create_group(kind).attrs["neurodata_type"] = kind
    assert is_movie(tmp_path / "a.nwb")
    assert not is_movie(tmp_path / "b.nwb")
    assert is_movie(tmp_path / "b.nwb", with_rois=True)
    monkeypatch.setattr("napari_calvae.formats.nwb.open_movie", lambda path: (MOVIE, 4.0), raising=False)
    assert read_movie(tmp_path / "a.nwb") == (MOVIE, 4.0)


# Zarr


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_zarr_arrays_and_groups(tmp_path, zarr_format):
    zarr.create_array(
        str(tmp_path / "a.zarr"),
        data=MOVIE,
        chunks=(5, 8, 10),
        zarr_format=zarr_format,
        attributes={"frame_rate": 12.5},
    )
    group = zarr.open_group(str(tmp_path / "b.zarr"), mode="w", zarr_format=zarr_format)
    group.create_array("anything", data=MOVIE, chunks=(4, 16, 10))
    group.create_array("time", data=np.arange(12.0))
    for name, expected in (("a.zarr", 12.5), ("b.zarr", None)):
        assert is_movie(tmp_path / name)
        movie, rate = read_movie(tmp_path / name)
        same(movie, MOVIE)
        assert rate == expected


@pytest.mark.parametrize(("zarr_format", "shards"), [(2, None), (3, None), (3, (10, 16, 20))])
def test_lost_chunks_of_zarr_movies_are_told(tmp_path, zarr_format, shards):
    """By Zarr's convention they are nothing but zeros: silence would be taken for data."""
    path, movie = tmp_path / "a.zarr", 1 + MOVIE
    zarr.create_array(
        str(path), data=movie, chunks=(5, 16, 20), zarr_format=zarr_format, **({"shards": shards} if shards else {})
    )
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith((".z", "zarr.")))
    read_movie(path)  # a warning would be an error
    files[1].unlink()
    whole = rf"a\.zarr: expected a file for every chunk of the movie, 1 of {len(files)} are not there: they read as 0"
    with pytest.warns(UserWarning, match=whole):
        found, _ = read_movie(path)
    first, frames = (10, 10) if shards else (5, 5)
    assert not np.asarray(found[first : first + frames]).any()
    np.testing.assert_array_equal(found[:first], movie[:first])


def an_ome_zarr(path: Path, version: str, movie: np.ndarray, axes: str, scale=None, unit="millisecond", inner=""):
    group = zarr.open_group(str(path), mode="w", zarr_format=3 if version == "0.5" else 2)
    if inner:
        group.attrs["bioformats2raw.layout"] = 3
        group = group.create_group(inner)
    kinds = {"t": "time", "c": "channel"}
    named = [{"name": axis, "type": kinds.get(axis, "space")} for axis in axes]
    if "t" in axes and unit:
        named[axes.index("t")]["unit"] = unit
    levels = []
    for level, step in enumerate((1, 2)):
        group.create_array(
            str(level), data=movie[..., ::step, ::step], chunks=(3, *movie[0, ..., ::step, ::step].shape)
        )
        factors = [scale if axis == "t" and scale else 1.0 for axis in axes]
        levels.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": factors}]})
    image = {"axes": named, "datasets": levels, "name": "movie"}
    if version == "0.5":
        group.attrs["ome"] = {"version": version, "multiscales": [image]}
    else:
        group.attrs["multiscales"] = [image | {"version": version}]
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("inner", ["", "0"])
def test_ome_zarr_at_full_resolution(tmp_path, version, inner):
    path = an_ome_zarr(tmp_path / "a.zarr", version, MOVIE[:, None, None], "tczyx", 50.0, inner=inner)
    assert is_movie(path)
    movie, rate = read_movie(path)
    same(movie, MOVIE)
    assert rate == pytest.approx(20.0)


def test_axes_of_ome_zarr(tmp_path):
    pairs = MOVIE.reshape(6, 2, 16, 10)
    movie, rate = read_movie(an_ome_zarr(tmp_path / "a.zarr", "0.4", pairs, "tcyx", 50.0, unit=None))
    np.testing.assert_array_equal(np.asarray(movie), pairs)
    assert rate is None  # 50 of what?
    movie, _ = read_movie(an_ome_zarr(tmp_path / "b.zarr", "0.4", pairs.swapaxes(0, 1), "ctyx"))
    np.testing.assert_array_equal(np.asarray(movie), pairs)
    with pytest.raises(RecordingError, match=r"c\.zarr: expected OME-Zarr with axes t, y, x .* got the axes z, y, x"):
        read_movie(an_ome_zarr(tmp_path / "c.zarr", "0.4", MOVIE, "zyx"))


def test_bad_zarr_movies(tmp_path):
    path = an_ome_zarr(tmp_path / "a.zarr", "0.5", MOVIE, "tyx")
    (path / "0" / "zarr.json").unlink()
    with pytest.raises(RecordingError, match=r"a\.zarr: expected a Zarr folder with a movie, got one that cannot be"):
        read_movie(path)
    zarr.create_array(str(tmp_path / "b.zarr"), data=MOVIE, chunks=(1, 16, 10))
    movie, _ = read_movie(tmp_path / "b.zarr")
    (tmp_path / "b.zarr" / "c" / "8" / "0" / "0").write_bytes(b"junk")
    with pytest.raises(RecordingError, match=r"b\.zarr: expected a Zarr folder with a movie, got one that cannot be"):
        movie[8].compute()
    found = json.loads((tmp_path / "b.zarr" / "zarr.json").read_text())
    (tmp_path / "b.zarr" / "zarr.json").write_text(json.dumps(found | {"zarr_format": 9}))
    with pytest.raises(RecordingError, match=r"b\.zarr: expected a Zarr folder.*cannot be read"):
        read_movie(tmp_path / "b.zarr")
    (tmp_path / "b.zarr" / "zarr.json").write_text("{")
    with pytest.raises(RecordingError, match=r"b\.zarr: expected a Zarr folder.*cannot be read"):
        read_movie(tmp_path / "b.zarr")
    (tmp_path / "c.zarr").mkdir()
    assert not is_movie(tmp_path / "c.zarr")
    with pytest.raises(RecordingError, match=r"c\.zarr: expected a Zarr folder with a movie"):
        read_movie(tmp_path / "c.zarr")
    zarr.create_array(str(tmp_path / "d.zarr"), data=np.zeros((3, 4)))
    assert not is_movie(tmp_path / "d.zarr")
    with pytest.raises(RecordingError, match=r"d\.zarr: expected an array of numbers \(time, y, x\)"):
        read_movie(tmp_path / "d.zarr")
    group = zarr.open_group(str(tmp_path / "e.zarr"), mode="w")
    group.create_array("one", data=MOVIE)
    group.create_array("two", data=MOVIE)
    with pytest.raises(RecordingError, match=r"e\.zarr: expected one movie.*got 2 arrays"):
        read_movie(tmp_path / "e.zarr")


def test_zarr_folders_of_traces_are_no_movies(tmp_path):
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    group.create_array("dff", data=np.zeros((3, 50)))
    group.create_array("interval", data=np.zeros((2, 3, 4)))
    assert not is_movie(tmp_path / "a.zarr")


# Videos


def a_video(path: Path, movie: np.ndarray, codec="ffv1", pixels="gray", rate=15, given="gray"):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = (*movie.shape[1:3], pixels)
        for image in movie:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format=given)))
        container.mux(stream.encode())
    return path


GREY = (np.random.default_rng(1).random((12, 16, 16)) * 255).astype(np.uint8)


@pytest.mark.parametrize(("codec", "pixels"), [("ffv1", "gray"), ("rawvideo", "gray"), ("rawvideo", "bgr24")])
def test_grey_videos(tmp_path, codec, pixels):
    path = a_video(tmp_path / "a.avi", GREY, codec, pixels)
    assert is_movie(path)
    movie, rate = read_movie(path)
    assert rate == 15
    same(movie, GREY)


def test_deep_and_long_videos(tmp_path, monkeypatch):
    deep = np.tile(MOVIE[:, :16], (1, 1, 2))[..., :16] * 16
    movie, _ = read_movie(a_video(tmp_path / "a.avi", deep, "ffv1", "gray16le", given="gray16le"))
    assert movie.dtype == np.uint16
    np.testing.assert_array_equal(np.asarray(movie), deep)
    # Pictures that lean on others before them, in chunks that begin between.
    smooth = (100 + np.arange(40)[:, None, None] + np.zeros((40, 64, 64))).astype(np.uint8)
    monkeypatch.setattr(_lazy.lazy, "__defaults__", (7 * 64 * 64,))
    movie, rate = read_movie(a_video(tmp_path / "b.avi", smooth, "mpeg4", "yuv420p", 30))
    assert rate == 30
    assert movie.chunks[0][:2] == (7, 7)
    assert np.abs(np.asarray(movie).astype(int) - smooth).max() < 6


def test_bad_videos(tmp_path, monkeypatch):
    colour = np.zeros((4, 16, 16, 3), np.uint8)
    colour[..., 0] = 200
    with pytest.raises(RecordingError, match=r"a\.avi: expected a grey video, got a coloured one"):
        read_movie(a_video(tmp_path / "a.avi", colour, "rawvideo", "bgr24", given="rgb24"))
    whole = a_video(tmp_path / "b.avi", GREY, "rawvideo", "gray").read_bytes()
    (tmp_path / "b.avi").write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(RecordingError, match=r"b\.avi: expected (an AVI video|a video of 12 frames)"):
        np.asarray(read_movie(tmp_path / "b.avi")[0])
    (tmp_path / "c.avi").write_bytes(b"junk")
    with pytest.raises(RecordingError, match=r"c\.avi: expected an AVI video, got one that cannot be read"):
        read_movie(tmp_path / "c.avi")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RecordingError, match=r"av: expected to be installed.*napari-calvae\[formats\]"):
        read_movie(tmp_path / "b.avi")


# All of them


def test_numpy_movies(tmp_path):
    np.save(tmp_path / "a.npy", MOVIE)
    np.save(tmp_path / "b.npy", np.asfortranarray(MOVIE))
    for name in ("a.npy", "b.npy"):
        same(read_movie(tmp_path / name)[0], MOVIE)
    part = pickle.loads(pickle.dumps(read_movie(tmp_path / "a.npy")[0][3:5]))
    np.testing.assert_array_equal(part, MOVIE[3:5])
    for name, content in {"c.npy": b"junk", "d.npy": (tmp_path / "a.npy").read_bytes()[:-9]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(RecordingError, match=rf"{name}: expected a NumPy file of plain numbers"):
            read_movie(tmp_path / name)
    with open(tmp_path / "e.npy", "wb") as file:
        np.savez(file, MOVIE)
    with pytest.raises(RecordingError, match=r"e\.npy: expected one NumPy array, got an archive"):
        read_movie(tmp_path / "e.npy")


def no_permission(*_, **__):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize("name", ["a.tif", "a.h5", "a.zarr", "a.avi", "a.npy", "a"])
def test_files_that_may_not_be_read(tmp_path, monkeypatch, name):
    writers = {
        "a.tif": lambda path: tifffile.imwrite(path, MOVIE),
        "a.h5": lambda path: h5py.File(path, "w").close(),
        "a.zarr": lambda path: zarr.create_array(str(path), data=MOVIE),
        "a.avi": lambda path: path.write_bytes(b""),
        "a.npy": lambda path: np.save(path, MOVIE),
        "a": lambda path: a_bruker_folder(path, [[[image] for image in MOVIE]]),
    }
    if name == "a.avi":
        pytest.importorskip("av")
    writers[name](tmp_path / name)
    for target in ("tifffile.TiffFile", "h5py.File", "zarr.open", "numpy.load", "builtins.open", "io.open"):
        monkeypatch.setattr(target, no_permission)
    if name == "a.avi":
        monkeypatch.setattr("av.open", no_permission)
    with pytest.raises(RecordingError, match=r"that may be read, got no permission .* Change the permissions"):
        read_movie(tmp_path / name)
    assert io.open is no_permission


def test_errors_list_all_formats(tmp_path):
    (tmp_path / "a.xyz").write_bytes(b"junk")
    with pytest.raises(RecordingError, match=r"\*\.tif.*\*\.npy.*\*\.xml.*\*\.h5.*\*\.zarr.*\*\.nwb.*\*\.avi"):
        read_movie(tmp_path / "a.xyz")
    assert not is_movie(tmp_path / "a.xyz")


def test_chunks_hold_whole_chunks_of_the_file():
    class Source:
        shape, dtype, ndim = (1000, 512, 512), np.dtype(np.uint16), 3

        def __getitem__(self, key):
            raise AssertionError("nothing is to be read yet")

    for stored in ((1, 512, 512), (100, 64, 64), (7, 512, 128), (1000, 8, 8)):
        chunks = _lazy.lazy(Source(), stored).chunksize
        assert all(n % m == 0 for n, m in zip(chunks, stored, strict=True))
        assert 8 << 20 <= np.prod(chunks) * 2 <= 16 << 20


def test_images_of_which_pieces_are_missing_are_refused_at_once(tmp_path):
    """A forged height would otherwise have gigabytes of nothing decoded."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.ones((3, 64, 64), np.uint16), compression="zlib", rowsperstrip=16, metadata=None)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["ImageLength"].overwrite(1_000_000)
    with pytest.raises(RecordingError, match=r"images should have \d+ pieces and have 12"):
        read_movie(path)


def test_a_file_whose_chain_of_pages_ends_early_is_refused_or_says_so_when_it_is_read(tmp_path):
    path = tmp_path / "movie.tif"
    write_movie(np.arange(12 * 16 * 18, dtype=np.uint16).reshape(12, 16, 18), path, 30.0)
    content = bytearray(path.read_bytes())
    (first,) = struct.unpack_from("<I", content, 4)
    (n_tags,) = struct.unpack_from("<H", content, first)
    struct.pack_into("<I", content, first + 2 + 12 * n_tags, 0)
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=r"movie\.tif: expected"):  # noqa: PT012 - sooner or later
        movie, _ = read_movie(path)
        for k in range(12):
            np.asarray(movie[k])


def test_a_video_that_claims_more_frames_than_fit_into_it_has_those_that_are_there(tmp_path):
    content = bytearray(a_video(tmp_path / "movie.avi", GREY, "rawvideo", "gray").read_bytes())
    at = content.index(b"strh") + 8 + 32  # how long the stream is
    assert struct.unpack_from("<I", content, at) == (len(GREY),)
    struct.pack_into("<I", content, at, 0x80808080)
    (tmp_path / "movie.avi").write_bytes(content)
    movie, _ = read_movie(tmp_path / "movie.avi")
    np.testing.assert_array_equal(np.asarray(movie), GREY)


@pytest.mark.parametrize("name", ["a.tif", "a.h5", "a.zarr"])
def test_a_movie_that_vanishes_says_so_and_gives_no_traces(tmp_path, name):
    path = tmp_path / name
    if name == "a.tif":
        tifffile.imwrite(path, MOVIE, compression="zlib", metadata=None)
    elif name == "a.h5":
        with h5py.File(path, "w") as file:
            file.create_dataset("mov", data=MOVIE, chunks=(4, 16, 10), compression="gzip")
    else:
        zarr.save_array(str(path), MOVIE)
    movie, _ = read_movie(path)
    (shutil.rmtree if path.is_dir() else os.unlink)(path)
    labels = np.zeros(MOVIE.shape[1:], int)
    labels[2:6, 2:6] = 1
    with pytest.raises(RecordingError, match=rf"{name}: expected .*, found nothing there any more\. Put it back"):
        extract(movie, labels, 10.0)
