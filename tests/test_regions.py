"""Marks of ROIs against the traces that they stand for, and clicks against cells whose place is known."""

from __future__ import annotations

import numpy as np
import pytest

from napari_calvae.preprocess import correlation_peak, extract, local_correlation, roi_marks
from napari_calvae.recording import RecordingError
from napari_calvae.roi_masks import RoiMasks


def some_labels(seed=0, size=96, n=20):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    image = np.zeros((size, size), np.int32)
    for roi in range(1, n + 1):
        cy, cx = rng.uniform(4, size - 4, 2)
        image[(y - cy) ** 2 + (x - cx) ** 2 <= 12] = roi
    return image


@pytest.mark.parametrize("neuropil", [0.0, 0.7])
def test_a_mark_stays_as_long_as_the_trace_does(neuropil):
    rng = np.random.default_rng(1)
    movie = rng.normal(100, 3, (40, 96, 96))
    labels = some_labels()
    before, traces = roi_marks(RoiMasks.from_labels(labels), neuropil > 0), extract(movie, labels, 20.0)
    kept = 0
    for _ in range(15):
        edited = labels.copy()
        y, x = rng.integers(0, 90, 2)
        edited[y : y + 3, x : x + 3] = rng.choice([0, 5, 30])
        masks = RoiMasks.from_labels(edited)
        after = roi_marks(masks, neuropil > 0)
        kwargs = {"neuropil_coefficient": neuropil}
        traces, now = extract(movie, labels, 20.0, **kwargs), extract(movie, edited, 20.0, **kwargs)
        for roi in set(before) & set(after):
            same = np.array_equal(traces.values[traces.index(roi)], now.values[now.index(roi)])
            if before[roi] == after[roi]:
                assert same
                kept += 1
            elif not neuropil:
                assert not same
    assert kept > 15 * len(before) / 4


def test_marks_depend_on_weights_but_not_on_order_or_other_ids():
    pixels = (np.array([3, 4, 5]), np.array([40, 41]))
    one = roi_marks(RoiMasks((10, 10), pixels, (1, 2)))
    other = roi_marks(RoiMasks((10, 10), (pixels[1], pixels[0][::-1]), (8, 9)))
    assert (one[1], one[2]) == (other[9], other[8])
    weighted = roi_marks(RoiMasks((10, 10), pixels, (1, 2), (np.array([1, 1, 0.5]), np.ones(2))), neuropil=False)
    plain = roi_marks(RoiMasks((10, 10), pixels, (1, 2)), neuropil=False)
    assert weighted[1] != plain[1]
    assert weighted[2] == plain[2]


def test_local_correlation_equals_the_plain_loop():
    rng = np.random.default_rng(2)
    frames = rng.normal(size=(50, 6, 7)) + rng.normal(size=(50, 1, 1))
    got = local_correlation(frames)
    for y, x in ((0, 0), (2, 3), (5, 1)):
        near = [
            (a, b)
            for a in range(max(y - 1, 0), min(y + 2, 6))
            for b in range(max(x - 1, 0), min(x + 2, 7))
            if (a, b) != (y, x)
        ]
        expected = np.mean([np.corrcoef(frames[:, y, x], frames[:, a, b])[0, 1] for a, b in near])
        assert got[y, x] == pytest.approx(expected, abs=1e-5)


def test_dead_and_missing_pixels_are_correlated_with_nothing():
    frames = np.full((30, 5, 5), 7.0)
    frames[:, 2] = np.nan
    np.testing.assert_array_equal(local_correlation(frames), 0)


def a_recording(centre, diameter, n_frames=3000, size=60):
    """Noise with one active cell."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:size, :size]
    cell = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= (diameter / 2) ** 2
    signal = np.convolve(rng.random(n_frames) < 0.03, np.exp(-np.arange(60) / 12))[:n_frames]
    return (rng.normal(100, 8, (n_frames, size, size)) + 20 * signal[:, None, None] * cell).astype(np.float32)


@pytest.mark.parametrize("centre", [(30, 31), (4, 5), (57, 30)])
def test_a_click_next_to_the_middle_of_a_cell_finds_its_middle(centre):
    movie = a_recording(centre, 10)
    for dy, dx in ((0, 0), (3, -3), (-4, 2), (0, 5)):
        click = np.clip(np.add(centre, (dy, dx)), 0, 59)
        peak = correlation_peak(movie, click, 10)
        assert np.hypot(*np.subtract(peak, centre)) <= 2.5, click  # a quarter of the diameter


def test_far_from_cells_a_click_stays_near_and_inside():
    movie = a_recording((30, 30), 10)
    for click in ((5.2, 5.4), (59.4, -0.4)):
        peak = correlation_peak(movie, click, 10)
        assert np.hypot(*np.subtract(peak, click)) <= 10
    assert correlation_peak(np.ones((50, 20, 20)), (5.3, 7.7), 6) == (5.3, 7.7)
    with pytest.raises(RecordingError, match="diameter: expected a positive number"):
        correlation_peak(movie, (3, 3), 0)


def test_only_a_window_of_some_frames_is_read():
    class Counting:
        shape, asked = (54_000, 512, 512), None

        def __getitem__(self, key):
            self.asked = np.zeros(self.shape[:1], bool)[key[0]].size, *(part.stop - part.start for part in key[1:])
            return np.random.default_rng(0).normal(size=self.asked)

    movie = Counting()
    correlation_peak(movie, (100, 200), 10)
    assert movie.asked[0] <= 300
    assert max(movie.asked[1:]) <= 32
