"""Grey videos in AVI files, decoded frame by frame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.conversion import needed
from napari_calvae.formats._files import readable
from napari_calvae.formats._lazy import lazy, positive
from napari_calvae.recording import RecordingError

MOVIE_PATTERNS = ("*.avi",)
_KIND = "an AVI video"
#: Difference between red, green and blue up to which a pixel is grey: codecs round.
_GREY = 8
#: Bytes that a frame takes at least: its name and its length.
_LEAST = 8


def is_movie(path: Path) -> bool:
    """Tell whether this is an AVI file."""
    return path.suffix.lower() == ".avi"


def open_movie(path: Path) -> tuple[Any, float | None]:
    """Open a grey video as a dask array; the frame rate is the one at which it is to be shown."""
    frames = _Frames(path)
    return lazy(frames, (1, *frames.shape[1:])), frames.frame_rate


class _Frames:
    """The frames of a video as a (frame, y, x) array of brightness, uint8 or uint16."""

    ndim = 3

    def __init__(self, file: Path):
        self.file = file
        with _opened(self.file) as (container, stream):
            first = next(container.decode(stream), None)
            n_frames = stream.frames
            if not 0 < n_frames <= file.stat().st_size // _LEAST:  # not stated, or absurd: count
                container.seek(0)
                n_frames = sum(packet.size > 0 for packet in container.demux(stream))
            if first is None or not n_frames:
                raise RecordingError(f"{file.name}: expected {_KIND}, got one without frames. Export it again.")
            deep = max(component.bits for component in first.format.components) > 8
            if not _is_grey(first):
                raise RecordingError(
                    f"{file.name}: expected a grey video, got a coloured one ({first.format.name}). "
                    "Save one channel of it, or convert it to 8-bit grey."
                )
            self.format = "gray16le" if deep else "gray"
            self.dtype = np.dtype(np.uint16 if deep else np.uint8)
            self.shape = (int(n_frames), first.height, first.width)
            self.frame_rate = positive(stream.average_rate and float(stream.average_rate))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Frames, (self.file,)

    def __getitem__(self, key: Any) -> np.ndarray:
        frames, *rest = key if isinstance(key, tuple) else (key,)
        wanted = np.arange(self.shape[0])[frames]
        numbers = np.atleast_1d(wanted)
        stack = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        places: dict[int, int] = {int(number): place for place, number in enumerate(numbers)}
        if places:
            first, last = min(places), max(places)
            with _opened(self.file) as (container, stream):
                for number, frame in self._from(container, stream, first):
                    if number in places:
                        stack[places.pop(number)] = frame.to_ndarray(format=self.format)
                    if number >= last:
                        break
        if places:
            raise RecordingError(
                f"{self.file.name}: expected a video of {self.shape[0]} frames, got one in which frame {min(places)} "
                "cannot be decoded. Copy or export it again."
            )
        return stack[(slice(None) if wanted.ndim else 0, *rest)]

    def _from(self, container: Any, stream: Any, first: int) -> Any:
        """Frames with their numbers, from the last key frame before ``first`` on."""
        start = stream.start_time or 0
        per_frame = 1 / (stream.average_rate * stream.time_base) if stream.average_rate else None
        if first and per_frame:
            container.seek(start + round(first * per_frame), stream=stream, backward=True)
        for count, frame in enumerate(container.decode(stream)):
            timed = per_frame and frame.pts is not None
            yield round((frame.pts - start) / per_frame) if timed else count, frame


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Any]]:
    """Open a video for a while: its container and its stream of pictures."""
    av = needed("av", RecordingError)
    with readable(file, _KIND, "Export it again, or install its codec."), av.open(str(file)) as container:
        if not container.streams.video:
            raise RecordingError(f"{file.name}: expected {_KIND}, got a file without pictures.")
        yield container, container.streams.video[0]


def _is_grey(frame: Any) -> bool:
    if frame.format.name.startswith("gray"):
        return True
    colours = frame.to_ndarray(format="rgb24").astype(np.int16)
    return bool(np.ptp(colours, axis=2).max() <= _GREY)
