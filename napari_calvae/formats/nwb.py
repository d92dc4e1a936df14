"""NWB 2 files (``.nwb``): traces with their ROIs, and movies; results are written by ``nwb_results``.

Traces are a RoiResponseSeries. Of several, one of ΔF/F (in a DfOverF, or named alike) comes before one of fluorescence;
then the names that NWB suggests (``DfOverF`` or ``Fluorescence``, ``RoiResponseSeries``) before others, then the
alphabet. Neuropil, background, baseline, denoised and deconvolved series are no traces. The changes of a neuropil
series that belongs to raw traces are subtracted from them, with the coefficient that ``extract`` uses by default. What
was chosen, and what else there was, is in the provenance.

The file is read with h5py, for pynwb takes seconds to load and is only needed to write.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from napari_calvae.formats import csv_table, tiff
from napari_calvae.formats._files import DAMAGE, believed_rate, check_claims, existing
from napari_calvae.formats._lazy import lazy, positive
from napari_calvae.formats.nwb_results import append, check_append, check_needed, write
from napari_calvae.recording import RecordingError, Unit
from napari_calvae.roi_masks import RoiMasks
from napari_calvae.trace_source import TraceSource

__all__ = ["PATTERNS", "SUFFIXES", "append", "check_append", "check_needed", "chosen_rois", "has_processed", "matches"]
__all__ += ["open_movie", "open_source", "write"]

PATTERNS = ("*.nwb",)
SUFFIXES = (".nwb",)

#: Share of the neuropil's changes that is subtracted from raw traces.
NEUROPIL_COEFFICIENT = 0.7
#: Bytes that are read at a time.
BLOCK_BYTES = 32 << 20
_NOT_TRACES = re.compile(r"neuropil|background|baseline|deconv|denois|spike|spks|event|reconstruct", re.IGNORECASE)
_RELATIVE = re.compile(r"df_?over_?f|delta_?f|dff|df_?f", re.IGNORECASE)
_MOVIES = ("TwoPhotonSeries", "OnePhotonSeries")
_JUDGED = ("Accepted", "accepted", "iscell", "is_cell")
#: Words for judgements.
_YES, _NO = ("true", "1", "yes", "y", "accepted"), ("false", "0", "no", "n", "rejected", "", "nan")


def matches(path: Path) -> bool:
    """Tell whether this is an NWB file, by its name."""
    return path.suffix.lower() == ".nwb"


def open_source(path: Path, frame_rate: float | None = None, unit: Unit | None = None) -> TraceSource:
    """Open traces whose values stay in the file.

    Ids are those of the table of ROIs. ``rois`` come from its ``voxel_mask``, ``pixel_mask`` or ``image_mask``, unless
    one of the ROIs has no pixels; what lies in several planes is projected onto the one that holds most of it.
    ``accepted`` comes from a column ``Accepted``, ``iscell`` or ``Rejected``. ΔF/F in percent becomes a fraction.

    Raises
    ------
    RecordingError
        If the file is no NWB file, is damaged, or has no series of traces or more than one frame rate.
    """
    with _opened(path) as file:
        name, others, neuropil = _chosen(file, path)
        series = file[name]
        data = series["data"]
        if data.dtype.kind not in "fiub" or data.ndim not in (1, 2):
            raise RecordingError(
                f"{path.name}: expected numbers (time, roi) in {name}, got shape {data.shape} of dtype {data.dtype}."
            )
        table = _table(file, series)
        n_frames, n_rois = _shape(series)
        if table and len(table[1]) != n_rois:
            raise RecordingError(
                f"{path.name}: expected one column per ROI in {name}, got {n_rois} columns for {len(table[1])} ROIs."
            )
        t0, stated = _clock(series, n_frames, path, frame_rate is not None)
        rate, contradicted = believed_rate(frame_rate, stated)
        ids = _ids(*table) if table else ()
        found: dict[str, Any] = {"source": path.name, "series": name, "other_series": others}
        if neuropil:
            found |= {"neuropil": neuropil, "neuropil_coefficient": NEUROPIL_COEFFICIENT}
        return TraceSource(
            functools.partial(_read_rows, str(path), name, neuropil),
            n_rois,
            n_frames,
            rate,  # type: ignore[arg-type]
            unit or ("dff" if _is_relative(file, name) else "raw"),
            ids,
            t0,
            found | contradicted | {"session": _session(file)},
            _masks(file, *table, ids) if table else None,
            _accepted(*table) if table else None,
            _chunk_rows(data, n_rois),
        )


def open_movie(path: str | Path) -> tuple[Any, float | None]:
    """Open the first TwoPhotonSeries, else OnePhotonSeries, of an NWB file.

    Returns
    -------
    movie : dask array
        (time, y, x), for volumes (time, z, y, x); nothing is loaded yet. Frames that lie in TIFF files beside the NWB
        file are taken from there.
    frame_rate : float or None
        Frames per second (Hz) if the file states it.
    """
    import dask.array as da

    path = Path(path)
    with _opened(path) as file:
        found = sorted(_of_type(file, _MOVIES), key=lambda name: (_MOVIES.index(_type(file[name])), name))
        if not found:
            raise RecordingError(f"{path.name}: expected a TwoPhotonSeries or OnePhotonSeries, found none.")
        series = file[found[0]]
        rate = _clock(series, None, path)[1]
        if "external_file" in series:
            parts = [_external(path, _text(name)) for name in series["external_file"][:]]
            return parts[0] if len(parts) == 1 else da.concatenate(parts), rate
        data = series["data"]
        if data.ndim not in (3, 4) or data.dtype.kind not in "fiub":
            raise RecordingError(
                f"{path.name}: expected frames (time, x, y) in {found[0]}, got shape {data.shape}, dtype {data.dtype}."
            )
        frames = _Frames(path, found[0], data)
        stored = data.chunks or (1, *data.shape[1:])
    return lazy(frames, (stored[0], *stored[:0:-1])), rate


def chosen_rois(path: Path) -> tuple[str, np.ndarray, tuple[int, ...], int]:
    """For the series that ``open_source`` reads: its table's ``object_id``, rows there, ids, and number of frames."""
    with _opened(path) as file:
        series = file[_chosen(file, path)[0]]
        found = _table(file, series)
        if found is None:
            raise RecordingError(f"{path.name}: expected traces that name their ROIs, got {series.name} without.")
        table, rows = found
        return _text(table.attrs["object_id"]), rows, _ids(table, rows), _shape(series)[0]


