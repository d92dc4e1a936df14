"""NWB: what we write passes nwbinspector and opens in pynwb, roiextractors and pynapple; what others write is read."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import gc
import itertools
import pickle
import shutil
import subprocess
import sys
import warnings

import h5py
import numpy as np
import pytest
import tifffile
from test_recording import a_result

from napari_calvae import formats, infer, open_traces, read, write
from napari_calvae.formats import check_result, is_movie, nwb
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.roi_masks import RoiMasks

pynwb = pytest.importorskip("pynwb")

pytestmark = pytest.mark.filterwarnings(
    # What these packages warn of among themselves.
    "ignore:.*:FutureWarning:(hdmf|pynwb|roiextractors|pynapple|nwbinspector).*"
)

IDS = (12, 5, 7)


def some_rois(planes=()):
    pixels = (np.array([3, 4, 8]), np.array([4, 9]), np.array([28]))
    weights = (np.array([1, 0.5, 2]), np.array([1, 1]), np.array([0.25]))
    return RoiMasks((6, 5), pixels, IDS, weights, planes)


def placed_result(n_frames=45, **changes):
    result = a_result(3, n_frames)
    values = result.traces.values.copy()
    values[1, 3:6] = np.nan
    named = {"values": values, "roi_ids": IDS, "rois": some_rois(), "accepted": [True, False, True]} | changes
    return dataclasses.replace(result, traces=result.traces.replace(**named))


@pytest.fixture(scope="module")
def result():
    return placed_result()


@pytest.fixture(scope="module")
def written(result, tmp_path_factory):
    """A new file with a result."""
    path = tmp_path_factory.mktemp("nwb") / "new.nwb"
    write(result, path)
    return path


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A file as a lab might have it: raw traces and neuropil of three of four ROIs, a movie, spikes of its own."""
    path = tmp_path_factory.mktemp("nwb") / "recorded.nwb"
    make_recording(path)
    return path


def a_session():
    return pynwb.NWBFile(
        session_description="A mouse looks at gratings.",
        identifier="mouse-7",
        session_start_time=datetime.datetime(2024, 3, 4, 5, 6, 7, tzinfo=datetime.UTC),
        subject=pynwb.file.Subject(subject_id="mouse-7", species="Mus musculus", sex="F", age="P90D"),
    )


def a_plane(file):
    channel = pynwb.ophys.OpticalChannel(name="OpticalChannel", description="Green.", emission_lambda=510.0)
    return file.create_imaging_plane(
        name="ImagingPlane",
        description="Layer 2/3.",
        optical_channel=channel,
        device=file.create_device("Microscope", description="Two photons."),
        excitation_lambda=920.0,
        indicator="GCaMP6f",
        location="Primary visual area",
        imaging_rate=10.0,
    )


