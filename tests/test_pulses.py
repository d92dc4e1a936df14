"""Files and arrays of light pulses: what becomes a `Stimulation`, and what is said of all others."""

from __future__ import annotations

import numpy as np
import pytest

import napari_calvae as calvae

ROIS = calvae.RoiMasks((10, 20), (np.array([21, 22, 23]), np.array([105])), (4, 9))


def test_a_table_with_a_row_per_pulse_and_target(tmp_path):
    file = tmp_path / "pulses.csv"
    file.write_text("onset_s,duration_ms,x,y,power\n2.5,10,3,4,0.5\n1,20,5,6,1\n2.5,10,7,8,0.5\n")
    light = calvae.read_stimulation(file)
    np.testing.assert_allclose(light.onset, [1, 2.5])
    np.testing.assert_allclose(light.duration, [0.02, 0.01])
    np.testing.assert_allclose(light.power, [1, 0.5])
    assert [t.tolist() for t in light.targets] == [[[5, 6]], [[3, 4], [7, 8]]]


@pytest.mark.parametrize(
    ("columns", "seconds"),
    [
        ("onset,duration,x,y", 1),
        ("onset_s,duration_s,x_px,y_px", 1),
        ("onset_ms,duration_ms,x,y_px", 1e-3),
        ("time,duration,x_px,y", 1),
        ("time_s,duration_s,x,y", 1),
        ("time_ms,duration_ms,x,y", 1e-3),
    ],
)
def test_usual_names_of_columns(tmp_path, columns, seconds):
    (tmp_path / "pulses.csv").write_text(f"{columns}\n20,10,3,4\n")
    light = calvae.read_stimulation(tmp_path / "pulses.csv")
    assert (light.onset[0], light.duration[0]) == pytest.approx((20 * seconds, 10 * seconds))
    assert light.targets[0].tolist() == [[3, 4]]


@pytest.mark.parametrize("name", ["roi", "roi_id", "cell"])
def test_usual_names_of_targets(tmp_path, name):
    (tmp_path / "pulses.csv").write_text(f"onset,duration,{name}\n1,0.1,9\n")
    assert calvae.read_stimulation(tmp_path / "pulses.csv", ROIS).targets[0].tolist() == [[5, 5]]


def test_a_table_that_numbers_its_pulses_and_names_rois(tmp_path):
    file = tmp_path / "pulses.csv"
    file.write_text("pulse;onset;duration;roi\n7;1;0.1;9\n7;1;0.1;4\n8;1;0.2;4\n")
    light = calvae.read_stimulation(file, ROIS)
    assert [t.tolist() for t in light.targets] == [[[5, 5], [2, 1]], [[2, 1]]]
    np.testing.assert_allclose(light.duration, [0.1, 0.2])
    with pytest.raises(calvae.RecordingError, match="expected the ROIs beside their ids"):
        calvae.read_stimulation(file)


def test_arrays_of_a_file_and_of_a_layer(tmp_path):
    arrays = {"onset": [1.0, 2.0], "duration": 0.05, "targets": [[1, 2], [3, 4], [5, 6]], "pulse": [0, 1, 1]}
    np.savez(tmp_path / "pulses.npz", **arrays)
    for source in (tmp_path / "pulses.npz", arrays):
        light = calvae.read_stimulation(source)
        assert [t.tolist() for t in light.targets] == [[[1, 2]], [[3, 4], [5, 6]]]
        np.testing.assert_allclose(light.duration, 0.05)
        np.testing.assert_allclose(light.power, 1)
    light = calvae.read_stimulation(arrays | {"power": [0.5, 2.0]})
    np.testing.assert_allclose(light.power, [0.5, 2])
    light = calvae.read_stimulation({"onset": [1.0, 2.0], "duration": [0.1, 0.2], "roi": [9, 4]}, ROIS)
    assert [t.tolist() for t in light.targets] == [[[5, 5]], [[2, 1]]]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("onset_s,x,y\n1,2,3\n", "columns onset_s, duration_s, x and y .* got the columns onset_s, x, y"),
        ("1.5,2.5\n1,2\n", "expected a row per pulse and target"),
        ("onset,duration,x,y\n1,0.1,2,\n", "a number in every cell"),
        ("onset,duration,x,y\n1,0.1,2,3\n1,0.2,4,5\n", "one duration for all targets of a pulse"),
        ("onset,duration,roi\n1,0.1,3\n", "expected ids of ROIs as targets, got 3"),
        ("onset,duration,x,y\n1,0,2,3\n", r"pulses.csv: duration: expected one number above 0"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path, text, told):
    (tmp_path / "pulses.csv").write_text(text)
    with pytest.raises(calvae.RecordingError, match=told):
        calvae.read_stimulation(tmp_path / "pulses.csv", ROIS)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"times": [1.0]}, "expected the arrays onset .* got times"),
        ({"onset": ["a"], "duration": 0.1, "roi": [4]}, "all of them numbers"),
        ({"onset": [1.0], "duration": 0.1, "targets": [1, 2]}, r"array \(n, 2\)"),
        ({"onset": [1.0], "duration": "0.1", "roi": [4]}, "all of them numbers"),
        ({"onset": [1.0], "duration": 0.1, "targets": [["1", "2"]]}, "all of them numbers"),
        ({"onset": [1.0, 2.0], "duration": 0.1, "targets": [[1, 2]]}, "at least one target for each of 2 pulses"),
        ({"onset": [1.0, 2.0], "duration": 0.1, "roi": [4, 9], "pulse": [0, 5]}, "at least one target for each of 2"),
    ],
)
def test_what_is_wrong_with_arrays_is_told(arrays, told):
    with pytest.raises(calvae.RecordingError, match=told):
        calvae.read_stimulation(arrays, ROIS)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "pulses.txt").write_text("1")
    (tmp_path / "pulses.npz").write_bytes(b"nonsense")
    np.savez(tmp_path / "pickled.npz", onset=np.array([{}], object))
    with pytest.raises(calvae.RecordingError, match="another kind of file"):
        calvae.read_stimulation(tmp_path / "pulses.txt")
    for name in ("pulses.npz", "pickled.npz"):
        with pytest.raises(calvae.RecordingError, match="cannot be read"):
            calvae.read_stimulation(tmp_path / name)
