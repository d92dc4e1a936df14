"""Output folders of suite2p: traces, neuropil, masks and accepted cells of its planes; spikes in the place of its own.

Read is what versions 0.10 to 1.1 write: ``F.npy`` and ``stat.npy``, and if they are there ``Fneu.npy``, ``iscell.npy``
and the settings, in ``ops.npy`` or in ``settings.npy`` and ``db.npy``.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.formats._files import believed_rate, provenance_json, readable, whole_files
from napari_calvae.formats._pickles import load_dicts
from napari_calvae.recording import RecordingError, SpikeInference, Traces, Unit
from napari_calvae.roi_masks import RoiMasks
from napari_calvae.trace_source import TraceSource

PATTERNS = ("*.npy",)
SUFFIXES = ("spks.npy",)

#: Share of the neuropil signal that suite2p takes to be in a ROI unless its settings say otherwise.
_COEFFICIENT = 0.7
_PLANE = re.compile(r"plane(\d+)")


def matches(path: Path) -> bool:
    """Tell whether this is a plane's folder, the folder of the planes, or ``F.npy`` in a plane's folder."""
    if path.is_dir():
        return _is_plane(path) or bool(_plane_folders(path))
    return path.name == "F.npy" and (path.parent / "stat.npy").is_file()


def open_source(
    path: Path, frame_rate: float | None = None, unit: Unit | None = None, neuropil: float | None = None
) -> TraceSource:
    """Open the traces of one plane, or of all planes one after the other, without loading them.

    Values are F − c · (N − median N), where N is the neuropil signal of the ROI and c suite2p's ``neucoeff`` or
    ``neuropil_coefficient``, 0.7 if it is not stated, or ``neuropil`` if that is given; the baseline thus stays what it
    was (see ``iter_extract``). Without ``Fneu.npy`` they are F.

    ROIs are numbered 1, 2, … as in the rows of ``F.npy``, over all planes in their order. They have suite2p's weights,
    and the pixels that suite2p read: without those that belong to several ROIs unless ``allow_overlap`` was set. ROIs
    of planes of unequal size lie in one image as large as the largest, in its upper left corner. ``rois`` is None if
    nothing states the size of the image.

    Planes may differ in length by a few frames: what the shorter ones lack is missing (NaN). The frame rate is that of
    a plane (``fs``); that planes are scanned one after the other within a frame is not accounted for.

    Raises
    ------
    RecordingError
        If a file is missing or damaged, files contradict each other, or planes have different frame rates; if
        ``neuropil`` is given, but is not between 0 and 2, or there is no ``Fneu.npy``.
    """
    folder = path if path.is_dir() else path.parent
    planes = [_open_plane(each) for each in ([folder] if _is_plane(folder) else _plane_folders(folder))]
    if neuropil is not None:
        planes = [_with_coefficient(plane, neuropil) for plane in planes]
    rates = {plane.frame_rate for plane in planes}
    if frame_rate is None and len(rates) > 1:
        raise RecordingError(
            f"{folder.name}: expected one frame rate for all planes, got {rates}. Read each by itself."
        )
    stated = rates.pop() if len(rates) == 1 else None
    rate, contradicted = believed_rate(frame_rate, stated)
    provenance = contradicted | {
        "source": folder.name,
        "suite2p": {"version": planes[0].version, "planes": [plane.provenance for plane in planes]},
    }
    judged = all(plane.accepted is not None for plane in planes)
    n_frames = max(plane.F.shape[1] for plane in planes)
    ends = np.cumsum([len(plane.F) for plane in planes]).tolist()
    return TraceSource(
        partial(_fetch, tuple(plane.files for plane in planes), tuple(ends), n_frames),
        ends[-1],
        n_frames,
        rate,  # type: ignore[arg-type]
        unit or "raw",
        provenance=provenance,
        rois=_masks(planes),
        accepted=np.concatenate([plane.accepted for plane in planes]) if judged else None,  # type: ignore[misc]
        chunk_rows=1 if all(plane.F.flags.c_contiguous for plane in planes) else ends[-1],
    )


def read_mean_image(path: Path) -> np.ndarray | None:
    """Mean of suite2p's registered movie, (y, x) float32, or (z, y, x) if the ROIs lie in planes besides the first.

    Each plane lies in the upper left corner, as its ROIs do, and is 0 where suite2p keeps none; None if no plane has
    one.
    """
    folder = path if path.is_dir() else path.parent
    planes = [_open_plane(each) for each in ([folder] if _is_plane(folder) else _plane_folders(folder))]
    images = {plane.number: plane.mean for plane in planes if plane.mean is not None}
    if not images:
        return None
    height, width = np.max([plane.shape for plane in planes if plane.shape is not None], axis=0).tolist()
    mean = np.zeros((1 + max(plane.number for plane in planes), height, width), np.float32)
    for number, image in images.items():
        mean[number, : image.shape[0], : image.shape[1]] = image
    return mean if len(mean) > 1 else mean[0]


def outputs(path: Path) -> tuple[Path, ...]:
    """All that ``write`` makes: two files, or a folder with them if it is not there yet."""
    return _written(path) if path.expanduser().parent.is_dir() else (path.parent,)


def write(value: SpikeInference | Traces, path: Path) -> None:
    """Write expected spikes per frame as float32 ``spks.npy``, row for row as ``F.npy``, and the provenance beside it.

    The folder is made if it is missing. Where the result is of some of the ROIs only, the rows of the others are 0. A
    result of several planes is one array, row for row as ``F.npy`` in suite2p's folder ``combined``.

    To see the spikes in suite2p's own window, copy the plane's folder and replace the ``spks.npy`` of the copy
    (``overwrite``).
    """
    if isinstance(value, Traces):
        raise RecordingError(f"{path.name}: expected inferred spikes, got traces. Write them as .npz or .h5.")
    spikes = value.rate / np.float32(value.frame_rate)
    planes = value.traces.provenance.get("suite2p", {}).get("planes", [])
    n_rois = sum(plane["rois"] for plane in planes)
    if planes:
        ids = np.asarray(value.roi_ids)
        if ids.min() < 1 or ids.max() > n_rois:
            raise RecordingError(
                f"{path.name}: expected ROIs 1 to {n_rois}, the rows of F.npy, got {ids.min()} to {ids.max()}. "
                "Keep the ids that the ROIs had when they were read, or write as .npz."
            )
        every = np.zeros((n_rois, spikes.shape[1]), np.float32)
        every[ids - 1] = spikes
        spikes, row = every, 0
        for plane in planes:
            spikes[row : row + plane["rois"], plane["frames"] :] = 0
            row += plane["rois"]
    with _folder(path.parent), whole_files(*_written(path)) as (temporary, beside):
        # Straight into a file numpy would not notice a disk that runs full within the last few kilobytes.
        content = io.BytesIO()
        np.save(content, spikes.astype(np.float32, copy=False), allow_pickle=False)
        temporary.write_bytes(content.getbuffer())
        beside.write_text(provenance_json(value), encoding="utf-8")


def _written(path: Path) -> tuple[Path, Path]:
    return path, path.with_suffix(".provenance.json")


@contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Make a folder if it is missing, and remove it again if what follows fails."""
    missing = not folder.is_dir()
    if missing:
        folder.mkdir()
    try:
        yield
    except BaseException:
        if missing:
            folder.rmdir()
        raise


