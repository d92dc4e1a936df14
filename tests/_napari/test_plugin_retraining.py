"""What the training widget decides, without Qt; the fits on the sample movie are real."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import napari_calvae as calvae
from napari_calvae._napari import answers, retraining, trust
from napari_calvae._napari.contributions import sample_folder
from napari_calvae.expectation import SCORES


@pytest.fixture(scope="module")
def order():
    movie, frame_rate = calvae.read_movie(sample_folder() / "movie.tif")
    rois = calvae.RoiMasks.from_labels(calvae.read_labels(sample_folder() / "rois.tif"))
    config = calvae.fit_options().objectives["sleep"].config
    config = type(config)(n_steps=4, batch=2, window=64, snapshot_every=2)
    settings = answers.Settings(frame_rate, n_samples=5)
    return retraining.Order(1, np.asarray(movie), rois, rois.ids, 3, settings, "universal", "sleep", config)


def kinds(messages):
    return [type(m).__name__ for m in messages if not isinstance(m, answers.Progress)]


def test_a_fit_tells_its_steps_the_cell_and_the_verdict(order):
    messages = list(retraining.iter_retrain(order))
    assert kinds(messages) == ["Glimpse", "Glimpse", "Step", "Glimpse", "Step", "Step", "Glimpse", "Step", "Fitted"]
    steps = [m for m in messages if isinstance(m, retraining.Step)]
    assert [s.step for s in steps] == [1, 2, 3, 4]
    assert all(np.isfinite(s.terms["loss"]) for s in steps)
    assert steps[-1].seconds_left == 0
    glimpses = [m for m in messages if isinstance(m, retraining.Glimpse)]
    assert [g.step for g in glimpses] == [0, 1, 2, 4]
    assert {g.inference.roi_ids for g in glimpses} == {(3,)}
    assert not np.array_equal(glimpses[0].inference.rate, glimpses[-1].inference.rate)
    assert {p.name for p in glimpses[0].parameters} == set(glimpses[0].inference.theta)
    fitted = messages[-1]
    traces = calvae.extract(order.movie, order.rois, frame_rate=order.settings.frame_rate)
    alone = calvae.infer(traces.select([traces.index(3)]), n_samples=5)
    np.testing.assert_allclose(fitted.before.rate, alone.rate, rtol=1e-4, atol=1e-4)
    assert fitted.model.description.endswith(fitted.verdict.told)
    assert fitted.verdict.told.startswith("correlation with the spikes of simulated copies of held-out cells ")
    assert fitted.verdict.kept == ("not kept" not in fitted.model.description)


def test_a_fit_to_labels_uses_the_cells_that_have_them_and_another_noise(order, tmp_path):
    with np.load(sample_folder() / "spikes.npz") as known:
        np.savez(tmp_path / "some.npz", spike_times_2=known["spike_times_2"], spike_times_5=known["spike_times_5"])
    messages = list(
        retraining.iter_retrain(
            replace(order, objective="supervised", noise="correlated", spikes=tmp_path / "some.npz", cell=1)
        )
    )
    assert kinds(messages)[0] == "Remark"
    assert messages[1].sentence == "2 of 9 ROIs have labelled spikes."
    assert isinstance(messages[-1], retraining.Fitted)
    assert messages[-1].verdict == retraining.Verdict(None)
    assert messages[-1].model.generative.noise.name == "correlated"
    assert messages[-1].after.roi_ids == (1,)


def test_what_goes_wrong_is_told(order, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"no")
    for change, words in (
        ({"objective": "supervised"}, "expected a file for the objective supervised"),
        ({"objective": "supervised", "spikes": tmp_path / "bad.npz"}, "expected an .npz file of spike times"),
        ({"base": "nonesuch"}, "expected one of universal"),
    ):
        *_, last = retraining.iter_retrain(replace(order, **change))
        assert isinstance(last, answers.Failure)
        assert words in last.sentence


def test_many_cells_are_sampled_and_labels_come_first(order):
    many = replace(order, wanted=tuple(range(1, 1001)))
    first, remark = retraining.chosen(many, None)
    assert len(first) == retraining.MOST_ROIS
    assert first == retraining.chosen(many, None)[0]
    assert first == tuple(sorted(first))
    assert remark == "Fits to 200 of 1000 ROIs, drawn at random (seed 0)."
    other = replace(many, config=many.config.model_copy(update={"seed": 1}))
    assert retraining.chosen(other, None)[0] != first
    times = {roi: np.empty(0) for roi in (7, 77, 777, 5000)}
    semi, remark = retraining.chosen(replace(many, objective="semi_supervised"), times)
    assert {7, 77, 777} <= set(semi)
    assert len(semi) == 200
    assert remark.startswith("3 of 1000 ROIs have labelled spikes.")
    assert retraining.chosen(replace(many, objective="supervised"), times)[0] == (7, 77, 777)
    with pytest.raises(calvae.RecordingError, match="got ROIs 5000"):
        retraining.chosen(replace(many, objective="supervised"), {5000: np.empty(0)})


def test_counts_of_known_spikes():
    traces = calvae.Traces(np.zeros((2, 5)), frame_rate=10.0, roi_ids=(4, 9))
    counts = retraining.counts_of(traces, {9: np.array([0.0, 0.21, 0.22])})
    np.testing.assert_array_equal(counts[1], [1, 0, 2, 0, 0])
    assert np.isnan(counts[0]).all()


def test_typed_rois():
    ids = (1, 2, 3, 5, 8)
    assert retraining.typed_rois("1-3, 8", ids) == (1, 2, 3, 8)
    assert retraining.typed_rois(" 8;2 – 5 ", ids) == (8, 2, 3, 5)
    for text in ("", "one", "1-", "1.5"):
        with pytest.raises(calvae.RecordingError, match="expected ids such as"):
            retraining.typed_rois(text, ids)
    with pytest.raises(calvae.RecordingError, match="among 1, 2, 3, 5, 8, got “40”"):
        retraining.typed_rois("40", ids)


@pytest.mark.parametrize(
    ("outcome", "verdict", "words"),
    [
        (
            "fitted by vimco, 9 steps, kept: bound +0.120 nats/s (more than 0 is kept)",
            (True, "bound +0.120 nats/s (more than 0 is kept)"),
            "Better: bound +0.120 nats/s (more than 0 is kept).",
        ),
        (
            "fitted by sleep, 9 steps, kept by 50%: correlation +0.020 (more than 0.02 is kept)",
            (True, "correlation +0.020 (more than 0.02 is kept)"),
            "Better: correlation +0.020",
        ),
        (
            "fitted by vimco, 9 steps, not kept, weights of the base: bound -inf nats/s (more than 0 is kept)",
            (False, "bound -inf nats/s (more than 0 is kept)"),
            "No better, so the old weights stay: bound -inf nats/s",
        ),
        ("fitted by supervised, 9 steps, seed 0", (None, ""), "no cell was left to judge by"),
    ],
)
def test_the_verdict_in_numbers_and_words(outcome, verdict, words):
    earlier = "universal; fitted by sleep, kept: correlation +9.000 (more than 0.02 is kept)"
    found = retraining.verdict_of(f"{earlier}; {outcome}")
    assert (found.kept, found.told) == verdict
    assert words in found.sentence


def test_models_are_kept_under_free_names_and_never_over_another_unasked(tmp_path):
    model = SimpleNamespace(save=lambda path: path.write_bytes(b"new") and path)
    first, second = (retraining.keep(model, tmp_path, "sleep") for _ in range(2))
    assert [first.name, second.name] == ["sleep 1.safetensors", "sleep 2.safetensors"]
    assert retraining.save(model, tmp_path / "mine.v2").name == "mine.v2.safetensors"
    first.write_bytes(b"old")
    with pytest.raises(calvae.RecordingError, match="exists already"):
        retraining.save(model, first)
    with pytest.raises(calvae.RecordingError, match="exists already"):
        retraining.save(model, first.with_suffix(""))
    assert first.read_bytes() == b"old"
    assert retraining.save(model, first, overwrite=True).read_bytes() == b"new"


def test_time_left_in_words():
    assert [retraining.told(s) for s in (0.4, 42, 300, 1e5, np.nan)] == ["0 s", "42 s", "5 min", "hours", ""]


def an_expectation(**scores):
    table = np.full(2, np.nan, [(name, "f8") for name in SCORES])
    for name, values in scores.items():
        table[name] = values
    traces = calvae.Traces(np.zeros((2, 450)), frame_rate=10.0)
    return calvae.Expectation(table, SimpleNamespace(traces=traces), (), 3, 0.5)


def test_trust_in_plain_words():
    good = an_expectation(
        correlation_50ms=[0.8, 0.9], correlation_200ms=[0.9, 0.95], excess=[-0.1, 0.1], timing_error=[0.02, 0.03]
    )
    assert trust.sentence(good) == "When it fires can be told to about 50 ms. The number of spikes is about right."
    shown = {line.label: (line.mean, line.span) for line in trust.lines(good)}
    assert shown["Correlation, σ 50 ms"] == ("0.85", "0.80–0.90")
    assert shown["Spike count error"] == ("+0%", "−10…+10%")
    assert shown["Their timing error"] == ("25 ms", "20–30 ms")
    assert shown["90 % intervals hold"] == ("–", "nothing to count")
    assert "ROI 3: 2 recordings simulated" in trust.origin(good)
    poor = an_expectation(correlation_50ms=[0.2, 0.3], correlation_200ms=[0.4, 0.5], excess=[0.5, 1.5])
    assert trust.sentence(poor).startswith("Single spikes are hard to tell here")
    assert "off by 100% on average" in trust.sentence(poor)
    assert trust.sentence(an_expectation()).startswith("Single spikes are hard")


def test_trust_of_a_real_cell(order):
    traces = calvae.extract(order.movie, order.rois, frame_rate=order.settings.frame_rate)
    result = answers.one_roi(calvae.infer(traces, n_samples=5), 2)
    *_, last = trust.iter_trust(4, result, "universal")
    assert last.number == 4
    assert last.expectation.roi_id == 3
    other = replace(result, provenance={**result.provenance, "model_sha256": "0" * 64, "model_checksum": "0" * 64})
    *_, last = trust.iter_trust(5, other, "universal")
    assert isinstance(last, answers.Failure)
    assert "infer again" in last.sentence


def test_a_fit_sees_the_baseline_that_the_user_wants(order):
    own = replace(order, settings=replace(order.settings, baseline_percentile=40.0, baseline_window=20.0))
    first = next(m for m in retraining.iter_retrain(own) if isinstance(m, retraining.Glimpse))
    traces = calvae.extract(order.movie, order.rois, frame_rate=order.settings.frame_rate)
    wanted = calvae.delta_f_over_f(traces, 20.0, 40.0)
    np.testing.assert_allclose(first.inference.traces.values[0], wanted.values[wanted.index(3)], rtol=1e-5, atol=1e-6)
