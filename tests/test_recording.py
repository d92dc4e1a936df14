"""The values that everything else stands on: what they refuse, and what they compute."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import napari_calvae as calvae
from napari_calvae.recording import EVENT_DTYPE, RecordingError, SpikeInference, Traces
from napari_calvae.roi_masks import RoiMasks
from napari_calvae.trace_source import TraceSource


def a_result(n_rois: int = 2, n_frames: int = 40, n_samples: int = 3, seed: int = 0) -> SpikeInference:
    rng = np.random.default_rng(seed)
    dense = rng.poisson(0.2, (n_samples, n_rois, n_frames)).astype(np.uint8)
    sample, roi, frame = np.nonzero(dense)
    events = np.zeros(len(sample), EVENT_DTYPE)
    events["sample"], events["roi"], events["frame"], events["count"] = sample, roi, frame, dense[sample, roi, frame]
    events = events[np.lexsort((events["frame"], events["sample"], events["roi"]))]
    values = rng.standard_normal((n_rois, n_frames)).astype(np.float32)
    return SpikeInference(
        traces=Traces(values, 10.0, roi_ids=tuple(range(5, 5 + n_rois)), t0=2.0),
        rate=dense.mean(0, dtype=np.float32) * 10,
        events=events,
        n_samples=n_samples,
        reconstruction=values * 0.5,
        reconstruction_std=np.ones_like(values),
        theta={"amplitude": rng.random(n_rois)},
        quality=np.array([(0.5,)] * n_rois, dtype=[("explained", "f4")]),
        provenance={"seed": seed, "array": np.arange(2)},
    )


def test_importing_the_package_loads_neither_torch_nor_qt():
    code = "import sys, napari_calvae; print([m for m in ('torch', 'qtpy', 'napari', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_traces_are_frozen_float32_with_missing_frames_as_nan():
    traces = Traces([[1, 2, np.inf, 4]], frame_rate=2, valid=[[True, False, True, True]])
    assert traces.values.dtype == np.float32
    np.testing.assert_array_equal(traces.valid, [[True, False, False, True]])
    assert np.isnan(traces.values[0, 1:3]).all()
    np.testing.assert_array_equal(traces.times, [0, 0.5, 1, 1.5])
    with pytest.raises(ValueError, match="read-only"):
        traces.values[0, 0] = 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frame_rate": None}, "frame_rate: expected the frames per second.*got none.*--frame-rate"),
        ({"frame_rate": 0}, "frame_rate: expected a positive number.*got 0"),
        ({"values": np.zeros((2, 3, 4))}, r"expected an array \(roi, time\).*got shape \(2, 3, 4\)"),
        ({"values": np.zeros((2, 0))}, r"at least one ROI and one frame, got shape \(2, 0\)"),
        ({"values": np.array([["a"]])}, "expected real numbers, got dtype"),
        ({"unit": "percent"}, "unit: expected 'raw' or 'dff', got 'percent'"),
        ({"roi_ids": (1, 1)}, "roi_ids: expected 2 different integers"),
        ({"valid": np.ones(3)}, r"valid: expected shape \(2, 50\), got \(3,\)"),
    ],
)
def test_traces_refuse(arguments, message):
    with pytest.raises(RecordingError, match=message):
        Traces(**({"values": np.zeros((2, 50)), "frame_rate": 30.0} | arguments))


def test_label_images_and_masks_agree():
    labels = np.array([[0, 7, 7], [3, 0, 7]])
    rois = RoiMasks.from_labels(labels)
    assert rois.ids == (3, 7)
    np.testing.assert_array_equal(rois.to_labels(), labels)
    disc = RoiMasks.from_discs([(0, 0)], 3, (5, 5))
    np.testing.assert_array_equal(disc.pixels[0], [0, 1, 5, 6])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoiMasks.from_labels(np.zeros((4, 4), int)), "at least one label above 0"),
        (lambda: RoiMasks.from_labels(np.zeros((4, 4))), "expected integers, got dtype float64"),
        (lambda: RoiMasks.from_labels(np.zeros((2, 4, 4), int)), "expected two dimensions"),
        (lambda: RoiMasks((4, 4), ([],)), "ROI 1: expected at least one pixel.*got an empty ROI"),
        (lambda: RoiMasks.from_discs([(40, 40)], 3, (5, 5)), "ROI 1: expected at least one pixel.*5 × 5"),
        (lambda: RoiMasks((4, 4), ()), "expected at least one, got none"),
        (lambda: RoiMasks((4, 4), ([16],)), "ROI 1: expected pixels inside the image"),
    ],
)
def test_rois_refuse(make, message):
    with pytest.raises(RecordingError, match=message):
        make()


def test_dense_samples_windows_and_intervals_agree():
    result = a_result(n_frames=45)
    dense = result.samples()
    np.testing.assert_allclose(dense.mean(0) * 10, result.rate, rtol=1e-6)
    np.testing.assert_array_equal(result.samples([1])[:, 0], dense[:, 1])
    np.testing.assert_array_equal(result.window_counts(1.0), dense[..., :40].reshape(3, 2, 4, 10).sum(-1))
    expected = np.quantile(dense[..., :40].reshape(3, 2, 4, 10).sum(-1), [0.05, 0.95], axis=0)
    np.testing.assert_allclose(result.interval(0.9, 1.0), expected)


def test_blocks_join_to_the_whole():
    parts = [a_result(seed=1), a_result(n_rois=1, seed=2)]
    parts[1] = SpikeInference(**{**vars(parts[1]), "traces": parts[1].traces.replace(roi_ids=(40,))})
    whole = SpikeInference.concatenate(parts)
    assert whole.roi_ids == (5, 6, 40)
    np.testing.assert_array_equal(whole.samples()[:, :2], parts[0].samples())
    np.testing.assert_array_equal(whole.samples()[:, 2:], parts[1].samples())


@pytest.mark.parametrize(("level", "window"), [(1.0, 1.0), (0.9, 0.01), (0.9, 100.0)])
def test_intervals_refuse(level, window):
    with pytest.raises(RecordingError, match=r"level: expected|window: expected"):
        a_result().interval(level, window)


def some_traces(n_rois=5, n_frames=40):
    values = np.random.default_rng(0).standard_normal((n_rois, n_frames))
    rois = RoiMasks.from_discs([(4.0, 4.0 * k + 2) for k in range(n_rois)], 3.0, (9, 40))
    rois = RoiMasks(
        rois.shape, rois.pixels, tuple(range(7, 7 + n_rois)), rois.weights, tuple(k % 2 for k in range(n_rois))
    )
    return Traces(values, 10.0, "raw", rois.ids, 0.5, rois=rois, accepted=np.arange(n_rois) % 2 == 0)


def test_rois_and_judgements_travel_with_their_traces():
    traces = some_traces()
    part = traces.select([3, 0])
    assert part.rois.ids == part.roi_ids == (10, 7)
    assert part.rois.planes == (1, 0)
    assert part.accepted.tolist() == [False, True]
    np.testing.assert_array_equal(part.rois.pixels[0], traces.rois.pixels[3])
    whole = Traces.concatenate([traces.select([0, 1]), traces.select([2, 3, 4])])
    np.testing.assert_array_equal(whole.values, traces.values)
    assert whole.rois.ids == traces.roi_ids
    assert whole.rois.planes == traces.rois.planes
    assert whole.accepted.tolist() == traces.accepted.tolist()
    assert Traces.concatenate([traces.select([0]), traces.select([1]).replace(rois=None)]).rois is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rois": RoiMasks((3, 3), (np.array([0]),))}, "rois: expected the ROIs"),
        ({"accepted": [True, False]}, "accepted: expected one value per ROI, 5"),
    ],
)
def test_rois_and_judgements_that_do_not_fit(change, message):
    with pytest.raises(RecordingError, match=message):
        some_traces().replace(**change)


def test_rois_of_other_planes_cannot_be_joined():
    a = RoiMasks((3, 3), (np.array([0]),))
    with pytest.raises(RecordingError, match="expected planes of one shape"):
        RoiMasks.concatenate([a, RoiMasks((4, 3), (np.array([0]),))])
    with pytest.raises(RecordingError, match="2 planes"):
        RoiMasks((3, 3), (np.array([0]),), planes=(0, 1))


def test_a_source_gives_the_rows_that_are_asked_for():
    traces = some_traces()
    asked = []

    def fetch(rows):
        asked.append(rows.tolist())
        return traces.values[rows]

    names = ("frame_rate", "unit", "roi_ids", "t0", "rois", "accepted")
    source = TraceSource(fetch, 5, 40, **{name: getattr(traces, name) for name in names})
    assert not asked
    some = source.select([1, 4])
    np.testing.assert_array_equal(some.values, traces.values[[1, 4]])
    assert (some.roi_ids, some.rois.ids, some.accepted.tolist()) == ((8, 11), (8, 11), [False, True])
    part = source.part(slice(2, 4))
    assert asked == [[1, 4]]
    assert (part.n_rois, part.roi_ids, part.rois.ids) == (2, (9, 10), (9, 10))
    np.testing.assert_array_equal(part.load().values, traces.values[2:4])
    assert asked[-1] == [2, 3]
    np.testing.assert_array_equal(part.part(slice(1, 2)).load().values, traces.values[3:4])
    back = TraceSource.of(traces)
    np.testing.assert_array_equal(back.part(slice(1, 3)).load().values, traces.values[1:3])
    assert back.duration == traces.duration


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 10, 5.0), "at least one ROI and one frame"),
        ((2, 0, 5.0), "at least one ROI and one frame"),
        ((2, 10, None), "frame_rate: expected the frames per second"),
        ((2, 10, 5.0, "raw", (1, 1)), "1 different ids"),
    ],
)
def test_sources_that_cannot_be(arguments, message):
    with pytest.raises(RecordingError, match=message):
        TraceSource(lambda rows: rows, *arguments)


def test_rows_are_taken_as_numpy_takes_them():
    result = a_result(n_rois=4)
    whole = result.samples()
    assert len(np.unique(whole.sum((0, 2)))) == 4
    for rows in ([3, 0], (1,), [-1], np.array([False, False, True, True]), slice(1, 3), []):
        wanted = whole[:, list(rows) if isinstance(rows, tuple) else rows]
        np.testing.assert_array_equal(result.samples(rows), wanted)
    np.testing.assert_array_equal(result.events_of(-1), result.events_of(3))
    np.testing.assert_array_equal(result.traces.select((2, 0)).values, result.traces.values[[2, 0]])
    with pytest.raises(IndexError):
        result.samples([4])


def test_of_a_cell_that_was_not_inferred_nothing_is_known():
    result = a_result()
    rate = result.rate.copy()
    rate[1] = np.nan
    found = replace(result, rate=rate).interval(0.5, window=1.0)
    np.testing.assert_array_equal(found[:, 0], result.interval(0.5, window=1.0)[:, 0])
    assert np.isnan(found[:, 1]).all()


@pytest.mark.parametrize("frame_rate", [49.0, 98.0, 103.0, 107.0, 30.0])
def test_a_window_may_be_one_frame_whatever_the_rate(frame_rate):
    result = a_result(n_frames=200)
    result = replace(result, traces=Traces(result.traces.values, frame_rate))
    np.testing.assert_array_equal(result.window_counts(1 / frame_rate), result.samples())
    assert result.to_xarray(window=1 / frame_rate)["interval"].shape == (2, 2, 200)


def test_traces_and_results_survive_pickling_and_copying():
    result = a_result()
    for again in (pickle.loads(pickle.dumps(result)), copy.deepcopy(result)):
        assert again.traces.provenance == result.traces.provenance
        np.testing.assert_array_equal(again.traces.values, result.traces.values)
        np.testing.assert_array_equal(again.traces.valid, result.traces.valid)
        np.testing.assert_array_equal(again.samples(), result.samples())
    source = TraceSource.of(result.traces)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).load().values, result.traces.values)


@pytest.mark.parametrize("call", [calvae.infer, calvae.check, calvae.fit, calvae.refine, calvae.diagnose])
def test_a_plain_array_is_told_how_to_become_traces(call):
    with pytest.raises(RecordingError, match=r"expected napari_calvae\.Traces, got ndarray\. Wrap an array"):
        call(np.zeros((2, 300)))
    if call is calvae.infer:
        with pytest.raises(RecordingError, match=r"expected napari_calvae\.Traces, got list"):
            call([[0.0, 1.0]], out="never.zarr")
