"""Results and traces as NWB files: new ones, or added to a file that is there.

In the processing module ``ophys``, under the names that other programs look for:

- ``Fluorescence/Deconvolved``: the spike rate (spikes/s); ``DeconvolvedLow`` and ``DeconvolvedHigh``: the bounds of the
  central 90 % credible interval of the spike count in windows of one second, where there are samples enough;
- ``Fluorescence/Denoised``: the reconstructed ΔF/F, and ``DenoisedStd``, the standard deviation to be expected around
  it;
- ``SpikeInference``: a table with a row per ROI, of quality metrics and of the parameters θ of the generative model;
- ``SpikeInferenceProvenance``: a table of how it came about, with JSON values, if anything is known of it.

A new file has the traces besides (``DfOverF/RoiResponseSeries``, or ``Fluorescence/RoiResponseSeries`` for raw ones)
and the ROIs with their masks; where nothing is known of these, each mask is one pixel of weight 0. A file that is added
to keeps all that it has; where it has a ``Deconvolved`` or ``Denoised`` of its own, ours are ``SpikeRate…`` and
``Reconstruction…``. Single posterior samples are left out: they would be many times as large, and ``.zarr``, ``.npz``
and ``.h5`` hold them.

What the standard demands and we do not know is said to be unknown: the session begins on 1970-01-01 and the subject is
an animal of any age. Where the traces come from an NWB file, that file's session and subject are named; add results to
that file rather than writing a new one.
"""

from __future__ import annotations

import datetime
import json
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.conversion import needed
from napari_calvae.formats._files import arrays_of, provenance_json, reserve, whole_files
from napari_calvae.formats.hdf5 import whole_hdf5
from napari_calvae.recording import RecordingError, SpikeInference, Traces
from napari_calvae.roi_masks import RoiMasks
from napari_calvae.trace_source import TraceSource

#: Chunks of series hold so many frames of so many ROIs.
CHUNK = (4096, 64)
_UNKNOWN = "unknown"
_TABLE = "SpikeInference"


def check_needed() -> None:
    """Raise a ``RecordingError`` if the package that writes is missing."""
    needed("pynwb", RecordingError)


def check_append(path: Path, traces: Traces | TraceSource | None = None) -> tuple[str, dict[int, int]]:
    """Return the id of the table of ROIs that a result is about, and the row of each ROI in it.

    Raises
    ------
    RecordingError
        If no result can be added to a file, or none of these traces if they are given.
    """
    from napari_calvae.formats.nwb import chosen_rois, has_processed

    table_id, rows, ids, n_frames = chosen_rois(path)
    row_of = dict(zip(ids, rows.tolist(), strict=True))
    missing = [] if traces is None else [roi for roi in traces.roi_ids if roi not in row_of]
    if traces is not None and (missing or n_frames != traces.n_frames):
        lacks = f"without the ROIs {missing[:8]}" if missing else f"of {n_frames} frames"
        raise RecordingError(
            f"{path.name}: expected the file that the traces were read from, with their ROIs and "
            f"{traces.n_frames} frames, got one {lacks}. Write a new file instead."
        )
    if has_processed(path, _TABLE):
        raise RecordingError(
            f"{path.name}: expected a file without a result, got one that has a table {_TABLE} already. "
            "Add to a copy of the original file, or write a new one."
        )
    return table_id, row_of