def make_recording(path, mask="image_mask", movie=True, clock=None, **series):
    """Write a file with the series named, by default raw traces, neuropil and spikes; return their values."""
    file = a_session()
    plane = a_plane(file)
    rng = np.random.default_rng(1)
    if movie:
        frames = rng.integers(0, 4000, (45, 9, 8)).astype(np.uint16)  # (time, x, y)
        file.add_acquisition(
            pynwb.ophys.TwoPhotonSeries(
                name="TwoPhotonSeries", description="Movie.", data=frames, unit="n.a.", imaging_plane=plane, rate=10.0
            )
        )
    table = pynwb.ophys.PlaneSegmentation(name="PlaneSegmentation", description="ROIs.", imaging_plane=plane)
    for roi in range(4):
        x, y = 2 * roi, roi
        if mask == "image_mask":
            image = np.zeros((9, 8), np.float32)
            image[x, y : y + 2] = 1, 0.5
            table.add_roi(id=10 + roi, image_mask=image)
        elif mask == "pixel_mask":
            table.add_roi(id=10 + roi, pixel_mask=[(x, y, 1.0), (x, y + 1, 0.5)])
        else:
            table.add_roi(id=10 + roi, voxel_mask=[(x, y, roi, 1.0), (x, y + 1, roi, 0.5)])
    table.add_column(name="iscell", description="Cell, and how surely.", data=[[1, 0.9], [0, 0.2], [1, 0.8], [0, 0.1]])
    ophys = file.create_processing_module("ophys", "Calcium imaging.")
    segmentation = pynwb.ophys.ImageSegmentation(name="ImageSegmentation")
    ophys.add(segmentation)
    segmentation.add_plane_segmentation(table)
    values = {}
    for name, about in (series or {"RoiResponseSeries": {}, "Neuropil": {}, "Deconvolved": {}}).items():
        about = {"unit": "n.a.", "rate": 10.0, "starting_time": 3.0, "container": "Fluorescence", "dtype": "f4"} | about
        if clock is not None:
            del about["rate"], about["starting_time"]
            about["timestamps"] = clock
        container = about.pop("container")
        if container not in ophys.data_interfaces:
            kind = pynwb.ophys.DfOverF if container == "DfOverF" else pynwb.ophys.Fluorescence
            ophys.add(kind(name=container))
        values[name] = (rng.random((45, 3)) * 100).astype(about.pop("dtype"))
        region = table.create_roi_table_region(description="ROIs.", region=[3, 0, 2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pynwb remarks on timestamps that do not fit
            one = pynwb.ophys.RoiResponseSeries(
                name=name, data=about.pop("data", values[name]), rois=region, description="Traces.", **about
            )
        ophys[container].add_roi_response_series(one)
    with pynwb.NWBHDF5IO(str(path), "w") as io:
        io.write(file)
    return values


def findings(path, at_least="BEST_PRACTICE_VIOLATION"):
    """What nwbinspector finds wrong; only suggestions are below violations of best practice."""
    from nwbinspector import Importance, inspect_nwbfile

    found = inspect_nwbfile(nwbfile_path=str(path), importance_threshold=Importance[at_least])
    return [(message.check_function_name, message.message) for message in found]


def test_a_new_file_has_nothing_for_nwbinspector_but_suggestions(written):
    assert findings(written) == []
    assert {name for name, _ in findings(written, "BEST_PRACTICE_SUGGESTION")} <= {
        "check_session_start_time_old_date",
        "check_experimenter_exists",
        "check_experiment_description",
        "check_institution",
    }
    assert not pynwb.validate(path=str(written))


def test_nwbinspector_does_find_what_is_wrong(written, tmp_path):
    broken = shutil.copy(written, tmp_path / "broken.nwb")
    with h5py.File(broken, "r+") as file:
        del file["general/subject"]
    assert "check_subject_exists" in dict(findings(broken))


def test_a_new_file_is_read_as_it_was_written(result, written):
    traces = read(written)
    np.testing.assert_array_equal(traces.values, result.traces.values)
    np.testing.assert_array_equal(traces.accepted, [True, False, True])
    assert (traces.roi_ids, traces.frame_rate, traces.t0, traces.unit) == (IDS, 10, 2, "dff")
    same_rois(traces.rois, some_rois())
    assert traces.provenance["series"] == "processing/ophys/DfOverF/RoiResponseSeries"


def same_rois(found, expected):
    assert (found.shape, found.ids, found.planes) == (expected.shape, expected.ids, expected.planes)
    for name in ("pixels", "weights"):
        for a, b in zip(getattr(found, name), getattr(expected, name), strict=True):
            np.testing.assert_array_equal(a, b)


def test_pynwb_reads_all_of_it(result, written):
    with pynwb.NWBHDF5IO(str(written), "r") as io:
        ophys = io.read().processing["ophys"]
        series = ophys["Fluorescence"].roi_response_series
        assert set(series) == {"Deconvolved", "DeconvolvedLow", "DeconvolvedHigh", "Denoised", "DenoisedStd"}
        for name, signal in {"Deconvolved": "rate", "Denoised": "reconstruction"}.items():
            values = getattr(result, signal)
            np.testing.assert_array_equal(series[name].data[:].T, values)
            assert (series[name].rate, series[name].starting_time) == (10, 2)
            assert series[name].rois.table.name == "PlaneSegmentation"
            np.testing.assert_array_equal(series[name].rois.data[:], [0, 1, 2])
        np.testing.assert_array_equal(series["DenoisedStd"].data[:].T, result.reconstruction_std)
        assert series["Deconvolved"].unit == "spikes/s"
        low, high = result.interval(0.9, 1.0)
        np.testing.assert_allclose(series["DeconvolvedLow"].data[:].T, low, rtol=1e-6)
        np.testing.assert_allclose(series["DeconvolvedHigh"].data[:].T, high, rtol=1e-6)
        assert (series["DeconvolvedLow"].rate, series["DeconvolvedLow"].starting_time) == (1, pytest.approx(2.45))
        table = ophys["SpikeInference"].to_dataframe(index=True)
        assert list(table.index) == list(IDS)
        np.testing.assert_array_equal(table["quality_explained"], result.quality["explained"])
        np.testing.assert_array_equal(table["theta_amplitude"], result.theta["amplitude"])
        about = ophys["SpikeInferenceProvenance"].to_dataframe()
        items = dict(zip(about["key"], about["value"], strict=True))
        assert (items["inference.seed"], items["inference.array"]) == ("0", "[0, 1]")


def test_roiextractors_reads_it(result, written):
    roiextractors = pytest.importorskip("roiextractors")
    found = roiextractors.NwbSegmentationExtractor(written)
    np.testing.assert_array_equal(found.get_traces(name="dff").T, result.traces.values)
    np.testing.assert_array_equal(found.get_traces(name="deconvolved").T, result.rate)
    np.testing.assert_array_equal(found.get_traces(name="denoised").T, result.reconstruction)
    assert list(found.get_roi_ids()) == list(IDS)
    assert found.get_sampling_frequency() == 10
    assert found.get_num_samples() == 45
    assert tuple(found.get_frame_shape()) == (6, 5)
    for row, image in enumerate(np.moveaxis(found.get_roi_image_masks(), 2, 0)):
        expected = np.zeros(30)
        expected[some_rois().pixels[row]] = some_rois().weights[row]
        np.testing.assert_array_equal(image.ravel(), expected)
    np.testing.assert_array_equal(found.get_property("accepted", list(IDS)), [True, False, True])
    np.testing.assert_allclose(found.get_native_timestamps(), result.traces.times)
    del found
    gc.collect()


def test_pynapple_reads_it(result, written):
    nap = pytest.importorskip("pynapple")
    file = nap.load_file(str(written))
    frame = file["Deconvolved"]
    np.testing.assert_array_equal(frame.d[:], result.rate.T)
    np.testing.assert_allclose(frame.t, result.traces.times)
    assert list(frame.columns) == list(IDS)
    np.testing.assert_array_equal(frame["Accepted"], [True, False, True])
    np.testing.assert_array_equal(file["RoiResponseSeries"].d[:], result.traces.values.T)
    file.close()


@pytest.mark.parametrize("unit", ["raw", "dff"])
def test_traces_alone_are_written(tmp_path, unit):
    traces = placed_result().traces.replace(
        unit=unit, rois=some_rois((0, 2, 1)), provenance={"a": {"b": [1, {"c": 2}]}}
    )
    write(traces, tmp_path / "a.nwb")
    assert findings(tmp_path / "a.nwb") == []
    back = read(tmp_path / "a.nwb")
    np.testing.assert_array_equal(back.values, traces.values)
    assert back.unit == unit
    assert back.rois.planes == (0, 2, 1)
    with h5py.File(tmp_path / "a.nwb") as file:
        about = file["processing/ophys/TraceProvenance"]
        assert [key.decode() for key in about["key"][:]] == ["traces.a.b.0", "traces.a.b.1.c"]


def test_rois_of_which_nothing_is_known_stay_unknown(tmp_path):
    result = placed_result(rois=None, accepted=None)
    write(result, tmp_path / "a.nwb")
    assert findings(tmp_path / "a.nwb") == []
    back = read(tmp_path / "a.nwb")
    assert (back.rois, back.accepted, back.roi_ids) == (None, None, IDS)
    roiextractors = pytest.importorskip("roiextractors")
    found = roiextractors.NwbSegmentationExtractor(tmp_path / "a.nwb")
    np.testing.assert_array_equal(found.get_traces(name="deconvolved").T, result.rate)
    del found
    gc.collect()


def test_intervals_of_uneven_windows_have_time_stamps_and_few_samples_have_none(tmp_path):
    result = placed_result(frame_rate=7.5)
    write(result, tmp_path / "a.nwb")
    edges = result.window_edges(1.0)
    assert len(set(np.diff(edges))) == 2
    with h5py.File(tmp_path / "a.nwb") as file:
        times = file["processing/ophys/Fluorescence/DeconvolvedLow/timestamps"][:]
    np.testing.assert_allclose(times, [result.traces.times[a:b].mean() for a, b in itertools.pairwise(edges)])
    assert findings(tmp_path / "a.nwb") == []
    write(dataclasses.replace(result, n_samples=1), tmp_path / "b.nwb")
    with h5py.File(tmp_path / "b.nwb") as file:
        assert set(file["processing/ophys/Fluorescence"]) == {"Deconvolved", "Denoised", "DenoisedStd"}


# Files of others


def test_raw_traces_lose_the_changes_of_their_neuropil(tmp_path):
    values = make_recording(tmp_path / "a.nwb")
    traces = read(tmp_path / "a.nwb")
    around = values["Neuropil"].T
    expected = values["RoiResponseSeries"].T - 0.7 * (around - np.median(around, 1, keepdims=True))
    np.testing.assert_allclose(traces.values, expected, rtol=1e-5)
    assert (traces.roi_ids, traces.frame_rate, traces.t0, traces.unit) == ((13, 10, 12), 10, 3, "raw")
    np.testing.assert_array_equal(traces.accepted, [False, True, True])
    assert traces.provenance["neuropil"] == "processing/ophys/Fluorescence/Neuropil"
    assert traces.provenance["neuropil_coefficient"] == 0.7
    assert traces.provenance["session"]["subject"]["species"] == "Mus musculus"
    assert read(tmp_path / "a.nwb", 20.0, "dff").frame_rate == 20
    assert read(tmp_path / "a.nwb", 20.0, "dff").unit == "dff"


@pytest.mark.parametrize("mask", ["image_mask", "pixel_mask", "voxel_mask"])
@pytest.mark.parametrize("movie", [True, False])
def test_masks_of_all_kinds(tmp_path, mask, movie):
    make_recording(tmp_path / "a.nwb", mask, movie)
    rois = read(tmp_path / "a.nwb").rois
    # Without a movie nothing but the masks says how large the image is.
    assert rois.shape == ((8, 9) if movie or mask == "image_mask" else (5, 7))
    assert rois.ids == (13, 10, 12)
    assert rois.planes == ((3, 0, 2) if mask == "voxel_mask" else (0, 0, 0))
    for pixels, weights, roi in zip(rois.pixels, rois.weights, (3, 0, 2), strict=True):
        np.testing.assert_array_equal(np.unravel_index(pixels, rois.shape), [[roi, roi + 1], [2 * roi] * 2])
        np.testing.assert_array_equal(weights, [1, 0.5])


@pytest.mark.parametrize(
    ("series", "chosen", "unit"),
    [
        ({"RoiResponseSeries": {}, "dff": {"container": "DfOverF"}}, "dff", "dff"),
        ({"B": {}, "A": {}}, "A", "raw"),
        ({"A": {}, "RoiResponseSeries": {}}, "RoiResponseSeries", "raw"),
        ({"A": {"container": "Else"}, "B": {}}, "B", "raw"),
        ({"A": {}, "F_dff": {}}, "F_dff", "dff"),
        ({"Denoised": {}, "Baseline": {}, "spks": {}, "Z": {}}, "Z", "raw"),
    ],
)
def test_of_several_series_one_is_chosen_and_the_others_named(tmp_path, series, chosen, unit):
    values = make_recording(tmp_path / "a.nwb", **series)
    traces = read(tmp_path / "a.nwb")
    np.testing.assert_array_equal(traces.values, values[chosen].T)
    assert traces.unit == unit
    assert traces.provenance["series"].split("/")[-1] == chosen
    assert {name.split("/")[-1] for name in traces.provenance["other_series"]} == set(series) - {chosen}


def test_neuropil_is_that_of_the_same_rois_in_whatever_order(tmp_path):
    values = make_recording(tmp_path / "a.nwb")
    with h5py.File(tmp_path / "a.nwb", "a") as file:
        neuropil = file["processing/ophys/Fluorescence/Neuropil"]
        neuropil["rois"][:] = [2, 3, 0]  # those of the traces are 3, 0, 2
    around = values["Neuropil"].T[[1, 2, 0]]
    expected = values["RoiResponseSeries"].T - 0.7 * (around - np.median(around, 1, keepdims=True))
    np.testing.assert_allclose(read(tmp_path / "a.nwb").values, expected, rtol=1e-5)
    with h5py.File(tmp_path / "a.nwb", "a") as file:
        file["processing/ophys/Fluorescence/Neuropil/rois"][:] = [2, 3, 1]
    with pytest.raises(RecordingError, match=r"expected neuropil of every ROI in .*, got none of row 0"):
        read(tmp_path / "a.nwb")


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ([0.9, 0.1, 0.2, 0.8], [True, True, False]),
        ([1, np.nan, 0, 0], [False, True, False]),
        ([b"True", b"False", b"False", b"True"], [True, True, False]),
        ([b"good", b"bad", b"bad", b"good"], None),
    ],
)
def test_judgements_are_probabilities_or_words(tmp_path, column, expected):
    """Of rows 3, 0 and 2."""
    make_recording(tmp_path / "a.nwb")
    with h5py.File(tmp_path / "a.nwb", "a") as file:
        table = file["processing/ophys/ImageSegmentation/PlaneSegmentation"]
        del table["iscell"]
        table["Accepted"] = np.array(column)
    found = read(tmp_path / "a.nwb").accepted
    assert (None if found is None else found.tolist()) == expected


