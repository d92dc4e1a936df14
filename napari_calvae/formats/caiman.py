"""Results of CaImAn (``.hdf5``): the group ``estimates`` of a saved CNMF, CNMF-E or OnACID object."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from scipy import sparse

from napari_calvae.formats._files import DAMAGE, believed_rate, check_claims
from napari_calvae.recording import RecordingError, Unit
from napari_calvae.roi_masks import RoiMasks
from napari_calvae.trace_source import TraceSource

PATTERNS = ("*.hdf5", "*.h5")

#: Where the frame rate and the size of the image have been kept.
_RATES = ("params/data/fr", "params/fr", "fr")
_SIZES = ("dims", "estimates/dims", "params/data/dims")


def matches(path: Path) -> bool:
    """Tell whether this is an HDF5 file with CaImAn's estimates."""
    if path.suffix.lower() not in (".h5", ".hdf5") or not path.is_file() or not h5py.is_hdf5(path):
        return False
    try:
        with h5py.File(path) as file:
            return isinstance(file.get("estimates"), h5py.Group)
    except OSError:  # truncated: nobody can tell whose it is
        return False


def open_source(path: Path, frame_rate: float | None = None, unit: Unit | None = None) -> TraceSource:
    """Open the traces of all components, accepted or not, without loading them; ids are rows of ``C``, from 1.

    Values are ``F_dff`` if it was computed. Else they are raw fluorescence: ``C + YrA``, from which CaImAn has removed
    the background, plus the median over time of the background that the footprint sees, (Aᵀ b f) / |A|² (in one-photon
    files Aᵀ b0 / |A|²). This restores the baseline that ΔF/F divides by and none of the background's changes. Where no
    background is stored, the values are what CaImAn left, around zero, and cannot be turned into ΔF/F.

    ``idx_components`` says which are accepted, footprints ``A`` become ROIs. ``rois`` is None for volumes, and where a
    footprint is empty or the size of the image is not stated.

    Warns
    -----
    UserWarning
        If only the denoised ``C`` is there: the noise that tells how sure one can be of a spike is gone.

    Raises
    ------
    RecordingError
        If there are no traces, parts contradict each other, or the file is damaged.
    """
    try:
        with h5py.File(path) as file:
            check_claims(file, path)
            estimates = file["estimates"]
            names = _traces(estimates, path)
            n_rois, n_frames = estimates[names[0]].shape
            footprints = _matrix(estimates, "A")
            if footprints is not None and footprints.shape[1] != n_rois:
                raise RecordingError(
                    f"{path.name}: expected a footprint for each of {n_rois} traces, got {footprints.shape[1]}."
                )
            dff = names == ("F_dff",)
            baseline = np.zeros(n_rois) if dff else _background(estimates, footprints)
            chunks = estimates[names[0]].chunks
            rate, contradicted = believed_rate(frame_rate, _number(file, _RATES))
            return TraceSource(
                partial(_fetch, str(path), names, (np.zeros(n_rois) if baseline is None else baseline).astype("f4")),
                n_rois,
                n_frames,
                rate,  # type: ignore[arg-type]
                unit or ("dff" if dff else "raw"),
                provenance=contradicted
                | {
                    "source": path.name,
                    "caiman": {"traces": " + ".join(names), "baseline_restored": not dff and baseline is not None},
                },
                rois=_masks(file, footprints),
                accepted=_accepted(estimates, n_rois, path),
                chunk_rows=chunks[0] if chunks else 1,
            )
    except RecordingError:
        raise
    except DAMAGE as error:
        raise RecordingError(
            f"{path.name}: expected CaImAn's estimates, got a file that cannot be read ({error}). "
            "Save the CNMF object again with its method save."
        ) from error


def _array(group: h5py.Group, name: str) -> h5py.Dataset | None:
    """Return a dataset of numbers; what CaImAn does not have it stores as the text NoneType."""
    found = group.get(name)
    there = isinstance(found, h5py.Dataset) and found.ndim and found.size and found.dtype.kind in "fiub"
    return found if there else None


