"""Zarr stores: what goes in comes out, ROI by ROI; what is damaged or unfinished is said."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
import zarr
from numpy.lib.recfunctions import structured_to_unstructured
from test_recording import a_result

import napari_calvae as calvae
from napari_calvae.formats import store
from napari_calvae.recording import EVENT_DTYPE, RecordingError, SpikeInference, Traces
from napari_calvae.roi_masks import RoiMasks
from napari_calvae.trace_source import TraceSource


def result_of(n_rois=7, n_frames=50, n_samples=3, masks=True, seed=0):
    """A result whose numbers are all different, so that every mix-up shows."""
    rng = np.random.default_rng(seed)
    rois = RoiMasks.from_discs([(5.0, 4.0 * k + 3) for k in range(n_rois)], 3.0, (12, 40)) if masks else None
    ids = tuple(range(10, 10 + n_rois))
    rois = rois and RoiMasks(rois.shape, rois.pixels, ids, rois.weights)
    values = rng.standard_normal((n_rois, n_frames)).astype(np.float32)
    values[1, 3:6] = np.nan
    traces = Traces(
        values, 12.5, "dff", ids, 0.25, provenance={"source": "x.tif"}, rois=rois, accepted=rng.random(n_rois) > 0.5
    )
    counts = rng.poisson(0.2, (n_rois, n_samples, n_frames)).astype(np.uint8)
    roi, sample, frame = np.nonzero(counts)
    events = np.zeros(len(roi), EVENT_DTYPE)
    events["roi"], events["sample"], events["frame"], events["count"] = roi, sample, frame, counts[roi, sample, frame]
    quality = np.zeros(n_rois, [("spike_rate", "f4"), ("noise_level", "f4")])
    for name in quality.dtype.names:
        quality[name] = rng.random(n_rois)
    dense = (rng.random((n_rois, n_frames)).astype(np.float32) for _ in range(3))
    one, two = (rng.random(n_rois).astype(np.float32) for _ in range(2))
    return SpikeInference(
        traces, next(dense), events, n_samples, next(dense), next(dense),
        {"tau": one}, quality, {"model": "x", "n": np.float32(2)}, {"tau": two},
    )  # fmt: skip


def assert_equal(a, b):
    assert a.roi_ids == b.roi_ids
    assert (a.frame_rate, a.traces.t0, a.n_samples) == (b.frame_rate, b.traces.t0, b.n_samples)
    np.testing.assert_array_equal(a.traces.values, b.traces.values)
    np.testing.assert_array_equal(a.traces.accepted, b.traces.accepted)
    for name in ("rate", "reconstruction", "reconstruction_std", "events"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    np.testing.assert_array_equal(structured_to_unstructured(a.quality), structured_to_unstructured(b.quality))
    for group in ("theta", "theta_std"):
        assert list(getattr(a, group)) == list(getattr(b, group))
        for name, values in getattr(a, group).items():
            np.testing.assert_array_equal(values, getattr(b, group)[name])


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(store, "BLOCK_FRAMES", 150)  # three ROIs of fifty frames


def test_a_result_comes_back_whole_and_in_parts(tmp_path, small_blocks):
    result = result_of()
    calvae.write(result, tmp_path / "a.zarr")
    found = calvae.open_result(tmp_path / "a.zarr")
    assert (found.n_rois, found.n_frames, found.block_rois, found.n_blocks) == (7, 50, 3, 3)
    assert found.done.all()
    assert_equal(found.load(), result)
    assert found.load().provenance == {"model": "x", "n": 2.0}
    assert found.load().traces.provenance == {"source": "x.tif"}
    rows = [6, 0, 4]
    part = found.select(rows)
    assert part.roi_ids == (16, 10, 14)
    np.testing.assert_array_equal(part.rate, result.rate[rows])
    np.testing.assert_array_equal(part.samples(), result.samples(rows))
    np.testing.assert_array_equal(part.theta["tau"], result.theta["tau"][rows])
    assert part.traces.rois.ids == (16, 10, 14)
    np.testing.assert_array_equal(part.traces.rois.pixels[0], result.traces.rois.pixels[6])
    np.testing.assert_array_equal(part.traces.accepted, result.traces.accepted[rows])
    assert not list(tmp_path.rglob("*.part*"))


def test_without_samples_masks_or_judgements(tmp_path):
    result = result_of(masks=False, n_samples=0)
    result = SpikeInference(**{**vars(result), "traces": result.traces.replace(accepted=None), "theta_std": {}})
    calvae.write(result, tmp_path / "a.zarr")
    found = calvae.open_result(tmp_path / "a.zarr").load()
    assert_equal(found, result)
    assert found.traces.rois is None
    assert found.traces.accepted is None


def test_traces_come_back_and_stay_in_their_file(tmp_path, small_blocks):
    traces = result_of().traces.replace(unit="raw")
    calvae.write(traces, tmp_path / "t.zarr")
    source = calvae.open_traces(tmp_path / "t.zarr")
    assert (source.n_rois, source.n_frames, source.frame_rate, source.unit, source.t0) == (7, 50, 12.5, "raw", 0.25)
    assert source.chunk_rows == 3
    np.testing.assert_array_equal(source.select([1, 5]).values, traces.values[[1, 5]])
    back = calvae.read(tmp_path / "t.zarr")
    np.testing.assert_array_equal(back.values, traces.values)
    np.testing.assert_array_equal(back.accepted, traces.accepted)
    assert back.roi_ids == back.rois.ids == traces.roi_ids
    assert calvae.read(tmp_path / "t.zarr", frame_rate=20.0, unit="dff").frame_rate == 20


def test_the_traces_of_a_result_are_its_dff(tmp_path):
    result = result_of()
    calvae.write(result, tmp_path / "a.zarr")
    back = calvae.read(tmp_path / "a.zarr")
    assert back.unit == "dff"
    np.testing.assert_array_equal(back.values, result.traces.values)


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_arrays_of_others(tmp_path, zarr_format):
    values = np.arange(12.0).reshape(3, 4)
    array = zarr.create_array(
        str(tmp_path / "a.zarr"), shape=(3, 4), chunks=(2, 4), dtype="f8", zarr_format=zarr_format
    )
    array[:] = values
    with pytest.raises(RecordingError, match="frame_rate: expected the frames per second"):
        calvae.read(tmp_path / "a.zarr")
    np.testing.assert_array_equal(calvae.read(tmp_path / "a.zarr", frame_rate=4.0).values, values)
    array.attrs["frame_rate"] = 8.0
    source = calvae.open_traces(tmp_path / "a.zarr")
    assert (source.frame_rate, source.chunk_rows, source.unit) == (8.0, 2, "dff")


def test_a_group_with_arrays_beside_the_traces(tmp_path):
    group = zarr.create_group(str(tmp_path / "a.zarr"))
    for name, array in {"F": np.ones((2, 9)), "frame_rate": np.array(5.0), "roi_ids": np.array([4, 2])}.items():
        group.create_array(name, data=array)
    traces = calvae.read(tmp_path / "a.zarr")
    assert (traces.frame_rate, traces.roi_ids, traces.unit) == (5.0, (4, 2), "raw")


def test_an_existing_store_is_replaced_only_when_told_and_only_as_a_whole(tmp_path, monkeypatch):
    result, other = result_of(), result_of(n_rois=2)
    calvae.write(result, tmp_path / "a.zarr")
    with pytest.raises(FileExistsError, match="exists already"):
        calvae.write(other, tmp_path / "a.zarr")
    full = OSError(28, "No space left on device")

    def fail(*_, **__):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(store.StoredInference, "write_block", fail)
        with pytest.raises(OSError, match="No space left"):
            calvae.write(other, tmp_path / "a.zarr", overwrite=True)
    assert_equal(calvae.open_result(tmp_path / "a.zarr").load(), result)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]
    calvae.write(other, tmp_path / "a.zarr", overwrite=True)
    assert calvae.open_result(tmp_path / "a.zarr").n_rois == 2


def test_a_folder_that_is_no_store_is_never_replaced(tmp_path):
    (tmp_path / "a.zarr").mkdir()
    (tmp_path / "a.zarr" / "thesis.txt").write_text("ten years")
    with pytest.raises(FileExistsError, match="expected a Zarr store to replace"):
        calvae.write(result_of(), tmp_path / "a.zarr", overwrite=True)
    assert (tmp_path / "a.zarr" / "thesis.txt").read_text() == "ten years"


def test_what_is_not_there_yet_is_said(tmp_path, small_blocks):
    calvae.write(result_of(), tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "done" / "c" / "1").unlink()
    found = calvae.open_result(tmp_path / "a.zarr")
    assert found.done.tolist() == [True, False, True]
    assert found.select([0, 6]).roi_ids == (10, 16)
    with pytest.raises(RecordingError, match=r"in which ROI 13 and others are still missing.*goes on where it stopped"):
        found.load()
    with pytest.raises(RecordingError, match="expected a finished store"):
        calvae.read(tmp_path / "a.zarr")


def damage(path, how):
    if how == "flipped byte":
        file = path / "rate" / "c" / "0" / "0"
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    elif how == "cut short":
        file = path / "events" / "0" / "c" / "0" / "0"
        file.write_bytes(file.read_bytes()[:20])
    elif how == "no rate":
        shutil.rmtree(path / "rate")
    elif how == "no cells":
        shutil.rmtree(path / "cells")
    elif how == "no ids":
        shutil.rmtree(path / "roi_ids")
    elif how == "no layout":
        about = json.loads((path / "zarr.json").read_text())
        del about["attributes"]["calvae"]["layout"]
        (path / "zarr.json").write_text(json.dumps(about))
    elif how == "no json":
        (path / "zarr.json").write_text("{")
    elif how == "absurd shape":
        about = json.loads((path / "rate" / "zarr.json").read_text())
        about["shape"] = [7]
        (path / "rate" / "zarr.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    "how",
    ["flipped byte", "cut short", "no rate", "no cells", "no ids", "no layout", "no json", "absurd shape"],
)
def test_damaged_stores(tmp_path, how):
    calvae.write(result_of(), tmp_path / "a.zarr")
    damage(tmp_path / "a.zarr", how)
    with pytest.raises(RecordingError, match=r"a\.zarr: expected a Zarr store of results or traces"):
        calvae.open_result(tmp_path / "a.zarr").load()


def test_other_stores(tmp_path):
    calvae.write(result_of().traces, tmp_path / "t.zarr")
    with pytest.raises(RecordingError, match=r"t\.zarr: expected a store of results, got one of traces"):
        calvae.open_result(tmp_path / "t.zarr")
    calvae.write(result_of(), tmp_path / "a.zarr")
    about = json.loads((tmp_path / "a.zarr" / "zarr.json").read_text())
    about["attributes"]["calvae"]["schema"] = 99
    (tmp_path / "a.zarr" / "zarr.json").write_text(json.dumps(about))
    for read in (calvae.open_result, calvae.read):
        with pytest.raises(RecordingError, match=r"expected a store of schema 1, got schema 99.*newer"):
            read(tmp_path / "a.zarr")
    zarr.create_array(str(tmp_path / "c.zarr"), shape=(3, 4), chunks=(2, 4), dtype="c8")
    with pytest.raises(RecordingError, match="expected real numbers, got dtype complex64"):
        calvae.read(tmp_path / "c.zarr", frame_rate=1.0)
    zarr.create_array(str(tmp_path / "one.zarr"), shape=(3,), chunks=(3,), dtype="f4")
    with pytest.raises(RecordingError, match="expected traces in one of the formats"):
        calvae.read(tmp_path / "one.zarr", frame_rate=1.0)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(RecordingError, match=r"empty\.zarr: expected a Zarr store"):
        calvae.read(tmp_path / "empty.zarr")
    with pytest.raises(FileNotFoundError, match="found nothing there"):
        calvae.open_result(tmp_path / "none.zarr")


def test_no_permission_is_said_as_such(tmp_path, monkeypatch):
    calvae.write(result_of(), tmp_path / "a.zarr")

    def refuse(*_):
        raise PermissionError(13, "Permission denied", "a.zarr")

    monkeypatch.setattr(store, "open_node", refuse)
    with pytest.raises(PermissionError, match=r"a\.zarr"):
        calvae.open_result(tmp_path / "a.zarr")


@pytest.mark.parametrize(
    ("n_rois", "n_frames", "chunk_rows", "rows"),
    [
        (None, 20_000, 1, 209),  # 16 MB
        (20_000, 20_000, 1, 209),
        (20_000, 20_000, 100, 300),  # whole chunks
        (20_000, 20_000, 1000, 209),  # these do not fit
        (160, 20_000, 1, 13),  # a quarter of a million trace-frames at least
        (800, 20_000, 1, 50),  # sixteen blocks
        (800, 20_000, 80, 50),
        (3, 10_000_000, 1, 1),
    ],
)
def test_blocks_are_neither_too_large_nor_too_few(n_rois, n_frames, chunk_rows, rows):
    assert store.rois_per_block(n_frames, chunk_rows, n_rois) == rows


def test_judgements_of_another_number_of_rois_are_refused():
    with pytest.raises(RecordingError, match=r"accepted: expected one value per ROI, 3, got shape \(2,\)"):
        TraceSource(np.zeros((3, 9)).__getitem__, 3, 9, 30.0, accepted=np.ones(2, bool))


@pytest.mark.parametrize("kind", ["result", "traces"])
def test_whatever_file_of_a_store_is_lost_or_cut_is_missed(tmp_path, kind):
    """By Zarr's convention a chunk that is not there stands for nothing; here it is an error, also where that is so."""
    result = a_result()
    values = result.traces.values.copy()
    values[1] = np.nan  # a whole chunk of nothing
    discs = [(4.0, 4.0 + 3 * k) for k in range(len(values))]
    rois = calvae.RoiMasks.from_discs(discs, 1.0, (9, 3 * len(values) + 8), result.traces.roi_ids)
    traces = result.traces.replace(values=values, valid=None, rois=rois, accepted=np.ones(len(values), bool))
    path = tmp_path / "a.zarr"
    calvae.write(dataclasses.replace(result, traces=traces) if kind == "result" else traces, path)

    def content() -> list[bytes]:
        found = calvae.open_result(path).load() if kind == "result" else None
        known = calvae.read(path) if found is None else found.traces
        parts = [known.values, known.rois.to_labels(), known.accepted, np.array(known.roi_ids)]
        if found is not None:
            parts += [found.rate, found.reconstruction, found.reconstruction_std, found.events, found.quality]
            parts += [found.theta[name] for name in sorted(found.theta)]
        return [part.tobytes() for part in parts]

    whole, noticed = content(), 0
    for file in sorted(f for f in path.rglob("*") if f.is_file()):
        data = file.read_bytes()
        for left in (None, data[: len(data) // 2]):
            file.unlink()
            if left is not None:
                file.write_bytes(left)
            try:
                assert content() == whole, file
            except RecordingError:
                noticed += 1
            file.write_bytes(data)
    assert content() == whole
    assert noticed > 20


def test_stores_from_before_every_chunk_was_written_are_read(tmp_path):
    calvae.write(a_result(), tmp_path / "a.zarr")
    group = zarr.open_group(str(tmp_path / "a.zarr"))
    about = dict(group.attrs["calvae"])
    del about["holds"]
    group.attrs["calvae"] = about
    for chunk in (tmp_path / "a.zarr" / "dff" / "c").rglob("0"):
        if chunk.is_file():
            chunk.unlink()
    assert np.isnan(calvae.open_result(tmp_path / "a.zarr").load().traces.values).all()


def test_what_was_there_comes_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    calvae.write(Traces(np.arange(60.0).reshape(2, 30), 10.0), tmp_path / "a.zarr")
    replace = os.replace

    def in_the_way(old, new):
        if str(old).endswith(".part"):
            raise PermissionError("in use")
        replace(old, new)

    monkeypatch.setattr(os, "replace", in_the_way)
    with pytest.raises(PermissionError):
        calvae.write(Traces(np.ones((2, 30)), 10.0), tmp_path / "a.zarr", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zarr"]
    np.testing.assert_array_equal(calvae.read(tmp_path / "a.zarr").values, np.arange(60.0).reshape(2, 30))
