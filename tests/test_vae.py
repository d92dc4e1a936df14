"""Saving, loading and refusing models."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct

import numpy as np
import pytest
import torch

import napari_calvae as calvae
from napari_calvae.generative import (
    MODELS,
    BurstyPrior,
    CorrelatedNoise,
    DriftingNoise,
    FlowNoise,
    SpikePrior,
)
from napari_calvae.recognition import NETWORKS, ThetaEntry
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.vae import ModelError, Preprocessing, SpikeVAE, load_model, models


@pytest.fixture
def vae():
    torch.manual_seed(0)
    network = NETWORKS["factorized"](widths=(4, 6), max_count=3, gain_scale=1.5)
    return SpikeVAE(network, MODELS["linear_ar"](), SpikePrior(rate=0.7, max_count=3), theta={"tau_decay": 0.4})


@pytest.fixture
def saved(vae, tmp_path):
    return vae.save(tmp_path / "model.safetensors")


def edit_spec(path, edit):
    """Change what the header of a model's file says."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["calvae"] = json.dumps(edit(json.loads(header["__metadata__"]["calvae"])))
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def test_a_saved_model_is_the_same_model(vae, saved):
    again = SpikeVAE.load(saved)
    f = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.recognition.eval()(f, 20.0).mean, again.recognition(f, 20.0).mean, rtol=0, atol=0)
    assert again.prior.rate == 0.7
    assert dict(again.theta) == {"tau_decay": 0.4}
    assert again.recognition.gain_scale == 1.5
    assert again.sha256 == vae.sha256 != ""
    assert [p.name for p in saved.parent.iterdir()] == ["model.safetensors"]


def test_files_from_before_the_gain_had_a_limit_keep_their_gain(vae, tmp_path):
    vae.recognition = NETWORKS["factorized"](widths=(4, 6), max_count=3, gain_limit=None).eval()
    with torch.no_grad():
        vae.recognition.gain[-1].bias[1] = 0.5
    path = vae.save(tmp_path / "model.safetensors")
    f = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    expected = vae.recognition(f, 20.0).gain_std
    assert (expected > 1.5).all()

    def older(spec):
        del spec["recognition"]["config"]["gain_limit"]
        return spec

    edit_spec(path, older)
    assert torch.equal(SpikeVAE.load(path).recognition(f, 20.0).gain_std, expected)
    assert (NETWORKS["factorized"](widths=(4, 6))(f, 20.0).gain_std < 0.6).all()


def test_a_saved_model_remembers_what_it_was_trained_on(vae, tmp_path):
    assert SpikeVAE.load(vae.save(tmp_path / "a.safetensors")).trained_on is None
    vae.trained_on = np.arange(15, dtype=np.float32).reshape(3, 5)
    assert np.array_equal(SpikeVAE.load(vae.save(tmp_path / "b.safetensors")).trained_on, vae.trained_on)


def test_a_saved_model_keeps_its_noise(vae, tmp_path):
    assert SpikeVAE.load(vae.save(tmp_path / "usual.safetensors")).generative.noise.name == "gaussian"
    vae.generative = MODELS["linear_ar"](CorrelatedNoise())
    again = SpikeVAE.load(vae.save(tmp_path / "correlated.safetensors"))
    assert again.generative.parameters == vae.generative.parameters
    assert again.generative.parameters[-1].name == "tau_noise"


def test_a_saved_model_keeps_the_options_of_its_noise(vae, tmp_path):
    vae.generative = MODELS["physiological"](DriftingNoise("correlated", spacing=2.0))
    again = SpikeVAE.load(vae.save(tmp_path / "drift.safetensors")).generative
    assert again.parameters == vae.generative.parameters
    assert (again.noise.around.name, again.noise.spacing) == ("correlated", 2.0)


def test_a_saved_model_keeps_what_its_noise_has_learned(vae, tmp_path):
    flow = FlowNoise(width=5)
    for p in flow.learned.parameters():
        torch.nn.init.normal_(p, std=0.2)
    vae.generative = MODELS["linear_ar"](flow)
    path = vae.save(tmp_path / "flow.safetensors")
    again = SpikeVAE.load(path).generative.noise
    theta = {"baseline": torch.zeros(2), "noise_density": torch.full((2,), 0.03)}
    residual = torch.randn(2, 30)
    arguments = (residual, residual.abs(), theta, 20.0, torch.ones(2, 30, dtype=torch.bool))
    assert torch.equal(again.log_prob(*arguments), flow.log_prob(*arguments))
    data = bytearray(path.read_bytes())
    data[-3] ^= 0x10  # within the last weights
    path.write_bytes(data)
    with pytest.raises(ModelError, match="damaged"):
        SpikeVAE.load(path)


@pytest.mark.parametrize(
    ("prior", "same"),
    [
        (SpikePrior(0.7, 2), {"rate": 0.7, "max_count": 2}),
        (SpikePrior(torch.tensor([0.5, 2.0]), 4), {"rate": 1.0, "max_count": 4}),
        (
            BurstyPrior(0.3, torch.tensor([4.0, 9.0]), onset=torch.tensor(0.5), duration=0.1),
            {"quiet": 0.3, "burst": 6.0, "onset": 0.5, "duration": 0.1, "max_count": 10},
        ),
    ],
    ids=["one rate", "a rate per cell", "bursty"],
)
def test_a_saved_model_keeps_its_prior_and_of_values_per_cell_their_geometric_mean(vae, tmp_path, prior, same):
    vae.prior = prior
    again = SpikeVAE.load(vae.save(tmp_path / "prior.safetensors")).prior
    assert type(again) is type(prior)
    assert again.config == pytest.approx(same)


