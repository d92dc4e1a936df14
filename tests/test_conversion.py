"""Results as values of other packages: the same numbers, in the same order, with their units."""

from __future__ import annotations

import dataclasses
import json
import sys

import numpy as np
import pytest
from test_recording import a_result

from napari_calvae.roi_masks import RoiMasks

CONVERSIONS = {"to_xarray": "xarray", "to_pynapple": "pynapple", "to_anndata": "anndata", "to_pandas": "pandas"}


def placed(result):
    """A result whose ROIs have places, and whose ids are in no order."""
    ids = (9, 5, 7)
    rois = RoiMasks((6, 5), (np.array([0, 1]), np.array([7]), np.array([29])), ids)
    values = result.traces.values.copy()
    values[1, 3] = np.nan
    traces = result.traces.replace(values=values, roi_ids=ids, rois=rois, accepted=[True, False, True])
    return dataclasses.replace(result, traces=traces, theta_std={"amplitude": np.array([0.1, 0.2, 0.3])})


@pytest.fixture(scope="module")
def result():
    return placed(a_result(3, 40))


def test_xarray_holds_all_summaries_by_name(result):
    dataset = result.to_xarray(level=0.8, window=2.0)
    assert dict(dataset.sizes) == {"roi": 3, "time": 40, "metric": 1, "parameter": 1, "bound": 2, "window": 2}
    for name, unit in (("rate", "spikes/s"), ("reconstruction", "1"), ("reconstruction_std", "1")):
        np.testing.assert_array_equal(dataset[name], getattr(result, name))
        assert dataset[name].attrs["units"] == unit
    np.testing.assert_array_equal(dataset["dff"], result.traces.values)
    np.testing.assert_array_equal(dataset.roi, [9, 5, 7])
    np.testing.assert_allclose(dataset.time, 2 + np.arange(40) / 10)
    assert dataset.time.attrs["units"] == "s"
    np.testing.assert_array_equal(dataset.rate.sel(roi=5), result.rate[1])
    np.testing.assert_array_equal(dataset.interval, result.interval(0.8, 2.0))
    np.testing.assert_allclose(dataset.window, [2 + 0.95, 2 + 2.95])  # centres of frames 0 to 19 and 20 to 39
    assert dataset.interval.attrs["level"] == 0.8
    np.testing.assert_array_equal(dataset.quality.sel(metric="explained"), result.quality["explained"])
    np.testing.assert_array_equal(dataset.theta.sel(parameter="amplitude"), result.theta["amplitude"])
    np.testing.assert_array_equal(dataset.theta_std.sel(parameter="amplitude"), [0.1, 0.2, 0.3])
    np.testing.assert_array_equal(dataset.accepted, [True, False, True])
    np.testing.assert_array_equal(dataset.x, [0.5, 2, 4])
    np.testing.assert_array_equal(dataset.y, [0, 1, 5])
    assert json.loads(dataset.attrs["provenance"])["inference"] == {"seed": 0, "array": [0, 1]}


def test_xarray_goes_through_a_file(result, tmp_path):
    import xarray

    dataset = result.to_xarray()
    dataset.to_zarr(tmp_path / "a.zarr", zarr_format=2)
    with xarray.open_zarr(tmp_path / "a.zarr") as back:
        xarray.testing.assert_identical(back.load(), dataset)


def test_xarray_leaves_out_intervals_that_cannot_be(result):
    assert "interval" not in result.to_xarray(window=5.0)
    one = dataclasses.replace(a_result(1, 40), n_samples=1, theta_std={})
    assert not {"interval", "theta_std"} & set(one.to_xarray())


def test_pynapple_has_times_ids_and_metadata(result):
    frame = result.to_pynapple()
    np.testing.assert_allclose(frame.t, result.traces.times)
    np.testing.assert_array_equal(frame.columns, [9, 5, 7])
    np.testing.assert_array_equal(frame.d, result.rate.T)
    np.testing.assert_array_equal(frame.loc[5].d, result.rate[1])
    assert list(frame.metadata_columns) == [
        "explained", "theta_amplitude", "theta_amplitude_std", "accepted", "x", "y"
    ]  # fmt: skip
    np.testing.assert_array_equal(frame["theta_amplitude"], result.theta["amplitude"])
    np.testing.assert_array_equal(frame[:, frame["accepted"]].columns, [9, 7])
    assert frame.restrict(frame.time_support).shape == (40, 3)


def test_anndata_has_rois_as_observations(result, tmp_path):
    import anndata

    data = result.to_anndata()
    data.write_h5ad(tmp_path / "a.h5ad")
    for found in (data, anndata.read_h5ad(tmp_path / "a.h5ad")):
        np.testing.assert_array_equal(found.X, result.rate)
        np.testing.assert_array_equal(found.layers["dff"], result.traces.values)
        np.testing.assert_array_equal(found.layers["reconstruction"], result.reconstruction)
        np.testing.assert_array_equal(found.layers["reconstruction_std"], result.reconstruction_std)
        assert list(found.obs_names) == ["9", "5", "7"]
        np.testing.assert_allclose(found.var["time"], result.traces.times)
        np.testing.assert_array_equal(found.obs["explained"], result.quality["explained"])
        np.testing.assert_array_equal(found.obs["theta_amplitude"], result.theta["amplitude"])
        np.testing.assert_array_equal(found.obs["accepted"], [True, False, True])
        assert found.uns["frame_rate"] == 10
        assert json.loads(found.uns["provenance"])["inference"]["seed"] == 0


def test_pandas_has_a_column_per_roi(result, tmp_path):
    import pandas

    frame = result.to_pandas()
    assert (frame.index.name, frame.columns.name, frame.attrs["units"]) == ("time", "roi", "spikes/s")
    assert list(frame.columns) == [9, 5, 7]
    np.testing.assert_allclose(frame.index, result.traces.times)
    np.testing.assert_array_equal(frame[5], result.rate[1])
    rois = pandas.DataFrame.from_dict(frame.attrs["rois"], orient="index")
    assert list(rois.index) == [9, 5, 7]
    np.testing.assert_array_equal(rois["theta_amplitude"], result.theta["amplitude"])
    np.testing.assert_array_equal(rois["accepted"], [True, False, True])
    assert frame.copy().attrs == frame.attrs  # survives what one does with a table
    frame.to_parquet(tmp_path / "a.parquet")
    assert pandas.read_parquet(tmp_path / "a.parquet").shape == (40, 3)


@pytest.mark.parametrize(("method", "package"), CONVERSIONS.items())
def test_a_missing_package_is_named(result, monkeypatch, method, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"^{package}: .*napari-calvae\[formats\]"):
        getattr(result, method)()


@pytest.mark.parametrize("method", CONVERSIONS)
def test_results_of_which_nothing_more_is_known(method):
    bare = dataclasses.replace(a_result(1, 5), theta={}, quality=np.zeros(1, []), n_samples=1)
    found = getattr(bare, method)()
    assert found is not None
    assert 5 in np.shape(found if method != "to_xarray" else found["rate"])