def _traces(estimates: h5py.Group, path: Path) -> tuple[str, ...]:
    """Names of the matrices (component, time) whose sum the traces are."""
    there = {name: array.shape for name in ("F_dff", "C", "YrA", "R") if (array := _array(estimates, name)) is not None}
    if "F_dff" in there:
        names: tuple[str, ...] = ("F_dff",)
    elif "C" in there:
        residual = next((name for name in ("YrA", "R") if there.get(name) == there["C"]), None)
        names = ("C",) if residual is None else ("C", residual)
        if residual is None and "YrA" in there:
            raise RecordingError(f"{path.name}: expected C and YrA of one shape, got {there['C']} and {there['YrA']}.")
    else:
        raise RecordingError(
            f"{path.name}: expected estimates/F_dff, or estimates/C and YrA, got {sorted(estimates)}. "
            "Save the object after its temporal components were found."
        )
    if len(there[names[0]]) != 2:
        raise RecordingError(f"{path.name}: expected {names[0]} (component, time), got shape {there[names[0]]}.")
    if names == ("C",):
        warnings.warn(
            f"{path.name}: expected F_dff or the residuals YrA, got only the denoised traces C. Spikes inferred from "
            "them look surer than they are; run detrend_df_f or compute_residuals in CaImAn and save again.",
            UserWarning,
            stacklevel=2,
        )
    return names


def _matrix(group: h5py.Group, name: str) -> Any:
    """Matrix that is stored as an array or as the parts of a sparse one, as a sparse one by columns."""
    if isinstance(parts := group.get(name), h5py.Group):
        shape = tuple(int(n) for n in parts["shape"][()])
        matrix = sparse.csc_array((parts["data"][()], parts["indices"][()], parts["indptr"][()]), shape)
        matrix.check_format()
        return matrix
    array = _array(group, name)
    return None if array is None or array.ndim != 2 else sparse.csc_array(array[()])


def _background(estimates: h5py.Group, footprints: Any) -> np.ndarray | None:
    """(component,) median over time of the background in each footprint, on the scale of ``C``."""
    if footprints is None:
        return None
    spatial, temporal, constant = _matrix(estimates, "b"), _array(estimates, "f"), _array(estimates, "b0")
    power = np.asarray(footprints.power(2).sum(axis=0)).ravel()
    if spatial is not None and temporal is not None:
        seen = (footprints.T @ spatial).toarray()
        levels = np.array([np.median(row @ temporal[()]) for row in seen])
    elif constant is not None:
        levels = footprints.T @ constant[()].ravel()
    else:
        return None
    return levels / np.where(power > 0, power, 1)


def _number(file: h5py.File, places: tuple[str, ...]) -> float | None:
    """Return the one number in the first of these places that has one."""
    for place in places:
        found = file.get(place)
        if isinstance(found, h5py.Dataset) and found.size == 1 and found.dtype.kind in "fiu":
            return float(np.ravel(found[()])[0])
    return None


def _masks(file: h5py.File, footprints: Any) -> RoiMasks | None:
    """Footprints as ROIs. CaImAn counts pixels down the columns of the image."""
    sizes = (array[()].ravel() for name in _SIZES if (array := _array(file, name)) is not None)
    size = next(sizes, None)
    if footprints is None or size is None or len(size) != 2 or np.prod(size) != footprints.shape[0]:
        return None
    height, width = (int(n) for n in size)
    footprints.eliminate_zeros()
    ends = footprints.indptr
    if not np.diff(ends).all():
        return None
    x, y = np.divmod(footprints.indices, height)
    flat = y.astype(np.int64) * width + x
    pixels, weights = (tuple(np.split(a, ends[1:-1])) for a in (flat, footprints.data))
    return RoiMasks((height, width), pixels, weights=weights)


def _accepted(estimates: h5py.Group, n_rois: int, path: Path) -> np.ndarray | None:
    """Which components CaImAn's evaluation accepted, if it was run."""
    found = estimates.get("idx_components")
    if not isinstance(found, h5py.Dataset) or found.ndim != 1 or found.dtype.kind not in "iuf":
        return None
    index = found[()].astype(np.int64)
    if len(index) and (index.min() < 0 or index.max() >= n_rois):
        raise RecordingError(f"{path.name}: expected idx_components from 0 to {n_rois - 1}, got {index.max()}.")
    accepted = np.zeros(n_rois, bool)
    accepted[index] = True
    return accepted


def _fetch(path: str, names: tuple[str, ...], baseline: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(row, time) sum of some matrices, and a constant per row."""
    first, last = int(rows.min()), int(rows.max()) + 1
    try:
        with h5py.File(path) as file:
            # One slab and a choice of its rows: HDF5 is slow with many rows named one by one.
            parts = [file["estimates"][name][first:last][rows - first].astype(np.float32) for name in names]
    except DAMAGE as error:
        raise RecordingError(f"{Path(path).name}: expected CaImAn's estimates, got {error}.") from error
    return sum(parts[1:], parts[0]) + baseline[rows, None]