def has_processed(path: Path, name: str) -> bool:
    """Tell whether the processing module ``ophys`` of a file has something of this name."""
    with _opened(path) as file:
        return f"processing/ophys/{name}" in file


class _Frames:
    """The frames of an image series as a (time, y, x) array that opens the file while it reads what is asked for."""

    def __init__(self, path: Path, name: str, data: h5py.Dataset):
        self.path, self.name, self.dtype = path, name, data.dtype
        self.shape = (data.shape[0], *data.shape[:0:-1])
        self.ndim = data.ndim

    def __getitem__(self, key: Any) -> np.ndarray:
        given = key if isinstance(key, tuple) else (key,)
        keys = (*given, *(slice(None),) * (self.ndim - len(given)))
        parts = [k if isinstance(k, slice) else slice(k, k + 1) for k in keys]
        with _opened(self.path) as file:  # where images are (x, y[, z])
            block = file[self.name]["data"][(parts[0], *parts[:0:-1])]
        block = block.transpose(0, *range(self.ndim - 1, 0, -1))
        return block[tuple(slice(None) if isinstance(k, slice) else 0 for k in keys)]


@contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """Open an NWB file to read from it; what is wrong with it is said in the house's words."""
    if path.is_dir():
        raise RecordingError(f"{path.name}: expected an NWB file (HDF5), got a folder. Export it as HDF5.")
    try:
        with h5py.File(path, "r") as file:
            if "nwb_version" not in file.attrs:
                other = "one of NWB 1" if "nwb_version" in file else "HDF5 of another kind"
                raise RecordingError(
                    f"{path.name}: expected an NWB 2 file, got {other}. "
                    "Files with arrays dff and frame_rate are read if their names end in .h5."
                )
            check_claims(file, path, most_axes=2)
            yield file
    except (RecordingError, PermissionError, FileNotFoundError):
        raise
    except DAMAGE as error:
        raise RecordingError(
            f"{path.name}: expected a whole NWB file, got one that cannot be read ({error}). Copy or write it again."
        ) from error


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _type(item: Any) -> str:
    return _text(item.attrs.get("neurodata_type", ""))


