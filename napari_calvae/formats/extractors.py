"""Files of other programs, through the segmentation extractors of roiextractors; asked after all formats of our own.

- Inscopix cell sets (``.isxd``; needs the package ``isx``, too);
- output folders of Minian (``A.zarr``, ``b.zarr`` and ``C.zarr``, the frame rate from ``timeStamps.csv``);
- EXTRACT, new (``output``) and old (``extractAnalysisOutput``), in MATLAB 7.3 files;
- CNMF-E (``extractedSignals``, ``extractedImages``) in MATLAB 7.3 files.

SIMA's data sets are pickles, which may run any code when they are opened: they are refused.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from napari_calvae.conversion import needed
from napari_calvae.formats import csv_table
from napari_calvae.recording import RecordingError, Traces, Unit, check_frame_rate
from napari_calvae.roi_masks import RoiMasks

PATTERNS = ("*.isxd",)

#: What is read, the first that there is: the name of a response, and the unit that it implies.
_RESPONSES: tuple[tuple[str, Unit], ...] = (("dff", "dff"), ("raw", "raw"), ("denoised", "raw"))


def matches(path: Path) -> bool:
    """Tell whether this is a file or folder of one of these programs."""
    return _program(path) is not None


def read(path: Path, frame_rate: float | None = None, unit: Unit | None = None) -> Traces:
    """Read ΔF/F, else fluorescence, else denoised traces with the baseline that belongs to them.

    ROIs keep their ids; those without, or with names, are numbered from 1, and names are in the provenance. Masks are
    as roiextractors gives them, and left out if one has no pixels. ``accepted`` is what the program says; Inscopix's
    undecided cells count as accepted.

    Warns
    -----
    UserWarning
        If there are only denoised traces: the noise that tells how sure one can be of a spike is gone.

    Raises
    ------
    RecordingError
        If a package is missing, the file cannot be read, or it states no frame rate and none is given.
    """
    program = _program(path)
    if program == "SIMA":
        raise RecordingError(
            f"{path.name}: expected traces that are safe to open, got a SIMA data set, made of pickles that may run "
            "any code. Export its signals with SIMA as .csv and give that."
        )
    package = needed("roiextractors", RecordingError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they tell what files lack that is not asked for here
            found = _open(package, str(program), path, frame_rate)
            name, traces = _traces(found, str(program), path, (frame_rate, unit))
            if hasattr(found, "close"):
                found.close()
    except (RecordingError, PermissionError):
        raise
    except ImportError as error:
        raise RecordingError(
            f"{path.name}: expected the package that reads files of {program}, got {error}. Install it with pip."
        ) from error
    except Exception as error:  # what the extractors raise for damaged files is not listed anywhere
        raise RecordingError(
            f"{path.name}: expected an output of {program}, got one that cannot be read "
            f"({type(error).__name__}: {error}). Export it again, or convert the traces to .npz, .csv or .nwb."
        ) from error
    if name == "denoised":
        warnings.warn(
            f"{path.name}: expected fluorescence, got only the denoised traces of {program}. Spikes inferred from them "
            "look surer than they are.",
            UserWarning,
            stacklevel=2,
        )
    return traces


def _program(path: Path) -> str | None:
    """Name of the program whose output this is."""
    suffix = path.suffix.lower()
    if path.is_dir():
        if suffix == ".sima":
            return "SIMA"
        return "Minian" if all((path / name).is_dir() for name in ("A.zarr", "C.zarr")) else None
    if suffix == ".isxd":
        return "Inscopix"
    if suffix != ".mat" or not h5py.is_hdf5(path):
        return None
    try:
        with h5py.File(path) as file:
            groups = {name: set(file[name]) for name in file if isinstance(file[name], h5py.Group)}
    except (OSError, RuntimeError, KeyError):
        return None
    if {"temporal_weights", "spatial_weights"} <= groups.get("output", set()) or "extractAnalysisOutput" in groups:
        return "EXTRACT"
    return "CNMF-E" if any({"extractedSignals", "extractedImages"} <= names for names in groups.values()) else None


def _open(package: Any, program: str, path: Path, frame_rate: float | None) -> Any:
    """Open an output with the extractor of its program."""
    if program == "Inscopix":
        return package.InscopixSegmentationExtractor(path)
    if program == "CNMF-E":
        return package.CnmfeSegmentationExtractor(path)
    if program == "Minian":
        rate = frame_rate if (path / "timeStamps.csv").is_file() else check_frame_rate(frame_rate)
        return _minian(package)(path, sampling_frequency=rate)
    with h5py.File(path) as file:
        new = "output" in file
    return package.ExtractSegmentationExtractor(path, check_frame_rate(frame_rate) if new else frame_rate)


def _minian(package: Any) -> type:
    """Minian's extractor, for folders that are no Zarr group themselves, too: Minian stores each array on its own."""
    import zarr

    class Minian(package.MinianSegmentationExtractor):
        def _read_zarr_group(self, zarr_group: str) -> Any:
            part = self.folder_path / zarr_group.strip("/")
            return zarr.open(part, mode="r") if part.exists() else None

    return Minian


