"""What all formats share: clear errors for paths, files that appear whole or not at all, results as named arrays."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import secrets
import shutil
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.conversion import json_default
from napari_calvae.formats._lazy import MOST_PIXELS
from napari_calvae.recording import EVENT_DTYPE, RecordingError, SpikeInference, Traces, Unit
from napari_calvae.roi_masks import RoiMasks

#: Names under which files hold traces, and the unit that each implies (None: the file's ``unit``, else ΔF/F).
TRACE_NAMES: dict[str, Unit | None] = {"values": None, "dff": "dff", "F": "raw"}
#: Under which names files of named arrays have the ROIs of traces, and what else they may say of them.
_MASKS = ("rois_shape", "rois_pixels", "rois_weights", "rois_sizes", "rois_planes")
TRACE_FACTS = ("frame_rate", "unit", "roi_ids", "t0", "accepted", *_MASKS)
#: One of them is in every folder that is a Zarr store.
ZARR_MARKS = ("zarr.json", ".zgroup", ".zarray")


#: What libraries raise for files that are cut short, damaged or of another kind (``SyntaxError``: bad XML).
DAMAGE: tuple[type[Exception], ...] = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError)
DAMAGE += (ArithmeticError, EOFError, MemoryError, SyntaxError, ImportError)
DAMAGE += (pickle.UnpicklingError, struct.error, tokenize.TokenError, zipfile.BadZipFile, zlib.error)


@contextmanager
def readable(file: Path | str, kind: str, hint: str = "Copy it again, or save it once more.") -> Iterator[None]:
    """Say it in one way when a file, or what is called so, said to be of a ``kind``, cannot be read."""
    name = file if isinstance(file, str) else file.name
    try:
        yield
    except RecordingError:
        raise
    except PermissionError as error:
        raise RecordingError(
            f"{name}: expected {kind} that may be read, got no permission ({error}). "
            "Change the permissions of the file, or ask whoever owns it."
        ) from error
    except FileNotFoundError as error:
        raise RecordingError(
            f"{name}: expected {kind}, found nothing there any more. Put it back, or open it from where it is now."
        ) from error
    except DAMAGE as error:
        raise RecordingError(f"{name}: expected {kind}, got one that cannot be read ({error}). {hint}") from error


def existing(path: str | Path) -> Path:
    """Return the path if there is something, else say so."""
    file = Path(path).expanduser()
    if not file.exists():
        raise FileNotFoundError(f"{file}: expected a file, found nothing there. Check the path.")
    if not os.access(file, os.R_OK):
        raise PermissionError(f"{file}: expected a file that you may read, got one without permission. Ask its owner.")
    return file


def check_output(path: str | Path, overwrite: bool = False, folder: bool = False) -> Path:
    """Return the path if a file, or a ``folder``, may be written there, else say why not; to be asked before long work.

    A folder is only ever replaced by one of its kind: by a Zarr store if it is one.
    """
    file = Path(path).expanduser()
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file}: expected an existing folder, got {file.parent}. Create it first.")
    if file.is_dir() and not folder:
        raise IsADirectoryError(f"{file}: expected the name of a file, got a folder.")
    if file.exists() and not overwrite:
        raise FileExistsError(f"{file}: exists already. Choose another name or say overwrite (--overwrite).")
    if file.exists() and folder and not any((file / name).exists() for name in ZARR_MARKS):
        raise FileExistsError(f"{file}: expected a Zarr store to replace, got something else. Choose another name.")
    return file


def check_apart(outputs: Iterable[Path], *inputs: Path | None) -> None:
    """Refuse outputs of which one is, or holds, what is read: it would be gone before it has been, or for good."""
    written = {path.expanduser().resolve(): path for path in outputs}
    for read in (path.expanduser().resolve() for path in inputs if path is not None):
        for place in (read, *read.parents):
            if place in written:
                raise RecordingError(
                    f"output: expected another name than that of the input, got {written[place]}. Choose another."
                )


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Give the name of a folder beside ``path`` to make; it takes the place of ``path`` only if nothing fails."""
    tag = secrets.token_hex(4)
    new, old = (path.with_name(f".{path.name}.{tag}.{end}") for end in ("part", "old"))
    try:
        yield new
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def whole_files(*paths: Path, instead_of: Iterable[Path] = ()) -> Iterator[tuple[Path, ...]]:
    """Give temporary names beside ``paths`` to write to; they take the places of ``paths`` only if nothing fails.

    Of ``instead_of``, all files of what is replaced, those that have no successor are then removed.
    """
    tag = secrets.token_hex(4)
    temporary = tuple(path.with_name(f".{path.name}.{tag}.part") for path in paths)
    try:
        yield temporary
        for new, path in zip(temporary, paths, strict=True):
            os.replace(new, path)
        for old in set(instead_of) - set(paths):
            old.unlink(missing_ok=True)
    finally:
        for new in temporary:
            new.unlink(missing_ok=True)


