"""A spike VAE: prior, generative model, recognition network and the preprocessing that they assume. What one saves."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from napari_calvae.errors import ModelError, RecordingError
from napari_calvae.formats import whole_files
from napari_calvae.generative import MODELS, NOISES, PRIORS, BurstyPrior, GenerativeModel, Noise, SpikePrior
from napari_calvae.preprocess import check_traces, delta_f_over_f, usable
from napari_calvae.recognition import NETWORKS, RecognitionNetwork, build_network
from napari_calvae.recording import Traces

#: 2: noise with options and weights, other priors. 1 is still read.
SCHEMA = 2
#: Frame rates this factor beyond those of the training are taken, too.
_LEEWAY = 1.05
#: What the names of the noise's weights begin with in a file.
_NOISE = "generative.noise."
#: Longest name of a file (characters) that file systems take.
_LONGEST_NAME = 255
#: Name of what the training was like, among the weights.
_TRAINED_ON = "trained_on"


class Preprocessing(BaseModel):
    """What must happen to traces before the recognition network sees them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    baseline_window: float = Field(60.0, gt=0, title="Baseline window", description="Running percentile over (s)")
    baseline_percentile: float = Field(10.0, ge=0, le=100, title="Baseline percentile", description="Of the window (%)")
    min_frame_rate: float = Field(3.0, gt=0, title="Lowest frame rate", description="Seen in training (Hz)")
    max_frame_rate: float = Field(120.0, gt=0, title="Highest frame rate", description="Seen in training (Hz)")

    def apply(self, traces: Traces) -> Traces:
        """ΔF/F of the traces, or an error that says why no spikes can be inferred from them."""
        check_traces(traces)
        self.check_rate(traces.frame_rate)
        if traces.unit == "dff":
            return traces
        return delta_f_over_f(traces, self.baseline_window, self.baseline_percentile)

    def usable(self, traces: Traces) -> np.ndarray:
        """(roi,) which of the traces ``apply`` takes."""
        return usable(traces, self.baseline_window, self.baseline_percentile)

    def check_rate(self, frame_rate: float) -> float:
        """The frame rate (Hz), or an error if it is far from those of the training."""
        low, high = self.min_frame_rate, self.max_frame_rate
        # Microscopes that are said to run at 120 Hz run at 122.
        if not low / _LEEWAY <= frame_rate <= high * _LEEWAY:
            raise RecordingError(
                f"frame rate: expected {low:g} to {high:g} Hz, where this model was trained, got {frame_rate:g} "
                "Hz. Resample the traces into that range, for example with napari_calvae.preprocess.resample."
            )
        return frame_rate


