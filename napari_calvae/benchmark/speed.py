"""Speed, always beside a rival on the same traces in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np
import torch

from napari_calvae.benchmark.ground_truth import oasis_method
from napari_calvae.inference import infer
from napari_calvae.recording import Traces
from napari_calvae.vae import SpikeVAE, load_model


def speed(model: str | SpikeVAE = "universal", n_frames: int = 54_000, repeats: int = 5) -> Iterator[dict[str, object]]:
    """Rows of the table: seconds for one trace on one core, ours and OASIS, median of ``repeats``."""
    rng = np.random.default_rng(0)
    kernel = np.exp(-np.arange(90) / 20)
    trace = np.convolve(rng.poisson(0.03, n_frames), kernel)[:n_frames] * 0.2 + 0.1 * rng.standard_normal(n_frames)
    traces = Traces(trace, frame_rate=30.0)
    vae = load_model(model)
    network, tensor = vae.recognition, torch.as_tensor(trace, dtype=torch.float32)[None]
    oasis = {order: oasis_method(order) for order in (1, 2)}

    def mean_rate() -> None:
        with torch.inference_mode():
            _ = network(tensor, 30.0).mean

    tasks: dict[str, Callable[[], object]] = {
        "calvae, mean rate": mean_rate,
        "calvae, 50 samples and reconstruction": lambda: infer(traces, vae, n_samples=50),
        "OASIS AR1": lambda: oasis[1](trace, 30.0),
        "OASIS AR2": lambda: oasis[2](trace, 30.0),
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, task in tasks.items():
            task()
            seconds = float(np.median([_time(task) for _ in range(repeats)]))
            yield {"task": name, "seconds": seconds, "frames per second": n_frames / seconds}
    finally:
        torch.set_num_threads(threads)


def _time(task: Callable[[], object]) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start