def reserve(file: Path, n_bytes: int) -> None:
    """Make a file longer by so many bytes, or raise an ``OSError`` that says why there is no room for them."""
    with open(file, "r+b") as opened:
        end = opened.seek(0, os.SEEK_END)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(opened.fileno(), end, n_bytes)
        elif shutil.disk_usage(file.parent).free < n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def check_memory(n_bytes: int, path: Path) -> None:
    """Refuse arrays that memory cannot hold, be they so large or said to be by a forged header, before they are read.

    A system that lends more memory than it has ends the process instead.
    """
    there = _memory()
    if n_bytes > there:
        raise RecordingError(
            f"{path.name}: expected arrays that fit into this machine's {there / 1e9:.3g} GB of memory, got "
            f"{n_bytes / 1e9:.3g} GB. Save it as Zarr, of which only a part is read at a time, or cut it."
        )


def check_claims(file: Any, path: Path, most_axes: int = 32) -> None:
    """Refuse an open HDF5 file with an array that neither memory nor the file itself can hold.

    A forged header costs nothing to write, and reading what it claims fills memory with nothing. Arrays with more axes
    than ``most_axes`` are not looked at: movies, of which only a part is read.
    """

    def look(name: str, item: Any) -> str | None:
        shape = getattr(item, "shape", None)  # neither groups nor null arrays have one
        if shape is None or len(shape) > most_axes or item.nbytes <= _memory():
            return None
        # External and virtual ones store nothing themselves; gzip makes no more than 1,032 bytes of one.
        elsewhere = item.external or item.is_virtual
        return name if not elsewhere and item.nbytes > 1032 * item.id.get_storage_size() else None

    try:
        name = file.visititems(look)
    except DAMAGE:  # of something that may not be wanted; who reads it says so
        return
    if name is not None:
        raise RecordingError(
            f"{path.name}: expected an HDF5 file that holds what it says, got one that claims "
            f"{file[name].nbytes / 1e9:.3g} GB of {name} and has {path.stat().st_size / 1e9:.3g} GB. Copy it again."
        )


