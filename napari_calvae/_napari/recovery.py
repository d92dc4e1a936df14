"""Drawn ROIs, verdicts and fitted models on disk as long as napari runs, to be offered again if it does not end well.

Each process has a folder, which it locks and removes at its end. A folder that nobody has locked is what was left by
one that crashed or was killed. Neither Qt's widgets nor napari are needed here.
"""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import secrets
import shutil
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import filelock
import numpy as np
from qtpy.QtCore import QStandardPaths

logger = logging.getLogger(__name__)

#: Of the files; those of another version are left alone.
VERSION = 2
ROIS, MODEL = ".rois.npz", ".safetensors"
_LOCK = "in-use.lock"


@dataclass(frozen=True, eq=False)
class DrawnRois:
    """ROIs of one layer as napari has them.

    Parameters
    ----------
    kind, name
        Of the layer: labels, points or shapes.
    arrays
        Its data: one array of labels or of points, or the corners of each shape.
    place
        Of the layer in the world: scale, translate, rotate, shear and affine, as nested lists.
    shape_types
        Of each shape.
    judgements
        Verdict and note by ROI id.
    traces, movie
        Files of the traces that belong to these ROIs, and of the movie that they were looked at with, if any.
    reader
        napari's plugin that read the movie.
    """

    kind: str
    name: str
    arrays: tuple[np.ndarray, ...]
    place: Mapping[str, list]
    shape_types: tuple[str, ...] = ()
    judgements: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    traces: str | None = None
    movie: str | None = None
    reader: str | None = None

    @property
    def n_rois(self) -> int:
        """Number of ROIs."""
        if self.kind == "labels":
            return len(np.setdiff1d(self.arrays[0], 0))
        return len(self.arrays[0]) if self.kind == "points" else len(self.arrays)

    def save(self, path: Path) -> None:
        """Write them, under a passing name first, so that there is never half of them."""
        head = {"version": VERSION} | {f.name: getattr(self, f.name) for f in fields(self) if f.name != "arrays"}
        part = path.with_name(path.name + ".part")
        try:
            with open(part, "wb") as file:
                np.savez(file, *self.arrays, head=np.array(json.dumps(head)))
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> DrawnRois:
        """Read what `save` wrote; raises a ``ValueError`` for anything else."""
        try:
            with np.load(path, allow_pickle=False) as file:
                head = json.loads(str(file["head"]))
                arrays = tuple(file[f"arr_{k}"] for k in range(len(file.files) - 1))
            if head.pop("version") != VERSION:
                raise ValueError("another version")
            judged = {int(roi): (str(verdict), str(note)) for roi, (verdict, note) in head.pop("judgements").items()}
            types = tuple(head.pop("shape_types"))
            return cls(**head, arrays=arrays, shape_types=types, judgements=judged)
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path.name}: expected ROIs as they were saved, got something else ({error})") from error


@dataclass(frozen=True, eq=False)
class Leftover:
    """What a process left behind that did not end as it should; nobody else is offered it as long as it is held."""

    folder: Path
    lock: filelock.BaseFileLock
    rois: tuple[DrawnRois, ...]
    models: tuple[Path, ...]
    when: float

    @property
    def words(self) -> str:
        """What there is, and of when, to be read."""
        parts = []
        for each in self.rois:
            judged = f" with {_number(len(each.judgements), 'verdict')}" if each.judgements else ""
            parts.append(f"{_number(each.n_rois, 'ROI')} in “{each.name}”{judged}")
        if self.models:
            parts.append(_number(len(self.models), "fitted model"))
        return f"napari did not end as it should on {time.strftime('%d %b at %H:%M', time.localtime(self.when))}. " + (
            f"Still there: {', '.join(parts)}."
        )

    def let_go(self) -> None:
        """Leave it to be offered again."""
        self.lock.release()

    def discard(self) -> None:
        """Remove it."""
        self.lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def home() -> Path:
    """Where the folders of all processes are."""
    place = QStandardPaths.writableLocation(QStandardPaths.StandardLocation.GenericDataLocation)
    return Path(place) / "napari-calvae" / "sessions"


@functools.cache
def folder() -> Path:
    """Folder of this process, private to the user; it is gone when Python ends."""
    place = home() / secrets.token_hex(8)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir(mode=0o700)
    lock = filelock.FileLock(place / _LOCK)
    lock.acquire(blocking=False)
    atexit.register(_remove, place, lock)
    return place


def left_behind() -> list[Leftover]:
    """What processes left behind that did not end as they should, the newest first; what is empty is removed."""
    found = []
    for place in home().glob("*/"):
        lock = filelock.FileLock(place / _LOCK)
        if not (place / _LOCK).exists():
            continue  # one that begins at this moment
        try:
            lock.acquire(blocking=False)
        except (filelock.Timeout, OSError):
            continue
        rois, models = _readable(place), tuple(sorted(place.glob(f"*{MODEL}")))
        if rois or models:
            when = max(path.stat().st_mtime for path in place.iterdir() if path.name != _LOCK)
            found.append(Leftover(place, lock, rois, models, when))
        elif any(place.glob(f"*{ROIS}")):
            lock.release()  # those of another version
        else:
            _remove(place, lock)
    return sorted(found, key=lambda each: -each.when)


def _readable(place: Path) -> tuple[DrawnRois, ...]:
    found = []
    for path in sorted(place.glob(f"*{ROIS}")):
        try:
            found.append(DrawnRois.load(path))
        except ValueError:
            logger.warning("ROIs in %s were not recovered", path, exc_info=True)
    return tuple(found)


def free_name(place: Path, stem: str, suffix: str) -> Path:
    """Path of the next file of this name that does not exist yet."""
    number = 1
    while (path := place / f"{stem} {number}{suffix}").exists():
        number += 1
    return path


def _remove(place: Path, lock: filelock.BaseFileLock) -> None:
    lock.release()
    shutil.rmtree(place, ignore_errors=True)


def _number(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