def test_a_series_of_one_roi_may_have_one_axis(tmp_path):
    values = make_recording(tmp_path / "a.nwb", RoiResponseSeries={})
    with h5py.File(tmp_path / "a.nwb", "a") as file:
        series = file["processing/ophys/Fluorescence/RoiResponseSeries"]
        del series["data"], series["rois"]
        series["data"] = values["RoiResponseSeries"][:, 0]
    np.testing.assert_array_equal(read(tmp_path / "a.nwb").values, values["RoiResponseSeries"][:, :1].T)


def test_neuropil_in_a_container_of_its_own(tmp_path):
    series = {"plane0": {}, "Neuropil": {"container": "Elsewhere"}, "Background": {"container": "Neuropil"}}
    make_recording(tmp_path / "a.nwb", **series)
    assert "neuropil" not in read(tmp_path / "a.nwb").provenance  # neither is of this plane by its name
    with h5py.File(tmp_path / "a.nwb", "r+") as file:
        file["processing/ophys/Neuropil"].move("Background", "plane0")
    assert read(tmp_path / "a.nwb").provenance["neuropil"] == "processing/ophys/Neuropil/plane0"


@pytest.mark.parametrize(("dtype", "exact"), [("i2", True), ("u1", True), ("f8", False)])
def test_numbers_of_all_kinds(tmp_path, dtype, exact):
    values = make_recording(tmp_path / "a.nwb", F={"dtype": dtype})["F"].T
    assert read(tmp_path / "a.nwb").values.dtype == np.float32
    np.testing.assert_allclose(read(tmp_path / "a.nwb").values, values, rtol=0 if exact else 1e-6)