def _memory() -> float:
    """Bytes of memory of this machine; without bounds on systems such as Windows, which lend no more than they have."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def believed_rate(given: float | None, stated: float | None) -> tuple[float | None, dict[str, float]]:
    """The frame rate (Hz) that a user gives, else that of the file; for the provenance that of the file if it differs.

    `doubts.check` tells where the two contradict each other.
    """
    if given is None or stated is None or given == stated or not math.isfinite(stated):
        return (stated if given is None else given), {}
    return given, {"frame_rate_of_file": float(stated)}


def traces_of(
    arrays: Mapping[str, np.ndarray], file: Path, frame_rate: float | None = None, unit: Unit | None = None
) -> Traces:
    """Traces from named arrays: ``values``, ``dff`` or ``F`` (roi, time) with ``frame_rate`` and perhaps more."""
    name = next((n for n in TRACE_NAMES if n in arrays), None)
    if name is None:
        raise RecordingError(
            f"{file.name}: expected an array (roi, time) named {' or '.join(TRACE_NAMES)}, got {sorted(arrays)}."
        )
    known = float(_single(arrays["frame_rate"], "frame_rate", file)) if "frame_rate" in arrays else None
    rate, contradicted = believed_rate(frame_rate, known)
    stated = str(_single(arrays["unit"], "unit", file)) if "unit" in arrays else "dff"
    ids = tuple(np.ravel(arrays["roi_ids"]).tolist()) if "roi_ids" in arrays else ()
    return Traces(
        arrays[name],
        rate,  # type: ignore[arg-type]
        unit or TRACE_NAMES[name] or stated,  # type: ignore[arg-type]
        ids,
        float(_single(arrays["t0"], "t0", file)) if "t0" in arrays else 0.0,
        provenance={"source": file.name} | contradicted,
        rois=_masks(arrays, ids, file) if any(name in arrays for name in _MASKS) else None,
        accepted=_judgements(arrays["accepted"], file) if "accepted" in arrays else None,
    )


def _masks(arrays: Mapping[str, np.ndarray], ids: tuple[int, ...], file: Path) -> RoiMasks:
    """ROIs from the arrays that ``mask_arrays`` makes of them."""
    shape, pixels, weights, sizes, planes = (np.ravel(arrays.get(name, ())) for name in _MASKS)
    whole = all(array.dtype.kind in "iu" for array in (shape, pixels, sizes, planes)) and weights.dtype.kind in "fiu"
    if (
        not whole
        or shape.shape != (2,)
        or not 0 < int(shape[0]) * int(shape[1]) <= MOST_PIXELS
        or (sizes < 1).any()
        or not len(pixels) == len(weights) == sum(sizes.tolist())
    ):
        raise RecordingError(
            f"{file.name}: expected ROIs as the arrays {', '.join(_MASKS)}, one pixel after the other, got arrays that "
            "do not go together. Write them again, or rename them."
        )
    ends = np.cumsum(sizes.astype(np.int64))[:-1]
    try:
        return RoiMasks(
            (int(shape[0]), int(shape[1])),
            tuple(np.split(pixels, ends)),
            ids,
            tuple(np.split(weights, ends)),
            tuple(planes.tolist()),
        )
    except RecordingError as error:
        raise RecordingError(f"{file.name}: {error}") from error


def mask_arrays(value: SpikeInference | Traces) -> dict[str, np.ndarray]:
    """Name what is known of the ROIs of traces or of a result, which ``traces_of`` reads back; nothing if unknown.

    ``rois_shape`` is (y, x) of the plane. ``rois_pixels`` are the flat, row-major indices, from 0, of the pixels of all
    ROIs, one ROI after the other, with their ``rois_weights``; ``rois_sizes`` (roi,) are numbers of pixels, and
    ``rois_planes`` (roi,) those of the planes.
    """
    rois = (value if isinstance(value, Traces) else value.traces).rois
    if rois is None:
        return {}
    sizes = [len(pixels) for pixels in rois.pixels]
    arrays = (rois.shape, np.concatenate(rois.pixels), np.concatenate(rois.weights), sizes, rois.planes)
    return {name: np.asarray(array) for name, array in zip(_MASKS, arrays, strict=True)}


def _judgements(value: np.ndarray, file: Path) -> np.ndarray:
    """(roi,) which ROIs are cells, out of an array of zeros and ones."""
    array = np.ravel(value)
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise RecordingError(
            f"{file.name}: expected 0 or 1 for every ROI under the name accepted, got something else. Rename it."
        )
    return array.astype(bool)


def arrays_of(value: SpikeInference | Traces) -> dict[str, np.ndarray]:
    """Name the arrays of traces or of a result; ``traces_of`` reads the traces, for a result its ΔF/F, back from them.

    ``accepted`` (roi,) is 1 for what is a cell in the eyes of whoever made the traces, else 0, if that is known.
    ``interval`` is the central 90 % credible interval (2, roi, window) of the spike counts in windows of one second
    that begin at the frames ``interval_edges``; it is left out for recordings or sample numbers too small for one.
    """
    traces = value if isinstance(value, Traces) else value.traces
    arrays = {
        "roi_ids": np.asarray(traces.roi_ids, np.int64),
        "frame_rate": np.asarray(traces.frame_rate),
        "t0": np.asarray(traces.t0),
    }
    if traces.accepted is not None:
        arrays["accepted"] = traces.accepted.astype(np.uint8)
    if isinstance(value, Traces):
        return arrays | {"values": traces.values, "unit": np.asarray(traces.unit)}
    result = value
    arrays |= {
        "dff": traces.values,
        "rate": result.rate,
        "reconstruction": result.reconstruction,
        "reconstruction_std": result.reconstruction_std,
        "n_samples": np.asarray(result.n_samples),
        **{f"events_{field}": result.events[field] for field in EVENT_DTYPE.names or ()},
        **{f"theta_{name}": np.asarray(values) for name, values in result.theta.items()},
        **{f"theta_{name}_std": np.asarray(values) for name, values in result.theta_std.items()},
        **{f"quality_{name}": result.quality[name] for name in result.quality.dtype.names or ()},
    }
    if result.n_samples >= 2 and result.traces.duration >= 1 and result.frame_rate >= 1:
        arrays["interval"] = result.interval(0.9, 1.0).astype(np.float32)
        arrays["interval_level"] = np.asarray(0.9)
        arrays["interval_edges"] = result.window_edges(1.0)
    return arrays


def provenance_json(value: SpikeInference | Traces) -> str:
    """Give the provenance of traces, or of a result and of the traces it came from, as JSON."""
    if isinstance(value, Traces):
        found = {"traces": dict(value.provenance)}
    else:
        found = {"inference": dict(value.provenance), "traces": dict(value.traces.provenance)}
    return json.dumps(found, indent=1, default=json_default)


def plain(value: Any) -> Any:
    """Turn JSON-like values, arrays and mappings of all kinds among them, into what JSON knows."""
    return json.loads(json.dumps(value, default=json_default))


def _single(value: np.ndarray, name: str, file: Path) -> Any:
    """Take the one value out of an array."""
    array = np.asarray(value)
    if array.size != 1:
        raise RecordingError(f"{file.name}: expected one {name} for all ROIs, got {array.size} values.")
    item = array.ravel()[0].item() if array.dtype.kind != "O" else array.ravel()[0]
    return item.decode() if isinstance(item, bytes) else item
