"""Decisions of the plugin, without Qt."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from plugin_helpers import posterior_of

import napari_calvae as calvae
from napari_calvae._napari import answers, drawing, session


def test_decisions_know_neither_qt_nor_napari():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('qtpy', 'napari', 'pyqtgraph', 'torch')));"
        "from napari_calvae._napari import answers, drawing, session"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("metadata", "scale", "unit", "in_file", "hz"),
    [
        ({"frame_rate": 15}, 0.1, "second", 30.0, 15.0),
        ({}, 0.1, "second", 30.0, 30.0),
        ({}, 0.1, "second", None, 10.0),
        ({}, 100.0, "millisecond", None, 10.0),
        ({}, 0.1, "pixel", None, None),
        ({}, 1.0, "micrometer", None, None),
        ({"frame_rate": "fast"}, 1.0, "pixel", None, None),
        ({"frame_rate": -1}, 1.0, "pixel", float("nan"), None),
    ],
)
def test_frame_rate_is_found_or_unknown_never_guessed(metadata, scale, unit, in_file, hz):
    found = session.find_frame_rate(metadata, scale, unit, in_file)
    assert found.hz == (None if hz is None else pytest.approx(hz))


@pytest.mark.parametrize(("text", "hz"), [("30", 30.0), (" 7,5 Hz ", 7.5), ("1e2", 100.0)])
def test_typed_frame_rate(text, hz):
    assert session.typed_frame_rate(text) == hz


@pytest.mark.parametrize("text", ["", "  ", "fast", "0", "-3", "nan", "inf"])
def test_a_bad_frame_rate_gets_a_sentence(text):
    with pytest.raises(calvae.RecordingError, match=r"expected the imaging rate.*never guessed"):
        session.typed_frame_rate(text)


@pytest.mark.parametrize(("shape", "rgb"), [((40, 40), False), ((9, 2, 3, 40, 40), False), ((9, 40, 40), True)])
def test_only_planes_over_time_are_a_movie(shape, rgb):
    with pytest.raises(calvae.RecordingError, match=r"expected three dimensions \(time, y, x\)"):
        session.check_movie(shape, rgb)


def test_only_y_and_x_are_clicked_on():
    session.check_view((1, 2), 3)
    session.check_view((3, 2), 4)
    with pytest.raises(calvae.RecordingError, match=r"got axes \(0, 2\) of 3. Press “roll dimensions”"):
        session.check_view((0, 2), 3)


def test_labels_of_another_size_are_refused_and_axes_of_one_dropped():
    assert session.plane_of(np.ones((1, 1, 4, 5), int), (4, 5)).shape == (4, 5)
    with pytest.raises(calvae.RecordingError, match=r"4 × 5 pixels, got shape \(4, 6\)"):
        session.plane_of(np.ones((4, 6), int), (4, 5))


def test_the_roi_under_a_position_is_that_of_the_nearest_pixel():
    labels = np.zeros((4, 5), int)
    labels[1, 2] = 7
    assert session.roi_at(labels, (0.51, 2.49)) == 7
    assert session.roi_at(labels, (99, 1.4, 1.6)) == 7
    assert session.roi_at(labels, (0, 0)) is None
    assert session.roi_at(labels, (-0.6, 2)) is None
    assert session.roi_at(labels, (1, 4.6)) is None


def test_a_disc_leaves_other_rois_alone():
    labels = np.zeros((20, 20), int)
    labels[:, 10:] = 4
    y, x = session.disc_at(labels, (10, 9), 6)
    assert x.max() == 9
    assert ((y - 10) ** 2 + (x - 9) ** 2).max() <= 9
    with pytest.raises(calvae.RecordingError, match="free pixels"):
        session.disc_at(labels, (10, 15), 4)


def test_clock_between_seconds_and_slider():
    clock = session.Clock(frame_rate=20.0, n_frames=100, scale=0.05, translate=3.0)
    for frame in (0, 1, 57, 99):
        assert clock.seconds(3.0 + frame * 0.05) == pytest.approx(frame / 20)
        assert clock.point(frame / 20) == pytest.approx(3.0 + frame * 0.05)
    assert clock.point(-5) == 3.0
    assert clock.point(1e6) == pytest.approx(3.0 + 99 * 0.05)
    assert session.Clock(20.0, 100).point(0.26) == 5


def test_newest_request_wins():
    requests = answers.Requests()
    first, second = requests.new(), requests.new()
    assert not requests.wants(first)
    assert requests.wants(second)


def a_key(marks, plane=0, movie=1, **settings) -> answers.Key:
    return answers.Key(marks, plane, movie, answers.Settings(30.0, **settings))


def test_results_hold_for_the_rois_that_were_not_edited():
    traces = calvae.Traces(np.random.default_rng(0).normal(size=(3, 90)), 30.0, roi_ids=(4, 8, 2))
    result = posterior_of(traces, 5)
    kept = answers.Results()
    marks = {2: 20, 4: 40, 8: 80}
    kept.add(a_key(marks), result)
    one = kept.get(a_key(marks), 8)
    assert one.roi_ids == (8,)
    np.testing.assert_array_equal(one.samples()[:, 0], result.samples()[:, 1])
    np.testing.assert_array_equal(one.rate[0], result.rate[1])
    assert kept.get(a_key(marks), 99) is None
    assert kept.known(a_key({**marks, 8: 81})) == {2, 4} == set(kept.rows)
    assert kept.get(a_key({**marks, 8: 81}), 8) is None
    assert kept.known(a_key({4: 40})) == {4}
    assert kept.known(a_key(marks)) == {2, 4, 8}  # the edit was undone
    assert kept.known(a_key(marks, plane=3)) == set()
    kept.add(a_key({8: 1}, plane=3), posterior_of(traces.select([1]), 5))
    assert kept.known(a_key(marks)) == {2, 4, 8}
    for other in (a_key(marks, movie=2), a_key(marks, n_samples=7), a_key(marks, amplitude=0.2)):
        assert kept.known(other) == set()
    kept.add(a_key(marks, movie=2), result)
    assert kept.known(a_key(marks)) == set()
    assert kept.known(a_key(marks, movie=2)) == {2, 4, 8}
    kept.forget()
    assert kept.known(a_key(marks, movie=2)) == set()


def test_results_of_erased_rois_are_not_kept_for_ever():
    kept, traces = answers.Results(), calvae.Traces(np.random.default_rng(0).normal(size=(2, 90)), 30.0)
    kept.add(a_key({1: 10, 2: 20}), posterior_of(traces, 5))
    kept.add(a_key({1: 1}, plane=3), posterior_of(traces.select([0]), 5))
    assert kept.known(a_key({1: 10})) == {1}
    kept.add(a_key({1: 11}), posterior_of(traces.select([0]), 5))  # 2 was erased, 1 edited and inferred again
    assert kept.known(a_key({1: 11, 2: 20})) == {1}
    assert kept.known(a_key({1: 1}, plane=3)) == {1}


def test_an_answer_to_an_older_question_is_no_result_for_edited_rois():
    result = posterior_of(calvae.Traces(np.random.default_rng(0).normal(size=(2, 90)), 30.0), 5)
    kept = answers.Results()
    now = a_key({1: 11, 2: 12})
    assert kept.known(now) == set()
    kept.add(a_key({1: 11, 2: 22}), result)
    assert kept.key == now
    assert set(kept.rows) == {1}


def test_any_edit_changes_the_fingerprint():
    a = np.arange(6).reshape(2, 3)
    marks = {session.fingerprint(x, 1) for x in (a, a.reshape(3, 2), a.astype("f4"), a + 1)}
    assert len(marks | {session.fingerprint(a, 2)}) == 5
    assert session.fingerprint(a, 1) == session.fingerprint(a.copy(), 1)


def test_answers_come_step_by_step(network, movie, labels):
    request = answers.Request(
        3, movie, calvae.RoiMasks.from_labels(labels), (2, 3), answers.Settings(20.0, n_samples=7)
    )
    messages = list(answers.iter_answers(request))
    fractions = [m.fraction for m in messages if isinstance(m, answers.Progress)]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    got = [m.inference.roi_ids for m in messages if isinstance(m, answers.Answer)]
    assert got == [(2,), (3,)]


@pytest.mark.parametrize(
    ("shape", "frame_rate", "words"), [((10, 40, 40), 20.0, "one second"), ((50, 40, 41), 20.0, "40 × 41")]
)
def test_errors_come_as_a_sentence(network, labels, shape, frame_rate, words):
    request = answers.Request(
        1, np.ones(shape), calvae.RoiMasks.from_labels(labels), (1,), answers.Settings(frame_rate)
    )
    failure = list(answers.iter_answers(request))[-1]
    assert isinstance(failure, answers.Failure)
    assert "expected" in failure.sentence
    assert words in failure.sentence


def test_unexpected_errors_say_so():
    assert "Unexpected KeyError" in session.explain(KeyError("x"))
    assert "memory" in session.explain(MemoryError())


# Drawing


@pytest.fixture(scope="module")
def picture() -> calvae.SpikeInference:
    rng = np.random.default_rng(0)
    values = rng.normal(size=5000)
    values[1000:1100] = np.nan
    return posterior_of(calvae.Traces(values, 30.0, t0=2.0), 20)


def test_columns_cover_what_is_in_view(picture):
    columns = drawing.columns(picture.traces, (12.0, 112.0), 100)
    assert columns.boundaries[0] <= 12.0
    assert columns.boundaries[-1] >= 112.0
    assert len(columns.edges) <= 103
    near = drawing.columns(picture.traces, (12.0, 13.0), 1000)
    assert set(np.diff(near.edges)) == {1}
    np.testing.assert_allclose(near.centres, picture.traces.times[near.first : near.last])
    beyond = drawing.columns(picture.traces, (1e4, 2e4), 50)
    assert (beyond.first, beyond.last) == (0, 5000)


def test_a_column_keeps_its_extremes(picture):
    values = picture.traces.values[0]
    columns = drawing.columns(picture.traces, (0.0, 170.0), 37)
    low, high = drawing.extremes(values, columns)
    for i, (a, b) in enumerate(zip(columns.edges[:-1], columns.edges[1:], strict=True)):
        part = values[a:b][np.isfinite(values[a:b])]
        assert (low[i], high[i]) == (
            (part.min(), part.max()) if len(part) else (pytest.approx(np.nan, nan_ok=True),) * 2
        )
    x, y = drawing.curve(values, columns)
    assert len(x) == len(y) == 2 * len(low)
    assert np.nanmax(y) == np.nanmax(values)


def test_no_spike_is_lost_in_the_raster(picture):
    columns = drawing.columns(picture.traces, (0.0, 170.0), 37)
    image = drawing.raster(picture.events, 20, columns)
    dense = picture.samples()[:, 0]
    expected = np.add.reduceat(dense, columns.edges[:-1], axis=1) > 0
    np.testing.assert_array_equal(image > 0, expected)


def test_the_band_is_the_credible_interval_of_the_rate(picture):
    columns = drawing.columns(picture.traces, (0.0, 170.0), 200)
    band = drawing.band(picture, columns, 1.0)
    low, high = picture.interval(0.9, 1.0)[:, 0]
    np.testing.assert_allclose(band.low, low)
    np.testing.assert_allclose(band.high, high)
    np.testing.assert_allclose(band.mean, picture.rate[0][: 30 * len(low)].reshape(-1, 30).mean(1), rtol=1e-5)
    part = drawing.band(picture, drawing.columns(picture.traces, (50.0, 60.0), 200), 1.0)
    start = round(part.boundaries[0] + 0.5 / 30 - 2.0)
    np.testing.assert_allclose(part.high, high[start : start + len(part.high)])
    assert drawing.band(picture, columns, 1000.0) is None


@pytest.mark.parametrize(
    ("seconds", "width", "rate", "window"), [(1800, 900, 30, 10), (10, 900, 30, 0.1), (10, 900, 7.5, 4 / 7.5)]
)
def test_the_bands_window_fits_zoom_and_frames(seconds, width, rate, window):
    assert drawing.band_window(seconds, width, rate) == pytest.approx(window)


def test_outlines_close_around_the_mask():
    mask = np.zeros((9, 9), bool)
    mask[2:6, 3:5] = True
    (loop,) = drawing.outlines(mask)
    np.testing.assert_allclose(loop.min(axis=0), (1.5, 2.5))
    np.testing.assert_allclose(loop.max(axis=0), (5.5, 4.5))
    mask[7, 7] = True
    assert len(drawing.outlines(mask)) == 2


def test_one_roi_is_read_as_if_all_were(movie, labels):
    every = calvae.extract(movie, labels, 20.0)
    one = calvae.extract(movie, labels, 20.0, wanted=(3, 1))
    assert one.roi_ids == (3, 1)
    np.testing.assert_allclose(one.values, every.values[[2, 0]], rtol=1e-5)
    with pytest.raises(calvae.RecordingError, match="wanted"):
        calvae.extract(movie, labels, 20.0, wanted=(9,))
