"""From blocks of traces to their spike posteriors, on the best device there is.

What is inferred of a ROI depends on its trace, its id, the model and the seed alone, to the last bit: neither on the
ROIs that are inferred with it, nor on their order, nor on the number of cores.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import math
import platform
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from napari_calvae.formats.store import rois_per_block
from napari_calvae.generative import GenerativeModel, Theta
from napari_calvae.metrics import Explained, quality_table
from napari_calvae.recognition import CHUNK, SpikePosterior
from napari_calvae.recognition.factorized import GainCategorical
from napari_calvae.recording import EVENT_DTYPE, RecordingError, SpikeInference, Traces
from napari_calvae.trace_source import TraceSource
from napari_calvae.vae import SpikeVAE, shared_model

#: Samples that are drawn and rendered together; of fifty, four equal parts for two cores or four.
_PART = 13
#: Held while threads start, which torch does not tell one by one how many cores to use.
_STARTING = threading.Lock()
#: Trace-frames per block of ROIs: small enough to stop soon and to stay near the cache, large enough for a core.
BLOCK_FRAMES = 65_536


class InferConfig(BaseModel):
    """How to infer; unknown settings are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n_samples: int = Field(50, ge=0, le=1000, title="Samples", description="Spike trains drawn per ROI")
    seed: int = Field(0, ge=0, title="Seed", description="Of the samples; each ROI has a stream of its own")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", title="Device", description="Where to compute")
    amplitude: float | None = Field(
        None,
        gt=0,
        le=1e9,
        title="Amplitude",
        description="ΔF/F at the peak of the response to one spike, where it is known",
    )
    amplitude_spread: float = Field(
        0.5,
        gt=0,
        le=3,
        title="Spread of amplitudes",
        description="How much cells differ about the amplitude that is known: standard deviation of its logarithm",
    )


