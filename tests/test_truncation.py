"""Files that are cut off or lost: what is read is all of it, or an error, never a part in silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import READERS, look_at_movie, look_at_result, look_at_traces, refusals

import napari_calvae as calvae
from napari_calvae.formats import read_movie

#: Shares of a file that are left of it, beside nothing and all but the last byte.
SHARES = np.linspace(0.03, 0.97, 17)
#: What may be missing: files that a program does not always write; and by Zarr's convention a chunk of zeros.
OPTIONAL = {
    "suite2p": {"ops.npy", "iscell.npy", "Fneu.npy"},
    "suite2p 1.1": {"iscell.npy", "settings.npy", "db.npy", "Fneu.npy"},
    "movie.zarr": {"0"},
    "csv": {"a.provenance.json"},
}
#: A table of spikes or pulses without anything beside it cannot say how many rows there were.
UNKNOWABLE = {"pulses"}


def of_traces(traces: calvae.Traces) -> list[Any]:
    rois = None if traces.rois is None else traces.rois.to_labels()
    return [
        traces.values,
        traces.valid,
        traces.roi_ids,
        traces.unit,
        traces.frame_rate,
        traces.t0,
        rois,
        traces.accepted,
    ]


def of_result(path: Path) -> list[Any]:
    found = calvae.open_result(path).load()
    summaries = (found.rate, found.reconstruction, found.reconstruction_std, found.events, found.quality)
    return [*of_traces(found.traces), *summaries, dict(found.theta)]


def of_movie(path: Path) -> list[Any]:
    movie, frame_rate = read_movie(path)
    return [np.asarray(movie), frame_rate]


def of_anything(value: Any) -> list[Any]:
    if isinstance(value, calvae.SpikeVAE):
        return [value.recognition.state_dict(), value.theta, value.prior]
    return [value.to_labels()] if isinstance(value, calvae.RoiMasks) else [value]


def content(read: Callable[[Path], Any], path: Path) -> str:
    """All that a reader finds, comparable."""
    ways = {
        look_at_traces: lambda p: of_traces(calvae.read(p, frame_rate=30.0)),
        look_at_movie: of_movie,
        look_at_result: of_result,
    }
    with np.printoptions(threshold=10**9, precision=17):
        return repr(ways.get(read, lambda p: of_anything(read(p)))(path))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in READERS if "growing" not in name and name not in UNKNOWABLE])
def test_what_is_left_of_a_file_is_never_taken_for_all_of_it(tmp_path, name):
    make, read = READERS[name]
    path = make(tmp_path)
    whole, noticed = content(read, path), 0
    for file in sorted(f for f in tmp_path.rglob("*") if f.is_file()):
        data = file.read_bytes()
        lengths = sorted({0, *(int(share * len(data)) for share in SHARES), len(data) - 1})
        if file.name in OPTIONAL.get(name, set()):
            lengths = [] if file.suffix == ".json" else lengths
        else:
            lengths = [-1, *lengths]
        for length in lengths:
            file.unlink()
            if length >= 0:
                file.write_bytes(data[:length])
            try:
                assert content(read, path) == whole, (file.relative_to(tmp_path), length, len(data))
            except refusals(name):
                noticed += 1
            file.write_bytes(data)
    assert content(read, path) == whole
    assert noticed > 10
