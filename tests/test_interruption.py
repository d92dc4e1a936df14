"""Long computations end between two of their steps once nobody waits for them."""

from __future__ import annotations

import pytest
import torch

import napari_calvae as calvae
from napari_calvae import interruption
from napari_calvae.generative import MODELS


class Patience:
    """Is asked whether work is unwanted; yes from the call after the last."""

    def __init__(self, last: int) -> None:
        self.last, self.asked = last, 0

    def __call__(self) -> bool:
        self.asked += 1
        return self.asked > self.last


def parameters(model):
    return {p.name: torch.full((1,), p.median) for p in model.parameters}


def test_work_goes_on_unless_it_is_unwanted():
    interruption.go_on()
    with pytest.raises(interruption.Interrupted), interruption.until(lambda: True):
        interruption.go_on()
    interruption.go_on()
    with interruption.until(lambda: False), pytest.raises(interruption.Interrupted), interruption.until(lambda: True):
        interruption.go_on()


def test_the_kinetic_loop_ends_on_its_way_and_on_the_way_back():
    model, counts = MODELS["gcamp6f"](), torch.zeros(1, 12)
    theta = parameters(model)
    patience = Patience(5)
    with pytest.raises(interruption.Interrupted), interruption.until(patience):
        model.fluorescence(counts, theta, 30.0)
    assert patience.asked == 6
    theta["calcium_per_spike"].requires_grad_()
    counts[0, 2] = 1
    total = model.fluorescence(counts, theta, 30.0).sum()
    with pytest.raises(interruption.Interrupted), interruption.until(lambda: True):
        total.backward()
    assert theta["calcium_per_spike"].grad is None


def test_a_fit_of_parameters_and_a_refinement_end_between_steps():
    model = MODELS["linear_ar"]()
    counts = torch.zeros(1, 60)
    counts[0, 10] = 1
    seen = model.fluorescence(counts, parameters(model), 30.0)
    patience = Patience(3)
    with pytest.raises(interruption.Interrupted), interruption.until(patience):
        model.fit_theta(seen, counts, 30.0)
    assert patience.asked == 4
    patience = Patience(3)
    with pytest.raises(interruption.Interrupted), interruption.until(patience):
        calvae.diagnose(calvae.Traces(seen.numpy(), 30.0), "universal")
    assert patience.asked == 4
