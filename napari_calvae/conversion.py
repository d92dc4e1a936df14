"""Results as values of other packages: xarray, pynapple, AnnData, pandas. Units go with them.

Time is that of the centres of the frames, in seconds from the same zero as ``traces.t0``; ROIs go by their ids, in the
order of the rows.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from napari_calvae.recording import SpikeInference

#: Per signal its unit and what it is.
SIGNALS = {
    "rate": ("spikes/s", "posterior mean of the spike rate"),
    "dff": ("1", "ΔF/F that the network saw, as a fraction"),
    "reconstruction": ("1", "mean ΔF/F of the posterior through the generative model"),
    "reconstruction_std": ("1", "standard deviation of ΔF/F to be expected around it, spikes and noise together"),
}


def needed(package: str, error: type[Exception] = ImportError) -> Any:
    """Import a package that is not among the core dependencies, or say how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError as missing:
        raise error(
            f"{package}: expected to be installed, got {missing}. Run pip install 'napari-calvae[formats]'."
        ) from missing


def to_xarray(result: SpikeInference, level: float = 0.9, window: float = 1.0) -> Any:
    """``xarray.Dataset`` of the summaries; samples stay behind (``result.samples()`` gives them as an array).

    Parameters
    ----------
    result
        What ``infer`` returned.
    level, window
        Credible level and window (s) of ``interval``, which is left out if the recording or the number of samples is
        too small for it.

    Returns
    -------
    dataset
        ``rate`` (spikes/s), ``dff``, ``reconstruction``, ``reconstruction_std`` over (roi, time); ``interval`` (spikes)
        over (bound, roi, window); ``quality`` over (roi, metric); ``theta`` and ``theta_std`` over (roi, parameter).
        Coordinates: ids, times (s), ``window`` (s, the centre of each), and where they are known ``accepted``, ``x``
        and ``y`` (pixels) of each ROI. The provenance is in ``attrs``, as JSON.
    """
    xr = needed("xarray")
    ids, times = np.asarray(result.roi_ids), result.traces.times
    values: dict[str, Any] = {
        name: (("roi", "time"), array, dict(zip(("units", "long_name"), SIGNALS[name], strict=True)))
        for name, array in signals(result).items()
    }
    coordinates: dict[str, Any] = {
        "roi": ids,
        "time": ("time", times, {"units": "s"}),
        "metric": list(result.quality.dtype.names or ()),
        "parameter": list(result.theta),
    }
    coordinates |= {name: ("roi", column) for name, column in _places(result).items()}
    values["quality"] = (("roi", "metric"), _columns({n: result.quality[n] for n in coordinates["metric"]}, len(ids)))
    values["theta"] = (("roi", "parameter"), _columns(result.theta, len(ids)))
    if result.theta_std:
        unknown = np.full(len(ids), np.nan)
        spread = {name: result.theta_std.get(name, unknown) for name in result.theta}
        values["theta_std"] = (("roi", "parameter"), _columns(spread, len(ids)))
    if result.n_samples >= 2 and 1 / result.frame_rate <= window <= result.traces.duration:
        edges = result.window_edges(window)
        about = {
            "units": "spikes",
            "level": level,
            "window": window,
            "long_name": "central credible interval of counts",
        }
        values["interval"] = (("bound", "roi", "window"), result.interval(level, window), about)
        centres = result.traces.t0 + ((edges[:-1] + edges[1:] - 1) / 2) / result.frame_rate
        coordinates |= {"bound": ["low", "high"], "window": ("window", centres, {"units": "s"})}
    return xr.Dataset(values, coordinates, provenance(result))


def to_pynapple(result: SpikeInference) -> Any:
    """``pynapple.TsdFrame`` of the spike rate (spikes/s): times in s, a column per ROI id.

    Its metadata have a row per ROI: the quality metrics, θ as ``theta_…``, and where they are known ``accepted``,
    ``x``, ``y``. Frames that were not measured have a rate, too: the network fills gaps.
    """
    nap = needed("pynapple")
    return nap.TsdFrame(
        t=result.traces.times, d=result.rate.T, columns=np.asarray(result.roi_ids), metadata=per_roi(result)
    )


