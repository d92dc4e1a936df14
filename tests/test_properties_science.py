"""What the science gives for extreme but legal recordings: finite where measured, or refused in one sentence."""

from __future__ import annotations

import tempfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

import napari_calvae as calvae
from napari_calvae.errors import ModelError
from napari_calvae.generative import MODELS, SpikePrior
from napari_calvae.recognition import FactorizedNetwork
from napari_calvae.training import TrainConfig
from napari_calvae.vae import SpikeVAE

settings.register_profile(
    "calvae", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("calvae")


def taken(function, *arguments, **options):
    """What it returns, or None where it is refused in a sentence that says what was expected."""
    try:
        return function(*arguments, **options)
    except ValueError as error:  # pydantic's and the house's own are among these
        if "expected" not in str(error) and "Input should be" not in str(error):
            raise
        return None


def cells(seed: int, n_rois: int = 3, n_frames: int = 160, frame_rate: float = 20.0) -> np.ndarray:
    """(roi, time) ΔF/F of cells that fire."""
    return calvae.simulate(n_rois, n_frames / frame_rate, frame_rate, rate=1.0, seed=seed).traces.values.copy()


@st.composite
def extreme(draw, n_rois=(1, 3), n_frames=(3, 160), rates=(3.0, 120.0), gaps=True):
    """Traces of any scale, offset, frame rate and ids, rounded or not, with frames missing, flat or doubled."""
    seed, n, frames = draw(st.integers(0, 99)), draw(st.integers(*n_rois)), draw(st.integers(*n_frames))
    values = cells(seed, n, frames) * 10.0 ** draw(st.floats(-9, 9)) + draw(st.sampled_from([0.0, 1.0, -1.0, 1e3, 1e6]))
    if draw(st.booleans()):
        values = np.round(values, draw(st.integers(-2, 3)))
    if n > 1 and draw(st.booleans()):
        values[-1] = values[0]
    if gaps:
        start = draw(st.integers(0, frames))
        values[draw(st.integers(0, n - 1)), start : start + draw(st.integers(0, frames))] = np.nan
    ids = draw(st.lists(st.integers(1, 2**31 - 1), min_size=n, max_size=n, unique=True))
    t0 = draw(st.sampled_from([0.0, -3.0, 1e5]))
    return calvae.Traces(values, draw(st.floats(*rates)), draw(st.sampled_from(["dff", "raw"])), tuple(ids), t0)


@settings(max_examples=12)
@example(calvae.Traces(np.round(np.random.default_rng(200).normal(size=(1, 7))), 5.0))
@example(calvae.Traces([[1.0] * 20, [np.nan] * 20], 20.0))
@given(extreme())
def test_oasis_is_finite_or_refused_and_always_the_same(traces):
    pytest.importorskip("oasis", reason="the rival is not installed: install napari-calvae[bench]")
    np.random.seed(5)  # noqa: NPY002 - whoever uses numpy's own stream is not to notice
    wanted = np.random.random()  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    found = taken(calvae.oasis, traces)
    assert np.random.random() == wanted  # noqa: NPY002
    if found is None:
        return
    assert found.shape == traces.values.shape
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(calvae.oasis(traces), found)
    np.testing.assert_array_equal(calvae.oasis(traces.select([-1])), found[-1:])


def test_oasis_goes_with_the_scale_wherever_the_trace_stands():
    pytest.importorskip("oasis", reason="the rival is not installed: install napari-calvae[bench]")
    values = cells(0).astype(float)
    own = calvae.oasis(calvae.Traces(values, 20.0))
    np.testing.assert_allclose(calvae.oasis(calvae.Traces(values * 1e-9, 20.0)), own * 1e-9, rtol=1e-2, atol=1e-11)
    np.testing.assert_allclose(calvae.oasis(calvae.Traces(values + 100, 20.0)), own, rtol=1e-2, atol=1e-3)


ODD = st.one_of(st.floats(), st.integers(-(2**70), 2**70), st.sampled_from([0, 1, -1, 1e-9, 1e9]))


@settings(max_examples=60)
@given(st.lists(st.floats(), max_size=8), ODD, st.one_of(st.floats(), st.floats(3, 120)), st.integers(-2, 300))
def test_spikes_are_counted_or_the_clock_is_refused(times, t0, frame_rate, n_frames):
    counts = taken(calvae.bin_spikes, times, t0, frame_rate, n_frames)
    if counts is not None:
        assert counts.shape == (n_frames,)
        assert counts.sum() <= np.isfinite(times).sum()


@example([1.5, 2.5], 0.0)
@example([1, 2], np.nan)
@example([1, 2**64], 0.0)
@given(st.lists(st.one_of(st.integers(), st.floats()), min_size=2, max_size=2), st.floats())
def test_ids_and_times_come_back_as_they_were_given_or_are_refused(ids, t0):
    traces = taken(calvae.Traces, np.eye(2, 9), 5.0, "dff", tuple(ids), t0)
    if traces is not None:
        assert list(traces.roi_ids) == ids
        assert np.isfinite(traces.times).all()


@pytest.mark.parametrize("rate", ["20 Hz", [20.0], 1j, np.array([1.0, 2.0])])
def test_a_frame_rate_that_is_no_number_is_refused(rate):
    with pytest.raises(calvae.RecordingError, match="frame_rate: expected a positive number"):
        calvae.Traces(np.eye(2), rate)


SIMULATED = {
    "n_rois": st.one_of(st.integers(-1, 4), st.floats(0, 4)),
    "duration": st.one_of(st.floats(-1, 3), st.sampled_from([np.nan, np.inf])),
    "frame_rate": st.floats(0.5, 1e3),
    "rate": st.one_of(st.floats(0, 1e9), st.sampled_from([np.nan, np.inf])),
    "variability": st.one_of(st.floats(0, 3), st.floats(-1, 1e9), st.sampled_from([np.nan, np.inf])),
    "seed": st.integers(-1, 2**70),
    "theta": st.dictionaries(st.sampled_from(["amplitude", "baseline", "noise", "tau"]), st.floats(), max_size=2),
}


@example({"rate": 1e9})
@example({"duration": np.inf})
@example({"variability": 100.0})
@example({"theta": {"baseline": np.nan}})
@example({"seed": 2**64})
@example({"n_rois": 1.5})
@given(st.fixed_dictionaries({}, optional=SIMULATED))
def test_what_is_simulated_is_finite_and_the_same_again_or_refused(odd):
    wanted = {"n_rois": 2, "duration": 1.0, "frame_rate": 20.0, **odd}
    found = taken(calvae.simulate, **wanted)
    if found is None:
        return
    assert found.traces.n_rois == wanted["n_rois"]
    assert found.traces.n_frames == round(wanted["duration"] * wanted["frame_rate"])
    assert found.traces.valid.all()
    assert all(np.isfinite(values).all() for values in found.theta.values())
    for times, counts in zip(found.spike_times, found.counts, strict=True):
        again = calvae.bin_spikes(times, found.traces.t0, found.traces.frame_rate, found.traces.n_frames)
        np.testing.assert_array_equal(again, counts)
    np.testing.assert_array_equal(calvae.simulate(**wanted).traces.values, found.traces.values)


PULSES = st.fixed_dictionaries(
    {"onset": st.lists(st.floats(), min_size=2, max_size=2), "duration": st.floats(), "power": st.floats(1e-9, 1e9)}
)


@example({"onset": [1.0, 2.0], "duration": 1e9}, 100, 20.0, 0.0)
@example({"onset": [-1e9, 2.0], "duration": 0.1}, 100, 20.0, 0.0)
@example({"onset": [1e300, 2.0], "duration": 0.1}, 100, 20.0, 0.0)
@example({"onset": [1.0, 2.0], "duration": 0.1}, 0, 20.0, 0.0)
@given(PULSES, st.integers(-1, 300), st.one_of(st.floats(), st.floats(3, 120)), st.one_of(st.floats(), st.just(0.0)))
def test_light_is_finite_and_within_its_power_or_refused(pulses, n_frames, frame_rate, t0):
    stimulation = taken(calvae.Stimulation, **pulses, targets=([0.0, 0.0], [3.0, 4.0]))
    light = stimulation and taken(stimulation.light, n_frames, frame_rate, t0)
    if light is None:
        return
    assert light.shape == (len(stimulation.sites), n_frames)
    assert (light >= 0).all()
    assert (light <= stimulation.power.max() * (1 + 1e-9)).all()
    assert stimulation.lit(n_frames, frame_rate, t0).shape == (n_frames,)


@given(st.floats(0, 4), st.floats(1e-3, 4), st.floats(-100, 100))
def test_light_adds_up_to_the_time_that_the_laser_was_on(onset, duration, t0):
    pulse = calvae.Stimulation([t0 + onset], duration, ([0.0, 0.0],))
    light = pulse.light(100, 10.0, t0)
    assert light.sum() / 10.0 == pytest.approx(duration, abs=1e-9)
    other = calvae.Stimulation([t0 + onset] * 2, duration, ([0.0, 0.0],) * 2).light(100, 10.0, t0)
    np.testing.assert_allclose(other, 2 * light)


@pytest.fixture(scope="module")
def model() -> SpikeVAE:
    torch.manual_seed(0)
    network = FactorizedNetwork(widths=(4, 6), max_count=4, local_gain=True)
    return SpikeVAE(network.eval(), MODELS["linear_ar"](), SpikePrior(rate=1.0, max_count=4))


def is_sound(found: calvae.SpikeInference, traces: calvae.Traces) -> None:
    """Finite, and of the ROIs, frames and frame rate that went in."""
    assert (found.roi_ids, found.frame_rate, found.traces.t0) == (traces.roi_ids, traces.frame_rate, traces.t0)
    for array in (found.rate, found.reconstruction, found.reconstruction_std):
        assert array.shape == traces.values.shape
        assert np.isfinite(array).all()
    assert (found.rate >= 0).all()
    assert all(np.isfinite(values).all() for values in found.theta.values())
    assert found.samples().shape == (found.n_samples, *traces.values.shape)


REFINED = {"n_steps": 2, "n_gradient": 2, "n_samples": 2, "n_evidence": 16}


@settings(max_examples=5)
@example(calvae.Traces([[1e20, 2e20] * 20], 20.0))
@example(calvae.Traces([[1.0] * 20 + [1e9] * 20], 20.0, roi_ids=(2**62,)))
@given(extreme())
def test_refinement_is_sound_alone_and_beside_others(model, traces):
    before = traces.values.copy()
    found = taken(calvae.refine, traces, model, **REFINED)
    np.testing.assert_array_equal(traces.values, before)
    if found is None:
        assert taken(calvae.diagnose, traces, model, **REFINED) is None
        return
    is_sound(found, traces)
    own = calvae.refine(traces.select([-1]), model, **REFINED)
    np.testing.assert_array_equal(own.rate, found.rate[-1:])
    np.testing.assert_array_equal(own.samples(), found.samples([-1]))
    gaps = calvae.diagnose(traces, model, **REFINED)
    assert gaps.roi_ids == traces.roi_ids
    for name in ("amortized", "refined", "evidence", "evidence_error", "effective_samples"):
        assert np.isfinite(getattr(gaps, name)).all()


@settings(max_examples=15)
@example({"amplitude": 1e30})
@example({"amplitude": float("inf")})
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "n_samples": st.integers(-1, 8),
            "seed": st.integers(-1, 2**70),
            "amplitude": st.one_of(st.floats(), st.floats(1e-9, 1e9)),
        },
    )
)
def test_settings_of_inference_are_taken_or_refused(model, wanted):
    traces = calvae.Traces(cells(1), 20.0)
    found = taken(calvae.infer, traces, model, device="cpu", **{"n_samples": 2, **wanted})
    if found is not None:
        is_sound(found, traces)