def test_units_are_believed(tmp_path):
    percent = {"container": "DfOverF", "unit": "percent", "conversion": 2.0, "offset": 10.0}
    values = make_recording(tmp_path / "a.nwb", a=percent)["a"].T
    np.testing.assert_allclose(read(tmp_path / "a.nwb").values, (values * 2 + 10) / 100, rtol=1e-5)


def test_missing_frames_stay_missing(tmp_path):
    data = np.ones((45, 3))
    data[4:6, 1] = np.nan
    make_recording(tmp_path / "a.nwb", F={"data": data})
    valid = np.ones((3, 45), bool)
    valid[1, 4:6] = False
    np.testing.assert_array_equal(read(tmp_path / "a.nwb").valid, valid)


def test_series_that_are_stored_the_wrong_way_round_are_turned(tmp_path):
    data = np.random.default_rng(2).random((3, 45)).astype("f4")
    make_recording(tmp_path / "a.nwb", F={"data": data})
    np.testing.assert_array_equal(read(tmp_path / "a.nwb").values, data)
    np.testing.assert_array_equal(open_traces(tmp_path / "a.nwb").select([0, 2]).values, data[[0, 2]])


def test_evenly_spaced_time_stamps_are_a_frame_rate(tmp_path):
    make_recording(tmp_path / "a.nwb", clock=3.5 + np.arange(45) / 20)
    traces = read(tmp_path / "a.nwb")
    assert (traces.frame_rate, traces.t0) == (pytest.approx(20), 3.5)


def test_uneven_time_stamps_and_a_rate_that_is_given_begin_where_they_begin(tmp_path):
    make_recording(tmp_path / "a.nwb", clock=np.r_[3.5 + np.arange(44) / 20, 60.0], F={})
    traces = read(tmp_path / "a.nwb", 20.0)
    assert (traces.frame_rate, traces.t0) == (20.0, 3.5)


def test_of_the_session_and_its_subject_all_is_kept(recorded):
    assert read(recorded).provenance["session"] == {
        "identifier": "mouse-7",
        "session_start_time": "2024-03-04T05:06:07+00:00",
        "session_description": "A mouse looks at gratings.",
        "subject": {"subject_id": "mouse-7", "species": "Mus musculus", "sex": "F", "age": "P90D"},
    }


def test_rows_larger_than_a_block_are_read_all_the_same(recorded, monkeypatch):
    whole = read(recorded).values
    monkeypatch.setattr(nwb, "BLOCK_BYTES", 1)
    np.testing.assert_array_equal(read(recorded).values, whole)