@dataclass(frozen=True, eq=False)
class _Plane:
    """What the folder of one plane holds."""

    folder: Path
    F: np.ndarray
    neuropil: bool
    coefficient: float
    stat: Sequence[Mapping[str, Any]]
    accepted: np.ndarray | None
    frame_rate: float | None
    shape: tuple[int, int] | None
    allow_overlap: bool
    version: str | None
    mean: np.ndarray | None

    @property
    def number(self) -> int:
        """Number of the plane in the name of its folder."""
        numbered = _PLANE.fullmatch(self.folder.name)
        return int(numbered[1]) if numbered else 0

    @property
    def files(self) -> tuple[str, str | None, float]:
        """Where to read the traces from, and how much neuropil to subtract."""
        return str(self.folder / "F.npy"), str(self.folder / "Fneu.npy") if self.neuropil else None, self.coefficient

    @property
    def provenance(self) -> dict[str, Any]:
        return {
            "folder": self.folder.name,
            "rois": self.F.shape[0],
            "frames": self.F.shape[1],
            "neuropil_coefficient": self.coefficient if self.neuropil else None,
        }


def _is_plane(folder: Path) -> bool:
    return (folder / "F.npy").is_file() or (folder / "stat.npy").is_file()


def _plane_folders(folder: Path) -> list[Path]:
    """Folders of the planes in which suite2p found ROIs, in their order."""
    numbered = [(_PLANE.fullmatch(each.name), each) for each in folder.iterdir() if each.is_dir()]
    return [each for _, each in sorted((int(n[1]), each) for n, each in numbered if n) if _is_plane(each)]


def _open_plane(folder: Path) -> _Plane:
    for name in ("F.npy", "stat.npy"):
        if not (folder / name).is_file():
            raise RecordingError(
                f"{folder.name}: expected suite2p's F.npy and stat.npy, found no {name}. Let suite2p extract traces."
            )
    traces = _open_array(folder / "F.npy")
    neuropil = (folder / "Fneu.npy").is_file()
    if neuropil and (other := _open_array(folder / "Fneu.npy")).shape != traces.shape:
        raise RecordingError(f"{folder.name}/Fneu.npy: expected the shape of F.npy, {traces.shape}, got {other.shape}.")
    stat = load_dicts(folder / "stat.npy")
    accepted = None
    if (folder / "iscell.npy").is_file():
        accepted = _open_array(folder / "iscell.npy")[:, 0] > 0.5
    for name, found in (("stat.npy", stat), ("iscell.npy", accepted)):
        if found is not None and len(found) != len(traces):
            raise RecordingError(
                f"{folder.name}/{name}: expected one entry per row of F.npy, {len(traces)}, got {len(found)}. "
                "The files are from different runs: let suite2p write all of them again."
            )
    settings = _settings(folder)
    nested = settings.get("extraction", {})  # since 1.0
    try:
        coefficient = float(nested.get("neuropil_coefficient", settings.get("neucoeff", _COEFFICIENT)))
        rate = float(settings["fs"]) if settings.get("fs") is not None else None
        shape = (int(settings["Ly"]), int(settings["Lx"])) if {"Ly", "Lx"} <= set(settings) else None
    except (AttributeError, TypeError, ValueError) as error:
        raise RecordingError(
            f"{folder.name}: expected numbers for fs, Ly, Lx and the neuropil coefficient in suite2p's settings, "
            f"got others ({error})."
        ) from error
    return _Plane(
        folder,
        traces,
        neuropil,
        coefficient,
        stat,
        accepted,
        rate,
        shape,
        bool(nested.get("allow_overlap", settings.get("allow_overlap", False))),
        None if (version := settings.get("version", settings.get("suite2p_version"))) is None else str(version),
        _image(settings.get("meanImg"), shape),
    )


