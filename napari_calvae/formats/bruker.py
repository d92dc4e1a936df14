"""Series of images that Bruker's PrairieView writes: a folder of ``.ome.tif`` files and an ``.xml`` that lists them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from napari_calvae.formats._files import readable
from napari_calvae.formats._lazy import lazy, positive
from napari_calvae.recording import RecordingError

MOVIE_PATTERNS = ("*.xml",)
_KIND = "a Bruker series (a folder of .ome.tif files with the .xml of PrairieView)"


def is_movie(path: Path) -> bool:
    """Tell whether this is the ``.xml`` of a series, or a folder with one."""
    return _listing(path) is not None


def open_movie(path: Path) -> tuple[Any, float | None]:
    """Open the series as a dask array (time, plane, channel, y, x), without planes or channels if there is only one.

    Frames per second are those of the times that the file gives of its frames or volumes, else of its frame period.
    """
    listing = _listing(path)
    if listing is None:
        raise RecordingError(f"{path.name}: expected {_KIND}, got something else.")
    with readable(listing, _KIND):
        images = _Images(listing)
        images[:1]
        movie = lazy(images, (images.n_per_time, *images.shape[1:]))
        return movie.reshape(images.full_shape), images.frame_rate


def _listing(path: Path) -> Path | None:
    """Find the XML that lists the images of a series."""
    if path.is_dir():
        if not any(path.glob("*.tif")):
            return None
        candidates = sorted(path.glob("*.xml"))
    else:
        candidates = [path] if path.suffix.lower() == ".xml" and path.is_file() else []
    for candidate in candidates:
        with readable(candidate, _KIND), open(candidate, "rb") as file:
            if b"<PVScan" in file.read(4096):
                return candidate
    return None


class _Images:
    """The images of a series as an (image, y, x) array: channels follow each other, then planes, then time."""

    ndim = 3

    def __init__(self, listing: Path):
        self.listing = listing
        with readable(listing, _KIND):
            root = ElementTree.parse(listing).getroot()
            sequences = [sequence.findall("Frame") for sequence in root.findall("Sequence")]
            volumes = any("ZSeries" in sequence.get("type", "") for sequence in root.findall("Sequence"))
            if not volumes:  # pauses between sequences do not matter
                self.frame_rate = _frame_rate(sequences, root)
                times = [[frame] for frames in sequences for frame in frames]
            else:
                times = [frames for frames in sequences if frames]
                self.frame_rate = _frame_rate([[frames[0] for frames in times]], None)
                if len(times) > 1 and len(times[-1]) < len(times[0]):
                    del times[-1]  # stopped within a volume
            counts = {len(frames) for frames in times}
            listed = [[frame.findall("File") for frame in frames] for frames in times]
            channels = {len(files) for frames in listed for files in frames}
        if len(counts) != 1 or len(channels) != 1 or 0 in channels:
            raise RecordingError(
                f"{listing.name}: expected the same planes and channels at all times, got {sorted(counts)} planes and "
                f"{sorted(channels)} channels."
            )
        self.files = [
            (file.attrib["filename"], int(file.get("page", 1)) - 1)
            for frames in listed
            for files in frames
            for file in sorted(files, key=lambda file: int(file.get("channel", 0)))
        ]
        names = {name for name, _ in self.files}
        missing = sorted(names - {found.name for found in listing.parent.iterdir()})
        if missing:
            raise RecordingError(
                f"{listing.name}: expected {len(names)} image files beside it, got none named {missing[0]}"
                f"{f' and {len(missing) - 1} others' if len(missing) > 1 else ''}. Copy the whole folder."
            )
        first = self._image(0)
        self.dtype, self.shape = first.dtype, (len(self.files), *first.shape)
        axes = (counts.pop(), channels.pop())
        self.n_per_time = axes[0] * axes[1]
        self.full_shape = (len(times), *(n for n in axes if n > 1), *first.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Images, (self.listing,)

    def __getitem__(self, key: Any) -> np.ndarray:
        images, *rest = key if isinstance(key, tuple) else (key,)
        wanted = np.arange(self.shape[0])[images]
        stack = np.empty((wanted.size, *self.shape[1:]), self.dtype)
        for place, number in enumerate(np.atleast_1d(wanted).tolist()):
            image = self._image(number)
            if image.shape != self.shape[1:] or image.dtype != self.dtype:
                raise RecordingError(
                    f"{self.files[number][0]}: expected an image of {self.shape[1:]} pixels, {self.dtype}, like the "
                    f"others, got {image.shape}, {image.dtype}."
                )
            stack[place] = image
        return stack[(slice(None) if wanted.ndim else 0, *rest)]

    def _image(self, number: int) -> np.ndarray:
        name, page = self.files[number]
        path = self.listing.parent / name
        with readable(path, "an image of a Bruker series"), tifffile.TiffFile(path, is_ome=False) as tiff:
            image = tiff.pages[page if len(tiff.pages) > 1 else 0].asarray()
        if image.ndim != 2:
            raise RecordingError(f"{name}: expected a grey image (y, x), got the shape {image.shape}.")
        return image


def _frame_rate(sequences: list[list[ElementTree.Element]], root: ElementTree.Element | None) -> float | None:
    """Frames per second (Hz) of sequences of frames that follow each other."""
    steps: list[float] = []
    for frames in sequences:
        # Time goes on from one volume to the next, but in some versions starts anew with each.
        for clock in ("relativeTime", "absoluteTime"):
            times = [float(frame.get(clock, "nan")) for frame in frames]
            if len(times) > 1 and np.ptp(times) > 0:
                steps += np.diff(times).tolist()
                break
    if steps:
        step = positive(np.median(steps))
        return step and 1 / step
    found = None if root is None else root.find("PVStateShard/PVStateValue[@key='framePeriod']")
    if found is None and root is not None:
        found = root.find(".//PVStateValue[@key='framePeriod']")
    period = None if found is None else positive(found.get("value"))
    return period and 1 / period