def test_without_a_clock_time_begins_at_zero(recorded, tmp_path):
    path = shutil.copy(recorded, tmp_path / "a.nwb")
    with h5py.File(path, "r+") as file:
        del file["processing/ophys/Fluorescence/RoiResponseSeries/starting_time"]
    assert read(path, 10.0).t0 == 0.0


def test_without_a_factor_numbers_are_as_they_are(recorded, tmp_path):
    path = shutil.copy(recorded, tmp_path / "a.nwb")
    with h5py.File(path, "r+") as file:
        del file["processing/ophys/Fluorescence/RoiResponseSeries/data"].attrs["conversion"]
    np.testing.assert_array_equal(read(path).values, read(recorded).values)


def test_pixels_of_no_weight_are_no_part_of_a_roi(recorded, tmp_path):
    path = shutil.copy(recorded, tmp_path / "a.nwb")
    with h5py.File(path, "r+") as file:
        masks = file["processing/ophys/ImageSegmentation/PlaneSegmentation/image_mask"]
        masks[0, 8, 7] = -0.5
    assert [len(pixels) for pixels in read(path).rois.pixels] == [2, 2, 2]


@pytest.mark.parametrize("name", ["Accepted", "accepted", "iscell", "is_cell", "Rejected", "quality"])
def test_judgements_by_their_usual_names(recorded, tmp_path, name):
    path = shutil.copy(recorded, tmp_path / "a.nwb")
    with h5py.File(path, "r+") as file:
        table = file["processing/ophys/ImageSegmentation/PlaneSegmentation"]
        del table["iscell"]
        table[name] = np.array([1, 0, 1, 0])
    found = read(path).accepted  # of rows 3, 0 and 2
    expected = {"Rejected": [True, False, False], "quality": None}.get(name, [False, True, True])
    assert expected == (None if found is None else found.tolist())


@pytest.mark.parametrize("n_frames", [2, 6])
def test_a_movie_with_even_time_stamps_has_their_rate(tmp_path, n_frames):
    file = a_session()
    series = {"unit": "n.a.", "imaging_plane": a_plane(file), "timestamps": 3 + np.arange(n_frames) / 4}
    data = np.zeros((n_frames, 4, 5), "f4")
    file.add_acquisition(pynwb.ophys.TwoPhotonSeries(name="Series", description="Movie.", data=data, **series))
    with pynwb.NWBHDF5IO(str(tmp_path / "a.nwb"), "w") as io:
        io.write(file)
    assert formats.read_movie(tmp_path / "a.nwb")[1] == pytest.approx(4.0)


def test_a_movie_whose_time_stamps_are_uneven_says_so(tmp_path):
    file = a_session()
    series = {"unit": "n.a.", "imaging_plane": a_plane(file), "timestamps": np.r_[np.arange(5) / 4, 9.0]}
    data = np.zeros((6, 4, 5), "f4")
    file.add_acquisition(pynwb.ophys.TwoPhotonSeries(name="Series", description="Movie.", data=data, **series))
    with pynwb.NWBHDF5IO(str(tmp_path / "a.nwb"), "w") as io:
        io.write(file)
    with pytest.raises(RecordingError, match="expected evenly spaced frames"):
        nwb.open_movie(tmp_path / "a.nwb")


def test_of_several_movies_one_with_two_photons_is_taken(tmp_path):
    file = a_session()
    plane = a_plane(file)
    for name, kind, value in (("A", "OnePhotonSeries", 1), ("B", "TwoPhotonSeries", 2), ("C", "TwoPhotonSeries", 3)):
        series = {"unit": "n.a.", "imaging_plane": plane, "rate": 4.0}
        data = np.full((6, 4, 5), value, "f4")
        file.add_acquisition(getattr(pynwb.ophys, kind)(name=name, description="Movie.", data=data, **series))
    with pynwb.NWBHDF5IO(str(tmp_path / "a.nwb"), "w") as io:
        io.write(file)
    assert (nwb.open_movie(tmp_path / "a.nwb")[0] == 2).all().compute()


def test_rows_stay_in_the_file_until_they_are_wanted(tmp_path, monkeypatch):
    values = np.random.default_rng(0).random((70, 1000)).astype("f4")
    write(Traces(values, 30.0), tmp_path / "a.nwb")
    monkeypatch.setattr(nwb, "BLOCK_BYTES", 20_000)  # several blocks of frames
    source = pickle.loads(pickle.dumps(open_traces(tmp_path / "a.nwb")))
    assert (source.n_rois, source.n_frames, source.chunk_rows) == (70, 1000, 64)
    np.testing.assert_array_equal(source.select([3, 65, 69]).values, values[[3, 65, 69]])
    np.testing.assert_array_equal(source.load().values, values)
    assert source.fetch(np.array([], int)).shape == (0, 1000)


def test_reading_does_not_load_pynwb(written):
    code = f"import sys, napari_calvae as c; c.read({str(written)!r}); print({{'pynwb', 'torch'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# Movies


def test_a_movie_is_opened_without_being_loaded(recorded):
    movie, rate = nwb.open_movie(recorded)
    with h5py.File(recorded) as file:
        stored = file["acquisition/TwoPhotonSeries/data"][:]
    assert (movie.shape, movie.dtype, rate) == ((45, 8, 9), np.uint16, 10)
    np.testing.assert_array_equal(movie.compute(), stored.transpose(0, 2, 1))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(movie))[7].compute(), stored[7].T)
    np.testing.assert_array_equal(movie[3:9:2, 2:4, 1].compute(), stored.transpose(0, 2, 1)[3:9:2, 2:4, 1])


