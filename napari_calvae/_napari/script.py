"""A result as the Python script that repeats it; files that are written as a whole or not at all."""

from __future__ import annotations

import base64
import os
import textwrap
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import napari_calvae as calvae
from napari_calvae._napari import answers, session
from napari_calvae._napari.file_rois import FileFrames, FileTraces

_INFERRED = ("model", "n_samples", "seed", "device", "amplitude")


@dataclass(frozen=True, eq=False)
class Source:
    """Where movie and ROIs come from: their files if they have any, and the label image (y, x) as it is now.

    Of a movie (time, z, y, x) the ROIs are on one ``plane``. Or the ``traces`` of ROIs come from a file, all but those
    of the ROIs ``edited`` (ids).
    """

    movie: Path | None
    rois: Path | None
    labels: np.ndarray
    traces: FileTraces | None = None
    edited: tuple[int, ...] = ()
    plane: int | None = None


def source_of(movie: Any, frames: Any, rois: Any, labels: np.ndarray) -> Source:
    """Files that the layers ``movie`` and ``rois`` were read from, if the movie's still holds its ``frames``."""
    if isinstance(frames, FileFrames):
        masks = calvae.RoiMasks.from_labels(labels)
        edited = set(masks.ids) - frames.traces.unedited(masks, frames.plane)
        return Source(None, None, labels, frames.traces, tuple(sorted(edited)))
    path, is_plane = path_of(movie), isinstance(frames, session.MoviePlane)
    known = path is not None and _shows(path, frames.data if is_plane else frames)
    return Source(path if known else None, path_of(rois), labels, plane=frames.plane if is_plane else None)


def path_of(layer: Any) -> Path | None:
    """File that a layer was read from, if it is still there."""
    path = layer.metadata.get("path") or layer.source.path
    return Path(path) if path is not None and Path(path).is_file() else None


def _shows(path: Path, frames: Any) -> bool:
    """Whether the file has as many frames of the same size, the same at both ends and in the middle."""
    try:
        stored = calvae.read_movie(path)[0]
    except (OSError, ValueError):
        return False
    if tuple(stored.shape) != tuple(frames.shape):
        return False
    return all(np.array_equal(np.asarray(stored[k]), np.asarray(frames[k])) for k in (0, len(frames) // 2, -1))


def write_whole(path: str | Path, text: str) -> None:
    """Write a text file under a passing name first, so that there is never half of it."""
    file = Path(path)
    part = file.with_name(file.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def script(source: Source, settings: answers.Settings, rejected: Sequence[int] = ()) -> str:
    """Python that infers the same again; ROIs that are in no file are written into it."""
    lines = [f'"""Spikes as they were inferred with napari-calvae {calvae.__version__}."""', ""]
    lines += _from_movie(source, settings) if source.traces is None else _from_traces(source, settings)
    lines += [
        *_baseline(settings),
        f"result = calvae.infer(traces, {_given(settings, *_INFERRED[: 4 if settings.amplitude is None else 5])})",
        "",
        "rate = result.rate  # (roi, time), spikes/s",
        f"rejected = {sorted(rejected)}  # ids of the ROIs that were rejected",
        "kept = [row for row, roi in enumerate(result.roi_ids) if roi not in rejected]",
    ]
    return "\n".join(lines) + "\n"


def _from_movie(source: Source, settings: answers.Settings) -> list[str]:
    """Lines that read movie and ROIs."""
    rois, imports = _rois(source)
    lines = [*imports, "import napari_calvae as calvae", ""]
    if source.movie is None:
        lines += [
            "# The movie came from no file. Save it first, in napari's console, with the layer's name:",
            '# import numpy as np; np.save("movie.npy", viewer.layers["…"].data)',
        ]
    return [
        *lines,
        f"movie, _ = calvae.read_movie({str(source.movie or 'movie.npy')!r})",
        *([] if source.plane is None else [f"movie = movie[:, {source.plane}]  # the plane that these ROIs are on"]),
        *rois,
        f"traces = calvae.extract(movie, labels, {_given(settings, 'frame_rate', 'neuropil_coefficient')})",
    ]


def _from_traces(source: Source, settings: answers.Settings) -> list[str]:
    """Lines that read the traces of a file."""
    given = source.traces
    if given is None:
        raise TypeError("a source without traces")
    lines = ["import numpy as np", "", "import napari_calvae as calvae", ""]
    if source.edited:
        some = ", ".join(map(str, source.edited))
        lines += [f"# ROIs {some} were drawn or edited in napari: their traces are not those of the file."]
    lines += [f"traces = calvae.read({str(given.path)!r}, {_given(settings, 'frame_rate')})"]
    if given.renumbered:
        lines += ["# Ids from 1, as labels in napari must be."]
        lines += ["traces = traces.replace(roi_ids=tuple(range(1, traces.n_rois + 1)), rois=None)"]
    return [*lines, "traces = traces.select(np.flatnonzero(np.nanstd(traces.values, axis=1) > 0))  # what changes"]


def _baseline(settings: answers.Settings) -> list[str]:
    """The line that takes another baseline than the model's, if one is wanted."""
    if not settings.own_baseline:
        return []
    window, percentile = settings.baseline_window, settings.baseline_percentile
    assumed = f"calvae.load_model({settings.model!r}).preprocessing"
    given = (
        f"window={window!r}" if window is not None else f"window={assumed}.baseline_window",
        f"percentile={percentile!r}" if percentile is not None else f"percentile={assumed}.baseline_percentile",
    )
    return [f"traces = calvae.delta_f_over_f(traces, {', '.join(given)})"]


def _given(settings: answers.Settings, *names: str) -> str:
    return ", ".join(f"{name}={getattr(settings, name)!r}" for name in names)


def _rois(source: Source) -> tuple[list[str], list[str]]:
    """Lines that read the label image, and the imports that they need."""
    if source.rois is not None and _holds(source.rois, source.labels):
        return [f"labels = calvae.read_labels({str(source.rois)!r})"], []
    packed = base64.b85encode(zlib.compress(np.ascontiguousarray(source.labels, "<i4").tobytes(), 9)).decode()
    text = [f"    {part!r}" for part in textwrap.wrap(packed, 100)]
    lines = [
        "packed = (  # the ROIs as they were: a label image",
        *text,
        ")",
        'labels = np.frombuffer(zlib.decompress(base64.b85decode(packed)), "<i4")',
        f"labels = labels.reshape({tuple(int(n) for n in source.labels.shape)})",
    ]
    return lines, ["import base64", "import zlib", "", "import numpy as np", ""]


def _holds(path: Path, labels: np.ndarray) -> bool:
    """Whether the file still holds these ROIs."""
    try:
        return np.array_equal(calvae.read_labels(path), labels)
    except (OSError, ValueError):
        return False