def to_anndata(result: SpikeInference) -> Any:
    """``anndata.AnnData`` with a row per ROI and a column per frame.

    ``X`` is the spike rate (spikes/s), ``layers`` hold ``dff``, ``reconstruction`` and ``reconstruction_std``. ``obs``
    has the quality metrics, θ as ``theta_…``, and where they are known ``accepted``, ``x``, ``y``; its names are the
    ROI ids as text. ``var`` has ``time`` (s). ``uns`` holds ``frame_rate`` (Hz) and ``provenance`` (JSON).
    """
    anndata, pandas = needed("anndata"), needed("pandas")
    arrays = signals(result)
    names = [str(roi) for roi in result.roi_ids]
    frames = [str(frame) for frame in range(result.traces.n_frames)]
    return anndata.AnnData(
        X=arrays.pop("rate"),
        layers=arrays,
        obs=pandas.DataFrame(per_roi(result), index=names),
        var=pandas.DataFrame({"time": result.traces.times}, index=frames),
        uns=provenance(result),
    )


def to_pandas(result: SpikeInference) -> Any:
    """``pandas.DataFrame`` of the spike rate (spikes/s): a row per frame, by time (s), and a column per ROI id.

    ``attrs`` holds ``units``, ``frame_rate`` (Hz), ``provenance`` (JSON) and ``rois``: per ROI id a dictionary of its
    quality metrics, θ as ``theta_…``, and where they are known ``accepted``, ``x``, ``y``. As a table:
    ``pandas.DataFrame.from_dict(frame.attrs["rois"], orient="index")``.
    """
    pandas = needed("pandas")
    columns = per_roi(result)
    frame = pandas.DataFrame(
        result.rate.T,
        index=pandas.Index(result.traces.times, name="time"),
        columns=pandas.Index(result.roi_ids, name="roi"),
    )
    rows = ({name: column[row].item() for name, column in columns.items()} for row in range(len(result.roi_ids)))
    frame.attrs = {"units": "spikes/s", **provenance(result), "rois": dict(zip(result.roi_ids, rows, strict=True))}
    return frame


def signals(result: SpikeInference) -> dict[str, np.ndarray]:
    """(roi, time) arrays of ``SIGNALS``."""
    own = {name: getattr(result, name) for name in SIGNALS if name != "dff"}
    return {name: own.get(name, result.traces.values) for name in SIGNALS}


def per_roi(result: SpikeInference) -> dict[str, np.ndarray]:
    """(roi,) columns of what is known of each ROI: quality, θ and its spread, judgement, place (pixels)."""
    columns = {name: result.quality[name] for name in result.quality.dtype.names or ()}
    columns |= {f"theta_{name}": np.asarray(values) for name, values in result.theta.items()}
    columns |= {f"theta_{name}_std": np.asarray(values) for name, values in result.theta_std.items()}
    return columns | _places(result)


def provenance(result: SpikeInference) -> dict[str, Any]:
    """Frame rate (Hz), and the provenance of the result and of its traces as JSON text."""
    found = {"inference": dict(result.provenance), "traces": dict(result.traces.provenance)}
    return {"frame_rate": result.frame_rate, "provenance": json.dumps(found, default=json_default)}


def json_default(value: Any) -> Any:
    """Turn what JSON does not know into what it does."""
    return value.tolist() if hasattr(value, "tolist") else dict(value) if hasattr(value, "keys") else str(value)


def _places(result: SpikeInference) -> dict[str, np.ndarray]:
    """Judgement and place of the ROIs, where they are known."""
    traces = result.traces
    columns = {} if traces.accepted is None else {"accepted": np.asarray(traces.accepted)}
    return columns if traces.rois is None else columns | dict(zip("xy", traces.rois.centroids.T, strict=True))


def _columns(columns: Mapping[str, np.ndarray], n_rois: int) -> np.ndarray:
    """(roi, column) table of numbers."""
    return np.stack([np.asarray(column, float) for column in columns.values()], 1) if columns else np.empty((n_rois, 0))