@dataclass(eq=False)
class SpikeVAE:
    """Prior p(s), generative model p(F | s, θ) and recognition network q(s, θ | F), with the preprocessing they assume.

    Parameters
    ----------
    recognition, generative, prior, preprocessing
        The parts.
    theta
        Parameters of the generative model that were learned for all cells, in physical units; those not named are
        estimated for each cell when it is inferred, by the network where it has a head for them.
    description
        One line for people.
    """

    recognition: RecognitionNetwork
    generative: GenerativeModel
    prior: SpikePrior | BurstyPrior
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    theta: Mapping[str, float] = field(default_factory=dict)
    description: str = ""
    #: (trace, descriptor) `metrics.describe` of traces that it was trained on, if that is known.
    trained_on: np.ndarray | None = None
    #: SHA-256 of the file it was read from or written to, and its checksum then.
    _file: tuple[str, str] = field(default=("", ""), repr=False)

    def __post_init__(self) -> None:
        network, model = self.recognition, self.generative
        if network.coupled != model.coupled:
            kinds = {True: "a shaft with its spines", False: "single cells"}
            raise ModelError(
                f"SpikeVAE: expected network and generative model for the same, got {network.name} for "
                f"{kinds[network.coupled]} and {model.name} for {kinds[model.coupled]}. Change one of them."
            )
        head = network.theta_head
        names = tuple(p.name for p in model.parameters)
        if head is not None and tuple(entry.name for entry in head.entries) != names:
            raise ModelError(
                f"SpikeVAE: expected a network that predicts {', '.join(names)}, got one with "
                f"{', '.join(entry.name for entry in head.entries)}. Use the generative model and noise that it was "
                "trained with, or remove its head by forget_theta()."
            )

    @property
    def sha256(self) -> str:
        """SHA-256 of the file it was read from or written to; empty if there is none, or it is no longer as there."""
        return self.identity()["model_sha256"]

    def identity(self) -> dict[str, str]:
        """What tells it from all others: ``model_sha256``, of its file, and ``model_checksum``.

        The latter is of all that inference depends on, as it is now: weights and settings, but not the description.
        """
        _, spec = self._contents()
        checksum = hashlib.sha256(json.dumps(spec | {"description": ""}, sort_keys=True).encode()).hexdigest()
        file, then = self._file
        return {"model_sha256": file if then == checksum else "", "model_checksum": checksum}

    def made(self, provenance: Mapping[str, Any]) -> bool:
        """Whether a result with this provenance was inferred with this very model."""
        own = self.identity()
        return any(own[name] != "" and own[name] == provenance.get(name) for name in own)

    def copy(self) -> SpikeVAE:
        """A model with parts of its own where they can be changed, on the CPU."""
        own = copy.copy(self)
        own.recognition, own.generative = copy.deepcopy(self.recognition).cpu(), copy.deepcopy(self.generative)
        own.theta = dict(self.theta)
        return own

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: weights, and a JSON description with their checksum in its header.

        What a prior has learned cell by cell does not outlast the recording; a value for cells in general is kept.
        """
        path = Path(path)
        weights, spec = self._contents()
        data = save_tensors(weights, metadata={"calvae": json.dumps(spec, sort_keys=True)})
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_files(path) as (temporary,):
            temporary.write_bytes(data)
        self._file = hashlib.sha256(data).hexdigest(), self.identity()["model_checksum"]
        return path

    def _contents(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Weights and description, as they are saved."""
        noise = self.generative.noise
        learned = {_NOISE + name: t for name, t in noise.learned.state_dict().items()}
        if self.trained_on is not None:
            learned[_TRAINED_ON] = torch.as_tensor(self.trained_on, dtype=torch.float32)
        weights = {name: t.detach().cpu().contiguous() for name, t in (self.recognition.state_dict() | learned).items()}
        return weights, {
            "schema": SCHEMA,
            "recognition": {"kind": self.recognition.name, "config": self.recognition.config},
            "generative": self.generative.name,
            "noise": {"kind": noise.name, "config": noise.config},
            "prior": {"kind": self.prior.name, "config": self.prior.config},
            "preprocessing": self.preprocessing.model_dump(),
            "theta": {name: float(value) for name, value in self.theta.items()},
            "description": self.description,
            "weights_sha256": _checksum(weights),
        }

    @classmethod
    def load(cls, path: str | Path) -> SpikeVAE:
        """Read what ``save`` wrote.

        Raises
        ------
        ModelError
            If the file is missing, damaged or of another kind.
        """
        path = Path(path)
        if not path.is_file():
            raise ModelError(f"model: expected a .safetensors file, found none at {path}. Check the name or the path.")
        data = path.read_bytes()
        try:
            spec = _read_spec(data)
            weights = load_tensors(data)
            if spec["schema"] not in (1, SCHEMA):
                raise ModelError(
                    f"model {path.name}: expected schema {SCHEMA} or older, got {spec['schema']}. "
                    "Update napari-calvae, or save the model again with this version."
                )
            if _checksum(weights) != spec["weights_sha256"]:
                raise ModelError(
                    f"model {path.name}: the weights do not match their checksum, so the file is damaged. "
                    "Copy or download it again."
                )
            kind, config = spec["recognition"]["kind"], spec["recognition"]["config"]
            recognition = build_network(kind, {**NETWORKS[kind].unnamed, **config})
            trained_on = weights.pop(_TRAINED_ON, None)
            recognition.load_state_dict({k: v for k, v in weights.items() if not k.startswith(_NOISE)})
            model = cls(
                recognition=recognition.eval(),
                generative=MODELS[spec["generative"]](_noise(spec.get("noise", "gaussian"), weights)),
                prior=_prior(spec["prior"]),
                preprocessing=Preprocessing(**spec["preprocessing"]),
                theta=spec["theta"],
                description=str(spec["description"]),
                trained_on=None if trained_on is None else trained_on.numpy(),
            )
        except ModelError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError, ValidationError, struct.error, MemoryError) as error:
            raise ModelError(
                f"model {path.name}: expected a file written by napari-calvae, got one that cannot be read "
                f"({type(error).__name__}: {str(error)[:120]}). Choose another file or save the model again."
            ) from error
        except Exception as error:
            # safetensors raises a class of its own for a damaged header.
            if type(error).__module__.startswith("safetensors"):
                raise ModelError(
                    f"model {path.name}: expected a safetensors file, got a damaged or foreign one ({error}). "
                    "Copy or download it again."
                ) from error
            raise
        model._file = hashlib.sha256(data).hexdigest(), model.identity()["model_checksum"]
        return model


