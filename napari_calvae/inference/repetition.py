"""Proof that a result is what its model makes of its recording: infer again and compare, to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from napari_calvae.formats import arrays_of, open_result, open_traces
from napari_calvae.formats._files import existing, readable
from napari_calvae.formats.store import Layout, StoredInference
from napari_calvae.inference.batch import infer_rows
from napari_calvae.inference.blocks import InferConfig, provenance_of
from napari_calvae.recording import RecordingError, SpikeInference, Traces
from napari_calvae.trace_source import TraceSource
from napari_calvae.vae import SpikeVAE, models, shared_model

#: ROIs that are inferred again at a time.
_ROWS = 64


@dataclass(frozen=True)
class Repetition:
    """What came of inferring again.

    Parameters
    ----------
    n_rois
        ROIs that were inferred.
    differing
        Arrays of the result that came out otherwise, with the number of ROIs or entries concerned; none if all is the
        same to the last bit.
    changed
        What is not as it was: versions, recording. It may explain why.
    """

    n_rois: int
    differing: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether every number came out as it was."""
        return not self.differing

    def __str__(self) -> str:
        what = "the same to the last bit" if self.same else f"not the same: {'; '.join(self.differing)}"
        changed = f" Changed since: {'; '.join(self.changed)}." if self.changed else ""
        return f"{self.n_rois} ROIs inferred again, {what}.{changed}"


def repeat(
    result: str | Path | SpikeInference | StoredInference,
    traces: str | Path | Traces | TraceSource,
    model: str | Path | SpikeVAE | None = None,
) -> Repetition:
    """Infer again what a result was inferred from, by the settings that it carries, and compare.

    Parameters
    ----------
    result
        A result, or a file of one: ``.zarr`` or ``.npz``.
    traces
        What it was inferred from.
    model
        The model, unless it is one that ships.

    Raises
    ------
    RecordingError
        If the result does not tell how it was made, or the model is another one.
    """
    known = _Known.of(result)
    source = open_traces(traces) if isinstance(traces, str | Path) else traces
    source = TraceSource.of(source) if isinstance(source, Traces) else source
    told = known.provenance
    try:
        versions = dict(told["versions"])
        config = InferConfig(**{**told["settings"], "device": "cpu"})
    except (KeyError, TypeError, ValueError) as error:
        raise RecordingError(
            f"repeat: expected a result that tells how it was made, got one that does not ({error}). Infer it again."
        ) from error
    if "refinement" in told:
        raise RecordingError(
            "repeat: expected a result of infer, got one that was refined, which is not repeated. Call refine again "
            "with the settings in its provenance, and compare."
        )
    absent = sorted(set(known.roi_ids) - set(source.roi_ids))
    if absent:
        raise RecordingError(
            f"repeat: expected the recording that the result was inferred from, got one without ROI {absent[0]}. "
            "Give the same file."
        )
    vae = _model(told, model)
    now = provenance_of(vae, source, config)
    changed = [f"{k} {versions.get(k)} → {v}" for k, v in now["versions"].items() if versions.get(k) != v]
    if told.get("input_sha256", now["input_sha256"]) != now["input_sha256"]:
        changed.append("the recording: values, ROIs, frame rate or unit")
    if told["settings"]["device"] not in ("auto", "cpu"):
        changed.append(f"device {told['settings']['device']} → cpu")
    wrong: dict[str, int] = {}
    for ids, before in known.parts():
        again = arrays_of(infer_rows(_rows(source, ids), vae, config, known.columns))
        # Which cells are accepted was judged, not inferred, and may be judged anew.
        for name in before.keys() & again.keys() - {"accepted"}:
            wrong[name] = wrong.get(name, 0) + _n_differing(before[name], again[name])
    differing = tuple(f"{name} ({n} values)" for name, n in sorted(wrong.items()) if n)
    return Repetition(len(known.roi_ids), differing, tuple(changed))


@dataclass(frozen=True)
class _Known:
    """A result as it was: how it was made, its ROIs, and its arrays part by part."""

    provenance: Mapping[str, Any]
    roi_ids: tuple[int, ...]
    columns: Layout
    parts: Callable[[], Iterator[tuple[Sequence[int], Mapping[str, np.ndarray]]]]

    @classmethod
    def of(cls, result: str | Path | SpikeInference | StoredInference) -> _Known:
        if isinstance(result, SpikeInference):
            whole = [(result.roi_ids, arrays_of(result))]
            return cls(result.provenance, result.roi_ids, Layout.of(result), lambda: iter(whole))
        if isinstance(result, str | Path) and Path(result).suffix.lower() == ".npz":
            return _read_npz(Path(result))
        store = result if isinstance(result, StoredInference) else open_result(result)

        def parts() -> Iterator[tuple[Sequence[int], Mapping[str, np.ndarray]]]:
            for start in range(0, store.n_rois, _ROWS):
                rows = slice(start, min(start + _ROWS, store.n_rois))
                yield store.roi_ids[rows], arrays_of(store.select(rows))

        return cls(store.about["provenance"]["inference"], store.roi_ids, store.layout, parts)


def _read_npz(file: Path) -> _Known:
    path = existing(file)
    with readable(path, "a result that napari-calvae wrote (.zarr or .npz)", "Infer it again."):
        with np.load(path, allow_pickle=False) as opened:
            arrays = {name: opened[name] for name in opened.files}
        told = json.loads(str(arrays.pop("provenance")))["inference"]
        ids = tuple(arrays["roi_ids"].tolist())
        quality, theta = (tuple(n.removeprefix(p) for n in arrays if n.startswith(p)) for p in ("quality_", "theta_"))
        std = tuple(name.removesuffix("_std") for name in theta if name.endswith("_std"))
        columns = Layout(int(arrays["n_samples"]), quality, tuple(n for n in theta if not n.endswith("_std")), std)
    return _Known(told, ids, columns, lambda: iter([(ids, arrays)]))


def _model(told: Mapping[str, Any], model: str | Path | SpikeVAE | None) -> SpikeVAE:
    """The model that made a result: the one that is given, or one that ships."""
    wanted = f"{str(told['model_sha256'])[:12]}…" if told["model_sha256"] else "of one that was not saved"
    if model is None:
        shipped = [vae for vae in map(shared_model, models()) if vae.made(told)]
        if not shipped:
            raise RecordingError(
                f"repeat: expected the model with the SHA-256 {wanted}, which does not ship with this version. "
                "Give it, or its file (--model)."
            )
        return shared_model(shipped[0], coupled=False)
    vae = shared_model(model, coupled=False)
    if not vae.made(told):
        raise RecordingError(
            f"model: expected the one with the SHA-256 {wanted}, by which the result was made, got "
            f"{vae.sha256[:12] or 'one without a file'}…. Give that file."
        )
    return vae


def _rows(source: TraceSource, ids: Sequence[int]) -> Traces:
    """Traces of these ROIs in this order."""
    place = {roi: row for row, roi in enumerate(source.roi_ids)}
    rows = [place[roi] for roi in ids]
    order = np.argsort(rows)
    return source.select([rows[k] for k in order]).select(np.argsort(order))


def _n_differing(before: np.ndarray, again: np.ndarray) -> int:
    if before.shape != again.shape:
        return max(before.size, again.size)
    equal = before == again
    if before.dtype.kind == "f":
        equal |= np.isnan(before) & np.isnan(again)
    return int(np.size(equal) - np.count_nonzero(equal))