def _of_type(file: h5py.File, types: Sequence[str]) -> list[str]:
    """Paths of the groups of these types, in the processing modules and among what was acquired or analysed."""
    found = []

    def walk(group: h5py.Group) -> None:
        for item in (group.get(name) for name in group):
            if not isinstance(item, h5py.Group):
                continue
            if _type(item) in types:
                found.append(item.name.lstrip("/"))
            elif "colnames" not in item.attrs:  # tables hold no series
                walk(item)

    for top in ("acquisition", "processing", "analysis"):
        if isinstance(file.get(top), h5py.Group):
            walk(file[top])
    return found


def _is_relative(file: h5py.File, name: str) -> bool:
    """Tell whether a series is one of ΔF/F."""
    return _type(file[name].parent) == "DfOverF" or bool(_RELATIVE.search(_last(name)))


def _last(name: str) -> str:
    """Names of a series and of the container that it is in."""
    return "/".join(name.split("/")[-2:])


def _chosen(file: h5py.File, path: Path) -> tuple[str, list[str], str | None]:
    """Path of the series of traces, those of all others, and that of the neuropil that belongs to it."""
    found = [name for name in _of_type(file, ("RoiResponseSeries",)) if "data" in file[name]]

    def rank(name: str) -> tuple[bool, bool, bool, str]:
        container, own = name.split("/")[-2:]
        unusual = container not in ("DfOverF", "Fluorescence")
        return not _is_relative(file, name), unusual, own != "RoiResponseSeries", name

    traces = sorted((name for name in found if not _NOT_TRACES.search(_last(name))), key=rank)
    if not traces:
        movies = _of_type(file, _MOVIES)
        hint = "It holds a movie: extract traces from it first, with --rois." if movies else "Add traces to it first."
        raise RecordingError(
            f"{path.name}: expected a RoiResponseSeries of ΔF/F or fluorescence, got {found or 'none'}. {hint}"
        )
    name = traces[0]
    container, own = name.rsplit("/", 1)
    around = [
        other
        for other in found
        if "neuropil" in _last(other).lower()
        and other.startswith(container.rsplit("/", 1)[0])
        and (other.rsplit("/", 1)[0] == container or other.rsplit("/", 1)[1] == own)
        and file[other]["data"].shape == file[name]["data"].shape
    ]
    corrected = _is_relative(file, name) or "correct" in name.lower()
    return name, [other for other in found if other != name], around[0] if around and not corrected else None


def _table(file: h5py.File, series: h5py.Group) -> tuple[h5py.Group, np.ndarray] | None:
    """Table of ROIs that a series refers to, and its rows there."""
    region = series.get("rois")
    if region is None or "table" not in region.attrs:
        return None
    return file[region.attrs["table"]], np.asarray(region[:], np.int64)


def _ids(table: h5py.Group, rows: np.ndarray) -> tuple[int, ...]:
    return tuple(table["id"][:][rows].tolist())


def _shape(series: h5py.Group) -> tuple[int, int]:
    """Numbers of frames and ROIs of a series."""
    shape = series["data"].shape
    shape = shape if len(shape) == 2 else (*shape, 1)
    return shape[::-1] if _is_transposed(series) else shape


def _is_transposed(series: h5py.Group) -> bool:
    """Tell whether a series is, against the standard, (roi, time), which the number of its ROIs may say."""
    shape, region = series["data"].shape, series.get("rois")
    return region is not None and len(shape) == 2 and shape[0] == len(region) != shape[1]


def _chunk_rows(data: h5py.Dataset, n_rois: int) -> int:
    """How many ROIs the file keeps together; a disk reads no less than 4 kB at a time."""
    columns = data.chunks[-1] if data.chunks else 4096 // data.dtype.itemsize
    return min(columns, n_rois)