def test_files_from_before_noise_and_prior_had_kinds_still_load(saved):
    """The shipped model is one of them; here is another, with every old key."""
    assert load_model("universal").prior.rate == 1.0
    edit_spec(saved, lambda spec: spec | {"noise": "correlated", "prior": {"rate": 0.7, "max_count": 3}})
    again = SpikeVAE.load(saved)
    assert (again.prior.rate, again.prior.max_count, again.generative.noise.name) == (0.7, 3, "correlated")


def test_every_flipped_byte_is_noticed(saved, tmp_path):
    data = bytearray(saved.read_bytes())
    first_weight = struct.unpack("<Q", data[:8])[0] + 8
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(len(data), (60,), generator=generator).tolist():
        broken = bytearray(data)
        broken[position] ^= 0x10
        path = tmp_path / "broken.safetensors"
        path.write_bytes(broken)
        if position >= first_weight:
            with pytest.raises(ModelError, match="damaged"):
                SpikeVAE.load(path)
        else:
            # In the header a flipped byte may hit text for people; whatever loads is still a whole model.
            with contextlib.suppress(ModelError):
                SpikeVAE.load(path)


def test_foreign_files_are_refused_and_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "opened"), "w"))

    path = tmp_path / "model.safetensors"
    for content in (b"", b"1234", pickle.dumps(Bomb()), struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"{}"):
        path.write_bytes(content)
        with pytest.raises(ModelError, match="expected"):
            SpikeVAE.load(path)
    assert not (tmp_path / "opened").exists()


def test_a_newer_schema_is_refused_with_advice(saved):
    data = saved.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    spec = json.loads(header["__metadata__"]["calvae"])
    header["__metadata__"]["calvae"] = json.dumps(spec | {"schema": 99})
    text = json.dumps(header).encode()
    saved.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ModelError, match="expected schema 2 or older, got 99"):
        SpikeVAE.load(saved)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ModelError, match=r"expected one of .*universal"):
        load_model("nonesuch")


def test_shipped_models_load_and_start_with_the_default():
    assert next(iter(models())) == "universal"
    for name, path in models().items():
        assert path.stat().st_size < 5_000_000
        assert path.with_suffix(".md").is_file(), f"{name} has no model card"
        assert load_model(name).sha256


def test_preprocessing_refuses_frame_rates_beyond_training():
    traces = Traces(torch.randn(1, 4000).numpy(), frame_rate=500.0)
    with pytest.raises(RecordingError, match="expected 3 to 120 Hz"):
        Preprocessing().apply(traces)


def test_parts_that_do_not_go_together_are_refused():
    network = NETWORKS["factorized"](widths=(4, 6))
    with pytest.raises(ModelError, match="single cells and dendritic_spine for a shaft"):
        SpikeVAE(network, MODELS["dendritic_spine"](), SpikePrior(1.0))
    network.predict_theta([ThetaEntry.of(p) for p in MODELS["linear_ar"]().parameters])
    with pytest.raises(ModelError, match="trained with, or remove its head"):
        SpikeVAE(network, MODELS["linear_ar"](DriftingNoise()), SpikePrior(1.0))
    with pytest.raises(ValueError, match="which sets the amplitude"):
        network.predict_theta([ThetaEntry.of(p) for p in MODELS["jgcamp8f"]().parameters])


def test_a_model_by_name_is_the_callers_own_and_a_changed_one_no_longer_that_of_its_file():
    traces = calvae.simulate(1, 4.0, 30.0, seed=0).traces
    before = calvae.infer(traces, n_samples=0)
    own = load_model("universal")
    assert own.sha256 == load_model("universal").sha256 == before.provenance["model_sha256"] != ""
    assert own.made(before.provenance)
    own.recognition.set_gain_scale(0.1)
    with torch.no_grad():
        next(iter(own.recognition.parameters())).mul_(0.9)
    assert own.sha256 == ""
    assert not own.made(before.provenance)
    np.testing.assert_array_equal(calvae.infer(traces, n_samples=0).rate, before.rate)
    changed = calvae.infer(traces, own, n_samples=0)
    assert changed.provenance["model_sha256"] == ""
    assert own.made(changed.provenance)
    assert (changed.rate != before.rate).any()
    with pytest.raises(calvae.RecordingError, match="the SHA-256 of one that was not saved"):
        calvae.repeat(changed, traces)
    assert calvae.repeat(changed, traces, own).same
    with pytest.raises(calvae.RecordingError, match="by which the result was made"):
        calvae.repeat(before, traces, own)


def test_the_checksum_of_a_model_is_of_what_inference_depends_on(vae, saved):
    checksum = vae.identity()["model_checksum"]
    vae.description = "another"
    assert vae.identity()["model_checksum"] == checksum
    assert vae.sha256
    assert vae.copy().identity() == vae.identity()
    vae.theta = {"tau_decay": 0.7}
    assert vae.identity()["model_checksum"] != checksum
    assert vae.sha256 == ""
