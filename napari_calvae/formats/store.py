"""Zarr stores (``.zarr``): results of any number of ROIs, written block by block and read ROI by ROI; and traces.

A store of results has a dense array per summary, in chunks of one block of ROIs, and the samples as events:

- ``dff``, ``rate``, ``reconstruction``, ``reconstruction_std``: (roi, time) float32, NaN where nothing is known;
- ``cells``: (column, roi) float64, quality and θ; what the columns are is an attribute;
- ``events/BLOCK``: (field, event) uint32 with the fields of ``EVENT_DTYPE``, ``roi`` being the row in the store;
- ``roi_ids`` (roi,), and where known ``accepted`` (roi,) and ``rois/…`` (pixels of all ROIs one after the other);
- ``done``: (block,) uint8, written last. A block that is not marked there is as good as absent.

Every chunk belongs to one block, so that blocks can be written by several processes at once and redone after a crash.
Every chunk is written, also where there is nothing in it: one that is not there was lost, and is an error. (Of Zarr
arrays by others it stands for zeros.) Stores from before that do not have the attribute ``holds``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.formats._files import DAMAGE, TRACE_NAMES, plain, traces_of, whole_folder
from napari_calvae.formats._zarr import check_chunks, create_array, create_group, every_chunk, open_node, read_rows
from napari_calvae.recording import EVENT_DTYPE, RecordingError, SpikeInference, Traces, Unit
from napari_calvae.roi_masks import RoiMasks
from napari_calvae.trace_source import TraceSource

PATTERNS = ("*.zarr",)
SUFFIXES = (".zarr",)
#: What is written is a folder.
FOLDER = True

#: Number of the layout; readers refuse later ones.
SCHEMA = 1
#: Trace-frames per block of ROIs: some 16 MB an array, a few seconds of inference.
BLOCK_FRAMES = 1 << 22
_SUMMARIES = ("dff", "rate", "reconstruction", "reconstruction_std")
#: What else a store may say of traces.
_FACTS = ("frame_rate", "unit", "roi_ids", "t0")
#: More ROIs than anyone records; of a forged header with more even the list of their ids takes all memory.
_MOST_ROIS = 1_000_000
#: Events per chunk; blosc would refuse more than 2 GiB.
_EVENTS = 1 << 22


@dataclass(frozen=True)
class Layout:
    """What must be known of a result before it is there, to lay out a store for it.

    Parameters
    ----------
    n_samples
        Posterior samples per ROI.
    quality, theta, theta_std
        Names of the quality metrics, of the parameters, and of those with a standard deviation.
    """

    n_samples: int
    quality: tuple[str, ...]
    theta: tuple[str, ...]
    theta_std: tuple[str, ...] = ()

    @classmethod
    def of(cls, result: SpikeInference) -> Layout:
        """Layout for results like this one."""
        return cls(result.n_samples, result.quality.dtype.names or (), tuple(result.theta), tuple(result.theta_std))

    @property
    def columns(self) -> list[str]:
        """Names of the rows of ``cells``."""
        groups = {"quality": self.quality, "theta": self.theta, "theta_std": self.theta_std}
        return [f"{group}/{name}" for group, names in groups.items() for name in names]


class StoredInference:
    """Results in a Zarr store, read ROI by ROI; what is not asked for stays on the disk.

    Parameters
    ----------
    path
        Folder of the store.

    Raises
    ------
    RecordingError
        If it is no such store, or of a later version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with _readable(self.path):
            self._group = open_node(self.path)
            found = self._group.attrs.get("calvae")
        if not isinstance(found, dict) or found.get("kind") != "result":
            raise RecordingError(
                f"{self.path.name}: expected a store of results, got one of traces or of another program. "
                "Infer from it first: infer(…, out=…), or calvae infer … -o NAME.zarr; read() gives its traces."
            )
        _check_schema(found, self.path)
        with _readable(self.path):
            self.about: dict[str, Any] = found
            self.frame_rate, self.t0 = float(found["frame_rate"]), float(found["t0"])
            names = {key: tuple(found["layout"][key]) for key in ("quality", "theta", "theta_std")}
            self.layout = Layout(int(found["layout"]["n_samples"]), **names)
            self.block_rois = int(found["block_rois"])
            self._of_traces, self._of_inference = (dict(found["provenance"][of]) for of in ("traces", "inference"))
            self.roi_ids: tuple[int, ...] = tuple(read_rows(self._group["roi_ids"], whole="holds" in found).tolist())
            self.n_rois, self.n_frames = self._group["rate"].shape
            self.n_samples = self.layout.n_samples
            self._columns = self.layout.columns
            self._whole = _holds_all(self._group, found)
            #: As in ``Traces``, if that is known.
            self.rois = _read_rois(self._group, self._whole)
            self.accepted = _accepted(self._group, self._whole)
            if self._group["cells"].shape != (len(self._columns), self.n_rois):
                raise ValueError("cells that do not match its attributes")

    @property
    def n_blocks(self) -> int:
        """Number of blocks of ROIs."""
        return -(-self.n_rois // self.block_rois)

    @property
    def done(self) -> np.ndarray:
        """(block,) whether a block is there, as of now."""
        with _readable(self.path):
            return self._group["done"][:] > 0

    @property
    def quality(self) -> np.ndarray:
        """Structured array as in ``SpikeInference``, of all ROIs; NaN for those that are not there yet."""
        done = np.flatnonzero(self.done)
        with _readable(self.path):
            if self._whole:
                check_chunks(self._group["cells"], done.tolist(), axis=1)
            return self._quality(self._group["cells"][:])

    @property
    def without_signal(self) -> tuple[int, ...]:
        """Ids of the ROIs in which nothing could be inferred: without data, or without any change."""
        there = np.repeat(self.done, self.block_rois)[: self.n_rois]
        silent = np.isnan(self.quality["spike_rate"]) & there
        return tuple(self.roi_ids[row] for row in np.flatnonzero(silent))

    def rows(self, block: int) -> slice:
        """Rows of a block."""
        return slice(block * self.block_rois, min((block + 1) * self.block_rois, self.n_rois))

    def select(self, rois: Sequence[int] | slice | np.ndarray) -> SpikeInference:
        """Results of these rows (indices, not ids), in memory.

        Raises
        ------
        RecordingError
            If some of them are not there yet, or cannot be read.
        """
        index = np.arange(self.n_rois)[rois]
        blocks = np.unique(index // self.block_rois)
        missing = blocks[~self.done[blocks]]
        if len(missing):
            raise RecordingError(
                f"{self.path.name}: expected the results of {len(index)} ROIs, got a store in which ROI "
                f"{self.roi_ids[missing[0] * self.block_rois]} and others are still missing. Run the inference again; "
                "it goes on where it stopped."
            )
        with _readable(self.path):
            arrays = {name: read_rows(self._group[name], index, whole=self._whole) for name in _SUMMARIES}
            table = read_rows(self._group["cells"], index, axis=1, whole=self._whole)
            events = [self._events(int(block)) for block in blocks]
        every = np.concatenate(events)
        order = np.argsort(index, kind="stable")
        place = np.searchsorted(index[order], every["roi"])
        own = (place < len(index)) & (index[order[np.minimum(place, len(index) - 1)]] == every["roi"])
        every = every[own]
        every["roi"] = order[place[own]]
        every = every[np.argsort(every["roi"], kind="stable")]
        ids = tuple(self.roi_ids[i] for i in index)
        cells = dict(zip(self._columns, table.astype(np.float32), strict=True))
        dff = arrays.pop("dff")
        return SpikeInference(
            traces=Traces(
                dff,
                self.frame_rate,
                "dff",
                ids,
                self.t0,
                provenance=self._of_traces,
                rois=self.rois and self.rois.select(index),
                accepted=None if self.accepted is None else self.accepted[index],
            ),
            events=every,
            n_samples=self.n_samples,
            theta={name: cells[f"theta/{name}"] for name in self.layout.theta},
            theta_std={name: cells[f"theta_std/{name}"] for name in self.layout.theta_std},
            quality=self._quality(table),
            provenance=self._of_inference,
            **arrays,
        )

    def load(self) -> SpikeInference:
        """All of it in memory."""
        return self.select(slice(None))

    def write_block(self, block: int, result: SpikeInference) -> None:
        """Write the results of one block; it counts as there only when all of it is."""
        rows = self.rows(block)
        arrays = {"dff": result.traces.values} | {name: getattr(result, name) for name in _SUMMARIES[1:]}
        columns = [result.quality[name] for name in self.layout.quality]
        columns += [result.theta[name] for name in self.layout.theta]
        columns += [result.theta_std[name] for name in self.layout.theta_std]
        for name, array in arrays.items():
            every_chunk(self._group, name)[rows] = array
        cells = np.stack(columns) if columns else np.empty((0, rows.stop - rows.start))
        every_chunk(self._group, "cells")[:, rows] = cells
        events = np.stack([result.events[field].astype(np.uint32) for field in EVENT_DTYPE.names or ()])
        events[EVENT_DTYPE.names.index("roi")] += rows.start  # type: ignore[union-attr]
        chunk = (len(events), _EVENTS)
        create_array(self._group["events"], str(block), events.shape, chunk, "u4", overwrite=True)[:] = events
        self._group["done"][block] = 1

    def tidy(self) -> None:
        """Remove what writers that were killed left behind; nobody may be writing."""
        for left in self.path.rglob("*.partial"):
            left.unlink(missing_ok=True)

    def _quality(self, cells: np.ndarray) -> np.ndarray:
        """Quality of the ROIs in these columns of ``cells``."""
        table = np.zeros(cells.shape[1], [(name, "f4") for name in self.layout.quality])
        for name in self.layout.quality:
            table[name] = cells[self._columns.index(f"quality/{name}")]
        return table

    def _events(self, block: int) -> np.ndarray:
        fields = read_rows(self._group[f"events/{block}"], whole=self._whole)
        events = np.zeros(fields.shape[1], EVENT_DTYPE)
        for name, values in zip(EVENT_DTYPE.names or (), fields, strict=True):
            events[name] = values
        return events


def create_store(
    path: Path, source: TraceSource, layout: Layout, provenance: Mapping[str, Any], block_rois: int
) -> StoredInference:
    """Lay out an empty store for the results of some traces; it appears as a whole.

    Parameters
    ----------
    path
        Folder to make.
    source
        The traces, of which rate, ids, masks and judgements are kept; their values are not.
    layout
        What there will be of each ROI.
    provenance
        Of the inference: JSON-like.
    block_rois
        ROIs per block.
    """
    about = {
        "kind": "result",
        "schema": SCHEMA,
        "frame_rate": source.frame_rate,
        "t0": source.t0,
        "block_rois": block_rois,
        "layout": vars(layout),
        "holds": _held(source),
        "provenance": plain({"inference": provenance, "traces": source.provenance}),
    }
    with whole_folder(path) as folder:
        group = create_group(folder, about)
        shape, chunk = (source.n_rois, source.n_frames), (block_rois, source.n_frames)
        for name in _SUMMARIES:
            create_array(group, name, shape, chunk, "f4")
        n_columns = len(layout.columns)
        create_array(group, "cells", (n_columns, source.n_rois), (max(n_columns, 1), block_rois), "f8")
        create_array(group, "done", (-(-source.n_rois // block_rois),), (1,), "u1")
        group.create_group("events")
        _write_rois(group, source)
    return StoredInference(path)


def matches(path: Path) -> bool:
    """Tell whether this is a Zarr store with results or traces, or an array (roi, time)."""
    return path.suffix.lower() == ".zarr" and path.is_dir() and _traces_in(path) is not None


def open_source(path: Path, frame_rate: float | None = None, unit: Unit | None = None) -> TraceSource:
    """Open the traces of a store; of results their ΔF/F.

    Also any Zarr array (roi, time), or group with one named ``values``, ``dff`` or ``F``, with attributes or arrays
    ``frame_rate`` (Hz), ``unit`` and ``roi_ids``.
    """
    with _readable(path):
        name = _traces_in(path)
        node = open_node(path)
        array = node[name] if name else node
        about = node.attrs.get("calvae", {})
        _check_schema(about, path)
        if array.dtype.kind not in "fiub":
            raise RecordingError(f"{path.name}: expected real numbers, got dtype {array.dtype}. Convert them to float.")
        if array.shape[0] > _MOST_ROIS:
            raise RecordingError(
                f"{path.name}: expected (roi, time) with at most {_MOST_ROIS:,} ROIs, got {array.shape[0]} of "
                f"{array.shape[1]} frames. Put ROIs on the first axis, or cut it."
            )
        if about.get("kind") == "result" and not node["done"][:].all():
            raise RecordingError(
                f"{path.name}: expected a finished store, got one of which some ROIs are still missing. "
                "Run the inference again; it goes on where it stopped."
            )
        extra = {key: np.asarray(place[key]) for place in (node.attrs, about) for key in _FACTS if key in place}
        if name:
            extra |= {key: node[key][...] for key in _FACTS if key in node}
        # One frame of each ROI stands for all while ids, rate and unit are checked.
        known = {name or "values": np.zeros((array.shape[0], 1), np.float32), **extra}
        facts = traces_of(known, path, frame_rate, unit)
        whole = _holds_all(node, about)
        if whole:
            check_chunks(array)
        rois = _read_rois(node, whole) if name else None
        accepted = _accepted(node, whole) if name else None
    n_rois, n_frames = array.shape
    return TraceSource(
        partial(_fetch, path, name or ""),
        n_rois,
        n_frames,
        facts.frame_rate,
        facts.unit,
        facts.roi_ids,
        facts.t0,
        provenance=about.get("provenance", {}).get("traces", {}) | dict(facts.provenance),
        rois=rois,
        accepted=accepted,
        chunk_rows=array.chunks[0],
    )


def write(value: SpikeInference | Traces, path: Path) -> None:
    """Write results or traces that are in memory."""
    if isinstance(value, SpikeInference):
        rows = rois_per_block(value.traces.n_frames)
        with whole_folder(path) as folder:
            store = create_store(folder, TraceSource.of(value.traces), Layout.of(value), value.provenance, rows)
            for block in range(store.n_blocks):
                store.write_block(block, _select(value, store.rows(block)))
        return
    source = TraceSource.of(value)
    with whole_folder(path) as folder:
        create_traces(folder, source)[:] = value.values


def create_traces(path: Path, source: TraceSource) -> Any:
    """Lay out a store for traces, and give the Zarr array (roi, time) for their values, which ``source`` need not have.

    Its chunks hold `rois_per_block` ROIs.
    """
    about = {
        "kind": "traces",
        "schema": SCHEMA,
        "frame_rate": source.frame_rate,
        "t0": source.t0,
        "unit": source.unit,
        "holds": _held(source),
        "provenance": plain({"traces": source.provenance}),
    }
    group = create_group(path, about)
    _write_rois(group, source)
    shape = (source.n_rois, source.n_frames)
    return create_array(group, "values", shape, (rois_per_block(source.n_frames), source.n_frames), "f4")


def rois_per_block(n_frames: int, chunk_rows: int = 1, n_rois: int | None = None) -> int:
    """ROIs of a block: of ``n_rois`` so many that there are blocks enough to be shared and seen to go on.

    Blocks are no smaller than is worth a file of its own, and no larger than fits memory well. Large ones hold whole
    chunks of ``chunk_rows`` rows, so that none has to be read twice.
    """
    largest, least = max(BLOCK_FRAMES // n_frames, 1), max(BLOCK_FRAMES // 16 // n_frames, 1)
    wanted = largest if n_rois is None else min(max(-(-n_rois // 16), least), largest)
    return wanted if chunk_rows > 4 * wanted or wanted < largest else -(-wanted // chunk_rows) * chunk_rows


def _select(result: SpikeInference, rows: slice) -> SpikeInference:
    """Rows of a result as a result of their own."""
    start, stop = np.searchsorted(result.events["roi"], [rows.start, rows.stop])
    events = result.events[start:stop].copy()
    events["roi"] -= rows.start
    return SpikeInference(
        traces=result.traces.select(rows),
        events=events,
        n_samples=result.n_samples,
        theta={name: values[rows] for name, values in result.theta.items()},
        theta_std={name: values[rows] for name, values in result.theta_std.items()},
        quality=result.quality[rows],
        provenance=result.provenance,
        **{name: getattr(result, name)[rows] for name in _SUMMARIES[1:]},
    )


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What zarr raises for stores that are damaged, cut short or of another kind, as our own error."""
    from zarr.errors import BaseZarrError

    damage: tuple[type[Exception], ...] = (BaseZarrError, *DAMAGE)
    try:
        yield
    except RecordingError:
        raise
    except damage as error:
        if isinstance(error, PermissionError):
            raise
        raise RecordingError(
            f"{path.name}: expected a Zarr store of results or traces, got one that cannot be read "
            f"({type(error).__name__}: {error}). Copy it again, or infer again."
        ) from error


def _traces_in(path: Path) -> str | None:
    """Name of the traces in a store, empty where it is an array itself, None where there are none."""
    with _readable(path):
        node = open_node(path)
        if hasattr(node, "ndim"):
            return "" if node.ndim == 2 else None
        return next((name for name in TRACE_NAMES if name in node and getattr(node[name], "ndim", 0) == 2), None)


def _check_schema(about: Mapping[str, Any], path: Path) -> None:
    if about and about.get("schema") != SCHEMA:
        raise RecordingError(
            f"{path.name}: expected a store of schema {SCHEMA}, got schema {about.get('schema')!r}. "
            "Read it with the version of napari-calvae that wrote it, or a newer one."
        )


def _fetch(path: Path, name: str, rows: np.ndarray) -> np.ndarray:
    with _readable(path):
        node = open_node(path)
        return read_rows(node[name] if name else node, rows, whole="holds" in node.attrs.get("calvae", {}))


def _held(source: TraceSource) -> list[str]:
    """What a store has beside the arrays with a row per ROI."""
    there = {"accepted": source.accepted, "rois": source.rois}
    return ["roi_ids", *(name for name, value in there.items() if value is not None)]


def _holds_all(group: Any, about: Mapping[str, Any]) -> bool:
    """Whether a store says what it holds, and so that all of its chunks are written; ValueError if it lacks a part."""
    for name in about.get("holds", ()):
        if name not in group:
            raise ValueError(f"{name} is not there")
    return "holds" in about


def _accepted(group: Any, whole: bool) -> np.ndarray | None:
    return read_rows(group["accepted"], whole=whole).astype(bool) if "accepted" in group else None


def _write_rois(group: Any, source: TraceSource) -> None:
    def put(parent: Any, name: str, values: Any, dtype: str) -> None:
        array = np.asarray(values, dtype)
        create_array(parent, name, array.shape, array.shape, dtype)[:] = array

    put(group, "roi_ids", source.roi_ids, "i8")
    if source.accepted is not None:
        put(group, "accepted", source.accepted, "u1")
    if source.rois is not None:
        rois = source.rois
        inner = group.create_group("rois", attributes={"shape": list(rois.shape)})
        put(inner, "pixels", np.concatenate(rois.pixels), "i8")
        put(inner, "weights", np.concatenate(rois.weights), "f4")
        put(inner, "sizes", [len(p) for p in rois.pixels], "i8")
        put(inner, "planes", rois.planes, "i8")


def _read_rois(group: Any, whole: bool) -> RoiMasks | None:
    if "rois" not in group:
        return None
    inner = group["rois"]
    pixels, weights, sizes, planes = (
        read_rows(inner[name], whole=whole) for name in ("pixels", "weights", "sizes", "planes")
    )
    ends = np.cumsum(sizes)[:-1]
    return RoiMasks(
        tuple(inner.attrs["shape"]),
        tuple(np.split(pixels, ends)),
        tuple(read_rows(group["roi_ids"], whole=whole).tolist()),
        tuple(np.split(weights, ends)),
        tuple(planes.tolist()),
    )