def iter_infer(
    traces: Traces | TraceSource, model: str | Path | SpikeVAE = "universal", **settings: Any
) -> Iterator[SpikeInference]:
    """Like ``infer``, a block of ROIs at a time; stop consuming it to stop computing."""
    config = InferConfig(**settings)
    vae = shared_model(model, coupled=False)
    device = pick_device(config.device)
    vae.recognition.to(device).eval()
    # What is in memory is checked as a whole, so that an error comes before any work.
    dff = traces if isinstance(traces, TraceSource) else vae.preprocessing.apply(traces)
    provenance = provenance_of(vae, traces, config, device)
    step = max(1, BLOCK_FRAMES // dff.n_frames)
    blocks = [slice(start, start + step) for start in range(0, dff.n_rois, step)]
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    n_workers = min(threads, len(blocks))
    cores = (threads // n_workers, threads)

    def work(rows: slice) -> SpikeInference:
        block = dff.select(rows)
        return _infer_block(vae.preprocessing.apply(block), vae, config, cores, provenance)

    yield from _in_order(work, blocks, (n_workers, threads))


def devices() -> tuple[str, ...]:
    """Devices that this machine has, the one to prefer first."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return tuple(name for name, available in there.items() if available)


def pick_device(name: str = "auto") -> torch.device:
    """The device to compute on: CUDA, then Apple's MPS, then the CPU, unless one is asked for."""
    there = devices()
    if name == "auto":
        return torch.device(there[0])
    if name not in there:
        raise RecordingError(
            f"device: expected one of {', '.join(there)} on this machine, got {name!r}. "
            "Choose 'auto' to take the best one."
        )
    return torch.device(name)


def _in_order(
    work: Callable[[slice], SpikeInference], blocks: Sequence[slice], cores: tuple[int, int]
) -> Iterator[SpikeInference]:
    """Results of ``work`` on each block, as many at a time as the first of ``cores`` says, of the second in all."""
    pending: deque[Future[SpikeInference]] = deque()
    with _one_core_each(*cores) as pool:
        try:
            for block in blocks:
                pending.append(pool.submit(work, block))
                if len(pending) > cores[0]:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def _one_core_each(n: int, n_cores: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads that compute on one core each, of all that torch may use.

    One core per block is faster than all cores on each block in turn: a block is small, and torch's threads that wait
    for each other spin for seconds when another program wants the cores, too. Any thread that starts later takes the
    number that was set last, wherever that was: it is set back at once, in a thread that has no other use.
    """
    with ThreadPoolExecutor(n) as pool:
        with _STARTING:
            ready = threading.Barrier(n)

            def begin() -> None:
                torch.set_num_threads(1)
                torch.get_num_threads()  # or the first operation would ask once more what was set last
                ready.wait()

            wait([pool.submit(begin) for _ in range(n)])
            last = threading.Thread(target=torch.set_num_threads, args=(n_cores,))
            last.start()
            last.join()
        yield pool


@torch.inference_mode()
def _infer_block(
    dff: Traces, vae: SpikeVAE, config: InferConfig, cores: tuple[int, int], provenance: dict[str, Any]
) -> SpikeInference:
    """Of one block, on as many cores as the first number says, of the second in all."""
    device = next(vae.recognition.parameters()).device

    @cache
    def on_cpu() -> SpikeVAE:  # the same model beside the one on the device, made only where it is needed
        there = copy.deepcopy(vae)
        there.recognition.to("cpu")
        return there

    def with_model(model: SpikeVAE, apply: Callable[..., Iterable[Any]], part: Traces) -> SpikeInference:
        place = next(model.recognition.parameters()).device
        observed = torch.from_numpy(part.values.copy()).to(place)
        valid = torch.from_numpy(part.valid.copy()).to(place)
        posterior = model.recognition(observed, dff.frame_rate, valid, chunk=CHUNK, apply=apply)
        return inference_of(part, model, config, posterior, provenance, apply=apply)

    def each(apply: Callable[..., Iterable[Any]]) -> SpikeInference:
        # One ROI after the other: sums over time are rounded differently where several ROIs are added up at once, and
        # a ROI would depend on its neighbours in the last digits. On a GPU, where that is slow, it may.
        step = 1 if device.type == "cpu" else dff.n_rois
        ways: list[Callable[[Traces], SpikeInference]] = [partial(with_model, vae, apply)]
        if device.type != "cpu":
            ways.append(lambda part: with_model(on_cpu(), apply, part))
        parts = [dff.select(slice(start, start + step)) for start in range(0, dff.n_rois, step)]
        return SpikeInference.concatenate([found for part in parts for found in within_memory(part, ways)])

    if cores[0] == 1:
        return each(map)
    with _one_core_each(*cores) as pool:
        return each(pool.map)


def within_memory(part: Traces, ways: Sequence[Callable[[Traces], SpikeInference]]) -> list[SpikeInference]:
    """Infer all ROIs at once, in halves where memory runs out, or in the next of some ways where it does for one alone.

    Raises
    ------
    MemoryError
        If there is too little memory for a single ROI either way.
    """
    said = ""
    for place, way in enumerate(ways):
        try:
            return [way(part)]
        except (MemoryError, RuntimeError) as error:
            if not _ran_out(error):
                raise
            said = str(error).strip().partition("\n")[0]
        # Not in the clause above, where the error still holds on to what it was about.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if part.n_rois > 1:
            middle = part.n_rois // 2
            halves = part.select(slice(0, middle)), part.select(slice(middle, part.n_rois))
            return [found for half in halves for found in within_memory(half, ways[place:])]
    raise MemoryError(
        f"memory: expected enough for ROI {part.roi_ids[0]} of {part.n_frames} frames, got too little"
        f"{f' ({said})' if said else ''}. Draw fewer samples, close other programs, or cut the recording; results that "
        "are written stay."
    )


def _ran_out(error: BaseException) -> bool:
    """Whether this is what numpy and torch say where memory runs out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error)


@torch.inference_mode()
def inference_of(
    dff: Traces,
    vae: SpikeVAE,
    config: InferConfig,
    posterior: SpikePosterior,
    provenance: dict[str, Any],
    apply: Callable[..., Iterable[Any]] = map,
) -> SpikeInference:
    """Rates, samples, reconstruction and quality that follow from a posterior over the spikes of ΔF/F traces.

    ``apply`` is how a function is applied to parts of the samples: ``map``, or that of a thread pool.
    """
    device = next(vae.recognition.parameters()).device
    observed = torch.from_numpy(dff.values.copy()).to(device)
    valid = torch.from_numpy(dff.valid.copy()).to(device)
    if config.amplitude is not None:
        told = (config.amplitude, config.amplitude_spread)
        posterior = with_amplitude(posterior, vae, (observed, valid, dff.frame_rate), told)
    mean = posterior.mean
    predicted = posterior.theta
    if predicted is not None and predicted.names == tuple(p.name for p in vae.generative.parameters):
        estimated, doubt = predicted.theta, predicted.std
    else:
        estimated, doubt = vae.generative.initial_theta(observed, mean, dff.frame_rate, valid), {}
    given = {} if config.amplitude is None else {"amplitude": config.amplitude}
    known = {name: torch.full_like(estimated[name], value) for name, value in {**vae.theta, **given}.items()}
    theta = {**estimated, **known}
    # That of the expected spikes, which is the mean over all trains where spikes add up, and does not hang on how many
    # are drawn.
    drift, reconstructed = vae.generative.explanation(observed, mean, theta, dff.frame_rate, valid)
    noise = vae.generative.noise_std(theta, dff.frame_rate)
    events, spread = [np.empty(0, EVENT_DTYPE)], []
    # Compartments of one dendrite are rendered together, cells one by one: what that needs stays in the cache.
    step = dff.n_rois if vae.generative.coupled else 1
    for rows in (slice(start, start + step) for start in range(0, dff.n_rois, step)):
        ids = list(enumerate(dff.roi_ids))[rows]
        if config.n_samples:
            seen = _Seen(
                torch.where(valid[rows], observed[rows] - drift[rows], torch.nan), noise[rows], mean[rows].sum(-1)
            )
            own = {name: value[rows] for name, value in theta.items()}
            drawn, variance = _samples(
                partial(_draw, posterior.select(rows), config, [roi for _, roi in ids], device),
                partial(_render, seen=seen, generative=vae.generative, theta=own, rate=dff.frame_rate),
                config.n_samples,
                apply,
            )
            events += [to_events(drawn[:, k], row) for k, (row, _) in enumerate(ids)]
            residual = observed[rows].nan_to_num() - reconstructed[rows]
            spread += [_spread(*each) for each in zip(variance, residual, valid[rows], strict=True)]
        else:
            spread += list(noise[rows, None].expand(-1, dff.n_frames))
    rate = (mean * dff.frame_rate).cpu().numpy()
    reconstruction = reconstructed.cpu().numpy()
    reconstruction_std = torch.stack(spread).cpu().numpy()
    return SpikeInference(
        traces=dff,
        rate=rate,
        events=np.concatenate(events),
        n_samples=config.n_samples,
        reconstruction=reconstruction,
        reconstruction_std=reconstruction_std,
        theta={name: value.cpu().numpy() for name, value in theta.items()},
        quality=quality_table(
            Explained(dff.values, rate, reconstruction, reconstruction_std, dff.frame_rate, vae.trained_on)
        ),
        provenance=provenance,
        theta_std={name: value.cpu().numpy() for name, value in doubt.items() if name not in known},
    )


def with_amplitude(
    posterior: SpikePosterior, vae: SpikeVAE, recording: tuple[Tensor, Tensor, float], known: tuple[float, float]
) -> SpikePosterior:
    """The posterior at the gain that goes with a known amplitude per spike, as uncertain as that is.

    Spikes times amplitude is what the fluorescence tells; the gain is moved until the generative model, fitted to the
    expected spikes, has the amplitude that is known.

    Parameters
    ----------
    recording
        (roi, time) ΔF/F, which frames are measured, and the frame rate (Hz).
    known
        The amplitude (ΔF/F), and the standard deviation of its logarithm between cells.
    """
    (observed, valid, frame_rate), (amplitude, spread) = recording, known
    generative = vae.generative
    named = not generative.coupled and "amplitude" in {p.name for p in generative.parameters}
    if not isinstance(posterior, GainCategorical) or not named:
        raise RecordingError(
            f"amplitude: expected a model with a gain and an amplitude, got {vae.recognition.name} with "
            f"{generative.name}. Leave the amplitude out, or use the model universal."
        )
    found = posterior
    for _ in range(3):
        fitted = generative.initial_theta(observed, found.mean, frame_rate, valid)["amplitude"]
        total = (found.mean.sum(-1) * fitted / amplitude).clamp_min(1e-3)
        gain, few, many = (posterior.gain_for(total * math.exp(d)) for d in (0.0, -spread, spread))
        found = posterior.given(gain, (many - few) / 2)
    return found


def _samples(
    draw: Callable[[range], Tensor],
    render: Callable[[Tensor], Tensor],
    n_samples: int,
    apply: Callable[..., Iterable[tuple[Tensor, Tensor, Tensor]]],
) -> tuple[Tensor, Tensor]:
    """(sample, row, time) counts, and the variance of what they look like, (row, time).

    A few samples at a time: they stay in the cache, cores share them, and they are the same on any number of cores.
    """

    def part(numbers: range) -> tuple[Tensor, Tensor, Tensor]:
        with torch.inference_mode():
            counts = draw(numbers)
            traces = render(counts)
            average = traces.mean(0)
            # Two passes in place take a fortieth of the time of `torch.var_mean` over the first axis.
            return counts, average, traces.sub_(average).square_().mean(0)

    parts = list(apply(part, [range(k, min(k + _PART, n_samples)) for k in range(0, n_samples, _PART)]))
    share = [len(counts) / n_samples for counts, _, _ in parts]
    weight = torch.tensor(share, device=parts[0][1].device)[:, None, None]
    means, variances = (torch.stack([part[k] for part in parts]) for k in (1, 2))
    average = (weight * means).sum(0)
    variance = (weight * (variances + (means - average) ** 2)).sum(0)
    return torch.cat([counts for counts, _, _ in parts]), variance


def _draw(
    posterior: SpikePosterior, config: InferConfig, rois: Sequence[int], device: torch.device, numbers: range
) -> Tensor:
    """(sample, row, time) counts, of each row from a stream that depends on seed, ROI id and part alone."""
    drawn = []
    for row, roi in enumerate(rois):
        digest = hashlib.sha256(f"{config.seed}:{roi}:{numbers.start}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        one = posterior if len(rois) == 1 else posterior.select(slice(row, row + 1))
        drawn.append(one.sample(len(numbers), generator)[:, 0])
    return torch.stack(drawn, 1)


def to_events(samples: Tensor, row: int) -> np.ndarray:
    """Events, as in ``SpikeInference.events``, of the (sample, time) counts of one row."""
    where = samples.nonzero()
    events = np.zeros(len(where), EVENT_DTYPE)
    events["sample"], events["frame"] = where.cpu().numpy().T
    events["count"] = samples[where[:, 0], where[:, 1]].cpu().numpy()
    events["roi"] = row
    return events


@dataclass(frozen=True)
class _Seen:
    """What sampled trains explain: (row, time) ΔF/F without drift, NaN where missing; its noise; expected spikes."""

    dff: Tensor
    noise: Tensor
    spikes: Tensor


def _render(samples: Tensor, seen: _Seen, generative: GenerativeModel, theta: Theta, rate: float) -> Tensor:
    """(sample, row, time) noise-free ΔF/F of sampled trains, each with the amplitude that goes with its spikes.

    A train of twice the spikes goes with half the response to each, and the data hardly tell the two apart. One
    amplitude for all samples would show that freedom as misfit. Each has the most probable one: a priori it makes up
    for the number of spikes to within a factor of three or so, and the fluorescence says the rest.
    """
    counts = samples.to(seen.spikes.dtype)
    # The added spike keeps near-silent cells from extremes.
    scale = (seen.spikes[:, None] + 1) / (counts.sum(-1, keepdim=True) + 1)
    if generative.coupled:
        # A compartment adds up several trains, each of an amplitude of its own.
        return generative.fluorescence(counts.mul_(scale), theta, rate)
    baseline = theta["baseline"][:, None]
    response = generative.fluorescence(counts, theta, rate).sub_(baseline)
    measured = torch.isfinite(seen.dff)
    wanted = torch.where(measured, seen.dff - baseline, 0)
    shown = response if bool(measured.all()) else response * measured
    precision = seen.noise[:, None] ** -2
    own, both = ((shown * other).sum(-1, keepdim=True) * precision for other in (shown, wanted))
    scale = (both + 0.25 / scale) / (own + 0.25 / scale**2)
    return response.mul_(scale.clamp_min_(0)).add_(baseline)


def _spread(variance: Tensor, residual: Tensor, valid: Tensor) -> Tensor:
    """Standard deviation to be expected around the mean trace, as far as the residuals bear it out.

    It is white noise and a share of the ``variance`` of the samples. Samples whose frames are independent given the
    gain overstate how much a burst's fluorescence may vary, since a spike more here goes with one less there: the share
    is the one under which the residuals are most likely.
    """
    power = torch.where(valid, residual, 0.0) ** 2
    n = valid.sum().clamp_min(1)
    total = (power.sum() / n).clamp_min(1e-12)
    share = torch.linspace(0, 1, 11, dtype=power.dtype, device=power.device)[:, None] ** 2
    white = (total - share * (variance * valid).sum() / n).clamp_min(0.1 * total)
    expected = white + share * variance
    log_likelihood = -(((power / expected) + expected.log()) * valid).sum(-1)
    return expected[log_likelihood.argmax()].sqrt()


def input_sha256(traces: Traces | TraceSource) -> str:
    """SHA-256 of a recording, of ids, rate, unit, shape and every value; that takes a hundredth of inference's time."""
    facts = (traces.roi_ids, traces.frame_rate, traces.unit, traces.t0, traces.n_frames)
    digest = hashlib.sha256(repr(facts).encode())
    step = rois_per_block(traces.n_frames, traces.chunk_rows if isinstance(traces, TraceSource) else 1)
    for start in range(0, traces.n_rois, step):
        digest.update(np.ascontiguousarray(traces.select(slice(start, start + step)).values).data)
    return digest.hexdigest()


def provenance_of(
    vae: SpikeVAE, traces: Traces | TraceSource, config: InferConfig, device: torch.device | None = None
) -> dict[str, Any]:
    """How an inference came about: JSON-like; without ``device`` it states the one that was asked for."""
    return {
        "model": vae.description,
        **vae.identity(),
        "generative_model": vae.generative.name,
        "settings": config.model_dump() | ({"device": str(device)} if device else {}),
        "preprocessing": vae.preprocessing.model_dump() | {"input_unit": traces.unit},
        "input": dict(traces.provenance),
        "input_sha256": input_sha256(traces),
        "versions": {
            "napari-calvae": importlib.metadata.version("napari-calvae"),
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