def write(value: SpikeInference | Traces, path: Path) -> None:
    """Write a result or traces as a new NWB file, with what is known of the ROIs."""
    pynwb = needed("pynwb", RecordingError)
    traces = value if isinstance(value, Traces) else value.traces
    file = _new_file(pynwb, traces)
    table = _plane_segmentation(pynwb, file, traces)
    ophys = _module(file)
    segmentation = pynwb.ophys.ImageSegmentation(name="ImageSegmentation")
    ophys.add(segmentation)
    segmentation.add_plane_segmentation(table)
    rows = list(range(traces.n_rois))
    kind = pynwb.ophys.DfOverF if traces.unit == "dff" else pynwb.ophys.Fluorescence
    container = kind(name=kind.__name__)
    ophys.add(container)
    about = "ΔF/F as a fraction" if traces.unit == "dff" else "fluorescence as the camera counts it"
    _add_series(pynwb, container, "RoiResponseSeries", traces.values, about, _regular(traces), (table, rows))
    if isinstance(value, SpikeInference):
        _add_result(pynwb, file, value, (table, rows))
    else:
        _add_provenance(pynwb, ophys, "TraceProvenance", value)
    with whole_hdf5(path) as place:
        io = pynwb.NWBHDF5IO(file=place, mode="w")
        io.write(file)
    io.close()


def append(result: SpikeInference, path: Path) -> None:
    """Add a result to the NWB file that its traces were read from; the file is as it was unless all goes well.

    Raises
    ------
    RecordingError
        If the file is no NWB file, has no such ROIs or frames, or if a result has been added to it before.
    """
    if not isinstance(result, SpikeInference):
        raise RecordingError("append: expected a result of inference, got traces. Write them to a file of their own.")
    pynwb = needed("pynwb", RecordingError)
    table_id, row_of = check_append(path, result.traces)
    with whole_files(path) as (temporary,):
        shutil.copyfile(path, temporary)
        # HDF5 does not survive a disk that runs full under it: all room is taken before, and what is left given back.
        reserve(temporary, 2**20 + sum(array.nbytes for array in arrays_of(result).values()))
        with warnings.catch_warnings():
            # The name of a temporary file does not end in ``.nwb``, which pynwb would remark on.
            warnings.filterwarnings("ignore", message=".*nwb", category=UserWarning)
            io = pynwb.NWBHDF5IO(str(temporary), "a")
        with io:
            try:
                file = io.read()
            except Exception as error:  # what pynwb raises for files that break the standard is not listed anywhere
                raise RecordingError(
                    f"{path.name}: expected an NWB file that pynwb can add to, got one that it cannot read ({error}). "
                    "Write a new file instead."
                ) from error
            _add_result(pynwb, file, result, (file.objects[table_id], [row_of[roi] for roi in result.roi_ids]))
            io.write(file)


def _new_file(pynwb: Any, traces: Traces) -> Any:
    """An NWB file without data, about the session that the traces come from if they know it."""
    session = traces.provenance.get("session") or {}
    began = session.get("session_start_time")
    start = datetime.datetime.fromisoformat(began) if began else datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    subject = {
        "subject_id": _UNKNOWN,
        "sex": "U",
        "age": "P0D/",
        "species": "http://purl.obolibrary.org/obo/NCBITaxon_33208",
        "description": "Not known to the program that wrote this file: an animal of any age.",
    } | (session.get("subject") or {})
    return pynwb.NWBFile(
        session_description=session.get("session_description")
        or "Calcium imaging. The time of the session is not known: 1970-01-01 stands in for it.",
        identifier=str(uuid.uuid4()),
        keywords=["calcium imaging"],
        session_start_time=start,
        subject=pynwb.file.Subject(**subject),
    )