def models() -> dict[str, Path]:
    """Shipped models by name, the default first."""
    folder = resources.files("napari_calvae.pretrained")
    found = {
        p.name.removesuffix(".safetensors"): Path(str(p)) for p in folder.iterdir() if p.name.endswith(".safetensors")
    }
    return dict(sorted(found.items(), key=lambda item: (item[0] != "universal", item[0])))


def load_model(model: str | Path | SpikeVAE = "universal", coupled: bool | None = None) -> SpikeVAE:
    """A model by the name under which it ships or by file, which is the caller's own; one that is given, as it is.

    Parameters
    ----------
    model
        Name, file or model.
    coupled
        Whether it has to be one for a shaft with its spines (True) or for traces that are each a cell's (False); by
        default it may be either.

    Raises
    ------
    ModelError
        If there is none, or one of the other kind.
    """
    found = shared_model(model, coupled)
    return found if isinstance(model, SpikeVAE) else found.copy()


def shared_model(model: str | Path | SpikeVAE, coupled: bool | None = None) -> SpikeVAE:
    """As ``load_model``, but one that everybody gets: nobody may change it, other than take it to a device."""
    vae = model if isinstance(model, SpikeVAE) else _load_named(model)
    if coupled is not None and vae.recognition.coupled != coupled:
        kinds = {True: "a shaft with its spines", False: "traces that are each a cell's"}
        instead = {True: "model='spines'", False: "model='universal', or napari_calvae.infer_spines for spines"}
        raise ModelError(
            f"model: expected one for {kinds[coupled]}, got one for {kinds[not coupled]} "
            f"({vae.recognition.name}). Use {instead[coupled]}."
        )
    return vae


def _load_named(model: str | Path) -> SpikeVAE:
    shipped = models()
    if str(model) in shipped:
        path = shipped[str(model)]
    else:
        path = Path(model) if isinstance(model, str | os.PathLike) else None
        # A name too long for a file system raises in some versions of Python.
        if path is None or len(path.name) > _LONGEST_NAME or not path.is_file():
            raise ModelError(
                f"model: expected one of {', '.join(shipped) or '(none shipped)'} or a .safetensors file, "
                f"got {str(model)[:80]!r}."
            )
    stat = path.stat()
    return _load_cached(path, stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _load_cached(path: Path, _modified: int, _size: int) -> SpikeVAE:
    return SpikeVAE.load(path)


def _noise(spec: str | Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Noise:
    """Noise as it was saved; the first files held its name alone."""
    kind, config = (spec, {}) if isinstance(spec, str) else (spec["kind"], spec["config"])
    noise = NOISES[kind](**config)
    noise.learned.load_state_dict({k.removeprefix(_NOISE): v for k, v in weights.items() if k.startswith(_NOISE)})
    return noise


def _prior(spec: Mapping[str, Any]) -> SpikePrior | BurstyPrior:
    """Prior as it was saved; the first files held the values of a Poisson prior alone."""
    if "kind" not in spec:
        return SpikePrior(**spec)
    return PRIORS[spec["kind"]](**spec["config"])


def _read_spec(data: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", data[:8])
    if length > min(len(data) - 8, 1_000_000):
        raise ModelError("model: expected a safetensors header, got a damaged or foreign file. Copy it again.")
    return json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["calvae"])


def _checksum(weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        array = np.ascontiguousarray(weights[name].numpy())
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