def test_frames_are_read_in_whole_chunks_of_the_file(recorded, tmp_path):
    path = shutil.copy(recorded, tmp_path / "a.nwb")
    with h5py.File(path, "r+") as file:
        series = file["acquisition/TwoPhotonSeries"]
        stored, about = series["data"][:], dict(series["data"].attrs)
        del series["data"]
        series.create_dataset("data", data=stored, chunks=(4, 9, 3), compression="gzip").attrs.update(about)
        frames = nwb._Frames(path, series.name, series["data"])
    movie, _ = nwb.open_movie(path)
    np.testing.assert_array_equal(movie.compute(), stored.transpose(0, 2, 1))
    for key in ((slice(3, 9, 2), slice(2, 4), 1), 7, (slice(0, 4), slice(0, 3)), (2, 3, 4)):
        np.testing.assert_array_equal(frames[key], stored.transpose(0, 2, 1)[key])


@pytest.mark.parametrize("volume", [False, True])
def test_one_photon_movies_and_volumes(tmp_path, volume):
    file = a_session()
    data = np.arange(3 * 4 * 5 * 2, dtype="f4").reshape((3, 4, 5, 2) if volume else (6, 4, 5))
    series = {"unit": "n.a.", "imaging_plane": a_plane(file), "timestamps": np.arange(len(data)) / 4}
    kind = pynwb.ophys.TwoPhotonSeries if volume else pynwb.ophys.OnePhotonSeries
    file.add_acquisition(kind(name="Series", description="Movie.", data=data, **series))
    with pynwb.NWBHDF5IO(str(tmp_path / "a.nwb"), "w") as io:
        io.write(file)
    assert is_movie(tmp_path / "a.nwb")
    movie, rate = nwb.open_movie(tmp_path / "a.nwb")
    np.testing.assert_array_equal(movie.compute(), data.transpose(0, 3, 2, 1) if volume else data.transpose(0, 2, 1))
    assert rate == 4


def with_external(tmp_path, *names):
    file = a_session()
    outside = {"external_file": list(names), "format": "external", "starting_frame": [4 * i for i in range(len(names))]}
    file.add_acquisition(
        pynwb.ophys.TwoPhotonSeries(
            name="Series",
            description="Movie.",
            unit="n.a.",
            imaging_plane=a_plane(file),
            timestamps=np.arange(8) / 8,
            **outside,
        )
    )
    with pynwb.NWBHDF5IO(str(tmp_path / "a.nwb"), "w") as io:
        io.write(file)
    return tmp_path / "a.nwb"


def test_movies_beside_the_file_are_followed(tmp_path):
    (tmp_path / "raw").mkdir()
    stack = np.random.default_rng(0).integers(0, 99, (8, 6, 5)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "raw/1.tif", stack[:4], photometric="minisblack")
    tifffile.imwrite(tmp_path / "raw/2.tif", stack[4:], photometric="minisblack")
    movie, rate = nwb.open_movie(with_external(tmp_path, "raw/1.tif", "raw/2.tif"))
    np.testing.assert_array_equal(np.asarray(movie), stack)
    assert rate == 8
    with pytest.raises(FileNotFoundError, match=r"gone\.tif: expected a file"):
        nwb.open_movie(with_external(tmp_path, "gone.tif"))
    with pytest.raises(RecordingError, match=r"frames in the file or in TIFF files, got a\.avi"):
        nwb.open_movie(with_external(tmp_path, "a.avi"))


def test_a_file_without_a_movie_says_so(written):
    with pytest.raises(RecordingError, match=r"new\.nwb: expected a TwoPhotonSeries or OnePhotonSeries, found none"):
        nwb.open_movie(written)


# Adding to a file


def test_a_result_is_added_to_the_file_it_came_from(recorded, tmp_path):
    path = shutil.copy(recorded, tmp_path / "a.nwb")
    before = contents(path)
    traces = read(path)
    result = dataclasses.replace(a_result(3, 45), traces=traces.replace(unit="dff"))
    part = dataclasses.replace(a_result(2, 45), traces=traces.select([0, 2]).replace(unit="dff"))
    for each, rows in ((result, [3, 0, 2]), (part, [3, 2])):
        shutil.copy(recorded, path)
        write(each, path, append=True)
        if each is result:
            assert findings(path) == []
        after = contents(path)
        assert {name: after[name] for name in before} == before
        with pynwb.NWBHDF5IO(str(path), "r") as io:
            file = io.read()
            assert (file.identifier, file.subject.subject_id) == ("mouse-7", "mouse-7")
            ophys = file.processing["ophys"]
            # The file has a series Deconvolved of its own.
            series = ophys["Fluorescence"]["SpikeRate"]
            np.testing.assert_array_equal(series.data[:].T, each.rate)
            np.testing.assert_array_equal(series.rois.data[:], rows)
            assert series.rois.table is ophys["ImageSegmentation"]["PlaneSegmentation"]
            assert list(ophys["SpikeInference"].id[:]) == list(each.roi_ids)
            np.testing.assert_array_equal(ophys["SpikeInference"]["roi"].data[:], rows)
        assert [file.name for file in tmp_path.iterdir()] == ["a.nwb"]
    np.testing.assert_array_equal(read(path).values, traces.values)  # traces are what they were