def _traces(found: Any, program: str, path: Path, given: tuple[float | None, Unit | None]) -> tuple[str, Traces]:
    """Name of the response that was read, and the traces."""
    frame_rate, unit = given
    if program == "Inscopix":  # these alone are (roi, time)
        name, values = "raw", np.asarray(found.get_traces())
        stated = str((found.cell_set.get_acquisition_info() or {}).get("Trace Units", ""))
        implied: Unit = "dff" if stated.lower() in ("df over f", "df/f", "dff") else "raw"
    else:
        name, implied = next((r for r in _RESPONSES if found.get_traces_dict().get(r[0]) is not None), ("", "raw"))
        if not name:
            raise RecordingError(f"{path.name}: expected traces of ROIs, got none. Export them from {program}.")
        values = np.asarray(found.get_traces(name=name)).T
        baseline = found.get_traces(name="baseline") if name == "denoised" else None
        if baseline is not None and baseline.T.shape == values.shape:
            values = values + baseline.T
    names = found.get_roi_ids()
    numbered = all(isinstance(n, int | np.integer) for n in names)
    counted = numbered and list(names) == list(range(len(names)))  # these are rows, not ids
    ids = tuple(int(n) for n in names) if numbered and not counted else tuple(range(1, len(names) + 1))
    about = {"program": program, "response": name}
    t0 = 0.0
    if program == "Minian" and frame_rate is None:
        t0, frame_rate = csv_table.read_clock(found.get_native_timestamps(), path / "timeStamps.csv")
    return name, Traces(
        values,
        found.get_sampling_frequency() if frame_rate is None else frame_rate,
        unit or implied,
        ids,
        t0,
        provenance={"source": path.name, "roiextractors": about | ({} if numbered else {"roi_names": list(names)})},
        rois=_masks(found, program, ids),
        accepted=_accepted(found, program, names),
    )


def _masks(found: Any, program: str, ids: tuple[int, ...]) -> RoiMasks | None:
    """Masks of the ROIs, or None where one is empty."""
    keys = list(range(len(ids))) if program == "Minian" else found.get_roi_ids()  # Minian's masks go by their rows
    pixels, weights = [], []
    shape = (1, 1)  # that of the masks: some extractors state the size of the image the wrong way round
    for key in keys:
        image = np.asarray(found.get_roi_image_masks([key]), float)[..., 0]
        inside = image.ravel() > 0
        if not inside.any() or image.ndim != 2:
            return None
        shape = image.shape
        pixels.append(np.flatnonzero(inside))
        weights.append(image.ravel()[inside])
    return RoiMasks(shape, tuple(pixels), ids, tuple(weights))


def _accepted(found: Any, program: str, names: list) -> np.ndarray | None:
    """Which ROIs are cells, if the program judges."""
    if program == "Inscopix":
        return np.asarray(found.get_property("cell_status", names)) != "rejected"
    if hasattr(found, "get_accepted_list"):
        return np.isin(names, found.get_accepted_list())
    return None