def _image(found: Any, shape: tuple[int, int] | None) -> np.ndarray | None:
    """(y, x) float32 image of a plane; None where it is not one of the plane's size."""
    if not isinstance(found, np.ndarray) or found.shape != shape or found.dtype.kind not in "fiu":
        return None
    return np.nan_to_num(np.array(found, np.float32))


def _with_coefficient(plane: _Plane, coefficient: float) -> _Plane:
    """The same with another share of the neuropil to subtract."""
    if not plane.neuropil:
        raise RecordingError(
            f"neuropil: expected suite2p's signal of the neuropil, found no Fneu.npy in {plane.folder.name}. "
            "Leave it out (--neuropil), or let suite2p extract traces again."
        )
    if not 0 <= coefficient <= 2:
        raise RecordingError(f"neuropil: expected a coefficient between 0 and 2, got {coefficient}.")
    return replace(plane, coefficient=float(coefficient))


def _settings(folder: Path) -> dict[str, Any]:
    """Settings of a plane, or else those of its parent, from where suite2p's own window takes them."""
    for place in (folder, folder.parent):
        for names in (("ops.npy",), ("db.npy", "settings.npy")):
            there = [place / name for name in names if (place / name).is_file()]
            if there:
                return {key: value for file in there for each in load_dicts(file) for key, value in each.items()}
    return {}


def _open_array(path: Path) -> np.ndarray:
    """Map a (row, column) array of numbers into memory."""
    hint = "It may be incomplete: copy it again from where it was made."
    with readable(f"{path.parent.name}/{path.name}", "a matrix of numbers, one row per ROI", hint):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "fiub" or not array.size:
            raise ValueError(f"dtype {getattr(array, 'dtype', None)}, shape {getattr(array, 'shape', None)}")
    return array


def _fetch(
    planes: tuple[tuple[str, str | None, float], ...], ends: tuple[int, ...], n_frames: int, rows: np.ndarray
) -> np.ndarray:
    """(row, time) neuropil-corrected traces of some rows over all planes."""
    values = np.full((len(rows), n_frames), np.nan, np.float32)
    first = 0
    for (traces, neuropil, coefficient), end in zip(planes, ends, strict=True):
        here = (rows >= first) & (rows < end)
        if here.any():
            own = rows[here] - first
            block = np.asarray(_open_array(Path(traces))[own], np.float32)
            if neuropil is not None and coefficient:
                for row, around in zip(block, np.asarray(_open_array(Path(neuropil))[own], np.float32), strict=True):
                    measured = np.isfinite(around)
                    if measured.any():
                        row -= coefficient * (around - np.median(around[measured]))
            values[here, : block.shape[1]] = block
        first = end
    return values


def _masks(planes: Sequence[_Plane]) -> RoiMasks | None:
    """ROIs of all planes, in an image in which the largest plane finds room."""
    shapes = [plane.shape for plane in planes if plane.shape is not None]
    if len(shapes) < len(planes):
        return None
    height, width = np.max(shapes, axis=0).tolist()
    pixels, weights, numbers = [], [], []
    for plane in planes:
        for row, roi in enumerate(plane.stat):
            try:
                y, x, lam = (np.asarray(roi[name]).ravel() for name in ("ypix", "xpix", "lam"))
                used = ~np.asarray(roi["overlap"], bool).ravel() if "overlap" in roi else np.ones(len(y), bool)
                if plane.allow_overlap or not used.any():
                    used[:] = True
                if len(y) and (min(y.min(), x.min()) < 0 or y.max() >= height or x.max() >= width):
                    raise ValueError(f"pixels outside the image of {height} × {width}")
                pixels.append(y[used].astype(np.int64) * width + x[used])
                weights.append(lam[used].astype(np.float32))
                numbers.append(plane.number)
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise RecordingError(
                    f"{plane.folder.name}/stat.npy: expected ypix, xpix and lam of equal length for each ROI, "
                    f"got something else in row {row} ({error!r})."
                ) from error
    return RoiMasks((height, width), tuple(pixels), weights=tuple(weights), planes=tuple(numbers))
