"""Fit a model to one recording, with true spikes or without, and keep the old one where the new one is no better."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from napari_calvae import objectives
from napari_calvae.fitting.judgement import BoundJudge, DreamJudge, Judge, split
from napari_calvae.fitting.losses import BoundLoss, InfoVAELoss, SemiSupervisedLoss, Snippets, SupervisedLoss
from napari_calvae.fitting.sleep import SleepLoss
from napari_calvae.generative import MODELS, NOISES, GenerativeModel
from napari_calvae.recognition import RecognitionNetwork
from napari_calvae.recording import RecordingError, Traces
from napari_calvae.training import Loss, TrainConfig, TrainRecord, iter_train
from napari_calvae.vae import SpikeVAE, shared_model

Objective = Literal["sleep", "vimco", "wake_sleep", "elbo", "info_vae", "supervised", "semi_supervised"]

#: What is done with cells whose spikes are not known. Beside labels wake-sleep serves cells that were not seen better
#: than VIMCO: by 0.1 in correlation with five labelled cells of two GCaMP6s data sets (DS15, DS40).
_BOUNDS = {
    "vimco": objectives.vimco,
    "wake_sleep": objectives.wake_sleep,
    "elbo": objectives.elbo,
    "semi_supervised": objectives.wake_sleep,
}

#: Settings that are used where none are given: sleep adaptation helps within few updates, and drifts after many. The 22
#: data sets, each left out, gained as much after 150 steps; one in three fits is kept.
DEFAULTS: dict[str, TrainConfig] = {name: TrainConfig() for name in get_args(Objective)} | {
    "sleep": TrainConfig(n_steps=80, learning_rate=2e-4)
}


def fit(
    traces: Traces,
    base: str | Path | SpikeVAE = "universal",
    objective: Objective = "sleep",
    *,
    spikes: np.ndarray | None = None,
    generative: str | None = None,
    noise: str | None = None,
    config: TrainConfig | None = None,
    checkpoint: str | Path | None = None,
) -> SpikeVAE:
    """Fit a model to a recording; see ``iter_fit``, which reports every step."""
    steps = iter_fit(
        traces,
        base,
        objective,
        spikes=spikes,
        generative=generative,
        noise=noise,
        config=config,
        checkpoint=checkpoint,
    )
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def iter_fit(
    traces: Traces,
    base: str | Path | SpikeVAE = "universal",
    objective: Objective = "sleep",
    *,
    spikes: np.ndarray | None = None,
    generative: str | None = None,
    noise: str | None = None,
    config: TrainConfig | None = None,
    checkpoint: str | Path | None = None,
) -> Generator[TrainRecord, None, SpikeVAE]:
    """Fit the recognition network to a recording; yields a record per step and returns the model.

    Without true spikes a fifth of the cells (of a single cell the last quarter) is held out. The new network is kept if
    the importance-weighted bound on their fluorescence got better. For ``"sleep"`` it is kept if its rates go better
    with the spikes from which these cells were rendered, by more than 0.02 in correlation, and it may be a mean of the
    old and the new weights that does best. Otherwise the model that comes back has the weights of ``base``. Its
    ``description`` says which it was.

    Parameters
    ----------
    traces
        (roi, time) fluorescence.
    base
        Where to start: a shipped model, a file or a ``SpikeVAE``. It is left as it is.
    objective
        ``"sleep"``: unsupervised, spikes and fluorescence as the generative model, fitted to these traces, makes them.
        ``"vimco"``: unsupervised, the importance-weighted bound (Mnih & Rezende 2016) over network, per-cell θ and
        rates. It wants a network that finds the spikes already: on noise that it had not met, one drifted to a third
        of the spikes at twice the amplitude while its bound rose.
        ``"wake_sleep"``: the same bound by reweighted wake-sleep (Bornschein & Bengio 2015).
        ``"elbo"``: the evidence lower bound.
        ``"info_vae"``: that, with all cells' spikes together like their prior's (Zhao, Song & Ermon 2019).
        ``"supervised"``: the log-probability of ``spikes``.
        ``"semi_supervised"``: that of the cells whose spikes are given, weighted by ``config.label_weight``, and
        wake-sleep for the others (after Kingma et al. 2014).
    spikes
        (roi, time) true counts per frame, for the last two; for the last, NaN throughout in cells without.
    generative
        Name in ``generative.MODELS``, of a model for single cells; by default the one of ``base``.
    noise
        Name in ``generative.NOISES``, ``"drift"`` where the baseline is not steady; by default the one of ``base``. A
        flow's weights are trained as well.
    config
        How to train, by default as in ``DEFAULTS``. With ``early_stopping`` training also ends when the held-out cells
        stop gaining, and their best weights are the ones that are judged.
    checkpoint
        File from which an interrupted fit with the same arguments goes on, to the same weights bit for bit. It keeps
        the history of every term, too: `training.read_history`.

    Raises
    ------
    RecordingError
        If traces and settings do not go together.
    """
    if objective not in get_args(Objective):
        raise RecordingError(f"objective: expected one of {', '.join(get_args(Objective))}, got {objective!r}.")
    config = config or DEFAULTS[objective]
    labelled = "supervised" in objective
    if spikes is not None and not labelled:
        raise RecordingError(
            f"spikes: expected none with the objective {objective}, which learns without, got some. "
            "Choose supervised or semi_supervised, or leave them out."
        )
    if config.early_stopping and labelled:
        raise RecordingError(
            f"early_stopping: expected False with the objective {objective}, which holds no cells out, got True."
        )
    model = shared_model(base, coupled=False).copy()
    if generative is not None or noise is not None:
        model.generative = _generative(model.generative, generative, noise)
        names = [p.name for p in model.generative.parameters]
        model.theta = {name: value for name, value in model.theta.items() if generative is None and name in names}
        model.recognition.forget_theta()
    dff = model.preprocessing.apply(traces)
    judge = None
    if not labelled:
        dff, held = split(dff, config.seed)
        judge = (DreamJudge if objective == "sleep" else BoundJudge)(model, held, config)
    start = copy.deepcopy((model.recognition, model.generative))
    # It was learned with weights that now change.
    model.recognition.forget_theta()
    loss, trained = _loss(objective, model, dff, spikes, config)
    records = iter_train(
        trained,
        loss,
        config,
        None if checkpoint is None else Path(checkpoint),
        held_out=None if judge is None or not config.early_stopping else lambda: -judge.gain(model),
        rates={"1.": config.cell_learning_rate},
        made_for=f"{objective}, {model.generative.name}, {_fingerprint(model, dff, spikes, config)}",
    )
    n_steps = config.n_steps
    for record in records:
        n_steps = record.step
        every = config.snapshot_every
        yield replace(record, model=model.copy()) if every and (n_steps == 1 or n_steps % every == 0) else record
    outcome = f"fitted by {objective}, {n_steps} steps, seed {config.seed}"
    if judge is not None:
        outcome += f", {_settle(model, start, judge)}"
    model.description = f"{model.description}; {outcome}"
    return model


def _settle(model: SpikeVAE, start: tuple[RecognitionNetwork, GenerativeModel], judge: Judge) -> str:
    """Give a fitted model the weights that the judge finds best, from the old ones to its own; says which in words."""
    old, new = start[0].state_dict(), copy.deepcopy(model.recognition.state_dict())

    def mix(share: float) -> None:
        model.recognition.load_state_dict({name: old[name].lerp(new[name], share) for name in new})

    gains = {}
    for share in judge.shares:
        mix(share)
        gains[share] = judge.gain(model)
    best = max(gains, key=gains.__getitem__)
    if gains[best] > judge.least:
        mix(best)
        return f"kept{'' if best == 1 else f' by {best:.0%}'}: {judge.told(gains[best])}"
    model.recognition, model.generative = start
    return f"not kept, weights of the base: {judge.told(gains[best])}"


def _loss(
    objective: Objective, model: SpikeVAE, dff: Traces, spikes: np.ndarray | None, config: TrainConfig
) -> tuple[Loss, nn.Module]:
    """The loss of a step, and what it trains: the network, and after it the cells where there are any."""
    snippets = Snippets(dff, config)
    if objective == "supervised":
        return SupervisedLoss(model, snippets, _check_spikes(spikes, dff)), nn.ModuleList([model.recognition])
    if objective == "sleep":
        return SleepLoss(model, snippets, config.shared_kinetics), nn.ModuleList([model.recognition])
    bound = BoundLoss(model, snippets, config, _BOUNDS.get(objective, objectives.elbo))
    trained = nn.ModuleList([model.recognition, bound.cells, model.generative.noise.learned])
    if objective == "info_vae":
        return InfoVAELoss(bound, config.discrepancy_weight), trained
    if objective != "semi_supervised":
        return bound, trained
    known = np.asarray(spikes, float) if spikes is not None else np.full(dff.values.shape, np.nan)
    labelled = ~np.isnan(known).all(-1) if known.shape == dff.values.shape else np.ones(1, bool)
    if not labelled.any():
        raise RecordingError(
            "spikes: the semi-supervised objective expects true counts (roi, time) of some cells, got none. "
            "Give spikes=…, with NaN in the rows of the others."
        )
    if known.shape == dff.values.shape:
        known[~labelled] = 0
    truth = _check_spikes(known, dff)
    return SemiSupervisedLoss(bound, truth, torch.from_numpy(labelled), config.label_weight), trained


def _fingerprint(model: SpikeVAE, dff: Traces, spikes: np.ndarray | None, config: TrainConfig) -> str:
    """Of the model, the recording and the labels that a fit starts from, and of its settings."""
    digest = hashlib.sha256(config.model_dump_json(exclude={"snapshot_every"}).encode())
    digest.update(model.identity()["model_checksum"].encode())
    digest.update(dff.values.tobytes())
    if spikes is not None:
        digest.update(np.ascontiguousarray(spikes).tobytes())
    return digest.hexdigest()[:16]


def _generative(now: GenerativeModel, model: str | None, noise: str | None) -> GenerativeModel:
    """Another generative model, another noise, or both; what is not named stays."""
    single = [name for name, cls in MODELS.items() if not cls.coupled]
    for name, known, what in ((model, single, "generative model"), (noise, NOISES, "noise")):
        if name is not None and name not in known:
            raise RecordingError(f"{what}: expected one of {', '.join(known)}, got {name!r}.")
    return MODELS[model or now.name](NOISES[noise]() if noise else now.noise)


def _check_spikes(spikes: np.ndarray | None, dff: Traces) -> Tensor:
    if spikes is None:
        raise RecordingError(
            "spikes: the supervised objective expects true counts (roi, time), got none. Give spikes=…."
        )
    counts = np.atleast_2d(np.asarray(spikes))
    if counts.shape != dff.values.shape:
        raise RecordingError(
            f"spikes: expected counts of shape {dff.values.shape} like the traces, got {counts.shape}."
        )
    whole = counts.dtype.kind in "fiub" and np.isfinite(counts).all() and np.array_equal(counts, np.round(counts))
    if not whole or counts.min() < 0 or counts.max() > np.iinfo(np.int64).max:
        raise RecordingError("spikes: expected whole counts per frame, 0 or more. Bin the spike times first.")
    return torch.from_numpy(counts.astype(np.int64))