@settings(max_examples=5)
@given(extreme(n_rois=(2, 4)), st.permutations(range(4)), st.integers(1, 3))
def test_selecting_and_inferring_may_change_places(model, traces, order, block_rois):
    rows = [row for row in order if row < traces.n_rois][:2]
    found = taken(calvae.infer, traces, model, n_samples=3, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        stored = taken(
            calvae.infer, traces, model, n_samples=3, device="cpu", out=f"{folder}/a.zarr", block_rois=block_rois
        )
        if found is None:
            return
        own = calvae.infer(traces.select(rows), model, n_samples=3, device="cpu")
        np.testing.assert_array_equal(own.rate, found.rate[rows])
        np.testing.assert_array_equal(own.samples(), found.samples(rows))
        assert own.quality.tobytes() == found.quality[rows].tobytes()  # NaN, too, where a metric says nothing
        assert own.roi_ids == tuple(found.roi_ids[row] for row in rows)
        assert (stored.roi_ids, stored.frame_rate) == (found.roi_ids, found.frame_rate)
        np.testing.assert_array_equal(stored.select(rows).rate, own.rate)
        assert calvae.repeat(found, traces, model).same
        assert calvae.repeat(stored, traces, model).same


def weights_of(model: SpikeVAE) -> bytes:
    return b"".join(t.numpy().tobytes() for t in model.recognition.state_dict().values())


@settings(max_examples=5)
@example(calvae.Traces(cells(2), 20.0), "supervised", 1, np.inf)
@example(calvae.Traces(cells(2), 20.0), "supervised", 1, 1e300)
@given(
    extreme(n_frames=(20, 80)),
    st.sampled_from(["sleep", "vimco", "wake_sleep", "elbo", "info_vae", "supervised", "semi_supervised"]),
    st.integers(0, 2**40),
    st.sampled_from([0.0, 1.0, 300.0, -1.0, 0.5]),
)
def test_a_fit_is_finite_leaves_its_base_alone_and_is_the_same_again(model, traces, objective, seed, count):
    before = weights_of(model), traces.values.copy()
    spikes = np.full(traces.values.shape, count) if "supervised" in objective else None
    config = TrainConfig(n_steps=2, seed=seed, window=32, batch=2, n_samples=2)
    found = taken(calvae.fit, traces, model, objective, spikes=spikes, config=config)
    assert weights_of(model) == before[0]
    np.testing.assert_array_equal(traces.values, before[1])
    if found is None:
        return
    assert np.isfinite(np.frombuffer(weights_of(found), np.float32)).all()
    assert weights_of(calvae.fit(traces, model, objective, spikes=spikes, config=config)) == weights_of(found)


@settings(max_examples=3)
@given(st.integers(0, 99), st.floats(-9, 9), st.floats(10.0, 60.0), st.integers(0, 3), st.booleans())
def test_spines_are_sound_whichever_row_the_shaft_is_in(seed, exponent, frame_rate, place, gap):
    values = cells(seed, 4) * 10.0**exponent
    values[-1, 20 : 160 if gap else 40] = np.nan
    traces = calvae.Traces(values, frame_rate, "dff", (7, 3, 9, 2**40))
    shaft = traces.roi_ids[place]
    found = calvae.infer_spines(traces, shaft, n_samples=2, n_rounds=1, device="cpu")
    others = [row for row in range(4) if row != place]
    assert (found.shaft, found.spines) == (shaft, tuple(traces.roi_ids[row] for row in others))
    ordered = traces.select([place, *others])
    is_sound(found.inference, ordered)
    assert np.isfinite(found.bap).all()
    assert np.isfinite(found.synaptic).all()
    again = calvae.infer_spines(ordered, shaft, n_samples=2, n_rounds=1, device="cpu")
    np.testing.assert_array_equal(again.inference.rate, found.inference.rate)
    np.testing.assert_array_equal(again.inference.events, found.inference.events)


@pytest.mark.parametrize("shaft", ["a", None, np.nan, 1.5])
def test_a_shaft_that_is_no_id_is_refused(shaft):
    with pytest.raises(calvae.RecordingError, match="shaft: expected the id"):
        calvae.infer_spines(calvae.Traces(cells(0), 20.0), shaft)


@settings(max_examples=3)
@given(extreme(n_frames=(60, 120), rates=(10.0, 40.0)), st.floats(0.1, 1.4), st.integers(0, 2**40))
def test_all_optical_inference_is_finite_and_the_same_again_or_refused(model, traces, onset, seed):
    n = traces.n_rois
    pulses = calvae.Stimulation([traces.t0 + onset], 0.1, ([0.0, 0.0],))
    where, few = [(k, 2.0 * k) for k in range(n)], {"n_start": 1, "n_settle": 1, "n_samples": 2, "seed": seed}
    found = taken(calvae.infer_all_optical, traces, pulses, where, model, **few)
    if found is None:
        return
    is_sound(found.spikes, traces)
    for name in ("weights", "connectivity", "connectivity_std", "connection", "excitability", "artefact", "response"):
        assert np.isfinite(getattr(found, name)).all()
    low, high = found.interval()
    assert (low <= high).all()
    again = calvae.infer_all_optical(traces, pulses, where, model, **few)
    np.testing.assert_array_equal(again.weights, found.weights)
    np.testing.assert_array_equal(again.rate, found.rate)


@settings(max_examples=6)
@given(extreme(rates=(10.0, 40.0)), st.integers(0, 2**40))
def test_what_is_expected_of_a_cell_lies_within_its_bounds(model, traces, seed):
    result = taken(calvae.infer, traces, model, n_samples=2, device="cpu")
    if result is None:
        return
    row = traces.n_rois - 1
    found = calvae.expect(result, row, model, n_repeats=2, seed=seed)
    assert (found.roi_id, len(found.scores)) == (traces.roi_ids[row], 2)
    is_sound(found.result, found.result.traces)
    for name in ("found", "coverage"):
        share = found.scores[name][np.isfinite(found.scores[name])]
        assert ((share >= 0) & (share <= 1)).all()
    again = calvae.expect(result, row, model, n_repeats=2, seed=seed)
    assert again.scores.tobytes() == found.scores.tobytes()


@pytest.mark.parametrize("odd", [{"row": 0.5}, {"row": "1"}, {"n_repeats": 1.5}, {"seed": -1}, {"seed": 2**64}])
def test_expectations_of_nothing_are_refused(model, odd):
    result = calvae.infer(calvae.Traces(cells(0), 20.0), model, n_samples=2, device="cpu")
    with pytest.raises(calvae.RecordingError, match=r"(expect|seed): expected"):
        calvae.expect(result, **{"row": 0, "model": model, **odd})


@example("a" * 5000)
@example(None)
@example(["universal"])
@example(b"universal")
@given(st.one_of(st.text(max_size=40), st.none(), st.floats(), st.lists(st.text(max_size=3)), st.binary(max_size=9)))
def test_what_names_no_model_is_refused(name):
    assume(str(name) not in calvae.models() or not isinstance(name, str))
    with pytest.raises(ModelError, match="model: expected one of universal"):
        calvae.load_model(name)


@settings(max_examples=15)
@given(st.data())
def test_a_damaged_model_is_refused(model, data):
    with tempfile.TemporaryDirectory() as folder:
        file = model.save(f"{folder}/a.safetensors")
        content = bytearray(file.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] ^= data.draw(st.integers(1, 255))
        else:
            del content[place:]
        file.write_bytes(content)
        try:
            found = calvae.load_model(file)
        except ModelError:
            return
        # What was hit then is a setting or a word of the description, which makes it another model.
        assert weights_of(found) == weights_of(model)


@settings(max_examples=10)
@given(st.dictionaries(st.sampled_from(["amplitude", "tau_decay"]), st.floats(1e-6, 9.0)), st.text(max_size=20))
def test_a_model_comes_back_from_its_file(model, theta, description):
    own = SpikeVAE(model.recognition, model.generative, model.prior, theta=theta, description=description)
    assert own.copy().identity()["model_checksum"] == own.identity()["model_checksum"]
    with tempfile.TemporaryDirectory() as folder:
        file = own.save(f"{folder}/a.safetensors")
        found = calvae.load_model(file)
    assert found.identity() == own.identity()
    assert (found.theta, found.description, found.sha256) == (own.theta, description, own.sha256)
    assert weights_of(found) == weights_of(own)