def _read_rows(path: str, name: str, neuropil: str | None, rows: np.ndarray) -> np.ndarray:
    """(row, time) values of some ROIs of a series, less the changes of the neuropil around them if there is any."""
    with _opened(Path(path)) as file:
        values = _values(file[name], rows, _is_relative(file, name))
        if neuropil:
            around = _values(file[neuropil], _rows_in(file, name, neuropil, rows), False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of an ROI without any measured frame
                values -= np.float32(NEUROPIL_COEFFICIENT) * (around - np.nanmedian(around, axis=1, keepdims=True))
    return values


def _rows_in(file: h5py.File, name: str, other: str, rows: np.ndarray) -> np.ndarray:
    """Rows of another series that are of the same ROIs."""
    regions = [file[series].get("rois") for series in (name, other)]
    if any(region is None for region in regions):
        return rows
    own, others = (region[:].tolist() for region in regions)
    place = {roi: row for row, roi in enumerate(others)}
    absent = [own[row] for row in rows if own[row] not in place]
    if absent:
        raise RecordingError(
            f"{Path(file.filename).name}: expected neuropil of every ROI in {other}, got none of row {absent[0]} of "
            "the table of ROIs. Remove that series, or give all."
        )
    return np.array([place[own[row]] for row in rows], np.int64)


def _values(series: h5py.Group, rows: np.ndarray, relative: bool) -> np.ndarray:
    """(row, time) float32 values of a series in its unit, read a block of frames at a time."""
    data, transposed = series["data"], _is_transposed(series)
    n_frames = _shape(series)[0]
    values = np.empty((len(rows), n_frames), np.float32)
    if not len(rows):
        return values
    low, high = int(rows.min()), int(rows.max()) + 1
    step = max(BLOCK_BYTES // ((high - low) * data.dtype.itemsize), 1)
    if data.chunks and not transposed:
        step = max(step // data.chunks[0], 1) * data.chunks[0]
    for start in range(0, n_frames, step):
        frames = slice(start, min(start + step, n_frames))
        if transposed:
            block = data[low:high, frames]
        else:
            block = (data[frames, low:high] if data.ndim == 2 else data[frames][:, None]).T
        values[:, frames] = block[rows - low]
    percent = relative and _text(data.attrs.get("unit", "")).strip().lower() in ("%", "percent")
    factor = float(data.attrs.get("conversion", 1.0)) * (0.01 if percent else 1.0)
    offset = float(data.attrs.get("offset", 0.0)) * (0.01 if percent else 1.0)
    return values * np.float32(factor) + np.float32(offset) if (factor, offset) != (1.0, 0.0) else values


def _clock(series: h5py.Group, n_frames: int | None, path: Path, known: bool = False) -> tuple[float, float | None]:
    """Time of the first frame (s) and frame rate (Hz, None if unknown) of a series of ``n_frames``, if they matter.

    Where the rate is ``known`` otherwise time stamps need not be evenly spaced: it is then that of the median step.
    """
    if "starting_time" in series:
        start = series["starting_time"]
        return float(start[()]), positive(start.attrs.get("rate"))
    if "timestamps" not in series:
        return 0.0, None
    times = np.asarray(series["timestamps"][:], float)
    if n_frames is not None and len(times) != n_frames:
        raise RecordingError(
            f"{path.name}: expected one time stamp per frame in {series.name}, got {len(times)} for {n_frames} frames."
        )
    if known or not len(times):
        step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
        return (float(times[0]) if len(times) else 0.0), 1 / step if step > 0 else None
    return csv_table.read_clock(times, path)


def _masks(file: h5py.File, table: h5py.Group, rows: np.ndarray, ids: tuple[int, ...]) -> RoiMasks | None:
    """ROIs of some rows of a PlaneSegmentation, or None where any of them has no pixels."""
    images = table.get("image_mask")
    kind = next((kind for kind in ("voxel_mask", "pixel_mask") if kind in table), None)
    if kind:
        every, ends = table[kind][:], table[f"{kind}_index"][:].astype(np.int64)
        starts = np.concatenate([[0], ends[:-1]])
        voxels = (_of_list(every[starts[row] : ends[row]]) for row in rows)
    elif images is not None:
        voxels = (_of_image(images[row]) for row in rows)
    else:
        return None
    # An image is (x, y[, z]) in the file.
    shape = _plane(file, table, every) if images is None else images.shape[2:0:-1]
    pixels, weights, planes = [], [], []
    for x, y, z, w in voxels:
        inside = w > 0
        if not inside.any():
            return None
        flat, index = np.unique(y[inside] * shape[1] + x[inside], return_inverse=True)
        pixels.append(flat)
        weights.append(np.bincount(index.ravel(), w[inside]))
        planes.append(int(np.bincount(z[inside], w[inside]).argmax()))
    if "plane" in table and table["plane"].shape == table["id"].shape:
        planes = table["plane"][:][rows].astype(int).tolist()
    return RoiMasks(shape, tuple(pixels), ids, tuple(weights), tuple(planes))


def _of_image(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, y, z and weight of the pixels of an (x, y[, z]) image that are not 0."""
    x, y, *z = np.nonzero(image)
    return x, y, z[0] if z else np.zeros(len(x), np.int64), image[(x, y, *z)].astype(float)


def _of_list(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """x, y, z and weight of a list of pixels or voxels."""
    x, y = (points[axis].astype(np.int64) for axis in "xy")
    z = points["z"].astype(np.int64) if "z" in (points.dtype.names or ()) else np.zeros(len(x), np.int64)
    return x, y, z, points["weight"].astype(float)


def _plane(file: h5py.File, table: h5py.Group, points: np.ndarray) -> tuple[int, int]:
    """(y, x) of the imaging plane: that of the movie that was taken of it, else what just holds all ROIs."""
    size = [int(points[axis].max(initial=0)) + 1 for axis in "yx"]
    for name in _of_type(file, _MOVIES):
        series = file[name]
        if "imaging_plane" in table and series.get("imaging_plane") == table["imaging_plane"]:
            stated = series["dimension"][:] if "dimension" in series else series["data"].shape[1:]
            if len(stated) >= 2:
                size = [max(n, int(m)) for n, m in zip(size, stated[1::-1], strict=True)]
    return size[0], size[1]


def _accepted(table: h5py.Group, rows: np.ndarray) -> np.ndarray | None:
    """Which ROIs are cells, if a column of the table says so; suite2p's ``iscell`` has the probability beside it."""
    for name in (*_JUDGED, "Rejected"):
        if isinstance(table.get(name), h5py.Dataset):
            column = table[name][:][rows]
            judged = _judged(column if column.ndim == 1 else column[:, 0])
            return ~judged if judged is not None and name == "Rejected" else judged
    return None


def _judged(column: np.ndarray) -> np.ndarray | None:
    """Judgements as a column has them: numbers, a probability being one above a half, or words for them."""
    if column.dtype.kind in "biuf":
        return column > 0.5  # NaN is no judgement in favour
    words = np.array([_text(value).strip().lower() for value in column])
    known = np.isin(words, _YES) | np.isin(words, _NO)
    return np.isin(words, _YES) if known.all() else None


def _session(file: h5py.File) -> dict[str, Any]:
    """What the file says of the session and its subject, so that results can say it, too."""
    subject = file.get("general/subject", {})
    about = ("identifier", "session_start_time", "session_description")
    found: dict[str, Any] = {key: _text(file[key][()]) for key in about if key in file}
    known = ("subject_id", "species", "sex", "age", "description")
    return found | {"subject": {key: _text(subject[key][()]) for key in known if key in subject}}


def _external(path: Path, name: str) -> Any:
    """Movie of a TIFF file whose name is relative to that of the NWB file."""
    file = path.parent / name
    if file.suffix.lower() not in (".tif", ".tiff"):
        raise RecordingError(
            f"{path.name}: expected frames in the file or in TIFF files, got {name}. Open that instead."
        )
    return tiff.open_movie(existing(file))[0]
