"""Where memory runs out: fewer ROIs at a time, then another device, then an error that says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import napari_calvae as calvae
from napari_calvae._napari.session import explain
from napari_calvae.inference import blocks

CPU = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)
ERRORS = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError(CPU)]


@pytest.fixture(scope="module")
def traces():
    return calvae.simulate(7, 10.0, 30.0, rate=1.0, seed=0).traces


class Device:
    """Stands for a device that has memory for so many ROIs at once."""

    def __init__(self, room, error=ERRORS[0]):
        self.room, self.error, self.asked = room, error, []

    def __call__(self, part):
        self.asked.append(part.n_rois)
        if part.n_rois > self.room:
            raise self.error
        return part.roi_ids


@pytest.mark.parametrize("error", ERRORS, ids=["numpy", "cuda", "cpu"])
def test_fewer_rois_at_a_time(traces, error):
    device = Device(2, error)
    assert blocks.within_memory(traces, [device]) == [(1,), (2, 3), (4, 5), (6, 7)]
    assert device.asked == [7, 3, 1, 2, 4, 2, 2]


def test_what_one_device_has_no_room_for_another_does(traces):
    first, second = Device(0), Device(9)
    assert blocks.within_memory(traces, [first, second]) == [(k,) for k in range(1, 8)]
    assert set(second.asked) == {1}


def test_too_little_for_one_roi_is_an_error_that_says_so(traces):
    with pytest.raises(MemoryError) as caught:
        blocks.within_memory(traces, [Device(0), Device(0, ERRORS[2])])
    assert str(caught.value).startswith(
        "memory: expected enough for ROI 1 of 300 frames, got too little ([enforce fail"
    )
    assert explain(caught.value) == str(caught.value)


def test_other_errors_stay_what_they_are(traces):
    with pytest.raises(RuntimeError, match="something else"):
        blocks.within_memory(traces, [Device(0, RuntimeError("something else"))])


@pytest.mark.gpu
def test_a_gpu_without_room_leaves_it_to_the_cpu(traces):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    expected = calvae.infer(traces, n_samples=3, device="cpu")
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        found = calvae.infer(traces, n_samples=3, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    np.testing.assert_array_equal(found.rate, expected.rate)