def _plane_segmentation(pynwb: Any, file: Any, traces: Traces) -> Any:
    """Table of the ROIs, with masks, in an imaging plane of which nothing is known."""
    from hdmf.backends.hdf5 import H5DataIO
    from hdmf.common import ElementIdentifiers, VectorData, VectorIndex
    from hdmf.data_utils import DataChunkIterator

    plane = file.create_imaging_plane(
        name="ImagingPlane",
        description="Imaging plane of which only the ROIs are known.",
        optical_channel=pynwb.ophys.OpticalChannel(
            name="OpticalChannel", description="Not known.", emission_lambda=float("nan")
        ),
        device=file.create_device("Microscope", description="Microscope that is not known."),
        excitation_lambda=float("nan"),
        indicator=_UNKNOWN,
        location=_UNKNOWN,
        imaging_rate=traces.frame_rate,
    )
    rois = traces.rois
    shape = (rois.shape if rois else (1, 1))[::-1]
    masks = DataChunkIterator(
        _images(rois, traces.n_rois), maxshape=(traces.n_rois, *shape), dtype=np.dtype("f4"), buffer_size=1
    )
    stored = H5DataIO(masks, compression="gzip", compression_opts=1, chunks=(1, *shape))
    about = "Weight of each pixel (x, y)." if rois else "Not known: one pixel of weight 0."
    columns = [VectorData(name="image_mask", description=about, data=stored)]
    if rois:  # the same as a list, which is read in no time
        lists = VectorData(name="pixel_mask", description="Pixels and their weights.", data=_points(rois))
        ends = np.cumsum([len(pixels) for pixels in rois.pixels])
        columns += [lists, VectorIndex(name="pixel_mask_index", data=ends, target=lists)]
    if traces.accepted is not None:
        about = "Whether whoever made the ROIs took them for cells."
        columns.append(VectorData(name="Accepted", description=about, data=np.asarray(traces.accepted)))
    if rois and any(rois.planes):
        columns.append(
            VectorData(name="plane", description="Number of the imaging plane.", data=np.asarray(rois.planes))
        )
    return pynwb.ophys.PlaneSegmentation(
        name="PlaneSegmentation",
        description="Regions of interest.",
        imaging_plane=plane,
        id=ElementIdentifiers(name="id", data=np.asarray(traces.roi_ids, np.int64)),
        columns=columns,
        colnames=[column.name for column in columns if not column.name.endswith("_index")],
    )


def _points(rois: RoiMasks) -> np.ndarray:
    """x, y and weight of the pixels of all ROIs, one after the other."""
    flat = np.concatenate(rois.pixels)
    points = np.empty(len(flat), [("x", "u4"), ("y", "u4"), ("weight", "f4")])
    points["y"], points["x"] = np.divmod(flat, rois.shape[1])
    points["weight"] = np.concatenate(rois.weights)
    return points


def _images(rois: RoiMasks | None, n_rois: int) -> Iterator[np.ndarray]:
    """(x, y) image of the weights of each ROI, one at a time: all of them may be more than memory holds."""
    for row in range(n_rois):
        image = np.zeros(rois.shape if rois else (1, 1), np.float32)
        if rois:
            image.ravel()[rois.pixels[row]] = rois.weights[row]
        yield image.T


def _module(file: Any) -> Any:
    if "ophys" in file.processing:
        return file.processing["ophys"]
    return file.create_processing_module("ophys", "Calcium imaging, processed.")


def _regular(traces: Traces) -> dict[str, float]:
    return {"starting_time": traces.t0, "rate": traces.frame_rate}


def _add_series(
    pynwb: Any,
    container: Any,
    name: str,
    values: np.ndarray,
    about: str,
    clock: dict,
    rois: tuple[Any, list[int]],
    unit: str = "n.a.",
) -> None:
    """Add (roi, time) values as a series of a container."""
    from hdmf.backends.hdf5 import H5DataIO

    table, rows = rois
    data = np.asarray(values, np.float32).T
    chunks = tuple(min(n, m) for n, m in zip(data.shape, CHUNK, strict=True))
    series = pynwb.ophys.RoiResponseSeries(
        name=name,
        description=f"{about[0].upper()}{about[1:]}.",
        data=H5DataIO(data, compression="gzip", compression_opts=4, shuffle=True, chunks=chunks),
        unit=unit,
        rois=table.create_roi_table_region(description="The ROIs of the columns.", region=rows),
        **clock,
    )
    container.add_roi_response_series(series)


