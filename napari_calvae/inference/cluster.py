"""Where batches are computed: Dask clusters, named in a word."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from napari_calvae.recording import RecordingError

#: Queues, and the class of dask-jobqueue that submits jobs to each.
QUEUES = {"slurm": "SLURMCluster", "pbs": "PBSCluster", "lsf": "LSFCluster", "sge": "SGECluster"}
#: Jobs that are submitted where their number is not said.
_JOBS = 10
#: Dask's own configuration tells workers to give memory back at once; to get it anew for every tensor takes as long as
#: to compute it.
SETTINGS = {
    "distributed.scheduler.worker-saturation": 1.0,
    "distributed.nanny.pre-spawn-environ": {
        "OMP_NUM_THREADS": 1,
        "MKL_NUM_THREADS": 1,
        "OPENBLAS_NUM_THREADS": 1,
    },
}
#: How long a scheduler may take to answer.
_TIMEOUT = "20s"


def check_main_script() -> None:
    """Say what a script lacks if this is a worker that has only come here because it reads the script anew."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # what multiprocessing itself goes by
        raise RecordingError(
            "scheduler: expected a script in which the inference stands below `if __name__ == '__main__':`, got one "
            "that starts it again in every worker. Put it there, or use the command line: calvae infer … --scheduler "
            "local:N."
        )


@contextmanager
def connected(scheduler: str, n_tasks: int) -> Iterator[Any]:
    """Give a ``distributed.Client`` of the cluster that ``scheduler`` names; it is closed with what was started for it.

    Parameters
    ----------
    scheduler
        ``local[:N]``, the address of a running scheduler, or a queue as in ``slurm[:N]``.
    n_tasks
        How many tasks there will be; no more workers than that are started.

    Raises
    ------
    RecordingError
        If there is no such cluster, it does not answer, or what it needs is not installed.
    """
    try:
        import dask
        from distributed import Client
    except ImportError as error:
        raise RecordingError(
            f"scheduler: expected dask.distributed, got {error}. Run: pip install 'napari-calvae[cluster]'"
        ) from error
    with dask.config.set(SETTINGS), _cluster(scheduler, n_tasks) as cluster:
        try:
            client = Client(cluster, timeout=_TIMEOUT, set_as_default=False)
        except (OSError, ValueError) as error:
            raise RecordingError(
                f"scheduler: expected a Dask scheduler that answers at {scheduler}, got {error}. "
                "Start one with `dask scheduler`, and workers that have napari-calvae installed."
            ) from error
        with client:
            yield client


@contextmanager
def _cluster(scheduler: str, n_tasks: int) -> Iterator[Any]:
    """Give a cluster that was started for this, or the address of one that runs already."""
    kind, _, number = scheduler.partition(":")
    if re.match(r"(tcp|tls|ws|wss|ucx|inproc)://", scheduler):
        yield scheduler
        return
    if kind not in ("local", *QUEUES) or (number and not (number.isdecimal() and int(number))):
        raise RecordingError(
            f"scheduler: expected local, local:N, tcp://HOST:PORT or {', '.join(QUEUES)} (:N), got {scheduler!r}."
        )
    if kind == "local":
        from dask.system import CPU_COUNT
        from distributed import LocalCluster

        n_workers = min(int(number) if number else CPU_COUNT, max(n_tasks, 1))
        try:
            local = LocalCluster(n_workers=n_workers, threads_per_worker=1, processes=True, dashboard_address=":0")
        except (OSError, RuntimeError) as error:
            raise RecordingError(
                f"scheduler: expected worker processes that start ({n_workers}), got '{error}'. In a script the "
                "inference has to stand below `if __name__ == '__main__':`, since every worker reads the script anew. "
                "If it does, ask for fewer (local:N), or leave scheduler out."
            ) from None  # eighty lines of dask, in which the sentence would be lost
        with local as cluster:
            yield cluster
        return
    try:
        import dask_jobqueue
    except ImportError as error:
        raise RecordingError(
            f"scheduler: expected dask-jobqueue, got {error}. Run: pip install 'napari-calvae[cluster]'"
        ) from error
    try:
        cluster = getattr(dask_jobqueue, QUEUES[kind])()
    except (TypeError, ValueError) as error:
        raise RecordingError(
            f"scheduler: expected a description of {kind} jobs in the configuration of dask-jobqueue "
            f"(cores, memory, queue), got {error}. Write it into ~/.config/dask/jobqueue.yaml."
        ) from error
    with cluster:
        n_jobs = min(int(number) if number else _JOBS, max(n_tasks, 1))
        cluster.adapt(minimum_jobs=n_jobs, maximum_jobs=n_jobs)  # jobs that end too early are submitted again
        yield cluster