def contents(path):
    """Bytes of every dataset of a file."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: found.update({name: repr(item[()])}) if isinstance(item, h5py.Dataset) else None
        )
    return found


def test_what_was_added_is_read_by_the_others(tmp_path):
    path = tmp_path / "a.nwb"
    make_recording(path, RoiResponseSeries={"container": "DfOverF"})
    result = dataclasses.replace(a_result(3, 45), traces=read(path))
    write(result, path, append=True)
    nap = pytest.importorskip("pynapple")
    file = nap.load_file(str(path))
    np.testing.assert_array_equal(file["Deconvolved"].d[:], result.rate.T)
    file.close()
    found = pytest.importorskip("roiextractors").NwbSegmentationExtractor(path)
    np.testing.assert_array_equal(found.get_traces(name="deconvolved").T, result.rate)
    del found
    gc.collect()


def test_nothing_is_added_twice_or_to_the_wrong_file(result, written, recorded, tmp_path):
    path = shutil.copy(written, tmp_path / "a.nwb")
    content = path.read_bytes()
    with pytest.raises(RecordingError, match=r"a\.nwb: expected a file without a result, got.*SpikeInference already"):
        write(result, path, append=True)
    with pytest.raises(RecordingError, match=r"without the ROIs \[5, 7\]\. Write a new file"):
        write(result, recorded, append=True)
    short = placed_result(20)
    with pytest.raises(RecordingError, match=r"20 frames, got one of 45 frames"):
        write(short, path, append=True)
    with pytest.raises(RecordingError, match="expected a result of inference, got traces"):
        write(result.traces, path, append=True)
    with pytest.raises(FileNotFoundError):
        write(result, tmp_path / "none.nwb", append=True)
    with pytest.raises(FileExistsError):
        write(result, path)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["a.nwb"]


def test_what_cannot_be_added_is_told_before_it_is_inferred(result, written, recorded, tmp_path, monkeypatch):
    with pytest.raises(RecordingError, match=r"expected a file without a result, got.*SpikeInference already"):
        check_result(written, append=True)
    with pytest.raises(RecordingError, match=r"without the ROIs \[5, 7\]\. Write a new file"):
        check_result(recorded, append=True, traces=result.traces)
    with pytest.raises(RecordingError, match=r"20 frames, got one of 45 frames"):
        check_result(recorded, append=True, traces=open_traces(recorded).load().replace(values=np.ones((3, 20))))
    check_result(recorded, append=True, traces=open_traces(recorded))
    (tmp_path / "b.nwb").write_bytes(b"junk")
    with pytest.raises(RecordingError, match=r"b\.nwb: expected a whole NWB file"):
        check_result(tmp_path / "b.nwb", append=True)
    monkeypatch.setitem(sys.modules, "pynwb", None)
    for append in (False, True):
        with pytest.raises(RecordingError, match="pynwb: expected to be installed"):
            check_result(recorded if append else tmp_path / "c.nwb", append=append)


@pytest.mark.parametrize("append", [False, True])
def test_a_full_disk_leaves_what_was_there(result, recorded, tmp_path, monkeypatch, append):
    path = shutil.copy(recorded, tmp_path / "a.nwb")
    content = path.read_bytes()
    if append:
        result = dataclasses.replace(a_result(3, 45), traces=read(path).replace(unit="dff"))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pynwb.NWBHDF5IO, "write", full)
    with pytest.raises(OSError, match="No space left"):
        write(result, path, overwrite=not append, append=append)
    assert path.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["a.nwb"]


def test_a_new_file_about_traces_of_an_nwb_file_names_its_session(recorded, tmp_path):
    write(read(recorded), tmp_path / "b.nwb")
    with pynwb.NWBHDF5IO(str(tmp_path / "b.nwb"), "r") as io:
        file = io.read()
        assert file.session_start_time == datetime.datetime(2024, 3, 4, 5, 6, 7, tzinfo=datetime.UTC)
        assert (file.subject.species, file.subject.age) == ("Mus musculus", "P90D")
        assert file.session_description == "A mouse looks at gratings."
        assert file.identifier != "mouse-7"  # it is another file


def test_a_file_that_breaks_the_standard_is_not_added_to(recorded, tmp_path):
    path = shutil.copy(recorded, tmp_path / "a.nwb")
    with h5py.File(path, "r+") as file:
        del file["session_start_time"]
    content = path.read_bytes()
    result = dataclasses.replace(a_result(3, 45), traces=read(path).replace(unit="dff"))
    with pytest.raises(RecordingError, match=r"a\.nwb: expected an NWB file that pynwb can add to"):
        write(result, path, append=True)
    assert path.read_bytes() == content


# Bad input


@pytest.mark.parametrize(
    ("name", "content"), [("a.nwb", b"junk"), ("a.nwb", b""), ("a.nwb", b"\x89HDF\r\n\x1a\n" + bytes(100))]
)
def test_what_is_no_nwb_file_is_said_plainly(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecordingError, match=r"a\.nwb: expected a whole NWB file, got one that cannot be read"):
        read(tmp_path / name)
    with pytest.raises(RecordingError, match=r"a\.nwb: expected a whole NWB file"):
        nwb.open_movie(tmp_path / name)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_files_cut_short(recorded, tmp_path, share):
    content = recorded.read_bytes()
    (tmp_path / "a.nwb").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(RecordingError, match=r"a\.nwb: expected a whole NWB file"):
        read(tmp_path / "a.nwb")


def test_hdf5_of_another_kind(tmp_path):
    with h5py.File(tmp_path / "a.nwb", "w") as file:
        file["dff"] = np.ones((2, 9))
    with pytest.raises(RecordingError, match=r"expected an NWB 2 file, got HDF5 of another kind.*\.h5"):
        read(tmp_path / "a.nwb")
    with h5py.File(tmp_path / "b.nwb", "w") as file:
        file["nwb_version"] = "NWB-1.0.6"
    with pytest.raises(RecordingError, match="expected an NWB 2 file, got one of NWB 1"):
        read(tmp_path / "b.nwb")
    (tmp_path / "c.nwb").mkdir()
    with pytest.raises(RecordingError, match=r"expected an NWB file .*, got a folder"):
        read(tmp_path / "c.nwb")


def put(series, name, value):
    about = dict(series[name].attrs)
    del series[name]
    series[name] = value
    series[name].attrs.update(about)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda s: s.__delitem__("starting_time"), r"frame_rate: expected .*got none"),
        (lambda s: s["starting_time"].attrs.__setitem__("rate", 0.0), r"frame_rate: expected .*got none"),
        (lambda s: s["starting_time"].attrs.__setitem__("rate", np.nan), r"frame_rate: expected .*got none"),
        (lambda s: s.__delitem__("data"), r"expected a RoiResponseSeries of ΔF/F or fluorescence, got \['proc.*--rois"),
        (lambda s: put(s, "data", np.array([b"a"] * 3)), r"expected numbers \(time, roi\).*dtype \|S1"),
        (lambda s: put(s, "data", np.zeros((4, 3, 2))), r"expected numbers \(time, roi\).*got shape \(4, 3, 2\)"),
        (lambda s: put(s, "data", np.zeros((45, 4))), "expected one column per ROI .*got 4 columns for 3 ROIs"),
        (lambda s: put(s, "rois", np.array([0, 1, 77])), "expected a whole NWB file.*77"),
        (lambda s: put(s, "rois", np.array([0, 1, 1])), "ROIs: expected one id.*all ids different; got 3 ROIs, 2 ids"),
    ],
)
def test_series_that_contradict_themselves(recorded, tmp_path, action, message):
    path = shutil.copy(recorded, tmp_path / "a.nwb")
    with h5py.File(path, "r+") as file:
        action(file["processing/ophys/Fluorescence/RoiResponseSeries"])
    with pytest.raises(RecordingError, match=message):
        read(path)


def test_series_that_do_not_name_their_rois_are_read(recorded, tmp_path):
    path = shutil.copy(recorded, tmp_path / "a.nwb")
    with h5py.File(path, "r+") as file:
        del file["processing/ophys/Fluorescence/RoiResponseSeries/rois"]
    traces = read(path)
    assert (traces.roi_ids, traces.rois, traces.accepted) == ((1, 2, 3), None, None)
    with pytest.raises(RecordingError, match="expected traces that name their ROIs"):
        write(dataclasses.replace(a_result(3, 45), traces=traces), path, append=True)


@pytest.mark.parametrize(
    ("clock", "message"),
    [
        (np.r_[np.arange(44), 60.0], r"a\.nwb: expected evenly spaced frames, got a step of 17 s"),
        (np.arange(44) / 10, "expected one time stamp per frame .*got 44 for 45 frames"),
        (np.zeros(45), r"a\.nwb: expected.*rises"),
        (np.full(45, np.nan), r"a\.nwb: expected.*rises"),
    ],
)
def test_clocks_that_are_no_frame_rate(tmp_path, clock, message):
    make_recording(tmp_path / "a.nwb", clock=np.arange(45.0), F={})
    with h5py.File(tmp_path / "a.nwb", "r+") as file:
        put(file["processing/ophys/Fluorescence/F"], "timestamps", clock)
    with pytest.raises(RecordingError, match=message):
        read(tmp_path / "a.nwb")
    if len(clock) == 45 and np.isfinite(clock).all():
        assert read(tmp_path / "a.nwb", 10.0).frame_rate == 10  # what is given is believed


def test_a_file_with_a_movie_but_no_traces(tmp_path):
    path = with_external(tmp_path, "a.tif")
    with pytest.raises(RecordingError, match=r"got none\. It holds a movie: extract traces from it first, with --rois"):
        read(path)


def test_a_file_without_permission(written, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(nwb.h5py, "File", refuse)
    with pytest.raises(PermissionError):
        read(written)


def test_without_pynwb_the_error_says_what_to_install(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynwb", None)
    with pytest.raises(RecordingError, match=r"pynwb: expected to be installed.*napari-calvae\[formats\]"):
        write(result, tmp_path / "a.nwb")
    assert list(tmp_path.iterdir()) == []


# A real recording


def test_from_suite2p_to_nwb_and_back(shared, tmp_path):
    traces = read(shared / "formats/suite2p").select(slice(0, 4))
    result = infer(traces, n_samples=4, seed=0, device="cpu")
    write(result, tmp_path / "a.nwb")
    assert findings(tmp_path / "a.nwb") == []
    back = read(tmp_path / "a.nwb")
    np.testing.assert_array_equal(back.values, result.traces.values)
    np.testing.assert_array_equal(back.accepted, traces.accepted)
    assert (back.roi_ids, back.frame_rate) == (traces.roi_ids, 30)
    same_rois(back.rois, traces.rois)
    write(traces, tmp_path / "b.nwb")
    write(result, tmp_path / "b.nwb", append=True)
    assert findings(tmp_path / "b.nwb") == []
    np.testing.assert_array_equal(read(tmp_path / "b.nwb").values, traces.values)
    file = pytest.importorskip("pynapple").load_file(str(tmp_path / "b.nwb"))
    np.testing.assert_array_equal(file["Deconvolved"].d[:], result.rate.T)
    file.close()


def test_nwb_is_a_format():
    assert formats.FORMATS["nwb"] is nwb
    assert formats.writer_of("a.nwb") is nwb