def _add_result(pynwb: Any, file: Any, result: SpikeInference, rois: tuple[Any, list[int]]) -> None:
    """Add series, table and provenance of a result to the processing module."""
    ophys = _module(file)
    if "Fluorescence" not in ophys.data_interfaces:
        ophys.add(pynwb.ophys.Fluorescence(name="Fluorescence"))
    container = ophys["Fluorescence"]
    taken = any(name in container.roi_response_series for name in ("Deconvolved", "Denoised"))
    spikes, clean = ("SpikeRate", "Reconstruction") if taken else ("Deconvolved", "Denoised")
    arrays, clock = arrays_of(result), _regular(result.traces)
    series = [
        (spikes, result.rate, "posterior mean of the spike rate", clock, "spikes/s"),
        (clean, result.reconstruction, "ΔF/F that the inferred spikes explain, as a fraction", clock, "n.a."),
        (f"{clean}Std", result.reconstruction_std, "standard deviation of ΔF/F to be expected", clock, "n.a."),
    ]
    if "interval" in arrays:
        level, clock = float(arrays["interval_level"]), _windows(result.traces, arrays["interval_edges"])
        for end, array in zip(("Low", "High"), arrays["interval"], strict=True):
            about = (
                f"{end.lower()} bound of the {level:.0%} credible interval of the spike count in 1 s around each time"
            )
            series.append((f"{spikes}{end}", array, about, clock, "spikes"))
    for name, values, about, times, unit in series:
        _add_series(pynwb, container, name, values, about, times, rois, unit)
    ophys.add(_table(arrays, result, rois))
    _add_provenance(pynwb, ophys, f"{_TABLE}Provenance", result)


def _windows(traces: Traces, edges: np.ndarray) -> dict[str, Any]:
    """Centres of windows that begin at these frames, as a rate if they are all of one length."""
    centres = traces.t0 + ((edges[:-1] + edges[1:] - 1) / 2) / traces.frame_rate
    lengths = np.unique(np.diff(edges))
    if len(lengths) == 1:
        return {"starting_time": float(centres[0]), "rate": traces.frame_rate / float(lengths[0])}
    return {"timestamps": centres}


def _table(arrays: dict[str, np.ndarray], result: SpikeInference, rois: tuple[Any, list[int]]) -> Any:
    """Table with a row per ROI: quality metrics and θ."""
    from hdmf.common import DynamicTable, DynamicTableRegion, ElementIdentifiers, VectorData

    about = {"quality": "Quality metric", "theta": "Parameter of the generative model, in physical units"}
    columns = [DynamicTableRegion(name="roi", description="The ROI of the row.", data=rois[1], table=rois[0])]
    for name, values in arrays.items():
        kind, _, short = name.partition("_")
        if kind in about:
            columns.append(VectorData(name=name, description=f"{about[kind]}: {short}.", data=np.asarray(values)))
    return DynamicTable(
        name=_TABLE,
        description="What was inferred of each ROI: quality metrics and parameters of the generative model.",
        id=ElementIdentifiers(name="id", data=np.asarray(result.roi_ids, np.int64)),
        columns=columns,
        colnames=[column.name for column in columns],
    )


def _add_provenance(pynwb: Any, ophys: Any, name: str, value: SpikeInference | Traces) -> None:
    """Add a table with how the data came about, as JSON text; attributes would hold no more than 64 kB."""
    from hdmf.common import DynamicTable, VectorData

    items = dict(_leaves(json.loads(provenance_json(value)), ""))
    if not items:
        return
    columns = [
        VectorData(name="key", description="What it is, from the general to the particular.", data=list(items)),
        VectorData(name="value", description="What it was, as JSON.", data=list(items.values())),
    ]
    about = "How these data came about."
    ophys.add(DynamicTable(name=name, description=about, columns=columns, colnames=["key", "value"]))


def _leaves(item: Any, key: str) -> Iterator[tuple[str, str]]:
    """Dotted keys and JSON values of nested dictionaries and lists; lists of plain values stay whole."""
    nested = isinstance(item, dict) or (isinstance(item, list) and any(isinstance(i, dict | list) for i in item))
    if not nested:
        yield key, json.dumps(item, ensure_ascii=False)
        return
    for name, inner in item.items() if isinstance(item, dict) else enumerate(item):
        yield from _leaves(inner, f"{key}.{name}" if key else str(name))
