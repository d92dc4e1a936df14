"""Scores and quality metrics against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from napari_calvae import metrics


def test_correlation_equals_numpy_and_is_nan_for_constants():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3, 50)), rng.normal(size=(3, 50))
    expected = [np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(metrics.score_correlation(a, b), expected)
    assert np.isnan(metrics.score_correlation(np.ones(5), np.arange(5)))
    # The mean of a thousand times 0.1 is not 0.1, but what is left is no correlation.
    constant = np.full(1000, 0.1)
    assert constant.mean() != 0.1
    assert np.isnan(metrics.score_correlation(constant, [np.full(1000, 0.3), np.arange(1000)])).all()
    assert metrics.score_correlation(1e6 + 1e-3 * np.arange(9), np.arange(9)) == pytest.approx(1)


def test_smoothing_keeps_the_number_of_spikes():
    counts = np.zeros(400)
    counts[[150, 200, 201]] = 1, 2, 1
    rate = metrics.smooth_spikes(counts, 30.0, 0.2)
    assert rate.sum() / 30 == pytest.approx(4)
    assert np.argmax(rate) in (199, 200)
    one = metrics.smooth_spikes(np.eye(1, 101, 50), 30.0, 0.2)[0]
    assert one[56] / one[50] == pytest.approx(np.exp(-0.5))
    assert (np.flatnonzero(one)[[0, -1]] == [20, 80]).all()  # five standard deviations to either side


def test_error_and_bias_of_a_doubled_rate_are_one():
    truth = np.abs(np.random.default_rng(0).normal(size=(2, 30)))
    np.testing.assert_allclose(metrics.score_error(2 * truth, truth), 1)
    np.testing.assert_allclose(metrics.score_bias(2 * truth, truth), 1)
    assert np.isnan(metrics.score_bias(truth, 0 * truth)).all()


def test_scores_are_per_trace_whatever_the_scale_and_nan_without_spikes():
    assert [*metrics.SCORES] == ["correlation", "error", "bias"]
    rng = np.random.default_rng(0)
    rate, truth = 1e-3 * rng.random((2, 2, 3, 40))
    for score in metrics.SCORES.values():
        apart = [[score(a, b) for a, b in zip(*both, strict=True)] for both in zip(rate, truth, strict=True)]
        np.testing.assert_allclose(score(rate, truth), apart)
        np.testing.assert_allclose(score(500 * rate, 500 * truth), apart)
        assert np.isnan(score(rate, 0 * truth)).all()
    assert metrics.score_error(rate, truth)[0, 0] == pytest.approx(np.abs(rate - truth)[0, 0].sum() / truth[0, 0].sum())


def test_pit_counts_the_truth_among_the_samples():
    u = np.random.default_rng(0).random((1,))
    pit = metrics.randomised_pit(np.array([[0], [1], [1], [2], [5]]), np.array([1]), np.random.default_rng(0))
    np.testing.assert_allclose(pit, (1 + 3 * u) / 6)


def test_pit_is_uniform_when_truth_is_another_sample():
    rng = np.random.default_rng(0)
    draws = rng.poisson(1.0, size=(21, 20_000))
    pit = metrics.randomised_pit(draws[1:], draws[0], rng)
    expected, _ = np.histogram(pit, 10, (0, 1))
    # Each bin is binomial(20,000, 0.1): standard deviation 42.
    assert np.abs(expected - 2000).max() < 5 * 42


def test_quality_of_a_perfect_explanation():
    rng = np.random.default_rng(0)
    clean = np.sin(np.arange(30_000) / 50)[None]
    dff = clean + 0.1 * rng.normal(size=clean.shape)
    dff[0, :100] = np.nan
    x = metrics.Explained(dff, np.full_like(dff, 2.0), clean, np.full_like(dff, 0.1), 25.0)
    table = metrics.quality_table(x)
    assert table.dtype.names == tuple(metrics.QC)
    row = table[0]
    assert row["spike_rate"] == pytest.approx(2.0)
    assert row["reconstruction_r2"] == pytest.approx(1 - 0.01 / (0.5 + 0.01), abs=0.003)
    assert row["residual_autocorrelation"] == pytest.approx(0, abs=0.03)
    assert row["band_coverage"] == pytest.approx(0.9545, abs=0.01)
    assert row["noise_level"] == pytest.approx(100 * 0.954 * 0.1 / 5, rel=0.05)


def test_quality_in_closed_form():
    wave = np.tile([0.5, -0.5], 50)
    dff = np.stack([wave + 2, wave + 4, np.full(100, 3.0)])
    x = metrics.Explained(dff, dff, np.array([[2.0], [3.0], [3.0]]) + 0 * dff, np.full_like(dff, 0.25), 25.0)
    nan = np.nan
    np.testing.assert_array_equal(metrics.qc_reconstruction_r2(x), [0, 1 - 1.25 / 0.25, nan])
    np.testing.assert_allclose(metrics.qc_residual_autocorrelation(x), [-1, -1, nan])
    np.testing.assert_array_equal(metrics.qc_band_coverage(x), [1, 0.5, 1])
    few = np.full((2, 100), nan)
    few[0, 7] = 0.1
    x = metrics.Explained(few, few, 0 * dff[:2], np.full((2, 100), 0.25), 25.0)
    np.testing.assert_array_equal(metrics.qc_band_coverage(x), [1, 0])


def test_what_is_unfamiliar_is_a_metric_of_models_that_know_what_they_were_trained_on():
    rng = np.random.default_rng(0)
    dff, known = rng.standard_normal((2, 300)), rng.standard_normal((50, 5))
    parts = dff, np.ones_like(dff), 0 * dff, np.ones_like(dff), 25.0
    assert np.isnan(metrics.quality_table(metrics.Explained(*parts))["unfamiliarity"]).all()
    found = metrics.quality_table(metrics.Explained(*parts, trained_on=known))["unfamiliarity"]
    np.testing.assert_allclose(found, metrics.unfamiliarity(metrics.describe(dff, 25.0), known), rtol=1e-6)


def test_descriptors_in_closed_form():
    white = 3 + 0.1 * np.random.default_rng(0).standard_normal((2, 5000))
    found = metrics.describe(white, 25.0)
    for trace, (_, nu, over, skewness, _) in zip(white, found, strict=True):
        noise = np.median(np.abs(np.diff(trace))) / 0.954
        assert nu == pytest.approx(np.log(100 * noise * 0.954 / 5), abs=1e-5)
        assert over == pytest.approx(np.log((np.quantile(trace, 0.995) - np.median(trace)) / noise), abs=1e-5)
        assert skewness == pytest.approx(0, abs=0.1)
    dips = np.ones(5000)
    dips[::100] = 0  # neither noise nor peak: their logarithms are bounded
    np.testing.assert_allclose(metrics.describe(dips, 25.0)[0, 1:3], np.log([1e-6, 1e-3]), rtol=1e-6)
    assert np.isfinite(metrics.describe(white[:1, :10], 25.0)).all()
    assert np.isnan(metrics.describe(white[:1, :9], 25.0)).all()
    assert np.isnan(metrics.describe(np.full(50, 2.0), 25.0)).all()


def test_white_noise_smooth_and_skewed_traces_are_described_as_such():
    rng = np.random.default_rng(0)
    white = 0.1 * rng.standard_normal(20_000)
    rate, nu, _, skewness, smooth = metrics.describe(white, 25.0)[0]
    assert rate == pytest.approx(np.log(25.0))
    # ν is 100 · median |difference| / √fs.
    assert nu == pytest.approx(np.log(100 * 0.1 * 0.9539 / 5), abs=0.03)
    assert skewness == pytest.approx(0, abs=0.1)
    assert smooth == pytest.approx(-0.5, abs=0.03)
    assert metrics.describe(np.convolve(white, np.ones(5) / 5, "valid"), 25.0)[0, 4] > -0.1
    assert metrics.describe(np.abs(white) ** 3, 25.0)[0, 3] > 1
    assert np.isnan(metrics.describe(np.full(50, np.nan), 25.0)).all()
    gaps = white.copy()
    gaps[::7] = np.nan
    np.testing.assert_allclose(metrics.describe(gaps, 25.0), metrics.describe(white, 25.0), atol=0.1)


def test_what_is_far_from_all_that_is_known_is_unfamiliar():
    rng = np.random.default_rng(0)
    known = rng.standard_normal((500, 5))
    score = metrics.unfamiliarity(np.array([np.zeros(5), np.full(5, 5.0), np.full(5, np.nan)]), known)
    assert score[0] < 1 < 3 < score[1]
    assert np.isnan(score[2])
    # Of more of the same 5 % are as far from it as 1, or farther; 0.02 is what 500 known ones leave open.
    more = metrics.unfamiliarity(rng.standard_normal((5000, 5)), known)
    assert np.mean(more >= 1) == pytest.approx(0.05, abs=0.02)


def test_unfamiliarity_equals_the_plain_distances():
    rng = np.random.default_rng(0)
    known = (rng.standard_normal((60, 3)) * [1, 10, 1e-4]).astype(np.float32)
    described = known[:4] * 3
    spread = known.std(0) + 1e-6

    def to_known(points, n):
        return np.sort(np.sqrt((((points[:, None] - known) / spread) ** 2).sum(-1)), 1)[:, n - 1]

    expected = to_known(described, 5) / np.quantile(to_known(known, 6), 0.95)  # the nearest to a known one is itself
    described[3, 1] = np.nan
    expected[3] = np.nan
    np.testing.assert_allclose(metrics.unfamiliarity(described, known), expected, rtol=1e-4)
